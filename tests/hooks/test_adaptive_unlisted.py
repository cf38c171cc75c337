"""`AdaptiveSchedule` on classes in no table: what watched steps show takes the place of a row, and what they refuse never stops a training."""

import logging
import re
import threading
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from muons import MUONS, newton_schulz, operator_of
from test_adaptive_limits import unguarded
from test_adaptive_schedule import SWITCHED, Training, comparable, steps_in_force
from test_neutrality import as_bytes, random_numbers, seed_everything, state_bytes
from torch import Tensor
from torch.optim import Optimizer

from optiscope.analysis import derive_schedule, open_run
from optiscope.hooks import AdaptiveSchedule
from optiscope.hooks.adapters import table

JORDAN = (3.4445, -4.7750, 2.0315)


class Own(Optimizer):
    """A Muon of one's own, whose momentum is in a list; groups hold steps, and a triple for each."""

    def __init__(self, params: Any) -> None:
        super().__init__(params, {"lr": 0.02, "momentum": 0.5, "ns_steps": 5, "coefficients": [JORDAN] * 5})

    def direction(self, momentum: Tensor, group: dict[str, Any]) -> Tensor:
        return newton_schulz(momentum, [group["coefficients"][i] for i in range(group["ns_steps"])], torch.float32)

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]
        for group in self.param_groups:
            for p in group["params"]:
                self.move(p, group)

    def move(self, p: Tensor, group: dict[str, Any]) -> None:
        [momentum] = self.state[p].setdefault("buffers", [torch.zeros_like(p)])
        momentum.lerp_(p.grad, 1 - group["momentum"])
        p.sub_(self.direction(momentum, group), alpha=group["lr"])


class Constant(Own):
    """Five steps, whatever its groups say."""

    def direction(self, momentum: Tensor, group: dict[str, Any]) -> Tensor:
        return newton_schulz(momentum, [JORDAN] * 5, torch.float32)


class FiveAtMost(Own):
    """Follows its groups up to five steps."""

    def direction(self, momentum: Tensor, group: dict[str, Any]) -> Tensor:
        return newton_schulz(momentum, group["coefficients"][: min(group["ns_steps"], 5)], torch.float32)


class Late(Own):
    """Its first step only makes its state."""

    def move(self, p: Tensor, group: dict[str, Any]) -> None:
        if p in self.state:
            super().move(p, group)
        else:
            self.state[p]["buffers"] = [torch.zeros_like(p)]


class LateConstant(Late, Constant):
    """So does that of a class with a constant."""


class LateDescent(Late):
    """And that of one that orthogonalises nothing."""

    def direction(self, momentum: Tensor, group: dict[str, Any]) -> Tensor:
        return momentum


class Locked(Own):
    """Holds what cannot be copied."""

    def __init__(self, params: Any) -> None:
        super().__init__(params)
        self.lock = threading.Lock()


@pytest.fixture(autouse=True)
def _made(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(table, "_registered", {})
    for kind in (Own, Constant, FiveAtMost, Late, LateConstant, LateDescent, Locked):
        monkeypatch.setitem(MUONS, kind.__name__, lambda model, kind=kind: kind(model.of_muon().values()))


def messages(caplog: pytest.LogCaptureFixture) -> list[str]:
    return [record.getMessage() for record in caplog.records if record.levelno >= logging.WARNING]


def fingerprint(training: Training) -> list[Any]:
    """All that such a training is: weights, momenta, settings."""
    [optimizer, adamw] = training.optimizers
    momenta = [optimizer.state[p]["buffers"][0] for p in training.model.of_muon().values() if p in optimizer.state]
    return [
        [as_bytes(tensor) for tensor in (*training.model.parameters(), *momenta)],
        state_bytes(adamw),
        [[{k: v for k, v in group.items() if k != "params"} for group in o.param_groups] for o in training.optimizers],
    ]


# Put into force


@pytest.mark.parametrize("name", ["Own", "Late"])
def test_what_is_committed_is_what_the_finished_run_gives(name: str, tmp_path: Path) -> None:
    live = Training(tmp_path / "run.zarr", name, window=(4, 12)).train(0, 20).close()
    run = open_run(tmp_path / "run.zarr")
    assert comparable(live.committed) == comparable(derive_schedule(run, window=slice(4, 12)))
    assert live.decisions == [("commit", 12)]
    assert len({entry.steps for entry in live.committed.operators.values()}) > 1
    for group in live.optimizer.param_groups:
        entry = live.committed.operators[group["operator"]]
        assert group["coefficients"] == list(entry.coefficients)
        assert group["ns_steps"] == entry.steps


def test_what_it_rests_on_is_the_momentum_and_what_follows_it_the_iteration(tmp_path: Path) -> None:
    """The first against exact singular values, the second against float64: 2e-5 is what float32 leaves of 8 steps."""
    live = Training(tmp_path / "run.zarr", "Own", window=(4, 12)).train(0, 12)
    parameters = live.model.of_muon()
    exact = {name: np.linalg.svd(live.optimizer.state[p]["buffers"][0].numpy().astype(float))[1] for name, p in parameters.items()}
    assert live.decisions == [("commit", 12)]
    before = {name: p.detach().double() for name, p in parameters.items()}
    live.train(12, 13)
    for name, p in parameters.items():
        o = newton_schulz(live.optimizer.state[p]["buffers"][0], live.committed.operators[operator_of(name)].coefficients)
        torch.testing.assert_close((before[name] - p.double()) / 0.02, o, rtol=0, atol=2e-5)
    live.close()
    geometry = open_run(tmp_path / "run.zarr")["geometry"].to_dataset().sel(step=12)
    for name, norm in zip(geometry["name"].values.tolist(), geometry["fro_norm"].values.tolist(), strict=True):
        assert norm == pytest.approx(np.linalg.norm(exact[name]), rel=1e-6)


@pytest.mark.parametrize(
    "adaptive", [{"window": (4, 40)}, {"window": (2, 6), "apply": False, "refresh": (8, 12)}], ids=["before", "advice"]
)
def test_until_a_commitment_training_is_bitwise_the_same(adaptive: dict[str, Any], tmp_path: Path) -> None:
    found = []
    for store in (None, tmp_path / "run.zarr"):
        seed_everything()
        training = Training(store, "Own", every=1, **adaptive)
        seed_everything()
        training.train(0, 20)
        found.append([fingerprint(training), random_numbers()])
    assert found[0] == found[1]
    training.close()


def test_building_it_draws_and_changes_nothing(tmp_path: Path) -> None:
    training = Training(tmp_path / "run.zarr", "Own")
    before = fingerprint(training)
    seed_everything()
    numbers = random_numbers()
    seed_everything()
    AdaptiveSchedule(training.recorder, training.optimizer, training.model, window=(4, 12))  # type: ignore[arg-type]
    assert random_numbers() == numbers
    assert fingerprint(training) == before
    assert not training.optimizer.state
    training.close()


def test_resumed_and_refreshed_as_any_other(tmp_path: Path) -> None:
    options: dict[str, Any] = {"window": (4, 12), "refresh": (34,)}
    whole = Training(tmp_path / "whole.zarr", "Own", **options).train(0, 13).train(13, 38, SWITCHED).close()
    assert [kind for kind, _ in whole.decisions if kind != "keep"] == ["commit", "refresh"]
    assert steps_in_force(whole.optimizer) == {operator: entry.steps for operator, entry in whole.committed.operators.items()}
    first = Training(tmp_path / "run.zarr", "Own", **options).train(0, 13).train(13, 25, SWITCHED)
    saved = first.checkpoint()
    first.close()
    resumed = Training(tmp_path / "run.zarr", "Own", first_step=25, **options).load(saved).train(25, 38, SWITCHED).close()
    assert resumed.decisions == whole.decisions
    assert fingerprint(resumed) == fingerprint(whole)


# Refused


def test_a_constant_is_refused_when_it_is_built_and_advised_of(tmp_path: Path) -> None:
    training = Training(tmp_path / "run.zarr", "Constant")
    before = fingerprint(training)
    with pytest.raises(
        TypeError,
        match=r"^optimizer: none of the fields in the parameter groups of [\w.]+\.Constant steers its Newton–Schulz iteration, "
        r"as steps of copies show, so no schedule can be put into force; read steps and coefficients from the group, or pass apply=False$",
    ):
        AdaptiveSchedule(training.recorder, training.optimizer, training.model, window=(4, 12))  # type: ignore[arg-type]
    assert fingerprint(training) == before
    training.close()

    advice = Training(tmp_path / "advice.zarr", "Constant", window=(4, 12), apply=False).train(0, 20).close()
    assert advice.decisions == [("advise", 12)]
    assert comparable(advice.committed) == comparable(derive_schedule(open_run(tmp_path / "advice.zarr"), window=slice(4, 12)))


@pytest.mark.parametrize(
    ("name", "step", "said"),
    [
        ("LateConstant", 2, r"steers its Newton–Schulz iteration"),
        ("LateDescent", 4, r"no Newton–Schulz iteration was seen in watched steps of [\w.]+\.LateDescent"),
        ("Locked", 4, r"no step of a copy of [\w.]+\.Locked could be watched \(TypeError: cannot pickle"),
        ("FiveAtMost", 12, r"does not follow it: a copy that was set to the \d steps of \w+ ran 5 steps; nothing was changed"),
    ],
)
def test_what_is_refused_later_is_told_once_and_changes_nothing(
    name: str, step: int, said: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    live = unguarded(tmp_path / "run.zarr", name, window=(4, 12))
    with caplog.at_level(logging.WARNING, "optiscope"):
        live.train(0, 20)
    assert live.decisions == [("keep", step)]
    told = [text for text in messages(caplog) if "the schedule of" in text]
    assert len(told) == 1
    assert re.search(said, told[0])
    assert fingerprint(live) == fingerprint(Training(None, name).train(0, 20))
