"""Runs beside each other: on losses whose crossings, seeds and conditions are known."""

import numpy as np
import pytest
import xarray as xr
from scipy import stats

from optiscope.analysis import compare

STEPS = np.arange(1, 2001)


def falling(half, *, seed=0, shift=0.0, optimizer="torch.optim.AdamW", steps=STEPS, validation=None, **about):
    """A run whose loss is 1 + shift + 2^(1 − step/half); 64 tokens and 0.5 s a step."""
    logged = {"loss": 1 + shift + 2 ** (1 - steps / half), "elapsed_seconds": 0.5 * steps}
    if validation is not None:
        logged["val_loss"] = np.where(steps % 500 == 0, validation, np.nan)
    scalars = xr.Dataset({name: ("step", values) for name, values in logged.items()}, coords={"step": steps})
    matrices = xr.Dataset({"lr": (("step", "matrix"), [[0.01]])}, coords={
        "step": [1], "rows": ("matrix", [8]), "cols": ("matrix", [4]), "name": ("matrix", ["w"]), "layer": ("matrix", [0]), "operator": ("matrix", ["other"]), "optimizer": ("matrix", ["A"]),
    })  # fmt: skip
    about = {"data": "d", "tokens_per_step": 64, "seed": seed, **about}
    attrs = {
        "about": {k: v for k, v in about.items() if v is not None},
        "optimizers": [{"class": optimizer, "groups": [{"lr": 0.01}]}],
        "versions": {"torch": "2"},
    }
    return xr.DataTree.from_dict({"/": xr.Dataset(attrs=attrs), "/scalars": scalars, "/update": matrices})


def verdicts(dataset):
    return dict(zip(dataset["condition"].values.tolist(), dataset["verdict"].values.tolist(), strict=True))


def test_twice_as_fast_saves_half():
    """What is left of the start apart, the smoothed loss is the loss, later by a lag (40 steps here) that both have alike, but for the curve's own rate."""
    dataset = compare.study({"adamw": falling(200.0), "muon": falling(100.0, optimizer="torch.optim.Muon")})
    expected = 1 - ((2000 - 43.3) / 2 + 47.0) / 2000
    for unit in ("steps", "tokens", "seconds"):
        assert float(dataset["saved"].sel(run="muon", unit=unit)) == pytest.approx(expected, abs=2e-3)
        assert float(dataset["saved"].sel(run="adamw", unit=unit)) == 0
    assert compare.summary(dataset).startswith(
        "Data, budget and matrices are the same in all runs. To a smoothed loss of 1.002, against adamw: muon saved 48.7%"
    )
    assert "With a single run of a setting, what is chance is not known" in compare.summary(dataset)


def test_more_is_told_as_more_and_never_as_never():
    runs = {"muon": falling(100.0), "adamw": falling(200.0)}
    assert "adamw never reached it" in compare.summary(compare.study(runs))
    assert "adamw took" in compare.summary(compare.study(runs, target=1.5))
    assert "The baseline muon never reached the loss 0.5." in compare.summary(compare.study(runs, target=0.5))


def test_seeds_are_taken_together_and_told_apart_by_welch():
    shifts = {"a": (0.0, 0.02, 0.01), "b": (0.3, 0.31, 0.33)}
    runs = {
        f"{name}{seed}": falling(100.0, seed=seed, shift=shift, optimizer=name)
        for name, values in shifts.items()
        for seed, shift in enumerate(values)
    }
    dataset = compare.study(runs)
    assert dataset["setting"].values.tolist() == ["a0, a1, a2", "b0, b1, b2"]
    last = {name: np.array([float(dataset["last"].sel(run=f"{name}{seed}")) for seed in range(3)]) for name in shifts}
    for g, values in enumerate(last.values()):
        expected = stats.t.interval(0.95, 2, values.mean(), stats.sem(values))
        assert (float(dataset["lower"][g]), float(dataset["upper"][g])) == pytest.approx(expected, rel=1e-12)
        assert float(dataset["deviation"][g]) == pytest.approx(values.std(ddof=1), rel=1e-12)
    assert float(dataset["p_value"][1]) == pytest.approx(stats.ttest_ind(*last.values(), equal_var=False).pvalue, rel=1e-12)
    assert "The first is ahead by more than seeds scatter" in compare.summary(dataset)
    close = compare.study(
        {
            name: falling(100.0, seed=s, shift=0.1 * s, optimizer=o)
            for name, s, o in (("a0", 0, "a"), ("a1", 1, "a"), ("b0", 0, "b"), ("b1", 1.1, "b"))
        }
    )
    assert "Seeds do not tell the first from" in compare.summary(close)


def test_the_same_seed_twice_or_none_is_not_another_seed():
    for seeds in ((0, 0), (None, None)):
        dataset = compare.study({f"r{i}": falling(100.0, seed=seed) for i, seed in enumerate(seeds)})
        assert dataset["runs"].values.tolist() == [1, 1]
    assert compare.study({"r0": falling(100.0, seed=0), "r1": falling(100.0, seed=1)})["runs"].values.tolist() == [2]


def test_conditions_that_differ_or_are_not_known():
    shorter = falling(100.0, data="e", steps=STEPS[:1500])
    dataset = compare.study({"a": falling(100.0), "b": shorter})
    assert verdicts(dataset) | {"x": 0} == verdicts(dataset) | {
        "data": "differs",
        "steps": "differs",
        "tokens": "differs",
        "matrices": "same",
        "x": 0,
    }
    assert compare.summary(dataset).startswith("Not a fair comparison: data, steps, tokens differ between the runs.")
    unknown = compare.study({"a": falling(100.0), "b": falling(100.0, data=None)})
    assert verdicts(unknown)["data"] == "not stated"
    assert compare.summary(unknown).startswith("Whether the comparison is fair is not known (data not stated in every run)")


def test_validation_losses_are_the_outcome_where_all_have_them():
    dataset = compare.study(
        {"a": falling(100.0, validation=2 - STEPS / 1000), "b": falling(100.0, optimizer="B", validation=2 - STEPS / 800)}
    )
    assert dataset.attrs["outcome"] == "last_validation"
    # a ends at 0; b is there at step 1600, between its evaluations at 1500 and 2000.
    assert float(dataset["saved_validation"].sel(run="b", unit="steps")) == pytest.approx(1 - 1600 / 2000, rel=1e-9)
    assert "20.0% of the steps by validation loss" in compare.summary(dataset)


def test_refusals():
    with pytest.raises(ValueError, match=r"^runs: expected two or more to compare, got 1$"):
        compare.study({"a": falling(100.0)})
    with pytest.raises(ValueError, match=r"^baseline: c is none of the runs a, b$"):
        compare.study({"a": falling(100.0), "b": falling(100.0)}, "c")
    with pytest.raises(ValueError, match=r"^target: expected a finite loss, got nan$"):
        compare.study({"a": falling(100.0), "b": falling(100.0)}, target=float("nan"))
    empty = xr.DataTree.from_dict({"/": xr.Dataset()})
    with pytest.raises(ValueError, match=r"^b: run: no scalars in it, so no loss"):
        compare.study({"a": falling(100.0), "b": empty})


def test_pictures_of_few_and_of_many():
    for count in (2, 12):
        figure = compare.plot(compare.study({f"run {i}": falling(100.0 + 10 * i, seed=i % 3, optimizer=str(i // 3)) for i in range(count)}))
        figure.draw_without_rendering()
        assert all(ax.get_title() and ax.get_xlabel() for ax in figure.axes)
