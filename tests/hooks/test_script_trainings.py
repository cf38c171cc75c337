"""A script's trainings get a run each: none goes on in another's, short ones leave none, and what comes back goes on in its own."""

import sys

import pytest
import torch
from script_runs import recorded, train
from torch import nn

from optiscope.hooks import attach
from optiscope.hooks.trainers.model_search import Several, global_name


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.fc = nn.Linear(3, 5)


def training():
    """An optimizer, with a model of its own that lives as long as it."""
    model = Net()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    optimizer.model = model
    return optimizer


def runs(read, folder):
    """Steps of the updates of every matrix, by run."""
    return {path.name: recorded(read(path)) for path in folder.iterdir()}


def upto(last, first=1):
    return list(range(first, last + 1))


def test_trainings_of_equal_matrices_are_not_continued_into_each_other(script_run, read, tmp_path):
    for steps in (11, 12, 13):
        optimizer = training()
        train(optimizer, steps=steps)
    script_run.end()
    assert runs(read, tmp_path) == {
        "run.zarr": {("fc.weight", "SGD"): upto(11)},
        "run-2.zarr": {("fc.weight", "SGD"): upto(12)},
        "run-3.zarr": {("fc.weight", "SGD"): upto(13)},
    }
    assert "passed over" not in script_run.outcome


def test_the_first_training_goes_on_in_the_run_that_is_there_and_no_other_one_does(script_run, read, tmp_path, caplog):
    other = nn.Linear(2, 2)
    for path, model in (("run.zarr", other), ("run-2.zarr", Net())):
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        script_run._keep([optimizer])  # so that these, of a script of before, are not taken for this script's
        with attach(optimizer, model, tmp_path / path, every=1):
            train(optimizer)
    caplog.clear()
    for _ in range(2):
        optimizer = training()
        train(optimizer, steps=11)
    script_run.end()
    found = runs(read, tmp_path)
    assert found.keys() == {"run.zarr", "run-2.zarr", "run-3.zarr"}
    assert [found[f"run{x}.zarr"]["fc.weight", "SGD"] for x in ("-2", "-3")] == [upto(13), upto(11)]
    assert caplog.text.count("holds records up to step 2; this training is recorded after them") == 1


def test_a_few_steps_leave_no_run_beside_a_training(script_run, read, tmp_path):
    probe = training()
    train(probe, steps=10)
    optimizer = training()
    train(optimizer, steps=11)
    last = training()
    train(last, steps=1)
    script_run.end()
    assert runs(read, tmp_path) == {"run.zarr": {("fc.weight", "SGD"): upto(11)}}
    assert script_run.outcome.endswith(
        " holds 11 records, the last of step 11; 2 short-lived optimizers (of at most 10 steps) were passed over"
    )


def test_of_a_script_of_short_trainings_one_is_kept(script_run, read, tmp_path):
    for _ in range(6):
        optimizer = training()
        train(optimizer, steps=3)
    script_run.end()
    assert runs(read, tmp_path) == {"run.zarr": {("fc.weight", "SGD"): [1, 2, 3]}}
    assert script_run.outcome.count("5 short-lived optimizers (of at most 10 steps) were passed over") == 1


def test_probes_disturb_no_training_that_goes_on(script_run, read, tmp_path, caplog):
    optimizer = training()
    train(optimizer, steps=20)
    for _ in range(5):
        probe = training()
        train(probe, steps=4)
        train(optimizer, steps=20)
    script_run.end()
    assert runs(read, tmp_path) == {"run.zarr": {("fc.weight", "SGD"): upto(120)}}
    assert script_run.outcome.endswith("; 5 short-lived optimizers (of at most 10 steps) were passed over")
    # Let go of for the first of them only.
    assert len([record for record in caplog.records if "recorded after them" in record.getMessage()]) == 1


def test_a_training_whose_late_optimizer_is_the_first_to_come_back_goes_on_in_its_run(script_run, read, tmp_path):
    model = nn.ModuleList([nn.Linear(3, 5), nn.Linear(5, 2)])
    first = torch.optim.SGD(model[0].parameters(), lr=0.1)
    train(first, steps=12)
    late = torch.optim.Adam(model[1].parameters())
    train(first, late, steps=3)
    train(training(), steps=4)
    train(late, first, steps=5)
    script_run.end()
    steps = runs(read, tmp_path)
    assert steps.keys() == {"run.zarr"}
    assert [times[-5:] for times in steps["run.zarr"].values()] == [[16, 17, 18, 19, 20]] * 2


def test_what_turns_out_to_be_long_has_a_run_of_its_own_and_the_other_goes_on_in_its_own(script_run, read, tmp_path):
    optimizer = training()
    train(optimizer, steps=12)
    for steps in (2, 15):
        longer = training()
        train(longer, steps=steps)
        train(optimizer, steps=12)
    script_run.end()
    assert runs(read, tmp_path) == {
        "run.zarr": {("fc.weight", "SGD"): upto(36)},
        "run-2.zarr": {("fc.weight", "SGD"): upto(5)},  # from its eleventh step on
    }


def test_one_that_steps_by_turns_with_a_training_is_recorded_with_it(script_run, read, tmp_path):
    optimizer = training()
    train(optimizer, steps=12)
    probe = training()
    train(probe, steps=2)
    train(optimizer)
    late = training()
    train(late, optimizer, steps=23)
    script_run.end()
    found = runs(read, tmp_path)
    assert found["run.zarr"] == {("fc.weight", "SGD"): upto(24)}
    assert {name: steps[-1] for (name, _), steps in found["run-2.zarr"].items()} == {"Net.fc.weight": 13, "Net2.fc.weight": 13}
    assert script_run.outcome.endswith("; 1 short-lived optimizer (of at most 10 steps) was passed over")


def test_a_run_that_the_script_records_to_by_itself_is_not_removed(script_run, read, tmp_path):
    optimizer = training()
    train(optimizer)
    with attach(optimizer, optimizer.model, tmp_path / "run.zarr", every=1):
        train(optimizer)
    other = training()
    train(other, steps=11)
    script_run.end()
    found = runs(read, tmp_path)
    assert found["run.zarr"]["fc.weight", "SGD"] == upto(4)
    assert found["run-2.zarr"]["fc.weight", "SGD"] == upto(11)


@pytest.fixture
def held(monkeypatch):
    """Makes something a global of the script."""
    return lambda name, thing: monkeypatch.setitem(vars(sys.modules["__main__"]), name, thing)


def test_several_models_have_the_names_of_the_scripts_globals(script_run, read, tmp_path, held):
    pair = Net(), Net()
    held("_hidden", pair[0])
    held("D", pair[0])
    held("netD", pair[0])
    held("G", pair[1])
    train(*(torch.optim.SGD(model.parameters(), lr=0.1) for model in pair))
    script_run.end()
    assert [name for name, _ in recorded(read(tmp_path / "run.zarr"))] == ["D.fc.weight", "G.fc.weight"]


def test_one_optimizer_of_two_models_and_one_that_is_no_global(script_run, read, tmp_path, held):
    G, other, clash = Net(), Net(), Net()
    held("G", G)
    held("Net", clash)
    train(torch.optim.SGD([*G.parameters(), *other.parameters(), *clash.parameters()], lr=0.1))
    script_run.end()
    names = [name for name, _ in recorded(read(tmp_path / "run.zarr"))]
    assert names[0] == "G.fc.weight"
    assert sorted(names[1:]) == ["Net.fc.weight", "Net2.fc.weight"]


def test_one_model_keeps_its_own_names(script_run, read, tmp_path, held):
    optimizer = training()
    held("G", optimizer.model)
    train(optimizer)
    script_run.end()
    assert [name for name, _ in recorded(read(tmp_path / "run.zarr"))] == ["fc.weight"]


def test_a_global_that_is_asked_for_its_class_is_left_alone(held):
    class Proxy:
        @property
        def __class__(self):
            raise AssertionError("asked")

        def __eq__(self, other):
            raise AssertionError("asked")

        __hash__ = None

    model = Net()
    held("proxy", Proxy())
    held("not a name", model)
    assert global_name(model) is None
    held("model", model)
    assert global_name(model) == "model"
    assert list(dict(Several([model, Net()]).named_children())) == ["model", "Net"]
