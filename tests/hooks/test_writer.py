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

from optiscope.diagnostics.catalogue import SCHEMA
from optiscope.diagnostics.store.files import Files
from optiscope.diagnostics.store.format import chunks_written, seal
from optiscope.diagnostics.store.writer import CHUNK_STEPS, SCALAR_CHUNK_STEPS, TakenOver, Writer

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
    assert {key: run.attrs[key] for key in ("optiscope_schema", "note", "errors")} == {
        "optiscope_schema": SCHEMA,
        "note": "test",
        "errors": 2,
    }


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
    writes: list[str] = []
    replace = Files.replace
    monkeypatch.setattr(Files, "replace", lambda self, path, content: writes.append(path) or replace(self, path, content))
    for step in range(1, 3 * CHUNK_STEPS + 1):
        if writer.append("update", step, row(step)):
            writer.flush()
    written = [path for path in writes if "/c/" in path]
    # The steps' chunks are longer.
    assert sorted(written) == sorted(
        [f"update/{name}/c/{i}/0{'/0' * (name == 'curve')}" for name in ARRAYS for i in range(3)] + ["update/step/c/0"] * 3
    )
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
    # Arrays' own documents follow behind a commit that filled a chunk, and at the end.
    assert root_document(path)["consolidated_metadata"]["metadata"]["update/size"]["shape"] == [1, MATRICES]
    assert as_zarr_consolidates(path)["consolidated_metadata"]["metadata"]["update/size"]["shape"] == [0, MATRICES]
    writer.close()
    assert root_document(path) == as_zarr_consolidates(path)
    writer = Writer(path, {})
    for step in range(2, CHUNK_STEPS + 1):
        writer.append("update", step, row(step))
    writer.flush()
    writer.flush()
    assert root_document(path) == as_zarr_consolidates(path)


def test_commit_is_sealed_and_says_which_chunks_there_are(tmp_path: Path) -> None:
    path = tmp_path / "run.zarr"
    writer = new_writer(path)
    writer.attributes["update"]["by number"] = {10: "a", 9: "b"}  # keys that JSON makes texts of, and sorts otherwise
    for step in range(1, 2 * CHUNK_STEPS + 2):
        values = row(step)
        if step > CHUNK_STEPS:
            del values["curve"]  # missing from the second chunk on
        writer.append("update", step, values)
    writer.flush()
    root = root_document(path)
    assert root["attributes"]["checksum"] == seal(root)
    chunks = {name: chunks_written(mask) for name, mask in root["attributes"]["chunks"].items()}
    assert chunks == {
        "scalars/step": [], "update/step": [0], "update/curve": [0], "update/size": [0, 1, 2], "update/flag": [0, 1, 2], "update/choice": [0, 1, 2],
    }  # fmt: skip
    for name, numbers in chunks.items():
        array = zarr.open_array(path / name, mode="r")
        files = {int(f.relative_to(path / name / "c").parts[0]) for f in (path / name / "c").rglob("*") if f.is_file()}
        assert files == set(numbers)
        assert array.metadata.codecs[-1].to_dict() == {"name": "crc32c"}  # type: ignore[union-attr]
    root["attributes"]["note"] = "changed"
    assert root["attributes"]["checksum"] != seal(root)


def test_flipped_bit_of_a_chunk_is_seen_by_any_reader(tmp_path: Path, read: Read) -> None:
    path = tmp_path / "run.zarr"
    writer = new_writer(path)
    writer.append("update", 1, row(1))
    writer.close()
    for chunk in ("update/size/c/0/0", "update/step/c/0", "update/name/c/0"):
        whole = (path / chunk).read_bytes()
        for position in (0, len(whole) // 2, len(whole) - 1):
            broken = bytearray(whole)
            broken[position] ^= 8
            (path / chunk).write_bytes(broken)
            with pytest.raises((ValueError, RuntimeError)):
                read(path)
        (path / chunk).write_bytes(whole)
    assert_holds(read(path), [1])


def test_chunks_beside_each_other_are_counted_row_by_row(tmp_path: Path, read: Read) -> None:
    """Matrices that were added lie in chunks of their own; of records before them, those have no file."""
    path = tmp_path / "run.zarr"
    writer = Writer(path, {})
    writer.create_group("update", {"name": np.array(["a", "b"], dtype=np.dtypes.StringDType())}, {})
    writer.create_array("update", "size", (2,), ("matrix",), "float64", {})
    for step in range(1, CHUNK_STEPS + 2):
        writer.append("update", step, {"size": np.array([1.0, 2.0])})
    writer.flush()
    writer.extend_group("update", {"name": np.array(["c"], dtype=np.dtypes.StringDType())})
    writer.append("update", 100, {"size": np.array([1.0, 2.0, 3.0])})
    writer.close()
    assert chunks_written(root_document(path)["attributes"]["chunks"]["update/size"]) == [0, 2, 3]
    assert sorted(f.relative_to(path).as_posix() for f in path.glob("update/size/c/*/*")) == [
        f"update/size/c/{i}" for i in ("0/0", "1/0", "1/1")
    ]
    update = read(path)["update"]
    assert update["name"].values.tolist() == ["a", "b", "c"]
    expected = np.full((CHUNK_STEPS + 2, 3), [1.0, 2.0, np.nan])
    expected[-1, 2] = 3
    np.testing.assert_array_equal(update["size"].values, expected)


# Torn flushes


class Killed(BaseException):
    """Ends a flush where it stands, as a kill would: no handler of the writer or of zarr for `Exception` runs."""


def break_at(k: int, error: BaseException, patch: pytest.MonkeyPatch) -> list[int]:
    """Make the k-th operation of a flush raise, counting every file's opening and its renaming into place."""
    count = [0]

    def counted(original: Callable[..., Any]) -> Callable[..., Any]:
        def operation(*args: Any, **kwargs: Any) -> Any:
            count[0] += 1
            if count[0] == k:
                raise error
            return original(*args, **kwargs)

        return operation

    patch.setattr(Path, "open", counted(Path.open))
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
    # Opened and renamed are a chunk each of three arrays and two each of the four that cross the boundary (11) and the root's document;
    # four of them are renamed again, when the new chunk's folder is there.
    assert operations == 2 * (11 + 1) + 4
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
        writer.close()
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
        after.close()
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

    monkeypatch.setattr(Files, "replace", looked_at(Files.replace))
    writer.flush()
    assert seen == [62] * (11 + 1)  # chunks, and the root's document
    assert read(tmp_path / "run.zarr")["update"].sizes["step"] == 66


def test_variable_left_uncommitted_by_a_killed_writer(tmp_path: Path, read: Read) -> None:
    """It is no part of the run, though its folder is there; and it can be made again."""
    path = tmp_path / "run.zarr"
    writer = started(path)
    writer.create_array("scalars", "orphan", (), (), "float64", {})
    writer.append("scalars", 3, {"orphan": 3.0})
    with pytest.MonkeyPatch.context() as patch:
        break_at(
            operations_of_a_flush(tmp_path) + 5, Killed(), patch
        )  # the root's renaming: the orphan's chunk is renamed twice, its document once
        with pytest.raises(Killed):
            writer.flush()
    assert list(path.glob(".*.partial"))
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
    leftovers = [path / ".0123456789abcdef.7.partial", path / "update" / "size" / "c" / "2" / "0", path / "update" / "size" / "c.0.0"]
    for leftover in leftovers:
        leftover.parent.mkdir(exist_ok=True)
        leftover.write_bytes(b"half a fi")
    Writer(path, {})
    assert not any(leftover.exists() for leftover in leftovers)
    assert_holds(read(path), list(range(1, 67)))


@pytest.mark.parametrize(
    "linked", ["update", "update/size", "update/size/c", "update/size/c/1", "update/size/c/0/0", "scalars", "lineages"]
)
def test_run_with_a_link_in_it_is_not_continued(linked: str, tmp_path: Path) -> None:
    """Chunks outside the run, which belong to no commit, would be removed or written over through it; the run's own path may be one."""
    started(tmp_path / "there.zarr").flush()
    (tmp_path / "there.zarr" / "lineages" / "5").mkdir(parents=True)
    path, outside = tmp_path / "run.zarr", tmp_path / "outside"
    path.symlink_to("there.zarr")
    (path / linked).rename(outside)
    (path / linked).symlink_to(outside)
    if outside.is_dir():
        for name in ("c.77", "77", "c/77", "size/c/77"):
            (outside / name).parent.mkdir(parents=True, exist_ok=True)
            (outside / name).write_bytes(b"precious")
    before = {file: file.read_bytes() for file in outside.rglob("*") if file.is_file()}
    with pytest.raises(ValueError, match=f"^store: {path}/{linked} is a link, behind which nothing of a run is written or removed"):
        Writer(path, {})
    assert {file: file.read_bytes() for file in outside.rglob("*") if file.is_file()} == before
    (path / linked).unlink()
    outside.rename(path / linked)
    Writer(path, {})


def test_run_that_never_committed_is_made_again(tmp_path: Path, read: Read, monkeypatch: pytest.MonkeyPatch) -> None:
    """Killed while it was laid out, at the root's first commit, or before its first file was in place."""
    path = tmp_path / "run.zarr"
    with monkeypatch.context() as patch:
        patch.setattr(Writer, "_commit", lambda *args: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            new_writer(path)
    assert (path / "update" / "name").is_dir()
    shutil.copytree(path, tmp_path / "bare.zarr")
    for child in (tmp_path / "bare.zarr").iterdir():
        if child.is_dir():
            shutil.rmtree(child)
    (tmp_path / "empty.zarr").mkdir()
    (tmp_path / "half.zarr").mkdir()
    (tmp_path / "half.zarr" / ".0123456789abcdef.0.partial").write_bytes(b"{")
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
