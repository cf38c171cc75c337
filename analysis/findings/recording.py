"""Whether the record itself is whole, and whether what it holds is finite and moves."""

from collections.abc import Iterator

import numpy as np
import xarray as xr

from ...diagnostics.finding import Finding
from .matrices import count, group, names


def recording_errors(run: xr.DataTree) -> Iterator[Finding]:
    """Measuring failed at least once: the recorder counts it in the run's attribute `errors`."""
    if errors := run.attrs.get("errors", 0):
        yield Finding(
            "recording_errors", "warning", f"Measuring failed {errors} time{'' if errors == 1 else 's'}; what failed is missing.",
            "See the training's log for the first failure.", numbers={"errors": errors},
        )  # fmt: skip


def dropped(run: xr.DataTree) -> Iterator[Finding]:
    """Records were lost, or scalars that came after a slow one: the recorder counts their steps in the run's attribute `dropped`."""
    if lost := run.attrs.get("dropped", 0):
        yield Finding(
            "dropped", "warning", f"What was recorded at {lost} step{'' if lost == 1 else 's'} is lost: for long it could not be written.",
            "See the training's log: make room, record elsewhere, or less often if it was scalars that came after a slow record.", numbers={"dropped": lost},
        )  # fmt: skip


def not_finite(run: xr.DataTree) -> Iterator[Finding]:
    """The gradient or the update of a recorded matrix is NaN or infinite."""
    update = group(run, "update")
    recorded = np.isfinite(update["lr"].values)
    bad = recorded & ~(np.isfinite(update["update_rms"].values) & np.isfinite(update["grad_rms"].values))
    if bad.any():
        concerned, step = bad.any(axis=0), update["step"].values[bad.any(axis=1)][0]
        yield Finding(
            "not_finite", "error", f"NaN or infinity in the gradient or the update of {count(concerned)}, first at step {step}.",
            "Find the first step with a non-finite loss; lower the learning rate or clip gradients.", names(update, concerned),
            {"first_step": step, "share_of_records": bad.sum() / recorded.sum()},
        )  # fmt: skip


def changed_outside(run: xr.DataTree) -> Iterator[Finding]:
    """Weights differ from those that the optimizer's step before left."""
    update = group(run, "update")
    changed = update["changed_outside"].values == 1
    if changed.any():
        concerned, step = changed.any(axis=0), update["step"].values[changed.any(axis=1)][0]
        yield Finding(
            "changed_outside", "info",
            f"Weights of {count(concerned)} changed between the optimizer's steps, first before step {step} (a clip, a swap with an average, a load).",
            "Nothing, if that is meant; updates are recorded as the optimizer's steps make them.", names(update, concerned),
            {"first_step": step},
        )  # fmt: skip


RULES = (recording_errors, dropped, not_finite, changed_outside)
