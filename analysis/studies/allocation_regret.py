"""Would steps allocated early still be right later? (the referee's objection to AMO's early commitment)

Retained gain ρ(t) = [J_t(uniform) − J_t(committed)]/[J_t(uniform) − J_t(oracle_t)], J_t the mean residual over matrices at record t: the share of the
largest gain at t that the steps committed from the default window keep. The oracle is the exact optimum at t, without the cap that protects the worst operator:
the committed steps obey the cap of their window, not that of a later record. Orderings of operators change where several of them tie; regret tells
whether that matters.
"""

from collections.abc import Sequence

import numpy as np
import seaborn as sns
import xarray as xr
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from numpy.typing import NDArray
from scipy.stats import kendalltau

from ...diagnostics.evenly_spread import evenly_spread
from ...diagnostics.newton_schulz.spectral_map import gram_residual, ns_map
from ...diagnostics.schedules.allocation import Allocation, Problem, evaluate, least_mean, problem, uniform
from ...diagnostics.schedules.deriving import SCHEDULES, STEPS, step_costs
from ...diagnostics.schedules.refreshing import retained
from ...diagnostics.store.run_error import RunError
from ..figures import axes, finish
from ..run import orthogonalised, residuals_of_records
from ..scheduling import default_window
from ..shape_null import null_spectrum
from . import residual_curves

QUESTION = "Would Newton–Schulz steps allocated early still be right later?"
READING = (
    "Left: how much less residual the committed steps leave than equal steps for all, beside what steps chosen anew at each record would reach, and beside null "
    "allocations, which a real gain must beat. Middle: the share of the possible gain that is kept; near 1, committing early costs nothing. Right: the steps."
)

BUDGET, FAMILY = 5, "matched"
RECORDS = 24  # of the run, evenly spread, at which the allocation is judged: each needs its residuals anew
WINDOW_RECORDS = 16
PERMUTATIONS = 40

Floats = NDArray[np.float64]


def study(run: xr.DataTree, window: slice | None = None) -> xr.Dataset:
    """Retained gain of an allocation committed from the default window, at up to 24 evenly spread records of the run.

    Args:
        run: as from `open_run`.
        window: steps to commit from, both ends included; by default that of `derive_schedule`; up to 16 of its records are read.

    Returns:
        Along `step`: `gain` and `gain_oracle` (1 − J/J(uniform) of the committed steps, and of the best ones for that record),
        `retained` ρ ≤ 1 (missing where less than 0.1 % could be gained), `breaks_cap` (some operator is left worse than the worst one under uniform steps),
        `kendall_tau` of the operators' order by residual under the uniform steps, against the window's; `retained_half` (half, step), of allocations from either
        half of the window; `gain_permuted` (quantile, step) of allocations from curves with permuted operators, `gain_reversed`, the committed steps
        with the hardest operator's given to the easiest, `gain_shape`, an allocation from Gaussian matrices of the same shapes. `steps` (allocation,
        operator); `residual` (operator) in the window under the uniform steps; `later` (step): after the window.

    Raises:
        ValueError: no orthogonalised matrix, no spectrum in the window, or a single operator, among which nothing can be allocated.
    """
    geometry = orthogonalised(run)
    window = default_window(run) if window is None else window
    in_window = residual_curves.study(run, window, (FAMILY,), records=WINDOW_RECORDS)
    operators = [str(o) for o in in_window["operator"].values]
    if len(operators) < 2:
        raise RunError(f"all orthogonalised matrices are {operators[0]}, so there is nothing to allocate steps between")
    known = np.isin(geometry["operator"].values, operators)
    geometry = geometry if known.all() else geometry.isel(matrix=known)
    cost = step_costs(geometry["rows"].values, geometry["cols"].values, [geometry["operator"].values == o for o in operators])
    weight = [int((geometry["operator"].values == o).sum()) for o in operators]

    def of_curves(curves: Floats) -> Problem:
        return problem(curves, STEPS, cost, weight, BUDGET)

    steps, curves = _curves(geometry, operators)
    own = in_window["residual"].values[0]
    given = of_curves(own)
    hardness = own[:, STEPS.index(BUDGET)]
    allocations = {"uniform": uniform(given).steps, "committed": least_mean(given).steps}
    for half, part in zip(("first half", "second half"), _halves(geometry, window), strict=True):
        allocations[half] = (
            allocations["committed"] if part is None else least_mean(of_curves(_window_curves(run, part, operators, own))).steps
        )
    allocations["reversed"] = _reversed(allocations["committed"], hardness)
    allocations["shape"] = least_mean(of_curves(_shape_curves(geometry, operators))).steps
    rng = np.random.default_rng(0)
    permuted = [least_mean(of_curves(own[rng.permutation(len(operators))])).steps for _ in range(PERMUTATIONS)]

    at = [of_curves(c) for c in curves]
    baseline = np.array([uniform(p).mean_residual for p in at])
    kept = {name: np.array([retained(p, allocations[name]) for p in at]).T for name in ("committed", "first half", "second half")}
    tau = [_tau(hardness, c[:, STEPS.index(BUDGET)]) for c in curves]
    quantiles = np.quantile([1 - _mean(at, k) / baseline for k in permuted], [0.05, 0.5, 0.95], axis=0)
    return xr.Dataset(
        {
            "retained": ("step", kept["committed"][0]),
            "gain": ("step", kept["committed"][1]),
            "gain_oracle": ("step", kept["committed"][2]),
            "breaks_cap": ("step", [evaluate(p, allocations["committed"]).max_residual > p.cap for p in at]),
            "kendall_tau": ("step", tau),
            "retained_half": (("half", "step"), np.stack([kept["first half"][0], kept["second half"][0]])),
            "gain_permuted": (("quantile", "step"), quantiles),
            "gain_reversed": ("step", 1 - _mean(at, allocations["reversed"]) / baseline),
            "gain_shape": ("step", 1 - _mean(at, allocations["shape"]) / baseline),
            "later": ("step", steps > in_window.attrs["last_step"]),
            "steps": (("allocation", "operator"), list(allocations.values())),
            "residual": ("operator", hardness),
        },
        coords={
            "step": steps,
            "half": ["first", "second"],
            "quantile": [0.05, 0.5, 0.95],
            "allocation": list(allocations),
            "operator": operators,
        },
        attrs={
            "budget": BUDGET,
            "family": FAMILY,
            "first_step": in_window.attrs["first_step"],
            "last_step": in_window.attrs["last_step"],
            "cost_reversed": evaluate(given, allocations["reversed"]).cost / given.budget,
        },
    )


def _mean(at: Sequence[Problem], steps: Sequence[int]) -> Floats:
    found: list[Allocation] = [evaluate(p, steps) for p in at]
    return np.array([allocation.mean_residual for allocation in found])


def _curves(geometry: xr.Dataset, operators: Sequence[str]) -> tuple[NDArray[np.int64], Floats]:
    """R_g(k) at evenly spread records in which every operator has a spectrum: steps, and shape (records, operators, counts)."""
    label = geometry["operator"].values
    there = np.isfinite(geometry["condition_number"].values)
    whole = np.flatnonzero(np.all([there[:, label == o].any(axis=1) for o in operators], axis=0))
    chosen = geometry[["sigma_quantile"]].isel(step=whole[evenly_spread(len(whole), RECORDS)]).load()
    residual = residuals_of_records(chosen, [SCHEDULES[FAMILY](k) for k in STEPS])
    curves = np.stack([np.nanmean(residual[:, :, label == o], axis=-1) for o in operators])
    return chosen["step"].values, curves.transpose(2, 0, 1)


def _halves(geometry: xr.Dataset, window: slice) -> list[slice | None]:
    """The window's records in two halves; None where there is a single record."""
    steps = geometry["step"].sel(step=window).values
    if len(steps) < 2:
        return [None, None]
    middle = len(steps) // 2
    return [slice(int(steps[0]), int(steps[middle - 1])), slice(int(steps[middle]), int(steps[-1]))]


def _window_curves(run: xr.DataTree, window: slice, operators: Sequence[str], otherwise: Floats) -> Floats:
    """The window's curves, in the operators' order; of those that it holds no spectrum of, what is given."""
    try:
        found = residual_curves.study(run, window, (FAMILY,), records=WINDOW_RECORDS)
    except ValueError:
        return otherwise
    curves = otherwise.copy()
    for g, operator in enumerate(operators):
        if operator in found["operator"].values:
            curves[g] = found["residual"].sel(operator=operator).values[0]
    return curves


def _shape_curves(geometry: xr.Dataset, operators: Sequence[str]) -> Floats:
    """R_g(k) of Gaussian matrices of the operators' shapes."""
    shapes = list(zip(geometry["operator"].values, geometry["rows"].values.tolist(), geometry["cols"].values.tolist(), strict=True))
    schedules = [SCHEDULES[FAMILY](k) for k in STEPS]
    of_shape = {s: [float(gram_residual(ns_map(null_spectrum(*s), c))) for c in schedules] for s in {(m, n) for _, m, n in shapes}}
    return np.array([np.mean([of_shape[m, n] for o, m, n in shapes if o == operator], axis=0) for operator in operators])


def _reversed(steps: Sequence[int], hardness: Floats) -> tuple[int, ...]:
    """The same steps with the hardest operator's given to the easiest, and so on."""
    order = np.argsort(hardness, kind="stable")
    result = np.empty(len(steps), np.int64)
    result[order] = np.asarray(steps)[order[::-1]]
    return tuple(result.tolist())


def _tau(a: Floats, b: Floats) -> float:
    return float(kendalltau(a, b).statistic) if np.ptp(a) > 0 and np.ptp(b) > 0 else float("nan")


def plot(dataset: xr.Dataset) -> Figure:
    """Gains over training, the retained share, and the steps of each allocation."""
    figure, (left, middle, right) = axes(3, width=4.8, height=4.6)
    step, colours = dataset["step"].values, sns.color_palette("deep")
    marker = "o" if len(step) < 3 else None
    low, median, high = (100 * dataset["gain_permuted"].sel(quantile=q).values for q in (0.05, 0.5, 0.95))
    left.fill_between(step, low, high, color="0.85", linewidth=0)
    left.plot(step, median, color="0.55", linewidth=1, marker=marker, label="permuted operators (5–95 %)")
    lines = {"gain_oracle": (colours[2], "-", "best at each record"), "gain": (colours[0], "-", "committed"),
             "gain_shape": (colours[1], "--", "from shapes alone"), "gain_reversed": (colours[3], ":", "reversed")}  # fmt: skip
    for name, (colour, style, label) in lines.items():
        left.plot(step, 100 * dataset[name].values, color=colour, linestyle=style, linewidth=1.6, marker=marker, label=label)
    left.axhline(0, color="0.4", linewidth=0.8)
    _mark_window(left, dataset)
    finish(left, title="Residual saved against equal steps", x="optimizer step", y="gain (% of the mean residual)")
    left.legend(fontsize=7, loc="upper center", bbox_to_anchor=(0.5, -0.16), ncols=2, frameon=False)
    for half, style in (("first", "--"), ("second", ":")):
        values = dataset["retained_half"].sel(half=half).values
        middle.plot(step, values, color="0.55", linestyle=style, linewidth=1.2, marker=marker, label=f"from the window's {half} half")
    middle.plot(step, dataset["retained"].values, color=colours[0], linewidth=1.8, marker=marker, label="committed")
    middle.axhline(1, color="0.4", linewidth=0.8)
    known = dataset["retained"].values[np.isfinite(dataset["retained"].values)]
    middle.set_ylim(min(0.0, float(known.min()) if len(known) else 0.0) - 0.05, max(1.1, float(known.max()) if len(known) else 1.1) + 0.05)
    _mark_window(middle, dataset)
    finish(middle, title="Retained gain ρ (shaded: the window)", x="optimizer step", y="share of the possible gain")
    middle.legend(fontsize=7, loc="upper center", bbox_to_anchor=(0.5, -0.16), ncols=2, frameon=False)
    _table(right, dataset)
    return figure


def _mark_window(ax: Axes, dataset: xr.Dataset) -> None:
    ax.axvspan(dataset.attrs["first_step"], dataset.attrs["last_step"], color="0.5", alpha=0.12, linewidth=0)


def _table(ax: Axes, dataset: xr.Dataset) -> None:
    shown = dataset["steps"].sel(allocation=["committed", "first half", "second half", "shape", "reversed"])
    counts = shown.values.T
    ax.imshow(counts, cmap="Blues", vmin=STEPS[0] - 2, vmax=STEPS[-1] + 2, aspect="auto")
    for (i, j), k in np.ndenumerate(counts):
        ax.text(j, i, str(k), ha="center", va="center", fontsize=9, color="white" if k >= 7 else "black")
    ax.set_xticks(range(counts.shape[1]), [str(a) for a in shown["allocation"].values], fontsize=8, rotation=25)
    ax.set_yticks(range(counts.shape[0]), [str(o) for o in dataset["operator"].values], fontsize=8)
    ax.grid(False)
    finish(ax, title=f"Steps per operator, at the cost of {dataset.attrs['budget']} for all", x="", y="")


def summary(dataset: xr.Dataset) -> str:
    """The result in a sentence."""
    first, last = dataset.attrs["first_step"], dataset.attrs["last_step"]
    later = dataset.isel(step=np.flatnonzero(dataset["later"].values))
    agree = int((dataset["steps"].sel(allocation="first half") == dataset["steps"].sel(allocation="second half")).sum())
    halves = f"The window's halves agree in {agree} of {dataset.sizes['operator']} operators."
    if not later.sizes["step"]:
        return f"No record lies after the window (steps {first} to {last}), so whether its allocation lasts cannot be told. {halves}"
    gain, retained = later["gain"].values, later["retained"].values
    text = (
        f"Steps committed from steps {first} to {last} later leave {np.median(gain):.1%} less residual than {dataset.attrs['budget']} for all "
        f"(median of {len(gain)} records)"
    )
    known = retained[np.isfinite(retained)]
    tau = later["kendall_tau"].values[np.isfinite(later["kendall_tau"].values)]
    if len(known):
        text += f"; they keep ρ = {np.median(known):.2f} of what steps chosen anew would gain, {known.min():.2f} at worst"
    if len(tau):
        text += f", while the operators' order has a Kendall τ of {tau.min():.2f} to {tau.max():.2f} with the window's"
    nulls = {
        "permuted operators": later["gain_permuted"].sel(quantile=0.95).values,
        "shapes alone": later["gain_shape"].values,
        "reversed steps": later["gain_reversed"].values,
    }
    beaten = [name for name, null in nulls.items() if np.median(gain - null) > 0]
    left = [name for name in nulls if name not in beaten]
    verdict = f"It beats all null allocations ({', '.join(beaten)})" if not left else f"It does not beat {', '.join(left)}"
    broken = int(later["breaks_cap"].sum())
    halves += f" In {broken} of {len(gain)} later records some operator is worse off than the worst one with equal steps." if broken else ""
    refresh = " Where ρ falls under 0.5 the schedule should be derived anew." if len(known) and known.min() < 0.5 else ""
    return f"{text}. {verdict}. {halves}{refresh}"
