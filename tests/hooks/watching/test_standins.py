"""Published Muons that no row of the table knows: what a run says of them against what they noted themselves, bit by bit; and the authors' SophiaG."""

import math
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from contract.harness import Model, hidden, others, same, tensors_in
from torch import Tensor, nn

from optiscope.analysis import open_run
from optiscope.hooks import attach
from optiscope.hooks.adapters import row_of
from watching import standins
from watching.generator import JORDAN, POLAR_EXPRESS, Triple
from watching.judging import reading_inputs

STEPS = 5


@dataclass(frozen=True)
class StandIn:
    """One optimizer, and what is true of it.

    Attributes:
        build: for the parameters of a model.
        says: what stands in `spectrum_of` of the group of the matrices.
        triples: of every step.
        then: what follows the iteration of each kind of matrix.
        scale: s in ΔW = −η·s·O of a matrix; None where that is not one number.
        decays: kinds of decay that may be told.
        keeps_grad: p.grad is not cleared between steps.
    """

    build: Callable[[nn.Module], Any]
    says: str
    triples: tuple[Triple, ...] = (JORDAN[0],) * 5
    then: tuple[str, ...] = ("scale",)
    scale: Callable[[int, int], float] | None = None
    decays: tuple[str, ...] = ("decoupled",)
    keeps_grad: bool = False


def nanochat(model: nn.Module) -> Any:
    shapes = dict.fromkeys(p.shape for p in hidden(model))
    muon = {"kind": "muon", "lr": 0.02, "momentum": 0.95, "ns_steps": 5, "beta2": 0.9, "weight_decay": 0.2}
    groups = [{"params": [p for p in hidden(model) if p.shape == shape], **muon} for shape in shapes]
    return standins.NanochatMuonAdamW([*groups, {"params": others(model), "kind": "adamw", "lr": 0.01, "weight_decay": 0.1}])


def of_hidden(cls: Any, **settings: Any) -> Callable[[nn.Module], Any]:
    return lambda model: cls(hidden(model), **settings)


KELLER_JORDAN = {"lr": 0.02, "momentum": 0.95, "weight_decay": 0.5}
SCION = {"lr": 2**-6, "momentum": 0.1, "scale": 5.0}
MIXED = "momentum after Nesterov mixing, (1 − μ)g + μM (momentum_buffer, μ: momentum)"
STAND_INS = {
    "KellerJordan": StandIn(of_hidden(standins.KellerJordanMuon, **KELLER_JORDAN), MIXED, scale=lambda m, n: max(1, m / n) ** 0.5),
    "Moonlight": StandIn(
        lambda model: standins.MoonlightMuon(hidden(model), others(model)), "momentum after Nesterov mixing, g + μM (momentum_buffer, μ: momentum)",
        scale=lambda m, n: 0.2 * math.sqrt(max(m, n)),
    ),
    "AdaMuon": StandIn(of_hidden(standins.AuthorsAdaMuon), f"sign of {MIXED}", then=("elements",), decays=("none seen", "decoupled")),
    "Scion": StandIn(
        of_hidden(standins.LionsScion, **SCION), "momentum after the step (momentum_buffer)", scale=lambda m, n: 5 * math.sqrt(m / n)
    ),
    "ScionLight": StandIn(of_hidden(standins.LionsScionLight, **SCION), "gradient", scale=lambda m, n: 5 * math.sqrt(m / n), keeps_grad=True),
    "hyperball": StandIn(of_hidden(standins.HyperballMuon, **KELLER_JORDAN), MIXED, decays=("none seen", "decoupled", "cautious")),
    "Muown": StandIn(
        of_hidden(standins.MuownLike, **KELLER_JORDAN), "momentum after the step (momentum_buffer)", then=("rows", "elements"),
        decays=("none seen", "decoupled", "cautious"),
    ),
    "Aurora": StandIn(of_hidden(standins.AuroraLike, **KELLER_JORDAN), MIXED, then=("scale", "rows")),
    "Muon+": StandIn(of_hidden(standins.MuonPlus, **KELLER_JORDAN), MIXED, decays=("none seen",)),
    "nanochat": StandIn(
        nanochat, "its rows brought to one norm", triples=tuple(POLAR_EXPRESS), then=("rows", "columns", "scale", "elements"),
        decays=("cautious", "none seen", "decoupled"),
    ),
}  # fmt: skip


def train(standin: StandIn, store: Path | None, scales: dict[tuple[int, ...], float] | None = None) -> tuple[list[Tensor], Any, list[bool]]:
    """Weights, gradients and random state of every step and the state at last; the optimizer; which inputs were right at each step.

    `scales` is filled with what was found for s, by shape.
    """
    torch.manual_seed(0)
    model = Model()
    optimizer = standin.build(model)
    read: dict[int, Tensor | None] = {}
    right: list[bool] = []
    trace: list[Tensor] = []
    recorder = attach(optimizer, model, store, every=1, on_error="raise") if store else None
    with reading_inputs(read):
        for step in range(STEPS):
            batch = torch.randint(24, (8, 13), generator=torch.Generator().manual_seed(step))
            nn.functional.cross_entropy(model(batch[:, :-1]).flatten(0, 1), batch[:, 1:].flatten()).backward()
            optimizer.given.clear()
            optimizer.step()
            trace += [*(p.detach().clone() for p in model.parameters()), torch.get_rng_state()]
            trace += [p.grad.clone() for p in model.parameters() if p.grad is not None]
            if recorder is not None:
                inputs = {key: one for key, one in read.items() if one is not None}
                right.append(
                    inputs.keys() == optimizer.given.keys()
                    and all(torch.equal(inputs[key].reshape(own.shape).to(own.dtype), own) for key, own in optimizer.given.items())
                )
            if not standin.keeps_grad:
                optimizer.zero_grad()
    if recorder is not None:
        watching = recorder.session.watched[0].watching
        assert watching is not None
        for group in optimizer.param_groups:
            found = watching.of(group).found
            (scales if scales is not None else {}).update({tuple(p.shape): found[id(p)].per_lr for p in group["params"] if id(p) in found})
        recorder.close()
    return [*trace, *tensors_in(optimizer.state)], optimizer, right


@pytest.mark.parametrize("name", STAND_INS)
def test_stand_in_is_read_as_it_is(name: str, tmp_path: Path) -> None:
    standin = STAND_INS[name]
    scales: dict[tuple[int, ...], float] = {}
    recorded, optimizer, right = train(standin, tmp_path / "run.zarr", scales)
    assert row_of(optimizer) is None
    assert right == [True] * STEPS
    run = open_run(tmp_path / "run.zarr")
    [entry] = run.attrs["optimizers"]
    told = [one for one in entry["watched"] if one.get("iterations")]
    assert sum(kind["count"] for one in told for kind in one["iterations"]) == len(hidden(Model()))
    for one in told:
        assert one["unexplained"] < 0.05
        assert one["difference"] < 0.05
        for kind in one["iterations"]:
            assert kind["dtype"] == "bfloat16"
            assert kind["then"] in standin.then
            assert kind["decay"] in standin.decays
            np.testing.assert_allclose(kind["coefficients"], standin.triples, rtol=1e-2)
    assert standin.says in entry["spectrum_of"][0]
    _check_schedules(run, standin)
    if standin.scale is not None:
        assert scales == pytest.approx({shape: standin.scale(*shape) for shape in scales}, rel=1e-2)
    plain, _, _ = train(standin, None)
    assert len(plain) == len(recorded)
    assert all(map(same, plain, recorded))


def _check_schedules(run: Any, standin: StandIn) -> None:
    """One of the right length for the matrices of the layers, none for others."""
    geometry = run["geometry"]
    for i, name in enumerate(map(str, geometry["name"].values)):
        index = int(geometry["ns_schedule"].values[-1, i])
        steps = len(geometry.attrs["ns_schedules"][index]["coefficients"]) if index >= 0 else 0
        assert steps == (len(standin.triples) if "_proj" in name else 0), name


def test_sophia_of_its_authors_tells_its_win_rate(tmp_path: Path) -> None:
    """|m|/(ρBh + 1e-15) < 1, B being an argument of the step that is kept nowhere."""
    torch.manual_seed(0)
    model = Model()
    optimizer = standins.SophiaG(model.parameters(), rho=0.1)
    with attach(optimizer, model, tmp_path / "run.zarr", every=1, on_error="raise"):
        for step in range(STEPS):
            batch = torch.randint(24, (8, 13), generator=torch.Generator().manual_seed(step))
            nn.functional.cross_entropy(model(batch[:, :-1]).flatten(0, 1), batch[:, 1:].flatten()).backward()
            if step % 2 == 0:
                optimizer.update_hessian()
            optimizer.step(bs=400)
            optimizer.zero_grad()
    run = open_run(tmp_path / "run.zarr")
    moments = run["second_moment"]
    parameters = dict(model.named_parameters())
    for i, name in enumerate(map(str, moments["name"].values)):
        state = optimizer.state[parameters[name]]
        wins = float((state["exp_avg"].abs() / (0.1 * 400 * state["hessian"] + 1e-15) < 1).double().mean())
        assert float(moments["sophia_win_rate"].values[-1, i]) == pytest.approx(wins, abs=0.01)
        assert 0 < wins < 1
    assert run.attrs["optimizers"][0]["read_by"] == ["table"]
