"""However a process ends, what was committed stays readable; and where the interpreter still runs, all that was recorded is committed."""

import os
import signal
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import xarray as xr

from faults import programs
from faults.programs import Server, server
from faults.training import assert_same_records, read, steps_in

ALL = list(range(1, 13))


@pytest.fixture(scope="module")
def serving() -> Iterator[Server]:
    with server() as found:
        yield found


@pytest.mark.parametrize(
    ("program", "status", "error", "steps"),
    [
        (programs.left_open, 0, "", 12),
        (programs.ends_by_an_exception, 1, "ValueError: the training's own", 12),
        (programs.exits_in_a_thread, 0, "", 12),
        (programs.ends_at_once, 0, "", 7),
    ],
)
def test_end_without_close(
    program: Callable[..., None], status: int, error: str, steps: int, serving: Server, tmp_path: Path, reference: xr.DataTree
) -> None:
    ended, errors = serving.run(program, tmp_path / "run.zarr")
    assert ended == status
    assert errors.strip().split("\n")[-1] == error
    assert "optiscope" not in errors.replace("optiscope/", "")
    run = read(tmp_path / "run.zarr")
    assert steps_in(run) == ALL[:steps]
    assert_same_records(run, reference)


@pytest.mark.parametrize("program", [programs.left_open, programs.forks])
def test_in_the_background(program: Callable[..., None], serving: Server, tmp_path: Path, reference: xr.DataTree) -> None:
    """An end without close, and children."""
    assert serving.run(program, tmp_path / "run.zarr", background=True) == (0, "")
    run = read(tmp_path / "run.zarr")
    assert steps_in(run) == ALL
    assert_same_records(run, reference)


@pytest.mark.parametrize("program", [programs.forks, programs.loads_data_in_workers])
def test_children(program: Callable[..., None], serving: Server, tmp_path: Path, reference: xr.DataTree) -> None:
    """Whatever they do, the run holds what their parent recorded, and that only."""
    assert serving.run(program, tmp_path / "run.zarr") == (0, "")
    run = read(tmp_path / "run.zarr")
    assert steps_in(run) == ALL
    assert_same_records(run, reference)


def test_processes_that_get_the_optimizers(serving: Server, tmp_path: Path, reference: xr.DataTree) -> None:
    assert serving.run(programs.starts_processes, tmp_path / "run.zarr") == (0, "")
    run = read(tmp_path / "run.zarr")
    assert steps_in(run) == ALL
    assert_same_records(run, reference)


@pytest.mark.parametrize(
    ("program", "number", "status", "says", "finished"),
    [
        (programs.goes_on, signal.SIGTERM, -signal.SIGTERM, [], False),  # its default action: no more Python
        (programs.handles_sigterm, signal.SIGTERM, 7, [], True),
        (programs.is_launched, signal.SIGTERM, 0, ["caught"], True),
        (programs.is_interrupted, signal.SIGINT, -signal.SIGINT, [], True),
    ],
)
def test_signal(
    program: Callable[..., None], number: int, status: int, says: list[str], finished: bool, serving: Server, tmp_path: Path
) -> None:
    """At some moment of a step or a measurement."""
    for i, wait in enumerate((0.021,)):
        store = tmp_path / f"{i}.zarr"
        process = serving.start(program, store)
        assert serving.hear() == "flushed"
        time.sleep(wait)
        os.kill(process, number)
        assert [serving.hear() for _ in says] == says
        ended, errors = serving.end()
        assert ended == status
        assert "optiscope:" not in errors
        run = read(store)
        steps = steps_in(run)
        assert steps == list(range(1, len(steps) + 1))
        assert len(steps) == 7 or finished
        assert len(steps) >= 7


def test_interrupted_twice(serving: Server, tmp_path: Path) -> None:
    """The second time within the end of the recorder, perhaps; what that left is committed at the interpreter's end."""
    for i, wait in enumerate((0.002, 0.02)):
        store = tmp_path / f"{i}.zarr"
        process = serving.start(programs.is_interrupted, store)
        assert serving.hear() == "flushed"
        time.sleep(0.2)  # for some steps
        os.kill(process, signal.SIGINT)
        time.sleep(wait)
        os.kill(process, signal.SIGINT)
        ended, errors = serving.end()
        assert ended == -signal.SIGINT
        assert "optiscope:" not in errors
        steps = steps_in(read(store))
        assert steps == list(range(1, len(steps) + 1))
        assert len(steps) > 7
