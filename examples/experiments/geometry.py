"""Are AMO's four findings about Newton–Schulz inputs found here, and how much of each is the matrices' shape?

    python -m optiscope.examples.experiments.geometry -o runs/

Correlation of log10 κ with the residual; which operators are hard; the profile over depth; shallow against deep layers. Each beside what shape alone
gives, and on two architectures in which different operators are square. Reads the `uniform-5` trainings of `budgets`, which it trains where they are
not there.
"""

import argparse
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import xarray as xr
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from scipy.stats import pearsonr, spearmanr

from optiscope.analysis import kappa_by_layer, kappa_by_operator, kappa_vs_residual, open_run, shallow_vs_deep
from optiscope.analysis.figures import axes, finish, intervals, operator_palette
from optiscope.analysis.run import orthogonalised, residual_of_records
from optiscope.analysis.shape_null import null_log10_condition
from optiscope.diagnostics.newton_schulz.families import FAMILIES, repeat_last
from optiscope.examples.experiments.budgets import BASELINE, plan_of
from optiscope.examples.experiments.command import Experiment, Result, options, run, table
from optiscope.examples.experiments.conditions import BUDGET, CONDITIONS
from optiscope.examples.experiments.paired import mean_interval, with_interval
from optiscope.examples.experiments.tuning import trained, tuned

PAPER = {"pearson": 0.729, "hardest": "attn_v", "easiest": "mlp_down"}  # AMO, Fig. 3 (Qwen3-0.6B)
# In the order of the figure. Of the shape: how far the residual follows from what Gaussian matrices of the same shapes have.
PREDICTORS = {
    "log10_kappa": "log10 κ",
    "shape": "log10 κ of shape alone",
    "log10_kappa_excess": "log10 κ − that of shape",
    "log10_spread": "log10 σ₁/σ.95r",
    "within": "log10 κ, within operators",
    "jordan": "log10 κ, Jordan's residual",
}


def measure(arguments: argparse.Namespace) -> Result:
    """The studies of every seed's training."""
    plan, grid = plan_of(arguments)
    treatment = CONDITIONS[BASELINE]
    lr, _ = tuned(arguments.output, plan, BASELINE, treatment, grid)
    trainings = [
        {"model": model, "seed": one["seed"], "lr": lr, **studied(one["store"])}
        for model in plan.models
        for one in trained(arguments.output, plan, model, BASELINE, treatment, lr)
    ]
    return {"trainings": trainings}


def studied(store: Path) -> dict[str, Any]:
    """The four findings in one run."""
    run = open_run(store)
    scatter, by_operator, by_layer = kappa_vs_residual.study(run), kappa_by_operator.study(_hidden(run)), kappa_by_layer.study(_hidden(run))
    operators = [str(o) for o in by_operator["operator"].values]
    depth = shallow_vs_deep.study(_hidden(run), operators)
    return {
        "pearson": correlations(run, scatter),
        "operators": operators,
        "kappa": by_operator["overall"].values.tolist(),
        "null": by_operator["null"].values.tolist(),
        "excess": by_operator["overall_excess"].values.tolist(),
        "depth_step": int(by_layer["step"].values[-1]),
        "depth": by_layer["median"].values[-1].tolist(),
        "trend": float(by_layer["trend"].values[-1]),
        "deep_over_shallow": depth["difference"].values.tolist(),
    }


def _hidden(run: xr.DataTree) -> xr.DataTree:
    """The run without the matrices that are not orthogonalised (embedding, head), which AMO says nothing of."""
    return xr.DataTree.from_dict({"/": run.to_dataset(), "/geometry": orthogonalised(run)})


def correlations(run: xr.DataTree, scatter: xr.Dataset) -> dict[str, float]:
    """Pearson's r of the residual with each of `PREDICTORS`, over the pairs whose κ is measured."""
    geometry = orthogonalised(run)
    residual = np.where(scatter["is_floor"].values, np.nan, scatter["residual"].values)
    kappa = scatter["log10_kappa"].values
    shape = [null_log10_condition(int(m), int(n)) for m, n in zip(geometry["rows"].values, geometry["cols"].values, strict=True)]
    jordan = residual_of_records(geometry, repeat_last(FAMILIES["jordan"].coefficients, BUDGET))
    found = {str(p): float(scatter["pearson"].sel(predictor=p)) for p in scatter["predictor"].values}
    # Each operator's own mean taken off both: what is left when the differences between operators are gone.
    label = geometry["operator"].values
    centred = [values - _operator_means(np.where(np.isnan(residual), np.nan, values), label) for values in (kappa, residual)]
    return found | {
        "shape": _pearson(np.broadcast_to(shape, residual.shape), residual),
        "within": _pearson(*centred),
        "jordan": _pearson(kappa, np.where(np.isnan(residual), np.nan, jordan)),
    }


def _operator_means(values: np.ndarray, label: np.ndarray) -> np.ndarray:
    result = np.empty(values.shape[1])
    for operator in np.unique(label):
        result[label == operator] = np.nanmean(values[:, label == operator])
    return result


def _pearson(x: np.ndarray, y: np.ndarray) -> float:
    both = np.isfinite(x) & np.isfinite(y)
    return float(pearsonr(x[both], y[both]).statistic)


def of(result: Result, model: str) -> list[dict[str, Any]]:
    """The trainings of an architecture."""
    return [t for t in result["trainings"] if t["model"] == model]


def models(result: Result) -> list[str]:
    """The architectures, in order."""
    return list(dict.fromkeys(t["model"] for t in result["trainings"]))


def _spread(trainings: list[dict[str, Any]], name: str, *, log: bool = False) -> np.ndarray:
    """Lower end, mean and upper end over seeds of a list per training, shape (3, length); of logarithms if they are to be."""
    values = np.array([t[name] for t in trainings], float)
    bars = np.array([mean_interval(column) for column in (np.log10(values) if log else values).T]).T
    return 10**bars if log else bars


def tell(result: Result) -> str:
    """Correlations, and per architecture its operators."""
    names = models(result)
    header = ["Pearson's r with ε̃", *(f"{model}, {len(of(result, model))} seeds" for model in names)]
    rows = [
        [label, *(with_interval(*mean_interval([t["pearson"][name] for t in of(result, model)]), ".3f") for model in names)]
        for name, label in PREDICTORS.items()
    ]
    parts = [table(header, rows)]
    for model in names:
        parts += [_operators_told(of(result, model), model), _ranking_told(of(result, model), model)]
    return "\n\n".join(parts)


def _operators_told(trainings: list[dict[str, Any]], model: str) -> str:
    kappa, excess, deep = (
        _spread(trainings, name, log=log) for name, log in (("kappa", True), ("excess", False), ("deep_over_shallow", False))
    )
    rows = [
        [
            trainings[0]["operators"][i], with_interval(*kappa[:, i], ".0f"), f"{trainings[0]['null'][i]:.1f}", with_interval(*excess[:, i], "+.2f"),
            with_interval(*deep[:, i], "+.2f"),
        ]
        for i in np.argsort(-kappa[1])
    ]  # fmt: skip
    return table([model, "κ, median", "κ of shape alone", "decades above shape", "decades, deep over shallow layers"], rows)


def _ranking_told(trainings: list[dict[str, Any]], model: str) -> str:
    n = len(trainings)
    same = {
        end: sum(t["operators"][int(pick(t["kappa"]))] == PAPER[end] for t in trainings)
        for end, pick in (("hardest", np.argmax), ("easiest", np.argmin))
    }
    rank = mean_interval([float(spearmanr(t["kappa"], t["null"]).statistic) for t in trainings])
    trend = mean_interval([t["trend"] for t in trainings])
    return (
        f"In {model} {PAPER['hardest']} is hardest in {same['hardest']} of {n} seeds and {PAPER['easiest']} easiest in {same['easiest']}; the ranking has a Spearman "
        f"correlation of {with_interval(*rank, '.2f')} with that of shape alone. From the first to the last layer κ changes, in decades at step "
        f"{trainings[0]['depth_step']}, by {with_interval(*trend, '+.2f')}; shape alone: 0."
    )


def plot(result: Result) -> Figure:
    """Per architecture: correlations, operators and depth, with intervals over seeds."""
    names = models(result)
    figure, panels = axes(3 * len(names), width=5.2, height=4.2)
    for row, model in enumerate(names):
        left, middle, right = panels[3 * row : 3 * row + 3]
        trainings = of(result, model)
        _correlations(left, trainings, model)
        _operators(middle, trainings, model)
        _depth(right, trainings, model)
    return figure


def _correlations(ax: Axes, trainings: list[Mapping[str, Any]], model: str) -> None:
    bars = np.array([mean_interval([t["pearson"][name] for t in trainings]) for name in PREDICTORS]).T
    intervals(ax, list(PREDICTORS.values()), bars, ["C0", "0.5", *["C0"] * (len(PREDICTORS) - 2)])
    ax.axvline(PAPER["pearson"], color="0.4", linestyle=":", linewidth=1)
    ax.axvline(0, color="0.4", linewidth=0.8)
    finish(ax, title=f"{model}: what tells the residual\n(95 % over seeds; dotted: the paper's r)", x="Pearson's r with ε̃", y="")


def _operators(ax: Axes, trainings: list[dict[str, Any]], model: str) -> None:
    operators = trainings[0]["operators"]
    palette = operator_palette(operators)
    null = np.array([trainings[0]["null"]] * 3)
    intervals(ax, operators, null, ["0.2"] * len(operators), label="Gaussian, same shape", marker="|", markersize=14)
    intervals(ax, operators, _spread(trainings, "kappa", log=True), [palette[o] for o in operators])
    finish(ax, title=f"{model}: κ by operator\n(95 % over seeds)", x="median condition number κ of the NS input", y="", log_x=True)
    ax.legend(loc="upper center", bbox_to_anchor=(0.5, -0.16), frameon=False, fontsize=8)


def _depth(ax: Axes, trainings: list[dict[str, Any]], model: str) -> None:
    operators = trainings[0]["operators"]
    palette = operator_palette(operators)
    intervals(ax, operators, _spread(trainings, "deep_over_shallow"), [palette[o] for o in operators])
    ax.axvline(0, color="0.2", linewidth=1)
    finish(
        ax,
        title=f"{model}: deep against shallow layers\n(95 % over seeds; line: shape alone)",
        x="log10 κ deep − log10 κ shallow",
        y="",
    )


EXPERIMENT = Experiment("geometry", measure, plot, tell)


def main(given: Sequence[str] | None = None) -> Result:
    """The command, of these arguments or those of the process."""
    parser = options(__doc__)
    parser.set_defaults(size="demo", device=None, text=None)
    return run(EXPERIMENT, parser.parse_args(given))


if __name__ == "__main__":
    main()
