"""What goes wrong within the recorder stays there; what only happens to be raised there is the training's own, and passes through."""

import functools
import os
import signal
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from typing import Any, NoReturn
from unittest import mock

import numpy as np
import pytest
import xarray as xr

from faults.training import Training, assert_same_records, disturbed, read, steps_in, told
from optiscope.hooks import attach

ALL = list(range(1, 13))
# Of LAPACK, which a measurement of every matrix comes to.
LAPACK = "eigvalsh"


@contextmanager
def lapack(fault: Callable[..., Any]) -> Iterator[None]:
    with mock.patch.object(np.linalg, LAPACK, fault):
        yield


def raising(error: BaseException) -> Callable[..., Any]:
    def fault(*args: Any) -> NoReturn:
        raise error

    return fault


def of_an_enumeration() -> ValueError:
    """Raised within the call of a class whose kind that of signals' default actions is too."""
    try:
        signal.Signals(-1)
    except ValueError as error:
        return error
    raise AssertionError


@pytest.mark.parametrize(
    ("error", "background"),
    [
        (np.linalg.LinAlgError("did not converge"), False),
        (MemoryError(), False),
        (OSError(5, "eh"), False),
        (of_an_enumeration(), False),
        (MemoryError(), True),
    ],
    ids=repr,
)
def test_measurement_that_fails(error: Exception, background: bool, tmp_path: Path, reference: xr.DataTree) -> None:
    """At steps 4 to 6: of these records what failed is missing; one warning; the others are whole."""
    store = tmp_path / "run.zarr"

    def script(training: Training) -> None:
        training.go(3)
        with lapack(raising(error)):
            training.go(3)
        training.go(6)

    outcome = disturbed(script, store, background=background)
    [warning] = outcome.warnings
    assert "recording failed at step 4" in warning
    assert type(error).__name__ in warning
    assert outcome.recorder.errors == 6  # two matrices, three steps
    run = read(store)
    assert steps_in(run) == ALL
    assert run.attrs["errors"] == 6
    assert np.isnan(run["geometry"]["condition_number"].values).any(1).tolist() == [False] * 3 + [True] * 3 + [False] * 6
    whole = [0, 1, 2, *range(6, 12)]
    assert_same_records(run.isel(step=whole), reference)


def test_interrupt_within_a_measurement(tmp_path: Path, reference: xr.DataTree) -> None:
    """It passes through; whoever catches it trains on, and the records behind it are whole."""
    store = tmp_path / "run.zarr"
    training = Training()
    with told() as warnings, attach(training.optimizers, training.model, store, every=1) as training.recorder:
        training.go(3)
        with lapack(raising(KeyboardInterrupt())), pytest.raises(KeyboardInterrupt):
            training.go()
        training.optimizers[1].step()  # as if nothing had been
        training.go(3)
    assert warnings == []
    run = read(store)
    assert steps_in(run) == [1, 2, 3, 4, 5, 6, 7]
    assert_same_records(run.isel(step=[0, 1, 2]), reference)
    assert np.isfinite(run["geometry"]["condition_number"].values[[0, 1, 2, 4, 5, 6]]).all()


class TimeLimit(Exception):
    """As time limits and launchers raise it out of a signal handler."""


def time_limit(number: int, frame: FrameType | None) -> NoReturn:
    raise TimeLimit(number)


class Handler:
    def __call__(self, number: int, frame: FrameType | None) -> NoReturn:
        raise TimeLimit(number)

    def method(self, number: int, frame: FrameType | None) -> NoReturn:
        self(number, frame)


def interrupted(function: Callable[..., Any]) -> Callable[..., Any]:
    """The function, a signal arriving within it."""

    @functools.wraps(function)
    def within(*args: Any, **kwargs: Any) -> Any:
        os.kill(os.getpid(), signal.SIGUSR1)
        time.sleep(0)
        return function(*args, **kwargs)

    return within


@pytest.mark.parametrize(
    ("handler", "place"),
    [(time_limit, "measurement"), (Handler(), "writing"), (Handler().method, "measurement"), (functools.partial(time_limit), "writing")],
    ids=["function", "object", "method", "partial"],
)
def test_exception_of_a_signal_handler(handler: Any, place: str, tmp_path: Path, reference: xr.DataTree) -> None:
    """Wherever in the recorder it arrives, it reaches whom it is for; nothing is counted as failed, and no record is lost."""
    store = tmp_path / "run.zarr"
    training = Training()
    before = signal.signal(signal.SIGUSR1, handler)
    try:
        with told() as warnings, attach(training.optimizers, training.model, store, every=1) as training.recorder:
            training.go(3)
            if place == "measurement":
                with lapack(interrupted(np.linalg.eigvalsh)), pytest.raises(TimeLimit):
                    training.go(1)
            else:
                with mock.patch.object(os, "replace", interrupted(os.replace)), pytest.raises(TimeLimit):
                    training.recorder.flush()
            training.go(3)
        assert (warnings, training.recorder.errors) == ([], 0)
    finally:
        signal.signal(signal.SIGUSR1, before)
    run = read(store)
    assert steps_in(run)[:3] == [1, 2, 3]
    assert steps_in(run)[-1] == training.recorder.step
    assert_same_records(run.isel(step=[0, 1, 2]), reference)


def test_training_in_another_thread(tmp_path: Path, reference: xr.DataTree) -> None:
    """As servers and notebooks do; the recorder was made, and is closed, in the main one."""
    store = tmp_path / "run.zarr"

    def script(training: Training) -> None:
        failed: list[BaseException] = []

        def steps() -> None:
            try:
                training.go(4)
            except BaseException as error:
                failed.append(error)

        for _ in range(3):
            thread = threading.Thread(target=steps)
            thread.start()
            thread.join()
        assert not failed

    outcome = disturbed(script, store)
    assert (outcome.warnings, outcome.recorder.errors) == ([], 0)
    run = read(store)
    assert steps_in(run) == ALL
    assert_same_records(run, reference)


def test_two_threads_step_at_the_same_time(tmp_path: Path) -> None:
    """An optimizer each, as a generator and its critic may: every record that there is, is whole."""
    store = tmp_path / "run.zarr"
    training = Training()
    optimizers = training.optimizers
    with told() as warnings, attach(optimizers, training.model, store, every=1) as recorder:
        failed: list[BaseException] = []

        def steps(optimizer: Any) -> None:
            try:
                for i in range(60):
                    for p in optimizer.param_groups[0]["params"]:
                        p.grad = p.detach().sin() + i
                    optimizer.step()
                    recorder.log(**{type(optimizer).__name__: i})
            except BaseException as error:
                failed.append(error)

        threads = [threading.Thread(target=steps, args=(optimizer,)) for optimizer in optimizers]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    assert (failed, warnings, recorder.errors) == ([], [], 0)
    run = read(store)
    for group in ("update", "geometry", "scalars"):
        steps = steps_in(run, group)
        assert sorted(set(steps)) == steps
    assert steps_in(run)[-1] == 60


@pytest.mark.parametrize("jump", [-1e6, 1e6])
def test_clock_that_jumps(jump: float, tmp_path: Path, reference: xr.DataTree) -> None:
    store = tmp_path / "run.zarr"
    now = time.time

    def script(training: Training) -> None:
        training.go(3)
        training.flush()
        with mock.patch.object(time, "time", side_effect=lambda: now() + jump):
            training.go(4)
            training.flush()
        training.go(5)

    outcome = disturbed(script, store)
    assert (outcome.warnings, outcome.recorder.errors) == ([], 0)
    run = read(store)
    assert steps_in(run) == ALL
    assert_same_records(run, reference)
    assert (np.diff(run["scalars"]["elapsed_seconds"].values) > 0).all()
