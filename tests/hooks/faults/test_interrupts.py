"""What a signal handler raises within the recorder's own work reaches the training, and costs no record: what it cut off is done by the next attempt.

Python runs a handler in the main thread, as a function begins among other places; here as every function of the recorder's begins.
"""

import contextlib
import json
import os
import signal
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from types import CodeType, FrameType
from typing import Any, NoReturn

import numpy as np
import pytest
import torch
import xarray as xr
from torch import nn
from torch.optim import Muon

from faults.programs import SignalException
from faults.training import GROUPS, Training, read, steps_in, told
from optiscope.diagnostics.store.lock import owner
from optiscope.diagnostics.store.record_group import RecordGroup
from optiscope.diagnostics.store.writer import Writer
from optiscope.hooks import attach
from optiscope.hooks.recording import lifetime
from optiscope.hooks.recording.journal import Journal
from optiscope.hooks.recording.scalars import OWN_TEXTS, ScalarRow
from optiscope.hooks.recording.worker import Worker

ROOT = Path(__file__).parents[3]
OURS = (f"{ROOT}/hooks/", f"{ROOT}/diagnostics/")
# Which begin and end our `with` blocks; called by others, they may run while something is freed, where exceptions go nowhere.
BLOCKS = (contextlib.__file__, torch.autograd.grad_mode.__file__)
WAIT = 60.0  # for what takes milliseconds


class Interrupt:
    """Sends SIGUSR1 as the main thread begins to run a function; `begun` are those of the recorder's that it ran, in their order."""

    def __init__(self, at: CodeType | None = None) -> None:
        self.at, self.begun = at, dict[CodeType, None]()
        self._before = sys.gettrace()

    def __enter__(self) -> "Interrupt":
        sys.settrace(self._trace)
        return self

    def __exit__(self, *_: object) -> None:
        sys.settrace(self._before)

    def _trace(self, frame: FrameType, event: str, _: Any) -> None:
        code, caller = frame.f_code, frame.f_back
        if code.co_filename in BLOCKS and not (caller is not None and caller.f_code.co_filename.startswith(OURS)):
            return
        if code.co_filename.startswith(OURS) or code.co_filename in BLOCKS:
            self.begun[code] = None
        if code is self.at:
            self.at = None
            signal.raise_signal(signal.SIGUSR1)


def raises(error: type[BaseException]) -> Callable[[int, FrameType | None], NoReturn]:
    def handler(number: int, frame: FrameType | None) -> NoReturn:
        raise error

    return handler


@contextmanager
def handled(error: type[BaseException]) -> Iterator[None]:
    """SIGUSR1 raises it."""
    before = signal.signal(signal.SIGUSR1, raises(error))
    try:
        yield
    finally:
        signal.signal(signal.SIGUSR1, before)
        torch.set_grad_enabled(True)


def committed(store: Path) -> tuple[dict[str, int], dict[str, bytes]]:
    """How many records every group has, and the chunks of all arrays but those of what recording cost."""
    nodes = json.loads((store / "zarr.json").read_bytes())["consolidated_metadata"]["metadata"]
    counts = {path: node["shape"][0] for path, node in nodes.items() if path.endswith("/step")}
    arrays = [path for path, node in nodes.items() if node["node_type"] == "array" and path.rpartition("/")[2] not in OWN_TEXTS]
    return counts, {str(p.relative_to(store)): p.read_bytes() for path in arrays for p in (store / path).rglob("c/**/*") if p.is_file()}


def recorded(store: Path, background: bool) -> Training:
    """With something of every kind to be written: records, one whose second optimizer has not stepped, scalars that a worker has not taken."""
    training = Training()
    training.waits = background
    training.recorder = attach(training.optimizers, training.model, store, every=1, background=background)
    training.go(1)
    training.flush()
    training.go(1)
    training.model(torch.ones(4, 6)).sum().backward()
    training.optimizers[0].step()
    if training.recorder.session.journal.worker is not None:
        training.recorder.session.journal.worker.wait()
    training.recorder.log(late=1.0)
    return training


def functions_of(store: Path, background: bool) -> list[CodeType]:
    """Those of an end that nothing interrupts."""
    recorder = recorded(store, background).recorder
    assert recorder is not None
    with Interrupt() as watched:
        recorder.close(compact=False)
    return list(watched.begun)


@pytest.mark.parametrize(("error", "background"), [(SignalException, False), (KeyboardInterrupt, True)], ids=["foreground", "background"])
def test_as_any_function_of_the_end_begins(error: type[BaseException], background: bool, tmp_path: Path) -> None:
    """The end is begun again and again, and each time gets as far as to one more function; after one that got through comes another recorder."""
    left = functions_of(tmp_path / "whole.zarr", background)
    expected = committed(tmp_path / "whole.zarr")
    assert set(expected[0].values()) == {3}
    assert len(left) > 100
    runs = 0
    while left:
        runs += 1
        store = tmp_path / f"{runs}.zarr"
        recorder = recorded(store, background).recorder
        assert recorder is not None
        interrupted = []
        with handled(error), told() as warnings:
            for function in left:
                with suppress(error), Interrupt(function) as interrupt:
                    recorder.close(compact=False)
                    assert interrupt.at is not None, f"{function} kept the exception"
                assert torch.is_grad_enabled(), function
                if interrupt.at is None:
                    interrupted.append(function)
                if recorder.session not in lifetime.still_open:
                    break
            lifetime._close_all()
        assert (warnings, recorder.errors, recorder.dropped) == ([], 0, 0), interrupted
        assert committed(store) == expected, interrupted
        assert owner(store) is None
        assert recorder.overhead_seconds == recorder.overhead_seconds  # its clock stands
        assert interrupted
        left = [function for function in left if function not in interrupted]


def test_as_any_function_of_attaching_begins(tmp_path: Path) -> None:
    """The exception is the training's, and attaching once more records all."""
    with Interrupt() as watched:
        plain = Training()
        attach(plain.optimizers, plain.model, tmp_path / "whole.zarr").close()
    assert len(watched.begun) > 100
    training, store = Training(), tmp_path / "run.zarr"
    with handled(SignalException):
        for function in watched.begun:
            recorder = None
            with suppress(SignalException), Interrupt(function) as interrupt:
                recorder = attach(training.optimizers, training.model, store, every=1)
                assert interrupt.at is not None, f"{function} kept the exception"
            if recorder is not None:  # a function of the close alone
                recorder.close()
    with attach(training.optimizers, training.model, store, every=1) as recorder:
        training.go(2)
    assert (recorder.errors, recorder.dropped) == (0, 0)
    assert steps_in(read(store)) == [1, 2]
    assert {len(hooks) for one in training.optimizers for hooks in (one._optimizer_step_pre_hooks, one._optimizer_step_post_hooks)} == {0}


class Attention(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.q_proj = nn.Linear(4, 4)

    @property
    def num_heads(self) -> int:
        return 2


class Wrapper(Muon):
    @property
    def base_optimizer(self) -> None:
        return None


@pytest.mark.parametrize("looked_at", [Attention.num_heads, Wrapper.base_optimizer])
def test_as_a_property_that_is_looked_at_begins(looked_at: property, tmp_path: Path) -> None:
    """What the training's own properties raise is kept out of it, but not what a signal handler raises within them."""
    model = nn.ModuleDict({"attn": Attention()})
    assert looked_at.fget is not None
    with handled(SignalException), pytest.raises(SignalException), Interrupt(looked_at.fget.__code__):
        attach(Wrapper([model["attn"].q_proj.weight], lr=0.1), model, tmp_path / "run.zarr", measure=("blocks",))


def test_as_any_function_of_a_step_begins(tmp_path: Path) -> None:
    """A step and its record are cut off: the exception is the training's, and what is committed is whole."""
    store = tmp_path / "run.zarr"
    training = Training()
    recorder = training.recorder = attach(training.optimizers, training.model, store, every=1)
    with Interrupt() as watched:
        training.go(1)
    assert len(watched.begun) > 100
    with handled(SignalException), told() as warnings:
        for function in watched.begun:
            with suppress(SignalException), Interrupt(function) as interrupt:
                training.go(1)
                assert interrupt.at is not None, f"{function} kept the exception"
            assert torch.is_grad_enabled(), function
        training.go(1)
        recorder.close()
    assert (warnings, recorder.errors, recorder.dropped) == ([], 0, 0)
    run = read(store)
    steps = steps_in(run)
    assert steps == sorted(set(steps))
    assert steps[-1] == recorder.step
    assert all(steps_in(run, group) == steps for group in GROUPS)


@pytest.mark.parametrize("count", [1, 3, lifetime.INTERRUPTS - 1])
def test_within_the_interpreters_end(count: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """There is no later attempt: it is made there, and the exception raised after it."""
    closed, store = recorded(tmp_path / "closed.zarr", False), tmp_path / "run.zarr"
    assert closed.recorder is not None
    closed.recorder.close(compact=False)
    recorder = recorded(store, False).recorder
    assert recorder is not None
    interrupt_renaming(count, monkeypatch)
    with handled(KeyboardInterrupt), told() as warnings, pytest.raises(KeyboardInterrupt):
        lifetime._close_all()
    assert warnings == []
    assert recorder.session not in lifetime.still_open
    assert committed(store) == committed(tmp_path / "closed.zarr")


def test_who_interrupts_the_interpreters_end_for_long_has_it_end(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    recorder = recorded(tmp_path / "run.zarr", False).recorder
    interrupt_renaming(lifetime.INTERRUPTS, monkeypatch)
    with handled(KeyboardInterrupt), pytest.raises(KeyboardInterrupt):
        lifetime._close_all()
    assert recorder.session not in lifetime.still_open
    assert committed(tmp_path / "run.zarr")[0]["update/step"] == 1


def interrupt_renaming(count: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """So many times in a row, a file that was written is not put into place."""
    replace, left = os.replace, iter(range(count))

    def interrupted(*paths: Path) -> None:
        if next(left, None) is not None:
            signal.raise_signal(signal.SIGUSR1)
        replace(*paths)

    monkeypatch.setattr(os, "replace", interrupted)


@pytest.mark.parametrize("function", [Journal._set, ScalarRow.begin, ScalarRow.set])
def test_scalars_that_the_worker_had_not_taken(function: Callable[..., None], tmp_path: Path) -> None:
    training, store = Training(), tmp_path / "run.zarr"
    training.waits = True
    recorder = training.recorder = attach(training.optimizers, training.model, store, every=1, background=True)
    training.go(2)
    recorder.log(late=5.0)
    with handled(SignalException), pytest.raises(SignalException), Interrupt(function.__code__):
        recorder.close()
    lifetime._close_all()
    late = read(store)["scalars"]["late"]
    np.testing.assert_array_equal(late, [np.nan, 5.0])


def test_at_any_line_of_taking_a_row(tmp_path: Path) -> None:
    """What comes next is of the step before; no value of the row that was cut off is among it."""
    for line in range(1, 9):
        writer = Writer(tmp_path / f"{line}.zarr", {})
        writer.create_group("update", {"name": np.array(["a"], dtype=np.dtypes.StringDType())}, {})
        for name in ("size", "curve"):
            writer.create_array("update", name, (1,), ("matrix",), "float64", {})
        writer.append("update", 1, {"size": np.array([1.0])})
        lines = iter(range(line - 1))

        def trace(frame: FrameType, event: str, _: Any, lines: Iterator[int] = lines) -> Any:
            if frame.f_code is not RecordGroup.append.__code__:
                return None
            if event == "line" and next(lines, None) is None:
                raise KeyboardInterrupt
            return trace

        before = sys.gettrace()
        sys.settrace(trace)
        try:
            with suppress(KeyboardInterrupt):
                writer.append("update", 2, {"size": np.array([2.0])})
        finally:
            sys.settrace(before)
        merged = writer.last_step == 1
        if merged:
            writer.append("update", 1, {"curve": np.array([1.0])})
        writer.append("update", 2, {"size": np.array([2.0])})
        writer.close()
        found = xr.load_dataset(writer.path, group="update", engine="zarr")
        assert found["step"].values.tolist() == [1, 2]
        np.testing.assert_array_equal(found["size"], [[1], [2]])
        np.testing.assert_array_equal(found["curve"], [[1 if merged else np.nan], [np.nan]])


@pytest.mark.parametrize("method", [threading.Thread.start, threading.Thread.join])
def test_a_worker_whose_thread_begins_or_ends(method: Callable[..., None]) -> None:
    """It does what it is given next, and nobody waits for a thread that there is not."""
    worker, done = Worker(), threading.Event()
    with handled(KeyboardInterrupt):
        if method is threading.Thread.join:
            worker.submit(lambda: None)
        with pytest.raises(KeyboardInterrupt), Interrupt(method.__code__):
            worker.stop() if method is threading.Thread.join else worker.submit(done.set)
    assert not done.is_set()
    worker.submit(done.set)
    assert done.wait(WAIT)
    worker.stop()
    assert not worker.busy
