"""A schedule of other shapes, or of more steps than an optimizer has coefficients for, is not put into force without a word."""

import functools
import logging
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from muons import QUINTIC, UNEQUAL, TwoLayers, make, newton_schulz, schedule_of, train
from stacking_muons import FIVE, GroupMuon, by_operator
from torch import Tensor, nn
from torch.optim import Muon, Optimizer

from optiscope.analysis import derive_schedule, open_run
from optiscope.diagnostics import JORDAN, Schedule
from optiscope.examples.optimizers.teon import TEON
from optiscope.hooks import apply_schedule, attach

from muons import operator_of  # isort: skip

SHAPES = {"attn_q": (16, 16), "attn_v": (8, 16), "mlp_up": (40, 16)}


def shaped(schedule: Schedule, **shapes: tuple[int, int]) -> Schedule:
    """The schedule as if it were derived from matrices of these shapes, in a run."""
    operators = {name: replace(entry, shapes=(shapes[name],) if name in shapes else ()) for name, entry in schedule.operators.items()}
    return replace(schedule, operators=operators, provenance={"run": "small/run.zarr", "run_created": "2026-11-30T12:00:00+00:00"})


# Shapes


def recorded(width: int, tmp_path: Path) -> tuple[nn.Module, Muon, Schedule]:
    """A small training and what is derived from it; operators have the same names at every width."""
    torch.manual_seed(0)
    model = nn.ModuleDict(
        {f"{layer}": nn.ModuleDict({"q_proj": nn.Linear(width, width), "up_proj": nn.Linear(width, 3 * width)}) for layer in "01"}
    )
    optimizer = Muon([p for p in model.parameters() if p.ndim == 2], lr=0.01)
    with attach(optimizer, model, tmp_path / f"{width}.zarr", every=1, on_error="raise"):
        for step in range(3):
            rng = np.random.default_rng(step)
            for p in model.parameters():
                p.grad = torch.from_numpy(rng.standard_normal(p.shape)).float()
            optimizer.step()
    return model, optimizer, derive_schedule(open_run(tmp_path / f"{width}.zarr"), window=slice(1, 3))


def test_what_is_derived_says_its_shapes_and_is_compared(tmp_path: Path) -> None:
    """From run to file to optimizer: fits its own model and one of another depth, not one of another width."""
    model, optimizer, schedule = recorded(12, tmp_path)
    assert {name: entry.shapes for name, entry in schedule.operators.items()} == {"attn_q": ((12, 12),), "mlp_up": ((36, 12),)}
    schedule.save(tmp_path / "schedule.json")
    loaded = Schedule.load(tmp_path / "schedule.json")
    assert apply_schedule(optimizer, loaded, model) == {"attn_q": 2, "mlp_up": 2}
    assert apply_schedule(*deeper(12, loaded)) == {"attn_q": 3, "mlp_up": 3}
    other, other_optimizer, _ = recorded(20, tmp_path)
    settings = [dict(group) for group in other_optimizer.param_groups]
    with pytest.raises(
        ValueError,
        match=r"^schedule: it was derived from matrices of other shapes \(attn_q 12 × 12, here 20 × 20; mlp_up 12 × 36, here 20 × 60\) of the run .*12\.zarr "
        r"\(begun 20.*\), so its steps need not suit these; derive one with `diag schedule` from a run of this model, or pass force=True$",
    ):
        apply_schedule(other_optimizer, loaded, other)
    assert [dict(group) for group in other_optimizer.param_groups] == settings


def deeper(width: int, schedule: Schedule) -> tuple[Muon, Schedule, nn.Module]:
    model = nn.ModuleDict(
        {f"{layer}": nn.ModuleDict({"q_proj": nn.Linear(width, width), "up_proj": nn.Linear(width, 3 * width)}) for layer in "012"}
    )
    return Muon([p for p in model.parameters() if p.ndim == 2], lr=0.01), schedule, model


def test_forced_it_is_said_and_done(caplog: pytest.LogCaptureFixture) -> None:
    model, optimizer = make("torch.optim.Muon")
    apply_schedule(optimizer, shaped(UNEQUAL, attn_q=(64, 64), attn_v=(8, 16)), model, force=True)
    [message] = [record.message for record in caplog.records]
    assert message == (
        "optiscope: forced: it was derived from matrices of other shapes (attn_q 64 × 64, here 16 × 16) of the run small/run.zarr (begun "
        "2026-11-30T12:00:00+00:00), so its steps need not suit these."
    )
    assert [group["ns_steps"] for group in optimizer.param_groups] == [3, 6, 4, 5]


@pytest.mark.parametrize("turned", [False, True])
def test_a_transposed_matrix_is_the_same(turned: bool, caplog: pytest.LogCaptureFixture) -> None:
    model, optimizer = make("torch.optim.Muon")
    apply_schedule(optimizer, shaped(UNEQUAL, **{name: shape[::-1] if turned else shape for name, shape in SHAPES.items()}), model)
    assert not caplog.records


def test_some_of_the_shapes_that_a_schedule_knows() -> None:
    """An optimizer may hold a part of the matrices: one of two Muons of a training."""
    model, optimizer = make("torch.optim.Muon")
    schedule = shaped(UNEQUAL, **SHAPES)
    both = replace(schedule.operators["attn_v"], shapes=((8, 16), (16, 24)))
    apply_schedule(optimizer, replace(schedule, operators={**schedule.operators, "attn_v": both}), model)


def test_nothing_to_compare_is_noted(caplog: pytest.LogCaptureFixture) -> None:
    """A file of an earlier version, or a schedule by hand."""
    model, optimizer = make("torch.optim.Muon")
    with caplog.at_level(logging.INFO, logger="optiscope"):
        apply_schedule(optimizer, shaped(UNEQUAL, attn_q=(16, 16)), model)
    [record] = caplog.records
    assert record.levelno == logging.INFO
    assert record.message.startswith(
        "optiscope: the schedule does not say what shapes the matrices of attn_v, mlp_up had that it was derived from"
    )


@pytest.mark.parametrize("recorded_as", [(6, 4), (4, 6), (3, 24)])
def test_experts_are_compared_by_slice(recorded_as: tuple[int, int]) -> None:
    """Three matrices of 6 × 4 in one parameter; as one matrix, where its optimizer sees it so, 3 × 24."""
    model = nn.Module()
    model.up_proj = nn.Parameter(torch.zeros(3, 6, 4))
    optimizer = Constants([model.up_proj])
    schedule = shaped(schedule_of(mlp_up=(JORDAN,) * 5), mlp_up=recorded_as)
    assert apply_schedule(optimizer, schedule, model) == {"mlp_up": 1}
    with pytest.raises(ValueError, match=r"mlp_up 4 × 24, here 3 × 24"):
        apply_schedule(optimizer, shaped(schedule, mlp_up=(4, 24)), model)


def test_stacks_are_compared_as_they_are_orthogonalised() -> None:
    """TEON's [M_1 M_2] of two 16 × 16 is recorded as 16 × 32."""
    model = TwoLayers()
    matrices = [p for name, p in model.of_muon().items() if operator_of(name) == "attn_q"]
    schedule = shaped(schedule_of(attn_q=(JORDAN,) * 5), attn_q=(16, 32))
    assert apply_schedule(TEON(matrices, stack=2), schedule, model) == {"attn_q": 2}
    with pytest.raises(ValueError, match="attn_q 16 × 32, here 16 × 16"):
        apply_schedule(TEON(matrices, stack=1), schedule, model)


def test_a_foreign_files_words_are_shown_as_text() -> None:
    model, optimizer = make("torch.optim.Muon")
    schedule = replace(shaped(UNEQUAL, attn_q=(64, 64)), provenance={"run": "a\x1b[2J\nb"})
    with pytest.raises(ValueError, match=r"the run a\\x1b\[2J\\nb, so"):
        apply_schedule(optimizer, schedule, model)


# Steps that an optimizer would not run


def steps(count: int) -> Schedule:
    return schedule_of(attn_q=(JORDAN,) * count, attn_v=(JORDAN,) * 3)


def grouped(cls: type) -> tuple[TwoLayers, Optimizer]:
    model = TwoLayers()
    return model, cls(by_operator(model, operator_of))


def test_a_sliced_list_runs_no_more_than_it_holds() -> None:
    """The trap: told seven, it runs five."""
    results = []
    for count in (5, 7):
        model, optimizer = grouped(GroupMuon)
        for group in optimizer.param_groups:
            group["ns_steps"] = count
        train(model, optimizer, 0, 2)
        results.append(model.as_bytes())
    assert results[0] == results[1]


@pytest.mark.parametrize("count", [5, 6, 7])
def test_more_steps_than_coefficients_are_refused(count: int, caplog: pytest.LogCaptureFixture) -> None:
    model, optimizer = grouped(GroupMuon)
    if count == 5:
        assert apply_schedule(optimizer, steps(count), model) == {"attn_q": 2, "attn_v": 2}
        return
    with pytest.raises(
        ValueError,
        match=rf"^schedule: stacking_muons\.GroupMuon would run 5 steps, as many as FIVE of stacking_muons holds coefficients for, and it has more \(attn_q {count}\); "
        r"derive one under a smaller budget, .*, or pass force=True if this one repeats the last of its own$",
    ):
        apply_schedule(optimizer, steps(count), model)
    assert {group["ns_steps"] for group in optimizer.param_groups} == {5}
    apply_schedule(optimizer, steps(count), model, force=True)
    assert caplog.records[0].message == (
        f"optiscope: forced: stacking_muons.GroupMuon would run 5 steps, as many as FIVE of stacking_muons holds coefficients for, and it has more (attn_q {count})."
    )


class Own(Optimizer):
    """A Muon of steps alone, as told of its coefficients as a kind of it below."""

    def __init__(self, params: Any, **settings: Any) -> None:
        super().__init__(params, {"lr": 0.1, "ns_steps": 5, **settings})

    @torch.no_grad()
    def step(self, closure: None = None) -> None:
        for group in self.param_groups:
            for p in group["params"]:
                p.sub_(self.orthogonalise(p.grad, group), alpha=group["lr"])

    def orthogonalise(self, m: Tensor, group: dict[str, Any]) -> Tensor:
        raise NotImplementedError


class OfTheGroup(Own):
    """Under a name that is not known for a schedule's coefficients."""

    def __init__(self, params: Any) -> None:
        super().__init__(params, polar=FIVE[:4])

    def orthogonalise(self, m: Tensor, group: dict[str, Any]) -> Tensor:
        return newton_schulz(m, group["polar"][: group["ns_steps"]])


class OfTheOptimizer(Own):
    def __init__(self, params: Any) -> None:
        super().__init__(params)
        self.coefficients = torch.tensor(FIVE)

    def orthogonalise(self, m: Tensor, group: dict[str, Any]) -> Tensor:
        return newton_schulz(m, self.coefficients[: group["ns_steps"]].tolist())


class Literal(Own):
    def orthogonalise(self, m: Tensor, group: dict[str, Any]) -> Tensor:
        table = [(4.0848, -6.8946, 2.9270), (3.9505, -6.3029, 2.6377), (3.7418, -5.5913, 2.3037), (2.8769, -3.1427, 1.2046)]
        return newton_schulz(m, table[: group["ns_steps"]])


def by_default(m: Tensor, count: int, table: Any = FIVE) -> Tensor:
    return newton_schulz(m, table[:count])


class OfADefault(Own):
    def orthogonalise(self, m: Tensor, group: dict[str, Any]) -> Tensor:
        return functools.partial(by_default, m)(group["ns_steps"])


class Constants(Own):
    def orthogonalise(self, m: Tensor, group: dict[str, Any]) -> Tensor:
        a, b, c = (3.4445, -4.7750, 2.0315)
        return newton_schulz(m, [(a, b, c)] * group["ns_steps"])


TABLES = {"short": FIVE[:4], "long": FIVE + FIVE[-1:]}


class ATable(Own):
    def __init__(self, params: Any) -> None:
        super().__init__(params, ns_coefficients="short")

    def orthogonalise(self, m: Tensor, group: dict[str, Any]) -> Tensor:
        return newton_schulz(m, TABLES[group["ns_coefficients"]][: group["ns_steps"]])


class Unseen(Own):
    def orthogonalise(self, m: Tensor, group: dict[str, Any]) -> Tensor:
        return torch.linalg.svd(m)[0]  # who knows


def test_a_list_of_the_group_is_set_and_seen_to_be_cut_by_a_number_beside_it() -> None:
    model, optimizer = grouped(OfTheGroup)
    with pytest.raises(
        ValueError, match=r"OfTheGroup does not follow it: a copy that was set to the 7 steps of attn_q ran 5 steps; nothing was changed"
    ):
        apply_schedule(optimizer, steps(7), model)
    assert all(group["polar"] == FIVE[:4] and group["ns_steps"] == 5 for group in optimizer.param_groups)
    assert apply_schedule(optimizer, steps(5), model) == {"attn_q": 2, "attn_v": 2}


@pytest.mark.parametrize(
    ("kind", "most", "where"),
    [
        (OfTheOptimizer, 5, "`coefficients` of the optimizer"),
        (Literal, 4, "a constant of tests.hooks.test_schedule_fit.Literal.orthogonalise"), (OfADefault, 5, "FIVE of stacking_muons|a default of tests.hooks.test_schedule_fit.by_default"),
        (ATable, 6, "TABLES of tests.hooks.test_schedule_fit"),
    ],
)  # fmt: skip
def test_where_coefficients_are_found(kind: Callable[[Any], Optimizer], most: int, where: str) -> None:
    model, optimizer = grouped(kind)  # type: ignore[arg-type]
    with pytest.raises(
        ValueError,
        match=rf"^schedule: tests.hooks.test_schedule_fit\.{kind.__name__} would run {most} steps, as many as (?:{where}) ",
    ):
        apply_schedule(optimizer, steps(7), model)


@pytest.mark.parametrize(("kind", "said"), [(Constants, None), (ATable, "TABLES of tests.hooks.test_schedule_fit: 4, TABLES of tests.hooks.test_schedule_fit: 6"), (Unseen, "no coefficients were found")])  # fmt: skip
def test_what_cannot_be_known_is_said(kind: Any, said: str | None, caplog: pytest.LogCaptureFixture) -> None:
    """One triple goes on for ever; one of two lists, and what is nowhere to be seen, may end."""
    model, optimizer = grouped(kind)
    if kind is ATable:  # a copy of it shows which list it is
        with pytest.raises(ValueError, match="a copy that was set to the 5 steps of attn_q ran 4 steps; nothing was changed"):
            apply_schedule(optimizer, steps(5), model)
        assert optimizer.param_groups[0]["ns_steps"] != 5 or "operator" not in optimizer.param_groups[0]
        caplog.clear()
    apply_schedule(optimizer, steps(5), model, force=kind is ATable)
    messages = [record.message for record in caplog.records if "could not be read from its source" in record.message]
    assert len(messages) == (said is not None)
    if said is not None:
        assert f"runs as many steps as it is now told to (attn_q 5{', attn_v 3' if kind is Unseen else ''})" in messages[0]
        assert f"({said})" in messages[0]
    assert optimizer.param_groups[0]["ns_steps"] == 5


def test_a_name_is_not_overwritten_in_a_class_that_is_not_known(caplog: pytest.LogCaptureFixture) -> None:
    """It looks the name up at its next step, and would end there on a list."""
    model, optimizer = grouped(ATable)
    apply_schedule(optimizer, schedule_of(attn_q=(QUINTIC,) * 4), model)
    assert optimizer.param_groups[0]["ns_coefficients"] == "short"
    assert "no coefficients" in caplog.text
    train(model, optimizer, 0, 1)
