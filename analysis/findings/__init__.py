"""What is wrong with a run: rules over its records, each a sentence with its numbers, its matrices and what to do.

A rule is a function of the run that yields findings, listed in `RULES` of its module; it stays silent where what it reads was not
recorded.
"""

import xarray as xr

from . import coefficients, momentum, newton_schulz, recording, unread_muon, update_size
from .finding import SEVERITIES, Finding

__all__ = ["SEVERITIES", "Finding", "check"]

RULES = (*recording.RULES, *newton_schulz.RULES, *coefficients.RULES, *momentum.RULES, *update_size.RULES, *unread_muon.RULES)


def check(run: xr.DataTree) -> list[Finding]:
    """All findings of a run, the most severe first.

    Raises:
        ValueError: the run has no records.
    """
    if not any(run[group].sizes.get("step") for group in ("update", "geometry") if group in run.children):
        raise ValueError("run: no records yet; record at least one step")
    found = [finding for rule in RULES for finding in rule(run)]
    return sorted(found, key=lambda finding: -SEVERITIES.index(finding.severity))
