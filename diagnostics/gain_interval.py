"""How sure is the gain that a schedule promises? The same allocation over other layers of the same kind.

Layers are drawn anew, the steps stay (:mod:`.bootstrap`): an interval tells what another draw of layers would have promised of these steps,
not what another choice would have come to. Steps were chosen on the same layers, so that the gain itself is a little too large.
"""

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike, NDArray

from .bootstrap import interval, multiplicities

Floats = NDArray[np.float64]
Ends = tuple[float, float]


@dataclass(frozen=True)
class GainIntervals:
    """95 % percentile intervals over layers, None where there are fewer than 3 of them.

    Attributes:
        gain: of objective(uniform) − objective(chosen).
        relative: of the same as a share of objective(uniform).
        baseline: operator → of its mean residual under the uniform steps; the layers counted are its own.
    """

    gain: Ends | None
    relative: Ends | None
    baseline: Mapping[str, Ends | None]


def gain_intervals(
    before: Floats,
    after: Floats,
    members: Mapping[str, NDArray[np.bool_]],
    weight: ArrayLike,
    layers: NDArray[np.integer],
    *,
    largest: bool = False,
) -> GainIntervals:
    """Intervals of the gain from `before` to `after` and of each operator's residual before.

    Args:
        before, after: residual of every spectrum under the uniform and under the chosen steps, shape (records, matrices); NaN where
            not recorded.
        members: operator → its matrices, shape (matrices,).
        weight: of the operators in the mean; over those that a resample holds matrices of it is normalised anew.
        layers: of every matrix, −1 for one without, which counts as a layer of its own.
        largest: whether the objective is the largest mean residual of an operator instead of the weighted mean of all.
    """
    drawn = multiplicities(layers)
    known = np.isfinite(before) & np.isfinite(after)
    own = np.stack(list(members.values()), axis=1).astype(np.float64)  # (matrices, operators)
    sums = [np.where(known, values, 0.0).sum(axis=0) for values in (before, after)]
    # einsum, not a matrix product: BLAS may round by its number of threads, and a training must come to the digits of its run on disk.
    count = np.einsum("rm,mg->rg", drawn, own * known.sum(axis=0)[:, None])
    with np.errstate(invalid="ignore", divide="ignore"):
        uniform, chosen = (np.einsum("rm,mg->rg", drawn, own * total[:, None]) / count for total in sums)
        share = np.where(count > 0, np.asarray(weight, np.float64), 0.0)
        j = [
            np.max(np.where(count > 0, r, -np.inf), axis=-1)
            if largest
            else np.where(count > 0, share * r, 0.0).sum(axis=-1) / share.sum(axis=-1)
            for r in (uniform, chosen)
        ]
        gain, relative = j[0] - j[1], 1 - j[1] / j[0]
    enough = {o: count_layers(layers[mask]) >= 3 for o, mask in members.items()}
    return GainIntervals(_ends(gain), _ends(relative), {o: _ends(uniform[:, g]) if enough[o] else None for g, o in enumerate(members)})


def count_layers(layers: NDArray[np.integer]) -> int:
    """How many layers matrices are of; those without one (−1) each count as a layer of their own.

    >>> count_layers(np.array([0, 0, 1, -1, -1]))
    4
    """
    return len(np.unique(layers[layers >= 0])) + int((layers < 0).sum())


def _ends(distribution: Floats) -> Ends | None:
    low, high = interval(distribution)
    return (float(low), float(high)) if np.isfinite(low) and np.isfinite(high) else None
