"""docs/evidence.md holds what the kept results tell, to the letter, and what it claims of them is so."""

import json
from pathlib import Path

import numpy as np
import pytest

from optiscope.examples.experiments import alignment, budgets, geometry, persistence

ROOT = Path(__file__).parents[3]
EXPERIMENTS = [alignment, budgets, geometry, persistence]


def kept(experiment):
    path = ROOT / "examples" / "experiments" / "results" / f"{experiment.EXPERIMENT.name}.json"
    return json.loads(path.read_text(encoding="utf-8"))


@pytest.mark.parametrize("experiment", EXPERIMENTS, ids=lambda experiment: experiment.EXPERIMENT.name)
def test_every_number_is_the_kept_results(experiment):
    text = (ROOT / "docs" / "evidence.md").read_text(encoding="utf-8")
    result, name = kept(experiment), experiment.EXPERIMENT.name
    assert experiment.tell(result) in text
    assert f"`{result['measured_with']['command']}`" in text
    assert f"(evidence_{name}.png)" in text
    assert (ROOT / "docs" / f"evidence_{name}.png").exists()
    experiment.plot(result)


@pytest.mark.parametrize("experiment", EXPERIMENTS, ids=lambda experiment: experiment.EXPERIMENT.name)
def test_every_condition_has_five_seeds(experiment):
    seeds = {}
    for training in kept(experiment)["trainings"]:
        seeds.setdefault((training.get("model"), training.get("condition"), training.get("optimizer")), []).append(training["seed"])
    assert all(own == [0, 1, 2, 3, 4] for own in seeds.values())


def test_the_committed_schedule_meets_fifteen_per_cent_in_the_demo_and_not_in_the_other_model():
    """At every later record of every seed, within the FLOPs; but the worst operator is not always held."""
    result = kept(budgets)
    for against in ("spectra", "training"):
        gain = budgets.gains(result, "demo", "amo", against=against)
        assert gain.shape == (5, 7)
        assert (gain >= budgets.GAIN).all()
        assert not (budgets.gains(result, "square-kv", "amo", against=against) >= budgets.GAIN).any()
    assert all(
        own["flops"] <= base["flops"]
        for model in budgets.models(result)
        for name in budgets.COMMITTED
        for own, base in zip(budgets.of(result, model, name), budgets.of(result, model, budgets.BASELINE), strict=True)
    )
    assert 0 < np.sum(budgets.worst_operator(result, "demo", "amo") > 0) <= 2
