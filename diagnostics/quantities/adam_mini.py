"""Adam-mini's blocks of a matrix (Zhang et al., arXiv 2406.16793): the coordinates that could share one learning rate."""

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from ..catalogue import BLOCK_STATISTICS
from .panels import as_float64, row_panels

Floats = NDArray[np.float64]
# (query heads, key and value heads) of an attention layer; zeros where they are not known.
Heads = tuple[int, int]
UNKNOWN_HEADS: Heads = (0, 0)


def row_blocks(operator: str, rows: int, cols: int, heads: Heads = UNKNOWN_HEADS) -> tuple[str, NDArray[np.int64]]:
    """Name of the partition, one of `catalogue.PARTITIONS`, and the block of every row, counted from 0 and ascending.

    A block is whole rows, the weights of one output: every head of the query and key projections ("head"), every token of
    embedding and head ("token"), every output neuron of all else ("row"); norms are one block ("whole"). Of a fused
    projection, taken as the rows [Q; K; V], the heads of Q and K and the rows of V are blocks, and it counts as "head".
    Queries and keys whose heads are not known, or do not divide the rows, fall back to "row", whose blocks lie within those of
    heads: what is lost within them is a lower bound to what is lost within heads.

    A matrix kept as (inputs, outputs) is cut along its inputs.

    >>> row_blocks("attn_q", 4, 8, (2, 1))
    ('head', array([0, 0, 1, 1]))
    >>> row_blocks("attn_qkv", 8, 4, (2, 1))  # Q has two heads of two rows, K one, V two rows
    ('head', array([0, 0, 1, 1, 2, 2, 3, 4]))
    """
    each = np.arange(rows)
    query, shared = heads
    if operator == "norm":
        return "whole", np.zeros_like(each)
    if operator in ("embed", "head"):
        return "token", each
    of_heads = {"attn_q": query, "attn_k": shared, "attn_qkv": query + 2 * shared}.get(operator, 0)
    if of_heads <= 0 or rows % of_heads:
        return "row", each
    width = rows // of_heads
    if operator != "attn_qkv":
        return "head", each // width
    of_values = shared * width
    return "head", np.concatenate([each[:-of_values] // width, query + shared + np.arange(of_values)])


@dataclass(frozen=True)
class WithinBlocks:
    """What one learning rate per block would lose. All are of v up to a common factor: bias correction does not change them.

    Attributes:
        dispersion: τ = √(mean over blocks of Var(ln v)), over elements with v > 0, in nats.
        variance_ratio: Var over blocks of mean ln v, over τ²; NaN where there is one block, or τ = 0.
        cv2: mean over blocks of Var(v)/mean(v)².
        step_ratio: mean over elements with v > 0 of √(mean_b v/v).
        cosine: of m/√v and m/√s_b by `catalogue.BLOCK_STATISTICS`, over elements with v > 0; NaN without m.
    """

    dispersion: float
    variance_ratio: float
    cv2: float
    step_ratio: float
    cosine: Floats


@np.errstate(invalid="ignore", divide="ignore", over="ignore")
def within_blocks(v: NDArray[np.floating], blocks: NDArray[np.int64], m: NDArray[np.floating] | None = None) -> WithinBlocks:
    """Compare v of every coordinate, shape (rows, cols), with one number for each block of rows, as `row_blocks` gives them.

    For log-normal v with standard deviation τ of ln v and m ∼ N(0, v): step_ratio = e^{3τ²/8} and, for s_b = mean_b v, cosine =
    e^{−τ²/8}; exactly 0 dispersion and cosine 1 where blocks are single coordinates. NaN where v is not finite or zero everywhere.
    """
    starts = np.flatnonzero(np.diff(blocks, prepend=-1))

    def per_block(of_rows: Floats) -> Floats:
        return np.add.reduceat(of_rows, starts)

    rows = _row_sums(v, m)
    size, count = per_block(np.full(len(v), float(v.shape[1]))), per_block(rows["count"])
    mean, log_mean = per_block(rows["v"]) / size, per_block(rows["log"]) / np.maximum(count, 1)
    used = count > 0
    if not used.any() or not np.isfinite(mean).all():
        nan = float("nan")
        return WithinBlocks(nan, nan, nan, nan, np.full(len(BLOCK_STATISTICS), nan))
    # Squares about the mean of a block: those about its rows' means, and of the rows' means about it (Chan, Golub & LeVeque 1979).
    row_mean, row_log = rows["v"] / v.shape[1], rows["log"] / np.maximum(rows["count"], 1)
    variance = per_block(rows["squares"] + v.shape[1] * (row_mean - mean[blocks]) ** 2) / size
    log_variance = per_block(rows["log_squares"] + rows["count"] * (row_log - log_mean[blocks]) ** 2)[used] / count[used]
    within = float(log_variance.mean())
    of_block = {
        "mean": mean,
        "max": np.maximum.reduceat(rows["max"], starts),
        "min": np.minimum.reduceat(rows["min"], starts),
        "norm": np.sqrt(size * (variance + mean**2)),
    }
    mm, mm_root, mm_v = (per_block(rows[key])[used] for key in ("mm", "mm/√v", "mm/v"))
    cosine = [
        float((mm_root / np.sqrt(s)).sum() / np.sqrt(mm_v.sum() * (mm / s).sum()))
        for s in (of_block[statistic][used] for statistic in BLOCK_STATISTICS)
    ]
    return WithinBlocks(
        dispersion=float(np.sqrt(within)),
        variance_ratio=float(log_mean[used].var() / within) if used.sum() > 1 and within > 0 else float("nan"),
        cv2=float((variance[used] / mean[used] ** 2).mean()),
        step_ratio=float((per_block(rows["1/√v"])[used] * np.sqrt(mean[used])).sum() / count.sum()),
        cosine=np.array(cosine),
    )


def _row_sums(v: NDArray[np.floating], m: NDArray[np.floating] | None) -> dict[str, Floats]:
    """Sums over the columns; those of logarithms, roots and m over elements with v > 0 alone, and squares about the row's mean."""
    kept: dict[str, list[Floats]] = {}
    for panel in row_panels(*v.shape):
        block = as_float64(v[panel])
        positive = block > 0
        all_positive = bool(positive.all())
        safe = block if all_positive else np.where(positive, block, 1.0)
        root, logs = np.sqrt(safe), np.log(safe)  # of 1 where v is 0: no logarithm, and weighted by 0
        count = positive.sum(1, dtype=np.float64)
        inverse_root = 1 / root if all_positive else positive / root
        deviation, log_total = block - block.mean(1, keepdims=True), logs.sum(1)
        log_deviation = logs - (log_total / np.maximum(count, 1))[:, None]
        if not all_positive:
            log_deviation *= positive
        of_rows = {
            "count": count, "v": block.sum(1), "squares": _squares(deviation), "log": log_total, "log_squares": _squares(log_deviation),
            "max": block.max(1), "min": (block if all_positive else np.where(positive, block, np.inf)).min(1), "1/√v": inverse_root.sum(1),
        }  # fmt: skip
        first = np.full((len(block), 1), np.nan) if m is None else as_float64(m[panel])
        first = first if all_positive else first * positive
        over_root = first * inverse_root
        of_rows |= {"mm": _squares(first), "mm/√v": (first * over_root).sum(1), "mm/v": _squares(over_root)}
        for key, values in of_rows.items():
            kept.setdefault(key, []).append(values)
    return {key: np.concatenate(values) for key, values in kept.items()}


def _squares(x: Floats) -> Floats:
    """Σx² of every row. Not by BLAS, whose threads cost more than they save on a panel."""
    return np.asarray((x * x).sum(1))
