"""Lists of coefficients as people have them: JSON, Python code that holds them, or a schedule file with one list per operator."""

import ast
import codecs
from collections.abc import Collection
from typing import Any, NamedTuple

from ..newton_schulz.families import AfterLast
from ..store.bounded_json import JsonError, Problem, parse_bounded
from .python_lists import lists_in, parse_python, value_of
from .schedule_file import FORMAT

_EXPECTED = 'a list of (a, b, c) triples as JSON or Python writes it, {"coefficients": [...], "after_last": "repeat"}, or a schedule file'
_LISTED = 12  # names that an error lists


class CoefficientList(NamedTuple):
    """One list as it is written down; :func:`..newton_schulz.validation.validate` judges its content.

    Attributes:
        name: of its operator or in its code, else of what it was read from.
        coefficients: what stands there.
        steps: how many are taken, where that is said.
        after_last: what follows the last triple.
        note: what the reading cannot know; "" where there is nothing.
    """

    name: str
    coefficients: Any
    steps: int | None = None
    after_last: AfterLast = "repeat"
    note: str = ""


def read_coefficients(content: bytes, source: str, names: Collection[str] = ()) -> list[CoefficientList]:
    """The lists of a text: of a schedule one per operator, of Python code what it holds. Code is parsed and never run.

    Three bare numbers are one triple.

    Args:
        content: the text, in UTF-8.
        source: what errors call it, and the name of a list without a name of its own.
        names: the lists that are wanted; by default all of a schedule, and the only one of Python code.

    Raises:
        ValueError: none of these forms; Python code that holds several lists, with no name given; or a name that is not there.

    >>> read_coefficients(b"[[1.5, -0.5, 0]]", "mine.json")
    [CoefficientList(name='mine.json', coefficients=[[1.5, -0.5, 0]], steps=None, after_last='repeat', note='')]
    >>> read_coefficients(b"NS = [(15/8, -5/4, 3/8)]  # exact", "mine.py")
    [CoefficientList(name='NS', coefficients=[[1.875, -1.25, 0.375]], steps=None, after_last='repeat', note='')]
    """
    content = content.removeprefix(codecs.BOM_UTF8)
    try:
        return _chosen(_of_document(parse_bounded(content), source), names)
    except JsonError as error:
        if error.problem is Problem.EMPTY:
            raise ValueError(f"{source}: expected {_EXPECTED}; got an empty file") from None
        if error.problem is not Problem.NO_JSON:
            raise ValueError(f"{source}: {error}") from None
    tree = _parsed(content, source)
    if _is_document(tree):
        return _chosen(_of_document(_value(tree, source), source), names)
    lists = _of_code(tree, source)
    if not names and len(lists) > 1:
        raise ValueError(f"--name: expected one or more of {_told(lists)}, the lists in {source}; got none")
    return [one._replace(coefficients=_rows(_value(one.coefficients, source))) for one in _chosen(lists, names)]


def _of_document(document: Any, source: str) -> list[CoefficientList]:
    if isinstance(document, list):
        return [CoefficientList(source, _rows(document))]
    if not isinstance(document, dict):
        raise ValueError(f"{source}: expected {_EXPECTED}; got {type(document).__name__}")
    if document.get("format") == FORMAT:
        operators = document.get("operators")
        if not isinstance(operators, dict) or not operators or not all(isinstance(entry, dict) for entry in operators.values()):
            raise ValueError(f"{source}: the schedule names no operator; derive it again with `diag schedule`")
        return [CoefficientList(operator, entry.get("coefficients", [])) for operator, entry in operators.items()]
    if "coefficients" not in document:
        raise ValueError(f"{source}: expected {_EXPECTED}; got an object without coefficients")
    steps = document.get("steps")
    if steps is not None and type(steps) is not int:
        raise ValueError(f"{source}: steps: expected a whole number, got {steps!r:.60}")
    return [CoefficientList(source, _rows(document["coefficients"]), steps, document.get("after_last", "repeat"))]


def _of_code(tree: ast.AST, source: str) -> list[CoefficientList]:
    """The lists in code, each still as it is written."""
    found = lists_in(tree)
    if not found:
        raise ValueError(f"{source}: expected {_EXPECTED}; got text that holds no such list")
    return [
        CoefficientList(
            one.label if one.name or len(found) > 1 else source, one.node,
            note=f"line {one.changed} gives {one.name} another value, by code that is not run; the list judged is that in line {one.line}"
            if one.changed else "",
        )
        for one in found
    ]  # fmt: skip


def _chosen(lists: list[CoefficientList], names: Collection[str]) -> list[CoefficientList]:
    if unknown := sorted(set(names) - {one.name for one in lists}):
        raise ValueError(f"--name: {', '.join(unknown)} is none of {_told(lists)}")
    return [one for one in lists if not names or one.name in names]


def _told(lists: list[CoefficientList]) -> str:
    names = [one.name for one in lists]
    return ", ".join(names[:_LISTED]) + (f" and {len(names) - _LISTED} more" if len(names) > _LISTED else "")


def _is_document(tree: ast.AST) -> bool:
    """Whether a text in Python is nothing but a list, well formed or not, or an object as JSON has it."""
    keys = [key.value for key in tree.keys if isinstance(key, ast.Constant)] if isinstance(tree, ast.Dict) else []
    return isinstance(tree, (ast.List, ast.Tuple)) or "coefficients" in keys or "format" in keys


def _parsed(content: bytes, source: str) -> ast.AST:
    try:
        return parse_python(content.decode())
    except UnicodeDecodeError:
        raise ValueError(f"{source}: expected {_EXPECTED}; got bytes that are no text in UTF-8") from None
    except SyntaxError as error:
        raise ValueError(f"{source}: expected {_EXPECTED}; got neither JSON nor Python (line {error.lineno}: {error.msg})") from None
    except ValueError as error:
        raise ValueError(f"{source}: {error}") from None


def _value(node: Any, source: str) -> Any:
    try:
        return value_of(node)
    except ValueError as error:
        raise ValueError(f"{source}: {error}") from None
    except RecursionError:
        raise ValueError(f"{source}: expected Python code that is nested less deep") from None


def _rows(value: Any) -> Any:
    """A list of rows of what may be one row, or the list and a comma after it."""
    if isinstance(value, list):
        if len(value) == 3 and all(type(number) in (int, float) for number in value):
            return [value]
        if len(value) == 1 and isinstance(value[0], list) and value[0] and all(isinstance(row, list) for row in value[0]):
            return value[0]
    return value
