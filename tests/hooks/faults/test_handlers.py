"""A signal handler that closes the recorder, wherever in the recorder's own work the signal arrives: `python -m faults.test_handlers` tries every place.

Python runs a handler in the main thread, between any two instructions; here between any two lines of the recorder.
"""

import random
import signal
import sys
from collections.abc import Callable
from pathlib import Path
from tempfile import TemporaryDirectory
from types import FrameType
from typing import Any

import numpy as np
import pytest
import torch
import xarray as xr

from faults.training import Training, assert_same_records, disturbed, read, steps_in, told
from optiscope.diagnostics.store.lock import owner
from optiscope.hooks import Recorder, attach
from optiscope.hooks.recording import lifetime

ROOT = Path(__file__).parents[3]
OURS = (f"{ROOT}/hooks/", f"{ROOT}/diagnostics/")
WRITING = tuple(f"{ROOT}/{part}" for part in ("hooks/recording/journal.py", "hooks/recording/scalars.py", "diagnostics/store/"))
FEW = 3
GROUPS = ("geometry", "update", "second_moment")


class Signal:
    """Sends SIGUSR1 before the n-th line of some of the recorder's files that the main thread comes to; counts the lines."""

    def __init__(self, at: int | None, files: str | tuple[str, ...]) -> None:
        self.at, self.files, self.lines = at, files, 0
        self._before = sys.gettrace()

    def __enter__(self) -> "Signal":
        sys.settrace(self._trace)
        return self

    def __exit__(self, *_: object) -> None:
        sys.settrace(self._before)

    def _trace(self, frame: FrameType, event: str, _: Any) -> Any:
        if not frame.f_code.co_filename.startswith(self.files):
            return None
        if event == "line":
            self.lines += 1
            if self.lines == self.at:
                signal.raise_signal(signal.SIGUSR1)
        return self._trace


def closes(recorder: Recorder) -> None:
    recorder.close()


def logs_and_closes(recorder: Recorder) -> None:
    """As one that is told of a coming end, and writes down that it was."""
    recorder.log(told=recorder.step)
    recorder.flush()
    recorder.close()


def closes_and_exits(recorder: Recorder) -> None:
    recorder.close()
    raise SystemExit(7)


HANDLERS = [closes, logs_and_closes, closes_and_exits]


def interrupted(
    handler: Callable[[Recorder], None], at: int | None, store: Path, background: bool, files: str | tuple[str, ...]
) -> tuple[int, list[str]]:
    """A training of a few steps and flushes, a signal within; the lines it took, and what was told. What a handler leaves is the interpreter's end's."""
    training = Training()
    training.waits = background
    recorder = training.recorder = attach(training.optimizers, training.model, store, every=1, background=background)
    before = signal.signal(signal.SIGUSR1, lambda number, frame: handler(recorder))
    try:
        with told() as warnings:
            with Signal(at, files) as sent:
                try:
                    training.go(2)
                    training.flush()
                    training.go(2)
                    training.flush()
                except SystemExit:
                    assert handler is closes_and_exits
            assert at is None or sent.lines >= at
            if handler is not closes_and_exits:
                assert at is None or recorder.session not in lifetime.still_open
                plain = Training()
                plain.go(4)
                assert training.fingerprint() == plain.fingerprint()
            lifetime._close_all()
    finally:
        signal.signal(signal.SIGUSR1, before)
        torch.set_grad_enabled(True)
    assert owner(store) is None
    assert recorder.errors == recorder.dropped == 0
    return sent.lines, warnings


def assert_whole(
    handler: Callable[[Recorder], None],
    at: int,
    store: Path,
    reference: xr.DataTree,
    background: bool,
    files: str | tuple[str, ...] = WRITING,
) -> None:
    """Every record but the last, which the close may have cut off between two optimizers, is that of the reference; no row of scalars is lost."""
    _, warnings = interrupted(handler, at, store, background, files)
    assert [warning for warning in warnings if "no step of" not in warning] == []
    run = read(store)
    records, rows = steps_in(run), steps_in(run, "scalars")
    assert records == list(range(1, len(records) + 1))
    assert all(steps_in(run, group) == records for group in GROUPS)
    assert_same_records(run.isel(step=slice(0, len(records) - 1)), reference, missing=("loss", "told"))
    if rows[:1] == [0]:  # closed before the first step was counted: what is logged afterwards goes there
        assert (rows, records) == ([0], [])
    else:
        assert rows == list(range(1, len(rows) + 1))
        assert 0 <= len(rows) - len(records) <= 1
    if "loss" not in run["scalars"]:
        assert handler is closes_and_exits
        assert len(rows) <= 1
    else:
        # The last row has what was logged after the close, or, where the training ended there, perhaps nothing.
        loss, known = run["scalars"]["loss"].values, reference["scalars"]["loss"].values
        assert loss[:-1].tobytes() == known[: len(rows) - 1].tobytes()
        assert np.isfinite(loss[-1]) or handler is closes_and_exits
    if handler is logs_and_closes:
        told_at = run["scalars"]["told"].dropna("step")
        assert told_at.values.tolist() == told_at["step"].values.tolist() == rows[-1:]


@pytest.mark.parametrize("background", [False, True], ids=["foreground", "background"])
@pytest.mark.parametrize("handler", HANDLERS)
def test_some_places(handler: Callable[[Recorder], None], background: bool, tmp_path: Path, reference: xr.DataTree) -> None:
    lines, _ = interrupted(handler, None, tmp_path / "counted.zarr", background, WRITING)
    for at in random.Random(f"{handler.__name__} {background}").sample(range(1, lines), FEW):
        assert_whole(handler, at, tmp_path / f"{at}.zarr", reference, background)


if __name__ == "__main__":
    with TemporaryDirectory() as folder:
        here = Path(folder)
        disturbed(lambda training: training.go(4), here / "reference.zarr")
        undisturbed = read(here / "reference.zarr")
        draw, failed = random.Random(0), 0
        for trial in range(int(sys.argv[1])):
            chosen, behind = draw.choice(HANDLERS), draw.random() < 0.5
            place = draw.randrange(1, 26000)
            try:
                assert_whole(chosen, place, here / f"{trial}.zarr", undisturbed, behind, OURS)
            except Exception as error:
                failed += 1
                print(chosen.__name__, behind, place, type(error).__name__, str(error)[:300], flush=True)
        print(f"{sys.argv[1]} signals, {failed} failed", flush=True)
