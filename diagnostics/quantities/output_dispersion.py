"""How unequal the rows (and the columns) of an orthogonalised update are: what NorMuon evens out.

Of an exact polar factor every row has length 1 on the short side, where a dispersion measures what the iteration left undone and
nothing else. On the long side the squared norms are leverage scores, unequal for any matrix: :func:`dispersion_null` is that of chance.
"""

from math import sqrt

import numpy as np
from numpy.typing import NDArray


def row_dispersion(output: NDArray[np.floating]) -> float:
    """Standard deviation over mean of the squared row norms ‖O_i·‖², shape (m, n). Dimensionless, blind to O's scale; NaN for O = 0.

    The squared norms are summed in the format of O: in float32 right to 2e-6 of their size. NorMuon (arXiv 2510.05491) divides every row by the root of an average of these. Of the columns: that of `output.T`.

    >>> row_dispersion(np.diag([1.0, 1.0])), row_dispersion(np.array([[2.0, 0.0], [0.0, 0.0]]))
    (0.0, 1.0)
    """
    squared = np.einsum("ij,ij->i", output, output).astype(np.float64)
    mean = float(squared.mean())
    return float(squared.std()) / mean if mean else float("nan")


def dispersion_null(rows: int, cols: int) -> float:
    """:func:`row_dispersion` of the polar factor of a random m×n matrix: √(2(m − n)/(n(m + 2))) for m > n, else 0.

    The column space of a Gaussian matrix is uniform, so ‖O_i·‖² follows Beta(n/2, (m − n)/2), of mean n/m and variance
    2n(m − n)/(m²(m + 2)). Over one matrix the statistic scatters by about 1/√(2m) of itself.

    >>> round(dispersion_null(1024, 256), 4), dispersion_null(256, 1024)
    (0.0765, 0.0)
    """
    return sqrt(2 * max(rows - cols, 0) / (cols * (rows + 2)))
