"""The loss over steps, tokens and time: against pandas' average, by hand, and on runs with gaps, continuations and other names."""

import numpy as np
import pandas as pd
import pytest

from optiscope.analysis.training_curve import ema, first_reach, saved, spent, stated, training_curve, validation_loss

SIGMA = {"layers.0.attn.q_proj.weight": {"sigma": (2.0, 1.0)}}


def test_evenly_spaced_it_is_pandas_average_with_bias_correction():
    values = np.random.default_rng(0).standard_normal(200).cumsum()
    found = ema(values, np.arange(1, 201), 12.5)
    expected = pd.Series(values).ewm(alpha=1 - np.exp(-1 / 12.5), adjust=True).mean().to_numpy()
    # Rounding of sums of up to 200 terms: measured 2e-14.
    np.testing.assert_allclose(found, expected, rtol=1e-12, atol=1e-12)


def test_unevenly_spaced_it_is_the_weighted_mean_written_out():
    steps, values = np.array([3, 4, 10, 11, 40]), np.array([5.0, 4.0, 3.0, 2.5, 1.0])
    weight = np.diff(np.exp(steps / 7.0), prepend=np.exp(2 / 7.0))  # (1 − d)·e^{step/T}, d the decay since the one before
    expected = np.cumsum(weight * values) / np.cumsum(weight)
    np.testing.assert_allclose(ema(values, steps, 7.0), expected, rtol=1e-12)


def test_a_constant_stays_what_it_is_from_the_first_value_on():
    np.testing.assert_allclose(ema(np.full(50, 3.0), np.arange(1, 51) * 10, 25.0), 3.0, rtol=1e-14)


@pytest.mark.parametrize("name", ["loss", "train.loss", "training_loss", "loss_step"])
def test_losses_of_several_trainers_are_found(build_run, name):
    curve = training_curve(build_run(SIGMA, scalars={"lr": [1, 1, 1], name: [3.0, np.nan, 1.0]}))
    assert curve.attrs["loss_name"] == name
    assert curve["step"].values.tolist() == [10, 30]
    assert curve["loss"].values.tolist() == [3.0, 1.0]


@pytest.mark.parametrize(
    ("names", "training", "validation"),
    [
        (["Loss.train", "Loss.test"], "Loss.train", "Loss.test"),
        (["gpt.Loss", "gpt.val.loss", "gpt.accuracy"], "gpt.Loss", "gpt.val.loss"),
        (["a.b.loss", "z.loss", "c.loss", "loss.scale", "aux_loss"], "c.loss", None),
        (["own.loss", "train_loss", "test.loss"], "train_loss", "test.loss"),
    ],
)
def test_a_name_whose_last_part_is_loss_is_found_where_no_usual_one_is(build_run, names, training, validation):
    run = build_run(SIGMA, scalars={name: [3.0 + i, 2.0, 1.0] for i, name in enumerate(names)})
    assert training_curve(run).attrs["loss_name"] == training
    steps, values = validation_loss(run)
    assert values.tolist() == ([] if validation is None else [3.0 + names.index(validation), 2.0, 1.0])
    assert len(steps) == len(values)


def test_a_loss_of_held_out_data_is_no_training_loss(build_run):
    with pytest.raises(ValueError, match="no training loss among its scalars"):
        training_curve(build_run(SIGMA, scalars={"model.eval.loss": [3.0, 2.0, 1.0]}))


def test_tokens_as_logged_or_stated_and_time_over_a_continuation(build_run):
    scalars = {"loss": [3.0, 2.0, 1.0], "elapsed_seconds": [4.0, 9.0, 2.0]}
    run = build_run(
        SIGMA, scalars=scalars, attrs={"about": {"tokens_per_step": 64, "seed": 1}, "continued": [{"about": {"tokens_per_step": 128}}]}
    )
    assert stated(run) == {"tokens_per_step": 128, "seed": 1}
    curve = training_curve(run)
    assert curve["tokens"].values.tolist() == [1280, 2560, 3840]
    # The recorder's clock began anew.
    assert curve["seconds"].values.tolist() == [4.0, 9.0, 11.0]
    logged = training_curve(build_run(SIGMA, scalars={**scalars, "num_input_tokens_seen": [100, np.nan, 300]}))
    assert logged["tokens"].values.tolist() == [100, 200, 300]
    unknown = training_curve(build_run(SIGMA, scalars={"loss": [3.0, 2.0, 1.0]}))
    assert np.isnan(unknown["tokens"]).all()
    assert np.isnan(unknown["seconds"]).all()
    assert np.isnan(spent(unknown)["tokens"])


def test_first_reach_is_linear_between_records(build_run):
    run = build_run(SIGMA, steps=(10, 20, 30), scalars={"loss": [3.0, 2.0, 1.0], "elapsed_seconds": [1.0, 3.0, 9.0]})
    curve = training_curve(run, 1e-6)  # not smoothed
    assert first_reach(curve, 1.5) == pytest.approx({"steps": 25, "tokens": np.nan, "seconds": 6.0}, nan_ok=True)
    assert first_reach(curve, 3.0)["steps"] == 10
    assert first_reach(curve, 7.0)["steps"] == 10
    assert np.isnan(first_reach(curve, 0.5)["steps"])
    reference = first_reach(curve, 1.0)
    assert saved(first_reach(curve, 1.5), reference) == pytest.approx({"steps": 1 / 6, "tokens": np.nan, "seconds": 1 / 3}, nan_ok=True)


def test_what_is_missing_is_named(build_run):
    with pytest.raises(ValueError, match=r"^run: no scalars in it, so no loss; log it with recorder.log\(loss=…\)$"):
        training_curve(build_run(SIGMA))
    with pytest.raises(ValueError, match=r"^run: no training loss among its scalars \(accuracy, other\); log it with"):
        training_curve(build_run(SIGMA, scalars={"accuracy": [1, 1, 1], "other": [1, 1, 1]}))
    with pytest.raises(ValueError, match=r"^run: no training loss among"):
        training_curve(build_run(SIGMA, scalars={"loss": [np.nan] * 3}))


def test_validation_losses_where_they_are(build_run):
    steps, values = validation_loss(build_run(SIGMA, scalars={"eval_loss": [np.nan, 2.0, np.nan]}))
    assert (steps.tolist(), values.tolist()) == ([20], [2.0])
    assert not len(validation_loss(build_run(SIGMA, scalars={"loss": [1, 1, 1]}))[0])
