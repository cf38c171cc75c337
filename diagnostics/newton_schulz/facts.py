"""What is known of a list of Newton–Schulz coefficients once it is measured (:mod:`.validation`): what :mod:`.verdict` judges."""

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from math import isfinite
from typing import Any

from ..finding import Finding
from .families import AfterLast, Coefficients
from .hazards import Escape, Interval
from .nearest_family import Nearest


@dataclass(frozen=True)
class Validation:
    """Measured facts about a schedule, in float64 and exact but for rounding, and what is hazardous about it.

    Attributes:
        coefficients: of every step, as run.
        slope: p′(0), the product of all a: by how much small singular values grow.
        lower: lower end of the domain that `band` is about.
        band: smallest and largest output for x in [lower, 1].
        worst: lower end → largest |1 − p(x)| from there to 1.
        reached: p(x) after 0, 1, … steps at x = 1e-1 … 1e-6, shape (steps + 1, 6).
        lifted: steps that x = 1e-1 … 1e-6 take to 0.5, the last triple held; None: more than 100.
        fixed_points: (x, p′(x)) of the last triple's positive fixed points; attracting where |p′| < 1.
        cycle: the positive cycle that repeating the last triple ends on; () where none is found.
        multiplier: product of p′ around it, NaN where there is none.
        escape: where values leave for infinity, None where they do not.
        negative: intervals of x that are turned negative.
        restart: the step at which the list begins anew, counted from 0.
        after_last: what is to follow the list's end.
        past_end: the band after one step more than the list has, "repeat" and "cycle".
        bfloat16: largest singular value of O in emulated bfloat16; NaN where it was not asked for.
        nearest: the known list with most rows in common.
        hazards: from the worst.
    """

    coefficients: Coefficients
    slope: float
    lower: float
    band: Interval
    worst: Mapping[float, float]
    reached: tuple[tuple[float, ...], ...]
    lifted: tuple[int | None, ...]
    fixed_points: tuple[tuple[float, float], ...]
    cycle: tuple[float, ...]
    multiplier: float
    escape: Escape | None
    negative: tuple[Interval, ...]
    restart: int | None
    after_last: AfterLast
    past_end: Mapping[str, Interval]
    bfloat16: float
    nearest: Nearest | None
    hazards: tuple[Finding, ...] = ()

    def as_dict(self) -> dict[str, Any]:
        """Plain values for JSON, which knows no NaN and no infinity: null there."""
        facts = {**asdict(self), "escape": self.escape and self.escape._asdict()}
        for hazard in facts["hazards"]:
            del hazard["matrices"]  # a list of coefficients is of no matrices
        plain: dict[str, Any] = _plain(facts)
        return plain


def _plain(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {f"{key:g}" if isinstance(key, float) else key: _plain(v) for key, v in value.items()}
    if isinstance(value, (tuple, list)):
        return [_plain(v) for v in value]
    return None if isinstance(value, float) and not isfinite(value) else value
