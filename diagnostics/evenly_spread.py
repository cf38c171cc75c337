"""A few of many, where all would take too long or draw too much."""

import numpy as np
from numpy.typing import NDArray


def evenly_spread(count: int, most: int) -> NDArray[np.int64]:
    """Indices of at most `most` evenly spread ones of `count`, both ends among them.

    >>> evenly_spread(9, 3).tolist()
    [0, 4, 8]
    """
    return np.asarray(np.unique(np.linspace(0, max(count - 1, 0), min(count, most)).round().astype(np.int64)))
