"""An optimizer that is replaced, or whose model is rebuilt: the recorder sees no step any more, and says so."""

import logging
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from torch import nn
from torch.optim import SGD, AdamW, Optimizer

from optiscope.analysis import open_run
from optiscope.hooks import Recorder, attach

LOGS = 100  # calls without a step, ten times what there were between two steps aside, of which something is said


@pytest.fixture
def warnings(caplog: pytest.LogCaptureFixture) -> Callable[[], list[str]]:
    caplog.set_level(logging.WARNING, "optiscope")
    return lambda: [record.getMessage() for record in caplog.records]


def stepped(model: nn.Module, optimizer: Optimizer, times: int) -> Iterator[int]:
    for step in range(times):
        optimizer.zero_grad()
        model(torch.ones(2, 4)).square().sum().backward()
        optimizer.step()
        yield step


def follow(recorder: Recorder, model: nn.Module, optimizer: Optimizer, times: int, logs: int = 1) -> None:
    for _ in stepped(model, optimizer, times):
        for _ in range(logs):
            recorder.log(loss=1.0)


def test_a_replaced_optimizer_is_told_of_while_the_training_goes_on(tmp_path: Path, warnings: Callable[[], list[str]]) -> None:
    model = nn.Linear(4, 4)
    recorder = attach(SGD(model.parameters(), lr=0.01), model, tmp_path / "run.zarr", every=1)
    follow(recorder, model, recorder.session.watched[0].optimizer, 5)
    second = SGD(model.parameters(), lr=0.01)
    follow(recorder, model, second, LOGS)
    assert warnings() == []
    follow(recorder, model, second, 300)
    (told,) = warnings()
    assert told.startswith(f"optiscope: log was called {LOGS + 11} times since step 5, and no step of SGD was seen. ")
    assert "recorder.watch(" in told
    recorder.watch(second)
    follow(recorder, model, second, 3)
    recorder.close()
    assert len(warnings()) == 1  # said once
    assert open_run(tmp_path / "run.zarr")["update"]["step"].values.tolist() == [1, 2, 3, 4, 5, 6, 7, 8]


def test_a_short_silence_is_told_of_at_the_end(tmp_path: Path, warnings: Callable[[], list[str]]) -> None:
    model = nn.Linear(4, 4)
    optimizer = SGD(model.parameters(), lr=0.01)
    with attach(optimizer, model, tmp_path / "run.zarr", every=1) as recorder:
        follow(recorder, model, optimizer, 5)
        rebuilt = nn.Linear(4, 4)
        follow(recorder, rebuilt, SGD(rebuilt.parameters(), lr=0.01), 30)
        assert warnings() == []
    (told,) = warnings()
    assert told.startswith("optiscope: log was called 31 times since step 5, and no step of SGD was seen. ")


def test_one_of_two_that_stops_is_told_of(tmp_path: Path, warnings: Callable[[], list[str]]) -> None:
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
    first, second = SGD(model[0].parameters(), lr=0.01), AdamW(model[1].parameters(), lr=0.01)
    with attach([first, second], model, tmp_path / "run.zarr", every=10) as recorder:
        for step in stepped(model, first, 200):
            if step < 20:
                second.step()
        recorder.flush()
    (told,) = warnings()
    assert told.startswith("optiscope: no step of AdamW was seen since step 20, while others went on to step 13")


def test_much_logging_and_rare_steps_are_nothing_to_tell_of(tmp_path: Path, warnings: Callable[[], list[str]]) -> None:
    """Several numbers a step, an evaluation of many batches now and then, an optimizer that steps every 25th time."""
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
    first, second = SGD(model[0].parameters(), lr=0.01), AdamW(model[1].parameters(), lr=0.01)
    with attach([first, second], model, tmp_path / "run.zarr", every=50) as recorder:
        for step in stepped(model, first, 300):
            for _ in range(5):
                recorder.log(loss=1.0)
            if step % 25 == 0:
                second.step()
            if step % 100 == 50:
                for _ in range(80):
                    recorder.log(validation=1.0)
    assert warnings() == []


def test_one_that_never_steps_is_named_though_another_does(tmp_path: Path, warnings: Callable[[], list[str]]) -> None:
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
    first, rebuilt = SGD(model[0].parameters(), lr=0.01), AdamW(model[1].parameters(), lr=0.01)
    with attach([first, rebuilt], model, tmp_path / "run.zarr", every=10) as recorder:
        for _ in stepped(model, first, 20):
            recorder.log(loss=1.0)
    (told,) = warnings()
    assert told.startswith("optiscope: no step of AdamW was seen; attach to the very objects whose step() is called")


def test_a_second_replacement_is_told_of_too(tmp_path: Path, warnings: Callable[[], list[str]]) -> None:
    model = nn.Linear(4, 4)
    made = [SGD(model.parameters(), lr=0.01) for _ in range(3)]
    with attach(made[0], model, tmp_path / "run.zarr", every=50) as recorder:
        follow(recorder, model, made[0], 5)
        follow(recorder, model, made[1], 200)
        recorder.watch(made[1])
        follow(recorder, model, made[1], 5)
        follow(recorder, model, made[2], 3000)
    first, second = warnings()
    assert "since step 5, and no step of SGD was seen" in first
    assert "since step 10, and no step of SGD was seen" in second
