"""What is wrong with a run: rules over its records, each a sentence with its numbers, its matrices and what to do.

A rule is a function of the run that yields findings, listed in `RULES` of its module; it stays silent where what it reads was not
recorded.
"""

import xarray as xr

from . import blocks, coefficients, history, momentum, newton_schulz, recording, schedule, second_moment, unread_muon, update_size
from .finding import SEVERITIES, Finding

__all__ = ["SEVERITIES", "Finding", "check"]

_SUBJECTS = (recording, newton_schulz, coefficients, momentum, update_size, unread_muon, history, second_moment, blocks, schedule)
RULES = tuple(rule for subject in _SUBJECTS for rule in subject.RULES)


def check(run: xr.DataTree) -> list[Finding]:
    """All findings of a run, the most severe first.

    Raises:
        ValueError: the run has no records.
    """
    if not any(run[group].sizes.get("step") for group in ("update", "geometry") if group in run.children):
        raise ValueError("run: no records yet; record at least one step")
    run = update_size.with_alignment(run)
    found = [finding for rule in RULES for finding in rule(run)]
    return sorted(found, key=lambda finding: -SEVERITIES.index(finding.severity))
