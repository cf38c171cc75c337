"""The store: what is written reads back, all or nothing, with plain xarray, whatever fails or is cut off in between."""

import json
import os
import shutil
import warnings
from collections.abc import Callable
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import pytest
import xarray as xr
import zarr
from hypothesis import given, settings
from hypothesis import strategies as st
from zarr.errors import ZarrUserWarning

import optiscope.hooks.writer as writer_module
from optiscope.hooks.writer import CHUNK_STEPS, SCALAR_CHUNK_STEPS, TakenOver, Writer

Read = Callable[[str | Path], Any]

MATRICES = 3
# Every kind of array there is: name → (shape after step, dimensions after step, dtype).
ARRAYS: dict[str, tuple[tuple[int, ...], tuple[str, ...], str]] = {
    "size": ((MATRICES,), ("matrix",), "float64"),
    "curve": ((MATRICES, 5), ("matrix", "ns_step"), "float32"),
    "flag": ((MATRICES,), ("matrix",), "bool"),
    "choice": ((MATRICES,), ("matrix",), "int16"),
}


def new_writer(path: Path) -> Writer:
    """A committed, empty run with a group `update` of ARRAYS and a group `scalars`."""
    writer = Writer(path, {"note": "test"})
    names = np.array(["a", "b", "ключ"], dtype=np.dtypes.StringDType())
    writer.create_group("update", {"name": names, "quantile_level": np.linspace(0, 1, 6).reshape(3, 2)}, {"of": "tests"})
    for name, (shape, dimensions, dtype) in ARRAYS.items():
        writer.create_array("update", name, shape, dimensions, dtype, {"units": "1"}, {"bool": False, "int16": -1}.get(dtype, np.nan))
    writer.create_group("scalars", {}, {})
    writer.flush()
    return writer


def row(step: int) -> dict[str, Any]:
    """A record whose values tell its step."""
    return {
        "size": step + np.arange(MATRICES) / 7,
        "curve": np.float32(step) + np.arange(MATRICES * 5, dtype="float32").reshape(MATRICES, 5) / 3,
        "flag": np.arange(MATRICES) % 2 == step % 2,
        "choice": np.full(MATRICES, step % 100, dtype="int16"),
    }


def assert_holds(run: Any, steps: list[int]) -> None:
    """The group `update` holds exactly these steps, with exactly the values of :func:`row`."""
    update = run["update"]
    assert update["step"].values.tolist() == steps
    for name in ARRAYS:
        expected = np.array([row(step)[name] for step in steps]).reshape((len(steps), *ARRAYS[name][0]))
        assert update[name].dtype == np.dtype(ARRAYS[name][2])
        np.testing.assert_array_equal(update[name].values, expected)


def as_zarr_consolidates(path: Path) -> Any:
    """The root document that zarr itself would write for this run, from a copy of it."""
    with TemporaryDirectory() as folder:
        copy = shutil.copytree(path, Path(folder) / "copy")
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "Consolidated metadata is currently not part", ZarrUserWarning)
            zarr.consolidate_metadata(copy)
        return json.loads((copy / "zarr.json").read_text())


def root_document(path: Path) -> Any:
    return json.loads((path / "zarr.json").read_text())


# Round trip


@settings(max_examples=25, deadline=None)
@given(blocks=st.lists(st.integers(0, 5) | st.integers(CHUNK_STEPS - 2, CHUNK_STEPS + 2) | st.integers(0, 3 * CHUNK_STEPS), max_size=5))
def test_round_trip(blocks: list[int]) -> None:
    """Any numbers of records between flushes, across chunk boundaries, by one writer or a new one each time."""
    for reopen in (False, True):
        with TemporaryDirectory() as folder:
            path = Path(folder) / "run.zarr"
            writer = new_writer(path)
            written = 0
            for count in blocks:
                writer = Writer(path, {}) if reopen else writer
                assert writer.last_step == written
                for step in range(written + 1, written + count + 1):
                    full = writer.append("update", step, row(step))
                    assert full == (step % CHUNK_STEPS == 0)
                writer.flush()
                written += count
                assert writer.committed == {"scalars": 0, "update": written}
            with xr.open_datatree(path, engine="zarr") as run:
                assert_holds(run.load(), list(range(1, written + 1)))


def test_layout_as_plain_xarray_sees_it(tmp_path: Path, read: Read) -> None:
    writer = new_writer(tmp_path / "run.zarr")
    writer.append("update", 5, row(5))
    writer.attributes["update"]["list"] = [{"later": 1.5}]
    writer.attributes[""]["errors"] = 2
    writer.flush()
    run = read(tmp_path / "run.zarr")
    assert set(run.children) == {"update", "scalars"}
    update = run["update"].to_dataset()
    assert update["name"].values.tolist() == ["a", "b", "ключ"]
    assert set(update.coords) == {"step", "name", "quantile_level"}
    assert {name: array.dims for name, array in update.data_vars.items()} == {
        name: ("step", *dimensions) for name, (_, dimensions, _) in ARRAYS.items()
    }
    assert (update.attrs, update["size"].attrs) == ({"of": "tests", "list": [{"later": 1.5}]}, {"units": "1"})
    assert {key: run.attrs[key] for key in ("optiscope_schema", "note", "errors")} == {"optiscope_schema": 1, "note": "test", "errors": 2}


def test_what_a_record_lacks_is_missing(tmp_path: Path, read: Read) -> None:
    writer = new_writer(tmp_path / "run.zarr")
    writer.append("update", 1, {})
    writer.flush()
    update = read(tmp_path / "run.zarr")["update"]
    assert np.isnan(update["size"].values).all()
    assert np.isnan(update["curve"].values).all()
    assert not update["flag"].values.any()
    assert (update["choice"].values == -1).all()


def test_scalar_that_appears_late(tmp_path: Path, read: Read) -> None:
    """Missing before, in committed and in buffered records alike; and by a writer that reopened the run."""
    writer = new_writer(tmp_path / "run.zarr")
    writer.create_array("scalars", "loss", (), (), "float64", {})
    writer.append("scalars", 1, {"loss": 1.0})
    writer.flush()
    writer.append("scalars", 2, {"loss": 2.0})
    writer.create_array("scalars", "accuracy", (), (), "float64", {})
    writer.append("scalars", 3, {"loss": 3.0, "accuracy": 0.3})
    writer.flush()
    writer = Writer(tmp_path / "run.zarr", {})
    assert writer.has("scalars", "accuracy")
    writer.create_array("scalars", "late", (), (), "float64", {})
    writer.append("scalars", 4, {"late": 4.0})
    writer.flush()
    scalars = read(tmp_path / "run.zarr")["scalars"]
    nan = np.nan
    np.testing.assert_array_equal(scalars["loss"].values, [1, 2, 3, nan])
    np.testing.assert_array_equal(scalars["accuracy"].values, [nan, nan, 0.3, nan])
    np.testing.assert_array_equal(scalars["late"].values, [nan, nan, nan, 4])


def test_scalars_cross_their_chunks(tmp_path: Path, read: Read) -> None:
    writer = new_writer(tmp_path / "run.zarr")
    writer.create_array("scalars", "loss", (), (), "float64", {})
    count = 2 * SCALAR_CHUNK_STEPS + 3
    for step in range(1, count + 1):
        if writer.append("scalars", step, {"loss": step / 3}):
            assert step % SCALAR_CHUNK_STEPS == 0
            writer.flush()
    writer.flush()
    scalars = read(tmp_path / "run.zarr")["scalars"]
    np.testing.assert_array_equal(scalars["loss"].values, np.arange(1, count + 1) / 3)


def test_whole_chunks_are_written_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Flushing where `append` says so rewrites nothing: as many chunk writes as there are chunks."""
    writer = new_writer(tmp_path / "run.zarr")
    writes: list[Any] = []
    setitem = zarr.Array.__setitem__
    monkeypatch.setattr(zarr.Array, "__setitem__", lambda self, *args: writes.append(self.basename) or setitem(self, *args))
    for step in range(1, 3 * CHUNK_STEPS + 1):
        if writer.append("update", step, row(step)):
            writer.flush()
    assert sorted(writes) == sorted([*ARRAYS, "step"] * 3)
    chunks = [p for p in (tmp_path / "run.zarr" / "update" / "size" / "c").rglob("*") if p.is_file()]
    assert len(chunks) == 3


def test_consolidated_metadata_is_what_zarr_would_write(tmp_path: Path) -> None:
    path = tmp_path / "run.zarr"
    writer = new_writer(path)
    assert root_document(path) == as_zarr_consolidates(path)
    writer.append("update", 1, row(1))
    writer.append("scalars", 1, {"loss": 0.5})
    writer.create_array("scalars", "loss", (), (), "float64", {"units": "nats"})
    writer.attributes["update"]["ns_schedules"] = [{"coefficients": [[1.5, -0.5, 0.0]], "eps": 1e-7}]
    writer.flush()
    assert root_document(path) == as_zarr_consolidates(path)
    writer = Writer(path, {})
    writer.append("update", 2, row(2))
    writer.flush()
    assert root_document(path) == as_zarr_consolidates(path)


# Torn flushes


class Killed(BaseException):
    """Ends a flush where it stands, as a kill would: no handler of the writer or of zarr for `Exception` runs."""


def break_at(k: int, error: BaseException, patch: pytest.MonkeyPatch) -> list[int]:
    """Make the k-th operation of a flush raise, counting array writes, resizings, and every file's renaming into place."""
    count = [0]

    def counted(original: Callable[..., Any]) -> Callable[..., Any]:
        def operation(*args: Any, **kwargs: Any) -> Any:
            count[0] += 1
            if count[0] == k:
                raise error
            return original(*args, **kwargs)

        return operation

    patch.setattr(zarr.Array, "__setitem__", counted(zarr.Array.__setitem__))
    patch.setattr(zarr.Array, "resize", counted(zarr.Array.resize))
    patch.setattr(os, "replace", counted(os.replace))
    return count


def operations_of_a_flush(tmp_path: Path) -> int:
    writer = started(tmp_path / "counted.zarr")
    with pytest.MonkeyPatch.context() as patch:
        count = break_at(-1, OSError(), patch)
        writer.flush()
    return count[0]


def started(path: Path) -> Writer:
    """A run with 62 committed records and four more, across the chunk boundary, buffered; and a scalar."""
    writer = new_writer(path)
    writer.create_array("scalars", "loss", (), (), "float64", {})
    for step in range(1, 63):
        writer.append("update", step, row(step))
    writer.append("scalars", 1, {"loss": 1.0})
    writer.flush()
    for step in range(63, 67):
        writer.append("update", step, row(step))
    writer.append("scalars", 2, {"loss": 2.0})
    return writer


def test_failed_flush_commits_nothing_and_loses_nothing(tmp_path: Path, read: Read) -> None:
    operations = operations_of_a_flush(tmp_path)
    # Seven arrays are resized and written (14); renamed are their metadata (7), a chunk each of three and two each of the
    # four that cross the boundary (11), and the documents of both groups and the root (3).
    assert operations >= 35
    for k in range(1, operations + 1):
        path = tmp_path / f"{k}.zarr"
        writer = started(path)
        with pytest.MonkeyPatch.context() as patch:
            break_at(k, OSError(28, "No space left on device"), patch)
            with pytest.raises(OSError, match="No space left"):
                writer.flush()
        run = read(path)
        assert_holds(run, list(range(1, 63)))
        assert run["scalars"]["loss"].values.tolist() == [1.0]
        writer.append("update", 67, row(67))
        writer.flush()
        run = read(path)
        assert_holds(run, list(range(1, 68)))
        assert run["scalars"]["loss"].values.tolist() == [1.0, 2.0]
        assert root_document(path) == as_zarr_consolidates(path)


def test_run_cut_off_in_a_flush_is_continued(tmp_path: Path, read: Read) -> None:
    """Killed at any operation: what was committed reads back, also after the next writer's first, empty, commit."""
    for k in range(1, operations_of_a_flush(tmp_path) + 1):
        path = tmp_path / f"{k}.zarr"
        writer = started(path)
        with pytest.MonkeyPatch.context() as patch:
            break_at(k, Killed(), patch)
            with pytest.raises(Killed):
                writer.flush()
        assert_holds(read(path), list(range(1, 63)))
        after = Writer(path, {})
        assert after.last_step == 62
        after.flush()
        assert_holds(read(path), list(range(1, 63)))
        assert root_document(path) == as_zarr_consolidates(path)
        after.append("update", 100, row(100))
        after.flush()
        assert_holds(read(path), [*range(1, 63), 100])
        assert root_document(path) == as_zarr_consolidates(path)
        assert not list(path.rglob("*.partial"))


def test_copy_taken_in_the_middle_of_a_flush(tmp_path: Path, read: Read, monkeypatch: pytest.MonkeyPatch) -> None:
    """A reader, or a backup, at every moment of a flush sees the state before it; only the last rename changes that."""
    writer = started(tmp_path / "run.zarr")
    seen: list[int] = []

    def looked_at(original: Callable[..., Any]) -> Callable[..., Any]:
        def operation(*args: Any, **kwargs: Any) -> Any:
            seen.append(read(tmp_path / "run.zarr")["update"].sizes["step"])
            return original(*args, **kwargs)

        return operation

    monkeypatch.setattr(zarr.Array, "__setitem__", looked_at(zarr.Array.__setitem__))
    monkeypatch.setattr(zarr.Array, "resize", looked_at(zarr.Array.resize))
    monkeypatch.setattr(writer_module, "_replace", looked_at(writer_module._replace))
    writer.flush()
    assert seen == [62] * 17  # seven arrays resized and written, three documents replaced
    assert read(tmp_path / "run.zarr")["update"].sizes["step"] == 66


def test_variable_left_uncommitted_by_a_killed_writer(tmp_path: Path, read: Read) -> None:
    """It is no part of the run, though its folder is there; and it can be made again."""
    path = tmp_path / "run.zarr"
    writer = started(path)
    writer.create_array("scalars", "orphan", (), (), "float64", {})
    writer.append("scalars", 3, {"orphan": 3.0})
    with pytest.MonkeyPatch.context() as patch:
        break_at(operations_of_a_flush(tmp_path) + 4, Killed(), patch)  # the root's renaming: four operations are the orphan's
        with pytest.raises(Killed):
            writer.flush()
    assert (path / "zarr.json.partial").exists()
    assert (path / "scalars" / "orphan").is_dir()
    (path / "scalars" / ".ipynb_checkpoints").mkdir()  # some leave folders anywhere
    after = Writer(path, {})
    after.append("scalars", 5, {"loss": 5.0})
    after.flush()
    assert list(read(path)["scalars"].data_vars) == ["loss"]
    after.create_array("scalars", "orphan", (), (), "float64", {})
    after.append("scalars", 6, {"orphan": 6.0})
    after.flush()
    scalars = read(path)["scalars"]
    np.testing.assert_array_equal(scalars["loss"].values, [1, 5, np.nan])
    np.testing.assert_array_equal(scalars["orphan"].values, [np.nan, np.nan, 6])


def test_partial_files_are_swept(tmp_path: Path, read: Read) -> None:
    path = tmp_path / "run.zarr"
    started(path).flush()
    leftovers = [path / "zarr.json.partial", path / "update" / "size" / "c" / "0" / "0.0123456789abcdef.partial"]
    for leftover in leftovers:
        leftover.write_bytes(b"half a fi")
    Writer(path, {})
    assert not any(leftover.exists() for leftover in leftovers)
    assert_holds(read(path), list(range(1, 67)))


def test_run_that_never_committed_is_made_again(tmp_path: Path, read: Read, monkeypatch: pytest.MonkeyPatch) -> None:
    """Killed while it was laid out, at the root's first commit, or before its first file was in place."""
    path = tmp_path / "run.zarr"
    with monkeypatch.context() as patch:
        patch.setattr(writer_module, "_replace", lambda *args: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            new_writer(path)
    assert (path / "update" / "size").is_dir()
    shutil.copytree(path, tmp_path / "bare.zarr")
    for child in (tmp_path / "bare.zarr").iterdir():
        if child.is_dir():
            shutil.rmtree(child)
    (tmp_path / "empty.zarr").mkdir()
    (tmp_path / "half.zarr").mkdir()
    (tmp_path / "half.zarr" / "zarr.0123456789abcdef.partial").write_bytes(b"{")
    for name in ("run", "bare", "empty", "half"):
        writer = new_writer(tmp_path / f"{name}.zarr")
        assert writer.is_new
        writer.append("update", 1, row(1))
        writer.flush()
        assert_holds(read(tmp_path / f"{name}.zarr"), [1])


def test_run_of_another_schema(tmp_path: Path) -> None:
    path = tmp_path / "run.zarr"
    writer = new_writer(path)
    writer.attributes[""]["optiscope_schema"] = 1000
    writer.flush()
    before = root_document(path)
    with pytest.raises(ValueError, match=f"^store: {path} was written by a newer optiscope with schema 1000; "):
        Writer(path, {})
    assert root_document(path) == before


def test_writer_that_was_replaced_writes_no_more(tmp_path: Path, read: Read) -> None:
    path = tmp_path / "run.zarr"
    first = started(path)
    second = Writer(path, {})
    second.append("update", 63, row(63))
    second.flush()
    with pytest.raises(TakenOver, match=r"run\.zarr is now written by another recorder$"):
        first.flush()
    second.append("update", 64, row(64))
    second.flush()
    assert_holds(read(path), list(range(1, 65)))


def test_no_warning_filter_is_touched(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """`warnings.catch_warnings` around a flush would reset, for all threads, what has been warned about before."""
    writer = started(tmp_path / "run.zarr")
    with monkeypatch.context() as patch:
        patch.setattr(warnings, "catch_warnings", lambda *args, **kwargs: 1 / 0)
        writer.flush()
