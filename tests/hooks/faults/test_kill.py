"""Trainings killed at random moments, recorded in the foreground and in the background: what a run has committed stays readable and right,
and the next one goes on with it. As a program, `python -m faults.test_kill`, 200 kills of each kind; a few in the tests."""

import json
import os
import random
import signal
import sys
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from tempfile import TemporaryDirectory

import xarray as xr

from faults import programs
from faults.programs import Server, server
from faults.training import assert_same_records, read, steps_in

# Runs hit once at any moment since the fork, most while they are made; and some that are killed and continued many times.
FEW = (1,) * 2 + (3,)
MANY = (1,) * 40 + (20,) * 8
SEED = 0


def test_kill(tmp_path: Path) -> None:
    with server() as serving:
        reference = recorded(serving, tmp_path, 100)
        for background in (False, True):
            counts = kill(serving, tmp_path, reference, FEW, background)
            assert counts["kills"] == sum(FEW)


def recorded(serving: Server, folder: Path, steps: int) -> xr.DataTree:
    """So many records of a training that nobody kills."""
    assert serving.run(programs.is_killed, folder / "reference.zarr", until=steps) == (0, "")
    run = read(folder / "reference.zarr")
    assert steps_in(run) == list(range(1, steps + 1))
    return run


def kill(serving: Server, folder: Path, reference: xr.DataTree, kills_per_run: tuple[int, ...], background: bool) -> Counter[str]:
    """Kill and continue runs; what happened, counted."""
    rng = random.Random(SEED)
    counts: Counter[str] = Counter()
    for number, kills in enumerate(kills_per_run):
        store = folder / f"{number}-{background}.zarr"
        for _ in range(kills):
            seen = programs.reported(store)
            process = serving.start(programs.is_killed, store, background=background)
            if kills > 1:
                wait_until(lambda: programs.reported(store) > seen)  # noqa: B023
            time.sleep(rng.uniform(0, 0.4 if kills == 1 else 0.2))
            os.kill(process, signal.SIGKILL)
            assert serving.end()[0] == -signal.SIGKILL
            counts["kills"] += 1
            if programs.committed(store) is None:
                assert not programs.reported(store)
                counts["before the first commit"] += 1
            else:
                counts["in the middle of a commit"] += bool(list(store.glob(".*.partial"))) or has_uncommitted_chunk(store)
                assert_holds(store, reference)
        # And a last one, left alone, goes on behind it.
        before = programs.committed(store) or 0
        assert serving.run(programs.is_killed, store, background=background, more=3)[0] == 0
        counts["records"] += assert_holds(store, reference)
        assert (programs.committed(store) or 0) > before
        counts["continued"] += kills
    return counts


def wait_until(condition: Callable[[], bool], seconds: float = 60) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.005)


def has_uncommitted_chunk(store: Path) -> bool:
    """A file that no commit knows of."""
    chunks = json.loads((store / "zarr.json").read_text())["attributes"]["chunks"]
    return any(
        not int(mask, 16) >> int(file.name if file.parent.name == "c" else file.relative_to(store / path / "c").parts[0]) & 1
        for path, mask in chunks.items()
        for file in (store / path).glob("c/**/*")
        if file.is_file()
    )


def assert_holds(store: Path, reference: xr.DataTree) -> int:
    """Every record that was reported, each to the bit that of the reference; gives their number."""
    run = read(store)
    steps = steps_in(run)
    assert len(steps) >= programs.reported(store)
    # A worker has not seen how the one before it left the weights.
    missing = ("changed_outside",)
    for group in ("geometry", "update", "second_moment"):
        assert steps_in(run, group) == steps
    assert_same_records(run, reference, missing=missing)
    return len(steps)


if __name__ == "__main__":
    with server() as serving, TemporaryDirectory() as folder:
        reference = recorded(serving, Path(folder), 1000)
        for how in sys.argv[1:] or ["foreground", "background"]:
            counts = kill(serving, Path(folder), reference, MANY, how == "background")
            print(how, dict(counts), flush=True)
