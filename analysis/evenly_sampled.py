"""A large run as the studies see it: of groups with very many values, evenly spread records, read a few chunks at a time.

What a study says are medians, quantiles and curves over the training, which some hundred records tell as well as ten thousand do; what may
happen in a single record is the findings' matter, and they see all of them.
"""

import numpy as np
import xarray as xr

from ..diagnostics.evenly_spread import evenly_spread

# Records times matrices of a group that are studied, at 64 singular values each 77 MB.
CELLS = 300_000
TOLD = "records_studied"  # attribute of a run of which not all records are studied: how many of which groups, in words


def evenly_sampled(run: xr.DataTree) -> xr.DataTree:
    """The run with at most `CELLS` records times matrices in a group; itself where no group has more.

    Its attribute `records_studied` tells what was left out, "geometry: 886 of 10000 records".
    """
    groups = {name: node.to_dataset() for name, node in run.children.items()}
    large = [name for name, dataset in sorted(groups.items()) if dataset.sizes.get("step", 0) * dataset.sizes.get("matrix", 0) > CELLS]
    if not large:
        return run
    # The same steps in all of them: studies of two groups need records that both have.
    steps = np.unique(np.concatenate([groups[name]["step"].values for name in large]))
    steps = steps[evenly_spread(len(steps), max(CELLS // max(groups[name].sizes["matrix"] for name in large), 2))]
    told = []
    for name in large:
        kept = np.flatnonzero(np.isin(groups[name]["step"].values, steps))
        told.append(f"{name}: {len(kept)} of {groups[name].sizes['step']} records")
        groups[name] = groups[name].isel(step=kept)
    sampled = xr.DataTree.from_dict(groups)
    sampled.attrs = {**run.attrs, TOLD: ", ".join(told)}
    return sampled
