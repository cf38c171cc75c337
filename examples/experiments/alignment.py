"""Are the updates of Muon and AdaMuon as large as AdamW's, and how many tokens do they save? (AdaMuon, Eq. 9–10 and Table 1)

    python -m optiscope.examples.experiments.alignment -o runs/

AdamW, Muon (`match_rms_adamw`) and both published forms of AdaMuon on the demo's hidden matrices; everything else is trained by the same AdamW. Every
optimizer has its learning rate from the same grid: their updates are meant to have one size, 0.2 per learning rate. About twenty minutes of one core.
"""

import argparse
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import seaborn as sns
import torch
import xarray as xr
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from optiscope.analysis import open_run, rms_alignment
from optiscope.analysis.figures import axes, finish, intervals
from optiscope.analysis.training_curve import UNITS, ema, first_reach, saved
from optiscope.examples.experiments.command import Experiment, Result, options, run, table
from optiscope.examples.experiments.paired import mean_interval, paired, with_interval
from optiscope.examples.experiments.training import FULL, QUICK, Plan, Treatment
from optiscope.examples.experiments.tuning import trained, tuned
from optiscope.examples.optimizers.adamuon import AdaMuon

GRID = (2e-3, 4e-3, 8e-3, 16e-3)
EMA_STEPS = 10

# The first is what the others are measured against; betas as in the papers that measured its update's size.
OPTIMIZERS: dict[str, Treatment] = {
    "adamw": Treatment(lambda parameters, lr: torch.optim.AdamW(parameters, lr=lr, betas=(0.9, 0.95), weight_decay=0.0)),
    "muon": Treatment(lambda parameters, lr: torch.optim.Muon(parameters, lr=lr, weight_decay=0.0, adjust_lr_fn="match_rms_adamw")),
    "adamuon-v1": Treatment(lambda parameters, lr: AdaMuon(parameters, lr=lr, weight_decay=0.0)),
    "adamuon-v2": Treatment(lambda parameters, lr: AdaMuon(parameters, lr=lr, weight_decay=0.0, sign=True)),
}
REFERENCE, MUON = tuple(OPTIMIZERS)[:2]


def plan_of(*, short: bool) -> Plan:
    """The first architecture of the plan, a record every tenth step throughout, and validation often enough to tell when a loss is reached."""
    plan = QUICK if short else FULL
    every = {"validate": 8} if short else {"early": 10, "later": 10, "validate": 25}
    return replace(plan.of_first(), **every)


def measure(arguments: argparse.Namespace) -> Result:
    """Train everything that is not there yet."""
    plan, grid = plan_of(short=arguments.short), GRID[2:3] if arguments.short else GRID
    tuning = {name: tuned(arguments.output, plan, name, treatment, grid) for name, treatment in OPTIMIZERS.items()}
    trainings = [
        _kept(name, one, plan)
        for name, treatment in OPTIMIZERS.items()
        for one in trained(arguments.output, plan, plan.first, name, treatment, tuning[name][0])
    ]
    return {
        "tuning": {name: {"lr": lr, "validation": losses} for name, (lr, losses) in tuning.items()},
        "trainings": [t | {"saved": _saved(t, trainings)} for t in trainings],
    }


def _kept(optimizer: str, one: Mapping[str, Any], plan: Plan) -> dict[str, Any]:
    config = plan.models[plan.first]
    step = np.arange(1, len(one["loss"]) + 1)
    return {
        "optimizer": optimizer,
        "seed": one["seed"],
        "lr": one["lr"],
        "tokens_per_step": config.batch * config.sequence,
        "validation": one["validation"],
        "smoothed": ema(one["loss"], step, EMA_STEPS).tolist(),
        "sizes": sizes(one["store"]),
    }


def sizes(store: Path) -> dict[str, Any]:
    """RMS of the hidden matrices' updates per learning rate, over AdamW's 0.2: at every record the median and the 5 and 95 % quantiles over matrices."""
    found = rms_alignment.study(open_run(store))
    # The embedding and the head have the other optimizer in every training.
    hidden = found["to_adamw"].values[:, found["layer"].values >= 0]
    quantiles = np.nanquantile(hidden, [0.05, 0.5, 0.95], axis=1)
    return {"step": found["step"].values.tolist(), "low": quantiles[0].tolist(), "median": quantiles[1].tolist(), "high": quantiles[2].tolist(),
            "furthest": float(np.nanmax(np.abs(hidden - 1)))}  # fmt: skip


def _curve(training: Mapping[str, Any], kind: str) -> xr.Dataset:
    """A loss over steps and tokens, as `first_reach` reads it."""
    losses = training["smoothed"] if kind == "training" else [loss for _, loss in training["validation"]]
    steps = np.arange(1, len(losses) + 1) if kind == "training" else np.array([step for step, _ in training["validation"]])
    columns = {"steps": steps, "tokens": steps * training["tokens_per_step"], "seconds": np.full(len(steps), np.nan)}
    assert columns.keys() == UNITS.keys()
    return xr.Dataset({"ema": ("step", np.asarray(losses, float)), **{unit: ("step", values) for unit, values in columns.items()}})


def _saved(training: Mapping[str, Any], trainings: list[dict[str, Any]]) -> dict[str, float]:
    """Share of AdamW's tokens that it took less to reach the last loss of AdamW's training of the same seed; NaN where that was not reached."""
    reference = next(t for t in trainings if t["optimizer"] == REFERENCE and t["seed"] == training["seed"])
    result = {}
    for kind in ("training", "validation"):
        curve, baseline = _curve(training, kind), _curve(reference, kind)
        target = float(baseline["ema"][-1])
        result[kind] = saved(first_reach(curve, target), first_reach(baseline, target))["tokens"]
    return result


def of(result: Result, optimizer: str) -> list[dict[str, Any]]:
    """The trainings of an optimizer, by seed."""
    return [t for t in result["trainings"] if t["optimizer"] == optimizer]


def tell(result: Result) -> str:
    """Sizes of updates, losses and tokens saved, per optimizer."""
    final = {name: [t["validation"][-1][1] for t in of(result, name)] for name in OPTIMIZERS}
    rows = []
    for name, entry in result["tuning"].items():
        grid = [float(lr) for lr in entry["validation"]]
        at_edge = ", at the edge of the grid" if grid and entry["lr"] in (min(grid), max(grid)) else ""
        trainings = of(result, name)
        ends = np.array([[t["sizes"]["low"], t["sizes"]["high"]] for t in trainings])
        rows.append([
            name, f"{entry['lr']:g}{at_edge}", with_interval(*mean_interval([t["sizes"]["median"][-1] for t in trainings]), ".3f"),
            f"{ends[:, 0].min():.3f} to {ends[:, 1].max():.3f}", f"{max(t['sizes']['furthest'] for t in trainings):.1e}", f"{np.mean(final[name]):.4f}",
            *("" if name in (REFERENCE, other) else paired(final[name], final[other]).told() for other in (REFERENCE, MUON)),
            *("" if name == REFERENCE else _tokens_told(trainings, kind) for kind in ("training", "validation")),
        ])  # fmt: skip
    header = [
        f"{len(of(result, REFERENCE))} seeds", "learning rate", "update RMS over 0.2: median, last record", "5–95 % of matrices, all records", "largest distance from 1",
        "validation loss", f"less {REFERENCE}'s, paired", f"less {MUON}'s, paired", f"tokens saved to {REFERENCE}'s last training loss",
        "to its last validation loss",
    ]  # fmt: skip
    return table(header, rows)


def _tokens_told(trainings: list[dict[str, Any]], kind: str) -> str:
    reached = [t["saved"][kind] for t in trainings if t["saved"][kind] is not None]
    saving = with_interval(*mean_interval(reached), ".1%") + ", " if reached else ""
    return f"{saving}reached in {len(reached)} of {len(trainings)}"


def plot(result: Result) -> Figure:
    """Update sizes over training, losses over tokens, and tokens saved."""
    figure, (left, middle, right) = axes(3, width=5.2, height=4.4)
    colours = dict(zip(OPTIMIZERS, sns.color_palette("deep"), strict=False))
    for name, colour in colours.items():
        trainings = of(result, name)
        step = trainings[0]["sizes"]["step"]
        low, median, high = (np.mean([t["sizes"][part] for t in trainings], axis=0) for part in ("low", "median", "high"))
        left.plot(step, median, color=colour, linewidth=1.5, label=name)
        left.fill_between(step, low, high, color=colour, alpha=0.15, linewidth=0)
        smoothed = np.array([t["smoothed"] for t in trainings])
        tokens = np.arange(1, smoothed.shape[1] + 1) * trainings[0]["tokens_per_step"] / 1000
        middle.plot(tokens, smoothed.mean(axis=0), color=colour, linewidth=1.5)
        steps, losses = zip(*[np.array(t["validation"]).T for t in trainings], strict=True)
        middle.plot(np.array(steps[0]) * trainings[0]["tokens_per_step"] / 1000, np.mean(losses, axis=0), ".", color=colour, markersize=6)
    left.axhline(1, color="0.4", linewidth=0.8)
    left.legend(fontsize=8, frameon=False)
    finish(left, title="Size of an update\n(median and 5–95 % of matrices, mean over seeds)", x="optimizer step", y="RMS(ΔW/lr) / 0.2")
    middle.set_ylim(top=3.0 if max(t["smoothed"][-1] for t in result["trainings"]) < 2.5 else None)
    finish(middle, title="Loss over tokens\n(line: training, smoothed; dots: validation)", x="tokens (thousands)", y="nats per byte")
    _savings(right, result, colours)
    return figure


def _savings(ax: Axes, result: Result, colours: Mapping[str, Any]) -> None:
    others = [name for name in OPTIMIZERS if name != REFERENCE]
    for kind, offset, face in (("training", -0.12, None), ("validation", 0.12, "white")):
        values = [[t["saved"][kind] for t in of(result, name) if t["saved"][kind] is not None] for name in others]
        bars = 100 * np.array([mean_interval(one) if one else (np.nan,) * 3 for one in values]).T
        look = {} if face is None else {"markerfacecolor": face}
        intervals(ax, others, bars, [colours[name] for name in others], label=kind, offset=offset, **look)
        for i, one in enumerate(values):
            ax.plot(100 * np.array(one), np.full(len(one), i + offset + 0.08), ".", color="0.6", markersize=4)
    ax.axvline(0, color="0.4", linewidth=0.8)
    ax.legend(fontsize=8, frameon=False, loc="best")
    finish(ax, title=f"Tokens saved to {REFERENCE}'s last loss\n(mean, 95 %; dots: seeds)", x=f"% of {REFERENCE}'s tokens", y="")


EXPERIMENT = Experiment("alignment", measure, plot, tell)


def main(given: Sequence[str] | None = None) -> Result:
    """The command, of these arguments or those of the process."""
    parser = options(__doc__)
    return run(EXPERIMENT, parser.parse_args(given))


if __name__ == "__main__":
    main()
