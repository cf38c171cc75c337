"""Fifty trainings killed at random moments: what a run has committed stays readable and right, and the next one goes on with it.

This file is also the program that is killed. One server imports everything and then forks a worker per training, which
costs a hundredth of a new interpreter. It computes nothing itself: threads do not survive a fork.
"""

import importlib
import json
import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch

import optiscope.hooks.journal as journal_module
from optiscope.hooks import attach

# Ten runs hit at any moment since the fork, most while they are made; two that are killed and continued twenty times.
KILLS_PER_RUN = (1,) * 10 + (20,) * 2
SEED = 0
STEPS = 500  # more than twenty workers reach
FLUSH_EVERY = 3

Read = Callable[[str | Path], Any]


# The program that is killed


def train(store: Path, reports: Path, until: int) -> None:
    """A deterministic training up to step `until`, recorded from where the run ends; every commit is noted in `reports`."""
    done = committed_records(store)
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Linear(6, 5), torch.nn.Tanh(), torch.nn.Linear(5, 7))
    optimizers = [torch.optim.Muon([model[0].weight], lr=0.02), torch.optim.AdamW([model[2].weight], lr=0.01)]
    generator = torch.Generator().manual_seed(1)

    def step() -> float:
        loss = model(torch.randn(4, 6, generator=generator)).square().mean()
        loss.backward()
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad()
        return loss.item()

    # What a checkpoint would restore is computed again.
    for _ in range(done or 0):
        step()
    file = os.open(reports, os.O_WRONLY | os.O_APPEND | os.O_CREAT)
    journal_module.FLUSH_SECONDS = 1e9  # only where told
    with attach(optimizers, model, store, every=1, on_error="raise") as recorder:
        assert recorder.step == (done or 0)
        while recorder.step < until:
            loss = step()
            recorder.log(loss=loss, **({"late": loss} if recorder.step > 40 else {}))
            if recorder.step % FLUSH_EVERY == 0:
                recorder.flush()
                os.write(file, b"%d\n" % recorder.step)


def committed_records(store: Path) -> int | None:
    """Read from the root's document, which needs no library; None before the first commit."""
    if not (store / "zarr.json").exists():
        return None
    consolidated = json.loads((store / "zarr.json").read_text()).get("consolidated_metadata")
    return consolidated and consolidated["metadata"]["update/step"]["shape"][0]


def serve() -> None:
    """Fork a worker for every line `store reports until` on stdin, print its id, and its exit status when it has ended."""
    importlib.import_module("torch._dynamo")  # torch would at an optimizer's first step: a second of each worker's life
    for line in sys.stdin:
        store, reports, until = json.loads(line)
        worker = os.fork()
        if worker == 0:
            status = 1
            try:
                train(Path(store), Path(reports), until)
                status = 0
            finally:
                os._exit(status)
        print(worker, flush=True)
        _, status = os.waitpid(worker, 0)
        print(os.waitstatus_to_exitcode(status), flush=True)


# The test


@contextmanager
def server() -> Iterator["subprocess.Popen[str]"]:
    threads = {"OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1"}
    command = [sys.executable, "-W", "error", __file__]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env={**os.environ, **threads}) as process:
        try:
            yield process
        finally:
            process.kill()


def start(process: "subprocess.Popen[str]", store: Path, reports: Path, until: int) -> int:
    assert process.stdin is not None
    assert process.stdout is not None
    process.stdin.write(json.dumps([str(store), str(reports), until]) + "\n")
    process.stdin.flush()
    return int(process.stdout.readline())


def ended(process: "subprocess.Popen[str]") -> int:
    assert process.stdout is not None
    return int(process.stdout.readline())


def test_kill(tmp_path: Path, read: Read) -> None:
    rng = random.Random(SEED)
    kills = before_first_commit = torn = records = 0
    with server() as process:
        start(process, tmp_path / "reference.zarr", tmp_path / "reference", STEPS)
        assert ended(process) == 0
        reference = read(tmp_path / "reference.zarr")
        assert reference["update"]["step"].values.tolist() == list(range(1, STEPS + 1))

        for number, kills_of_run in enumerate(KILLS_PER_RUN):
            store, reports = tmp_path / f"{number}.zarr", tmp_path / f"{number}"
            for _ in range(kills_of_run):
                seen = reported(reports)
                worker = start(process, store, reports, STEPS)
                if kills_of_run == 1:
                    time.sleep(rng.uniform(0, 0.4))
                else:
                    wait_until(lambda: reported(reports) > seen)  # noqa: B023
                    time.sleep(rng.uniform(0, 0.2))  # a step takes about 10 ms, a commit 60
                os.kill(worker, signal.SIGKILL)
                assert ended(process) == -signal.SIGKILL
                kills += 1
                if committed_records(store) is None:
                    assert not reported(reports)
                    before_first_commit += 1
                else:
                    torn += is_torn(store)
                    records = assert_holds(read(store), reference, reported(reports))

        # And a last one, left alone, ends like the run that was never disturbed.
        total = max(records + 20, 80)  # into the second chunk, however few steps a slow machine took between kills
        start(process, store, reports, total)
        assert ended(process) == 0
        assert assert_holds(read(store), reference, reported(reports)) == total
    assert kills == 50
    assert torn > 0  # seen: 37 of 48
    print(f"{before_first_commit} before the first commit, {torn} torn, {records} records")


def reported(reports: Path) -> int:
    """The last step whose commit was noted."""
    return max(map(int, reports.read_text().split()), default=0) if reports.exists() else 0


def wait_until(condition: Callable[[], bool], seconds: float = 60) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.005)


def is_torn(store: Path) -> bool:
    """Whether the kill left an array of another length than committed."""
    committed = json.loads((store / "zarr.json").read_text())["consolidated_metadata"]["metadata"]
    return any(json.loads((store / name / "zarr.json").read_text()).get("shape") != node.get("shape") for name, node in committed.items())


def assert_holds(run: Any, reference: Any, reported: int) -> int:
    """Every step up to the last commit reported, and perhaps the one after, each bitwise as in the reference; gives their number."""
    records = run["update"].sizes["step"]
    assert reported <= records <= reported + FLUSH_EVERY
    for group in ("geometry", "update", "second_moment"):
        assert run[group]["step"].values.tolist() == list(range(1, records + 1))
        for name, array in run[group].data_vars.items():
            expected = reference[group][name].values[:records]
            if name == "changed_outside":  # a worker has not seen how the one before it left the weights
                expected = np.where(array.values == -1, -1, expected).astype(expected.dtype)
            assert array.values.tobytes() == expected.tobytes(), (group, name)
    # Numbers logged at the step under way when a worker is killed are lost with it, and the next worker is past that step.
    steps = run["scalars"]["step"].values
    assert (np.diff(steps) > 0).all()
    for name in ("loss", "late"):
        if name in run["scalars"]:
            expected = reference["scalars"][name].values[steps - 1]
            assert run["scalars"][name].values.tobytes() == expected.tobytes(), name
    return records


if __name__ == "__main__":
    serve()
