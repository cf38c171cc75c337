"""Whether parts of a matrix that the optimizer treats as one are too different for that."""

from collections.abc import Iterator

import numpy as np
import xarray as xr

from ...diagnostics.finding import Finding
from ...diagnostics.operators import classify
from ..studies import block_geometry
from .matrices import group

# A decade of κ is worth 1.9 of Jordan's steps, 1.7 of Polar Express'.
DECADE = 1.0
FACTOR = np.log10(2)  # between the updates of the parts of one matrix


def unlike_blocks(run: xr.DataTree) -> Iterator[Finding]:
    """κ of the heads, or of the fused parts, of one matrix are a decade apart, or their updates a factor of 2, in the median record."""
    blocks, whole, geometry = group(run, "blocks"), group(run, "update"), group(run, "geometry")
    operator_of = dict(zip(whole["name"].values.tolist(), whole["operator"].values.tolist(), strict=True))
    try:
        study = block_geometry.study(run)
    except ValueError:
        return  # no blocks, or none with a spectrum
    for family in map(str, study["family"].values):
        operator, _, kind = family.partition(" ")
        condition, update = (float(study[name].sel(family=family)) for name in ("condition_spread", "update_spread"))
        if not (condition > DECADE or update > FACTOR):
            continue
        texts = [f"condition numbers {10**condition:.3g} times apart"] if condition > DECADE else []
        texts += [f"updates {10**update:.3g} times apart"] if update > FACTOR else []
        concerned = dict.fromkeys(str(name) for name in blocks["of"].values if operator_of.get(str(name), classify(str(name))) == operator)
        orthogonalised = np.isin(geometry["name"].values[(geometry["ns_schedule"].values >= 0).any(axis=0)], list(concerned)).any()
        yield Finding(
            "unlike_blocks", "info", f"The {kind} of {operator} matrices differ within one matrix: {' and '.join(texts)} (median).",
            "Orthogonalise them one by one (split the fused projection, or its heads), so that the hardest does not set the steps of all."
            if orthogonalised
            else "Nothing; a learning rate for each of them (split the fused projection, or its heads) could tell whether it matters.",
            tuple(concerned),
            {name: value for name, value in (("condition_decades", condition), ("update_decades", update)) if np.isfinite(value)},
        )  # fmt: skip


RULES = (unlike_blocks,)
