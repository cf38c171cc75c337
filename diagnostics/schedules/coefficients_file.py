"""Coefficients as JSON: a list of triples, one with what follows its end, or a schedule file with one list per operator."""

from typing import Any, NamedTuple

from ..newton_schulz.families import AfterLast
from ..store.bounded_json import parse_bounded
from .schedule_file import FORMAT

_EXPECTED = 'a list of [a, b, c] triples, {"coefficients": [...], "after_last": "repeat"}, or a schedule file'


class CoefficientList(NamedTuple):
    """One list as it stands in a file; :func:`..newton_schulz.validation.validate` judges its content."""

    name: str
    coefficients: Any
    steps: int | None
    after_last: AfterLast


def read_coefficients(content: bytes, name: str) -> list[CoefficientList]:
    """The lists of a file, those of a schedule named by operator.

    Raises:
        ValueError: not JSON, or none of the three forms.

    >>> read_coefficients(b"[[1.5, -0.5, 0]]", "mine.json")
    [CoefficientList(name='mine.json', coefficients=[[1.5, -0.5, 0]], steps=None, after_last='repeat')]
    """
    try:
        document = parse_bounded(content)
    except ValueError as error:
        if "deep" in str(error) or "lists" in str(error):
            raise ValueError(f"{name}: {error}") from None
        raise ValueError(
            f"{name}: expected JSON, {_EXPECTED}; got {'an empty file' if not content.strip() else 'something else'}"
        ) from None
    if isinstance(document, list):
        return [CoefficientList(name, document, None, "repeat")]
    if not isinstance(document, dict):
        raise ValueError(f"{name}: expected {_EXPECTED}; got {type(document).__name__}")
    if document.get("format") == FORMAT:
        operators = document.get("operators")
        if not isinstance(operators, dict) or not operators or not all(isinstance(entry, dict) for entry in operators.values()):
            raise ValueError(f"{name}: the schedule names no operator; derive it again with `diag schedule`")
        return [CoefficientList(operator, entry.get("coefficients", []), None, "repeat") for operator, entry in operators.items()]
    if "coefficients" not in document:
        raise ValueError(f"{name}: expected {_EXPECTED}; got an object without coefficients")
    steps = document.get("steps")
    if steps is not None and type(steps) is not int:
        raise ValueError(f"{name}: steps: expected a whole number, got {steps!r:.60}")
    return [CoefficientList(name, document["coefficients"], steps, document.get("after_last", "repeat"))]
