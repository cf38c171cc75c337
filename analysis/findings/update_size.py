"""Whether updates have the size they are meant to have."""

from collections.abc import Iterator
from typing import Any

import numpy as np
import xarray as xr

from ...diagnostics.catalogue import READABLE_NOISE
from ...diagnostics.finding import Finding
from ...diagnostics.quantities.update_alignment import explained
from ...diagnostics.quantities.update_size import ADAMW_RMS
from ..studies import rms_alignment
from .matrices import count, group, names, typical
from .size_causes import explain, growth

ALIGNMENT = "alignment of 64 records"  # group of a run that has it ready
# Records whose spectra are taken through the iteration; evenly spaced, they tell a scaling as well as all do.
RECORDS = 64
# Update RMS over AdamW's 0.2 outside of which a learning rate is not AdamW's.
SHARED = (0.7, 1.5)


def with_alignment(run: xr.DataTree) -> xr.DataTree:
    """The run with `alignment` made once, for all rules that read it."""
    ready = xr.DataTree(alignment(run))
    found = run.copy()  # shares what has been read by now
    found[ALIGNMENT] = ready
    return found


def alignment(run: xr.DataTree) -> xr.Dataset:
    """`studies.rms_alignment` of at most 64 records; empty without update records."""
    if ALIGNMENT in run.children:
        return run[ALIGNMENT].to_dataset()
    update, geometry = group(run, "update"), group(run, "geometry")
    if not update.sizes["step"]:
        return xr.Dataset()
    steps = geometry["step"].values if geometry.sizes["step"] else update["step"].values
    chosen = steps[np.unique(np.linspace(0, len(steps) - 1, RECORDS).astype(int))]
    kept = {
        name: dataset.isel(step=np.isin(dataset["step"].values, chosen))
        for name, dataset in (("update", update), ("geometry", geometry))
        if dataset.sizes["step"]
    }
    if not kept["update"].sizes["step"]:
        kept = {"update": update}  # the groups were recorded at different times
    return rms_alignment.study(xr.DataTree.from_dict(kept))


def off_target(run: xr.DataTree) -> Iterator[Finding]:
    """The RMS of an update lies outside what its residual explains, in more than half of a matrix's records.

    Bound: a² = mean o², so that |a² − 1| ≤ ε̃ for whatever scaling the optimizer uses (`studies.rms_alignment`). A single record may be
    an outlier; half of a matrix's records are a scaling, and `size_causes` says which.
    """
    study = alignment(run)
    if not study:
        return
    known = np.isfinite(study["residual"].values) & np.isfinite(study["alignment"].values) & (study["alignment"].values > 0)
    share = (study["off_target"].values & known).sum(axis=0) / np.maximum(known.sum(axis=0), 1)
    # Of the later half: averages that are not corrected for their zero start make early updates too large.
    later = slice(len(known) // 2, None)
    ratio, residual = (typical(study[name].values[later], known[later]) for name in ("alignment", "residual"))
    expected = typical(np.sqrt(np.maximum(1 + study["under_lifted"].values + study["band"].values, 0))[later])
    expected = np.where(expected > 0, expected, 1)  # the iteration's start is not known: AOL scaling
    low, high = explained(residual)
    for optimizer in map(str, np.unique(study["optimizer"].values)):
        own = (study["optimizer"].values == optimizer) & np.isfinite(ratio)
        off = own & (share > 0.5)
        if not off.any():
            continue
        rows, cols = study["rows"].values[own], study["cols"].values[own]
        factor, slope = float(np.median(ratio[off])), growth(ratio[own] / expected[own], rows, cols)
        causes = [cause.text for cause in explain(ratio[own], low[own], high[own], expected[own], rows, cols)]
        text = f"{optimizer}: the updates of {count(off)} are {factor:.3g} times their target size, outside what their residual explains"
        if causes:
            text += f", as by {', or '.join(causes)}"
            advice = "Correct that in the optimizer's update; a learning rate cannot make up for what depends on shapes."
        else:
            advice = "Look for a scaling that is missing or applied twice: 0.2, √max(rows, cols), √(rows/cols)."
            if abs(slope) > 0.25:
                text += f"; the factor goes with √max(rows, cols) to the power {slope:.2f}"
        yield Finding("rms_off_target", "error", f"{text}.", advice, names(study, off), {"factor": factor, "growth_with_max": slope})


def not_matched(run: xr.DataTree) -> Iterator[Finding]:
    """Updates per learning rate are under 0.7 or over 1.5 of AdamW's 0.2 (Moonlight, arXiv 2502.16982), beside an optimizer like AdamW.

    A warning where both are given the same learning rate, which this size makes another one. Silent where the size that is meant is 0.2:
    what makes updates differ from that is no matter of scaling.
    """
    study = alignment(run)
    if not study:
        return
    target, moments, update = group(run, "update")["update_rms_target"].values, group(run, "second_moment"), group(run, "update")
    labels = study["optimizer"].values
    orthogonal = np.isfinite(target).any(axis=0) if target.shape[1] == len(labels) else np.zeros(len(labels), bool)
    of_adam = set(moments["optimizer"].values[(moments["second_moment_form"].values == 0).any(axis=0)].tolist()) - set(labels[orthogonal])
    others = sorted(set(labels.tolist()) - set(labels[orthogonal].tolist()))
    sizes = study["to_adamw"].where(study["to_adamw"] > 0)
    off = (study["off_target"].values.sum(axis=0) / np.maximum(np.isfinite(study["residual"].values).sum(axis=0), 1)) > 0.5
    for optimizer in map(str, np.unique(labels[orthogonal])):
        own = (labels == optimizer) & orthogonal
        size = float(sizes.isel(matrix=own).median())
        meant = float(np.nanmedian(target[:, own])) / ADAMW_RMS
        aligned = any(SHARED[0] < one < SHARED[1] for one in (size, meant))
        if not others or off[own].any() or not np.isfinite(size) or aligned:
            continue
        shared = [other for other in others if other in of_adam and _same_rate(update, optimizer, other)]
        text = f"{optimizer}: update RMS per learning rate is {size:.2f} of AdamW's usual 0.2, "
        if shared:
            yield Finding(
                "shared_learning_rate", "warning",
                f"{text}yet it is given the learning rate of {shared[0]}: its matrices learn {size:.2f} times as fast as meant there.",
                f"Scale its updates by 0.2·√max(rows, cols){_adjusted(run, optimizer)}, or give it a learning rate of its own.",
                names(study, own), {"to_adamw": size},
            )  # fmt: skip
        else:
            yield Finding(
                "rms_not_matched", "info", f"{text}so its learning rate is on another scale.",
                f"To share a learning rate with AdamW, scale its updates by 0.2·√max(rows, cols){_adjusted(run, optimizer)}.",
                numbers={"to_adamw": size},
            )  # fmt: skip


def _adjusted(run: xr.DataTree, optimizer: str) -> str:
    """The argument that does so, where the optimizer's class has it."""
    entry: dict[str, Any] = next((one for one in run.attrs.get("optimizers", ()) if one.get("label") == optimizer), {})
    return " (adjust_lr_fn='match_rms_adamw')" if any("adjust_lr_fn" in settings for settings in entry.get("groups", ())) else ""


def _same_rate(update: xr.Dataset, one: str, other: str) -> bool:
    """Whether two optimizers have the same learning rate in nine of ten records that both have."""
    first, second = (
        np.nanmax(np.where(np.isfinite(lr), lr, -np.inf), axis=1, initial=-np.inf)
        for lr in (update["lr"].values[:, update["optimizer"].values == label] for label in (one, other))
    )
    both = np.isfinite(first) & np.isfinite(second)
    return bool(both.any() and np.isclose(first[both], second[both], rtol=1e-6).mean() >= 0.9)


def dead(run: xr.DataTree) -> Iterator[Finding]:
    """A matrix whose update is zero in every record."""
    update = group(run, "update")
    recorded = np.isfinite(update["update_rms"].values)
    still = recorded.any(axis=0) & ~((update["update_rms"].values != 0) & recorded).any(axis=0)
    if still.any():
        yield Finding(
            "dead", "warning", f"{count(still)} did not move in any record.",
            "Check that they take part in the loss, and that the learning rate is not zero.", names(update, still),
            {"matrices": still.sum()},
        )  # fmt: skip


def rounded(run: xr.DataTree) -> Iterator[Finding]:
    """Rounding noise is over 1 % of the update as read back (`diagnostics.catalogue.READABLE_NOISE`), in the median record.

    Where the optimizer's formula tells the update that was intended, its RMS over that of the applied one says by how much what was
    applied is too large or too small.
    """
    update = group(run, "update")
    noise = typical(update["update_noise"].values, np.isfinite(update["update_noise"].values))
    noisy = noise > READABLE_NOISE
    if not noisy.any():
        return
    largest, text = float(np.nanmax(noise)), ""
    applied, intended = update["update_rms_per_lr"].values[:, noisy], update["update_rms_intended"].values[:, noisy]
    known = np.isfinite(applied) & (intended > 0)
    bias = float(np.median(applied[known] / intended[known])) if known.any() else np.nan
    if known.any():
        text = f" The updates that arrive are {bias:.2f} times as large as those the optimizer computed."
    yield Finding(
        "update_rounded", "warning",
        f"Weights of {count(noisy)} are stored so coarsely that rounding noise is up to {largest:.0%} of an update as read back.{text}",
        "Keep float32 master weights; sizes, achieved residual and alignment cannot be read back from these weights.",
        names(update, noisy), {"noise": largest, "applied_over_intended": bias},
    )  # fmt: skip


RULES = (off_target, not_matched, dead, rounded)
