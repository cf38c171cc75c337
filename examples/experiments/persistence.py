"""Are steps that were allocated early still right later? (the referee's objection to AMO)

    python -m optiscope.examples.experiments.persistence -o runs/

Steps are derived from the window at the beginning of a training under equal steps, and judged on the spectra of its later records: against the best
steps for each record (oracle), against steps from either half of the window, and against nulls: permuted operators, reversed steps, what shapes alone
would have, and what costs alone say.
Reads the `uniform-5` trainings of `budgets`, which it trains where they are not there.
"""

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import seaborn as sns
import xarray as xr
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from optiscope.analysis import allocation_regret, open_run
from optiscope.analysis.figures import axes, finish
from optiscope.analysis.run import operators_of, orthogonalised, residuals_of_records
from optiscope.diagnostics.newton_schulz.polar_express import matched_coefficients
from optiscope.diagnostics.schedules.allocation import least_mean, problem
from optiscope.diagnostics.schedules.deriving import STEPS, step_costs
from optiscope.examples.experiments.budgets import BASELINE, plan_of
from optiscope.examples.experiments.command import Experiment, Result, options, run, table
from optiscope.examples.experiments.conditions import BUDGET, CONDITIONS
from optiscope.examples.experiments.geometry import models, of
from optiscope.examples.experiments.paired import mean_interval, paired, with_interval
from optiscope.examples.experiments.tuning import trained, tuned

NULLS = {"permuted": "permuted operators (median)", "cost": "from costs alone", "shape": "from shapes alone", "reversed": "reversed"}
GAINS = {"committed": "committed", "oracle": "best at each record", **NULLS, "permuted_high": "permuted operators (95 % quantile)"}


def measure(arguments: argparse.Namespace) -> Result:
    """The study of every seed's training."""
    plan, grid = plan_of(arguments)
    treatment = CONDITIONS[BASELINE]
    lr, _ = tuned(arguments.output, plan, BASELINE, treatment, grid)
    trainings = [
        {"model": model, "seed": one["seed"], "lr": lr, **studied(one["store"], plan.window)}
        for model in plan.models
        for one in trained(arguments.output, plan, model, BASELINE, treatment, lr)
    ]
    return {"window": [plan.burn_in, plan.observe], "trainings": trainings}


def studied(store: Path, window: slice) -> dict[str, Any]:
    """Gains and retained share over one run."""
    run = open_run(store)
    found = allocation_regret.study(run, window)
    from_costs = gain_from_costs(run, window).sel(step=found["step"])
    return {
        "step": found["step"].values.tolist(),
        "later": found["later"].values.tolist(),
        "committed": found["gain"].values.tolist(),
        "oracle": found["gain_oracle"].values.tolist(),
        "permuted": found["gain_permuted"].sel(quantile=0.5).values.tolist(),
        "permuted_high": found["gain_permuted"].sel(quantile=0.95).values.tolist(),
        "cost": from_costs["gain"].values.tolist(),
        "cost_breaks_cap": from_costs["breaks_cap"].values.tolist(),
        "shape": found["gain_shape"].values.tolist(),
        "reversed": found["gain_reversed"].values.tolist(),
        "cost_reversed": float(found.attrs["cost_reversed"]),
        "retained": found["retained"].values.tolist(),
        "retained_half": found["retained_half"].values.tolist(),
        "kendall_tau": found["kendall_tau"].values.tolist(),
        "breaks_cap": found["breaks_cap"].values.tolist(),
        "operators": [str(o) for o in found["operator"].values],
        "steps": {str(a): found["steps"].sel(allocation=a).values.tolist() for a in found["allocation"].values},
    }


def gain_from_costs(run: xr.DataTree, window: slice) -> xr.Dataset:
    """What steps gain that know what operators cost and nothing of how they differ otherwise.

    The programme, on the window's mean curve over all matrices in the place of every operator's own; without the cap, which on equal curves
    allows equal steps alone.

    Returns:
        Along `step`, every record: `gain`, 1 − J/J(equal steps), and `breaks_cap`, whether some operator is left worse than the worst one under equal steps.
    """
    geometry = orthogonalised(run)
    label, operators = geometry["operator"].values, operators_of(geometry)
    residual = residuals_of_records(geometry, [matched_coefficients(k) for k in STEPS])
    inside = np.isin(geometry["step"].values, geometry["step"].sel(step=window).values)
    curves = np.tile(np.nanmean(residual[:, inside], axis=(1, 2)), (len(operators), 1))
    members = [label == o for o in operators]
    cost, count = step_costs(geometry["rows"].values, geometry["cols"].values, members), [int(own.sum()) for own in members]
    found = least_mean(problem(curves, STEPS, cost, count, BUDGET), capped=False)
    # (record, operator)
    own, equal = (
        np.stack([np.nanmean(residual[STEPS.index(k)][:, own], axis=1) for own, k in zip(members, steps, strict=True)], axis=1)
        for steps in (found.steps, [BUDGET] * len(operators))
    )
    gain = 1 - np.average(own, axis=1, weights=count) / np.average(equal, axis=1, weights=count)
    worse = own.max(axis=1) > equal.max(axis=1)
    return xr.Dataset({"gain": ("step", gain), "breaks_cap": ("step", worse)}, coords={"step": geometry["step"].values})


def _later(training: dict[str, Any], name: str) -> np.ndarray:
    return np.array(training[name], float)[..., np.array(training["later"])]


def tell(result: Result) -> str:
    """Gains of the committed steps, the oracle's and the nulls', and how they last."""
    names = models(result)
    header = ["records after the window", *(f"{model}, {len(of(result, model))} seeds" for model in names)]
    rows = [
        [f"gain: {label}", *(with_interval(*mean_interval(_means(of(result, model), name)), ".1%") for model in names)]
        for name, label in GAINS.items()
    ]
    rows += [
        [
            f"{label}, less committed",
            *(paired(_means(of(result, model), name), _means(of(result, model), "committed")).told("+.1%") for model in names),
        ]
        for name, label in NULLS.items()
    ]
    for name, label in (
        ("retained", "retained gain ρ"),
        ("retained_half", "ρ from either half of the window"),
        ("kendall_tau", "Kendall's τ of the order"),
    ):
        cells = []
        for model in names:
            worst = min(float(np.nanmin(_later(t, name))) for t in of(result, model))
            cells.append(f"{with_interval(*mean_interval(_means(of(result, model), name)), '.2f')}, at worst {worst:.2f}")
        rows.append([label, *cells])
    for name, label in (("breaks_cap", "committed"), ("cost_breaks_cap", "from costs alone")):
        cells = [
            f"{sum(int(_later(t, name).sum()) for t in of(result, m))} of {sum(sum(t['later']) for t in of(result, m))}" for m in names
        ]
        rows.append([f"records with an operator worse than the worst under equal steps: {label}", *cells])
    for name in ("committed", "first half", "second half", "reversed"):
        cells = ["; ".join(dict.fromkeys(",".join(map(str, t["steps"][name])) for t in of(result, m))) for m in names]
        rows.append([f"steps of {', '.join(result['trainings'][0]['operators'])}: {name}", *cells])
    rows.append(["cost of the reversed steps over the budget", *(f"{max(t['cost_reversed'] for t in of(result, m)):.2f}" for m in names)])
    return table(header, rows)


def _means(trainings: list[dict[str, Any]], name: str) -> list[float]:
    """Per seed, over the records after the window."""
    return [float(np.nanmean(_later(t, name))) for t in trainings]


def plot(result: Result) -> Figure:
    """Per architecture: gains, retained share, and the order of the operators, mean and range over seeds."""
    names = models(result)
    figure, panels = axes(3 * len(names), width=5.0, height=4.4)
    for row, model in enumerate(names):
        left, middle, right = panels[3 * row : 3 * row + 3]
        trainings = of(result, model)
        colours = sns.color_palette("deep")
        for name, label, colour in (
            ("oracle", "best at each record", colours[2]),
            ("committed", "committed", colours[0]),
            ("cost", NULLS["cost"], colours[4]),
            ("shape", NULLS["shape"], colours[1]),
            ("permuted", NULLS["permuted"], "0.5"),
            ("reversed", NULLS["reversed"], colours[3]),
        ):
            _lines(left, trainings, 100 * np.array([t[name] for t in trainings], float), colour, label)
        _lines(middle, trainings, np.array([t["retained"] for t in trainings], float), colours[0], "committed")
        for half in (0, 1):
            values = np.array([t["retained_half"][half] for t in trainings], float)
            _lines(middle, trainings, values, "0.4", f"from the {('first', 'second')[half]} half", linestyle=("--", ":")[half], band=False)
        _lines(right, trainings, np.array([t["kendall_tau"] for t in trainings], float), colours[4], "Kendall's τ with the window")
        for ax in (left, middle, right):
            ax.axvspan(*result["window"], color="0.5", alpha=0.12, linewidth=0)
        left.axhline(0, color="0.4", linewidth=0.8)
        middle.axhline(1, color="0.4", linewidth=0.8)
        middle.set_ylim(top=1.1)
        right.set_ylim(top=1.05)
        finish(
            left,
            title=f"{model}: residual saved against equal steps\n(mean and range of seeds)",
            x="optimizer step",
            y="gain (% of the mean residual)",
        )
        finish(middle, title=f"{model}: retained gain ρ\n(shaded: the window)", x="optimizer step", y="share of the possible gain")
        finish(right, title=f"{model}: order of the operators", x="optimizer step", y="Kendall's τ of residuals")
        for ax in (left, middle):
            ax.legend(fontsize=7, loc="upper center", bbox_to_anchor=(0.5, -0.16), ncols=3, frameon=False)
    return figure


def _lines(
    ax: Axes, trainings: list[dict[str, Any]], values: np.ndarray, colour: Any, label: str, *, linestyle: str = "-", band: bool = True
) -> None:
    step = trainings[0]["step"]
    ax.plot(step, values.mean(axis=0), color=colour, linestyle=linestyle, linewidth=1.5, label=label)
    if band:
        ax.fill_between(step, values.min(axis=0), values.max(axis=0), color=colour, alpha=0.12, linewidth=0)


EXPERIMENT = Experiment("persistence", measure, plot, tell)


def main(given: Sequence[str] | None = None) -> Result:
    """The command, of these arguments or those of the process."""
    parser = options(__doc__)
    parser.set_defaults(size="demo", device=None, text=None)
    return run(EXPERIMENT, parser.parse_args(given))


if __name__ == "__main__":
    main()
