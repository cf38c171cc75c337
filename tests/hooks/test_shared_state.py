"""Optimizers that keep something of several matrices together: their groups are not split, and what shows only later is said."""

from typing import Any

import pytest
import torch
from muons import EQUAL, MUONS, TwoLayers, make, operator_of, schedule_of, train
from stacking_muons import STACKING, ByAPlan, GroupMuon, InOneMemory, InTheGroup, OnTheOptimizer, UnderAnotherKey, by_operator, by_shape
from torch import Tensor
from torch.optim import Optimizer

from optiscope.diagnostics import JORDAN
from optiscope.hooks import apply_schedule
from optiscope.hooks.acting.group_splitting import split_by_operator

FIVE_STEPS = schedule_of(**dict.fromkeys(("attn_q", "attn_v", "mlp_up", "other"), (JORDAN,) * 5))
NAMES = {
    GroupMuon: r"`momentum_buffer` of shape \(4, 16, 16\) under one of 4 parameters of shape \(16, 16\)",
    InTheGroup: r"`momentum_buffer` of shape \(4, 16, 16\) in the parameter group",
    OnTheOptimizer: r"`buffers\.0` of shape \(4, 16, 16\) on the optimizer itself",
    UnderAnotherKey: r"`tuple\.momentum_buffer` of shape \(4, 16, 16\) in its state, under a key that is no parameter",
    InOneMemory: r"`momentum_buffer` of several parameters in the same memory",
}


@pytest.mark.parametrize("kind", STACKING)
def test_split_would_mix_momenta_up(kind: type[GroupMuon]) -> None:
    """The trap: split by hand, with the same number of steps for all, the training is another one, or ends."""
    results = []
    for split in (False, True):
        model = TwoLayers()
        optimizer = kind(by_shape(model))
        train(model, optimizer, 0, 2)
        if split:
            by_hand(optimizer, model)
        try:
            train(model, optimizer, 2, 4)
        except (RuntimeError, ValueError):
            assert split
        results.append(model.as_bytes())
    assert results[0] != results[1]


def by_hand(optimizer: Optimizer, model: TwoLayers) -> None:
    """The split alone."""
    names = {id(p): operator_of(name) for name, p in model.of_muon().items()}
    optimizer.param_groups[:] = [
        part for parts in split_by_operator(optimizer, lambda p: names[id(p)], lambda group: True) for part in parts
    ]


@pytest.mark.parametrize("kind", STACKING)
def test_group_whose_state_is_of_several_matrices_is_not_split(kind: type[GroupMuon]) -> None:
    results = []
    for tried in (False, True):
        model = TwoLayers()
        optimizer = kind(by_shape(model))
        train(model, optimizer, 0, 2)
        if tried:
            groups = list(optimizer.param_groups)
            with pytest.raises(
                ValueError,
                match=rf"^optimizer: stacking_muons\.{kind.__name__} keeps {NAMES[kind]}: not of one matrix alone\. .* build the optimizer with a "
                r"parameter group per operator$",
            ):
                apply_schedule(optimizer, FIVE_STEPS, model)
            assert all(a is b for a, b in zip(groups, optimizer.param_groups, strict=True))
        train(model, optimizer, 2, 4)
        results.append(model.as_bytes())
    assert results[0] == results[1]


@pytest.mark.parametrize("when", [0, 2], ids=["before the first step", "after two"])
@pytest.mark.parametrize("kind", STACKING)
def test_groups_that_need_no_split(kind: type[GroupMuon], when: int) -> None:
    """A group per operator, as the refusal advises: nothing else changes, at any time."""
    results = []
    for scheduled in (False, True):
        model = TwoLayers()
        optimizer = kind(by_operator(model, operator_of))
        train(model, optimizer, 0, when)
        if scheduled:
            assert apply_schedule(optimizer, FIVE_STEPS, model) == {"attn_q": 2, "other": 2, "attn_v": 2, "mlp_up": 2}
        train(model, optimizer, when, 4)
        results.append(model.as_bytes())
    assert results[0] == results[1]


@pytest.mark.parametrize("kind", STACKING)
def test_before_the_first_step_a_split_is_right(kind: type[GroupMuon], caplog: pytest.LogCaptureFixture) -> None:
    """Nothing is kept yet: the optimizer stacks the groups as it finds them, as it would have had they been built so."""
    results = []
    for split in (False, True):
        model = TwoLayers()
        optimizer = kind(by_shape(model) if split else by_operator(model, operator_of))
        if split:
            apply_schedule(optimizer, FIVE_STEPS, model)
            assert len(optimizer.param_groups) == 4
        train(model, optimizer, 0, 4)
        results.append(model.as_bytes())
    assert results[0] == results[1]
    assert not told(caplog)


def told(caplog: pytest.LogCaptureFixture) -> list[str]:
    """But for what is said of every optimizer that takes a number of steps alone."""
    return [
        record.getMessage() for record in caplog.records if "takes a number of Newton–Schulz steps per group" not in record.getMessage()
    ]


def test_groups_noted_when_it_was_built_are_told_of_after_the_first_step(caplog: pytest.LogCaptureFixture) -> None:
    """Once, without a change to the training."""
    results = []
    for scheduled in (False, True):
        model = TwoLayers()
        optimizer = ByAPlan(by_shape(model))
        if scheduled:
            apply_schedule(optimizer, FIVE_STEPS, model)
        assert not told(caplog)
        train(model, optimizer, 0, 3)
        results.append(model.as_bytes())
    assert results[0] == results[1]
    [message] = told(caplog)
    assert message.startswith(
        "optiscope: after the first step under the schedule stacking_muons.ByAPlan keeps `momentum_buffer` of shape (4, 16, 16) under one of 2 "
        "parameters of shape (16, 16): it goes by groups that it noted before the schedule split them"
    )


def test_nothing_that_the_look_raises_reaches_the_training(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    model = TwoLayers()
    optimizer = GroupMuon(by_shape(model))
    apply_schedule(optimizer, FIVE_STEPS, model)
    monkeypatch.setattr("optiscope.hooks.acting.shared_state._across_parts", lambda *_: 1 / 0)
    train(model, optimizer, 0, 2)
    assert not told(caplog)


# What is of one parameter, whatever its form


@pytest.mark.parametrize("name", MUONS)
def test_what_libraries_keep_is_no_obstacle(name: str, caplog: pytest.LogCaptureFixture) -> None:
    """Flat second moments, (m, 1) statistics, numbers."""
    model, optimizer = make(name)
    train(model, optimizer, 0, 2)
    assert apply_schedule(optimizer, EQUAL, model)
    train(model, optimizer, 2, 3)
    assert not told(caplog)


class Keeping(Optimizer):
    """Keeps of every matrix what it is given."""

    def __init__(self, params: Any, kept: dict[str, Any], only_first: bool = False) -> None:
        super().__init__(params, {"lr": 0.1, "ns_steps": 5, "ns_coefficients": [JORDAN]})
        for p in self.param_groups[0]["params"][: 1 if only_first else None]:
            self.state[p].update({key: value(p) for key, value in kept.items()})

    @torch.no_grad()
    def step(self, closure: None = None) -> None:
        pass


OWN = {
    "as the parameter": lambda p: torch.zeros_like(p),
    "flat": lambda p: torch.zeros(p.numel()),
    "rows": lambda p: torch.zeros(p.shape[0], 1),
    "columns": lambda p: torch.zeros(p.shape[1]),
    "low rank": lambda p: torch.zeros(p.shape[0], 3),
    "Kronecker": lambda p: [torch.zeros(p.shape[0], p.shape[0]), torch.zeros(p.shape[1], p.shape[1])],
    "batch of one": lambda p: torch.zeros(1, *p.shape),
    "history": lambda p: torch.zeros(6, *p.shape),
    "number": lambda p: torch.zeros(()),
    "encoded": lambda p: {"values": torch.zeros(p.numel() // 2, dtype=torch.uint8), "scale": torch.zeros(p.numel() // 64)},
}


@pytest.mark.parametrize("form", OWN)
def test_forms_of_one_parameters_state(form: str) -> None:
    model = TwoLayers()
    optimizer = Keeping(model.of_muon().values(), {"kept": OWN[form]})
    assert apply_schedule(optimizer, FIVE_STEPS, model)
    optimizer.step()


@pytest.mark.parametrize("form", ["as the parameter", "flat", "rows", "columns", "low rank", "Kronecker", "number"])
def test_the_only_one_with_a_gradient_is_no_stack(form: str) -> None:
    """Three matrices of 16 × 16 in one group, of which one has a state."""
    model = TwoLayers()
    matrices = [p for p in model.of_muon().values() if p.shape == (16, 16)][:3]
    assert apply_schedule(Keeping(matrices, {"kept": OWN[form]}, only_first=True), FIVE_STEPS, model)


SHARED: dict[str, Any] = {
    "stack": lambda p: torch.zeros(4, *p.shape),
    "stack of rows": lambda p: torch.zeros(4, p.shape[0], 1),
    "stack of numbers": lambda p: torch.zeros(4),
    "row by row": lambda p: torch.zeros(4 * p.shape[0], p.shape[1]),
    "flat": lambda p: torch.zeros(4 * p.numel()),
    "a rank's part, with its padding": lambda p: torch.zeros(2, *p.shape),
    "a rank's part of one": lambda p: torch.zeros(1, *p.shape),
}


@pytest.mark.parametrize("form", SHARED)
def test_forms_of_a_groups_state(form: str) -> None:
    """Under the first of four; with as many matrices as rows too, where a stack of numbers could be a statistic of rows."""
    for count in (4, 16):
        model = TwoLayers()
        own = [p for p in model.of_muon().values() if p.shape == (16, 16)]
        extra = [torch.nn.Parameter(torch.zeros(16, 16)) for _ in range(count - 4)]

        def kept(p: Tensor) -> Tensor:
            tensor = SHARED[form](p)
            return tensor.repeat(count // 4, *[1] * (tensor.ndim - 1)) if tensor.shape[0] % 4 == 0 else tensor  # noqa: B023

        optimizer = Keeping([*own, *extra], {"kept": kept}, only_first=True)
        with pytest.raises(ValueError, match=rf"^optimizer: .* keeps `kept` of shape .* under one of {count} parameters"):
            apply_schedule(optimizer, FIVE_STEPS, model)


def test_count_that_is_a_groups_own() -> None:
    """Under the first parameter beside what every one has: the part without it would begin to count anew."""
    model = TwoLayers()
    optimizer = Keeping(model.of_muon().values(), {"momentum_buffer": torch.zeros_like})
    optimizer.state[next(iter(model.of_muon().values()))]["step"] = 7
    with pytest.raises(ValueError, match=r"keeps `step` under the first of 8 parameters only: "):
        apply_schedule(optimizer, FIVE_STEPS, model)


def test_one_tensor_in_several_states() -> None:
    model = TwoLayers()
    count = torch.zeros(())
    optimizer = Keeping(model.of_muon().values(), {"momentum_buffer": torch.zeros_like, "step": lambda p: count})
    with pytest.raises(ValueError, match="keeps `step` of several parameters in the same memory: "):
        apply_schedule(optimizer, FIVE_STEPS, model)


def test_attributes_that_hold_no_momenta() -> None:
    """Numbers, parameters by name, what is kept by parameter, a short list of numbers."""
    model = TwoLayers()
    optimizer: Any = Keeping(model.of_muon().values(), {"momentum_buffer": torch.zeros_like})
    optimizer.lr_tensor, optimizer.names = torch.zeros(()), dict(model.named_parameters())
    optimizer.average = {p: torch.zeros_like(p) for p in model.of_muon().values()}
    optimizer.by_id = {id(p): torch.zeros_like(p) for p in model.of_muon().values()}
    optimizer.levels = torch.zeros(7)
    optimizer.param_groups[0]["betas"] = torch.tensor([0.9, 0.95])
    optimizer.state[torch.nn.Parameter(torch.zeros(3, 3))]["momentum_buffer"] = torch.zeros(3, 3)  # has left the groups
    assert apply_schedule(optimizer, FIVE_STEPS, model)
