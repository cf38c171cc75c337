"""What does weight decay do: how evenly, how much of an update, and where are weights against their equilibrium? (AdamW, arXiv 1711.05101)

Coupled decay (Adam with L2) shrinks coordinate i at the rate ηλ/(√v̂_i + ε), decoupled decay (AdamW) every one at ηλ. Under decoupled decay
and updates u that do not depend on each other or on the weights, RMS(W) settles at RMS(u)·√(η/(2λ)). Momentum makes updates of
successive steps alike: with u an average over β₁ of independent gradients the level is √((1 + β₁)/(1 − β₁)) times that.
"""

import numpy as np
import xarray as xr
from matplotlib.figure import Figure

from ...diagnostics.store.run_error import RunError
from ..by_operator import by_operator, median_and_extremes
from ..figures import axes, finish, intervals, operator_lines, operator_palette
from ..run import betas, common, recorded, records

QUESTION = "What does weight decay do: how evenly, how much of an update, and where are weights against their equilibrium?"
READING = (
    "Spread: at zero every coordinate decays at one rate; at one, the rates of a matrix's coordinates differ tenfold. Hollow marks are "
    "what coupled decay (Adam with L2) makes of the same second moments, filled ones what is in force. Share: how large the decay is beside the whole update. Equilibrium: at one, decay and updates of no memory hold each other; "
    "below, weights would still grow, above, they would still shrink. The dashed line is where updates averaged by momentum lead."
)

# RMS of the update with decoupled decay taken out differs from that of the update by at least this, unless there is none.
COUPLED = 1e-9
SPREADS: tuple[tuple[str, str, dict[str, str]], ...] = (
    ("spread", "in force", {}),
    ("spread_if_coupled", "coupled (Adam with L2)", {"marker": "s", "markerfacecolor": "white"}),
)


def study(run: xr.DataTree) -> xr.Dataset:
    """Spread of the decay rate, decay's share of the update, and RMS(W) over its stationary value, of the matrices that decay.

    Variables, as of `by_operator`, missing where they do not apply: `spread` (log10 of the 95 % over the 5 % quantile of the decay rate of
    coordinates; of optimizers with a second moment), `spread_if_coupled` (the same had decay been coupled, of the recorded v̂), `share` (ηλ·RMS(W)/RMS(ΔW); decoupled decay) and `equilibrium`
    (RMS(W)/(RMS(u)√(η/(2λ))), u the update per learning rate without decay; decoupled decay). Also `decay_times` (operator): the mean
    of ηλ times the steps between first and last record; under 1 weights had no time to settle; and `averaged` (operator):
    √((1 + β₁)/(1 − β₁)), missing where β₁ is not known.

    Raises:
        ValueError: no update records, no optimizer in the run decays weights, or all decay is coupled and no second moment is known.
    """
    names = ("weight_decay", "lr", "weight_rms", "update_rms", "update_rms_per_lr")
    update = recorded(run, "update", *names, otherwise="no weight decay in it is known").drop_attrs()
    decays = (update["weight_decay"].values > 0).any(axis=0)
    if not decays.any():
        raise RunError("no optimizer in it decays weights (weight_decay is 0 throughout), so there is no decay to study")
    update = update.isel(matrix=np.flatnonzero(decays))
    rate = update["lr"] * update["weight_decay"]
    with np.errstate(divide="ignore", invalid="ignore"):
        taken_out = np.abs(update["update_rms_per_lr"] * update["lr"] / update["update_rms"] - 1)
        decoupled = np.fmax.reduce(np.asarray(taken_out), axis=0) > COUPLED
        known = (rate > 0) & (update["update_rms_per_lr"] > 0) & decoupled
        share = (rate * update["weight_rms"] / update["update_rms"]).where(known)
        stationary = update["update_rms_per_lr"] * np.sqrt(update["lr"] / (2 * update["weight_decay"]))
        equilibrium = (update["weight_rms"] / stationary).where(known)
    values = {**_spreads(run, update), "share": share, "equilibrium": equilibrium}
    if not any(np.isfinite(value).any() for value in values.values()):
        raise RunError("its weight decay is coupled, which is told by the second moment; attach with measure=(…, 'second_moment')")
    result = by_operator(values)
    label, steps = update["operator"].values, update["step"].values
    beta1 = {name: pair[0] for name, pair in betas(run).items()}
    momentum = [beta1.get(str(update["optimizer"].values[label == o][0]), np.nan) for o in result["operator"].values]
    times = [
        float(rate.values[:, label == o].mean(where=np.isfinite(rate.values[:, label == o]))) * np.ptp(steps)
        for o in result["operator"].values
    ]
    return result.assign(
        decay_times=("operator", times),
        averaged=("operator", np.sqrt((1 + np.array(momentum)) / (1 - np.array(momentum)))),
    )


def plot(dataset: xr.Dataset) -> Figure:
    """Of what there is: spread per operator, decay's share and RMS(W) over its stationary value over training."""
    present = [name for name in ("spread", "share", "equilibrium") if np.isfinite(dataset[name]).any()]
    figure, panels = axes(len(present), width=5.6)
    operators = [str(o) for o in dataset["operator"].values]
    palette = operator_palette(operators)
    for ax, name in zip(panels, present, strict=True):
        if name == "spread":
            for offset, (which, text, look) in zip((-0.14, 0.14), SPREADS, strict=True):
                bars = np.stack([dataset[f"median_{which}{suffix}"].values for suffix in ("_low", "", "_high")])
                intervals(ax, operators, bars, [palette[o] for o in operators], label=text, offset=offset, **look)
            ax.set_xlim(left=-0.05)
            finish(ax, title="Spread of the decay rate; bars: 95 % over layers", x="95 % over 5 % quantile (decades)", y="operator")
            ax.legend(loc="upper center", bbox_to_anchor=(0.5, -0.14), ncols=2, frameon=False, fontsize=8)
            continue
        operator_lines(ax, dataset, name, legend=ax is panels[-1])
        if name == "share":
            finish(ax, title="Decay's share of the update, median and quartiles", x="optimizer step", y="ηλ·RMS(W)/RMS(ΔW)", log_y=True)
            continue
        ax.axhline(1, color="0.4", linewidth=0.8)
        for factor in np.unique(dataset["averaged"].values[np.isfinite(dataset["averaged"].values)]):
            ax.axhline(factor, color="0.4", linestyle="--", linewidth=0.8)
        finish(
            ax, title="Weights over their stationary size, median and quartiles", x="optimizer step", y="RMS(W)/(RMS(u)√(η/2λ))", log_y=True
        )
    return figure


def summary(dataset: xr.Dataset) -> str:
    """The result in a sentence."""
    parts = []
    spread, level = (dataset[f"median_{name}"].to_series().dropna() for name in ("spread", "equilibrium"))
    if len(spread):
        parts.append(
            f"Decay rates of a matrix's coordinates differ by up to {spread.max():.2g} decades ({spread.idxmax()})"
            if spread.max() > 0
            else "Every coordinate of a matrix decays at one rate"
        )
    coupled = dataset["median_spread_if_coupled"]
    if np.isfinite(coupled).any() and not spread.any():
        parts.append(f"coupled decay would differ by {median_and_extremes(coupled.to_series(), '.2g')} decades")
    if np.isfinite(dataset["median_share"]).any():
        parts.append(f"decay is {median_and_extremes(dataset['median_share'].to_series(), '.2g')} of an update's size")
    if len(level):
        times = float(dataset["decay_times"].sel(operator=level.index.tolist()).median())
        parts.append(
            f"weights are at {median_and_extremes(dataset['median_equilibrium'].to_series(), '.2g')} times their stationary size after {times:.2g} decay times"
        )
    text = "; ".join(parts)
    return f"{text[0].upper()}{text[1:]}."


def _spreads(run: xr.DataTree, update: xr.Dataset) -> dict[str, xr.DataArray]:
    """The spread of the decay rate in force and of coupled decay, at the records and matrices of `update`, missing where not recorded."""
    found = {name: xr.full_like(update["lr"], np.nan) for name in ("spread", "spread_if_coupled")}
    names = ["decay_spread", "second_moment_quantile", "second_moment_eps"]
    if "second_moment" not in run.children or not set(names) <= set(run["second_moment"].data_vars):
        return found
    here, moment = common(update[["lr"]], records(run, "second_moment")[names].load().drop_attrs())
    at = [update.indexes["step"].get_indexer(here["step"].values), [update["name"].values.tolist().index(n) for n in here["name"].values]]
    slow, fast = (moment["second_moment_quantile"].sel(level=q, method="nearest").values ** 0.5 for q in (0.95, 0.05))
    eps = moment["second_moment_eps"].fillna(0).values
    with np.errstate(divide="ignore", invalid="ignore"):
        coupled = np.where(np.isfinite(moment["decay_spread"].values), np.log10((slow + eps) / (fast + eps)), np.nan)
    for name, values in (("spread", moment["decay_spread"].values), ("spread_if_coupled", coupled)):
        found[name].values[np.ix_(*at)] = values
    return found
