"""The steps whose records a schedule is derived from when nobody says which: from the end of warm-up, 1 % of the training."""

import numpy as np
from numpy.typing import NDArray

# Momentum of 0.95 forgets its zero start in about this many steps.
BURN_IN = 20
# So many records at least, and this share of the steps.
SNAPSHOTS = 8
WINDOW_SHARE = 0.01
# Warm-up is over where this share of the largest learning rate is reached.
WARM = 0.99


def observation_window(
    step: NDArray[np.integer], total: int, lr_step: NDArray[np.integer], lr: NDArray[np.floating]
) -> tuple[int, int]:  # fmt: skip
    """First and last step of the window, both of it.

    It begins with the first record after 20 steps at which the learning rate has come to 99 % of its largest value, and lasts 1 % of the
    `total` steps and 8 records; fewer records where there are no more.

    Args:
        step: of every record, ascending, shape (records,).
        total: steps of the training.
        lr_step, lr: the records of the learning rate, shape (records,), NaN where it is not known.

    >>> step = np.arange(10, 1010, 10)
    >>> observation_window(step, 1000, step, np.minimum(step / 300, 1.0))
    (300, 370)
    """
    start = min(BURN_IN, int(step[-1]))
    if np.isfinite(lr).any():
        start = max(start, int(lr_step[np.nanargmax(lr >= WARM * np.nanmax(lr))]))
    inside = step[step >= start]
    if not len(inside):
        return int(step[0]), int(step[-1])
    last = max(int(inside[0] + WINDOW_SHARE * total), int(inside[min(SNAPSHOTS, len(inside)) - 1]))
    return int(inside[0]), last
