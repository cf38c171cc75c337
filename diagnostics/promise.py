"""What a choice of steps promises against equal steps for all, how sure that is, and how much of it bfloat16 can keep."""

from typing import Any

import numpy as np

from .allocation import Allocation, lower_bound, uniform
from .evidence import Evidence
from .gain_interval import GainIntervals

# Rule → whether its certificate is that of the capped programme; rules that do not minimise the mean have none.
CERTIFIED = {"mean": True, "mean-uncapped": False}


def promise(evidence: Evidence, choice: Allocation, rule: str, intervals: GainIntervals) -> dict[str, Any]:
    """What the rule chose, and what it gains: in plain data.

    `gain` is objective(uniform) − objective(choice), the objective of "minimax" being the largest residual of an operator and else the
    mean over matrices; `relative_gain` its share of objective(uniform); each with a 95 % interval over layers, null under 3 of them.
    `mean_residuals` holds the means over all singular values and over the recoverable ones, whichever of them was minimised.
    """
    baseline = uniform(evidence.given)
    before, after = (a.max_residual if rule == "minimax" else a.mean_residual for a in (baseline, choice))
    return {
        "steps": dict(zip(evidence.members, choice.steps, strict=True)),
        "gain": before - after,
        "gain_interval": intervals.gain and list(intervals.gain),
        "relative_gain": 1 - after / before if before > 0 else 0.0,
        "relative_gain_interval": intervals.relative and list(intervals.relative),
        "mean_residuals": {
            over: {
                name: _weighted(evidence, evidence.under(a.steps, evidence.seen.residual(recoverable=over == "recoverable")))
                for name, a in (("uniform", baseline), ("choice", choice))
            }
            for over in ("all", "recoverable")
        },
        "recoverable_share": recoverable_share(evidence, choice),
        "lower_bound": lower_bound(evidence.given, capped=CERTIFIED[rule]) if rule in CERTIFIED else None,
    }


def recoverable_share(evidence: Evidence, choice: Allocation) -> float | None:
    """The part of the mean residual's fall, over all singular values, that lies on those above bfloat16's rounding noise; None without a fall.

    ε̃² is a mean over singular values, and ε̃_u − ε̃_c = (ε̃_u² − ε̃_c²)/(ε̃_u + ε̃_c) for the uniform and the chosen steps, so that every
    spectrum's fall is a sum over its singular values, and the share exact. It leaves [0, 1] where one part falls and the other rises.
    """
    steps = uniform(evidence.given).steps, choice.steps
    u, c = (evidence.under(k, evidence.seen.square) for k in steps)
    above_u, above_c = (evidence.under(k, evidence.seen.square_recoverable) for k in steps)
    with np.errstate(invalid="ignore", divide="ignore"):
        scale = np.where(u + c > 0, np.sqrt(u) + np.sqrt(c), np.inf)
        scale = np.where(np.isfinite(u) & np.isfinite(c), scale, np.nan)
        fall, above = (_weighted(evidence, part / scale) for part in (u - c, above_u - above_c))
    return above / fall if fall > 1e-9 else None


def _weighted(evidence: Evidence, values: Any) -> float:
    return float((evidence.given.weight * evidence.means(values)).sum())
