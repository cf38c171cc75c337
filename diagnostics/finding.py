"""One thing to know about a run, or about a list of coefficients: what a rule found, how serious it is, and what to do."""

import math
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, field
from typing import Any, Literal

Severity = Literal["info", "warning", "error"]
SEVERITIES: tuple[Severity, ...] = ("info", "warning", "error")


@dataclass(frozen=True)
class Finding:
    """One thing to know.

    Attributes:
        rule: name of the rule.
        severity: "info" never fails a check.
        sentence: what was found, numbers included.
        advice: what to do.
        matrices: names of the matrices concerned; () where it is about a list of coefficients.
        numbers: what the sentence rests on, by name.
    """

    rule: str
    severity: Severity
    sentence: str
    advice: str
    matrices: tuple[str, ...] = ()
    numbers: Mapping[str, float] = field(default_factory=dict)

    def as_dict(self) -> dict[str, Any]:
        """Plain values for JSON, which knows no NaN and no infinity: numbers that are not finite are left out."""
        return {**asdict(self), "numbers": {name: float(value) for name, value in self.numbers.items() if math.isfinite(value)}}


def worst_first(findings: Iterable[Finding]) -> list[Finding]:
    """Errors, then warnings, then notes; in the order given among equals."""
    return sorted(findings, key=lambda finding: -SEVERITIES.index(finding.severity))
