"""Does the rotation settle, and does rotating help? (ARO, arXiv 2602.09006)"""

import xarray as xr
from matplotlib.figure import Figure

from ..by_operator import by_operator, median_and_extremes
from ..figures import axes, finish, operator_lines
from ..run import recorded

QUESTION = "Does the rotation settle, and does rotating help?"
READING = (
    "Left: how far the rotation turns in one step; a line that falls to zero has found its axes. Right: above one, the rotated rule "
    "follows the momentum better than the same rule without rotation would; at one, rotating buys nothing."
)


def study(run: xr.DataTree) -> xr.Dataset:
    """Drift 1 − Σ_i (R_tᵀR_{t−1})_ii²/rows of the rotation R that the optimizer keeps, and its gain ⟨M, R f(RᵀM)⟩/⟨M, f(M)⟩.

    Variables: `drift` and `gain` per operator, as of `by_operator`.

    Raises:
        ValueError: no geometry in the run, or no optimizer in it keeps a rotation.
    """
    reason = "no optimizer in it keeps a rotation (ARO does), so there is none to study"
    geometry = recorded(run, "geometry", "rotation_drift", "rotation_gain", otherwise=reason).drop_attrs()
    return by_operator({name: geometry[f"rotation_{name}"] for name in ("drift", "gain")})


def plot(dataset: xr.Dataset) -> Figure:
    """Left: drift over training. Right: gain over training."""
    figure, panels = axes(2)
    for ax, name in zip(panels, ("drift", "gain"), strict=True):
        operator_lines(ax, dataset, name, legend=ax is panels[1])
    finish(
        panels[0],
        title="How far the rotation turns per step, median and quartiles",
        x="optimizer step",
        y="drift (0 stays, towards 1 turns)",
    )
    panels[1].axhline(1, color="0.4", linewidth=0.8)
    finish(panels[1], title="What rotating gains, median and quartiles", x="optimizer step", y="gain of ⟨M, update⟩ (ratio)")
    return figure


def summary(dataset: xr.Dataset) -> str:
    """The result in a sentence."""
    drift = dataset["drift"].median("operator").to_series().dropna()
    text = f"The rotation's drift in one step is {drift.iloc[0]:.3g} at step {drift.index[0]}"
    if len(drift) > 1:
        text += f" and {drift.iloc[-1]:.3g} at step {drift.index[-1]} (median over operators)"
    gain = dataset["median_gain"].to_series()
    return text + (
        f"; rotating multiplies ⟨M, update⟩ by {median_and_extremes(gain, '.3g')}."
        if gain.notna().any()
        else "; what rotating gains is not known."
    )
