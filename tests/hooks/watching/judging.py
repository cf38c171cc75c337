"""A generated optimizer trained plain and recorded, and what was found compared with what the optimizer itself noted."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
from contract.harness import same, tensors_in
from torch import Tensor, nn

from optiscope.analysis import open_run
from optiscope.hooks import attach
from optiscope.hooks.observing.snapshot import Snapshot
from optiscope.hooks.watching.watched_step import watch_step
from watching.generator import DECAY, Form, Generated, applied, give_gradients, parameters

STEPS = 5


@dataclass
class Verdict:
    """What is wrong with what was found.

    Attributes:
        wrong: by kind.
        silent: kinds among them that nothing in the run tells of.
        neutral: whether training was the same to the bit.
    """

    form: Form
    wrong: dict[str, str] = field(default_factory=dict)
    silent: set[str] = field(default_factory=set)
    neutral: bool = True


@contextmanager
def reading_inputs(read: dict[int, Tensor | None]) -> Iterator[None]:
    """Note what the adapter of each parameter reads as the NS input of the step just taken."""
    original = Snapshot.read

    def spy(self: Snapshot) -> Any:
        ns, reading = self.adapter.orthogonalisation, self.reading
        observed = original(self)
        given = None if ns is None else ns.ns_input(reading)
        read[id(reading.parameter)] = None if given is None else given.detach().clone()
        return observed

    with patch.object(Snapshot, "read", spy):
        yield


def train(form: Form, store: Path | None, verdict: Verdict | None = None) -> list[Tensor]:
    """Weights, gradients and random state of every step, and the state at the end."""
    model = nn.ParameterList(parameters(form))
    ps = list(model)
    optimizer = Generated(ps, form)
    trace: list[Tensor] = []
    if store is None:
        for step in range(STEPS):
            trace += _step(optimizer, ps, step)
    else:
        read: dict[int, Tensor | None] = {}
        with attach(optimizer, model, store, every=1, on_error="raise") as recorder, reading_inputs(read):
            for step in range(STEPS):
                optimizer.given.clear()
                if form.heads > 1 and verdict is not None:
                    give_gradients(ps, step)
                    seen = {id(p): _inputs_of_blocks(optimizer, p) for p in ps if p.ndim > 1}
                trace += _step(optimizer, ps, step)
                if verdict is not None:
                    _compare_inputs(form, ps, optimizer.given, seen if form.heads > 1 else read, step, verdict)
                    watching = recorder.session.watched[0].watching
                    assert watching is not None
                    found = [watching.of(group).found for group in optimizer.param_groups]
                    told = [recorder.session.watched[0].reading_of(group)[2] for group in optimizer.param_groups]
        if verdict is not None:
            _compare_found(form, ps, found, verdict)
            verdict.silent = _without_a_word(verdict.wrong, told)
            if form.seed % 4 == 0:  # reading a run costs as much as training
                _compare_run(form, store, verdict)
    return trace + list(tensors_in({i: optimizer.state.get(p, {}) for i, p in enumerate(ps)}))


def _step(optimizer: Generated, ps: list[nn.Parameter], step: int) -> list[Tensor]:
    give_gradients(ps, step)
    optimizer.step()
    return [*(p.detach().clone() for p in ps), *(p.grad.clone() for p in ps if p.grad is not None), torch.get_rng_state()]


def _inputs_of_blocks(optimizer: Generated, p: Tensor) -> Tensor | None:
    """The inputs of a parameter's blocks, one below the other, from a step watched for the test."""
    seen = watch_step(optimizer, optimizer.param_groups[0], optimizer.param_groups[0]["params"])
    own = sorted((m.piece.index, i) for i, m in enumerate(seen.matches) if m.piece.parameter == id(p))
    inputs = [seen.input_of(i) for _, i in own]
    return torch.cat([one for one in inputs if one is not None]) if inputs and all(one is not None for one in inputs) else None


def _compare_inputs(
    form: Form, ps: list[nn.Parameter], given: dict[int, Tensor], read: dict[int, Tensor | None], step: int, verdict: Verdict
) -> None:
    for i, p in enumerate(ps):
        one = read.get(id(p))
        if id(p) not in given:
            if one is not None:
                verdict.wrong["of nothing"] = f"parameter {i} has an input at step {step}"
            continue
        own = given[id(p)]
        if one is None:
            verdict.wrong.setdefault("no input", f"of parameter {i} {tuple(p.shape)} at step {step}")
        elif one.numel() != own.numel() or not torch.equal(one.reshape(own.shape).to(own.dtype), own):
            other = torch.full_like(own, torch.nan) if one.numel() != own.numel() else one.reshape(own.shape)
            left = float((other.double() - own.double()).norm() / own.double().norm())
            verdict.wrong.setdefault("input", f"of parameter {i} {tuple(p.shape)} at step {step} by {left:.2g} in {one.dtype}")


def _compare_found(form: Form, ps: list[nn.Parameter], found: list[dict[int, Any]], verdict: Verdict) -> None:
    of_parameter = {key: one for group in found for key, one in group.items()}
    for i, p in enumerate(ps):
        one = of_parameter.get(id(p))
        if p.ndim == 1:
            if one is not None:
                verdict.wrong["of nothing"] = "a vector has an iteration"
            continue
        if one is None:
            verdict.wrong.setdefault("not found", f"parameter {i} {tuple(p.shape)}")
            continue
        if len(one.coefficients) != len(form.triples):
            verdict.wrong["steps"] = f"{len(one.coefficients)} of {tuple(p.shape)}: {_short(one.coefficients)}, not {_short(form.triples)}"
        else:
            error = max(_distance(a, b, form) for a, b in zip(one.coefficients, applied(form), strict=True))
            if error > 1:
                verdict.wrong.setdefault(
                    "coefficients", f"{error:.2g} times the bound: {_short(one.coefficients)}, not {_short(form.triples)}"
                )
        if one.dtype != form.dtype:
            verdict.wrong["format"] = f"{one.dtype}"
        parts = ("slice", 3) if p.ndim == 3 else ("rows", form.heads) if form.heads > 1 else ("whole", 1)
        if (one.part, one.parts) != parts:
            verdict.wrong["parts"] = f"{one.part} {one.parts} of {tuple(p.shape)}"
        if one.factor not in factors(form, p):
            verdict.wrong["factor"] = f"{one.factor} of {tuple(p.shape)}, left {one.unexplained:.2g}"
        if one.factor == "scale" and form.output in ("scale", "snap"):
            decay = 0.0 if form.decay == "none" else 0.02 * DECAY
            if abs(one.decay - decay) > 0.1 * (decay or 1e-3) or (decay and one.cautious != (form.decay == "cautious")):
                verdict.wrong["decay"] = f"{one.decay:.3g}, cautious {one.cautious} of {tuple(p.shape)}"


def _short(triples: Any) -> str:
    return "; ".join(",".join(f"{value:.4g}" for value in triple) for triple in triples)


def _distance(found: Any, own: Any, form: Form) -> float:
    """Of two triples, in units of what is allowed."""
    allowed = 1e-2 if form.dtype == torch.bfloat16 else 1e-4
    return max(abs(f - o) / (allowed * (abs(o) or abs(own[1]))) for f, o in zip(found, own, strict=True))


def factors(form: Form, p: Tensor) -> tuple[str, ...]:
    """What may truly be said to follow O: rows or columns of an O whose rows or columns are of one norm get one factor."""
    if form.output in ("scale", "snap"):
        return ("scale",)
    if form.output == "elements":
        return ("elements",)
    return (form.output, "scale")


def _compare_run(form: Form, store: Path, verdict: Verdict) -> None:
    run = open_run(store)
    entry = run.attrs["optimizers"][0]
    told = entry.get("watched", [])
    counts = sum(kind["count"] for group in told for kind in group.get("iterations", []))
    if counts != len(form.shapes):
        verdict.wrong["in the run"] = f"{counts} matrices of {len(form.shapes)}"
    schedules = run["geometry"]["ns_schedule"].values[-1]
    lengths = {len(run["geometry"].attrs["ns_schedules"][i]["coefficients"]) if i >= 0 else 0 for i in schedules.tolist()}
    if lengths != ({0} if form.heads > 1 else {len(form.triples)}):
        verdict.wrong["in the run"] = f"schedules of {lengths} steps"
    run.close()


def _without_a_word(wrong: dict[str, str], told: list[dict[str, Any]]) -> set[str]:
    """Kinds that mislead, where neither a failure, what steps leave unexplained nor the copy's difference tells of them."""
    if any(group.get("failed") or (group.get("unexplained") or 0) > 0.05 or (group.get("difference") or 0) > 0.1 for group in told):
        return set()
    return wrong.keys() & {"steps", "input", "of nothing", "coefficients", "format", "parts", "factor"}


def judged(form: Form, store: Path) -> Verdict:
    """Train plain, recorded, and compare."""
    verdict = Verdict(form)
    recorded = train(form, store, verdict)
    plain = train(form, None)
    verdict.neutral = len(plain) == len(recorded) and all(map(same, plain, recorded))
    return verdict
