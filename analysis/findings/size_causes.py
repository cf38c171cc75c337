"""Which scaling, left out or applied once too often, makes updates as large as they are: shapes tell the causes apart."""

from collections.abc import Callable
from math import sqrt
from typing import NamedTuple

import numpy as np
from numpy.typing import ArrayLike, NDArray

# Of an optimizer's matrices, how many a cause must explain.
MAJORITY = 0.9
# How much worse than the best a cause may fit and still be named: bfloat16 moves an update's size by up to some percent.
ALIKE = 0.05


class Cause(NamedTuple):
    """What was done wrong, and by what factor it changes the updates of a matrix of some rows and columns."""

    text: str
    factor: Callable[[int, int], float]


CAUSES = (
    Cause("a missing factor 0.2", lambda m, n: 5.0),
    Cause("a factor 0.2 that is applied twice or does not belong there", lambda m, n: 0.2),
    Cause("√max(rows, cols) applied twice, or to updates that are normalised already", lambda m, n: sqrt(max(m, n))),
    Cause("a missing √max(rows, cols)", lambda m, n: 1 / sqrt(max(m, n))),
    Cause("a missing 0.2·√max(rows, cols)", lambda m, n: 5 / sqrt(max(m, n))),
    Cause("0.2·√max(rows, cols) where it does not belong", lambda m, n: 0.2 * sqrt(max(m, n))),
    Cause("√(rows/cols) in place of 0.2·√max(rows, cols)", lambda m, n: 5 * sqrt(m / n / max(m, n))),
    Cause("√max(1, rows/cols) in place of 0.2·√max(rows, cols)", lambda m, n: 5 * sqrt(max(1, m / n) / max(m, n))),
    Cause("√(rows/cols) applied twice or where it does not belong", lambda m, n: sqrt(m / n)),
    Cause("a missing √(rows/cols)", lambda m, n: sqrt(n / m)),
    Cause("√max(1, rows/cols) applied twice or where it does not belong", lambda m, n: sqrt(max(1, m / n))),
    Cause("a missing √max(1, rows/cols)", lambda m, n: 1 / sqrt(max(1, m / n))),
    Cause("an iteration that does not run, so that the update is M/‖M‖_F", lambda m, n: 1 / sqrt(min(m, n))),
)


def explain(ratio: ArrayLike, low: ArrayLike, high: ArrayLike, expected: ArrayLike, rows: ArrayLike, cols: ArrayLike) -> list[Cause]:
    """The causes that put an update's size where it is, over its target, in nine of ten matrices; the closest and those as close.

    All arguments of shape (matrices,). A cause explains a matrix when what remains of `ratio` without its factor lies between `low` and
    `high`, the bounds that the residual gives; `expected` is what should remain, and decides between causes. Several are left where
    the matrices' shapes cannot tell them apart, as when all are square and alike.
    """
    ratio, low, high, expected = (np.asarray(values, dtype=np.float64) for values in (ratio, low, high, expected))
    found: list[tuple[float, Cause]] = []
    for cause in CAUSES:
        remains = ratio / [cause.factor(int(m), int(n)) for m, n in zip(np.asarray(rows), np.asarray(cols), strict=True)]
        if ((remains >= low) & (remains <= high)).mean() >= MAJORITY:
            found.append((float(np.median(np.abs(np.log(remains / expected)))), cause))
    best = min((distance for distance, _ in found), default=0.0)
    return [cause for distance, cause in sorted(found, key=lambda entry: entry[0]) if distance <= best + ALIKE]


def growth(ratio: NDArray[np.float64], rows: ArrayLike, cols: ArrayLike) -> float:
    """Slope of log ratio over log √max(rows, cols): 0 for a constant factor, ±1 for a √max too many or too few. NaN for one size."""
    side = np.log(np.maximum(np.asarray(rows), np.asarray(cols))) / 2
    if not len(side) or np.ptp(side) < 0.1:
        return float("nan")
    centred = side - side.mean()
    return float(centred @ np.log(ratio) / (centred @ centred))
