"""Are the parts of a matrix alike that the optimizer treats as one? (fused query, key and value; heads)"""

import re
import warnings

import numpy as np
import xarray as xr
from matplotlib.figure import Figure
from numpy.typing import NDArray

from ...diagnostics.operators import classify, ordered
from ..by_operator import medians_by
from ..figures import axes, finish, intervals, operator_palette
from ..run import recorded, records
from ..shape_null import null_log10_condition

QUESTION = "Are the parts of a matrix alike that the optimizer treats as one?"
READING = (
    "Large marks are medians, small dots single blocks, diamonds the whole matrices as the optimizer sees them. "
    "Blocks far apart in condition number need different numbers of Newton–Schulz steps, though they get the same; thin strokes are what "
    "random matrices of a block's shape have. Blocks with larger updates than others learn faster than the learning rate says."
)

# name in the group blocks → in the group of the whole matrix.
STATISTICS = {
    "condition_number": ("block_condition_number", "geometry", "condition_number"),
    "stable_rank": ("block_stable_rank", "geometry", "stable_rank"),
    "update_rms_per_lr": ("block_update_rms_per_lr", "update", "update_rms_per_lr"),
}


def study(run: xr.DataTree) -> xr.Dataset:
    """κ, stable rank and update RMS per learning rate of blocks (fused q, k, v; attention heads), beside those of the whole matrix.

    Blocks of a kind are told together: "attn_qkv q", or "attn_q head" for all its heads; "attn_q whole" are the matrices they are of.

    Returns:
        Per kind: `condition_number`, `stable_rank`, `update_rms_per_lr`, medians over blocks, with `_low` and `_high`, 95 % over
        layers; `null` (kind), median κ of Gaussian matrices of its shapes. Per family of siblings ("attn_qkv parts", "attn_q heads"):
        `condition_spread` and `update_spread`, decades between the largest and the smallest of one matrix' blocks, median over the
        records and matrices. Per block: `block_` and the same three names, medians over the records, with the coordinate `block_kind`.

    Raises:
        ValueError: no group blocks in the run, or no block in it has a spectrum.
    """
    reason = "no block in it has a spectrum: every recorded one is zero or not finite; see `diag check`"
    blocks = recorded(run, "blocks", *(name for name, _, _ in STATISTICS.values()), otherwise=reason).drop_attrs()
    whole_of = np.array(blocks["of"].values.tolist(), dtype=str)
    wholes = {name: _wholes(run, group, name, set(whole_of.tolist())) for _, group, name in STATISTICS.values()}
    # Blocks of a fused projection are recorded as queries, keys and values; here they stand under the operator of the whole.
    operator_of = {whole: classify(whole) for whole in whole_of.tolist()}
    for whole in wholes.values():
        operator_of |= dict(zip(whole["name"].values.tolist(), whole["operator"].values.tolist(), strict=True))
    operators, kind_of = [operator_of[whole] for whole in whole_of.tolist()], [_kind(name) for name in blocks["name"].values.tolist()]
    label = np.array([f"{o} {k}" for o, k in zip(operators, kind_of, strict=True)])
    kinds = [
        kind
        for o in ordered(operators)
        for kind in (f"{o} whole", *dict.fromkeys(one for one, p in zip(label.tolist(), operators, strict=True) if p == o))
    ]
    result = xr.Dataset(coords={"kind": kinds, "block": blocks["name"].values, "block_kind": ("block", label)})
    for name, (own, _, of_whole) in STATISTICS.items():
        whole = wholes[of_whole]
        whole_label = np.array([f"{operator_of[n]} whole" for n in whole["name"].values.tolist()])
        bars = np.where(np.isin(kinds, label), medians_by(blocks[own], label, kinds), medians_by(whole[of_whole], whole_label, kinds))
        for suffix, values in zip(("_low", "", "_high"), bars, strict=True):
            result[name + suffix] = ("kind", values)
        result[f"block_{name}"] = ("block", _median(blocks[own].values))
    nulls = np.array([null_log10_condition(int(m), int(n)) for m, n in zip(blocks["rows"].values, blocks["cols"].values, strict=True)])
    result["null"] = ("kind", [10 ** float(np.median(nulls[label == kind])) if (label == kind).any() else np.nan for kind in kinds])
    family = np.array([f"{o} {'heads' if 'head' in k else 'parts'}" for o, k in zip(operators, kind_of, strict=True)])
    families = list(dict.fromkeys(family.tolist()))
    for name, own in (("condition_spread", "block_condition_number"), ("update_spread", "block_update_rms_per_lr")):
        result[name] = ("family", [_spread(blocks[own].values[:, family == f], whole_of[family == f]) for f in families])
    return result.assign_coords(family=families)


def plot(dataset: xr.Dataset) -> Figure:
    """κ, stable rank and update RMS per learning rate, one row per kind of block."""
    kinds = [str(kind) for kind in dataset["kind"].values]
    operators = [kind.split(" ")[0] for kind in kinds]
    palette = operator_palette(list(dict.fromkeys(operators)))
    whole = np.array([kind.endswith(" whole") for kind in kinds])
    place = {kind: i for i, kind in enumerate(kinds)}
    rows = np.array([place[str(kind)] for kind in dataset["block_kind"].values])
    figure, panels = axes(3, width=4.8, height=max(4.2, 0.34 * len(kinds) + 1.4))
    texts = {
        "condition_number": ("Condition number; strokes: random ones", "κ of the block"),
        "stable_rank": ("Stable rank", "stable rank of the block"),
        "update_rms_per_lr": ("Size of the update; bars: 95 % over layers", "update RMS per learning rate"),
    }
    for ax, (name, (title, x)) in zip(panels, texts.items(), strict=True):
        ax.scatter(dataset[f"block_{name}"].values, rows, s=7, alpha=0.3, linewidth=0, color=[palette[operators[i]] for i in rows])
        bars = np.stack([dataset[name + suffix].values for suffix in ("_low", "", "_high")])
        for marker, own in (("D", whole), ("o", ~whole)):
            intervals(
                ax,
                kinds,
                np.where(own, bars, np.nan),
                [palette[o] for o in operators],
                markeredgecolor="white",
                markersize=8,
                marker=marker,
            )
        if name == "condition_number":
            intervals(ax, kinds, np.stack([dataset["null"].values] * 3), ["0.2"] * len(kinds), marker="|", markersize=12)
        if ax is not panels[0]:
            ax.set_yticklabels([])
        finish(ax, title=title, x=x, y="block" if ax is panels[0] else "", log_x=True)
    return figure


def summary(dataset: xr.Dataset) -> str:
    """The result in a sentence."""
    parts = []
    for name, text in (("condition_spread", "in condition number"), ("update_spread", "in the size of their updates")):
        spread = dataset[name].to_series().dropna()
        if len(spread):
            parts.append(f"{text} by a factor of {10 ** spread.max():.3g} ({spread.idxmax()})")
    if not parts:
        return "Every matrix in this run has one block with records, so there are none to compare."
    return f"Blocks of one matrix differ most {' and '.join(parts)}, median over matrices and records."


def _wholes(run: xr.DataTree, group: str, name: str, names: set[str]) -> xr.Dataset:
    """One quantity of the matrices that the blocks are of; of no matrix, where its group was not recorded."""
    if group not in run.children or not run[group].sizes.get("step"):
        empty = xr.DataArray(np.empty((0, 0)), dims=("step", "matrix"))
        texts = ("matrix", np.empty(0, dtype=str))
        return xr.Dataset({name: empty}, coords={"name": texts, "operator": texts, "layer": ("matrix", np.empty(0, dtype=int))})
    dataset = records(run, group)[[name]]
    return dataset.isel(matrix=[i for i, own in enumerate(dataset["name"].values.tolist()) if own in names]).load()


def _kind(name: str) -> str:
    """What a block is of its matrix, heads without their number.

    >>> _kind("h.0.attn.qkv.weight[q head 11]"), _kind("h.0.attn.qkv.weight[v]")
    ('q head', 'v')
    """
    found = re.search(r"\[(.*)\]$", name)
    return re.sub(r"(head) \d+", r"\1", found.group(1)) if found else name


def _median(values: NDArray[np.float64]) -> NDArray[np.float64]:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", RuntimeWarning)  # of a block without any value
        return np.asarray(np.nanmedian(np.where(np.isfinite(values), values, np.nan), axis=0))


def _spread(values: NDArray[np.float64], whole_of: NDArray[np.str_]) -> float:
    """Median over matrices and records of log10 of the largest over the smallest of its blocks; missing where all have one."""
    logs = np.log10(np.where(np.isfinite(values) & (values > 0), values, np.nan))
    apart = [np.ptp(logs[:, whole_of == whole], axis=1) for whole in np.unique(whole_of) if (whole_of == whole).sum() > 1]
    found = _median(np.concatenate(apart)[:, None])[0] if apart else np.nan
    return float(found)
