"""What watching a step leaves as it was: random numbers, training, hooks, what is compiled, what is logged; and what it does where it cannot watch."""

import logging
import random
import sys
import threading
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from weakref import WeakKeyDictionary

import numpy as np
import pytest
import torch
import torch.distributed as dist
from contract.harness import Model, hidden, same, tensors_in
from torch import Tensor, nn
from torch._dynamo.utils import counters
from torch.testing._internal.distributed.fake_pg import FakeStore

from optiscope.analysis import open_run
from optiscope.hooks import attach
from watching.standins import KellerJordanMuon, NanochatMuonAdamW, five_steps

STEPS = 5
SETTINGS = {"lr": 0.02, "momentum": 0.95, "weight_decay": 0.1}
OF_NANOCHAT = {"kind": "muon", "lr": 0.02, "momentum": 0.95, "ns_steps": 5, "beta2": 0.9, "weight_decay": 0.2}

Make = Callable[[list[nn.Parameter]], Any]


@pytest.fixture(autouse=True)
def _nothing_compiled() -> Iterator[None]:
    torch._dynamo.reset()
    counters.clear()
    yield
    torch._dynamo.reset()
    counters.clear()


def train(make: Make, store: Path | None, each: Callable[[Any], Any] = lambda optimizer: None) -> tuple[list[Tensor], list[Any], Any]:
    """Weights, gradients and state after every step; the generators' states and what `each` looks at; the optimizer."""
    torch.manual_seed(0)
    random.seed(0)
    np.random.seed(0)  # noqa: NPY002  # the global state is what must not move
    model = Model()
    optimizer = make(hidden(model))
    recorder = attach(optimizer, model, store, every=1, on_error="raise") if store else None
    tensors: list[Tensor] = []
    others: list[Any] = []
    for step in range(STEPS):
        batch = torch.randint(24, (8, 13), generator=torch.Generator().manual_seed(step))
        nn.functional.cross_entropy(model(batch[:, :-1]).flatten(0, 1), batch[:, 1:].flatten()).backward()
        optimizer.step()
        tensors += [p.detach().clone() for p in model.parameters()]
        tensors += [p.grad.clone() for p in model.parameters() if p.grad is not None]
        tensors += [torch.get_rng_state(), *tensors_in(optimizer.state)]
        numpy_state = np.random.get_state()[1:3]  # noqa: NPY002
        others += [random.getstate(), [np.asarray(part).tolist() for part in numpy_state], each(optimizer)]
        optimizer.zero_grad()
    if recorder is not None:
        recorder.close()
    return tensors, others, optimizer


def untouched(make: Make, store: Path, each: Callable[[Any], Any] = lambda optimizer: None) -> None:
    plain, recorded = train(make, None, each), train(make, store, each)
    assert len(plain[0]) == len(recorded[0])
    assert all(map(same, plain[0], recorded[0]))
    assert plain[1] == recorded[1]


def entry_of(store: Path) -> Any:
    run = open_run(store)
    of_layers = ["_proj" in str(name) for name in run["geometry"]["name"].values]
    entry, schedule = run.attrs["optimizers"][0], run["geometry"]["ns_schedule"].values[:, of_layers]
    run.close()
    return entry, schedule


class Drawing(KellerJordanMuon):
    """Adds noise from three global generators to every step."""

    def one(self, p: Any, state: dict[str, Any], group: dict[str, Any]) -> None:
        super().one(p, state, group)
        p.add_(torch.randn(p.shape), alpha=1e-4 * random.random() * np.random.rand())  # noqa: NPY002


def test_random_numbers_are_drawn_as_without_a_recorder(tmp_path: Path) -> None:
    untouched(lambda ps: Drawing(ps, **SETTINGS), tmp_path / "run.zarr")
    entry, schedule = entry_of(tmp_path / "run.zarr")
    assert entry["watched"][0]["difference"] == 0  # the copy drew the very same
    assert (schedule >= 0).sum() == STEPS * 12


def test_hooks_settings_and_attributes_stay(tmp_path: Path) -> None:
    """The user's own hooks run once a step, none is left behind, and the optimizer holds what it held."""
    runs: list[list[int]] = []

    def make(ps: list[nn.Parameter]) -> Any:
        optimizer = KellerJordanMuon(ps, **SETTINGS)
        calls = [0]
        runs.append(calls)

        def count(*_: Any) -> None:
            calls[0] += 1

        optimizer.register_step_post_hook(count)
        return optimizer

    def held(optimizer: Any) -> Any:
        group = {key: value for key, value in optimizer.param_groups[0].items() if key != "params"}
        return sorted(set(vars(optimizer)) - {"_optimizer_step_pre_hooks"}), group, [len(state) for state in optimizer.state.values()]

    untouched(make, tmp_path / "run.zarr", held)
    _, _, optimizer = train(make, tmp_path / "again.zarr")
    assert (len(optimizer._optimizer_step_pre_hooks), len(optimizer._optimizer_step_post_hooks)) == (0, 1)
    assert [calls[0] for calls in runs] == [STEPS] * 3


def test_nothing_is_compiled_again_or_for_the_copy(tmp_path: Path) -> None:
    """As many graphs, frames and recompilations with a recorder as without, at every step."""

    def make(ps: list[nn.Parameter]) -> Any:
        torch._dynamo.reset()
        counters.clear()
        return NanochatMuonAdamW(
            [{"params": [p for p in ps if p.shape == shape], **OF_NANOCHAT} for shape in dict.fromkeys(p.shape for p in ps)]
        )

    def compiled(optimizer: Any) -> Any:
        return {kind: dict(counters[kind]) for kind in ("stats", "frames", "graph_break", "recompiles", "aot_autograd")}

    untouched(make, tmp_path / "run.zarr", compiled)
    assert counters["stats"]["unique_graphs"] == 4  # one per shape, so that the comparison is of something
    assert (entry_of(tmp_path / "run.zarr")[1] >= 0).sum() == STEPS * 12


def test_nothing_is_warned_of_or_logged(tmp_path: Path, caplog: pytest.LogCaptureFixture, capfd: pytest.CaptureFixture[str]) -> None:
    with warnings.catch_warnings(record=True) as warned, caplog.at_level(logging.DEBUG):
        warnings.simplefilter("always")
        train(lambda ps: KellerJordanMuon(ps, **SETTINGS), tmp_path / "run.zarr")
    assert [str(one.message) for one in warned] == []
    assert [record.getMessage() for record in caplog.records if record.levelno >= logging.WARNING] == []
    assert capfd.readouterr() == ("", "")


# Where it cannot watch.


class Locked(KellerJordanMuon):
    """Holds what cannot be copied."""

    def __init__(self, params: Any, **settings: Any) -> None:
        super().__init__(params, **settings)
        self.lock = threading.Lock()


class Writing(KellerJordanMuon):
    """Adds to a tensor that is not its own at every step."""

    def one(self, p: Any, state: dict[str, Any], group: dict[str, Any]) -> None:
        super().one(p, state, group)
        TOTAL.add_(1)


TOTAL = torch.zeros(())


class Logging(KellerJordanMuon):
    """Holds a file that is open."""

    def __init__(self, params: Any, **settings: Any) -> None:
        super().__init__(params, **settings)
        self.log = sys.__stderr__


class Refusing(KellerJordanMuon):
    """Raises in a step that is not the real one."""

    real = True

    def of_group(self, group: dict[str, Any]) -> None:
        if any(p is None for p in group["params"]) or not any(self is one for one in REAL):
            raise RuntimeError("the copy steps")
        super().of_group(group)


REAL: list[Any] = []


def refusing(ps: list[nn.Parameter]) -> Any:
    REAL[:] = [Refusing(ps, **SETTINGS)]
    return REAL[0]


CANNOT = {
    "a lock": (lambda ps: Locked(ps, **SETTINGS), "cannot pickle '_thread.lock' object"),
    "an open file": (lambda ps: Logging(ps, **SETTINGS), "cannot pickle '_io.TextIOWrapper'"),
    "a tensor of others": (lambda ps: Writing(ps, **SETTINGS), "would write into a tensor that is not the copy's"),
    "an error of its own": (refusing, "the copy steps"),
}


@pytest.mark.parametrize("case", CANNOT)
def test_what_cannot_be_watched_is_said_and_read_as_before(case: str, tmp_path: Path) -> None:
    make, reason = CANNOT[case]

    def total(optimizer: Any) -> float:
        return float(TOTAL) % (12 * STEPS)

    untouched(make, tmp_path / "run.zarr", total)
    entry, schedule = entry_of(tmp_path / "run.zarr")
    assert "its step could not be watched" in entry["spectrum_of"][0]
    assert reason in entry["spectrum_of"][0]
    assert entry["spectrum_of"][0].startswith("first moment after the step")
    assert entry["read_by"] == ["names in the state"]
    assert (schedule == -1).all()


class Counting(KellerJordanMuon):
    """Goes another way at every third call, counted outside of the optimizer: a copy's count begins anew."""

    def of_group(self, group: dict[str, Any]) -> None:
        COUNTS[self] = COUNTS.get(self, 0) + 1
        for p in group["params"]:
            m = self.momentum(p, self.state[p], group["momentum"], ema=True)
            given = self.note(p, p.grad.lerp(m, group["momentum"]))
            p.add_(five_steps(given if COUNTS[self] % 3 else given.flip(0)), alpha=-group["lr"])


COUNTS: WeakKeyDictionary[Any, int] = WeakKeyDictionary()


def test_a_copy_that_takes_another_step_is_not_believed(tmp_path: Path) -> None:
    untouched(lambda ps: Counting(ps, **SETTINGS), tmp_path / "run.zarr")
    entry, schedule = entry_of(tmp_path / "run.zarr")
    assert entry["watched"][0]["difference"] > 0.5
    assert "the copy's step differed from the optimizer's" in entry["spectrum_of"][0]
    assert ((schedule >= 0) == [[step % 3 != 2] for step in range(STEPS)]).all()


class Reducing(KellerJordanMuon):
    """Averages the gradients over the processes within its step."""

    def of_group(self, group: dict[str, Any]) -> None:
        for p in group["params"]:
            dist.all_reduce(p.grad)
        super().of_group(group)


def test_a_step_with_a_collective_is_not_watched(tmp_path: Path) -> None:
    """Two processes, of which the other is torch's pretended one: a copy's collective would wait for it, or disturb it."""
    dist.init_process_group("fake", rank=0, world_size=2, store=FakeStore())
    try:
        untouched(lambda ps: Reducing(ps, **SETTINGS), tmp_path / "run.zarr")
    finally:
        dist.destroy_process_group()
    entry, schedule = entry_of(tmp_path / "run.zarr")
    assert "would make the other processes wait" in entry["spectrum_of"][0]
    assert (schedule == -1).all()
