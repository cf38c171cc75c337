"""Two or more runs under the fair-comparison protocol: the same data and budget, what it took to reach one loss, and how far seeds scatter.

Not one of `STUDIES`, as it takes several runs.
"""

from collections.abc import Mapping

import numpy as np
import seaborn as sns
import xarray as xr
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import EngFormatter
from numpy.typing import ArrayLike
from scipy import stats

from ..diagnostics.evenly_spread import evenly_spread
from .figures import axes, finish
from .run_conditions import DIFFERS, UNKNOWN, conditions, setting
from .training_curve import NOT_REACHED, UNITS, first_reach, saved, spent, stated, training_curve, validation_loss

QUESTION = "Which run reaches a loss with less, and is the difference more than chance?"
READING = (
    "Left: the smoothed losses; the dashed line is the loss that all are to reach. A run whose line crosses it further left needed less. Right: the last loss of "
    "every run, runs that differ only in their seed in one row; where rows overlap, the difference may be chance."
)

POINTS = 600
LEVEL = 0.95


def study(runs: Mapping[str, xr.DataTree], baseline: str | None = None, target: float | None = None) -> xr.Dataset:
    """What each run took to reach the baseline's last smoothed loss, and how the runs' last losses compare.

    The smoothed loss is an exponential moving average with bias correction, for all runs over the same number of steps (attribute
    `time_constant`: 2 % of the baseline's, at least 10). A loss is reached where the smoothed loss is first at it or under it, linear between logged values; with the validation loss,
    the first evaluation at or under the baseline's last one, linear between evaluations.

    Args:
        runs: by name, two or more, as from `open_run`.
        baseline: name of the run that the others are compared with; by default the first.
        target: the training loss to reach; by default the baseline's last smoothed one.

    Returns:
        `ema`, `steps`, `tokens`, `seconds` (run, point), curves thinned to 600 points; `last` (run), the last smoothed loss; `last_validation` (run); `spent`,
        `to_target` (run, unit); `saved` and `saved_validation` (run, unit), 1 − what it took over what the baseline took to reach the same, negative
        where it took more (AdaMuon, Table 1), missing where it was not reached or not known; `value`, `verdict`, `required` as of `conditions`;
        `setting_of` (run), `mean`, `deviation`, `lower`, `upper`, `runs` (setting) over runs that differ in nothing but a stated seed, of the last
        validation loss where all runs have one, else of the last smoothed loss (attribute `outcome`), with Student's 95 % interval, missing for a
        single run; `p_value` (setting): Welch's test against the setting with the lowest mean, missing where one has a single run.

    Raises:
        ValueError: fewer than two runs, an unknown baseline, a target that is no number, or a run without a training loss.
    """
    if len(runs) < 2:
        raise ValueError(f"runs: expected two or more to compare, got {len(runs)}")
    baseline = next(iter(runs)) if baseline is None else baseline
    if baseline not in runs:
        raise ValueError(f"baseline: {baseline} is none of the runs {', '.join(runs)}")
    if target is not None and not np.isfinite(target):
        raise ValueError(f"target: expected a finite loss, got {target}")
    constant = _curve(baseline, runs[baseline], None).attrs["time_constant"]
    curves = {name: _curve(name, run, constant) for name, run in runs.items()}
    aim = float(curves[baseline]["ema"][-1]) if target is None else target
    validated = {name: _validation(runs[name], curve) for name, curve in curves.items()}
    reached = {name: first_reach(curve, aim) for name, curve in curves.items()}
    last_validation = {name: float(v["ema"][-1]) if v is not None else np.nan for name, v in validated.items()}
    reached_validation = {n: first_reach(v, last_validation[baseline]) if v is not None else NOT_REACHED for n, v in validated.items()}
    in_all = {name: spent(curve) for name, curve in curves.items()}
    points = max(min(POINTS, curve.sizes["step"]) for curve in curves.values())
    result = conditions(runs, in_all).assign(
        {
            variable: (("run", "point"), [_thinned(curve[variable].values, points) for curve in curves.values()])
            for variable in ("ema", *UNITS)
        }
    )
    result = result.assign(
        last=("run", [float(curve["ema"][-1]) for curve in curves.values()]),
        last_validation=("run", list(last_validation.values())),
        spent=(("run", "unit"), [list(amount.values()) for amount in in_all.values()]),
        to_target=(("run", "unit"), [list(amount.values()) for amount in reached.values()]),
        saved=(("run", "unit"), [list(saved(reached[name], reached[baseline]).values()) for name in runs]),
        saved_validation=(("run", "unit"), [list(saved(reached_validation[name], reached_validation[baseline]).values()) for name in runs]),
    ).assign_coords(unit=list(UNITS))
    attributes = {"baseline": baseline, "target": aim, "time_constant": constant, "loss_name": curves[baseline].attrs["loss_name"]}
    return _with_settings(result, runs).assign_attrs(attributes)


def _curve(name: str, run: xr.DataTree, constant: float | None) -> xr.Dataset:
    try:
        return training_curve(run, constant)
    except ValueError as error:
        raise ValueError(f"{name}: {error}") from None


def _validation(run: xr.DataTree, curve: xr.Dataset) -> xr.Dataset | None:
    """The validation loss over the scales of the training loss."""
    step, values = validation_loss(run)
    if not len(step):
        return None
    scales = {unit: ("step", np.interp(step, curve["steps"].values, curve[unit].values)) for unit in UNITS}
    return xr.Dataset({"ema": ("step", values), **scales})


def _thinned(values: ArrayLike, points: int) -> list[float]:
    values = np.asarray(values, np.float64)
    chosen = values[evenly_spread(len(values), points)].tolist()
    return [*chosen, *[float("nan")] * (points - len(chosen))]


def _with_settings(result: xr.Dataset, runs: Mapping[str, xr.DataTree]) -> xr.Dataset:
    """Runs that differ in nothing but a stated seed, taken together."""
    outcome = "last_validation" if np.isfinite(result["last_validation"].values).all() else "last"
    keys: dict[tuple[str, object], list[int]] = {}
    seeds: dict[str, set[object]] = {}
    for i, (name, run) in enumerate(runs.items()):
        text, seed = setting(run), stated(run).get("seed")
        # The same seed twice is one result twice, and an unstated one could be.
        is_another = seed is not None and seed not in seeds.setdefault(text, set())
        seeds.setdefault(text, set()).add(seed)
        keys.setdefault((text, None) if is_another else (text, name), []).append(i)
    values = result[outcome].values
    groups = sorted(keys.values(), key=lambda own: (float(np.mean(values[own])), own))
    of_run = np.empty(len(runs), np.int64)
    for g, own in enumerate(groups):
        of_run[own] = g
    intervals = [_interval(values[own]) for own in groups]
    names = list(runs)
    return result.assign(
        setting_of=("run", of_run),
        mean=("setting", [float(np.mean(values[own])) for own in groups]),
        deviation=("setting", [float(np.std(values[own], ddof=1)) if len(own) > 1 else np.nan for own in groups]),
        lower=("setting", [low for low, _ in intervals]),
        upper=("setting", [high for _, high in intervals]),
        runs=("setting", [len(own) for own in groups]),
        p_value=("setting", [np.nan, *(_welch(values[groups[0]], values[own]) for own in groups[1:])]),
    ).assign_coords(setting=[", ".join(names[i] for i in own) for own in groups]).assign_attrs(outcome=outcome)  # fmt: skip


def _interval(values: np.ndarray) -> tuple[float, float]:
    """Student's 95 % interval of a mean, missing for a single value."""
    if len(values) < 2:
        return float("nan"), float("nan")
    half = float(stats.t.ppf((1 + LEVEL) / 2, len(values) - 1) * np.std(values, ddof=1) / np.sqrt(len(values)))
    return float(np.mean(values)) - half, float(np.mean(values)) + half


def _welch(a: np.ndarray, b: np.ndarray) -> float:
    if len(a) < 2 or len(b) < 2 or np.ptp(a) == 0 == np.ptp(b):
        return float("nan")
    return float(stats.ttest_ind(a, b, equal_var=False).pvalue)


def plot(dataset: xr.Dataset) -> Figure:
    """Losses over tokens (steps, where they are not known) and over wall time, and the last loss of every setting."""
    names = [str(name) for name in dataset["run"].values]
    colours = dict(zip(names, sns.color_palette("tab10" if len(names) <= 10 else "husl", len(names)), strict=True))
    first = "tokens" if np.isfinite(dataset["spent"].sel(unit="tokens").values).all() else "steps"
    units = [first, *(["seconds"] if np.isfinite(dataset["spent"].sel(unit="seconds").values).all() else [])]
    figure, panels = axes(len(units) + 1, width=4.8, height=4.2)
    for ax, unit in zip(panels, units, strict=False):
        _curves(ax, dataset, unit, colours)
        if unit != "seconds":
            ax.xaxis.set_major_formatter(EngFormatter(sep=""))
        finish(ax, title=f"Smoothed over {dataset.attrs['time_constant']:.3g} steps" if ax is panels[0] else "Over wall time", x=UNITS[unit],
               y=dataset.attrs["loss_name"] if ax is panels[0] else "")  # fmt: skip
    _last(panels[-1], dataset, colours)
    return figure


def _curves(ax: Axes, dataset: xr.Dataset, unit: str, colours: Mapping[str, object]) -> None:
    for name, colour in colours.items():
        one = dataset.sel(run=name)
        ax.plot(one[unit].values, one["ema"].values, color=colour, linewidth=1.4)
        ax.plot(float(one["to_target"].sel(unit=unit)), dataset.attrs["target"], "o", color=colour, markersize=5)
    ax.axhline(dataset.attrs["target"], color="0.3", linestyle="--", linewidth=0.8)


def _last(ax: Axes, dataset: xr.Dataset, colours: Mapping[str, object]) -> None:
    outcome = dataset[dataset.attrs["outcome"]]
    for name, colour in colours.items():
        ax.plot(float(outcome.sel(run=name)), int(dataset["setting_of"].sel(run=name)), "o", color=colour, markersize=6, label=name)
    rows = np.arange(dataset.sizes["setting"])
    known = np.isfinite(dataset["lower"].values)
    mean, lower, upper = (dataset[name].values[known] for name in ("mean", "lower", "upper"))
    ax.errorbar(mean, rows[known] + 0.18, xerr=[mean - lower, upper - mean], fmt="|", color="0.3", markersize=10, capsize=3)
    counts = [f"{n} seed{'' if n == 1 else 's'}" for n in dataset["runs"].values]
    ax.set_yticks(rows, counts)
    ax.set_ylim(len(rows) - 0.5, -0.5)
    ax.legend(fontsize=8)
    title = "Last validation loss" if dataset.attrs["outcome"] == "last_validation" else "Last smoothed loss"
    finish(ax, title=f"{title}{'; bars: 95 % of seeds’ mean' if known.any() else ''}", x=title.lower(), y="")


def summary(dataset: xr.Dataset) -> str:
    """The result in a sentence or several: fairness, savings, and what seeds allow to say."""
    return f"{_fairness(dataset)} {_savings(dataset)} {_ranking(dataset)}"


def _fairness(dataset: xr.Dataset) -> str:
    by = {
        v: [str(c) for c in dataset["condition"].values[(dataset["verdict"].values == v) & dataset["required"].values]]
        for v in (DIFFERS, UNKNOWN)
    }
    if by[DIFFERS]:
        return f"Not a fair comparison: {', '.join(by[DIFFERS])} differ{'s' if len(by[DIFFERS]) == 1 else ''} between the runs{_unknown(by[UNKNOWN])}."
    if by[UNKNOWN]:
        return f"Whether the comparison is fair is not known{_unknown(by[UNKNOWN])}; attach with about={{…}} to state it."
    return "Data, budget and matrices are the same in all runs."


def _unknown(conditions: list[str]) -> str:
    return f" ({', '.join(conditions)} not stated in every run)" if conditions else ""


def _savings(dataset: xr.Dataset) -> str:
    baseline = dataset.attrs["baseline"]
    told = []
    for name in map(str, dataset["run"].values):
        if name == baseline:
            continue
        kept = {str(u): float(dataset["saved"].sel(run=name, unit=u)) for u in dataset["unit"].values}
        parts = [_saving(unit, value) for unit, value in kept.items() if np.isfinite(value)]
        by_validation = float(dataset["saved_validation"].sel(run=name, unit="steps"))
        validation = f", {by_validation:.1%} of the steps by validation loss" if np.isfinite(by_validation) else ""
        told.append(
            f"{name} {', '.join(parts)}{validation}" if parts else f"{name} never reached it{validation and ' but saved' + validation[1:]}"
        )
    if not np.isfinite(dataset["to_target"].sel(run=baseline, unit="steps")):
        return f"The baseline {baseline} never reached the loss {dataset.attrs['target']:.4g}."
    return f"To a smoothed {dataset.attrs['loss_name']} of {dataset.attrs['target']:.4g}, against {baseline}: {'; '.join(told)}."


def _saving(unit: str, value: float) -> str:
    what = "wall time" if unit == "seconds" else unit
    return f"saved {value:.1%} of the {what}" if value >= 0 else f"took {-value:.1%} more {what}"


def _ranking(dataset: xr.Dataset) -> str:
    """Settings from the lowest mean on, and whether seeds tell them apart."""
    outcome = "validation loss" if dataset.attrs["outcome"] == "last_validation" else "smoothed loss"
    rows = [
        f"{name} {mean:.4g}" + (f" ± {deviation:.2g} over {int(n)} seeds" if n > 1 else "")
        for name, mean, deviation, n in zip(*(dataset[v].values for v in ("setting", "mean", "deviation", "runs")), strict=True)
    ]
    text = f"Last {outcome}, lowest first: {'; '.join(rows)}."
    if dataset.sizes["setting"] == 1:
        return text
    p = dataset["p_value"].values[1:]
    if not np.isfinite(p).all():
        return f"{text} With a single run of a setting, what is chance is not known: repeat each with other seeds and state about={{'seed': …}}."
    close = [str(name) for name, value in zip(dataset["setting"].values[1:], p, strict=True) if value > 1 - LEVEL]
    return f"{text} {'Seeds do not tell the first from ' + '; '.join(close) if close else 'The first is ahead by more than seeds scatter (Welch, 95 %)'}."
