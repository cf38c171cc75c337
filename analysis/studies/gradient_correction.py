"""Does variance reduction reduce the gradient's variance? (MARS, arXiv 2411.10438; MARS-M, arXiv 2510.21800)

C = G_t + γβ/(1 − β)·(G_t − G_{t−1}). Where successive gradients are independent, s = γβ/(1 − β) makes Var(C)/Var(G) = (1 + s)² + s², 2.4 for
MARS-M's s = 0.475: noise is added. It falls below 1 only where the gradient that is subtracted shares the noise of the one at hand.
"""

import xarray as xr
from matplotlib.figure import Figure

from ..by_operator import by_operator, median_and_extremes
from ..figures import axes, finish, operator_lines
from ..run import recorded

QUESTION = "Does the corrected gradient vary less than the plain one?"
READING = (
    "Left: below one, the correction takes variance out of the gradient; above one, it puts some in. Right: 1 means that the corrected "
    "gradient points where the plain one does; the lower, the more the correction decides."
)


def study(run: xr.DataTree) -> xr.Dataset:
    """Var(C)/Var(G) over a matrix' elements and cos(C, G), C the corrected gradient as the optimizer averages it (after its clipping).

    Variables: `variance_ratio` and `cosine` (step, operator), medians over the operator's matrices, with `_lower` and `_upper` quartiles;
    `median_variance_ratio` and `median_cosine` (operator) over the whole run, with `_low` and `_high`, 95 % over layers.

    Raises:
        ValueError: no update records in the run, or no optimizer in it corrects the gradient.
    """
    reason = "no optimizer in it corrects the gradient (MARS and MARS-M do), so there is no correction to study"
    update = recorded(run, "update", "correction_variance_ratio", "correction_cosine", otherwise=reason).drop_attrs()
    return by_operator({name: update[f"correction_{name}"] for name in ("variance_ratio", "cosine")})


def plot(dataset: xr.Dataset) -> Figure:
    """Left: Var(C)/Var(G) over training. Right: cosine of C and G."""
    figure, (left, right) = axes(2)
    operator_lines(left, dataset, "variance_ratio", legend=False)
    left.axhline(1, color="0.4", linewidth=0.8)
    finish(left, title="Variance of the corrected gradient, median and quartiles", x="optimizer step", y="Var(C) / Var(G)")
    operator_lines(right, dataset, "cosine")
    finish(right, title="Its direction, median and quartiles", x="optimizer step", y="cosine of C and G")
    return figure


def summary(dataset: xr.Dataset) -> str:
    """The result in a sentence."""
    ratio, cosine = (dataset[f"median_{name}"].to_series() for name in ("variance_ratio", "cosine"))
    text = f"The variance of the corrected gradient over that of the plain one is {median_and_extremes(ratio, '.3g')}"
    return text + (f", their cosine {median_and_extremes(cosine, '.3f')}." if cosine.notna().any() else ".")
