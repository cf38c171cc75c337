"""Does Sophia step by curvature or by sign? (Sophia, arXiv 2305.14342, Section 2.2 and Fig. 7)

Its update is clip(m/max(γh, ε), 1). Where the clip holds, a coordinate takes a sign step; the paper tunes γ so that 10–50 % stay under
it. Where h ≤ 0 the estimate says nothing of the curvature, and the step is a sign step too.
"""

import numpy as np
import xarray as xr
from matplotlib.figure import Figure

from ...diagnostics.bootstrap import layer_interval
from ..by_operator import by_operator
from ..figures import axes, finish, operator_lines
from ..run import recorded

QUESTION = "Does Sophia step by curvature or by sign?"
READING = (
    "Left: the share of coordinates whose step stays under the clip. Inside the grey band γ is well chosen; below it nearly all steps "
    "are sign steps, and γ should be larger; above it the clip hardly protects, and γ should be smaller. Right: the share of "
    "coordinates whose curvature estimate is not positive."
)

TARGET = (0.1, 0.5)  # share of coordinates under the clip, from the paper's tuning of γ


def study(run: xr.DataTree) -> xr.Dataset:
    """Win rate and share of h ≤ 0, per operator over training, and how many records lie in the target band.

    Variables: `win_rate` (share of |m|/max(γh, ε) < 1) and `nonpositive_share` (of h ≤ 0), as of `by_operator`; `below` and `above`,
    shares of all records of matrices with a win rate under 0.1 and over 0.5; `mean_win_rate` with `mean_win_rate_low` and `_high`, 95 %
    over layers.

    Raises:
        ValueError: no optimizer in the run clips by a Hessian estimate.
    """
    reason = "no optimizer in it keeps a Hessian estimate and clips by it (Sophia does), so there is no win rate to study"
    moment = recorded(run, "second_moment", "sophia_win_rate", "sophia_nonpositive_share", otherwise=reason).drop_attrs()
    result = by_operator({"win_rate": moment["sophia_win_rate"], "nonpositive_share": moment["sophia_nonpositive_share"]})
    rates = moment["sophia_win_rate"].values
    known = rates[np.isfinite(rates)]
    per_matrix = moment["sophia_win_rate"].mean("step").values
    low, high = layer_interval(lambda drawn: float(np.mean(per_matrix[drawn])), moment["layer"].values)
    return result.assign(
        below=float((known < TARGET[0]).mean()),
        above=float((known > TARGET[1]).mean()),
        mean_win_rate=float(per_matrix.mean()),
        mean_win_rate_low=low,
        mean_win_rate_high=high,
    )


def plot(dataset: xr.Dataset) -> Figure:
    """Left: win rate with the target band. Right: share of h ≤ 0."""
    figure, (left, right) = axes(2)
    operator_lines(left, dataset, "win_rate", legend=False)
    left.axhspan(*TARGET, color="0.5", alpha=0.12, linewidth=0)
    left.set_ylim(-0.02, 1.02)
    finish(left, title="Win rate, median and quartiles; grey: target", x="optimizer step", y="share of coordinates under the clip")
    operator_lines(right, dataset, "nonpositive_share")
    right.set_ylim(-0.02, 1.02)
    finish(right, title="Curvature not positive, median and quartiles", x="optimizer step", y="share of coordinates with h ≤ 0")
    return figure


def summary(dataset: xr.Dataset) -> str:
    """The result in a sentence."""
    mean, low, high = (float(dataset[f"mean_win_rate{suffix}"]) for suffix in ("", "_low", "_high"))
    interval = f" [{low:.2f}, {high:.2f}]" if np.isfinite(low) else ""
    below, above = float(dataset["below"]), float(dataset["above"])
    text = f"Win rate {mean:.2f}{interval}; {max(1 - below - above, 0):.0%} of the records lie in the target band 0.1–0.5, {below:.0%} below and {above:.0%} above"
    if max(below, above) > 0.5:
        text += f": γ is too {'small' if below > above else 'large'}"
    nonpositive = float(dataset["nonpositive_share"].median())
    return f"{text}. h ≤ 0 in {nonpositive:.1%} of the coordinates (median)." if np.isfinite(nonpositive) else f"{text}."
