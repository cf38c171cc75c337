"""What moved before a loss spike: planted spikes and a planted lead are found, and noise alone is not."""

import numpy as np
import pytest
import xarray as xr

from optiscope.analysis import spikes

NAMES = [f"layers.{layer}.attn.q_proj.weight" for layer in range(3)] + [f"layers.{layer}.mlp.up_proj.weight" for layer in range(3)]
STEPS = np.arange(2, 4001, 2)


@pytest.fixture
def noisy():
    """2000 records of white noise in seven quantities of two operators; the loss falls slowly and jumps at `jumps`, before which one of them moves."""

    def noisy(jumps, *, lead=0.0, seed=0):
        rng = np.random.default_rng(seed)
        loss = 3 - STEPS / 4000 + 0.02 * rng.standard_normal(len(STEPS))
        values = {
            name: np.exp(0.1 * rng.standard_normal((len(STEPS), len(NAMES))))
            for name in ("update_rms", "update_norm", "update_rms_per_lr", "weight_rms", "grad_rms", "momentum_rms", "update_to_weight")
        } | {"update_noise": np.full((len(STEPS), len(NAMES)), 1e-6)}
        for jump in jumps:
            loss[(jump <= STEPS) & (jump + 6 > STEPS)] += 2
            values["weight_rms"][np.ix_((jump - 20 <= STEPS) & (jump > STEPS), [0, 1, 2])] *= np.exp(lead)
        labels = {"name": NAMES, "operator": ["attn_q"] * 3 + ["mlp_up"] * 3, "optimizer": ["AdamW"] * 6}
        coords = {"step": STEPS, **{key: ("matrix", np.array(texts, dtype=np.dtypes.StringDType())) for key, texts in labels.items()}}
        coords |= {name: ("matrix", np.full(len(labels["name"]), 8)) for name in ("layer", "rows", "cols")}
        update = xr.Dataset({name: (("step", "matrix"), v) for name, v in values.items()}, coords=coords)
        return xr.DataTree.from_dict({"/update": update, "/scalars": xr.Dataset({"loss": ("step", loss)}, coords={"step": STEPS})})

    return noisy


def test_a_planted_lead_is_found_and_nothing_else(noisy):
    dataset = spikes.study(noisy([1500, 3000], lead=1.0))
    assert dataset["spike_step"].values.tolist() == [1500, 3000]
    beyond = dataset["ratio"].values > dataset.attrs["threshold"]
    assert list(zip(dataset["quantity"].values[beyond], dataset["of_operator"].values[beyond], strict=True)) == [("weight_rms", "attn_q")]
    # e^{0.1 z}: a median of three moves by e^{0.067 z}, 0.029 decades; the lead is 0.434 decades, 15 of these, plus the largest of
    # 10 values of the noise itself (1.5), over a spread that 50 values tell within 15 %; of two spikes the larger is shown.
    assert dataset["moved"].values[0] == pytest.approx(0.434 / 0.029 + 1.5, rel=0.4)
    assert "in the 50 steps before, 1 moved by more than chance explains" in spikes.summary(dataset)
    assert "weight_rms of attn_q (+" in spikes.summary(dataset)
    spikes.plot(dataset).draw_without_rendering()


def test_noise_alone_is_rarely_a_lead(noisy):
    """Of 40 runs of noise with spikes, the family-wise rate is 5 % by construction; 7 or more has probability 0.6 %."""
    false = 0
    for seed in range(40):
        dataset = spikes.study(noisy([1500, 3000], seed=seed))
        false += bool((dataset["ratio"].values > dataset.attrs["threshold"]).any())
    assert false < 7


def test_a_loss_without_spikes_says_so(noisy):
    dataset = spikes.study(noisy([]))
    assert spikes.summary(dataset) == "No spike: the loss never rose above its running median by 6 robust standard deviations and 5%."
    assert len(spikes.plot(dataset).axes) == 1


def test_what_follows_a_spike_belongs_to_it():
    loss = np.ones(400) + 0.01 * np.sin(np.arange(400))
    loss[200:230] = 2
    loss[300] = 2
    _, _, found = spikes.find_spikes(np.arange(400.0), loss)
    assert found.tolist() == [200, 300]


def test_the_running_median_is_numpys():
    loss = np.exp(np.random.default_rng(0).standard_normal(300))
    typical, limit, _ = spikes.find_spikes(np.arange(300.0), loss)
    assert np.isnan(typical[:5]).all()
    for i in (5, 30, 49, 50, 51, 299):
        before = np.log(loss[max(0, i - 50) : i])
        median = np.median(before)
        assert typical[i] == pytest.approx(np.exp(median), rel=1e-12)
        assert limit[i] == pytest.approx(np.exp(median + 6 * 1.4826 * np.median(np.abs(before - median))), rel=1e-12)


def test_spikes_before_there_is_a_history_are_told(build_run):
    loss = np.ones(30)
    loss[20] = 3
    run = build_run({NAMES[0]: {"sigma": (2.0, 1.0)}}, steps=range(1, 31), scalars={"loss": loss})
    dataset = spikes.study(run)
    assert (
        spikes.summary(dataset)
        == "1 spike of the loss, first at step 21; there are too few records before and between them to tell what moved."
    )
    assert len(spikes.plot(dataset).axes) == 1


def test_a_run_without_a_loss_is_refused(build_run):
    with pytest.raises(ValueError, match=r"^run: no scalars in it, so no loss; log it with recorder.log\(loss=…\)$"):
        spikes.study(build_run({NAMES[0]: {"sigma": (2.0, 1.0)}}))
