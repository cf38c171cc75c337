"""What an iteration's input is made of: the momentum alone or mixed with the gradient, its sign; and whether a formula of the state gives it to the bit."""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ..adapters.names import spelled, tensors_in

_LOOSE = 0.04  # twice the distance of directions at which an input is said to be what a rule gives; bfloat16 leaves 0.002


@dataclass(frozen=True)
class Rule:
    """A formula of the gradient, the state after the step and a number of the group.

    Attributes:
        formula: its name in words.
        momentum: path of the momentum in the parameter's state; None where the gradient is the input.
        weight: key of the number in the group, and which of several; None where there is none.
        signed: whether the sign of it is taken.
    """

    formula: str
    momentum: tuple[Any, ...] | None
    weight: tuple[str, int | None] | None
    signed: bool

    def apply(self, gradient: Tensor | None, state: Mapping[str, Any], group: Mapping[str, Any]) -> Tensor | None:
        """The input; None where something that it is made of is not there."""
        momentum = None if self.momentum is None else tensors_in(state).get(self.momentum)
        weight = None if self.weight is None else _number(group, *self.weight)
        if (self.momentum is not None and momentum is None) or (self.weight is not None and weight is None):
            return None
        if momentum is not None and gradient is not None and momentum.shape != gradient.shape:
            if momentum.numel() != gradient.numel():
                return None
            momentum = momentum.reshape(gradient.shape)  # that of a kernel may be kept as the matrix that it is flattened to
        made = _FORMULAS[self.formula](gradient, momentum, weight)
        return made.sign() if made is not None and self.signed else made

    @property
    def likelihood(self) -> tuple[Any, ...]:
        """Less for what is likelier meant, of several that give the same."""
        named = -1 if self.weight is None else _WEIGHTS.index(self.weight[0]) if self.weight[0] in _WEIGHTS else len(_WEIGHTS)
        return self.momentum is not None, named, self.signed, str(self)

    @property
    def kind(self) -> tuple[Any, ...]:
        """The same for rules that differ in rounding alone; of signs, which different numbers share for long, everything else counts."""
        mixed = "g + μM" if self.formula in _SUMS else "(1 − μ)g + μM" if "μ" in self.formula else self.formula
        return mixed, self.momentum, self.signed, self.weight if self.signed else None

    def __str__(self) -> str:
        """In words."""
        momentum = "" if self.momentum is None else f" ({spelled(self.momentum)}{'' if self.weight is None else f', μ: {self.weight[0]}'})"
        return f"{'sign of ' if self.signed else ''}{self.formula}{momentum}"


_WEIGHTS = ("momentum", "mu", "beta", "beta1", "betas", "momentum_beta", "muon_momentum", "muon_beta")  # what a momentum's weight is called
Formula = Callable[[Any, Any, Any], Tensor | None]
_FORMULAS: dict[str, Formula] = {
    "momentum after the step": lambda g, m, mu: m,
    "momentum after Nesterov mixing, (1 − μ)g + μM": lambda g, m, mu: None if g is None else g.lerp(m.to(g.dtype), mu),
    "momentum after Nesterov mixing, g + μM": lambda g, m, mu: None if g is None else g.add(m, alpha=mu),
    "momentum after Nesterov mixing, μM + g": lambda g, m, mu: None if g is None else (m * mu).add(g),
    "momentum after Nesterov mixing, μM + (1 − μ)g": lambda g, m, mu: None if g is None else m * mu + g * (1 - mu),
    "gradient": lambda g, m, mu: g,
}
_SUMS = ("momentum after Nesterov mixing, g + μM", "momentum after Nesterov mixing, μM + g")


def rules(given: Tensor, gradient: Tensor | None, state: Mapping[str, Any], group: Mapping[str, Any]) -> set[Rule]:
    """The rules that give the input to the bit."""
    return {
        rule for rule in _candidates(state, group)
        if (made := rule.apply(gradient, state, group)) is not None and made.shape == given.shape and torch.equal(made.to(given.dtype), given)
    }  # fmt: skip


def _candidates(state: Mapping[str, Any], group: Mapping[str, Any]) -> Iterator[Rule]:
    weights = [
        (key, i)
        for key, value in group.items()
        if key != "params"
        for i in ([None] if type(value) is float else range(2) if _is_pair(value) else [])
    ]
    for signed in (False, True):
        yield Rule("gradient", None, None, signed)
        for path, tensor in tensors_in(state).items():
            if tensor.ndim < 2 or not tensor.is_floating_point():
                continue
            yield Rule("momentum after the step", path, None, signed)
            for formula in _FORMULAS:
                if "μ" in formula:
                    yield from (Rule(formula, path, weight, signed) for weight in weights if 0 < (_number(group, *weight) or 0) < 1)


def _is_pair(value: Any) -> bool:
    return isinstance(value, (tuple, list)) and len(value) == 2 and all(type(one) is float for one in value)


def _number(group: Mapping[str, Any], key: str, index: int | None) -> float | None:
    value = group.get(key)
    return value if index is None or value is None else value[index]


def described(given: Tensor, gradient: Tensor | None, state: Mapping[str, Any], group: Mapping[str, Any]) -> str:
    """What an input is where no rule gives it to the bit: the rule that gives it best, or gives it once something more is done to it."""
    x = given.reshape(given.shape[0], -1).double()
    best: tuple[float, str] = (_LOOSE, "a matrix of the step's own making")
    for rule in _candidates(state, group):
        made = rule.apply(gradient, state, group)
        if made is None or made.shape != given.shape or not bool(made.any()):
            continue
        y = made.reshape(x.shape).double()
        for after, done in (
            (lambda t: t, ""),
            (_equal_rows, ", its rows brought to one norm"),
            (_equal_columns, ", its columns brought to one norm"),
        ):
            a, b = after(x), after(y)
            left = float((a / a.norm() - b / b.norm()).norm())
            if left < best[0] / 2:
                best = (left, f"{rule}{done}")
        bound = float(x.abs().max())
        if float((y.clamp(-bound, bound) - x).norm()) < best[0] / 2 * float(x.norm()):
            best = (0.0, f"{rule}, clipped")
    return best[1]


def _equal_rows(matrix: Tensor) -> Tensor:
    return torch.nn.functional.normalize(matrix, dim=1, eps=1e-30)


def _equal_columns(matrix: Tensor) -> Tensor:
    return torch.nn.functional.normalize(matrix, dim=0, eps=1e-30)
