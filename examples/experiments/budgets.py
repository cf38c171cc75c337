"""Does a Newton–Schulz budget divided by operator lower the residual, and does it lower the loss?

    python -m optiscope.examples.experiments.budgets -o runs/

Muon with five steps for all against the steps that are committed after an observed window (least mean under the cap; minimax), against two controls
(the same programme on curves of permuted operators, and in reversed order of hardness, under the true costs), four and six steps for all, torch's own
five steps of Jordan's coefficients, and exact polar factors. Every condition has its learning rate from the same grid. About an hour of one core.
"""

import argparse
from collections.abc import Mapping, Sequence
from dataclasses import replace
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
import seaborn as sns
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from optiscope.analysis.figures import axes, finish, intervals
from optiscope.analysis.training_curve import ema
from optiscope.diagnostics.newton_schulz.polar_express import matched_coefficients
from optiscope.examples.experiments.command import Experiment, Result, options, run, table
from optiscope.examples.experiments.conditions import BUDGET, CONDITIONS
from optiscope.examples.experiments.paired import Paired, mean_interval, paired, with_interval
from optiscope.examples.experiments.residuals import residuals
from optiscope.examples.experiments.training import FULL, LARGE_PLAN, QUICK, Plan
from optiscope.examples.experiments.tuning import trained, tuned

GRID = (0.01, 0.02, 0.04)  # Muon's learning rate
BASELINE = next(iter(CONDITIONS))
COMMITTED = tuple(name for name, treatment in CONDITIONS.items() if treatment.commit is not None)
GAIN = 0.15  # what the mean residual is hoped to fall by
EMA_STEPS = 10
KINDS = ("validation", "training")  # of losses


def plan_of(arguments: argparse.Namespace) -> tuple[Plan, Sequence[float]]:
    """Plan and grid of learning rates that the options ask for."""
    if arguments.short:
        return QUICK, GRID[1:2]
    plan = LARGE_PLAN if arguments.size == "100m" else FULL
    return replace(plan, device=arguments.device or plan.device, text=arguments.text), GRID


def measure(arguments: argparse.Namespace) -> Result:
    """Train everything that is not there yet; in the short form of the first architecture, or it would not be short."""
    plan, grid = plan_of(arguments)
    chosen = [name for name in CONDITIONS if name == BASELINE or name in arguments.conditions]
    return measured(arguments.output, plan.of_first() if arguments.short else plan, grid, chosen)


def measured(folder: Path, plan: Plan, grid: Sequence[float], chosen: Sequence[str] = tuple(CONDITIONS)) -> Result:
    """All trainings of the chosen conditions in all architectures: losses, residuals, steps and FLOPs, per seed."""
    conditions = {name: CONDITIONS[name] for name in chosen}
    tuning = {name: tuned(folder, plan, name, treatment, grid) for name, treatment in conditions.items()}
    trainings = [
        _kept(name, model, one)
        for model in plan.models
        for name, treatment in conditions.items()
        for one in trained(folder, plan, model, name, treatment, tuning[name][0])
    ]
    return {
        "tuning": {name: {"lr": lr, "validation": losses} for name, (lr, losses) in tuning.items()},
        "window": [plan.burn_in, plan.observe],
        "trainings": trainings,
    }


def _kept(condition: str, model: str, one: Mapping[str, Any]) -> dict[str, Any]:
    smooth = ema(one["loss"], np.arange(1, len(one["loss"]) + 1), EMA_STEPS)
    every = max(1, len(smooth) // 20)
    return {
        "model": model,
        "condition": condition,
        "seed": one["seed"],
        "lr": one["lr"],
        "committed": one["committed"],
        "flops": one["flops"],
        "validation": one["validation"],
        "smoothed": [[i + 1, float(smooth[i])] for i in range(every - 1, len(smooth), every)],
        "last_quarter": float(np.mean(one["loss"][-max(1, len(one["loss"]) // 4) :])),
        "seconds": one["seconds"],
        "residuals": residuals(one["store"], matched_coefficients(BUDGET), exact=condition == "exact"),
    }


def of(result: Result, model: str, condition: str) -> list[dict[str, Any]]:
    """The trainings of a condition, by seed."""
    return [t for t in result["trainings"] if (t["model"], t["condition"]) == (model, condition)]


def conditions(result: Result, *, committed: bool = False) -> list[str]:
    """The conditions, in order; or those alone that commit a schedule."""
    return [name for name in result["tuning"] if name in COMMITTED or not committed]


def models(result: Result) -> list[str]:
    """The architectures, in order."""
    return list(dict.fromkeys(t["model"] for t in result["trainings"]))


def losses(result: Result, model: str, condition: str, kind: str) -> list[float]:
    """By seed: the final "validation" loss, or the mean "training" loss of the last quarter of the steps, which single steps move less."""
    return [t["validation"][-1][1] if kind == "validation" else t["last_quarter"] for t in of(result, model, condition)]


def loss_difference(result: Result, model: str, condition: str, kind: str) -> Paired:
    """A loss less the baseline's, over seeds; both have seen the same batches."""
    return paired(losses(result, model, condition, kind), losses(result, model, BASELINE, kind))


def gains(result: Result, model: str, condition: str, *, against: str = "spectra", what: str = "predicted") -> np.ndarray:
    """1 − ε̃/ε̃ of the baseline at every record after the window, shape (seeds, records).

    Args:
        result: of the experiment.
        model: architecture.
        condition: whose gain.
        against: "spectra": the baseline's coefficients on this training's own spectra; "training": the baseline's training of the same seed.
        what: "predicted" or "achieved"; the latter only against a training.
    """
    rows = []
    for own, other in zip(of(result, model, condition), of(result, model, BASELINE), strict=True):
        later = _later(result, own)
        reference = own["residuals"]["baseline"] if against == "spectra" else other["residuals"][what]
        rows.append(1 - np.array(own["residuals"][what], float)[later] / np.array(reference, float)[later])
    return np.array(rows)


def worst_operator(result: Result, model: str, condition: str, *, against: str = "spectra") -> np.ndarray:
    """ε̃ of the worst operator over that of the baseline's worst one, less 1, at every record after the window, shape (seeds, records)."""
    rows = []
    for own, other in zip(of(result, model, condition), of(result, model, BASELINE), strict=True):
        later = _later(result, own)
        reference = own["residuals"]["baseline_by"] if against == "spectra" else other["residuals"]["predicted_by"]
        rows.append(np.max(own["residuals"]["predicted_by"], axis=1)[later] / np.max(reference, axis=1)[later] - 1)
    return np.array(rows)


def _later(result: Result, training: Mapping[str, Any]) -> np.ndarray:
    return np.array(training["residuals"]["step"]) > result["window"][1]


def tell(result: Result) -> str:
    """Per architecture: losses and residuals of every condition, and what the committed schedules save."""
    return "\n\n".join(part for model in models(result) for part in (_conditions(result, model), _committed(result, model)) if part)


def _conditions(result: Result, model: str) -> str:
    base = of(result, model, BASELINE)
    rows = []
    for name in conditions(result):
        trainings = of(result, model, name)
        predicted, achieved = (
            np.mean([np.array(t["residuals"][what], float)[_later(result, t)] for t in trainings]) for what in ("predicted", "achieved")
        )
        cost = [t["flops"] / own["flops"] for t, own in zip(trainings, base, strict=True) if t["flops"] is not None]
        rows.append([
            name, f"{result['tuning'][name]['lr']:g}", f"{np.mean(cost):.2f}" if cost else "", f"{predicted:.3f}", f"{achieved:.3f}", f"{np.mean(losses(result, model, name, 'validation')):.4f}",
            *("" if name == BASELINE else loss_difference(result, model, name, kind).told() for kind in KINDS),
        ])  # fmt: skip
    header = [
        f"{model}, {len(base)} seeds", "learning rate", f"FLOPs, {BASELINE} = 1", "ε̃ predicted", "ε̃ achieved", "validation loss", *(f"{kind} loss less {BASELINE}'s, paired" for kind in KINDS),
    ]  # fmt: skip
    return table(header, rows)


def _committed(result: Result, model: str) -> str:
    rows = []
    for name in (committed := conditions(result, committed=True)):
        trainings = of(result, model, name)
        steps = dict.fromkeys(",".join(str(k) for k in t["committed"].values()) for t in trainings)
        for against, label in (("spectra", "the same spectra"), ("training", "the training of the same seed")):
            gain, worst = gains(result, model, name, against=against), worst_operator(result, model, name, against=against)
            low, mean, high = mean_interval(-gain.mean(axis=1))
            rows.append([
                name, "; ".join(steps), label, with_interval(low, mean, high, "+.1%"), f"{-gain.max():+.1%} to {-gain.min():+.1%}",
                f"{int((gain >= GAIN).all(axis=1).sum())} of {len(gain)}", f"{int((worst <= 0).sum())} of {worst.size}, at most {worst.max():+.1%}",
            ])  # fmt: skip
    if not committed:
        return ""
    operators = ", ".join(of(result, model, committed[0])[0]["committed"])
    header = [
        model, f"steps of {operators}", f"ε̃ against {BASELINE} on", "mean over later records", "all records and seeds", f"seeds with −{GAIN:.0%} in every record",
        "records with the worst operator no worse",
    ]  # fmt: skip
    return table(header, rows)


def plot(result: Result) -> Figure:
    """Per architecture: loss differences, residuals over training, and the gain on the same spectra."""
    # Of all conditions, so that a colour is one condition's in every figure.
    colours = dict(zip(CONDITIONS, sns.color_palette("tab10", len(CONDITIONS)), strict=True))
    colours = {name: colours[name] for name in conditions(result)}
    drawn = (_losses, _residuals, _gains) if conditions(result, committed=True) else (_losses, _residuals)
    figure, panels = axes(len(drawn) * len(models(result)), width=5.2, height=4.4)
    for (model, draw), ax in zip(product(models(result), drawn), panels, strict=True):
        draw(ax, result, model, colours)
    return figure


def _losses(ax: Axes, result: Result, model: str, colours: Mapping[str, Any]) -> None:
    others = [name for name in conditions(result) if name != BASELINE]
    for kind, offset, look in zip(KINDS, (-0.15, 0.2), ({}, {"markerfacecolor": "white", "markersize": 5}), strict=True):
        found = [loss_difference(result, model, name, kind) for name in others]
        bars = np.array([[d.low, d.mean, d.high] for d in found]).T
        label = "final validation loss" if kind == "validation" else "training loss, last quarter"
        intervals(ax, others, bars, [colours[name] for name in others], label=label, offset=offset, **look)
        base = np.array(losses(result, model, BASELINE, kind))
        for i, name in enumerate(others):
            values = losses(result, model, name, kind) - base
            ax.plot(values, np.full(len(values), i + offset + 0.13), ".", color="0.6", markersize=3)
    ax.axvline(0, color="0.4", linewidth=0.8)
    finish(ax, title=f"{model}: losses against {BASELINE}\n(mean, 95 %; dots: seeds)", x="difference (nats per byte)", y="")
    ax.legend(fontsize=7, loc="upper center", bbox_to_anchor=(0.5, -0.14), ncols=2, frameon=False)


def _residuals(ax: Axes, result: Result, model: str, colours: Mapping[str, Any]) -> None:
    for name, colour in colours.items():
        trainings = of(result, model, name)
        values = np.array([t["residuals"]["predicted"] for t in trainings], float)
        step = trainings[0]["residuals"]["step"]
        ax.plot(step, values.mean(axis=0), color=colour, linewidth=1.4, label=name, linestyle="-" if name not in COMMITTED[2:] else "--")
        ax.fill_between(step, values.min(axis=0), values.max(axis=0), color=colour, alpha=0.1, linewidth=0)
    ax.axvspan(*result["window"], color="0.5", alpha=0.12, linewidth=0)
    ax.set_ylim(bottom=-0.01)
    ax.legend(fontsize=7, loc="center left", bbox_to_anchor=(1.0, 0.5), frameon=False)
    finish(
        ax, title=f"{model}: what is left unorthogonalised\n(shaded: the window)", x="optimizer step", y="mean Gram residual ε̃, predicted"
    )


def _gains(ax: Axes, result: Result, model: str, colours: Mapping[str, Any]) -> None:
    for name in conditions(result, committed=True):
        training = of(result, model, name)[0]
        step = np.array(training["residuals"]["step"])[_later(result, training)]
        gain = 100 * gains(result, model, name)
        ax.plot(step, gain.mean(axis=0), color=colours[name], linewidth=1.4, marker="o", markersize=3, label=name)
        ax.fill_between(step, gain.min(axis=0), gain.max(axis=0), color=colours[name], alpha=0.15, linewidth=0)
    ax.axhline(0, color="0.4", linewidth=0.8)
    ax.axhline(100 * GAIN, color="0.4", linewidth=0.8, linestyle=":")
    ax.legend(fontsize=7, loc="best", frameon=False)
    finish(
        ax,
        title=f"{model}: residual saved on the same spectra\n(mean and range of seeds; dotted: {GAIN:.0%})",
        x="optimizer step",
        y=f"% of ε̃ under {BASELINE}",
    )


EXPERIMENT = Experiment("budgets", measure, plot, tell)


def main(given: Sequence[str] | None = None) -> Result:
    """The command, of these arguments or those of the process."""
    parser = options(__doc__)
    parser.add_argument(
        "--conditions",
        nargs="+",
        choices=list(CONDITIONS),
        default=list(CONDITIONS),
        metavar="NAME",
        help=f"of {', '.join(CONDITIONS)}; {BASELINE} always",
    )
    parser.add_argument("--size", choices=["demo", "100m"], default="demo", help="100m: 101 million parameters, for an accelerator")
    parser.add_argument("--device", help="where to train; by default cpu, or cuda with --size 100m")
    parser.add_argument("--text", type=Path, help="a file to train on, read byte by byte; by default the Python language reference")
    return run(EXPERIMENT, parser.parse_args(given))


if __name__ == "__main__":
    main()
