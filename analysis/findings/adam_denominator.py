"""Whether the second moment does its work: ε that outweighs it, factors that do not carry it, decay that it makes uneven."""

from collections.abc import Iterator

import numpy as np
import xarray as xr
from numpy.typing import NDArray

from ...diagnostics.catalogue import SECOND_MOMENT_FORMS
from ...diagnostics.finding import Finding
from .matrices import count, group, names, typical

# Share of a matrix's coordinates that ε may govern before it counts: those where it halves the step, and those where it takes 0.1 %.
UNDER_EPS, NEAR_EPS = 0.1, 0.5
FAR_FROM_RANK_1 = 0.3  # decades, RMS: a factor of 2 in v, of √2 in the steps of a typical coordinate
UNEVEN_DECAY = 1.0  # decades between the 5 % and the 95 % quantile of coordinates
# Rows of tokens that do not occur have no gradient and no second moment, whatever ε is.
OF_TOKENS = ("embed", "head")


def under_eps(run: xr.DataTree) -> Iterator[Finding]:
    """ε is larger than √v̂ in a tenth of a matrix's coordinates, or over a thousandth of it in half of them, in the median record."""
    moments = group(run, "second_moment")
    under, near = (typical(moments[name].values) for name in ("eps_share", "near_eps_share"))
    tokens = np.isin(moments["operator"].values, OF_TOKENS)
    advice = "Lower ε, or scale the loss up."
    if (dominated := (under > UNDER_EPS) & ~tokens).any():
        share = float(np.median(under[dominated]))
        yield Finding(
            "eps_dominates", "warning",
            f"In {count(dominated)} ε is larger than √v̂ for {share:.0%} of the coordinates (median): there the optimizer is SGD with momentum, on a tiny learning rate.",
            advice, names(moments, dominated), {"share": share},
        )  # fmt: skip
    if (close := (near > NEAR_EPS) & ~tokens & ~dominated).any():
        share = float(np.median(near[close]))
        yield Finding(
            "eps_near", "info", f"In {count(close)} √v̂ is under 1000·ε for {share:.0%} of the coordinates (median), so that ε takes part in their steps.",
            advice, names(moments, close), {"share": share},
        )  # fmt: skip
    if (rare := (under > UNDER_EPS) & tokens).any():
        share = float(np.median(under[rare]))
        yield Finding(
            "eps_tokens", "info", f"In {count(rare)} of tokens √v̂ is under ε for {share:.0%} of the coordinates (median): tokens that hardly ever occur.",
            "Nothing; a smaller vocabulary would save them.", names(moments, rare), {"share": share},
        )  # fmt: skip


def far_from_rank_1(run: xr.DataTree) -> Iterator[Finding]:
    """The RMS of log10(v/v̂₁) is over 0.3 decades, v̂₁ what Adafactor's factors would keep, in the median record.

    Only a second moment of every coordinate tells it. What an optimizer that keeps the factors alone loses cannot be seen in them; where
    the run has both, the others' loss is the only hint, and is told as that.
    """
    moments = group(run, "second_moment")
    error, information = typical(moments["rank1_log_error"].values), typical(moments["rank1_information"].values)
    form = moments["second_moment_form"].values
    factored = (form == SECOND_MOMENT_FORMS.index("row_col")).any(axis=0)
    far = (error > FAR_FROM_RANK_1) & ~factored
    if not far.any():
        return
    off = float(np.median(error[far]))
    text = f"The second moment of {count(far)} is {off:.2f} decades (RMS) away from its rank-1 form, by which steps would be off by a factor of {10 ** (off / 2):.2g}"
    numbers = {"log_error": off, "information": float(np.median(information[far]))}
    advice = "Keep the full second moment for these; factors (Adafactor) or one number per block would lose this."
    if factored.any():
        yield Finding(
            "factored_loses", "warning",
            f"{text}. Beside them {count(factored)} with factors alone: what these lose cannot be read from them, but is likely of that size.",
            advice, names(moments, factored), {**numbers, "factored": factored.sum()},
        )  # fmt: skip
    else:
        yield Finding("far_from_rank_1", "info", f"{text}.", advice, names(moments, far), numbers)


def uneven_decay(run: xr.DataTree) -> Iterator[Finding]:
    """Coupled weight decay shrinks coordinates at rates a decade apart (5 to 95 %), in the median record (AdamW, arXiv 1711.05101)."""
    moments = group(run, "second_moment")
    spread: NDArray[np.float64] = typical(moments["decay_spread"].values)
    uneven = spread > UNEVEN_DECAY
    if uneven.any():
        largest = float(spread[uneven].max())
        yield Finding(
            "uneven_decay", "warning",
            f"Weight decay is divided by √v̂ in {count(uneven)}: nine of ten coordinates shrink at rates up to {10**largest:.3g} times apart.",
            "Use decoupled weight decay (AdamW, decoupled_weight_decay=True).", names(moments, uneven), {"decades": largest},
        )  # fmt: skip


RULES = (under_eps, far_from_rank_1, uneven_decay)
