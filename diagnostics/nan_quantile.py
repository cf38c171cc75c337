"""Quantiles of values with gaps, many rows at once."""

import numpy as np
from numpy.typing import ArrayLike, NDArray


def nan_quantile(values: ArrayLike, quantile: float = 0.5) -> NDArray[np.float64]:
    """As `numpy.nanquantile` over the last axis, which goes through rows one by one; missing where all of a row is.

    >>> nan_quantile([[3.0, 1.0, float("nan")], [float("nan")] * 3]).tolist()
    [2.0, nan]
    """
    ascending = np.sort(np.asarray(values, dtype=np.float64), axis=-1)  # missing values last
    if not ascending.shape[-1]:
        return np.full(ascending.shape[:-1], np.nan)
    place = quantile * np.maximum((~np.isnan(ascending)).sum(axis=-1) - 1, 0)
    below = np.floor(place).astype(np.intp)
    low, high = (
        np.take_along_axis(ascending, np.minimum(i, ascending.shape[-1] - 1)[..., None], axis=-1)[..., 0] for i in (below, below + 1)
    )
    share = place - below
    with np.errstate(invalid="ignore"):  # between two infinities
        return np.where(share > 0, low + share * (high - low), low)
