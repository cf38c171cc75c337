"""A small training to be disturbed, everything by which one could tell that it was, and what its run must hold afterwards."""

import logging
import pickle
import random
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import xarray as xr
from torch import Tensor, nn
from torch.optim import AdamW, Muon, Optimizer

from optiscope.analysis.run import open_run
from optiscope.hooks import Recorder, attach
from optiscope.hooks.recording.scalars import OWN_TEXTS

GROUPS = ("geometry", "update", "second_moment")


class Training:
    """Muon on a 5×6 matrix and AdamW on the rest; data and dropout draw from all three global generators."""

    def __init__(self) -> None:
        torch.manual_seed(0)
        np.random.seed(1)  # noqa: NPY002
        random.seed(1)
        self.model = nn.Sequential(nn.Linear(6, 5), nn.Tanh(), nn.Dropout(0.2), nn.Linear(5, 7))
        first, *rest = self.model.parameters()
        self.optimizers: list[Optimizer] = [Muon([first], lr=0.02), AdamW(rest, lr=0.01)]
        self.recorder: Recorder | None = None
        self.waits = False  # for every record, without which one in the background may miss the next
        self.seen: list[Any] = []  # losses and gradients

    def go(self, steps: int = 1, between: Callable[[], None] = lambda: None) -> None:
        """Take steps, `between` being called after every backward pass."""
        for _ in range(steps):
            data = torch.randn(4, 6) + float(np.random.rand()) + random.random()  # noqa: NPY002
            loss = self.model(data).square().mean()
            loss.backward()
            between()
            self.seen += [as_bytes(loss), *(as_bytes(p.grad) for p in self.model.parameters())]
            for optimizer in self.optimizers:
                optimizer.step()
                optimizer.zero_grad()
            if self.recorder is not None:
                self.recorder.log(loss=loss)
                if self.waits:
                    self.recorder.flush()

    def flush(self) -> None:
        if self.recorder is not None:
            self.recorder.flush()

    def fingerprint(self) -> dict[str, Any]:
        """Losses, gradients, parameters, optimizer state and settings, and the state of every global generator."""
        return {
            "seen": self.seen,
            "parameters": [as_bytes(p) for p in self.model.parameters()],
            "state": [state_of(optimizer) for optimizer in self.optimizers],
            "random": (as_bytes(torch.get_rng_state()), pickle.dumps(np.random.get_state()), random.getstate()),  # noqa: NPY002
        }


def as_bytes(tensor: Tensor | None) -> bytes | None:
    return None if tensor is None else tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().tobytes()


def state_of(optimizer: Optimizer) -> list[Any]:
    """Settings of every group, and the state of its parameters; None where one has no entry."""
    found: list[Any] = []
    for group in optimizer.param_groups:
        found.append({key: value for key, value in group.items() if key != "params"})
        for p in group["params"]:
            entry = optimizer.state.get(p)
            found.append(entry and {key: as_bytes(v) if isinstance(v, Tensor) else v for key, v in entry.items()})
    return found


@contextmanager
def told() -> Iterator[list[str]]:
    """The warnings that the recorder logs within."""
    messages: list[str] = []
    handler = logging.Handler(logging.WARNING)
    handler.emit = lambda record: messages.append(record.getMessage())  # type: ignore[method-assign]
    log = logging.getLogger("optiscope")
    log.addHandler(handler)
    try:
        yield messages
    finally:
        log.removeHandler(handler)


@dataclass
class Outcome:
    """Of a recorded training."""

    warnings: list[str]
    recorder: Recorder


def disturbed(script: Callable[[Training], None], store: Path, **options: Any) -> Outcome:
    """Run a script on a training without and on one with a recorder; both must end the same, to the bit."""
    plain, recorded = Training(), None
    script(plain)
    with told() as warnings:
        recorded = Training()
        recorded.waits = options.get("background", False)
        with attach(recorded.optimizers, recorded.model, store, **{"every": 1, **options}) as recorded.recorder:
            script(recorded)
    assert recorded.fingerprint() == plain.fingerprint()
    return Outcome(warnings, recorded.recorder)


def read(store: Path) -> xr.DataTree:
    """What a run has committed, by plain xarray; :func:`open_run` must show the same."""
    with xr.open_datatree(store, engine="zarr") as plain, open_run(store) as ours:
        plain.load()
        assert set(plain.children) == set(ours.children)
        for group in plain.children:
            xr.testing.assert_identical(plain[group].to_dataset(), ours[group].to_dataset().load())
    return plain


def steps_in(run: xr.DataTree, group: str = "update") -> list[int]:
    found: list[int] = run[group]["step"].values.tolist()
    return found


def assert_same_records(run: xr.DataTree, reference: xr.DataTree, *, missing: tuple[str, ...] = ()) -> None:
    """Every record of a run is, to the bit, that of the reference at its step; of the variables in `missing`, or lacks.

    What recording itself cost is no measurement.
    """
    for group in reference.children:
        steps, known = steps_in(run, group), steps_in(reference, group)
        assert sorted(set(steps)) == steps
        at = [known.index(step) for step in steps]
        for name, array in reference[group].data_vars.items():
            if name in OWN_TEXTS or name in missing:
                continue
            expected = array.values[at] if "step" in array.dims else array.values
            if name not in run[group]:
                assert np.isnan(expected).all()  # of a number that was logged first behind these steps
                continue
            assert run[group][name].values.tobytes() == expected.tobytes(), (group, name)
