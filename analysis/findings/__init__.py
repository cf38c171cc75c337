"""What is wrong with a run: rules over its records, each a sentence with its numbers, its matrices and what to do.

A rule is a function of the run that yields findings, listed in `RULES` of its module; it stays silent where what it reads was not
recorded.
"""

import xarray as xr

from ...diagnostics.finding import SEVERITIES, Finding, worst_first
from ...diagnostics.store.run_error import RunError
from . import (
    adam_denominator,
    blocks,
    coefficients,
    history,
    momentum,
    orthogonalisation,
    ranks,
    recording,
    row_differs,
    steps_by_operator,
    unread_iteration,
    unread_muon,
    update_size,
)

__all__ = ["SEVERITIES", "Finding", "check"]

_SUBJECTS = (
    recording,
    orthogonalisation,
    coefficients,
    momentum,
    update_size,
    unread_muon,
    unread_iteration,
    ranks,
    row_differs,
    history,
    adam_denominator,
    blocks,
    steps_by_operator,
)
RULES = tuple(rule for subject in _SUBJECTS for rule in subject.RULES)


def has_records(run: xr.DataTree) -> bool:
    """Whether there is a record that could be judged."""
    return any(run[group].sizes.get("step") for group in ("update", "geometry") if group in run.children)


def check(run: xr.DataTree) -> list[Finding]:
    """All findings of a run, the most severe first.

    Raises:
        ValueError: the run has no records.
    """
    if not has_records(run):
        raise RunError("no records yet; record at least one step")
    run = update_size.with_alignment(run)
    return worst_first([finding for rule in RULES for finding in rule(run)])
