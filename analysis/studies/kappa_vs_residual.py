"""Does the condition number tell how well a matrix is orthogonalised? (AMO, Fig. 3a, 7, 11)"""

import numpy as np
import seaborn as sns
import xarray as xr
from matplotlib.figure import Figure
from numpy.typing import NDArray
from scipy.stats import pearsonr, spearmanr

from ...diagnostics.bootstrap import interval, resampled
from ...diagnostics.evenly_spread import evenly_spread
from ...diagnostics.spectra.spectrum_sketch import TINY
from ..figures import axes, finish
from ..run import operators_of, orthogonalised, own_residual
from ..shape_null import null_log10_condition

QUESTION = "Does the condition number tell how well a matrix is orthogonalised?"
READING = (
    "Every point is one matrix at one recorded step. Further right, the matrix that Newton–Schulz is given is worse conditioned; "
    "further up, more of it is left unorthogonalised. If the points rise, the condition number predicts the residual. Triangles "
    "mark condition numbers that are only known to be at least that large."
)


POINTS = 4000  # that are drawn, of evenly spread records


def study(run: xr.DataTree) -> xr.Dataset:
    """Correlation of log10 κ of the NS input with the residual ε̃ it ends with, over all recorded (step, matrix) pairs.

    Variables: `log10_kappa`, `residual` (predicted Gram residual at the steps in force), `residual_achieved`, `is_floor`,
    `log10_spread` (log10 σ_1/σ_{.95r}, a better predictor than κ), `log10_kappa_excess` (κ over its shape-only null), all
    (step, matrix); per predictor Pearson's and Spearman's r over pairs whose κ is measured, not a floor, with
    `pearson_low` and `pearson_high`, 95 % over layers; Pearson's r within each operator.

    Raises:
        ValueError: no orthogonalised matrix in the run.
    """
    geometry = orthogonalised(run)
    shape = [null_log10_condition(int(m), int(n)) for m, n in zip(geometry["rows"].values, geometry["cols"].values, strict=True)]
    log_kappa = geometry["condition_number"].drop_attrs().copy(data=np.log10(geometry["condition_number"].values))
    points = xr.Dataset(
        {
            "log10_kappa": log_kappa,
            "log10_kappa_excess": log_kappa - xr.DataArray(shape, dims="matrix"),
            "log10_spread": _log10_spread(geometry),
            "residual": own_residual(geometry),
            "residual_achieved": geometry["ns_residual_achieved"],
            "is_floor": geometry["condition_is_floor"],
        }
    )
    predictors = ["log10_kappa", "log10_kappa_excess", "log10_spread"]
    measured = ~points["is_floor"].values
    residual = np.where(measured, points["residual"].values, np.nan)
    points["pearson"] = ("predictor", [_correlation(pearsonr, points[p].values, residual) for p in predictors])
    points["spearman"] = ("predictor", [_correlation(spearmanr, points[p].values, residual) for p in predictors])
    operators = operators_of(geometry)
    within = [
        _correlation(pearsonr, log_kappa.values[:, own], residual[:, own]) for own in (geometry["operator"].values == o for o in operators)
    ]
    points["pearson_within_operator"] = ("of_operator", within)
    ends = np.array([_pearson_interval(points[p].values, residual, geometry["layer"].values) for p in predictors])
    points["pearson_low"], points["pearson_high"] = ("predictor", ends[:, 0]), ("predictor", ends[:, 1])
    points["pairs"] = int(np.isfinite(residual).sum())
    points["floors"] = int(points["is_floor"].sum())
    return points.assign_coords(predictor=predictors, of_operator=operators)


def plot(dataset: xr.Dataset) -> Figure:
    """Scatter of residual over κ, colour by layer; triangles where κ is only known to be at least that."""
    shown = dataset.isel(step=evenly_spread(dataset.sizes["step"], max(1, POINTS // max(dataset.sizes["matrix"], 1))))
    table = shown[["log10_kappa", "residual", "is_floor"]].to_dataframe().dropna().reset_index()
    table["condition number κ"] = 10 ** table["log10_kappa"]
    table["κ is"] = np.where(table["is_floor"], "at least", "measured")
    figure, (ax,) = axes(width=7.2)
    sns.scatterplot(
        table, x="condition number κ", y="residual", hue="layer", style="κ is", markers={"measured": "o", "at least": ">"},
        palette="viridis", ax=ax, s=22, linewidth=0.2, edgecolor="white",
    )  # fmt: skip
    r = float(dataset["pearson"].sel(predictor="log10_kappa"))
    correlation = f", Pearson r = {r:.2f}{_bars(dataset, 'log10_kappa')}" if np.isfinite(r) else ""
    finish(ax, title=f"Residual against condition number, {len(table)} matrix snapshots{correlation}",
           x="condition number κ of the NS input", y="predicted Gram residual ε̃", log_x=True)  # fmt: skip
    return figure


def summary(dataset: xr.Dataset) -> str:
    """The result in a sentence."""
    if not np.isfinite(dataset["pearson"].sel(predictor="log10_kappa")):
        return f"Too few snapshots with a measured κ to correlate it with the residual: {int(dataset['pairs'])}, and {int(dataset['floors'])} with κ only bounded."
    r = {str(p): float(dataset["pearson"].sel(predictor=p)) for p in dataset["predictor"].values}
    return (
        f"log10 κ and the residual correlate with r = {r['log10_kappa']:.2f}{_bars(dataset, 'log10_kappa')} over {int(dataset['pairs'])} snapshots "
        f"({int(dataset['floors'])} with κ only bounded left out); {r['log10_kappa_excess']:.2f} once each shape's own κ is taken off, "
        f"and {r['log10_spread']:.2f} for σ_1/σ_.95r in place of κ."
    )


def _bars(dataset: xr.Dataset, predictor: str) -> str:
    low, high = (float(dataset[f"pearson_{end}"].sel(predictor=predictor)) for end in ("low", "high"))
    return f" [{low:.2f}, {high:.2f}]" if np.isfinite(low) else ""


def _log10_spread(geometry: xr.Dataset) -> xr.DataArray:
    """log10 σ_1/σ_{.95r}, from the stored singular values: linear in log σ at level 0.05."""
    stored, levels = geometry["sigma_quantile"].values, geometry["quantile_level"].values
    # Where level 0.05 lies depends on the matrix only.
    right = np.clip((levels < 0.05).sum(axis=-1), 1, levels.shape[-1] - 1)
    matrix = np.arange(len(levels))
    below, above = levels[matrix, right - 1], levels[matrix, right]
    gap = above - below
    share = np.divide(0.05 - below, gap, out=np.zeros_like(gap), where=gap > 0)
    largest, high, low = (
        np.log10(np.maximum(chosen.astype(np.float64), TINY))
        for chosen in (stored[..., -1], stored[:, matrix, right], stored[:, matrix, right - 1])
    )
    return xr.DataArray(largest - low - share * (high - low), dims=("step", "matrix"))


def _pearson_interval(x: NDArray[np.float64], y: NDArray[np.float64], layers: NDArray[np.int64]) -> tuple[float, float]:
    """95 % over layers of Pearson's r, from the sums of every matrix."""
    both = np.isfinite(x) & np.isfinite(y)
    if both.sum() < 3:
        return float("nan"), float("nan")
    x, y = np.where(both, x - x[both].mean(), 0), np.where(both, y - y[both].mean(), 0)
    sums = np.stack([values.sum(axis=0) for values in (both, x, y, x * x, y * y, x * y)])
    n, sx, sy, sxx, syy, sxy = np.nansum(resampled(sums, layers), axis=-1)
    with np.errstate(invalid="ignore", divide="ignore"):  # a resample of one value repeated has no r
        r = (n * sxy - sx * sy) / np.sqrt((n * sxx - sx**2) * (n * syy - sy**2))
    low, high = interval(r)
    return float(low), float(high)


def _correlation(kind: object, x: NDArray[np.float64], y: NDArray[np.float64]) -> float:
    both = np.isfinite(x) & np.isfinite(y)
    if both.sum() < 3 or np.ptp(x[both]) == 0 or np.ptp(y[both]) == 0:
        return float("nan")
    return float(kind(x[both], y[both]).statistic)  # type: ignore[operator]
