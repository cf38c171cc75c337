"""A long run is laid out for reading when it is closed, and for writing when it is continued; whatever cuts that off, it stays whole."""

import shutil
import signal
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import zarr
from torch import nn

from optiscope.diagnostics.store import codecs, laying_out
from optiscope.diagnostics.store.compacting import compact
from optiscope.diagnostics.store.files import Files
from optiscope.diagnostics.store.format import chunks_written
from optiscope.diagnostics.store.lock import OWNER, RunLock
from optiscope.diagnostics.store.run_error import RunError
from optiscope.diagnostics.store.verifying import verify
from optiscope.diagnostics.store.writer import CHUNK_STEPS, Writer
from optiscope.hooks import attach

Read = Callable[[str | Path], Any]

MATRICES = 11  # two inner chunks of eight, the second not full
RECORDS = 1024 + 70
ARRAYS: dict[str, tuple[tuple[int, ...], str]] = {
    "size": ((MATRICES,), "float64"), "curve": ((MATRICES, 3), "float32"), "flag": ((MATRICES,), "bool"), "never": ((MATRICES,), "float64"),
}  # fmt: skip


_rng = np.random.default_rng(0)
VALUES: dict[str, Any] = {
    "size": _rng.normal(size=(RECORDS + 9, MATRICES)), "curve": _rng.normal(size=(RECORDS + 9, MATRICES, 3)).astype("float32"),
    "flag": _rng.random((RECORDS + 9, MATRICES)) < 0.5, "never": np.full((RECORDS + 9, MATRICES), np.nan),
}  # fmt: skip


def append(writer: Writer, first: int, last: int) -> None:
    for step in range(first, last + 1):
        if writer.append("update", step, {name: values[step - 1] for name, values in VALUES.items()}):
            writer.flush()


def long_run(path: Path) -> Writer:
    writer = Writer(path, {})
    writer.create_group("update", {"name": np.array([f"m{i}" for i in range(MATRICES)], dtype=np.dtypes.StringDType())}, {})
    for name, (shape, dtype) in ARRAYS.items():
        dimensions = ("matrix", "ns_step")[: len(shape)]
        writer.create_array("update", name, shape, dimensions, dtype, {"units": "1"}, False if dtype == "bool" else np.nan)
    append(writer, 1, RECORDS)
    writer.close()
    return writer


def assert_holds(run: Any, records: int) -> None:
    assert run["update"]["step"].values.tolist() == list(range(1, records + 1))
    for name, expected in VALUES.items():
        assert run["update"][name].dtype == expected.dtype
        np.testing.assert_array_equal(run["update"][name].values, expected[:records])


def files(path: Path) -> set[str]:
    return {f.relative_to(path).as_posix() for f in path.rglob("*") if f.is_file()}


def root(path: Path) -> Any:
    return zarr.open_group(path, mode="r").metadata.to_dict()


def test_compacted_and_expanded(tmp_path: Path, read: Read) -> None:
    path = tmp_path / "run.zarr"
    writer = long_run(path)
    before = files(path)
    assert f"update/size/c/{RECORDS // CHUNK_STEPS}/0" in before
    writer.lay_out_for_reading()
    assert_holds(read(path), RECORDS)
    assert {f for f in files(path) if f.startswith(("update/size/", "update/curve/", "update/never/"))} == {
        "update/size/zarr.json", "update/size/c.0.0", "update/size/c.1.0",
        "update/curve/zarr.json", "update/curve/c.0.0.0", "update/curve/c.1.0.0", "update/never/zarr.json",
    }  # fmt: skip
    array = zarr.open_array(path / "update" / "curve", mode="r")
    assert (array.shards, array.chunks) == ((1024, 16, 3), (1024, 8, 3))
    attributes = root(path)["attributes"]
    assert {name: chunks_written(mask) for name, mask in attributes["chunks"].items()} == {
        "update/step": [0, 1], "update/size": [0, 1], "update/curve": [0, 1], "update/flag": [0, 1], "update/never": [],
    }  # fmt: skip
    compacted = files(path)
    writer.lay_out_for_reading()  # again: nothing to do
    assert files(path) == compacted

    writer = Writer(path, {})
    assert_holds(read(path), RECORDS)
    assert files(path) == before
    append(writer, RECORDS + 1, RECORDS + 3)
    writer.close()
    assert_holds(read(path), RECORDS + 3)
    writer.lay_out_for_reading()
    assert_holds(read(path), RECORDS + 3)
    # And one that comes after that, by the same writer.
    append(writer, RECORDS + 4, RECORDS + 4)
    writer.close()
    assert_holds(read(path), RECORDS + 4)


def test_records_that_wait_are_written_first(tmp_path: Path, read: Read) -> None:
    path = tmp_path / "run.zarr"
    writer = long_run(path)
    append(writer, RECORDS + 1, RECORDS + 2)
    writer.lay_out_for_reading()
    assert_holds(read(path), RECORDS + 2)
    append(writer, RECORDS + 3, RECORDS + 3)
    writer.close()
    assert_holds(read(path), RECORDS + 3)


def test_every_bit_of_a_shard_counts(tmp_path: Path, read: Read) -> None:
    path = tmp_path / "run.zarr"
    long_run(path).lay_out_for_reading()
    shard = path / "update" / "size" / "c.1.0"
    whole = shard.read_bytes()
    for position in range(0, len(whole), len(whole) // 9):
        shard.write_bytes(whole[:position] + bytes([whole[position] ^ 1]) + whole[position + 1 :])
        with pytest.raises((ValueError, RuntimeError)):
            read(path)


class Killed(BaseException):
    """No handler for `Exception` runs."""


def broken_at(limit: int, patch: pytest.MonkeyPatch, error: BaseException) -> list[int]:
    """Make the writer's operations from a number on fail: files put into place, and removed."""
    count = [0]

    def counted(original: Callable[..., None]) -> Callable[..., None]:
        def operation(*args: Any) -> None:
            count[0] += 1
            if 0 <= limit < count[0]:
                raise error
            original(*args)

        return operation

    patch.setattr(Files, "replace", counted(Files.replace))
    patch.setattr(Files, "remove", counted(Files.remove))
    return count


@pytest.mark.parametrize("at_once", [0, 2**26])
@pytest.mark.parametrize("compacting", [True, False])
def test_cut_off_anywhere(compacting: bool, at_once: int, tmp_path: Path, read: Read, monkeypatch: pytest.MonkeyPatch) -> None:
    """A commit for each array, or one for all."""
    monkeypatch.setattr("optiscope.diagnostics.store.writer.AT_ONCE", at_once)
    path, copy = tmp_path / "run.zarr", tmp_path / "copy.zarr"
    writer = long_run(path)
    plain = files(path)
    if not compacting:
        writer.lay_out_for_reading()
    limit = 0
    while True:
        shutil.copytree(path, copy)
        with pytest.MonkeyPatch.context() as patch:
            change = Writer(copy, {}).lay_out_for_reading if compacting else lambda: Writer(copy, {})
            count = broken_at(limit, patch, Killed())
            with suppress(Killed):
                change()
        if limit % 3 == 0:
            assert_holds(read(copy), RECORDS)
        assert not verify(copy).damage
        Writer(copy, {}).close()
        assert_holds(read(copy), RECORDS)
        assert files(copy) == plain
        shutil.rmtree(copy)
        if count[0] <= limit:
            break
        limit += 2 if compacting else 9
    # Shards, or chunks; for each of four arrays its own document, and the removal of what was there; and the root's document.
    assert limit >= (3 * 2 if compacting else 3 * 18) + 2 * 4 + (1 if at_once else 4)


def test_a_full_disk_leaves_it_as_it_is_and_says_so(
    tmp_path: Path, read: Read, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(laying_out, "SHARD_STEPS", 4)
    monkeypatch.setattr("optiscope.diagnostics.store.writer.SHARD_STEPS", 4)

    replace, copies = Files.replace, 0

    def full(self: Files, path: str, content: Any) -> None:
        """There is room for a few copies."""
        nonlocal copies
        copies += "/c." in path
        if copies > 3:
            raise OSError(28, "No space left on device")
        replace(self, path, content)

    def train(store: Path, fails: bool, error: BaseException | None = None) -> None:
        model = nn.Linear(3, 2, bias=False)
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        model.weight.grad = torch.ones(2, 3)
        with attach(optimizer, model, store, every=1, measure=["update"]):
            for _ in range(5):
                optimizer.step()
            if fails:
                monkeypatch.setattr(Files, "replace", full)
            if error is not None:
                raise error

    train(tmp_path / "closed.zarr", fails=False)
    with pytest.raises(SystemExit):
        train(tmp_path / "ended.zarr", fails=False, error=SystemExit(0))
    assert not caplog.records
    train(tmp_path / "full.zarr", fails=True)
    [message] = [record.getMessage() for record in caplog.records]
    assert "could not be laid out for reading (OSError: [Errno 28] No space left on device). It is whole, and read more slowly." in message
    for name, compacted in (("closed", True), ("ended", False), ("full", False)):
        run = tmp_path / f"{name}.zarr"
        assert ((run / "update" / "lr" / "c.0.0").exists(), (run / "update" / "lr" / "c").exists()) == (compacted, not compacted)
        assert compacted or not list(run.rglob("c.*"))  # nor does what could not be copied whole take room
        update = read(run)["update"]
        assert update["step"].values.tolist() == [1, 2, 3, 4, 5]
        assert update["update_norm"].values == pytest.approx(np.full((5, 1), 0.1 * 6**0.5), rel=1e-6)


def test_damage_is_not_made_good_by_compacting(tmp_path: Path) -> None:
    """A chunk that has gone would read as missing values; the run then stays as it is, for `diag verify` to tell."""
    path = tmp_path / "run.zarr"
    writer = long_run(path)
    (path / "update" / "size" / "c" / "3" / "0").unlink()
    with pytest.raises(
        ValueError, match=r"^store: .*run\.zarr: update/size/c/3/0: expected a file, got none; `diag verify --repair .*run\.zarr` saves "
    ):
        writer.lay_out_for_reading()
    root_document = root(path)
    assert chunks_written(root_document["attributes"]["chunks"]["update/size"]) == list(range(RECORDS // CHUNK_STEPS + 1))
    assert (path / "update" / "size" / "c").exists()


@pytest.mark.parametrize("at_once", [0, 2**26])
def test_a_close_that_is_interrupted_leaves_a_whole_run_and_the_rest_is_done_later(
    at_once: int, tmp_path: Path, read: Read, monkeypatch: pytest.MonkeyPatch
) -> None:
    """By Ctrl-C, amid a chunk: at the first, in the middle, near the end. `diag verify --compact` does the rest, and so does the next close."""
    monkeypatch.setattr("optiscope.diagnostics.store.writer.AT_ONCE", at_once)

    def train(store: Path, steps: int, interrupted_at: float = np.inf) -> int:
        """How many chunks were made of others when it was closed."""
        torch.manual_seed(0)
        model = nn.Linear(3, 2, bias=False)
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        model.weight.grad = torch.ones(2, 3)
        recorder = attach(optimizer, model, store, every=1, measure=["update"], on_error="raise")
        for _ in range(steps):
            optimizer.step()
        recorder.flush()
        with monkeypatch.context() as patch:
            chunks, make = [0], codecs.encode

            def encode(values: Any) -> bytes:
                chunks[0] += 1
                if chunks[0] == interrupted_at:
                    signal.raise_signal(signal.SIGINT)
                return make(values)

            patch.setattr(codecs, "encode", encode)  # what shards are made of
            try:
                recorder.close()
            except KeyboardInterrupt:
                assert chunks[0] == interrupted_at
                recorder.close(compact=False)  # as the interpreter's end does
        assert not (store / OWNER).exists()  # and others may write
        return chunks[0]

    total = train(tmp_path / "whole.zarr", 1100)
    assert total >= 20
    whole = read(tmp_path / "whole.zarr")["update"]
    for at in (1, total // 2, total - 1):
        path = tmp_path / f"{at}.zarr"
        train(path, 1100, at)
        shutil.copytree(path, tmp_path / f"{at}-continued.zarr")
        assert verify(path).harmless.keys() <= {"half-written file", "chunk after the last commit"}
        for then in (lambda: None, lambda: compact(path)):  # noqa: B023
            assert then() != 0
            assert not verify(path).damage
            assert_equal(read(path)["update"], whole)
        assert files(path) == files(tmp_path / "whole.zarr")
        assert not verify(path).harmless
        assert compact(path) == 0
        train(tmp_path / f"{at}-continued.zarr", 1)
        assert files(tmp_path / f"{at}-continued.zarr") == files(tmp_path / "whole.zarr")
        assert read(tmp_path / f"{at}-continued.zarr")["update"].sizes["step"] == 1101


def assert_equal(found: Any, expected: Any) -> None:
    for name in ("step", "update_norm", "weight_rms", "lr", "update_noise"):
        np.testing.assert_array_equal(found[name].values, expected[name].values)


def test_what_is_no_run_or_is_being_written_is_not_compacted(tmp_path: Path) -> None:
    assert compact(tmp_path / "none") == 0
    assert not (tmp_path / "none").exists()
    (tmp_path / "notes.txt").write_text("mine")
    with pytest.raises(RunError, match="is not an Optiscope run"):
        compact(tmp_path)
    assert [file.name for file in tmp_path.iterdir()] == ["notes.txt"]
    long_run(tmp_path / "run.zarr")
    lock = RunLock(tmp_path / "run.zarr")
    before = files(tmp_path / "run.zarr")
    with pytest.raises(RunError, match="is being written by process"):
        compact(tmp_path / "run.zarr")
    assert files(tmp_path / "run.zarr") == before
    lock.release()
    assert compact(tmp_path / "run.zarr") == 4


@pytest.mark.parametrize("place", ["through a link", "relative"])
def test_a_long_run_at_a_path_that_is_not_the_real_one(place: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Closed, compacted by `diag verify --compact` and continued, whatever way leads to it."""
    (tmp_path / "real").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "real")
    monkeypatch.chdir(tmp_path / "real")
    run = tmp_path / "link" / "run.zarr" if place == "through a link" else Path("run.zarr")
    writer = long_run(run)
    writer.close()
    assert compact(run) > 0
    append(Writer(run, {}), RECORDS + 1, RECORDS + 2)
    assert not verify(run).damage
