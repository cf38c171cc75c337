"""How a class that is not in the table is read: concluded from its first steps, by names in its state and by numbers.

Names come first where there are any; the numbers say whether they mislead (a `momentum_buffer` that holds weights, an
`exp_avg` in a rotated basis) and, where there are none, which tensor follows the gradients.
"""

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from math import isnan
from statistics import median
from typing import Any, TypeAlias

import torch
from torch import Tensor

from .adapter import Adapter, parameter_state
from .likeness import Probe, first_moment_likeness, second_moment_likeness
from .names import (
    Path,
    Source,
    in_shape,
    is_encoding,
    is_plain,
    key_of,
    momentum_reader,
    named_momenta,
    named_second_moments,
    read_second_moment,
    second_moment_reader,
    spelled,
    tensors_in,
)
from .table import UNKNOWN

STEPS = 8  # gradients to average before concluding
_PATIENCE = 64  # steps to wait for them
_PROBES = 4
_SMALLEST = 64  # entries of a probe, so that no likeness is large by chance
_LARGEST = 1 << 23  # entries of all but the first, for memory

# Likenesses at and above which a nameless tensor is a moment, and under which a name misleads.
_FOUND = 0.7
_MISLEADING = 0.3

_NAN = float("nan")

NOT_IN_TABLE = "this optimizer class is not in the adapter table"
_NAMED, _NUMBERED = "names in the state", "numbers"
BY_NAMES = replace(
    UNKNOWN,
    spectrum_of=f"first moment after the step where the state names one (exp_avg, momentum_buffer, …), else the gradient; {NOT_IN_TABLE}",
    momentum=momentum_reader(),
    second_moment=second_moment_reader(),
    read_by=_NAMED,
)

Looked: TypeAlias = tuple[Probe, Mapping[Path, Tensor]]  # a probe, and what the state now holds for it


class Identification:
    """Watches the first steps of an optimizer, then says how it is read."""

    def __init__(self, optimizer: Any) -> None:
        self._optimizer = optimizer
        self._probes: list[Probe] = []
        self._steps = 0

    def see_gradients(self) -> None:
        """Copy the gradients that the optimizer is given for the step under way."""
        if not self._probes:
            self._probes = [Probe(p, self._not_zero(p)) for p in _choose(self._optimizer.param_groups)]
        scale = getattr(self._optimizer, "grad_scale", None)  # which a GradScaler leaves to a fused optimizer to divide by
        for probe in self._probes:
            gradient = probe.parameter.grad
            if gradient is not None and gradient.layout == torch.strided:
                probe.coming = gradient.to(torch.float32, copy=True)
                if scale is not None:
                    probe.coming /= scale

    def after_step(self) -> Adapter | None:
        """Take the step just made into account; the adapter once enough gradients were seen, None before."""
        self._steps += 1
        for probe in self._probes:
            probe.add()
        ready = [probe for probe in self._probes if probe.seen >= STEPS]
        if self._steps < _PATIENCE and (not ready or len(ready) < len(self._probes)):
            return None
        return conclude([(probe, self._tensors(probe.parameter)) for probe in ready])

    def _tensors(self, parameter: Tensor) -> dict[Path, Tensor]:
        return tensors_in(parameter_state(self._optimizer, parameter))

    def _not_zero(self, parameter: Tensor) -> frozenset[Path]:
        return frozenset(path for path, tensor in self._tensors(parameter).items() if is_plain(tensor) and bool(tensor.any()))


def _choose(groups: Iterable[Mapping[str, Any]]) -> list[Tensor]:
    """The smallest matrices that are large enough, of every group in turn: groups may be updated in different ways."""
    turns: list[tuple[int, int, Tensor]] = []
    for i, group in enumerate(groups):
        able = [p for p in group["params"] if p.ndim >= 2 and p.is_floating_point() and p.numel() >= _SMALLEST and p.grad is not None]
        able = sorted(
            (p for p in able if not hasattr(p, "full_tensor") and p.grad.layout is torch.strided), key=lambda p: (p.ndim, p.numel())
        )
        turns += [(turn, i, p) for turn, p in enumerate(able[:_PROBES])]
    chosen: list[Tensor] = []
    for _, _, p in sorted(turns, key=lambda turn: turn[:2]):
        if len(chosen) < _PROBES and (not chosen or sum(q.numel() for q in chosen) + p.numel() <= _LARGEST):
            chosen.append(p)
    return chosen


@dataclass(frozen=True)
class Moment:
    """One of the two that are looked for.

    Attributes:
        title: its name.
        follows: what the likeness is a likeness with.
        named: sources whose names say so, best first.
        read: what a source holds for one parameter; None where it cannot be that.
        likeness: of one tensor, for every form that numbers can tell.
    """

    title: str
    follows: str
    named: Callable[[Mapping[Path, Tensor], Sequence[int]], list[Source]]
    read: Callable[[Source, Mapping[Path, Tensor], Sequence[int]], Any]
    likeness: Callable[[Tensor, Probe], dict[str, float]]


FIRST_MOMENT = Moment(
    "first moment",
    "cosine {:.2f} with an average of the gradients, by entries or signs",
    lambda tensors, shape: [Source((path,), "full") for path in named_momenta(tensors)],
    lambda source, tensors, shape: in_shape(tensors[source.paths[0]], shape),
    first_moment_likeness,
)
SECOND_MOMENT = Moment(
    "second moment",
    "correlation {:.2f} with an average of their squares",
    named_second_moments,
    read_second_moment,
    second_moment_likeness,
)


class Verdict:
    """Where a moment is, over all probes.

    Attributes:
        sources: what it is read from, and how each was found; where a class keeps it in two places, the first that a parameter has.
        rejected: names that mislead, and how.
    """

    def __init__(self, moment: Moment, looked: Sequence[Looked]) -> None:
        self._moment = moment
        self._likeness = _pooled(moment, looked)
        self._old = frozenset(path for probe, _ in looked for path in probe.old)
        self.sources: dict[Source, str] = {}
        self.rejected: dict[Path, str] = {}
        guesses = self._guesses(looked)
        for probe, tensors in looked:
            shape = probe.parameter.shape
            named = [source for source in moment.named(tensors, shape) if not self._misleads(source, tensors, shape)]
            # Of several with one name (AggMo's buffers by their decay), the likeliest; max takes the first of equals.
            alike = [source for source in named if key_of(source.paths[0]) == key_of(named[0].paths[0])]
            if alike:
                self.sources.setdefault(max(alike, key=lambda source: _or_zero(self._of(source))), _NAMED)
            elif guess := next((g for g in guesses if tensors.keys() >= set(g.paths)), None):
                self.sources.setdefault(guess, _NUMBERED)

    def _of(self, source: Source) -> float:
        """The source's likeness, that of the lesser of two factors."""
        forms = ("row", "block") if source.form == "row_col" else (source.form,)
        return min(self._likeness.get(part, _NAN) for part in zip(source.paths, forms, strict=True))

    def _misleads(self, source: Source, tensors: Mapping[Path, Tensor], shape: Sequence[int]) -> bool:
        path, likeness = source.paths[0], self._of(source)
        # What was there before the first gradient seen may follow earlier ones; exactly 0 is a tensor of zeros or a copy of the weights.
        if likeness == 0 or (likeness < _MISLEADING and path not in self._old):
            self.rejected[path] = f"does not follow the gradients ({self._moment.follows.format(likeness)})"
        elif self._moment.read(source, tensors, shape) is None:
            self.rejected[path] = "is not kept in the parameter's shape and format"
        return path in self.rejected

    def _guesses(self, looked: Sequence[Looked]) -> list[Source]:
        """What follows the gradients, whatever its name: of every coordinate first, then the likeliest."""
        found = sorted((part for part, value in self._likeness.items() if value >= _FOUND), key=lambda part: -self._likeness[part])
        by_form = {form: [path for path, of in found if of == form] for form in ("full", "row", "block")}
        factors = [
            Source((row, column), "row_col")
            for row in by_form["row"][:1]
            for column in [path for path in by_form["block"] if path != row][:1]
            if all(_same_mean(tensors.get(row), tensors.get(column)) for _, tensors in looked)
        ]
        return [
            *(Source((path,), "full") for path in by_form["full"]),
            *factors,
            *(Source((path,), form) for form in ("row", "block") for path in by_form[form]),
        ]

    def text(self) -> str:
        """What was found and what misled, in words; empty for nothing."""
        found = [
            f"{self._moment.title} {' and '.join(map(spelled, source.paths))} after the step{_in_form(source)}, found by {by} "
            f"({'which could not be checked' if isnan(self._of(source)) else self._moment.follows.format(self._of(source))})"
            for source, by in self.sources.items()
        ]
        return "; ".join(found + [f"{spelled(path)} is named like a {self._moment.title} but {why}" for path, why in self.rejected.items()])


def conclude(looked: Sequence[Looked]) -> Adapter:
    """The adapter for an optimizer, from averages of its gradients and its state after as many steps."""
    if not looked:
        return BY_NAMES
    first, second = Verdict(FIRST_MOMENT, looked), Verdict(SECOND_MOMENT, looked)
    none = "" if first.sources else "gradient; no first moment was found in the state"
    return replace(
        UNKNOWN,
        spectrum_of="; ".join(text for text in (none, first.text(), second.text(), NOT_IN_TABLE) if text),
        momentum=momentum_reader([source.paths[0] for source in first.sources], first.rejected),
        second_moment=second_moment_reader(list(second.sources), second.rejected),
        read_by=_read_by(list(first.sources.values()), list(second.sources.values())),
    )


def _read_by(first: list[str], second: list[str]) -> str:
    if not first and not second:
        return "nothing"
    if first and second and first[0] != second[0]:
        return f"{first[0]} (first moment), {second[0]} (second moment)"
    return (first or second)[0]


def _pooled(moment: Moment, looked: Sequence[Looked]) -> dict[tuple[Path, str], float]:
    """Median likeness over the probes, of every path in every form; NaN where none of them tells it."""
    found: dict[tuple[Path, str], list[float]] = {}
    for probe, tensors in looked:
        for path in (path for path in tensors if not is_encoding(path)):
            for form, value in moment.likeness(tensors[path], probe).items():
                found.setdefault((path, form), []).extend([] if isnan(value) else [value])
    return {part: median(values) if values else _NAN for part, values in found.items()}


def _same_mean(rows: Tensor | None, columns: Tensor | None) -> bool:
    """Whether these can be means of one matrix over its columns and its rows."""
    return rows is None or columns is None or bool(torch.isclose(rows.float().mean(), columns.float().mean(), rtol=0.05, atol=0))


def _in_form(source: Source) -> str:
    return "" if source.form == "full" else f" ({source.form})"


def _or_zero(value: float) -> float:
    return 0.0 if isnan(value) else value
