"""A run that is being written says so: by whom, whether that process lives, and when it last committed."""

import json
import os
import platform
import subprocess
import sys
import time
from datetime import UTC, datetime, timedelta

import pytest
import torch

from optiscope.diagnostics.store.activity import activity
from optiscope.diagnostics.store.lock import OWNER, RunLock
from optiscope.hooks import attach

TRAINING = """
import sys, torch
from optiscope.hooks import attach
model = torch.nn.Linear(4, 3, bias=False)
optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
recorder = attach(optimizer, model, sys.argv[1], every=1)
print(flush=True)
for _ in sys.stdin:
    model(torch.ones(2, 4)).sum().backward()
    optimizer.step()
    recorder.flush()
    print(flush=True)
"""


@pytest.fixture
def training(tmp_path):
    """A training in another process: its run, the process, and a function that takes one more step and commits it."""
    path = tmp_path / "run.zarr"
    process = subprocess.Popen([sys.executable, "-c", TRAINING, str(path)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    process.stdout.readline()

    def step():
        process.stdin.write("step\n")
        process.stdin.flush()
        process.stdout.readline()

    yield path, process, step
    process.kill()
    process.communicate()


def test_commands_say_who_is_writing(training, diag, tmp_path, strict_json):
    path, process, step = training
    step()
    os.utime(path / "zarr.json", (time.time() - 12, time.time() - 12))
    said = f"being written by process {process.pid} on {platform.node()}, last commit "
    info, check = diag("info", path), diag("check", path)
    assert info.stdout.splitlines()[1].startswith(f"now: {said}")
    assert check.stdout.splitlines()[-1].startswith(f"now: {said}")
    assert check.stdout.splitlines()[-1].endswith(" s ago")
    assert check.exit_code in (0, 1)
    report = diag("report", path, "-o", tmp_path / "r.html")
    assert report.stdout.splitlines()[-1].startswith(f"run.zarr: {said}")
    for name, result in (("info", diag("info", path, "--json")), ("check", diag("check", path, "--json"))):
        told = strict_json(result.stdout)["activity"]
        assert (told["process"], told["host"], told["alive"]) == (process.pid, platform.node(), True), name
        assert 12 <= told["last_commit"] < 100
        assert told["words"].startswith(said)
    assert strict_json(diag("report", path, "-o", tmp_path / "r.html", "--json").stdout)["activity"]["run.zarr"]["alive"] is True


def test_a_run_whose_writer_was_killed_says_so_and_a_closed_one_nothing(training, diag, strict_json):
    path, process, step = training
    step()
    process.kill()
    process.wait()
    said = f"no longer being written: process {process.pid} on {platform.node()} ended without closing it, last commit "
    assert said in diag("info", path).stdout
    assert said in diag("check", path).stdout
    model = torch.nn.Linear(4, 3, bias=False)
    attach(torch.optim.SGD(model.parameters(), lr=0.1), model, path).close()
    for command in ("info", "check"):
        assert "now: " not in diag(command, path).stdout
        assert strict_json(diag(command, path, "--json").stdout)["activity"] is None


@pytest.mark.parametrize("options", [[], ["--json"]])
def test_a_run_without_a_record_yet(training, diag, tmp_path, options):
    path, process, _ = training
    for command in (["check"], ["report", "-o", tmp_path / "r.html"]):
        result = diag(command[0], path, *command[1:], *options)
        name = path if command[0] == "check" else "run.zarr"
        assert (result.exit_code, result.stdout) == (2, "")
        assert result.stderr == (
            f"diag: run: no record is committed yet; {name} is being written by process {process.pid} on {platform.node()}\n"
        )


def own(folder, **entries):
    began = {"host": platform.node(), "process": os.getpid(), "since": datetime.now(UTC).isoformat(timespec="seconds")}
    (folder / OWNER).write_text(json.dumps({**began, **entries}))
    return activity(folder)


def test_what_can_be_told_of_a_writer(tmp_path):
    assert activity(tmp_path) is None
    (tmp_path / "zarr.json").touch()
    assert own(tmp_path).alive is True
    # Another process has the number of one that began long before it.
    long_ago = (datetime.now(UTC) - timedelta(days=400)).isoformat(timespec="seconds")
    assert own(tmp_path, since=long_ago).alive is (sys.platform != "linux")
    assert own(tmp_path, since="yesterday").alive is True
    ended = subprocess.Popen([sys.executable, "-c", ""])
    ended.wait()
    assert own(tmp_path, process=ended.pid).alive is False
    assert own(tmp_path, process=2**80).alive is False
    elsewhere = own(tmp_path, host="elsewhere", process=7)
    assert (elsewhere.alive, elsewhere.process) == (None, 7)
    assert str(elsewhere).startswith(
        "being written by process 7 on elsewhere, another machine (whether it still runs cannot be seen from here)"
    )
    for text in ("", "[]", '{"process": "many"}', '{"process": 1e999, "host": "a", "since": "b"}'):
        (tmp_path / OWNER).write_text(text)
        assert activity(tmp_path) is None


@pytest.mark.parametrize(
    ("seconds", "said"), [(0, "0 s"), (12, "12 s"), (100, "100 s"), (130, "2 min"), (7200, "2 h"), (86400 * 3, "3 d"), (-500, "0 s")]
)
def test_the_last_commit_is_told_in_a_fitting_unit(tmp_path, seconds, said):
    document = tmp_path / "zarr.json"
    document.touch()
    at = time.time() - seconds
    os.utime(document, (at, at))
    assert str(own(tmp_path)).endswith(f", last commit {said} ago")


def test_looking_takes_nothing(tmp_path):
    """A training that begins while somebody looks is not refused."""
    with_lock = RunLock(tmp_path)
    (tmp_path / "zarr.json").touch()
    before = {path.name: path.stat().st_mtime_ns for path in tmp_path.iterdir()}
    assert activity(tmp_path).alive
    assert {path.name: path.stat().st_mtime_ns for path in tmp_path.iterdir()} == before
    with_lock.release()
    assert activity(tmp_path) is None
