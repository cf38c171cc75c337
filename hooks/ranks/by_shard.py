"""Whether an optimizer orthogonalises the pieces of a matrix, each by itself, in the place of the matrix.

No row of a table is asked: a Muon of one's own that works on `to_local()` is in none. The update is held against what a Newton–Schulz iteration makes of the
momentum (and of its mixtures with the gradient) as a whole, and piece by piece. Whichever it is, the update lies along it.
"""

from collections.abc import Iterable, Sequence
from math import sqrt
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from ...diagnostics.newton_schulz.families import FAMILIES
from ...diagnostics.newton_schulz.matrix_iteration import orthogonalised
from ...diagnostics.pieces import Box, cost
from ..adapters import number
from ..observing.snapshot import Snapshot

_STEPS = FAMILIES["jordan"].coefficients[:1] * 5

# Beyond, an iteration on the CPU takes seconds; a matrix that is smaller tells the same of its optimizer.
MAX_COST = 2**31


class Likeness(NamedTuple):
    """Cosines between an update and an orthogonalised momentum: as a whole, and piece by piece."""

    whole: float
    pieces: float

    @property
    def is_by_shard(self) -> bool:
        """Whether the update is that of the pieces: close to it, and clearly not that of the whole."""
        return self.pieces > 0.8 and 1 - self.pieces < (1 - self.whole) / 2


def told(snapshot: Snapshot, boxes: Sequence[Box], step: int) -> list[dict[str, Any]]:
    """What is to be said of a parameter that was put together from these pieces: an entry where its optimizer orthogonalises each by itself, else nothing."""
    reading, matrix = snapshot.reading, snapshot.matrices[0]
    momentum, gradient = snapshot.adapter.momentum(reading), reading.gradient
    if matrix.index is not None or momentum is None or gradient is None or cost(matrix.rows, matrix.cols) > MAX_COST:
        return []
    decay = number(reading.group.get("lr")) * number(reading.group.get("weight_decay", 0.0))
    update = reading.weight.double() * (1 - decay) - reading.parameter.double()
    m, g, mu = momentum.double(), gradient.double(), number(reading.group.get("momentum", reading.group.get("mu", 0.95)))
    found = likeness(update.numpy(), [mixed.numpy() for mixed in (m, g + mu * m, (1 - mu) * g + mu * m)], boxes)
    if found is None or not found.is_by_shard:
        return []
    return [{"step": step, "name": matrix.name, "optimizer": matrix.optimizer, "whole": found.whole, "pieces": found.pieces}]


def likeness(update: NDArray[np.floating], inputs: Iterable[NDArray[np.floating]], boxes: Sequence[Box]) -> Likeness | None:
    """The largest cosines over what may have gone into the iteration; None where the matrix is in one piece, or there is nothing to compare.

    Args:
        update: −ΔW without decay, shape (m, n).
        inputs: momentum and the like, of that shape.
        boxes: the pieces of it that ranks hold.
    """
    held = [box for box in boxes if box.size]
    if update.ndim != 2 or len(held) < 2:
        return None
    found = []
    for matrix in inputs:
        if not (np.isfinite(matrix).all() and np.isfinite(update).all() and matrix.any() and update.any()):
            continue
        apart = np.zeros(matrix.shape, dtype=np.float32)
        for box in held:
            apart[box.slices] = orthogonalised(matrix[box.slices], _STEPS, 1e-7)
        found.append(Likeness(_cosine(update, orthogonalised(matrix, _STEPS, 1e-7)), _piecewise(update, apart, held)))
    return Likeness(max(one.whole for one in found), max(one.pieces for one in found)) if found else None


def _cosine(a: NDArray[np.floating], b: NDArray[np.floating]) -> float:
    a, b = a.astype(np.float64), b.astype(np.float64)
    return float((a * b).sum()) / sqrt(float((a * a).sum()) * float((b * b).sum()) or 1.0)


def _piecewise(update: NDArray[np.floating], apart: NDArray[np.floating], boxes: Sequence[Box]) -> float:
    """The mean over pieces: each may have a scale of its own, by its shape."""
    return float(np.mean([_cosine(update[box.slices], apart[box.slices]) for box in boxes]))
