"""A disk that fills up, turns read-only, goes away or fails: training does not notice, and what was kept meanwhile is written once it can be."""

import errno
import os
import shutil
import subprocess
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, suppress
from pathlib import Path
from typing import Any

import pytest
import xarray as xr

from faults.disk import Disk, on
from faults.training import Training, assert_same_records, disturbed, read, steps_in, told
from optiscope.hooks import attach

Fault = Callable[[Path], AbstractContextManager[object]]
ALL = list(range(1, 13))


def failing(error: int) -> Fault:
    return lambda store: on(Disk(store, lambda k: True, error))


@contextmanager
def moved(store: Path) -> Iterator[None]:
    """The folder under another name meanwhile, nothing in its place; nor is anything to appear there."""
    store.rename(store.with_name("away"))
    try:
        yield
        assert not store.exists()
    finally:
        store.with_name("away").rename(store)


@contextmanager
def a_file_in_its_place(store: Path) -> Iterator[None]:
    store.rename(store.with_name("away"))
    store.write_text("something else")
    try:
        yield
        assert store.read_text() == "something else"
    finally:
        store.unlink(missing_ok=True)
        store.with_name("away").rename(store)


@contextmanager
def full(store: Path) -> Iterator[None]:
    """The file system that the store is on, filled to the last byte."""
    ballast = store.with_name("ballast")
    with ballast.open("wb", buffering=0) as file, suppress(OSError):
        while True:
            file.write(bytes(4096))
    yield
    ballast.unlink()


@contextmanager
def read_only(store: Path) -> Iterator[None]:
    """By another mount of the same folder in its place; a file system with an open file is not remounted."""
    subprocess.run(["mount", "--bind", store.parent, store.parent], check=True)
    subprocess.run(["mount", "-o", "remount,bind,ro", store.parent], check=True)
    with pytest.raises(OSError, match="Read-only"):
        (store.parent / "probe").touch()
    yield
    subprocess.run(["umount", store.parent], check=True)


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of four megabytes."""
    folder = tmp_path / "disk"
    folder.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=4m", "none", str(folder)]
    if shutil.which("mount") is None or subprocess.run(mount, capture_output=True).returncode != 0:
        pytest.skip("file systems cannot be mounted here")
    yield folder
    subprocess.run(["umount", folder], check=True)


def assert_survived(fault: Fault, store: Path, reference: xr.DataTree, **options: Any) -> None:
    """Three committed records; four steps, each with an attempt to flush, under the fault; five more behind it."""

    def script(training: Training) -> None:
        training.go(3)
        training.flush()
        if training.recorder is None:
            training.go(4)
        else:
            with fault(store):
                for _ in range(4):
                    training.go()
                    training.flush()
            assert steps_in(read(store)) == ALL[:3]
            training.flush()
            assert steps_in(read(store)) == ALL[:7]
        training.go(5)

    outcome = disturbed(script, store, **options)
    [warning] = outcome.warnings
    assert f"{store} could not be written" in warning
    assert "kept in memory and tried again" in warning
    assert (outcome.recorder.errors, outcome.recorder.dropped) == (0, 0)
    run = read(store)
    assert steps_in(run) == steps_in(run, "scalars") == ALL
    assert_same_records(run, reference)


FAULTS: dict[str, Fault] = {
    "no space left": failing(errno.ENOSPC),
    "read-only": failing(errno.EROFS),
    "input/output error": failing(errno.EIO),
    "moved": moved,
    "a file in its place": a_file_in_its_place,
}  # fmt: skip


@pytest.mark.parametrize(("fault", "background"), [*((fault, False) for fault in FAULTS), ("input/output error", True), ("moved", True)])
def test_store_that_cannot_be_written_for_a_while(fault: str, background: bool, tmp_path: Path, reference: xr.DataTree) -> None:
    assert_survived(FAULTS[fault], tmp_path / "run.zarr", reference, background=background)


@pytest.mark.parametrize("background", [False, True])
@pytest.mark.parametrize("fault", [full, read_only])
def test_file_system_that_fills_up_or_turns_read_only(fault: Fault, background: bool, small_disk: Path, reference: xr.DataTree) -> None:
    assert_survived(fault, small_disk / "run.zarr", reference, background=background)


def test_name_first_logged_while_the_disk_is_full(tmp_path: Path) -> None:
    """Also one that never comes again: what was logged under it is written once there is room."""
    store = tmp_path / "run.zarr"

    def script(training: Training) -> None:
        training.go(3)
        training.flush()
        with on(Disk(store, lambda k: True)):
            for step in (4, 5):
                training.go()
                if training.recorder is not None:
                    training.recorder.log(**{f"only_at_{step}": step})
                training.flush()
        training.go(5)

    outcome = disturbed(script, store)
    assert len(outcome.warnings) == 1
    scalars = read(store)["scalars"].to_dataset()
    assert scalars["step"].values.tolist() == ALL[:10]
    for step in (4, 5):
        assert scalars[f"only_at_{step}"].dropna("step")["step"].values.tolist() == [step]


def test_parameter_added_while_the_disk_is_full(tmp_path: Path) -> None:
    """Its records of that time are lost, as it had no rows; the others' are kept, and it is recorded as soon as there is room."""
    store = tmp_path / "run.zarr"

    def script(training: Training) -> None:
        parameters = training.optimizers[1].param_groups[0]["params"]
        [second] = [parameters.pop(i) for i, p in enumerate(parameters) if p.ndim == 2]
        training.go(3)
        training.flush()
        with on(Disk(store, lambda k: True)):
            training.optimizers[1].add_param_group({"params": [second]})
            for _ in range(4):
                training.go()
                training.flush()
        training.go(5)

    outcome = disturbed(script, store)
    assert len(outcome.warnings) == 1
    update = read(store)["update"].to_dataset()
    assert update["step"].values.tolist() == ALL
    by_name = {name: update["update_rms"].values[:, i] for i, name in enumerate(update["name"].values.tolist())}
    assert (by_name["0.weight"] > 0).all()
    assert (by_name["3.weight"][7:] > 0).all()


def test_store_that_stays_unwritable(tmp_path: Path, reference: xr.DataTree) -> None:
    """What is lost is said when it is lost: with the end."""
    store = tmp_path / "run.zarr"
    disk = Disk(store, lambda k: disk.operations > committed)
    committed = 10**9

    def script(training: Training) -> None:
        nonlocal committed
        training.go(3)
        training.flush()
        if training.recorder is not None:
            committed = 0
        training.go(4)
        training.flush()

    with on(disk):
        outcome = disturbed(script, store)
    first, last = outcome.warnings
    assert "could not be written" in first
    assert f"4 records, of steps 4 to 7, could not be written to {store} and are lost" in last
    assert outcome.recorder.dropped == 4
    run = read(store)
    assert steps_in(run) == [1, 2, 3]
    assert_same_records(run, reference)


def test_folder_deleted(tmp_path: Path) -> None:
    """It is not made again, as what it held cannot be; one warning, and one for what is lost."""
    store = tmp_path / "run.zarr"

    def script(training: Training) -> None:
        training.go(3)
        training.flush()
        if training.recorder is not None:
            shutil.rmtree(store)
        training.go(4)
        training.flush()

    outcome = disturbed(script, store)
    assert ["could not be written" in warning for warning in outcome.warnings] == [True, True]
    assert "4 records, of steps 4 to 7" in outcome.warnings[1]
    assert outcome.recorder.dropped == 4
    assert not store.exists()


def test_all_that_a_long_outage_takes_is_counted(tmp_path: Path) -> None:
    """What did not fit into memory while the disk was full, and what the end gives up: as many as the warning says."""
    store = tmp_path / "run.zarr"

    def script(training: Training) -> None:
        training.go(3)
        training.flush()
        if training.recorder is not None:
            shutil.rmtree(store)
        for _ in range(3):  # more than the four chunks of 64 that are kept
            training.go(100)
            training.flush()

    outcome = disturbed(script, store)
    assert "300 records, of steps 4 to 303" in outcome.warnings[-1]
    assert outcome.recorder.dropped == 300


@pytest.mark.parametrize("error", [errno.ENOSPC, errno.EACCES])
def test_store_that_cannot_be_made(error: int, tmp_path: Path) -> None:
    """Said at once, before the training begins, which `attach` leaves as it was; and it can be tried again."""
    store = tmp_path / "run.zarr"
    training = Training()
    with on(Disk(store, lambda k: True, error)) as disk, pytest.raises(OSError, match=os.strerror(error)):
        attach(training.optimizers, training.model, store, every=1)
    assert disk.failed
    assert not any(o._optimizer_step_pre_hooks or o._optimizer_step_post_hooks for o in training.optimizers)
    with told() as warnings, attach(training.optimizers, training.model, store, every=1) as training.recorder:
        training.go(2)
    assert not warnings
    assert steps_in(read(store)) == [1, 2]
