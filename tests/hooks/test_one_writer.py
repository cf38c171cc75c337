"""One recorder writes to a run: `attach` refuses while another process does, and whoever ends lets the next one in."""

import fcntl
import gc
import json
import os
import shutil
import subprocess
import sys
import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn
from torch.optim import SGD, AdamW, Optimizer

from optiscope.diagnostics.store.lock import OWNER, RunLock
from optiscope.diagnostics.store.writer import Writer
from optiscope.hooks import attach

Read = Callable[[str | Path], Any]
Two = tuple[nn.Module, Optimizer, Optimizer]

HOLDER = """
import sys
from pathlib import Path
from optiscope.diagnostics.store.lock import RunLock
lock = RunLock(Path(sys.argv[1]))
print(flush=True)
sys.stdin.readline()
"""


def test_attach_is_refused_while_another_process_writes(two: Two, tmp_path: Path, read: Read, caplog: pytest.LogCaptureFixture) -> None:
    model, d, _ = two
    run = tmp_path / "run.zarr"
    with attach(d, model, run, every=1):
        d.step()
        assert (run / OWNER).exists()
        assert read(run).children  # the lock's files are no part of the run for a reader
    files = {path: path.read_bytes() for path in run.rglob("*") if path.is_file()}
    command = [sys.executable, "-c", HOLDER, str(run)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        process.stdout.readline()
        with pytest.raises(
            ValueError, match=f"^store: {run} is being written by process {process.pid} on .* since .*; close that recorder, "
        ):
            attach(d, model, run, every=1)
        assert not d._optimizer_step_pre_hooks
        assert {path: path.read_bytes() for path in run.rglob("*") if path.is_file() and path.name != OWNER} == files
        process.kill()
        process.wait()
    with caplog.at_level("INFO", "optiscope"), attach(d, model, run, every=1):
        d.step()
    assert f"was being written by process {process.pid} on" in caplog.text
    assert read(run)["update"]["step"].values.tolist() == [1, 2]


def test_whoever_ends_lets_the_next_one_in(two: Two, tmp_path: Path) -> None:
    """Closed, taken over, or never begun."""
    model, d, g = two
    run = tmp_path / "run.zarr"

    def is_free() -> bool:
        try:
            RunLock(run).release()
        except ValueError:
            return False
        return True

    recorder = attach(d, model, run, every=1)
    d.step()
    assert not is_free()
    recorder.close()
    assert is_free()
    recorder = attach(d, model, run, every=1)
    assert not is_free()
    Writer(run, {}).flush()  # as where there are no locks
    d.step()
    recorder.flush()
    assert is_free()
    with pytest.raises(ValueError, match="holds a run of other matrices"):
        attach(g, model, run, every=1)
    assert is_free()


def test_a_lock_is_left_in_nobodys_folder(two: Two, tmp_path: Path) -> None:
    model, d, _ = two
    (tmp_path / "precious").touch()
    with pytest.raises(ValueError, match="exists and is not an Optiscope run"):
        attach(d, model, tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["precious"]


def test_a_file_system_without_locks_is_told_of(
    two: Two, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def flock(*args: object) -> None:
        raise OSError(38, os.strerror(38))

    monkeypatch.setattr(fcntl, "flock", flock)
    model, d, _ = two
    with attach(d, model, tmp_path / "run.zarr", every=1):
        d.step()
    [message] = [record.getMessage() for record in caplog.records]
    assert "has no locks (Function not implemented), so that a second recorder of the same run would not be refused" in message


@pytest.mark.parametrize(
    ("schema", "versions", "message"),
    [
        (7, {"optiscope": "0.9.0"}, r"was written by optiscope 0\.9\.0 with schema 7; this version reads up to \d+: install optiscope>=0\.9\.0, or"),
        (7, {}, r"was written by a newer optiscope with schema 7; this version reads up to \d+: install a newer one, or"),
        (7, {"optiscope": "1; rm -rf /"}, r"was written by a newer optiscope with schema 7; "),
        *((schema, {}, "exists and is not an Optiscope run; choose another path") for schema in (None, 0, -1, True, 1.0, "1", [1])),
    ],
)  # fmt: skip
def test_a_schema_that_is_not_known(schema: Any, versions: Any, message: str, two: Two, tmp_path: Path) -> None:
    model, d, _ = two
    run = tmp_path / "run.zarr"
    run.mkdir()
    text = json.dumps({"zarr_format": 3, "node_type": "group", "attributes": {"optiscope_schema": schema, "versions": versions}})
    (run / "zarr.json").write_text(text)
    with pytest.raises(ValueError, match=f"^store: {run} {message}"):
        attach(d, model, run)
    assert [(path.name, path.read_text()) for path in run.iterdir()] == [("zarr.json", text)]


# A second recorder of the same process.

NAMES = ("d", "g")


def cell(run: Path, *names: str, width: int = 4, make: Any = SGD, **options: Any) -> tuple[Any, Optimizer, nn.Module]:
    """What a notebook's cell does: a model, an optimizer of each of its layers named, a recorder of them."""
    torch.manual_seed(0)
    model = nn.ModuleDict({"d": nn.Linear(width, 3, bias=False), "g": nn.Linear(3, 5, bias=False)})
    for p in model.parameters():
        p.grad = torch.ones_like(p)
    optimizer = make([p for name in names or NAMES for p in model[name].parameters()], lr=0.1)
    return attach(optimizer, model, run, every=1, on_error="raise", **options), optimizer, model


def test_a_cell_that_is_run_again_goes_on_with_the_run(tmp_path: Path, read: Read, caplog: pytest.LogCaptureFixture) -> None:
    run = tmp_path / "run.zarr"
    first, optimizer, model = cell(run)
    optimizer.step()
    optimizer.step()
    gone = weakref.ref(model["d"].weight)
    second, again, _ = cell(run)
    closed, *_ = [record.getMessage() for record in caplog.records]
    assert closed.startswith(f"optiscope: the recorder of SGD that was still open on {run}, at step 2, is closed: ")
    assert not optimizer._optimizer_step_pre_hooks
    del model, optimizer
    gc.collect()
    assert gone() is None  # the first recorder keeps nothing of the first try
    again.step()
    second.close()
    first.close()
    tree = read(run)
    assert tree["update"]["step"].values.tolist() == [1, 2, 3]
    assert [session["first_step"] for session in tree.attrs["continued"]] == [2]


@pytest.mark.parametrize(("before", "after"), [(("d",), NAMES), (NAMES, ("d",))], ids=["more", "fewer"])
def test_a_cell_that_was_edited_and_run_again(tmp_path: Path, read: Read, before: Any, after: Any) -> None:
    _, optimizer, _ = cell(tmp_path / "run.zarr", *before)
    optimizer.step()
    recorder, optimizer, _ = cell(tmp_path / "run.zarr", *after)
    optimizer.step()
    recorder.close()
    assert read(tmp_path / "run.zarr")["update"]["step"].values.tolist() == [1, 2]


REFUSED = "is being recorded by a recorder that is still open and watches SGD; pass all optimizers to one attach, "


SECONDS: dict[str, Callable[[Path, Any, Any], object]] = {
    "the same": lambda run, optimizer, model: attach(optimizer, model, run),
    "one more of the same model": lambda run, optimizer, model: attach(AdamW(model["g"].parameters()), model, run),
    "another of the same parameters": lambda run, optimizer, model: attach(SGD(model["d"].parameters(), lr=0.1), model, run),
    "of other matrices": lambda run, optimizer, model: cell(run, "g"),
    "of another kind": lambda run, optimizer, model: cell(run, "d", make=AdamW),
    "of a wider model": lambda run, optimizer, model: cell(run, "d", width=6),
}


@pytest.mark.parametrize("second", SECONDS)
def test_a_second_recorder_of_a_run_is_refused_and_the_first_goes_on(tmp_path: Path, read: Read, second: str) -> None:
    run = tmp_path / "run.zarr"
    first, optimizer, model = cell(run, "d")
    optimizer.step()
    with pytest.raises(ValueError, match=f"^store: {run} {REFUSED}"):
        SECONDS[second](run, optimizer, model)
    optimizer.step()
    first.log(loss=1.0)
    first.flush()
    optimizer.step()
    first.close()
    tree = read(run)
    assert tree["update"]["step"].values.tolist() == [1, 2, 3]
    assert tree["scalars"]["loss"].values[1] == 1.0
    assert "continued" not in tree.attrs
    cell(run, "d")[0].close()  # and once it is closed, another takes its place


def test_what_attach_refuses_closes_nothing(tmp_path: Path, read: Read) -> None:
    run = tmp_path / "run.zarr"
    first, optimizer, _ = cell(run)
    for wrong in ({"measure": ["spectra"]}, {"first_step": -1}, {"about": {"a": None}}):
        with pytest.raises((ValueError, TypeError), match=f"^{next(iter(wrong))}: "):
            cell(run, **wrong)
    optimizer.step()
    first.close()
    assert read(run)["update"]["step"].values.tolist() == [1]


@pytest.mark.parametrize("locks", [True, False], ids=["locks", "no locks"])
@pytest.mark.parametrize("late", ["log", "flush"])
def test_a_closed_recorder_writes_nothing_into_anothers_run(
    tmp_path: Path, read: Read, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch, late: str, locks: bool
) -> None:
    """Not even before the other has committed anything of its own."""

    def flock(*args: object) -> None:
        raise OSError(38, os.strerror(38))

    if not locks:
        monkeypatch.setattr(fcntl, "flock", flock)
    run = tmp_path / "run.zarr"
    first, optimizer, model = cell(run)
    optimizer.step()
    first.close()
    first.log(loss=3.0)  # nobody else writes: it is there
    second = attach(optimizer, model, run, every=1, on_error="raise")
    document = (run / "zarr.json").read_bytes()
    first.session.journal.raise_errors = False
    caplog.clear()
    first.log(loss=4.0) if late == "log" else first.flush()
    assert [record.getMessage() for record in caplog.records] == [
        f"optiscope: {run} is now written by another recorder; this one has detached, and what it had not committed is lost."
    ]
    assert (run / "zarr.json").read_bytes() == document
    optimizer.step()
    second.close()
    first.log(loss=5.0)
    tree = read(run)
    assert tree["update"]["step"].values.tolist() == [1, 2]
    assert tree["scalars"]["loss"].values[0] == 3.0
    assert not np.isin([4.0, 5.0], tree["scalars"]["loss"].values).any()
    assert first.session.journal.errors == 0


def test_what_comes_late_makes_no_folder_anew(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    run = tmp_path / "run.zarr"
    recorder, optimizer, _ = cell(run)
    optimizer.step()
    recorder.close()
    recorder.session.journal.raise_errors = False
    shutil.rmtree(run)
    recorder.log(loss=1.0)
    assert not run.exists()
    assert "could not be written" in caplog.text
