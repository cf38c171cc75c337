"""One recorder writes to a run: `attach` refuses while another process does, and whoever ends lets the next one in."""

import fcntl
import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from torch import nn
from torch.optim import Optimizer

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
    """Closed, replaced within the process, taken over, or never begun."""
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
    attach(d, model, run, every=1)
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
