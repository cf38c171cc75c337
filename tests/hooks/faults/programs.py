"""Programs that end in every way a training can: `python -m faults.programs` forks one per line on its stdin.

Everything is imported once, before; a program then costs a hundredth of a new interpreter. The server computes nothing itself: threads do
not survive a fork. A program runs to the end of its interpreter, as a script of its own would.
"""

import importlib
import json
import multiprocessing
import os
import pickle
import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from typing import Any, NoReturn

import numpy as np
import torch
import zarr
from torch.utils.data import DataLoader

import optiscope.hooks.recording.journal as journal_module
from faults.training import Training
from optiscope.hooks import attach

FOREVER = 10**9


# The programs


def recorded(store: Path, **options: Any) -> Training:
    """A training with a recorder that nobody closes."""
    training = Training()
    training.waits = options.get("background", False)
    training.recorder = attach(training.optimizers, training.model, store, every=1, **options)
    return training


def say(word: str) -> None:
    """To the one who started this program."""
    os.write(3, f"{word}\n".encode())


def left_open(store: Path, **options: Any) -> None:
    recorded(store, **options).go(12)


def ends_by_an_exception(store: Path, **options: Any) -> None:
    recorded(store, **options).go(12)
    raise ValueError("the training's own")


def exits_in_a_thread(store: Path, **options: Any) -> None:
    """The training runs, and calls `sys.exit`, in a thread beside the main one."""

    def train() -> NoReturn:
        recorded(store, **options).go(12)
        sys.exit(5)

    thread = threading.Thread(target=train)
    thread.start()
    thread.join()


def ends_at_once(store: Path, **options: Any) -> None:
    """Nothing of the interpreter's end runs."""
    training = recorded(store, **options)
    training.go(7)
    training.flush()
    training.go(2)
    os._exit(0)


def goes_on(store: Path, **options: Any) -> None:
    """Until somebody ends it."""
    training = recorded(store, **options)
    training.go(7)
    training.flush()
    say("flushed")
    training.go(FOREVER)


def handles_sigterm(store: Path, **options: Any) -> None:
    """By a clean exit, as many scripts do."""

    def handler(number: int, frame: FrameType | None) -> NoReturn:
        raise SystemExit(7)

    signal.signal(signal.SIGTERM, handler)
    goes_on(store, **options)


class SignalException(Exception):
    """As torch's elastic launcher raises it: no BaseException."""


def is_launched(store: Path, **options: Any) -> None:
    """By a launcher that turns SIGTERM into an exception."""

    def handler(number: int, frame: FrameType | None) -> NoReturn:
        raise SignalException(number)

    signal.signal(signal.SIGTERM, handler)
    try:
        goes_on(store, **options)
    except SignalException:
        say("caught")


def is_interrupted(store: Path, **options: Any) -> None:
    """From a terminal, with the recorder as a context manager."""
    signal.signal(signal.SIGINT, signal.default_int_handler)  # it may be ignored here
    training = Training()
    with attach(training.optimizers, training.model, store, every=1, **options) as training.recorder:
        training.go(7)
        training.flush()
        say("flushed")
        training.go(FOREVER)


def forks(store: Path, **options: Any) -> None:
    """Children that end in their own ways; one of them even trains on."""
    training = recorded(store, **options)
    training.go(4)
    for end in (lambda: sys.exit(0), lambda: os._exit(0), train_and_flush(training), training.recorder.close):
        child = os.fork()
        if child == 0:
            end()
            sys.exit(0)
        os.waitpid(child, 0)
        training.go(2)


def train_and_flush(training: Training) -> Callable[[], None]:
    def child() -> None:
        training.go(3)
        training.flush()

    return child


FLUSH_EVERY = 3


def is_killed(store: Path, until: int | None = None, more: int | None = None, **options: Any) -> None:
    """A training from where its run ends; the number of records after every commit is noted beside it."""
    done = last_step(store)
    training = Training()
    training.go(done)  # what a checkpoint would restore is computed again
    end = until or (done + more if more else FOREVER)
    file = os.open(store.with_suffix(".reports"), os.O_WRONLY | os.O_APPEND | os.O_CREAT)
    with attach(training.optimizers, training.model, store, every=1, on_error="raise", **options) as training.recorder:
        assert training.recorder.step == done
        while training.recorder.step < end:
            training.go()
            if training.recorder.step > 40:
                training.recorder.log(late=training.recorder.step)
            if training.recorder.step % FLUSH_EVERY == 0:
                training.flush()
                os.write(file, b"%d\n" % (committed(store) or 0))


def committed(store: Path) -> int | None:
    """The number of records, read from the root's document, which needs no library; None before the first commit."""
    if not (store / "zarr.json").exists():
        return None
    consolidated = json.loads((store / "zarr.json").read_text()).get("consolidated_metadata")
    count: int | None = consolidated and consolidated["metadata"]["update/step"]["shape"][0]
    return count


def last_step(store: Path) -> int:
    """Of records and scalars."""
    if committed(store) is None:
        return 0
    root = zarr.open_group(store, mode="r")  # through its document: those of the arrays themselves may be older
    steps = [np.asarray(root[f"{group}/step"][:]) for group in ("update", "scalars")]  # type: ignore[index]
    return max((int(of[-1]) for of in steps if of.size), default=0)


def reported(store: Path) -> int:
    """How many records were noted as committed."""
    reports = store.with_suffix(".reports")
    return max(map(int, reports.read_text().split()), default=0) if reports.exists() else 0


class Numbers(torch.utils.data.Dataset[torch.Tensor]):
    def __len__(self) -> int:
        return 8

    def __getitem__(self, index: int) -> torch.Tensor:
        return torch.full((2,), float(index))


def loads_data_in_workers(store: Path, **options: Any) -> None:
    training = recorded(store, **options)
    for _ in range(3):
        for _ in DataLoader(Numbers(), num_workers=2, batch_size=2, multiprocessing_context="fork", generator=torch.Generator()):
            training.go(1)


def starts_processes(store: Path, **options: Any) -> None:
    """By fork and by spawn, a copy of the optimizers handed over."""
    training = recorded(store, **options)
    training.go(4)
    for method in ("fork", "spawn"):
        process = multiprocessing.get_context(method).Process(target=step, args=(pickle.dumps(training.optimizers),))
        process.start()
        process.join()
        assert process.exitcode == 0
        training.go(4)


def step(optimizers: bytes) -> None:
    for optimizer in pickle.loads(optimizers):
        for group in optimizer.param_groups:
            for p in group["params"]:
                p.grad = torch.ones_like(p)
        optimizer.step()


# Running them


def serve() -> None:
    """For every line `[program, store, log, options]`: fork, print the child's id, what it says, and its exit status."""
    importlib.import_module("torch._dynamo")  # torch would at an optimizer's first step: a second of each program's life
    journal_module.FLUSH_SECONDS = 1e9  # only where told
    for line in sys.stdin:
        program, store, errors, options = json.loads(line)
        said, says = os.pipe()
        child = os.fork()
        if child == 0:
            os.dup2(os.open(errors, os.O_WRONLY | os.O_CREAT, 0o600), 2)
            os.dup2(says, 3)
            globals()[program](Path(store), **options)
            return
        os.close(says)
        print(child, flush=True)
        with os.fdopen(said) as words:
            for word in words:
                print(word, end="", flush=True)
        _, status = os.waitpid(child, 0)
        print(os.waitstatus_to_exitcode(status), flush=True)


class Server:
    """Where programs are run, one at a time."""

    def __init__(self, process: "subprocess.Popen[str]") -> None:
        self._process = process

    def start(self, program: Callable[..., None], store: Path, **options: Any) -> int:
        """Its process id."""
        assert self._process.stdin is not None
        self._log = store.with_suffix(".log")
        self._process.stdin.write(json.dumps([program.__name__, str(store), str(self._log), options]) + "\n")
        self._process.stdin.flush()
        return int(self.hear())

    def hear(self) -> str:
        """What it says next; at last its exit status."""
        assert self._process.stdout is not None
        return self._process.stdout.readline().strip()

    def end(self) -> tuple[int, str]:
        """Its exit status, and what it wrote to stderr."""
        return int(self.hear()), self._log.read_text()

    def run(self, program: Callable[..., None], store: Path, **options: Any) -> tuple[int, str]:
        self.start(program, store, **options)
        return self.end()


@contextmanager
def server() -> Iterator[Server]:
    path = os.pathsep.join([str(Path(__file__).parents[1]), os.environ.get("PYTHONPATH", "")])
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1", "PYTHONPATH": path}
    command = [sys.executable, "-W", "error", "-m", "faults.programs"]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=environment) as process:
        try:
            yield Server(process)
        finally:
            process.kill()


if __name__ == "__main__":
    # Under the name by which others know it: what is pickled for a spawned process is looked up there.
    importlib.import_module("faults.programs").serve()
