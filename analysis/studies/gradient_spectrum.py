"""How does momentum change the spectrum of what is orthogonalised? (the gradient's spectrum beside the NS input's)"""

import warnings

import numpy as np
import seaborn as sns
import xarray as xr
from matplotlib.figure import Figure
from numpy.typing import NDArray

from ...diagnostics.spectra.spectrum_sketch import TINY
from ..by_operator import median_and_extremes, medians_by
from ..figures import axes, finish, intervals, operator_lines, operator_palette
from ..run import common, median_by, operators_of, recorded, records

QUESTION = "How does momentum change the spectrum of the gradient?"
READING = (
    "Left: how strong a matrix's directions are, from the weakest to the strongest; the lower a line is at the left, the harder "
    "the matrix is to orthogonalise. Middle: right of zero, momentum has a larger condition number or stable rank than the gradient. "
    "Right: how much of the gradient's direction is still in the momentum; near zero, single gradients are mostly noise."
)

LEVELS = np.linspace(0, 1, 33)  # at which spectra of different ranks are compared
SPECTRA = 64  # records whose spectra are averaged, evenly spread


def study(run: xr.DataTree) -> xr.Dataset:
    """Condition number, stable rank and normalised singular values of the gradient G beside those of the NS input M.

    Returns:
        `spectrum` (of, level) with `spectrum_lower` and `spectrum_upper`: median and quartiles over matrices of log10 σ/‖·‖_F, each
        matrix with its median over up to 64 records; `condition_number_change` (operator) = log10 κ(M) − log10 κ(G) in decades, where neither is
        only a lower bound, and `stable_rank_change` = log10 sr(M) − log10 sr(G), each with `_low` and `_high`, 95 % over layers;
        `condition_number` and `stable_rank` (of, operator), medians; `floor_share` (of), the share of κ that are lower bounds; `cosine`
        (step, operator), median of ⟨G, M⟩/(‖G‖_F‖M‖_F). `of` is "gradient" or "momentum" (what the optimizer orthogonalises; its
        first moment where it does not).

    Raises:
        ValueError: no group gradient or geometry in the run, or no gradient in it is finite.
    """
    reason = "every recorded gradient is zero or not finite, so there is no spectrum to study; see `diag check`"
    names = ("condition_number", "condition_is_floor", "stable_rank")
    gradient = recorded(run, "gradient", *(f"gradient_{name}" for name in names), "gradient_cosine", otherwise=reason)
    both = {
        "gradient": gradient.rename({f"gradient_{name}": name for name in names}),
        "momentum": recorded(run, "geometry", *names, otherwise=reason.replace("gradient", "NS input")),
    }
    # Spectra are large: they are read where they are needed.
    stored = {
        "gradient": records(run, "gradient")[["gradient_sigma_quantile", "quantile_level"]].rename(
            gradient_sigma_quantile="sigma_quantile"
        ),
        "momentum": records(run, "geometry")[["sigma_quantile"]],
    }
    gradient, *rest = common(both["gradient"], both["momentum"], *stored.values())
    both, stored = {"gradient": gradient, "momentum": rest[0]}, dict(zip(stored, rest[1:], strict=True))
    operators, label = operators_of(gradient), gradient["operator"].values
    floor = {of: dataset["condition_is_floor"].values for of, dataset in both.items()}
    with np.errstate(divide="ignore", invalid="ignore"):
        log = {
            (of, name): d[name].copy(data=np.log10(d[name].values))
            for of, d in both.items()
            for name in ("condition_number", "stable_rank")
        }
    result = xr.Dataset(coords={"of": list(both), "operator": operators, "level": LEVELS, "step": gradient["step"].values})
    for name in ("condition_number", "stable_rank"):
        medians = [[_median(log[of, name].values[:, label == o]) for o in operators] for of in both]
        result[name] = (("of", "operator"), 10 ** np.array(medians))
        change = (log["momentum", name] - log["gradient", name]).drop_attrs()
        if name == "condition_number":
            change = change.where(~(floor["gradient"] | floor["momentum"]))
        for suffix, bars in zip(("_change_low", "_change", "_change_high"), medians_by(change, label, operators), strict=True):
            result[name + suffix] = ("operator", bars)
    known = {of: np.isfinite(dataset["condition_number"].values) for of, dataset in both.items()}
    result["floor_share"] = ("of", [float(floor[of][known[of]].mean()) if known[of].any() else 0.0 for of in both])
    quartiles = np.stack([_spectrum(dataset["sigma_quantile"], stored["gradient"]["quantile_level"].values) for dataset in stored.values()])
    for i, name in enumerate(("spectrum_lower", "spectrum", "spectrum_upper")):
        result[name] = (("of", "level"), quartiles[:, i])
    result["cosine"] = (("step", "operator"), median_by(gradient["gradient_cosine"], label, operators))
    return result


def plot(dataset: xr.Dataset) -> Figure:
    """Left: both spectra. Middle: change of κ and of the stable rank per operator. Right: cosine over training."""
    operators = [str(o) for o in dataset["operator"].values]
    palette = operator_palette(operators)
    figure, (left, middle, right) = axes(3, width=5.0)
    table = (10 ** dataset["spectrum"]).rename("value").to_dataframe().reset_index()
    sns.lineplot(table, x="level", y="value", hue="of", palette=["C0", "C3"], style="of", ax=left, errorbar=None)
    for of, colour in zip(dataset["of"].values, ("C0", "C3"), strict=True):
        one = dataset.sel(of=of)
        left.fill_between(
            one["level"].values,
            10 ** one["spectrum_lower"].values,
            10 ** one["spectrum_upper"].values,
            color=colour,
            alpha=0.15,
            linewidth=0,
        )
    finish(
        left, title="Median spectrum and quartiles over matrices", x="quantile of the singular values", y="σ / Frobenius norm", log_y=True
    )
    for i, (name, text, marker) in enumerate((("condition_number", "condition number κ", "o"), ("stable_rank", "stable rank", "s"))):
        bars = np.stack([dataset[name + suffix].values for suffix in ("_change_low", "_change", "_change_high")])
        look = {"markerfacecolor": "white"} if i else {}
        intervals(middle, operators, bars, [palette[o] for o in operators], label=text, offset=0.24 * i - 0.12, marker=marker, **look)
    middle.axvline(0, color="0.4", linewidth=0.8)
    middle.legend()
    finish(middle, title="Momentum over gradient; bars: 95 % over layers", x="change (decades)", y="operator")
    operator_lines(right, dataset, "cosine")
    right.axhline(0, color="0.4", linewidth=0.8)
    finish(right, title="Median cosine of gradient and momentum", x="optimizer step", y="cosine")
    return figure


def summary(dataset: xr.Dataset) -> str:
    """The result in a sentence."""
    changes = {
        text: dataset[f"{name}_change"].to_series()
        for name, text in (("condition_number", "condition number"), ("stable_rank", "stable rank"))
    }
    parts = [f"the {text} by {median_and_extremes(change, '+.2f')}" for text, change in changes.items() if change.notna().any()]
    cosine = float(dataset["cosine"].median())
    text = (
        f"In decades, momentum changes {' and '.join(parts)} against the gradient"
        if parts
        else "No pair of gradient and momentum has measured spectra to compare"
    )
    text += f", and has a cosine of {cosine:.2f} with it." if np.isfinite(cosine) else "."
    floors = dataset["floor_share"].values
    return text + (
        f" {floors[0]:.0%} of the gradients' and {floors[1]:.0%} of the momenta's κ are only lower bounds." if floors.any() else ""
    )


def _median(values: NDArray[np.float64]) -> float:
    finite = values[np.isfinite(values)]
    return float(np.median(finite)) if len(finite) else float("nan")


def _spectrum(values: xr.DataArray, levels: NDArray[np.float64]) -> NDArray[np.float64]:
    """Quartiles over matrices of log10 σ/‖·‖_F at LEVELS, shape (3, levels)."""
    chosen = np.unique(np.linspace(0, values.sizes["step"] - 1, SPECTRA).round().astype(int))
    stored = values.isel(step=chosen).values.astype(np.float64)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", RuntimeWarning)  # matrices without any spectrum
        logs = np.log10(np.maximum(np.nanmedian(stored, axis=0), TINY))
        at = np.stack([np.interp(LEVELS, own, one) for own, one in zip(levels, logs, strict=True)])
        return np.asarray(np.nanquantile(at, [0.25, 0.5, 0.75], axis=0))
