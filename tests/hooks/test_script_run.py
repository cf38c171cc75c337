"""What a script trains is found and recorded, whatever it makes, replaces and throws away, without its knowing."""

import gc
import logging
import time
import weakref
from types import SimpleNamespace

import pytest
import torch
import zarr
from script_runs import recorded, train
from torch import nn

from optiscope.hooks import attach
from optiscope.hooks.trainers import script_run as module
from optiscope.hooks.trainers.model_search import Several, owners, parameters_of


@pytest.fixture
def passing(monkeypatch):
    """Lets time pass: a function of how many seconds."""
    passed = [0.0]
    monkeypatch.setattr(module, "time", SimpleNamespace(perf_counter=lambda: time.perf_counter() + passed[0]))
    return lambda seconds: passed.append(passed.pop() + seconds)


@pytest.fixture
def hurried(script_run, monkeypatch):
    """The same run, of whose time next to nothing may be spent: after its first beginning, seconds are owed as hours."""
    monkeypatch.setattr(module, "GRACE", 0)
    monkeypatch.setattr(script_run, "_overhead", 1e-4)
    return script_run


def told_by_the_run(caplog):
    return [record.getMessage() for record in caplog.records if record.module == "script_run"]


class Generator(nn.Module):
    def __init__(self, width=4):
        super().__init__()
        self.up_proj, self.down_proj = nn.Linear(3, width, bias=False), nn.Linear(width, 3)


class Discriminator(nn.Module):
    def __init__(self):
        super().__init__()
        self.fc1 = nn.Linear(3, 5)


def test_every_living_optimizer_is_recorded_from_its_first_step_on(script_run, read, tmp_path):
    model = Generator()
    last = torch.optim.AdamW(model.down_proj.parameters())
    first = torch.optim.Muon(model.up_proj.parameters())
    train(first, last)
    script_run.end()
    assert recorded(read(tmp_path / "run.zarr")) == {("up_proj.weight", "Muon"): [1, 2], ("down_proj.weight", "AdamW"): [1, 2]}
    assert script_run.outcome == f"{tmp_path / 'run.zarr'} holds 2 records, the last of step 2"


def test_optimizers_of_one_class_are_numbered_in_the_models_order(script_run, read, tmp_path):
    model = nn.ModuleList(nn.Linear(2, 2, bias=False) for _ in range(4))
    optimizers = [torch.optim.SGD(model[i].parameters(), lr=0.1) for i in (3, 1, 0, 2)]
    train(*optimizers, steps=1)
    script_run.end()
    # The one that steps first comes first.
    labels = ["SGD#2", "SGD#3", "SGD#4", "SGD"]
    assert recorded(read(tmp_path / "run.zarr")) == {(f"{i}.weight", label): [1] for i, label in enumerate(labels)}


def test_an_optimizer_made_later_joins(script_run, read, tmp_path):
    model = Generator()
    first = torch.optim.SGD(model.up_proj.parameters(), lr=0.1)
    train(first)
    late = torch.optim.AdamW(model.down_proj.parameters())
    train(first, late)
    script_run.end()
    steps = recorded(read(tmp_path / "run.zarr"))
    assert steps["up_proj.weight", "SGD"] == [1, 2, 3, 4]
    # Met inside the third step, whose record is complete by then: its own first step is in no record, and no step is counted twice.
    assert steps["down_proj.weight", "AdamW"] == [4]


def test_an_optimizer_that_replaces_another_is_recorded_behind_it(script_run, read, tmp_path):
    model = Generator()
    up, down = torch.optim.SGD(model.up_proj.parameters(), lr=0.1), torch.optim.SGD(model.down_proj.parameters(), lr=0.1)
    train(up, down)
    new = torch.optim.SGD(model.up_proj.parameters(), lr=0.01)
    train(new, down)
    script_run.end()
    # The one that stays goes on being recorded.
    assert recorded(read(tmp_path / "run.zarr")) == {
        ("up_proj.weight", "SGD"): [1, 2, 3, 4],
        ("down_proj.weight", "SGD#2"): [1, 2, 3, 4],
    }


def test_an_optimizer_without_a_matrix_harms_nothing(script_run, read, tmp_path):
    model = Generator()
    biases = torch.optim.SGD([model.down_proj.bias], lr=0.1)
    train(biases)
    assert not (tmp_path / "run.zarr").exists()
    matrices = torch.optim.SGD([model.down_proj.weight], lr=0.1)
    train(biases, matrices)
    script_run.end()
    assert {name for name, _ in recorded(read(tmp_path / "run.zarr"))} == {"down_proj.weight"}


def test_two_models_at_once_are_told_apart_by_their_classes(script_run, read, tmp_path):
    pair = Generator(), Discriminator()
    train(*(torch.optim.SGD(model.parameters(), lr=0.1) for model in pair))
    script_run.end()
    names = [name for name, _ in recorded(read(tmp_path / "run.zarr"))]
    assert names == [f"Generator.{x}_proj.weight" for x in ("up", "down")] + ["Discriminator.fc1.weight"]


def test_a_second_training_has_a_run_of_its_own_and_the_first_is_let_go_of(script_run, read, tmp_path, monkeypatch):
    # pytest keeps what is logged, a caught exception with all that its frames hold among it.
    monkeypatch.setattr(logging.getLogger("optiscope"), "disabled", True)
    model = Generator()
    optimizer = torch.optim.Adam(model.parameters())
    train(optimizer, steps=11)
    gone = weakref.ref(model), weakref.ref(optimizer), weakref.ref(model.up_proj.weight)
    del model, optimizer
    gc.collect()
    model = Generator(width=7)
    train(torch.optim.Adam(model.parameters()), steps=12)
    gc.collect()
    assert [reference() for reference in gone] == [None] * 3
    script_run.end()
    for path, steps in (("run.zarr", 11), ("run-2.zarr", 12)):
        assert recorded(read(tmp_path / path)) == {(f"{x}_proj.weight", "Adam"): list(range(1, steps + 1)) for x in ("up", "down")}
    assert script_run.outcome.count(" holds ") == 2


def test_one_let_go_of_too_early_is_recorded_together_with_the_other(script_run, read, tmp_path):
    first = torch.optim.SGD((one := Generator()).parameters(), lr=0.1)
    train(first)
    second = torch.optim.SGD((two := Discriminator()).parameters(), lr=0.1)
    train(second, first, steps=3)
    script_run.end()
    runs = [recorded(read(path)) for path in sorted(tmp_path.iterdir(), key=lambda path: path.stat().st_mtime)]
    assert one is not two
    assert {name for name, _ in runs[-1]} == {"Generator.up_proj.weight", "Generator.down_proj.weight", "Discriminator.fc1.weight"}
    assert all(len(steps) >= 2 for steps in runs[-1].values())
    assert "passed over" not in script_run.outcome


def test_optimizers_that_take_turns_are_recorded_until_they_do(script_run, read, tmp_path, caplog):
    model = Discriminator()
    before = model.fc1.weight.detach().clone()
    turns = torch.optim.SGD(model.parameters(), lr=0.1), torch.optim.Adam(model.parameters()), torch.optim.SGD(model.parameters(), lr=0.2)
    train(*turns, steps=5)
    script_run.end()
    # Each is attached to once, at its first step, and the last one stays.
    assert {path.name: recorded(read(path)) for path in tmp_path.iterdir()} == {"run.zarr": {("fc1.weight", "SGD"): [1, 2, 3, 4, 5]}}
    assert told_by_the_run(caplog) == [
        "optiscope: SGD takes turns with another optimizer of the same parameters; it is not recorded any more"
    ]
    # All fifteen steps were taken; a constant gradient g makes Adam's −lr·g/(|g| + eps).
    gradient = torch.linspace(-1, 2, 15).view(5, 3).sin()
    torch.testing.assert_close(model.fc1.weight.detach(), before - 5 * (0.3 * gradient + 1e-3 * gradient / (gradient.abs() + 1e-8)))


def test_an_optimizer_inside_one_that_takes_turns_is_no_new_one(script_run, tmp_path):
    class Lookahead(torch.optim.Optimizer):
        def __init__(self, optimizer):
            self.optimizer = optimizer
            super().__init__(optimizer.param_groups, {})

        def step(self, closure=None):
            return self.optimizer.step(closure)

    model = Discriminator()
    train(Lookahead(torch.optim.SGD(model.parameters(), lr=0.1)), torch.optim.SGD(model.parameters(), lr=0.1), steps=4)
    assert len(list(tmp_path.iterdir())) == 2


def test_optimizers_made_anew_at_every_turn_are_recorded_while_time_allows(hurried, read, tmp_path, passing, caplog):
    model, counted = Discriminator(), Discriminator()
    counted.load_state_dict(model.state_dict())
    for _ in range(20):
        train(torch.optim.SGD(model.parameters(), lr=0.1), steps=3)
    passing(hurried._look_again - time.perf_counter())
    for _ in range(20):
        train(torch.optim.SGD(model.parameters(), lr=0.1), steps=3)
    hurried.end()
    # One of the first twenty, and one of the second: of its own three steps, counted on from those of the first.
    assert recorded(read(tmp_path / "run.zarr")) == {("fc1.weight", "SGD"): [1, 2, 3, 4, 5, 6]}
    assert len(zarr.open_group(tmp_path / "run.zarr").attrs["continued"]) == 1
    assert [path.name for path in tmp_path.iterdir()] == ["run.zarr"]
    told = [r.getMessage() for r in caplog.records if "is recorded after them" not in r.getMessage()]
    assert told == ["optiscope: optimizers are made too often to record each of them; further ones, as this SGD, are not recorded for now"]
    # Every step was taken: weight − lr·gradient, 120 times.
    gradient = torch.linspace(-1, 2, 15).view(5, 3).sin()
    torch.testing.assert_close(model.fc1.weight.detach(), counted.fc1.weight.detach() - 12 * gradient)


def test_one_that_was_passed_over_is_recorded_once_there_is_time(hurried, read, tmp_path, passing):
    train(torch.optim.SGD(Generator().parameters(), lr=0.1))
    late = torch.optim.SGD((model := Discriminator()).parameters(), lr=0.1)
    train(late, steps=3)
    assert {name for name, _ in recorded(read(tmp_path / "run.zarr"))} == {"SGD.group0.param0", "SGD.group0.param1"}
    passing(1e6)
    train(late, steps=4)
    hurried.end()
    # In the place of the first one, which took two steps.
    assert recorded(read(tmp_path / "run.zarr")) == {("fc1.weight", "SGD"): [1, 2, 3, 4]}
    assert model is not None


def test_a_training_that_is_passed_over_does_not_share_its_memory_with_the_one_before(hurried, monkeypatch):
    monkeypatch.setattr(logging.getLogger("optiscope"), "disabled", True)
    model = Generator()
    optimizer = torch.optim.Adam(model.parameters())
    train(optimizer)
    gone = weakref.ref(model), weakref.ref(optimizer), weakref.ref(model.up_proj.weight)
    del model, optimizer
    train(torch.optim.Adam(Discriminator().parameters()), steps=1)
    gc.collect()
    assert [reference() for reference in gone] == [None] * 3


def test_an_optimizer_may_join_after_the_recorder_was_closed(script_run, read, tmp_path, caplog):
    model = Generator()
    first = torch.optim.SGD(model.up_proj.parameters(), lr=0.1)
    train(first)
    # The script records to the same path by itself.
    with attach(first, model, tmp_path / "run.zarr", every=1):
        late = torch.optim.SGD(model.down_proj.parameters(), lr=0.1)
        train(late, first)
    assert not late._optimizer_step_pre_hooks
    assert not late._optimizer_step_post_hooks
    assert "is closed: the script records by itself" in caplog.text
    script_run.end()
    assert recorded(read(tmp_path / "run.zarr")) == {("up_proj.weight", "SGD"): [1, 2, 3, 4]}


def test_an_optimizer_that_raises_when_it_is_looked_at_is_left_alone(script_run, read, tmp_path):
    class Odd(torch.optim.SGD):
        @property
        def optimizer(self):
            raise RuntimeError("asked")

    class Odder(torch.optim.SGD):
        @property
        def param_groups(self):
            raise RuntimeError("asked")

    class Unmade(Odder):
        def __init__(self):
            pass

    unrelated = Odd([nn.Parameter(torch.ones(2, 2))], lr=0.1), Unmade()
    model = Discriminator()
    train(torch.optim.SGD(model.parameters(), lr=0.1))
    script_run.end()
    assert recorded(read(tmp_path / "run.zarr"))["fc1.weight", "SGD"] == [1, 2]
    assert len(unrelated) == 2


def test_without_a_model_names_are_numbers(script_run, read, tmp_path, caplog):
    weights = [nn.Parameter(torch.ones(2, 3)), nn.Parameter(torch.ones(3, 2))]
    train(torch.optim.SGD(weights, lr=0.1))
    script_run.end()
    assert [name for name, _ in recorded(read(tmp_path / "run.zarr"))] == ["SGD.group0.param0", "SGD.group0.param1"]
    assert [r.getMessage() for r in caplog.records] == [
        "optiscope: no module was found that holds 2 of the matrices of SGD; these are named by optimizer and group"
    ]


def test_a_store_that_cannot_be_written_stops_no_training(script_run, tmp_path, caplog):
    (tmp_path / "run.zarr").write_text("mine")
    (tmp_path / "run-2.zarr").write_text("mine")
    (tmp_path / "run-3.zarr").mkdir(mode=0o700)
    (tmp_path / "run-3.zarr" / "notes").write_text("mine")
    model = Discriminator()
    before = model.fc1.weight.detach().clone()
    tmp_path.chmod(0o500)
    try:
        train(torch.optim.SGD(model.parameters(), lr=0.1))
    finally:
        tmp_path.chmod(0o700)
    # The step is still taken: weight − 2·lr·gradient.
    gradient = torch.linspace(-1, 2, 15).view(5, 3).sin()
    torch.testing.assert_close(model.fc1.weight.detach(), before - 0.2 * gradient)
    assert (tmp_path / "run.zarr").read_text() == "mine"


class Wrapper(nn.Module):
    """What torch.compile and DistributedDataParallel do: the model is a module of theirs."""

    def __init__(self, module):
        super().__init__()
        self.module = module

    def parameters(self, recurse=True):
        raise AssertionError("nothing of a script's own is to run")

    modules = children = named_parameters = parameters


class Proxy:
    """Answers isinstance, and everything else, by doing something."""

    @property
    def __class__(self):
        raise AssertionError("asked")

    def __getattr__(self, name):
        raise AssertionError("asked")


def test_the_owner_is_the_outermost_module():
    proxy = Proxy()
    with pytest.raises(AssertionError, match="asked"):
        isinstance(proxy, nn.Module)
    model = Generator()
    wrapped = Wrapper(model)
    copy = Generator()
    assert owners(model.parameters()) == [wrapped]
    assert owners([model.up_proj.weight]) == [wrapped]
    assert owners(copy.parameters()) == [copy]
    assert owners([torch.ones(2)]) == []
    assert parameters_of(wrapped) == list(model.parameters())


def test_of_several_owners_it_is_the_one_that_owns_most_then_the_smallest():
    model, other = Generator(), Discriminator()
    trainer = nn.ModuleDict({"model": model, "other": other})
    part = nn.ModuleList([model.up_proj])
    tight = nn.ModuleList([model])
    assert owners(model.parameters()) == [tight]
    assert owners([*model.parameters(), *other.parameters()]) == [trainer]
    assert owners([model.up_proj.weight]) == [part]


def test_tied_weights_and_modules_within_each_other_are_seen_once():
    model = nn.ModuleList([nn.Linear(2, 2, bias=False), nn.Linear(2, 2, bias=False)])
    model[1].weight = model[0].weight
    model[0].neighbour, model[1].neighbour = model[1], model[0]
    assert parameters_of(model) == [model[0].weight]
    assert owners([model[1].weight]) == [model]


def test_several_modules_keep_their_parameters_and_get_distinct_names():
    models = [Discriminator(), Generator(), Discriminator()]
    named = dict(Several(models).named_parameters())
    assert {name.split(".")[0] for name in named} == {"Discriminator", "Generator", "Discriminator2"}
    assert list(map(id, named.values())) == [id(p) for model in models for p in model.parameters()]
