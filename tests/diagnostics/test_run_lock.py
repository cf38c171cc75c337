"""One process writes to a run: others are told who it is, and nothing that becomes of it keeps them from writing after its end."""

import fcntl
import json
import os
import platform
import re
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import UTC, datetime
from pathlib import Path

import pytest

from optiscope.diagnostics.store.lock import LOCK, OWNER, RunLock, owner

# Takes the lock; then forks a child that ends at once by the interpreter's way, and one that outlives it.
HOLDER = """
import os, sys, time
from pathlib import Path
from optiscope.diagnostics.store.lock import RunLock
lock = RunLock(Path(sys.argv[1]))
if os.fork() == 0:
    lock.release()
    sys.exit()
os.wait()
if os.fork() == 0:
    print(os.getpid(), flush=True)  # said by the child itself: its copy of the lock is closed by then
    sys.stdin.close()
    time.sleep(600)
sys.stdin.readline()
lock.release()
print("released", flush=True)
sys.stdin.readline()
"""


@contextmanager
def holder(folder: Path) -> Iterator[tuple["subprocess.Popen[str]", int]]:
    """Another process that holds the lock, and the id of its child."""
    command = [sys.executable, "-W", "error", "-c", HOLDER, str(folder)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        child = int(process.stdout.readline())
        try:
            yield process, child
        finally:
            os.kill(child, signal.SIGKILL)
            process.kill()


def test_a_second_writer_is_told_who_the_first_is_until_that_one_is_killed(tmp_path: Path) -> None:
    run, before = tmp_path / "a" / "run.zarr", datetime.now(UTC).replace(microsecond=0)
    with holder(run) as (process, child):
        for _ in range(2):  # to be refused changes nothing
            with pytest.raises(ValueError, match=r"^store: ") as refused:
                RunLock(run)
        said = re.fullmatch(
            rf"store: {run} is being written by process (\d+) on (.+) since (\S+); close that recorder, or record to another path",
            str(refused.value),
        )
        assert said is not None
        assert (int(said[1]), said[2]) == (process.pid, platform.node())
        assert before <= datetime.fromisoformat(said[3]) <= datetime.now(UTC)
        # No handler of it runs, and its child, which has a copy of everything it had open, lives on.
        process.kill()
        process.wait()
        os.kill(child, 0)
        lock = RunLock(run)
        assert lock.former == f"process {process.pid} on {platform.node()} since {said[3]}"
    assert json.loads((run / OWNER).read_text())["process"] == os.getpid()
    lock.release()
    lock.release()
    assert sorted(path.name for path in run.iterdir()) == [LOCK]


def test_what_was_released_is_free_while_its_owner_lives(tmp_path: Path) -> None:
    with holder(tmp_path) as (process, _):
        assert process.stdin is not None
        assert process.stdout is not None
        process.stdin.write("\n")
        process.stdin.flush()
        assert process.stdout.readline() == "released\n"
        lock = RunLock(tmp_path)
        assert lock.former is None
        with pytest.raises(ValueError, match=f"is being written by process {os.getpid()} on "):
            RunLock(tmp_path)
        lock.release()


def test_particulars_that_are_none(tmp_path: Path) -> None:
    """Of an owner that was killed while it wrote them, or by a stranger's hand."""
    lock = RunLock(tmp_path)
    for text in ("", "{", "[]", '{"process": "x"}', "[" * 5000, '{"process": 1, "host": "h"}'):
        (tmp_path / OWNER).write_text(text)
        assert owner(tmp_path) is None
        with pytest.raises(ValueError, match="is being written by another process; "):
            RunLock(tmp_path)
    lock.release()
    # Nor does a link lead the writing of them out of the folder.
    (tmp_path / "precious").write_text("precious")
    (tmp_path / OWNER).symlink_to(tmp_path / "precious")
    (tmp_path / f"{OWNER}.partial").symlink_to(tmp_path / "precious")
    RunLock(tmp_path).release()
    assert (tmp_path / "precious").read_text() == "precious"


def test_a_folder_that_cannot_be_written_to(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(OSError, match="file"):
        RunLock(tmp_path / "file" / "run.zarr")
    (tmp_path / f"{OWNER}.partial").mkdir()  # the particulars cannot be written
    with pytest.raises(OSError, match=r"\.owner\.json\.partial"):
        RunLock(tmp_path)
    (tmp_path / f"{OWNER}.partial").rmdir()
    RunLock(tmp_path).release()


@pytest.mark.parametrize("number", [38, 95, 37])  # ENOSYS, EOPNOTSUPP, ENOLCK
def test_a_file_system_without_locks(number: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def flock(*args: object) -> None:
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(fcntl, "flock", flock)
    first, second = RunLock(tmp_path), RunLock(tmp_path)
    assert first.unlocked == second.unlocked == os.strerror(number)
    first.release()
    second.release()
    assert not (tmp_path / OWNER).exists()
