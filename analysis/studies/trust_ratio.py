"""How differently would layers be scaled by trust ratios? (LAMB, arXiv 1904.00962, Algorithm 2; LARS, arXiv 1708.03888)

LAMB scales a layer's update U (decay included) by ‖W‖/‖U‖, so that its size follows the weights; LARS by a coefficient times
‖W‖/(‖G‖ + λ‖W‖). What LAMB's rule would give is known of every optimizer: ‖W‖/‖U‖ with U = ΔW/η, times the trust ratio in force,
which ΔW includes.
"""

import numpy as np
import seaborn as sns
import xarray as xr
from matplotlib.figure import Figure
from numpy.typing import NDArray

from ...diagnostics.nan_quantile import nan_quantile
from ..by_operator import median_and_extremes
from ..figures import FEW, axes, finish, operator_lines, operator_palette
from ..run import median_by, operators_of, recorded, records

QUESTION = "How differently would layers be scaled by trust ratios?"
READING = (
    "Left: the factor by which LAMB would scale each layer's step, the median over training with its quartiles. Were all at one height, "
    "one learning rate would suit all; layers that stand high take steps that are small for their weights. Middle: how far apart the "
    "layers are over training. Where the optimizer has trust ratios of its own, they are at the right."
)

WIDEST = (0.05, 0.95)  # the spread is between these quantiles over matrices


def study(run: xr.DataTree) -> xr.Dataset:
    """The ratio ‖W‖/‖U‖ that LAMB's rule gives, per matrix, its spread over an optimizer's matrices, and the trust ratio in force.

    Variables: `ratio` with `ratio_lower` and `ratio_upper` (matrix), median and quartiles over the records; `spread` (step, of): log10
    of the 95 % over the 5 % quantile over the matrices of an optimizer, decades; `trust` with `_lower`, `_upper` (step, kind): the
    recorded trust ratio, median and quartiles over an operator's matrices, missing for optimizers without one; `at_bound` (of): the share of
    an optimizer's recorded trust ratios that equal its largest or smallest one, where several matrices have just that value, as they do
    when the ratio is clipped.

    Raises:
        ValueError: no update records, or none that is finite.
    """
    names = ["update_to_weight", "lr", *({"trust_ratio"} & set(records(run, "update")))]  # runs of earlier versions have no trust ratio
    update = recorded(run, "update", *names, otherwise="no update in it is finite and of weights that are not zero").drop_attrs()
    trust = update["trust_ratio"] if "trust_ratio" in update else xr.full_like(update["lr"], np.nan)
    with np.errstate(divide="ignore", invalid="ignore"):
        ratio = trust.fillna(1) * update["lr"] / update["update_to_weight"]
    ratio = ratio.where(np.isfinite(ratio) & (ratio > 0))
    operators, optimizers = operators_of(update), list(dict.fromkeys(update["optimizer"].values.tolist()))
    of = {o: update["optimizer"].values == o for o in optimizers}
    low, high = (median_by(ratio, update["optimizer"].values, optimizers, q) for q in WIDEST)
    result = xr.Dataset(coords={**ratio.coords, "of": optimizers, "kind": operators})
    for suffix, q in (("_lower", 0.25), ("", 0.5), ("_upper", 0.75)):
        result[f"ratio{suffix}"] = ("matrix", nan_quantile(ratio.values.T, q))
        result[f"trust{suffix}"] = (("step", "kind"), median_by(trust, update["operator"].values, operators, q))
    several = np.stack([np.isfinite(ratio.values[:, own]).sum(axis=1) > 1 for own in of.values()], axis=1)
    result["spread"] = (("step", "of"), np.where(several, np.log10(high / low), np.nan))
    result["at_bound"] = ("of", [_at_bound(trust.values[:, own]) for own in of.values()])
    return result


def plot(dataset: xr.Dataset) -> Figure:
    """Ratio by layer, one line per operator; spread over training; the trust ratio in force, where there is one."""
    operators = operators_of(dataset)
    palette = operator_palette(operators)
    spread, own = (bool(np.isfinite(dataset[name]).any()) for name in ("spread", "trust"))
    figure, panels = axes(1 + spread + own, width=5.6)
    table = dataset[["ratio", "ratio_lower", "ratio_upper"]].to_dataframe().reset_index().dropna(subset=["ratio"])
    by_layer = table.groupby(["operator", "layer"], as_index=False)[["ratio", "ratio_lower", "ratio_upper"]].median()
    shown = [o for o in operators if o in set(by_layer["operator"])]
    of = {"hue": "operator", "hue_order": shown, "palette": palette, "errorbar": None}
    sns.lineplot(by_layer, x="layer", y="ratio", marker="o", ax=panels[0], **of)
    for operator, one in by_layer.groupby("operator"):
        reach = [one["ratio"] - one["ratio_lower"], one["ratio_upper"] - one["ratio"]]
        panels[0].errorbar(one["layer"], one["ratio"], yerr=reach, color=palette[operator], linestyle="none", elinewidth=1)
    layers = np.unique(by_layer["layer"])
    layers = layers[:: max(1, len(layers) // 12)]
    panels[0].set_xticks(layers, ["none" if layer < 0 else str(layer) for layer in layers])
    finish(panels[0], title="Ratio by LAMB's rule, median and quartiles over training", x="layer", y="‖W‖/‖U‖", log_y=True)
    if spread:
        lines = dataset["spread"].to_dataframe().reset_index().rename(columns={"of": "optimizer"})
        marker = "o" if dataset.sizes["step"] <= FEW else None
        sns.lineplot(
            lines, x="step", y="spread", hue="optimizer", style="optimizer", estimator=None, errorbar=None, marker=marker, ax=panels[1]
        )
        panels[1].set_ylim(bottom=0)
        finish(
            panels[1],
            title="How far apart an optimizer's matrices are",
            x="optimizer step",
            y="95 % over 5 % quantile of the ratio (decades)",
        )
    if own:
        used = (
            dataset[[f"trust{suffix}" for suffix in ("", "_lower", "_upper")]]
            .drop_vars("operator", errors="ignore")
            .rename(kind="operator")
        )
        used = used.isel(operator=np.flatnonzero(np.isfinite(used["trust"].values).any(axis=0)))
        operator_lines(panels[-1], used, "trust")
        finish(panels[-1], title="Trust ratio in force, median and quartiles", x="optimizer step", y="trust ratio", log_y=True)
    return figure


def summary(dataset: xr.Dataset) -> str:
    """The result in a sentence."""
    text = f"LAMB's rule would scale steps by {median_and_extremes(dataset['ratio'].groupby('operator').median().to_series(), '.3g')}"
    spread = dataset["spread"].median("step").to_series().dropna()
    if len(spread):
        text += "; over an optimizer's matrices it spans " + ", ".join(f"{value:.2g} decades ({name})" for name, value in spread.items())
    bound = dataset["at_bound"].to_series().dropna()
    return text + "".join(f"; {value:.0%} of the trust ratios of {name} are at a bound" for name, value in bound.items() if value) + "."


def _at_bound(trust: NDArray[np.float64]) -> float:
    """Share of values (step, matrix) at an extreme that several matrices reach exactly; NaN where there are no trust ratios."""
    known = np.isfinite(trust)
    if not known.any():
        return float("nan")
    extremes = {float(trust[known].min()), float(trust[known].max())}
    return float(sum((trust == e).sum() for e in extremes if (trust == e).any(axis=0).sum() > 1) / known.sum())
