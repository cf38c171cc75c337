"""Whether updates have the size they are meant to have."""

from collections.abc import Iterator

import numpy as np
import xarray as xr

from ...diagnostics.update_size import READABLE_NOISE
from ..studies import rms_alignment
from .finding import Finding, count, group, names


def off_target(run: xr.DataTree) -> Iterator[Finding]:
    """The RMS of an update lies outside what its residual explains, in more than half of a matrix's records.

    Bound: a² = mean o², so that |a² − 1| ≤ ε̃ for whatever scaling the optimizer uses (`studies.rms_alignment`). A single record may be
    an outlier; half of a matrix's records are a scaling.
    """
    if not group(run, "update").sizes["step"]:
        return
    study = rms_alignment.study(run)
    known = np.isfinite(study["residual"].values)
    share = study["off_target"].values.sum(axis=0) / np.maximum(known.sum(axis=0), 1)
    rms: dict[str, float] = {}
    off = set()
    for optimizer in map(str, np.unique(study["optimizer"].values)):
        rms[optimizer] = float(study["to_adamw"].where((study["optimizer"] == optimizer) & (study["to_adamw"] > 0)).median())
        own = (study["optimizer"].values == optimizer) & (share > 0.5)
        if own.any():
            off.add(optimizer)
            factor = float(np.nanmedian(study["alignment"].values[:, own]))
            yield Finding(
                "rms_off_target", "error",
                f"{optimizer}: the updates of {count(own)} are {factor:.3g} times their target size, outside what their residual explains.",
                "Look for a scaling that is missing or applied twice: 0.2, √max(rows, cols), √(rows/cols).", names(study, own),
                {"factor": factor},
            )  # fmt: skip
    orthogonal = {str(o) for o in study["optimizer"].values[known.any(axis=0)]}
    for optimizer in sorted(orthogonal - off):
        if (rms[optimizer] <= 0.7 or rms[optimizer] >= 1.5) and len(rms) > len(orthogonal):
            yield Finding(
                "rms_not_matched", "info",
                f"{optimizer}: update RMS per learning rate is {rms[optimizer]:.2f} of AdamW's usual 0.2, so its learning rate is on another scale.",
                "To share a learning rate with AdamW, use adjust_lr_fn='match_rms_adamw'.", numbers={"to_adamw": rms[optimizer]},
            )  # fmt: skip


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
    """Rounding noise is over 1 % of the update as read back (`diagnostics.update_size.READABLE_NOISE`), in the median record."""
    update = group(run, "update")
    noise = update["update_noise"].where(np.isfinite(update["update_noise"])).median("step").values
    noisy = noise > READABLE_NOISE
    if noisy.any():
        largest = float(np.nanmax(noise))
        yield Finding(
            "update_rounded", "warning",
            f"Weights of {count(noisy)} are stored so coarsely that rounding noise is up to {largest:.0%} of an update as read back.",
            "Keep float32 master weights; sizes, achieved residual and alignment cannot be read back from these weights.",
            names(update, noisy), {"noise": largest},
        )  # fmt: skip


RULES = (off_target, dead, rounded)
