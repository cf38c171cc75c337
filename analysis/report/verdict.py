"""The findings in one sentence."""

from collections import Counter
from collections.abc import Sequence
from typing import Any

from ..findings import SEVERITIES


def counts(findings: Sequence[dict[str, Any]]) -> dict[str, int]:
    """How many findings of each severity, the most severe first."""
    found = Counter(finding["severity"] for finding in findings)
    return {severity: found[severity] for severity in reversed(SEVERITIES)}


def verdict(findings: Sequence[dict[str, Any]]) -> str:
    """How many of each, and what matters most.

    >>> verdict([])
    'Clean: nothing was found.'
    >>> verdict([{"severity": "info", "sentence": "κ is bounded."}])
    'Clean: no errors and no warnings; 1 note.'
    >>> verdict([{"severity": "error", "sentence": "NaN."}, {"severity": "warning", "sentence": "Dead."}])
    '1 error, 1 warning. First of all: NaN.'
    """
    if not findings:
        return "Clean: nothing was found."
    number = counts(findings)
    notes = _many(number["info"], "note")
    severe = [_many(n, severity) for severity, n in number.items() if n and severity != "info"]
    if not severe:
        return f"Clean: no errors and no warnings; {notes}."
    first = next(f["sentence"] for severity in reversed(SEVERITIES) for f in findings if f["severity"] == severity)
    return f"{', '.join([*severe, notes] if number['info'] else severe)}. First of all: {first}"


def _many(number: int, of: str) -> str:
    return f"{number} {of}{'' if number == 1 else 's'}"
