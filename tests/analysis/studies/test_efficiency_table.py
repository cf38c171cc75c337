"""How much training a loss takes: on losses that fall along a known curve."""

import numpy as np
import pytest
import xarray as xr

from optiscope.analysis import efficiency_table

SIGMA = {"layers.0.attn.q_proj.weight": {"sigma": (2.0, 1.0)}}
STEPS = np.arange(1, 2001)


def falling(half, *, steps=STEPS, **scalars):
    """A run whose loss is 1 + 2^(1 − step/half), halving its distance from 1 every `half` steps; 64 tokens and 0.5 s a step."""
    logged = {"loss": 1 + 2 ** (1 - steps / half), "elapsed_seconds": 0.5 * steps, **scalars}
    dataset = xr.Dataset({name: ("step", values) for name, values in logged.items()}, coords={"step": steps})
    return xr.DataTree.from_dict({"/": xr.Dataset(attrs={"about": {"tokens_per_step": 64}}), "/scalars": dataset})


def test_shares_of_the_fall_are_had_when_the_curve_says():
    dataset = efficiency_table.study(falling(200.0))
    assert dataset.attrs["time_constant"] == 40  # 2 % of 2000
    # A smoothed exponential is the exponential, later by a constant factor: e^{−t/h'}·(1 − d)/(1 − d·e^{1/h'}) far from the start.
    decay, factor = np.exp(-1 / 40), 2 ** (1 / 200)
    lag = np.log2((1 - decay) / (1 - decay * factor)) * 200
    assert lag == pytest.approx(40, rel=0.1)
    for share in (0.9, 0.95, 0.99):
        target = float(dataset["target"].sel(share=share))
        expected = 200 * (1 - np.log2(target - 1)) + lag
        found = dataset["to_target"].sel(share=share)
        # Linear between steps 1 apart on a curve of curvature (ln 2/200)²: 2e-6 relative; what is left of the start, e^{−t/40}.
        assert found.sel(unit="steps") == pytest.approx(expected, rel=1e-4)
        assert found.sel(unit="tokens") == pytest.approx(64 * float(found.sel(unit="steps")))
        assert found.sel(unit="seconds") == pytest.approx(0.5 * float(found.sel(unit="steps")))
    assert dataset["spent"].values.tolist() == [2000, 128_000, 1000]


def test_saving_against_a_baseline_twice_as_slow():
    """Once the start is forgotten, the smoothed loss falls to the same at nearly half the steps: nearly, as the lag is not halved."""
    dataset = efficiency_table.study(falling(100.0), falling(200.0))
    saved = dataset["saved"].values
    # 2000 steps of the baseline with lag 43, (2000 − 43)/2 + 47 of this one.
    assert saved == pytest.approx([1 - ((2000 - 43.3) / 2 + 47.0) / 2000] * 3, abs=2e-3)
    assert "Against the baseline it saved 48.7% of the steps, 48.7% of the tokens" in efficiency_table.summary(dataset)
    slower = efficiency_table.study(falling(200.0), falling(100.0))
    assert np.isnan(slower["saved"]).all()
    assert "It never reached the baseline's last loss." in efficiency_table.summary(slower)


def test_a_loss_that_only_rises_reaches_nothing(build_run):
    dataset = efficiency_table.study(build_run(SIGMA, scalars={"loss": [1.0, 2.0, 3.0]}))
    assert not dataset.sizes["share"]
    assert efficiency_table.summary(dataset) == "The loss (smoothed over 10 steps) never fell below where it began, 1."
    efficiency_table.plot(dataset).draw_without_rendering()


def test_unknown_tokens_are_told_and_not_drawn(build_run):
    dataset = efficiency_table.study(build_run(SIGMA, scalars={"loss": [3.0, 2.0, 1.0]}))
    assert "Tokens are not known; attach with about={'tokens_per_step': …} for them." in efficiency_table.summary(dataset)
    assert [ax.get_xlabel() for ax in efficiency_table.plot(dataset).axes] == ["optimizer steps"]


def test_validation_losses_are_kept():
    values = np.full(2000, np.nan)
    values[[999, 1999]] = 1.5, 1.25
    dataset = efficiency_table.study(falling(200.0, val_loss=values))
    assert dataset["validation_step"].values.tolist() == [1000, 2000]
    assert efficiency_table.summary(dataset).endswith("Last validation loss: 1.25, at step 2000.")


def test_a_long_log_is_drawn_by_two_thousand_points():
    figure = efficiency_table.plot(efficiency_table.study(falling(5000.0, steps=np.arange(1, 50_001))))
    assert max(len(line.get_xdata()) for ax in figure.axes for line in ax.lines) <= 2000
