"""Are steps that were allocated early still right later? (the referee's objection to AMO)

    python -m optiscope.examples.experiments.persistence -o runs/

Steps are derived from the window at the beginning of a training under equal steps, and judged on the spectra of its later records: against the best
steps for each record (oracle), against steps from either half of the window, and against nulls (permuted operators, reversed steps, shapes alone).
Reads the `uniform-5` trainings of `budgets`, which it trains where they are not there.
"""

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import seaborn as sns
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from optiscope.analysis import allocation_regret, open_run
from optiscope.analysis.figures import axes, finish
from optiscope.examples.experiments.budgets import BASELINE, plan_of
from optiscope.examples.experiments.command import Experiment, Result, options, run
from optiscope.examples.experiments.conditions import CONDITIONS
from optiscope.examples.experiments.geometry import models, of
from optiscope.examples.experiments.paired import mean_interval, paired
from optiscope.examples.experiments.tuning import trained, tuned

NULLS = {"permuted": "permuted operators (median)", "shape": "from shapes alone", "reversed": "reversed"}


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
    found = allocation_regret.study(open_run(store), window)
    return {
        "step": found["step"].values.tolist(),
        "later": found["later"].values.tolist(),
        "committed": found["gain"].values.tolist(),
        "oracle": found["gain_oracle"].values.tolist(),
        "permuted": found["gain_permuted"].sel(quantile=0.5).values.tolist(),
        "permuted_high": found["gain_permuted"].sel(quantile=0.95).values.tolist(),
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


def _later(training: dict[str, Any], name: str) -> np.ndarray:
    return np.array(training[name], float)[..., np.array(training["later"])]


def tell(result: Result) -> str:
    """The results, line by line."""
    lines = []
    for model in models(result):
        trainings = of(result, model)
        n = len(trainings)
        lines.append(
            f"{model}, {n} seeds; of records behind the window ({result['window'][0]} to {result['window'][1]}), per seed their mean:"
        )
        mean_of = {
            name: [float(np.nanmean(_later(t, name))) for t in trainings]
            for name in ("committed", "oracle", "retained", "kendall_tau", *NULLS, "permuted_high")
        }
        for name in ("committed", "oracle", *NULLS, "permuted_high"):
            low, mean, high = mean_interval(mean_of[name])
            lines.append(f"  gain, {name}: {mean:.1%} [{low:.1%}, {high:.1%}]")
        lines += [f"  {name} less committed: {paired(mean_of[name], mean_of['committed'])}" for name in NULLS]
        for name in ("retained", "kendall_tau"):
            low, mean, high = mean_interval(mean_of[name])
            worst = min(float(np.nanmin(_later(t, name))) for t in trainings)
            lines.append(f"  {name}: {mean:.2f} [{low:.2f}, {high:.2f}], at worst {worst:.2f}")
        halves = [float(np.nanmin(_later(t, "retained_half"))) for t in trainings]
        agree = [sum(a == b for a, b in zip(t["steps"]["first half"], t["steps"]["second half"], strict=True)) for t in trainings]
        lines.append(f"  split half: ρ at worst {min(halves):.2f}; halves agree in {agree} of {len(trainings[0]['operators'])} operators")
        broken = [int(_later(t, "breaks_cap").sum()) for t in trainings]
        lines.append(
            f"  records in which an operator is worse off than the worst with equal steps: {broken} of {sum(trainings[0]['later'])}"
        )
        lines.append(
            f"  {','.join(trainings[0]['operators'])}: " + "; ".join(",".join(map(str, t["steps"]["committed"])) for t in trainings)
        )
    return "\n".join(lines)


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
            ax.legend(fontsize=7, loc="best", frameon=False)
    return figure


def _lines(
    ax: Axes, trainings: list[dict[str, Any]], values: np.ndarray, colour: Any, label: str, *, linestyle: str = "-", band: bool = True
) -> None:
    step = trainings[0]["step"]
    known = np.isfinite(values).any(axis=0)
    mean = np.where(known, np.nanmean(np.where(known, values, 0), axis=0), np.nan)
    ax.plot(step, mean, color=colour, linestyle=linestyle, linewidth=1.5, label=label)
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
