"""One training of an experiment: kept, taken up again, and in the sizes that are asked for."""

import json
from dataclasses import replace

import pytest
import torch

from optiscope.analysis import open_run
from optiscope.examples.byte_llama import SHORT, ByteLlama, Config
from optiscope.examples.experiments import budgets, training
from optiscope.examples.experiments.conditions import CONDITIONS, muon
from optiscope.examples.experiments.training import LARGE, LARGE_PLAN, Plan, Treatment, once
from optiscope.examples.experiments.tuning import tuned

TINY = replace(SHORT, d=16, layers=1, inner=24, sequence=16, batch=2, steps=6)
PLAN = Plan({"tiny": TINY}, seeds=(0,), burn_in=2, observe=4, early=2, later=1, validate=3)


@pytest.fixture
def text(tmp_path):
    """Seven lines again and again: 3,000 bytes."""
    path = tmp_path / "text.txt"
    path.write_bytes((b"one two three four five six seven\n" * 100)[:3000])
    return path


@pytest.fixture
def plan(text):
    return replace(PLAN, text=text)


def test_a_training_is_done_once(plan, tmp_path, monkeypatch):
    first = once(tmp_path / "runs", "a", plan, "tiny", CONDITIONS["uniform-5"], 0.02, 0)
    monkeypatch.setattr(training, "_train", None)  # which would fail now
    again = once(tmp_path / "runs", "a", plan, "tiny", CONDITIONS["uniform-5"], 0.02, 0)
    assert again == json.loads(json.dumps(first))
    assert [step for step, _ in first["validation"]] == [3, 6]
    assert len(first["loss"]) == 6


def test_what_an_interruption_left_is_done_again(plan, tmp_path):
    folder = tmp_path / "runs"
    whole = once(folder, "a", plan, "tiny", CONDITIONS["amo"], 0.02, 0)
    (folder / "a.json").unlink()
    again = once(folder, "a", plan, "tiny", CONDITIONS["amo"], 0.02, 0)
    assert again["loss"] == whole["loss"]
    assert open_run(folder / "a.zarr")["geometry"]["step"].values.tolist() == [2, 4, 5, 6]


def test_other_settings_in_the_same_place_are_refused(plan, tmp_path):
    once(tmp_path, "a", plan, "tiny", CONDITIONS["uniform-5"], 0.02, 0)
    with pytest.raises(ValueError, match=r"a\.json is of a training with other settings; choose another folder"):
        once(tmp_path, "a", plan, "tiny", CONDITIONS["uniform-5"], 0.04, 0)


def test_seeds_pair_conditions_until_a_schedule_is_committed(plan, tmp_path):
    """The same initial weights and data: to the bit alike through the window, and then not."""
    uniform, amo, four = (
        once(tmp_path, name, plan, "tiny", CONDITIONS[name], 0.02, 1)["loss"] for name in ("uniform-5", "amo", "uniform-4")
    )
    assert uniform[:5] == amo[:5]  # the loss of the fifth step comes before that step
    assert uniform[0] == four[0]
    assert uniform[1:] != four[1:]


def test_the_learning_rate_is_the_best_on_the_tuning_seed(plan, tmp_path):
    """An optimizer that only moves at 0.02 must be given 0.02."""
    picky = Treatment(lambda parameters, lr: muon(parameters, lr if lr == 0.02 else 0.0))
    lr, losses = tuned(tmp_path, replace(plan, rest_lr=0.0), "picky", picky, (0.01, 0.02, 0.04))
    assert lr == 0.02
    assert losses[0.01] == losses[0.04] > losses[0.02]
    assert {path.stem for path in tmp_path.glob("*.json")} == {f"tiny-picky-lr{lr:g}-seed100" for lr in (0.01, 0.02, 0.04)}


def test_a_head_width_of_its_own_changes_the_projections_alone():
    with torch.device("meta"):
        narrow, wide = ByteLlama(SHORT), ByteLlama(replace(SHORT, heads=8, kv_heads=4, head_width=32))
    changed = {
        name.split(".")[-2]: tuple(b.shape)
        for (name, a), (_, b) in zip(narrow.named_parameters(), wide.named_parameters(), strict=True)
        if a.shape != b.shape
    }
    assert changed == {"q_proj": (256, 64), "k_proj": (128, 64), "v_proj": (128, 64), "o_proj": (64, 256)}


def test_the_large_model_has_more_than_a_hundred_million_parameters():
    with torch.device("meta"):
        assert sum(p.numel() for p in ByteLlama(LARGE).parameters()) == 101_081_856
        assert sum(p.numel() for p in ByteLlama(Config()).parameters()) == 803_968


def test_the_large_plan_runs_when_it_is_shrunk(text, tmp_path):
    """All conditions, two steps of a model of the same make; on the CPU, where autocast is off."""
    small = replace(LARGE, d=24, layers=1, heads=2, kv_heads=1, inner=32, sequence=16, batch=2, steps=2)
    plan = replace(LARGE_PLAN, models={"100m": small}, seeds=(0,), burn_in=1, observe=1, early=1, later=1, device="cpu", text=text)
    result = budgets.measured(tmp_path / "runs", plan, (0.02,))
    assert [t["condition"] for t in result["trainings"]] == list(CONDITIONS)
    assert all(0 < t["validation"][-1][1] < 7 for t in result["trainings"])
    assert all(t["residuals"]["step"] == [1, 2] for t in result["trainings"])


def test_the_model_runs_under_autocast():
    """As the large plan does on an accelerator: bfloat16 products, a float32 loss near log 256 at first."""
    torch.manual_seed(0)
    model = ByteLlama(replace(TINY, heads=4, kv_heads=2, head_width=8))
    tokens = torch.randint(256, (2, 17), generator=torch.Generator().manual_seed(0))
    with torch.autocast("cpu", torch.bfloat16):
        loss = model(tokens[:, :-1], tokens[:, 1:])
    loss.backward()
    assert loss.dtype == torch.float32
    assert loss.item() == pytest.approx(5.545, abs=0.6)
    assert all(p.grad is not None and p.grad.dtype == torch.float32 and p.grad.isfinite().all() for p in model.parameters())
