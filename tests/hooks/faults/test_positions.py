"""A file-system error at every operation of a flush in turn: nothing is committed by halves, nothing is lost, and in the end the store is
byte for byte that of a writer that no error met."""

import errno
import itertools
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import pytest

from faults.disk import Disk, on
from faults.training import read
from optiscope.diagnostics.store.writer import CHUNK_STEPS, Writer

TEXT = np.dtypes.StringDType()
COMMITTED = CHUNK_STEPS - 2


def row(step: int) -> dict[str, Any]:
    return {"size": step + np.arange(2) / 7, "curve": np.full((2, 5), step / 3, "float32"), "flag": np.array([step % 2 == 0] * 2)}


def begun(path: Path) -> None:
    """A run with records up to two short of a chunk."""
    writer = Writer(path, {})
    writer.create_group("update", {"name": np.array(["a", "b"], dtype=TEXT)}, {})
    for name, shape, dtype in (("size", (2,), "float64"), ("curve", (2, 5), "float32"), ("flag", (2,), "bool")):
        dimensions = ("matrix", "ns_step")[: len(shape)]
        writer.create_array("update", name, shape, dimensions, dtype, {}, False if dtype == "bool" else np.nan)
    writer.create_group("scalars", {}, {})
    writer.create_array("scalars", "loss", (), (), "float64", {})
    for step in range(1, COMMITTED + 1):
        writer.append("update", step, row(step))
    writer.append("scalars", 1, {"loss": 1.0})
    writer.close()


def records(writer: Writer) -> None:
    """Four more, over the chunk's end, and a scalar."""
    for step in range(COMMITTED + 1, COMMITTED + 5):
        writer.append("update", step, row(step))
    writer.append("scalars", 2, {"loss": 2.0})


def flushed(writer: Writer) -> None:
    writer.flush()


def grown(writer: Writer) -> None:
    """By a matrix, which takes its chunks beside the others'."""
    if len(writer.coordinate("update", "name")) == 2:
        writer.extend_group("update", {"name": np.array(["c"], dtype=TEXT)})
    writer.flush()


def closed(writer: Writer) -> None:
    writer.close()


def content(path: Path) -> dict[str, Any]:
    """Every file, but for what the lock and unfinished writes leave; of the root's document all but who wrote it."""
    files = {p.relative_to(path).as_posix(): p.read_bytes() for p in path.rglob("*") if p.is_file() and p.suffix != ".partial"}
    root = json.loads(files.pop("zarr.json"))
    return {**files, "": {**root, "attributes": {k: v for k, v in root["attributes"].items() if k not in ("writer", "checksum")}}}


def assert_committed(path: Path, count: int) -> None:
    update = read(path)["update"].to_dataset()
    assert update["step"].values.tolist() == list(range(1, count + 1))
    for step in {1, COMMITTED, count}:
        for name, value in row(step).items():
            np.testing.assert_array_equal(update[name].values[step - 1][:2], value)


Action = Callable[[Writer], None]
ACTIONS: tuple[Action, ...] = (flushed, grown, closed)


def inject(action: Action, folder: Path, *, for_ever: bool, torn: bool) -> tuple[int, int]:
    """How many operations there were to fail, each in a run of its own, and how often that reached the caller."""
    begun(folder / "begun.zarr")

    def started(name: str) -> Writer:
        shutil.copytree(folder / "begun.zarr", folder / name)
        writer = Writer(folder / name, {})
        records(writer)
        return writer

    writer = started("reference.zarr")
    with on(Disk(folder / "reference.zarr")) as disk:
        action(writer)
    writer.close()
    reference = content(folder / "reference.zarr")
    assert_committed(folder / "reference.zarr", COMMITTED + 4)

    failures = 0
    for k in range(1, disk.operations + 1):
        path = folder / f"{k}.zarr"
        writer = started(path.name)
        error = (errno.EIO, errno.ENOSPC)[k % 2]
        with on(Disk(path, lambda i, k=k: i == k or (for_ever and i > k), error, torn)) as faulty:  # type: ignore[misc]
            try:
                action(writer)
            except OSError:
                failures += 1
        assert faulty.failed
        # All or nothing.
        committed = json.loads((path / "zarr.json").read_bytes())["consolidated_metadata"]["metadata"]["update/step"]["shape"][0]
        assert committed in (COMMITTED, COMMITTED + 4)
        if k % 5 == 0 or committed > COMMITTED:  # opening a run takes longer than all else here
            assert_committed(path, committed)
        action(writer)
        writer.close()
        assert content(path) == reference, k
        shutil.rmtree(path)
    return disk.operations, failures


@pytest.mark.parametrize(("action", "for_ever", "torn"), [(flushed, False, True), (grown, True, False), (closed, True, True)])
def test_every_operation(action: Action, for_ever: bool, torn: bool, tmp_path: Path) -> None:
    operations, failures = inject(action, tmp_path, for_ever=for_ever, torn=torn)
    # A file opened, written and renamed for each of five arrays, for four of them two chunks, and for the root's document.
    assert operations >= 3 * 10
    assert failures >= operations - 8  # but for what is only cleared away, and documents that nobody needs


if __name__ == "__main__":
    for action, for_ever, torn in itertools.product(ACTIONS, (False, True), (False, True)):
        with TemporaryDirectory() as folder:
            operations, failures = inject(action, Path(folder), for_ever=for_ever, torn=torn)
        how = f"{'from then on' if for_ever else 'once'}, {'after half a write' if torn else 'before the write'}"
        print(f"{action.__name__}, {how}: {operations} positions, {failures} told, all recovered", flush=True)
