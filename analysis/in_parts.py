"""Arrays of a large run in parts that are whole chunks of the store, so that a few of these are in memory at a time and none is read twice."""

import xarray as xr

BYTES = 16_000_000  # of an array that are read at a time


def windows(variable: xr.Variable) -> list[tuple[slice, slice]]:
    """Records and matrices of an array, shape (step, matrix, …): parts of whole chunks that together are all of it, each of about `BYTES` at most.

    >>> import numpy as np
    >>> windows(xr.Variable(("step", "matrix"), np.zeros((3, 2)), encoding={"chunks": (2, 2)}))
    [(slice(0, 3, None), slice(0, 2, None))]
    """
    steps, matrices = variable.shape[:2]
    if not variable.size:
        return []
    high, wide = (
        min(size, chunk) for size, chunk in zip((steps, matrices), variable.encoding.get("chunks") or (steps, matrices), strict=False)
    )
    each = variable.nbytes / (steps * matrices)
    wide = min(matrices, wide * max(1, int(BYTES / (each * high * wide))))
    if wide == matrices:
        high = min(steps, high * max(1, int(BYTES / (each * high * wide))))
    return [
        (slice(start, min(start + high, steps)), slice(left, min(left + wide, matrices)))
        for start in range(0, steps, high)
        for left in range(0, matrices, wide)
    ]
