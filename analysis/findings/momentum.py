"""Whether the momentum that an optimizer keeps is still the gradients' average after its step."""

from collections.abc import Iterator

import numpy as np
import xarray as xr

from ...diagnostics.finding import Finding
from .matrices import count, group, names

# How close to 1 a norm must be: bfloat16 rounds the norm that is divided by and the entries, together by under 0.4 %.
NORMALISED = 0.01
LEAST_RECORDS = 3


def overwritten(run: xr.DataTree) -> Iterator[Finding]:
    """The momentum buffer has ‖M‖_F = 1, to 1 %, after every recorded step, whatever the gradients' norms.

    An average of gradients does not; one that Newton–Schulz divided by its norm in place does, and forgets how large the gradients
    were. (torch.optim.Muon up to 2.13 does so with bfloat16 parameters and nesterov=False.)
    """
    update = group(run, "update")
    root = np.sqrt(update["rows"].values * update["cols"].values)
    momentum, gradient = update["momentum_rms"].values * root, update["grad_rms"].values * root
    seen = np.isfinite(momentum) & (gradient > 0)
    normalised = seen & (np.abs(momentum - 1) < NORMALISED)
    # Where the gradients themselves are given with norm 1, their average may have it too.
    of_gradient = seen & (np.abs(gradient - 1) < NORMALISED)
    concerned = (seen.sum(axis=0) >= LEAST_RECORDS) & (normalised.sum(axis=0) == seen.sum(axis=0)) & ~of_gradient.all(axis=0, where=seen)
    if concerned.any():
        chosen = gradient[:, concerned][seen[:, concerned]]
        yield Finding(
            "momentum_overwritten", "error",
            f"The momentum of {count(concerned)} has norm 1 after every step while gradients have norms of {chosen.min():.2g} to {chosen.max():.2g}: "
            "it is normalised in place, so that new gradients weigh by their size against a buffer that has lost its own.",
            "Orthogonalise a copy of the momentum (torch.optim.Muon with bfloat16 parameters: use nesterov=True).",
            names(update, concerned), {"least_gradient_norm": chosen.min(), "largest_gradient_norm": chosen.max()},
        )  # fmt: skip


RULES = (overwritten,)
