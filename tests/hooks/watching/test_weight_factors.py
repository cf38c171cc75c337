"""Weights that a step multiplies once the update is in them, as MuonClip does: the update is recorded without that, and the factors beside it."""

from collections.abc import Callable
from copy import deepcopy
from dataclasses import dataclass, field
from math import sqrt
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from pytorch_optimizer import Lookahead, MuonClip
from torch import Tensor, nn

from optiscope.analysis import open_run
from optiscope.hooks import attach
from watching.standins import ClippingMuon, KellerJordanMuon, five_steps

SETTINGS = {"lr": 0.02, "momentum": 0.95, "weight_decay": 0.5}
SHAPES = {"q": (24, 18), "k": (24, 18), "v": (24, 18), "up": (18, 30)}
STEPS = 7
LOGITS = (50.0, 123.0, 400.0)  # of three heads
FACTORS = [min(1.0, sqrt(100 / logit)) for logit in LOGITS]

Matrices = dict[str, nn.Parameter]


@dataclass
class Trained:
    """A run, and what the test saw of the steps itself.

    Attributes:
        updates: of every step and matrix the update per learning rate without decay, of an optimizer that clips nothing, from the same weights and state.
        applied: W_t − W_{t+1} of that; moved: the same of the optimizer that was trained.
        trace: weights after every step.
    """

    updates: list[dict[str, NDArray[np.float64]]] = field(default_factory=list)
    applied: list[dict[str, NDArray[np.float64]]] = field(default_factory=list)
    moved: list[dict[str, NDArray[np.float64]]] = field(default_factory=list)
    trace: list[Tensor] = field(default_factory=list)
    optimizer: Any = None


def matrices(dtype: torch.dtype = torch.float32) -> Matrices:
    generator = torch.Generator().manual_seed(0)
    return {name: nn.Parameter((torch.randn(*shape, generator=generator) / 4).to(dtype)) for name, shape in SHAPES.items()}


def train(
    make: Callable[[Matrices], Any], step: Callable[[Any, Matrices, int], None], unclipped: Callable[[Any], None] | None, store: Path | None,
    dtype: torch.dtype = torch.float32,
) -> Trained:  # fmt: skip
    """Some steps on random gradients; `unclipped` takes the same step on a copy, without the clip."""
    ps, done = matrices(dtype), Trained()
    optimizer = done.optimizer = make(ps)
    model = nn.ParameterDict(ps)
    recorder = attach(optimizer, model, store, every=1, on_error="raise") if store else None
    for i in range(STEPS):
        for j, p in enumerate(ps.values()):
            p.grad = torch.randn(p.shape, generator=torch.Generator().manual_seed(100 * i + j)).to(dtype)
        before = {name: p.detach().double().clone() for name, p in ps.items()}
        if unclipped is not None:
            copied, own = _apart(ps, optimizer, make)
            unclipped(own)
            lost = SETTINGS["lr"] * SETTINGS["weight_decay"]
            done.applied.append({name: (before[name] - copied[name].detach().double()).numpy() for name in ps})
            done.updates.append({name: (done.applied[-1][name] - lost * before[name].numpy()) / SETTINGS["lr"] for name in ps})
        step(optimizer, ps, i)
        done.moved.append({name: (before[name] - p.detach().double()).numpy() for name, p in ps.items()})
        done.trace += [p.detach().clone() for p in ps.values()]
    if recorder is not None:
        recorder.close()
    return done


def _apart(ps: Matrices, optimizer: Any, make: Callable[[Matrices], Any]) -> tuple[Matrices, Any]:
    """An optimizer of the same class, weights, gradients and state, of which the recorder knows nothing."""
    copied = {name: nn.Parameter(p.detach().clone()) for name, p in ps.items()}
    own = make(copied)
    for name, p in ps.items():
        copied[name].grad = None if p.grad is None else p.grad.clone()
    own.load_state_dict(deepcopy(optimizer.state_dict()))
    return copied, own


def clipping(how: str) -> Callable[[Matrices], ClippingMuon]:
    return lambda ps: ClippingMuon(list(ps.values()), [(ps["q"], ps["k"])], how, **SETTINGS)


def from_step(first: int) -> Callable[[Any, Matrices, int], None]:
    """Clips from a step on."""

    def step(optimizer: Any, ps: Matrices, i: int) -> None:
        optimizer.logits = [torch.tensor(LOGITS) if i >= first else None]
        optimizer.step()

    return step


def keller_jordan(rows: int, cols: int) -> float:
    return max(1, rows / cols) ** 0.5


def moonlight(rows: int, cols: int) -> float:
    return 0.2 * max(rows, cols) ** 0.5


def residual(update: NDArray[np.float64], scale: Callable[[int, int], float]) -> float:
    """‖OOᵀ − I‖_F/√r of O = U/s, short side first."""
    rows, cols = update.shape
    o = update / scale(rows, cols)
    o = o if rows <= cols else o.T
    return float(np.linalg.norm(o @ o.T - np.eye(len(o))) / len(o) ** 0.5)


def rms(matrix: NDArray[np.float64]) -> float:
    return float(np.sqrt(np.mean(matrix**2)))


def assert_updates_are_those_without_clip(store: Path, done: Trained, scale: Callable[[int, int], float] = keller_jordan) -> Any:
    """From float32 weights O(1) whose steps are O(0.01): 1e-5 of an update is their rounding."""
    run = open_run(store)
    names = [str(name).removesuffix(".weight") for name in run["update"]["name"].values]
    for i in range(STEPS):
        for j, name in enumerate(names):
            found = {key: float(run["update"][key].values[i, j]) for key in ("update_rms", "update_rms_per_lr")}
            assert found["update_rms"] == pytest.approx(rms(done.applied[i][name]), rel=1e-4), (i, name)
            assert found["update_rms_per_lr"] == pytest.approx(rms(done.updates[i][name]), rel=1e-4), (i, name)
            achieved = float(run["geometry"]["ns_residual_achieved"].values[i, j])
            assert achieved == pytest.approx(residual(done.updates[i][name], scale), rel=1e-3), (i, name)
    return run, names


def unclipped(own: Any) -> None:
    KellerJordanMuon.step(own)


@pytest.mark.parametrize("first", [0, 5])  # the second after a formula has given three steps' inputs to the bit
@pytest.mark.parametrize("how", ["heads", "copied", "slices of columns", "whole"])
def test_the_update_is_recorded_without_the_clip(how: str, first: int, tmp_path: Path) -> None:
    store = tmp_path / "run.zarr"
    done = train(clipping(how), from_step(first), unclipped, store)
    # What the weights moved by tells something else.
    assert rms(done.moved[first]["q"] - done.applied[first]["q"]) > rms(done.applied[first]["q"])
    run, names = assert_updates_are_those_without_clip(store, done)
    for name, found in zip(names, run["update"]["weight_factor"].values.T, strict=True):
        own = [min(FACTORS) if i >= first and name in "qk" else 1.0 for i in range(STEPS)]
        np.testing.assert_allclose(found, own, rtol=1e-6)
    [entry] = run.attrs["optimizers"]
    [told] = entry["watched"]
    assert told["weights_multiplied"]["matrices"] == 2
    seen = [min(FACTORS)] if how == "whole" else [factor for factor in FACTORS if factor < 1]
    assert told["weights_multiplied"]["least"] == pytest.approx(min(seen), rel=1e-6)
    assert told["weights_multiplied"]["most"] == pytest.approx(max(seen), rel=1e-6)
    assert "the weights of 2 were multiplied by 0.5" in entry["spectrum_of"][0]
    assert [(kind["then"], kind["decay"], kind["count"]) for kind in told["iterations"]] == [("scale", "decoupled", 4)]
    plain = train(clipping(how), from_step(first), None, None)
    assert all(map(torch.equal, done.trace, plain.trace))


def test_weights_that_the_training_multiplies_itself_are_no_clip(tmp_path: Path) -> None:
    def step(optimizer: Any, ps: Matrices, i: int) -> None:
        optimizer.step()
        with torch.no_grad():
            ps["q"].mul_(0.7)

    store = tmp_path / "run.zarr"
    done = train(clipping("heads"), step, unclipped, store)
    run, names = assert_updates_are_those_without_clip(store, done)
    assert (run["update"]["weight_factor"].values == 1).all()
    assert "weights_multiplied" not in run.attrs["optimizers"][0]["watched"][0]
    assert run["update"]["changed_outside"].values[-1].tolist() == [name == "q" for name in names]


class DecayingAfter(KellerJordanMuon):
    """Decay after the update: W ← (1 − ηλ)(W − ηsO)."""

    def one(self, p: Any, state: dict[str, Any], group: dict[str, Any]) -> None:
        m = self.momentum(p, state, group["momentum"], ema=True)
        p.sub_(five_steps(self.note(p, p.grad.lerp(m, group["momentum"]))), alpha=group["lr"])
        p.mul_(1 - group["lr"] * self.decay_of(group))

    def decay_of(self, group: dict[str, Any]) -> float:
        return float(group["weight_decay"])


class DecayingUnnamed(DecayingAfter):
    """With a number that no setting holds."""

    def decay_of(self, group: dict[str, Any]) -> float:
        return 0.5


@pytest.mark.parametrize(("kind", "settings"), [(DecayingAfter, SETTINGS), (DecayingUnnamed, {"lr": 0.02, "momentum": 0.95})])
def test_decay_after_the_update_is_no_clip(kind: Any, settings: dict[str, float], tmp_path: Path) -> None:
    store = tmp_path / "run.zarr"
    train(lambda ps: kind(list(ps.values()), **settings), lambda optimizer, ps, i: optimizer.step(), None, store)
    run = open_run(store)
    assert (run["update"]["weight_factor"].values[:3] == 1).all()
    [told] = run.attrs["optimizers"][0]["watched"]
    assert "weights_multiplied" not in told
    assert [kind["decay"] for kind in told["iterations"]] == ["decoupled"]


def test_what_cannot_be_followed_is_said_to_be_unknown(tmp_path: Path) -> None:
    """Weights that the step puts into another memory."""
    store = tmp_path / "run.zarr"
    train(clipping("elsewhere"), from_step(0), None, store)
    run = open_run(store)
    names = [str(name).removesuffix(".weight") for name in run["update"]["name"].values]
    for name, found in zip(names, run["update"]["weight_factor"].values.T, strict=True):
        assert np.isnan(found).all() if name in "qk" else (found == 1).all()
    assert "weights_multiplied" not in run.attrs["optimizers"][0]["watched"][0]


def test_in_bfloat16_a_factor_near_one_is_told_from_rounding(tmp_path: Path) -> None:
    def step(optimizer: Any, ps: Matrices, i: int) -> None:
        optimizer.logits = [torch.full((3,), 106.0, dtype=torch.bfloat16)]  # a factor of 0.971
        optimizer.step()

    store = tmp_path / "run.zarr"
    train(clipping("heads"), step, None, store, torch.bfloat16)
    run = open_run(store)
    names = [str(name).removesuffix(".weight") for name in run["update"]["name"].values]
    for name, found in zip(names, run["update"]["weight_factor"].values.T, strict=True):
        np.testing.assert_allclose(found, 0.971 if name in "qk" else 1.0, atol=4e-3 if name in "qk" else 0)


def of_library(ps: Matrices) -> MuonClip:
    """pytorch_optimizer's, which the adapter table knows."""
    roles = {"q": {"qk_clip": "query"}, "k": {"qk_clip": "key"}}
    groups = [{"params": [p], "use_muon": True, **roles.get(name, {}), "attention_name": "one"} for name, p in ps.items()]
    return MuonClip(groups, **SETTINGS, qk_clip_alpha=0.25)


def with_logits(optimizer: Any, ps: Matrices, i: int) -> None:
    """On every other step, once as a positional argument."""
    logits = {"one": torch.tensor(LOGITS)}
    if i == 1:
        optimizer.step(None, logits)
    elif i % 2:
        optimizer.step(attention_max_logits=logits)
    else:
        optimizer.step()


def test_the_librarys_clip_is_taken_out_by_what_its_step_was_given(tmp_path: Path) -> None:
    store = tmp_path / "run.zarr"
    done = train(of_library, with_logits, lambda own: own.step(), store)
    assert rms(done.moved[1]["q"] - done.applied[1]["q"]) > rms(done.applied[1]["q"])
    run, names = assert_updates_are_those_without_clip(store, done, moonlight)
    assert run.attrs["optimizers"][0]["read_by"] == ["table"] * 4
    exponents = {"q": 0.25, "k": 0.75}
    for name, found in zip(names, run["update"]["weight_factor"].values.T, strict=True):
        own = [0.25 ** exponents[name] if i % 2 and name in exponents else 1.0 for i in range(STEPS)]  # τ = 100 and a logit of 400
        np.testing.assert_allclose(found, own, rtol=1e-6)
    plain = train(of_library, with_logits, None, None)
    assert all(map(torch.equal, done.trace, plain.trace))


def test_under_a_wrapper_no_factor_is_the_last_thing_done_to_the_weights(tmp_path: Path) -> None:
    store = tmp_path / "run.zarr"
    train(lambda ps: Lookahead(of_library(ps)), lambda optimizer, ps, i: optimizer.step(), None, store)
    assert np.isnan(open_run(store)["update"]["weight_factor"].values).all()
