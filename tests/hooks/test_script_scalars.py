"""What a script under `diag run` logs: taken at its step, kept before the first one, and never in the training's way."""

import pytest
import torch
from script_runs import train
from torch import nn

from optiscope.hooks.trainers import script_scalars


@pytest.fixture
def optimizer():
    model = nn.Linear(3, 5)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    optimizer.model = model
    return optimizer


def logged(run):
    """Steps and values by name, without the recorder's own."""
    scalars = run["scalars"].to_dataset()
    names = [str(name) for name in scalars.data_vars if not str(name).endswith("_seconds")]
    there = {name: scalars[name].dropna("step") for name in names}
    return {name: dict(zip(values["step"].values.tolist(), values.values.tolist(), strict=True)) for name, values in there.items()}


def test_numbers_are_kept_until_the_first_step_that_is_recorded(script_run, optimizer, read, tmp_path):
    script_run.take_over({"train/loss": 9.0})
    script_run.log({"own": torch.ones(())})
    train(torch.optim.SGD([optimizer.model.bias], lr=0.1))  # no matrix, so no recorder yet
    script_run.take_over({"train/loss": 8.0, "lr": 1.0})
    train(optimizer)
    script_run.take_over({"train/loss": 7.0})
    script_run.end()
    assert logged(read(tmp_path / "run.zarr")) == {"train.loss": {0: 8.0, 2: 7.0}, "lr": {0: 1.0}, "own": {0: 1.0}}


def test_names_that_the_store_cannot_hold_are_left_out_in_silence(script_run, optimizer, read, tmp_path, caplog):
    train(optimizer)
    script_run.take_over({"step": 3.0, "elapsed_seconds": 1.0, "": 1.0, "x" * 300: 1.0, "loss": 2.0})
    script_run.end()
    assert logged(read(tmp_path / "run.zarr")) == {"loss": {2: 2.0}}
    assert caplog.text == ""


def test_many_numbers_of_one_step_are_not_taken_for_a_loop_without_steps(script_run, optimizer, caplog):
    train(optimizer)
    for i in range(200):
        script_run.take_over({f"layer{i}": float(i)})
    script_run.end()
    assert caplog.text == ""


def test_a_script_that_makes_a_new_name_at_every_call_is_told_once(script_run, optimizer, read, tmp_path, monkeypatch, caplog):
    monkeypatch.setattr(script_scalars, "MOST", 3)
    train(optimizer)
    for i in range(6):
        script_run.take_over({f"sample{i}": 1.0, "loss": float(i)})
    script_run.end()
    assert logged(read(tmp_path / "run.zarr")) == {"loss": {2: 5.0}, "sample0": {2: 1.0}, "sample1": {2: 1.0}}
    assert [record.getMessage() for record in caplog.records] == [
        "optiscope: the script logs numbers under more than 3 names; further names are not recorded"
    ]


def test_each_training_takes_what_is_logged_while_it_trains(script_run, read, tmp_path):
    for number in (1.0, 2.0):
        model = nn.Linear(3, 5)
        train(torch.optim.SGD(model.parameters(), lr=0.1), steps=11)
        script_run.take_over({"loss": number})
    script_run.end()
    script_run.take_over({"loss": 3.0})
    assert logged(read(tmp_path / "run.zarr")) == {"loss": {11: 1.0}}
    assert logged(read(tmp_path / "run-2.zarr")) == {"loss": {11: 2.0}}
