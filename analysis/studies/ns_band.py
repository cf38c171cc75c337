"""What do the coefficients in force do to a singular value, and where do this run's lie? (cf. Polar Express, arXiv 2505.16932, Fig. 1)"""

import numpy as np
import seaborn as sns
import xarray as xr
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from numpy.typing import NDArray

from ...diagnostics.newton_schulz.families import FAMILIES, Coefficients, repeat_last
from ...diagnostics.newton_schulz.hazards import negative_intervals, output_band
from ...diagnostics.newton_schulz.polar_express import MATCHED_LOWER_BOUND, matched_coefficients
from ...diagnostics.newton_schulz.spectral_map import ns_map
from ..figures import axes, finish
from ..run import ns_schedules, operators_of, orthogonalised

QUESTION = "What do the Newton–Schulz coefficients in force do to a singular value, and where do this run's lie?"
READING = (
    "The line shows what becomes of a normalised singular value; an ideal orthogonalisation sends all of them to 1. Bars below show where this run's singular "
    "values lie, thick between the typical smallest and largest of an operator. Where a bar reaches into the slope on the left, those directions stay short."
)

GRID = np.geomspace(1e-6, 1, 1201)
BAND_FROM = 1e-2  # the band, the worst error and escape are of x from here on
ESCAPED = 1.3  # no published schedule that works maps anything further up
UNLIFTED = 0.5
SHOWN = 3

Floats = NDArray[np.float64]


def study(run: xr.DataTree) -> xr.Dataset:
    """Band, slope, worst error, sign and escape of each schedule that was in force, and the recorded range of x = σ/‖M‖_F.

    From the coefficients alone, in float64, per `schedule` (most used first): `output` (schedule, x), p(x) on 1e-6 to 1; `slope`, p'(0) = Π a; `band_low`,
    `band_high` and `worst` |1 − p| on [0.01, 1]; `negative_from`, the smallest x with p(x) < 0 (missing: none), where the direction is turned
    round, which no residual sees; `escaped`, share of x, uniform on (0, 1], with |p(x)| > 1.3;
    `ns_steps`; `share` of the orthogonalised records under it. From the records, per operator: `smallest` and `largest`, medians of x_r = 1/(κ√sr)
    and x_1 = 1/√sr (sr the stable rank), `least` and `most`, their extremes; `unlifted`, share of records whose x_r ends under 0.5. Where κ is a bound,
    so is x_r. Where a schedule does not start from M/‖M‖_F (attribute scaling "aol") x is not what it maps, and the four are missing.

    Raises:
        ValueError: no orthogonalised matrix in the run.
    """
    geometry = orthogonalised(run)[["condition_number", "stable_rank", "ns_schedule"]].load()
    index = geometry["ns_schedule"].values
    every = ns_schedules(geometry)
    used = sorted(range(len(every)), key=lambda i: -int((index == i).sum()))
    used = [i for i in used if (index == i).any()]
    operators = operators_of(geometry)
    shapes = [_shape(every[i].coefficients) for i in used]
    largest = 1 / np.sqrt(geometry["stable_rank"].values.astype(np.float64))
    smallest = largest / geometry["condition_number"].values
    ranges = np.stack([_ranges(smallest, largest, index == i, geometry["operator"].values, operators, every[i].coefficients) if every[i].scaling == "frobenius"
                       else np.full((5, len(operators)), np.nan) for i in used])  # fmt: skip
    recorded = int((index >= 0).sum())
    return xr.Dataset(
        {
            "output": (("schedule", "x"), np.stack([ns_map(GRID, every[i].coefficients) for i in used])),
            **{name: ("schedule", [shape[name] for shape in shapes]) for name in shapes[0]},
            "ns_steps": ("schedule", [len(every[i].coefficients) for i in used]),
            "share": ("schedule", [(index == i).sum() / recorded for i in used]),
            **{
                name: (("schedule", "operator"), ranges[:, k])
                for k, name in enumerate(("smallest", "largest", "least", "most", "unlifted"))
            },
        },
        coords={"schedule": _unique([_name(every[i].coefficients) for i in used]), "x": GRID, "operator": operators},
    )


def _shape(coefficients: Coefficients) -> dict[str, float]:
    """What the coefficients alone tell."""
    low, high = output_band(coefficients, (BAND_FROM, 1.0))
    turned = negative_intervals(coefficients)
    uniform = ns_map(np.linspace(0, 1, 20_001)[1:], coefficients)
    return {
        "slope": float(np.prod([a for a, _, _ in coefficients])),
        "band_low": low,
        "band_high": high,
        "worst": max(abs(1 - low), abs(1 - high)),
        "negative_from": turned[0][0] if turned else np.nan,
        # NaN and infinity are what an escape ends in.
        "escaped": float(np.mean(~(np.abs(uniform) <= ESCAPED))),
    }


def _ranges(
    smallest: Floats, largest: Floats, own: NDArray[np.bool_], label: NDArray[np.str_], operators: list[str], coefficients: Coefficients
) -> Floats:
    """Medians and extremes of the smallest and the largest x of each operator, and the share that stays short; shape (5, operators)."""
    found = np.full((5, len(operators)), np.nan)
    for g, operator in enumerate(operators):
        chosen = own & (label == operator) & np.isfinite(smallest)
        if chosen.any():
            low, high = smallest[chosen], largest[chosen]
            short = np.mean(~(ns_map(low, coefficients) >= UNLIFTED))
            found[:, g] = np.median(low), np.median(high), low.min(), high.max(), short
    return found


def _name(coefficients: Coefficients) -> str:
    """Of a family where it is one, else by its first triple."""
    steps = len(coefficients)
    for family in FAMILIES.values():
        if coefficients and coefficients == repeat_last(family.coefficients, steps):
            return f"{steps} steps of {family.name}"
    if steps in MATCHED_LOWER_BOUND and coefficients == matched_coefficients(steps):
        return f"{steps} matched steps"
    return f"{steps} steps" + (" from ({:.4g}, {:.4g}, {:.4g})".format(*coefficients[0]) if coefficients else "")


def _unique(names: list[str]) -> list[str]:
    return [name if names.count(name) == 1 else f"{name} #{names[:i].count(name) + 1}" for i, name in enumerate(names)]


def plot(dataset: xr.Dataset) -> Figure:
    """p(x) of the most used schedules, one panel each, over the recorded range of x."""
    count = min(SHOWN, dataset.sizes["schedule"])
    figure, panels = axes(count, width=7.6 if count == 1 else 5.6, height=4.8)
    for i, ax in enumerate(panels):
        _panel(ax, dataset.isel(schedule=i))
        finish(ax, title=f"{dataset['schedule'].values[i]} ({float(dataset['share'][i]):.0%} of the records)", x="singular value before, x = σ/‖M‖_F",
               y="after, p(x)" if i == 0 else "", log_x=True, log_y=True)  # fmt: skip
    return figure


def _panel(ax: Axes, one: xr.Dataset) -> None:
    x, output = one["x"].values, one["output"].values
    shown = np.where(np.isfinite(output), output, np.nan)
    blue, red = sns.color_palette("deep")[0], sns.color_palette("deep")[3]
    ax.axhline(1, color="0.4", linewidth=0.8)
    low, high = float(one["band_low"]), float(one["band_high"])
    if 0 < low <= high < 1e3:
        ax.fill_between([BAND_FROM, 1], low, high, color=blue, alpha=0.15, linewidth=0)
        ax.annotate(f"[{low:.2f}, {high:.2f}]", (1, high), xytext=(-2, 5), textcoords="offset points", fontsize=8, color=blue, ha="right")
    ax.plot(x, np.where(shown > 0, shown, np.nan), color=blue, linewidth=1.8)
    typical = one["smallest"].values[np.isfinite(one["smallest"].values)]
    left = max(min(x[0], *typical / 2, 1.0), 1e-10)
    # Below the grid p is linear.
    ax.plot([left, x[0]], [left * shown[0] / x[0], shown[0]], color=blue, linewidth=1.8)
    if (shown < 0).any():
        ax.plot(x, np.where(shown < 0, -shown, np.nan), color=red, linestyle="--", linewidth=1.4, label="turned round (p < 0)")
        ax.legend(fontsize=8, loc="lower right", frameon=False)
    known = [str(o) for o in one["operator"].values if np.isfinite(one["smallest"].sel(operator=o))]
    bottom = max(left * shown[0] / x[0], 1e-12)
    for i, operator in enumerate(known):
        # A row per operator below the axis' lower end, in decades.
        y = bottom * 10 ** (-0.28 * (i + 1))
        own = one.sel(operator=operator)
        ax.plot([float(own["least"]), float(own["most"])], [y, y], color="0.6", linewidth=1, solid_capstyle="butt")
        ax.plot([float(own["smallest"]), float(own["largest"])], [y, y], color="0.25", linewidth=3.5, solid_capstyle="butt")
        ax.annotate(
            operator, (float(own["most"]), y), xytext=(4, 0), textcoords="offset points", va="center", fontsize=7, annotation_clip=False
        )
    ax.set_ylim(bottom * 10 ** (-0.28 * (len(known) + 1)), max(3.0, min(high, 1e3) * 1.6 if np.isfinite(high) else 1e3))
    ax.set_xlim(left, 15 if known else 1.2)


def summary(dataset: xr.Dataset) -> str:
    """The result in a sentence."""
    one = dataset.isel(schedule=0)
    count = dataset.sizes["schedule"]
    text = f"{dataset['schedule'].values[0]}" + (
        f", in force in {float(one['share']):.0%} of the records (of {count} schedules)" if count > 1 else ""
    )
    if np.isfinite(one["worst"]):
        text += f": singular values from 0.01 on end in [{float(one['band_low']):.3f}, {float(one['band_high']):.3f}], smaller ones grow {float(one['slope']):.4g}-fold"
    else:
        text += ": singular values from 0.01 on do not stay finite"
    hazards = [
        f"{dataset['schedule'].values[i]} {what}"
        for i in range(count)
        for what in _hazards(dataset.isel(schedule=i))
    ]  # fmt: skip
    text += f". {'; '.join(hazards)}" if hazards else ", and no direction is turned round or escapes"
    short = one["unlifted"].to_series().dropna().sort_values()
    if len(short) and short.iloc[-1] > 0:
        text += f". The smallest singular value ends under {UNLIFTED:g} in {short.iloc[-1]:.0%} of the records of {short.index[-1]}" + (
            f", in {short.iloc[0]:.0%} of {short.index[0]}" if len(short) > 1 else ""
        )
    return text + "."


def _hazards(one: xr.Dataset) -> list[str]:
    found = []
    if np.isfinite(one["negative_from"]):
        found.append(f"turns round directions from x = {float(one['negative_from']):.4f} on")
    if float(one["escaped"]) > 0:
        found.append(f"sends {float(one['escaped']):.1%} of x beyond {ESCAPED:g}")
    return found
