"""Recording in a thread beside the training: the same records, in bounded memory, and never a wait for it."""

import logging
import os
import re
import signal
import subprocess
import sys
import threading
import time
import traceback
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from contract.harness import same_values
from torch import nn
from torch.optim import SGD, AdamW, Muon, Optimizer

import optiscope.hooks.recording.record as record_module
from optiscope.diagnostics.catalogue import MEASURES
from optiscope.diagnostics.store.files import Files
from optiscope.diagnostics.store.lock import owner
from optiscope.hooks import AdaptiveSchedule, Recorder, RmsAlignment, attach
from optiscope.hooks.recording.journal import Journal
from optiscope.hooks.recording.worker import Worker

Make = Callable[..., nn.Sequential]
Read = Callable[[str | Path], Any]

TIMES = ("overhead_seconds", "overhead_cpu_seconds", "background_cpu_seconds", "elapsed_seconds")
WAIT = 120.0  # seconds for what takes milliseconds, on a machine that is busy with other things
ASKED_FOR = [group for group in MEASURES if group != "curvature"]


def build(model: nn.Module, kind: str) -> list[Optimizer]:
    matrices, vectors = ([p for p in model.parameters() if (p.ndim == 2) == wanted] for wanted in (True, False))
    return {
        "Muon and AdamW": lambda: [Muon(matrices, lr=0.05, weight_decay=0.1), AdamW(vectors, lr=0.01)],
        "Muon without Nesterov": lambda: [Muon(matrices, lr=0.05, nesterov=False)],
        "AdamW": lambda: [AdamW(model.parameters(), lr=0.01, amsgrad=True)],
        "SGD": lambda: [SGD(model.parameters(), lr=0.05)],
        "SGD with momentum": lambda: [SGD(model.parameters(), lr=0.05, momentum=0.9, nesterov=True)],
    }[kind]()


def train(model: nn.Module, optimizers: list[Optimizer], recorder: Recorder | None, steps: int = 7, *, wait: bool = True) -> list[bytes]:
    """Some steps, everything overwritten as soon as a training may; with `wait` no record is missed. The weights at the end, as bytes."""
    torch.manual_seed(1)
    for step in range(steps):
        loss = model(torch.randn(4, 8, dtype=next(model.parameters()).dtype)).square().mean()
        loss.backward()
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad(set_to_none=False)
        if step == 3:
            with torch.no_grad():
                next(model.parameters()).mul_(0.9)  # a clip, right behind the step
        if recorder is not None:
            recorder.log(loss=loss.item())
            if wait and recorder.session.journal.worker is not None:
                recorder.session.journal.worker.wait()
    return [p.detach().float().numpy().tobytes() for p in model.parameters()]


@pytest.fixture
def held(monkeypatch: pytest.MonkeyPatch) -> Iterator[threading.Event]:
    """Measuring stands still until this is set."""
    go, measured = threading.Event(), record_module.measure_update

    def measure(seen: Any) -> Any:
        assert go.wait(WAIT)
        return measured(seen)

    monkeypatch.setattr(record_module, "measure_update", measure)
    yield go
    go.set()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("kind", ["Muon and AdamW", "Muon without Nesterov", "AdamW", "SGD", "SGD with momentum"])
def test_records_are_bitwise_those_of_the_foreground(kind: str, dtype: torch.dtype, mlp: Make, tmp_path: Path, read: Read) -> None:
    runs, weights = [], []
    for background in (False, True):
        model = mlp(dtype=dtype)
        optimizers = build(model, kind)
        path = tmp_path / f"{background}.zarr"
        recorder = attach(optimizers, model, path, every=2, measure=ASKED_FOR, background=background, on_error="raise")
        weights.append(train(model, optimizers, recorder))
        recorder.close()
        assert (recorder.errors, recorder.missed) == (0, 0)
        assert (recorder.background_cpu_seconds > 0) == background
        runs.append(read(path))
    plain = mlp(dtype=dtype)
    assert weights[0] == weights[1] == train(plain, build(plain, kind), None)
    foreground, behind = runs
    assert set(foreground.children) == set(behind.children)
    for group in foreground.children:
        variables = {str(v) for v in foreground[group].variables} - set(TIMES)
        assert variables == {str(v) for v in behind[group].variables} - set(TIMES)
        for name in variables:
            assert same_values(foreground[group][name].values, behind[group][name].values), (group, name)
    assert behind["scalars"]["background_cpu_seconds"].values[-1] > 0
    assert "background_cpu_seconds" not in foreground["scalars"]
    unlike = {"created", "writer", "software", "versions", "chunks", "checksum"}
    assert {k: v for k, v in foreground.attrs.items() if k not in unlike} == {k: v for k, v in behind.attrs.items() if k not in unlike}


def test_what_is_due_meanwhile_is_missed_and_counted_and_nothing_waits(
    held: threading.Event, mlp: Make, tmp_path: Path, read: Read
) -> None:
    model = mlp()
    optimizers = build(model, "Muon and AdamW")
    recorder = attach(optimizers, model, tmp_path / "run.zarr", every=2, background=True, on_error="raise")
    train(model, optimizers, recorder, 11, wait=False)  # would not come back, if anything waited
    assert recorder.missed == 4  # of steps 4, 6, 8 and 10
    assert threading.active_count() >= 2
    held.set()
    recorder.close()
    run = read(tmp_path / "run.zarr")
    assert run["update"]["step"].values.tolist() == [2]
    assert np.isfinite(run["update"]["update_rms"].values).all()
    assert run["scalars"]["step"].values.tolist() == list(range(1, 12))
    assert (run.attrs["missed"], recorder.missed) == (4, 4)
    assert not any(thread.name == "optiscope" for thread in threading.enumerate())


def test_memory_is_that_of_one_record(held: threading.Event, mlp: Make, tmp_path: Path) -> None:
    """However many records are due behind one that is stuck, one set of copies is held; and it is used again."""
    model = mlp()
    optimizers = build(model, "AdamW")
    recorder = attach(optimizers, model, tmp_path / "run.zarr", every=1, background=True, on_error="raise")
    train(model, optimizers, recorder, 3, wait=False)
    memory = recorder.session.under_way.memory
    assert memory is not None
    assert sum(map(len, memory._free.values())) == 0
    held.set()
    kept = []
    for _ in range(3):
        train(model, optimizers, recorder, 1)
        kept.append(sorted(tensor.data_ptr() for free in memory._free.values() for tensor in free))
    matrices = [p for p in model.parameters() if p.ndim == 2]
    assert len(kept[0]) == 5 * len(matrices)  # weights before and after, gradient, two moments
    assert kept[0] == kept[1] == kept[2]
    recorder.close()
    assert recorder.session.under_way.memory is None


def test_closure_that_is_called_again_and_again_takes_no_more_memory(mlp: Make, tmp_path: Path) -> None:
    class Patient(SGD):
        def step(self, closure: Any = None) -> Any:
            for _ in range(4):
                closure()
            return super().step(closure)

    model = mlp()
    optimizer = Patient(model.parameters(), lr=0.05)

    def closure() -> torch.Tensor:
        loss: torch.Tensor = model(torch.ones(4, 8)).square().mean()
        loss.backward()
        return loss

    with attach(optimizer, model, tmp_path / "run.zarr", every=1, background=True, on_error="raise") as recorder:
        memory = recorder.session.under_way.memory
        assert memory is not None
        optimizer.step(closure)
        recorder.flush()
        assert sum(map(len, memory._free.values())) == 3 * 3  # of three matrices: weights before and after, gradient


def test_a_slow_disk_holds_up_neither_steps_nor_log(mlp: Make, tmp_path: Path, read: Read, monkeypatch: pytest.MonkeyPatch) -> None:
    go, replace = threading.Event(), Files.replace

    def slow(self: Files, *args: Any) -> None:
        assert threading.current_thread().name != "optiscope" or go.wait(WAIT)
        replace(self, *args)

    model = mlp()
    optimizers = build(model, "SGD")
    recorder = attach(optimizers, model, tmp_path / "run.zarr", every=1, background=True, on_error="raise")
    monkeypatch.setattr(Files, "replace", slow)
    monkeypatch.setattr("optiscope.hooks.recording.journal.FLUSH_SECONDS", 0.0)
    train(model, optimizers, recorder, 5, wait=False)
    assert recorder.session.journal.worker is not None
    assert recorder.session.journal.worker.busy  # the disk still stands
    go.set()
    recorder.close()
    assert read(tmp_path / "run.zarr")["scalars"]["loss"].notnull().all()


@pytest.mark.parametrize("grows", [False, True])
def test_a_record_that_is_due_amid_a_flush_of_scalars_is_made(
    grows: bool, mlp: Make, tmp_path: Path, read: Read, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its rows are measured behind it. Where a new parameter needs rows in the store, the training waits for the flush."""
    begun, go, replace = threading.Event(), threading.Event(), Files.replace

    def slow(self: Files, *args: Any) -> None:
        if threading.current_thread().name == "optiscope":
            begun.set()
            assert go.wait(WAIT)
        replace(self, *args)

    model = mlp()
    first, *others = model.parameters()
    optimizer = SGD([first] if grows else [first, *others], lr=0.05)
    recorder = attach(optimizer, model, tmp_path / "run.zarr", every=2, background=True, on_error="raise")
    monkeypatch.setattr(Files, "replace", slow)
    monkeypatch.setattr("optiscope.hooks.recording.journal.FLUSH_SECONDS", 0.0)
    train(model, [optimizer], recorder, 1, wait=False)
    assert begun.wait(WAIT)
    if grows:
        optimizer.add_param_group({"params": others})
        threading.Timer(0.2, go.set).start()
    train(model, [optimizer], recorder, 1, wait=False)
    go.set()
    recorder.close()
    assert recorder.missed == 0
    run = read(tmp_path / "run.zarr")
    assert run["update"]["step"].values.tolist() == [2]
    assert np.isfinite(run["update"]["update_rms"].values).all()
    assert run["update"].sizes["matrix"] == 3


def test_of_too_many_scalars_the_oldest_are_lost_by_whole_steps(
    mlp: Make, tmp_path: Path, read: Read, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    begun, go, measured = threading.Event(), threading.Event(), record_module.measure_update

    def measure(seen: Any) -> Any:
        begun.set()
        assert go.wait(WAIT)
        return measured(seen)

    monkeypatch.setattr(record_module, "measure_update", measure)
    monkeypatch.setattr("optiscope.hooks.recording.journal.MAX_LOGGED", 5)
    model = mlp()
    optimizers = build(model, "SGD")
    recorder = attach(optimizers, model, tmp_path / "run.zarr", every=100, first_step=99, background=True, on_error="raise")
    train(model, optimizers, recorder, 1, wait=False)
    assert begun.wait(WAIT)
    for step in range(101, 113):
        optimizers[0].step()
        recorder.log(first=step, second=-step)
    recorder.watch(SGD([nn.Parameter(torch.ones(4, 4))], lr=0.1))
    go.set()
    recorder.close()
    run = read(tmp_path / "run.zarr")
    for name, sign in (("first", 1), ("second", -1)):
        kept = run["scalars"][name].dropna("step")
        assert kept["step"].values.tolist() == [108, 109, 110, 111, 112]
        assert kept.values.tolist() == [sign * step for step in (108, 109, 110, 111, 112)]
    # Of the record's step there are two rows, the recorder's own and the loss; the worker took both, one, or none before it was held.
    first = 108 - recorder.dropped
    assert first in (100, 101)
    assert run.attrs["dropped"] == recorder.dropped
    at_the_time, at_the_end, silent = [record.getMessage() for record in caplog.records]
    assert "no step of SGD#2 was seen" in silent
    told = re.match(rf"optiscope: step (\d+): more than 5 logged steps wait for the thread .* lost, from step {first} on", at_the_time)
    assert told is not None
    assert first + 4 <= int(told[1]) <= first + 5
    assert at_the_end == f"optiscope: what was logged at {recorder.dropped} steps, of steps {first} to 107, is lost."
    assert [entry["label"] for entry in run.attrs["optimizers"]] == ["SGD", "SGD#2"]  # what is no scalar is kept


def test_what_fails_behind_is_counted_and_told_of_once(
    mlp: Make, tmp_path: Path, read: Read, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(record_module, "measure_geometry", lambda *args: 1 / 0)
    model = mlp()
    optimizers = build(model, "Muon and AdamW")
    with (
        caplog.at_level(logging.WARNING, "optiscope"),
        attach(optimizers, model, tmp_path / "run.zarr", every=1, background=True) as recorder,
    ):
        train(model, optimizers, recorder, 3)
    [message] = [record.getMessage() for record in caplog.records]
    assert "ZeroDivisionError" in message
    assert recorder.errors == read(tmp_path / "run.zarr").attrs["errors"] == 3 * 3
    with (
        pytest.raises(ZeroDivisionError),
        attach(optimizers, model, tmp_path / "strict.zarr", every=1, background=True, on_error="raise") as recorder,
    ):
        train(model, optimizers, recorder, 3)


def test_flush_curvature_and_watch_wait_for_what_is_being_measured(mlp: Make, tmp_path: Path, read: Read) -> None:
    model = mlp(dropout=0.0)
    optimizers = build(model, "AdamW")
    with attach(optimizers, model, tmp_path / "run.zarr", every=1, background=True, on_error="raise") as recorder:
        train(model, optimizers, recorder, 1, wait=False)
        recorder.flush()
        assert read(tmp_path / "run.zarr")["update"]["step"].values.tolist() == [1]
        train(model, optimizers, recorder, 1, wait=False)
        recorder.curvature(lambda: model(torch.ones(2, 8)).square().mean())
        extra = nn.Parameter(torch.ones(4, 4))
        recorder.watch(SGD([extra], lr=0.1))
    run = read(tmp_path / "run.zarr")
    assert run["curvature"]["step"].values.tolist() == [2]
    assert [entry["label"] for entry in run.attrs["optimizers"]] == ["AdamW", "SGD"]
    recorder.log(after=1.0)  # written at once, as in the foreground
    assert read(tmp_path / "run.zarr")["scalars"]["after"].values[-1] == 1.0


def test_listeners_hear_of_every_record_in_the_training_thread_behind_a_later_step(mlp: Make, tmp_path: Path, read: Read) -> None:
    model = mlp()
    optimizers = build(model, "SGD")
    heard: list[tuple[int, int, str]] = []
    with attach(optimizers, model, tmp_path / "run.zarr", every=2, background=True, on_error="raise") as recorder:
        recorder.on_record(lambda record: heard.append((record.step, recorder.step, threading.current_thread().name)))
        train(model, optimizers, recorder, 6)
    main = threading.current_thread().name
    assert heard == [(2, 3, main), (4, 5, main), (6, 6, main)]  # the last one as it closes


def test_what_acts_on_records_is_refused(mlp: Make, tmp_path: Path) -> None:
    model = mlp()
    optimizers = build(model, "Muon without Nesterov")
    with attach(optimizers, model, tmp_path / "run.zarr", every=1, background=True) as recorder:
        with pytest.raises(ValueError, match=r"^recorder: measures in the background, so that with apply=True the training would depend"):
            AdaptiveSchedule(recorder, optimizers[0], model)
        with pytest.raises(ValueError, match=r"attach with background=False, or use rescale=False$"):
            RmsAlignment(recorder, optimizers[0], rescale=True)
        AdaptiveSchedule(recorder, optimizers[0], model, window=(1, 3), apply=False)
        RmsAlignment(recorder, optimizers[0])


def test_governor_counts_both_threads(mlp: Make, tmp_path: Path) -> None:
    model = mlp()
    optimizers = build(model, "SGD")
    with attach(optimizers, model, tmp_path / "run.zarr", background=True, overhead=0.2, on_error="raise") as recorder:
        train(model, optimizers, recorder, 30)
        spent, _ = recorder.session.journal.spent_and_elapsed()
        assert spent == pytest.approx(recorder.overhead_seconds + recorder.background_cpu_seconds, rel=0.05)
        assert recorder.missed == 0


@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork here")
@pytest.mark.filterwarnings("ignore:This process:DeprecationWarning")
def test_a_forked_child_neither_hangs_nor_writes(mlp: Make, tmp_path: Path, read: Read, monkeypatch: pytest.MonkeyPatch) -> None:
    held, appended = threading.Event(), Journal.append

    def append(*args: Any) -> None:
        assert held.wait(WAIT)
        appended(*args)

    monkeypatch.setattr(Journal, "append", append)
    model = mlp()
    optimizers = build(model, "SGD")
    recorder = attach(optimizers, model, tmp_path / "run.zarr", every=1, background=True, on_error="raise")
    train(model, optimizers, recorder, 2, wait=False)  # the worker is in the middle of a record
    child = os.fork()
    if child == 0:
        try:
            optimizers[0].step()
            recorder.log(loss=1.0)
            recorder.flush()
            recorder.close()
            os._exit(0)
        finally:
            os._exit(1)
    deadline = time.monotonic() + WAIT / 2
    while (done := os.waitpid(child, os.WNOHANG)) == (0, 0) and time.monotonic() < deadline:
        time.sleep(0.02)
    if done == (0, 0):
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
    assert done == (child, 0)
    held.set()
    recorder.close()
    assert read(tmp_path / "run.zarr")["update"]["step"].values.tolist() == [1]


def interrupt_within(function: Callable[..., Any]) -> None:
    """Interrupt the main thread once it is there."""
    main = threading.main_thread().ident
    assert main is not None
    while not any(frame.f_code is function.__code__ for frame, _ in traceback.walk_stack(sys._current_frames()[main])):
        time.sleep(0.001)
    signal.pthread_kill(main, signal.SIGINT)


def test_interrupt_while_closing_waits(held: threading.Event, mlp: Make, tmp_path: Path, read: Read) -> None:
    """The run is the worker's until that is done: it keeps its lock, and is written by nobody else."""
    model = mlp()
    optimizers = build(model, "SGD")
    store = tmp_path / "run.zarr"
    recorder = attach(optimizers, model, store, every=1, background=True, on_error="raise")
    train(model, optimizers, recorder, 2, wait=False)
    written = Files(store, "").signature()
    threading.Thread(target=interrupt_within, args=(Worker.wait,)).start()
    with pytest.raises(KeyboardInterrupt):
        recorder.close()
    assert Files(store, "").signature() == written
    assert owner(store) is not None
    held.set()
    recorder.close()  # as the interpreter's end would
    assert owner(store) is None
    run = read(store)
    assert run["update"]["step"].values.tolist() == [1]
    assert run["scalars"]["step"].values.tolist() == [1, 2]
    assert not any(thread.name == "optiscope" for thread in threading.enumerate())


@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork here")
@pytest.mark.filterwarnings("ignore:This process:DeprecationWarning")
def test_no_fork_falls_into_a_measurement(mlp: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Nor waits for more than the one under way: of three matrices a step, measured for 0.1 s each."""
    measured, under_way = record_module.measure_update, [0, 0]

    def measure(seen: Any) -> Any:
        under_way[0] += 1
        time.sleep(0.1)
        under_way[1] += 1
        return measured(seen)

    monkeypatch.setattr(record_module, "measure_update", measure)
    model = mlp()
    optimizers = build(model, "SGD")
    with attach(optimizers, model, tmp_path / "run.zarr", every=1, background=True, on_error="raise") as recorder:
        train(model, optimizers, recorder, 1, wait=False)
        found = []
        for _ in range(4):
            time.sleep(0.03)
            before = under_way[1]
            child = os.fork()
            if child == 0:  # where all stands as at the fork
                os._exit(10 * (under_way[1] - before) + under_way[0] - under_way[1])
            found.append(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))
    assert set(found) <= {0, 10}
    assert under_way == [3, 3]


SCRIPT = """
import sys, torch
from optiscope.hooks import attach
torch.manual_seed(0)
model = torch.nn.Linear(200, 300)
optimizer = torch.optim.Muon([model.weight], lr=0.1)
recorder = attach(optimizer, model, sys.argv[1], every=1, background=True, on_error="raise")
for _ in range(5):
    model(torch.randn(8, 200)).square().mean().backward()
    optimizer.step()
print(recorder.step)
"""


def test_interpreter_that_ends_without_close_keeps_what_was_being_measured(tmp_path: Path, read: Read) -> None:
    done = subprocess.run(
        [sys.executable, "-c", SCRIPT, str(tmp_path / "run.zarr")], capture_output=True, text=True, timeout=120, check=False
    )
    assert (done.returncode, done.stdout, done.stderr) == (0, "5\n", "")
    run = read(tmp_path / "run.zarr")
    steps = run["update"]["step"].values.tolist()
    assert steps[0] == 1
    assert np.isfinite(run["update"]["update_rms"].values).all()
    assert run.attrs.get("missed", 0) == 5 - len(steps)


def test_accelerators_are_refused(tmp_path: Path) -> None:
    """A worker would have to wait for the training's stream, and the training for the worker's."""
    elsewhere = torch.nn.Linear(4, 4, device="meta")
    with pytest.raises(ValueError, match=r"^background: expected parameters on the CPU, got some on meta; leave background out there$"):
        attach(torch.optim.SGD(elsewhere.parameters(), lr=0.1), elsewhere, tmp_path / "run.zarr", background=True)
    assert not (tmp_path / "run.zarr").exists()
