"""What a measurement gives, and how it is quiet about numbers that are not finite."""

from typing import TypeAlias

import numpy as np
from numpy.typing import NDArray

# Quantity name → value of one matrix: a number, or a vector along the quantity's extra dimension.
Measured: TypeAlias = dict[str, float | NDArray[np.float64]]

# A run that diverges is data: inf and NaN come out, and no warning appears in somebody's training loop.
quietly = np.errstate(over="ignore", invalid="ignore", divide="ignore")
