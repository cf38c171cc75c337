"""How close a tensor of an optimizer's state is to the averages of the gradients that the optimizer was given.

A first moment lies close to an average of the gradients in direction, whatever its decay, scale and sign; a second moment goes
with an average of their squares, over coordinates, rows or columns.
"""

from dataclasses import dataclass, field

import torch
from torch import Tensor

from .names import Path, forms_of, in_shape, is_plain

_BETAS = (0.9, 0.99)
_NAN = float("nan")
_ENTRIES = 1 << 14  # of a tensor that are compared: chance alone makes a cosine of 0.008

# Above these a tensor can be a copy of the weights (z, p0, slow weights), can be one of a gradient, and is one of a gradient.
_WEIGHTS = 0.9
_NEAR_GRADIENT = 0.5
_GRADIENT = 0.9999


@dataclass(eq=False)
class Probe:
    """One parameter, averages of its gradients, and the last two of these.

    Attributes:
        coming: the gradient of the step under way.
        seen: how many gradients there were.
        old: what its state held before the first of them, and so is of others too.
    """

    parameter: Tensor
    old: frozenset[Path] = frozenset()
    coming: Tensor | None = None
    seen: int = 0
    last: list[Tensor] = field(default_factory=list)
    averages: list[Tensor] = field(default_factory=list)
    squares: list[Tensor] = field(default_factory=list)

    def add(self) -> None:
        """Take the gradient of the step just made into the averages; not one with infinities, whose step a GradScaler skips."""
        g, self.coming = self.coming, None
        if g is None or not bool(g.isfinite().all()):
            return
        for averages, value in ((self.averages, g), (self.squares, g.square())):
            if not averages:
                averages += [torch.zeros_like(g) for _ in _BETAS]
            for average, beta in zip(averages, _BETAS, strict=True):
                average.lerp_(value, 1 - beta)
        self.last = [g, *self.last[:1]]
        self.seen += 1


def first_moment_likeness(tensor: Tensor, probe: Probe) -> dict[str, float]:
    """Largest |cos| with an average of the gradients, of the entries or of their signs; 0 for a copy of the weights.

    Of signs, since some average gradients that are divided coordinate by coordinate, and their entries follow the divisor (heavyball's
    ADOPT: 0.1 by entries, 0.8 by signs). NaN, which cannot be told, for what is closer to one gradient than to any average: a copy
    of it, with changes even (Rprop's), or a momentum with a decay under about 0.6. Nothing for a tensor that is not in the
    parameter's shape and format.
    """
    x = in_shape(tensor, probe.parameter.shape)
    if x is None or not probe.averages:
        return {}
    likeness = max(_closeness(x, average) for average in probe.averages)
    if abs(_cosine(x, probe.parameter)) > max(_WEIGHTS, likeness):
        likeness = 0.0
    elif any(_closeness(x, g) > min(_GRADIENT, max(likeness, _NEAR_GRADIENT)) for g in probe.last):
        likeness = _NAN
    return {"full": likeness}


def _closeness(x: Tensor, y: Tensor) -> float:
    return max(abs(_cosine(x, y)), abs(_cosine(x.sign(), y.sign())))


def second_moment_likeness(tensor: Tensor, probe: Probe) -> dict[str, float]:
    """Largest correlation with an average of the squares, for each form that the shape allows and that numbers can tell.

    NaN for the square of a gradient itself.
    """
    shape = probe.parameter.shape
    forms = forms_of(tensor, shape)
    if not probe.squares or not is_plain(tensor) or bool((tensor < 0).any()):
        return {}
    found: dict[str, float] = {}
    for form, over in (("full", None), ("row", 1), ("block", 0)):
        references = [s.reshape(shape[0], -1) if over is None else s.reshape(shape[0], -1).mean(over) for s in probe.squares]
        if form not in forms or references[0].numel() != tensor.numel():
            continue
        if form == "full" and any(_correlation(tensor, g.square()) > _GRADIENT for g in probe.last):
            found[form] = _NAN
        else:
            found[form] = max(_correlation(tensor, reference) for reference in references)
    return found


def _unit(x: Tensor) -> Tensor:
    """x/‖x‖ of at most some entries, 0 for 0. By way of x/max|x|: what some optimizers keep (1e-22) has no square in float32."""
    x = x.detach().flatten()[:: x.numel() // _ENTRIES | 1].float()  # an odd stride goes through all columns
    x = torch.nan_to_num(x / x.abs().max(), nan=0.0, posinf=0.0, neginf=0.0)
    return torch.nn.functional.normalize(x, dim=0)


def _cosine(x: Tensor, y: Tensor) -> float:
    """⟨x, y⟩/(‖x‖‖y‖), 0 where one is zero or not finite."""
    return float(_unit(x) @ _unit(y))


def _correlation(x: Tensor, y: Tensor) -> float:
    """Pearson's, 0 where one is constant. A cosine would be high for any two tensors that are nowhere negative."""
    a, b = (_unit(z) for z in (x, y))
    a, b = a - a.mean(), b - b.mean()
    # What is left of a constant is rounding, about 1e-8 of a norm of 1.
    return 0.0 if min(float(a.norm()), float(b.norm())) < 1e-6 else _cosine(a, b)
