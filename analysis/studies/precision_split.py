"""What does bfloat16 add to Newton–Schulz? (the residual falls while the direction does not improve)

Rounding M to bfloat16 adds noise of norm ≈ 0.425·2⁻⁸·‖M‖_F(1/√rows + 1/√cols) = φ‖M‖_F. Singular values below it are
not in the iteration's input any more. Further steps lift the noise to 1 like anything else: the Gram residual ε̃, which asks only whether
O is orthogonal, falls; the polar residual ε_pol, which asks whether O is M's own polar factor, does not.
"""

import numpy as np
import seaborn as sns
import xarray as xr
from matplotlib.figure import Figure
from numpy.typing import NDArray

from ...diagnostics.store.run_error import RunError
from ..by_operator import medians_by
from ..figures import axes, finish, intervals, operator_palette
from ..run import common, ns_schedules, operators_of, recorded

QUESTION = "What does bfloat16 add to Newton–Schulz, and from which step on are further steps wasted?"
READING = (
    "Left: solid lines are exact arithmetic, dashed ones bfloat16. While all four fall, steps make the update better. Where the dashed "
    "line of the Gram residual goes on falling and the dashed line of the polar residual does not, further steps only make rounding "
    "noise orthogonal. Right: the share of directions too weak for bfloat16 to carry; where it is large, steps cannot buy them."
)

# A residual that changes by less than this share has not changed.
CHANGE = 0.01
CURVES = {
    ("gram", "exact"): "ns_residual", ("polar", "exact"): "ns_residual_polar",
    ("gram", "bfloat16"): "ns_residual_bfloat16", ("polar", "bfloat16"): "ns_residual_polar_bfloat16",
}  # fmt: skip


def study(run: xr.DataTree) -> xr.Dataset:
    """Residuals of the exact and of the bfloat16 iteration over k steps, and how many singular values lie below bfloat16's floor.

    A curve is the mean over matrices of each one's mean over the records that hold all four residuals.

    Returns:
        `residual` (kind, arithmetic, operator, k), kind "gram" ε̃ or "polar" ε_pol, arithmetic "exact" or "bfloat16", and
        `overall` (kind, arithmetic, k) of all matrices; `noise_from` (operator) and `overall_noise_from`: the number of steps from which on
        bfloat16 only orthogonalises noise, missing where it never does (see :func:`noise_from`); `below_floor` (operator): median share of
        x = σ/‖M‖_F < φ, with `below_floor_low` and `below_floor_high`, 95 % over layers; `steps` (operator): median of the steps in force.

    Raises:
        ValueError: no group precision or geometry in the run, or no orthogonalised matrix.
    """
    reason = "no optimizer in it orthogonalises (Muon does), so there is no iteration that bfloat16 could change"
    low = recorded(run, "precision", *[name for (_, how), name in CURVES.items() if how == "bfloat16"], otherwise=reason)
    exact = [name for (_, how), name in CURVES.items() if how == "exact"]
    low, geometry = common(low, recorded(run, "geometry", *exact, "recoverable_share", "ns_schedule", otherwise=reason))
    curves = [(low if name in low else geometry)[name].values for name in CURVES.values()]
    complete = np.logical_and.reduce([np.isfinite(curve) for curve in curves])
    seen = complete.any(axis=(0, 2))
    if not seen.any():
        raise RunError("no record holds both the exact and the bfloat16 residuals of a matrix; see `diag check`")
    count = complete[:, seen].sum(axis=0)
    # (kind and arithmetic, matrix, k), one curve at a time: all of a long run's are large.
    total = np.stack([np.where(complete, curve, 0)[:, seen].sum(axis=0, dtype=np.float64) for curve in curves])
    per_matrix = total / np.where(count, count, np.nan)
    kept = geometry.isel(matrix=np.flatnonzero(seen))
    operators, label = operators_of(kept), kept["operator"].values
    residual = np.stack([per_matrix[:, label == o].mean(axis=1) for o in operators], axis=1)
    overall = per_matrix.mean(axis=1)
    bars = medians_by(1 - kept["recoverable_share"], label, operators)
    lengths = np.array([len(schedule.coefficients) for schedule in ns_schedules(run["geometry"].to_dataset())] + [np.nan])
    steps = lengths[kept["ns_schedule"].values]  # −1, no schedule: the last
    shape = (2, 2, *residual.shape[1:])
    return xr.Dataset(
        {
            # CURVES counts kinds fastest.
            "residual": (("kind", "arithmetic", "operator", "k"), residual.reshape(shape).swapaxes(0, 1)),
            "overall": (("kind", "arithmetic", "k"), overall.reshape(2, 2, -1).swapaxes(0, 1)),
            "noise_from": ("operator", [noise_from(residual[:, i]) for i in range(len(operators))]),
            "overall_noise_from": noise_from(overall),
            **{name: ("operator", bars[i]) for i, name in enumerate(("below_floor_low", "below_floor", "below_floor_high"))},
            "steps": ("operator", [float(np.nanmedian(steps[:, label == o])) for o in operators]),
        },
        coords={"kind": ["gram", "polar"], "arithmetic": ["exact", "bfloat16"], "operator": operators, "k": np.arange(residual.shape[-1])},
    )


def noise_from(curves: NDArray[np.float64]) -> float:
    """The number of steps from which on bfloat16 steps orthogonalise rounding noise; NaN where they never do.

    That is the first k whose polar residual in bfloat16 is the smallest, up to 1 %, if some later number of steps has both a smaller Gram residual in
    bfloat16 and a smaller polar residual in exact arithmetic: then there was more to gain, and bfloat16 could not.

    Args:
        curves: shape (4, steps + 1): Gram and polar residual in exact arithmetic, then both in bfloat16.

    >>> exact, bfloat16 = [[1, .5, .1], [1, .4, .1]], [[1, .5, .1], [1, .6, .7]]
    >>> noise_from(np.array(exact + bfloat16))
    1.0
    """
    _, exact, gram, polar = curves
    best = int(np.argmax(polar * (1 - CHANGE) <= np.nanmin(polar)))
    later = np.arange(len(polar)) > best
    wasted = later & (gram < gram[best] * (1 - CHANGE)) & (exact < exact[best] * (1 - CHANGE))
    return float(best) if wasted.any() else float("nan")


def plot(dataset: xr.Dataset) -> Figure:
    """Left: both residuals in both arithmetics over k. Right: share of singular values below bfloat16's floor, per operator."""
    operators = [str(o) for o in dataset["operator"].values]
    figure, (left, right) = axes(2)
    table = dataset["overall"].to_dataframe().reset_index()
    table["residual"] = table["kind"].map({"gram": "Gram ε̃", "polar": "polar ε_pol"})
    sns.lineplot(
        table, x="k", y="overall", hue="residual", style="arithmetic", style_order=["exact", "bfloat16"], palette=["C0", "C3"],
        marker="o", ax=left, errorbar=None,
    )  # fmt: skip
    # Exact arithmetic reaches 1e-15; what matters is where bfloat16 leaves it.
    left.set_ylim(bottom=max(float(dataset["overall"].min()), float(dataset["overall"].sel(arithmetic="bfloat16").min()) / 4, 1e-4) * 0.8)
    for k in np.unique(dataset["steps"].values):
        left.axvline(k, color="0.4", linestyle=":", linewidth=1)
    noise = float(dataset["overall_noise_from"])
    if np.isfinite(noise):
        left.axvspan(noise, float(dataset["k"].max()), color="0.5", alpha=0.15, linewidth=0)
    left.set_xlim(0, float(dataset["k"].max()))
    finish(
        left,
        title="Mean residual; dotted: steps in force; grey: only noise added",
        x="Newton–Schulz steps k",
        y="residual of O",
        log_y=True,
    )
    bars = np.stack([dataset[name].values * 100 for name in ("below_floor_low", "below_floor", "below_floor_high")])
    intervals(right, operators, bars, [operator_palette(operators)[o] for o in operators])
    right.set_xlim(left=min(-1.0, right.get_xlim()[0]))
    finish(right, title="Directions too weak for bfloat16; bars: 95 % over layers", x="singular values below the floor φ (%)", y="operator")
    return figure


def summary(dataset: xr.Dataset) -> str:
    """The result in a sentence."""
    k = int(np.median(dataset["steps"].values))
    at = dataset["overall"].sel(k=min(k, int(dataset["k"].max())))
    value = {(kind, how): float(at.sel(kind=kind, arithmetic=how)) for kind, how in CURVES}
    text = (
        f"After {int(at['k'])} steps bfloat16 leaves ε̃ = {value['gram', 'bfloat16']:.3g} and ε_pol = {value['polar', 'bfloat16']:.3g}, exact arithmetic "
        f"{value['gram', 'exact']:.3g} and {value['polar', 'exact']:.3g}; {_noise(dataset)}."
    )
    share = dataset["below_floor"].to_series().dropna()
    if not len(share):
        return text
    most = share.idxmax()
    return f"{text} {most} has most singular values below bfloat16's floor, {share[most]:.1%}."


def _noise(dataset: xr.Dataset) -> str:
    first = float(dataset["overall_noise_from"])
    last = int(dataset["k"].max())
    if not np.isfinite(first):
        return f"up to {last} steps none only orthogonalises rounding noise"
    low = dataset["overall"].sel(arithmetic="bfloat16")
    then = low.sel(k=slice(first + 1, None))
    then = then.isel(k=int(np.argmin(then.sel(kind="gram").values)))
    gram, polar = (f"from {float(low.sel(kind=kind, k=first)):.3g} to {float(then.sel(kind=kind)):.3g}" for kind in ("gram", "polar"))
    return f"from step {int(first)} on further bfloat16 steps orthogonalise rounding noise: by step {int(then['k'])} ε̃ goes {gram}, ε_pol {polar}"
