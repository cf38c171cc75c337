"""A stand-in trained plain and recorded, and what its run says of it beside what it noted itself."""

from collections.abc import Iterable
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import torch
from contract.harness import Model, same, tensors_in
from torch import Tensor, nn

from optiscope.analysis import open_run
from optiscope.hooks import attach
from optiscope.hooks.adapters import row_of
from watching.cases import STAND_INS, StandIn
from watching.judging import reading_inputs

STEPS = 5


@dataclass
class Measured:
    """What came of one stand-in.

    Attributes:
        optimizer: as the recorded training left it.
        in_table: whether a row of the adapter table knows its class.
        neutral: whether the recorded training was the plain one to the bit.
        inputs_right: of every step, whether each matrix's input as read was the one that the optimizer noted, to the bit.
        entry: what the run says of the optimizer.
        schedules: steps of the iteration of every matrix in the last record, 0 where it has none.
        scales: s as found, by shape.
    """

    optimizer: Any = None
    in_table: bool = True
    neutral: bool = False
    inputs_right: list[bool] = field(default_factory=list)
    entry: dict[str, Any] = field(default_factory=dict)
    schedules: dict[str, int] = field(default_factory=dict)
    scales: dict[tuple[int, ...], float] = field(default_factory=dict)

    @property
    def watched(self) -> list[dict[str, Any]]:
        """What was found of those groups of which something was."""
        return [one for one in self.entry["watched"] if one.get("iterations")]

    @property
    def iterations(self) -> list[dict[str, Any]]:
        """Every kind of iteration in all groups."""
        return [kind for one in self.watched for kind in one["iterations"]]

    def coefficients_error(self, triples: Iterable[Any]) -> float:
        """The largest relative one of a coefficient; infinite where another number of steps was found."""
        own = np.array(list(triples))
        found = [np.array(kind["coefficients"]) for kind in self.iterations]
        return max(float(np.max(np.abs(one - own) / np.abs(own))) if one.shape == own.shape else np.inf for one in found)


@cache
def measured(name: str) -> Measured:
    """Of one stand-in."""
    standin, result = STAND_INS[name], Measured()
    with TemporaryDirectory() as folder:
        store = Path(folder) / "run.zarr"
        recorded = _train(standin, store, result)
        run = open_run(store)
        [result.entry] = run.attrs["optimizers"]
        geometry = run["geometry"]
        for matrix, index in zip(map(str, geometry["name"].values), map(int, geometry["ns_schedule"].values[-1]), strict=True):
            result.schedules[matrix] = len(geometry.attrs["ns_schedules"][index]["coefficients"]) if index >= 0 else 0
        run.close()
    plain = _train(standin, None, Measured())
    result.neutral = len(plain) == len(recorded) and all(map(same, plain, recorded))
    return result


def _train(standin: StandIn, store: Path | None, result: Measured) -> list[Tensor]:
    """Weights, gradients and random state of every step and the state at last."""
    torch.manual_seed(0)
    model = Model()
    optimizer = result.optimizer = standin.build(model)
    result.in_table = row_of(optimizer) is not None
    read: dict[int, Tensor | None] = {}
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
                result.inputs_right.append(
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
            result.scales.update({tuple(p.shape): found[id(p)].per_lr for p in group["params"] if id(p) in found})
        recorder.close()
    return [*trace, *tensors_in(optimizer.state)]
