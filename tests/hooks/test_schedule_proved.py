"""`apply_schedule` on Muons of one's own: fields that are found by watching a copy, and a schedule that is refused where the copy does not follow it."""

import logging
from typing import Any

import pytest
import torch
from muons import TwoLayers, newton_schulz, schedule_of, train
from torch import Tensor
from torch.optim import Optimizer

from optiscope.hooks import apply_schedule
from optiscope.hooks.acting.proving import fields_by_watching, iteration_of

JORDAN = (3.4445, -4.7750, 2.0315)
FIRST, SECOND = (4.0, -6.0, 2.5), (3.0, -4.0, 1.7)


class OwnFields(Optimizer):
    """A Muon whose settings have names of its own."""

    def __init__(self, params: Any, **settings: Any) -> None:
        super().__init__(params, {"lr": 0.0, **settings})

    def triples(self, group: dict[str, Any]) -> list[Any]:
        return [JORDAN] * group["iterations"]

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]
        for group in self.param_groups:
            for p in group["params"]:
                momentum: Tensor = self.state[p].setdefault("momentum_buffer", torch.zeros_like(p))
                momentum.lerp_(p.grad, 0.05)
                p.sub_(newton_schulz(momentum, self.triples(group), torch.float32), alpha=group["lr"])


class OwnList(OwnFields):
    """Its coefficients are in the group, as many as it runs."""

    def triples(self, group: dict[str, Any]) -> list[Any]:
        return group["polynomial"]


class OwnBoth(OwnFields):
    """Its list holds a triple for each of the steps that another field tells."""

    def triples(self, group: dict[str, Any]) -> list[Any]:
        return [group["polynomial"][i] for i in range(group["iterations"])]


class Usual(OwnFields):
    """The same under the usual name of the steps."""

    def triples(self, group: dict[str, Any]) -> list[Any]:
        return [group["polynomial"][i] for i in range(group["ns_steps"])]


class Deaf(OwnFields):
    """Has a field of that name, and runs five steps whatever it says."""

    def triples(self, group: dict[str, Any]) -> list[Any]:
        return [JORDAN] * 5


def made(cls: type[OwnFields], **settings: Any) -> tuple[TwoLayers, Any]:
    torch.manual_seed(0)
    model = TwoLayers()
    return model, cls(list(model.of_muon().values()), **settings)


def schedule_for(model: TwoLayers, *coefficients: tuple[float, float, float]) -> Any:
    from muons import operator_of

    return schedule_of(**{operator_of(name): coefficients for name in model.of_muon()})


def test_the_field_of_steps_is_found_and_nothing_drawn_or_changed() -> None:
    model, optimizer = made(OwnFields, iterations=5, warmup=5)
    before, state = model.as_bytes(), torch.get_rng_state()
    fields = fields_by_watching(optimizer, optimizer.param_groups[0])
    assert fields is not None
    assert (fields.steps, fields.coefficients) == ("iterations", None)
    assert model.as_bytes() == before
    assert torch.equal(torch.get_rng_state(), state)
    assert not optimizer.state


def test_steps_are_put_into_force_through_it(caplog: pytest.LogCaptureFixture) -> None:
    model, optimizer = made(OwnFields, iterations=5)
    with caplog.at_level(logging.WARNING, "optiscope"):
        apply_schedule(optimizer, schedule_for(model, FIRST, SECOND, SECOND), model)
    assert "no coefficients" in caplog.text
    assert {group["iterations"] for group in optimizer.param_groups} == {3}
    assert {iteration_of(optimizer, group) for group in optimizer.param_groups} == {(JORDAN,) * 3}


def test_a_list_of_coefficients_is_found_and_put_into_force() -> None:
    model, optimizer = made(OwnList, polynomial=[JORDAN] * 5)
    apply_schedule(optimizer, schedule_for(model, FIRST, SECOND), model)
    for group in optimizer.param_groups:
        assert group["polynomial"] == [FIRST, SECOND]
        found = iteration_of(optimizer, group)
        assert len(found) == 2
        torch.testing.assert_close(torch.tensor(found), torch.tensor([FIRST, SECOND]), rtol=1e-4, atol=0)
    train(model, optimizer, 0, 3)


@pytest.mark.parametrize("steps", [1, 2, 5])
def test_steps_and_a_list_as_long_are_found_together(steps: int) -> None:
    """With one step alone: neither two of them without a second triple, nor two triples without a second step, show anything."""
    model, optimizer = made(OwnBoth, iterations=steps, polynomial=[JORDAN] * steps)
    apply_schedule(optimizer, schedule_for(model, FIRST, SECOND, SECOND), model)
    for group in optimizer.param_groups:
        assert (group["iterations"], group["polynomial"]) == (3, [FIRST, SECOND, SECOND])
    train(model, optimizer, 0, 2)


def test_a_list_of_a_name_of_its_own_is_found_beside_steps_of_the_usual_name() -> None:
    model, optimizer = made(Usual, ns_steps=5, polynomial=[JORDAN] * 5)
    apply_schedule(optimizer, schedule_for(model, FIRST, SECOND), model)
    for group in optimizer.param_groups:
        assert (group["ns_steps"], group["polynomial"]) == (2, [FIRST, SECOND])


def test_a_schedule_that_a_copy_does_not_follow_is_refused() -> None:
    model, optimizer = made(Deaf, ns_steps=5)
    before = [dict(group) for group in optimizer.param_groups]
    with pytest.raises(ValueError, match=r"does not follow it: a copy that was set to the 3 steps of \w+ ran 5 steps; nothing was changed"):
        apply_schedule(optimizer, schedule_for(model, FIRST, SECOND, SECOND), model)
    assert [{k: v for k, v in group.items() if k != "params"} for group in optimizer.param_groups] == [
        {k: v for k, v in group.items() if k != "params"} for group in before
    ]


def test_it_is_put_into_force_when_forced(caplog: pytest.LogCaptureFixture) -> None:
    model, optimizer = made(Deaf, ns_steps=5)
    with caplog.at_level(logging.WARNING, "optiscope"):
        apply_schedule(optimizer, schedule_for(model, FIRST, SECOND, SECOND), model, force=True)
    assert "forced" in caplog.text
    assert {group["ns_steps"] for group in optimizer.param_groups} == {3}


def test_a_class_that_no_field_steers_is_refused() -> None:
    model, optimizer = made(Deaf, iterations=5)
    with pytest.raises(TypeError, match="hold none"):
        apply_schedule(optimizer, schedule_for(model, FIRST), model)
