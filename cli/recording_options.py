"""What is typed for `diag run`, as options of `attach`."""

import json
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from enum import StrEnum
from pathlib import Path
from typing import Any

MAX_BYTES = 64_000  # of a file of operators: they reach the script's process through its environment, which has bounds


# The catalogue's, held equal to it by a test: it loads NumPy, which no help needs.
class Measure(StrEnum):
    """What is recorded beside the default groups, when asked for."""

    SECOND_MOMENT_MAP = "second_moment_map"
    GRADIENT = "gradient"
    BLOCKS = "blocks"
    STACKING = "stacking"
    PRECISION = "precision"


class Together(StrEnum):
    """How several processes record, as `ranks` of `attach`."""

    AUTO = "auto"
    SHARE = "share"
    ALONE = "alone"


def options_of(
    every: int | None,
    overhead: float | None,
    measure: Iterable[str],
    operators: Iterable[str],
    heads: str | None,
    about: Iterable[str],
    background: bool,
    ranks: str | None = None,
    rank_timeout: float | None = None,
) -> dict[str, Any]:
    """The options that were given, checked, as plain values; those that were not are left out.

    Raises:
        ValueError, TypeError: one of them is refused; the text begins with its name, as it is typed.
    """
    if every is not None and overhead is not None:
        raise ValueError("--every and --overhead: expected one of them, got both")
    typed = {
        "every": every,
        "overhead": overhead,
        "heads": None if heads is None else parse_heads(heads),
        "operators": parse_operators(operators) or None,
        "background": background or None,
        "ranks": ranks,
        "rank_timeout": rank_timeout,
    }
    given: dict[str, Any] = {name: value for name, value in typed.items() if value is not None}
    if not (given or measure or about):
        return {}  # without NumPy
    from ..diagnostics.about import parsed
    from ..diagnostics.catalogue import DEFAULT_GROUPS, MEASURES
    from ..diagnostics.options import Options

    with _typed():
        if measure:
            given["measure"] = [group for group in MEASURES if group in (*DEFAULT_GROUPS, *measure)]
        if about:
            given["about"] = parsed(about)
        Options(**given)
    return given


def parse_heads(text: str) -> list[int]:
    """N or N,M.

    >>> parse_heads("32"), parse_heads("32,8")
    ([32, 32], [32, 8])
    """
    parts = [part.strip() for part in text.split(",")]
    if len(parts) > 2 or not all(part.isdecimal() for part in parts):
        raise ValueError(f"--heads: expected N, or N,M for query heads and key/value heads, for example 32,8; got {text!r}")
    return [int(parts[0]), int(parts[-1])]


def parse_operators(entries: Iterable[str]) -> dict[str, str]:
    """Entries REGEX=OPERATOR, and files of such lines or of one JSON object, in their order: the first expression that is found in a name wins.

    >>> parse_operators([r"mixer.in$=attn_qkv", "(?=x)=other"])
    {'mixer.in$': 'attn_qkv', '(?=x)': 'other'}
    """
    rule: dict[str, str] = {}
    for entry in entries:
        of_file = "=" not in entry or Path(entry).is_file()
        for pattern, operator in _of_file(Path(entry)) if of_file else [_pair(entry)]:
            rule.setdefault(pattern, operator)
    return rule


def _pair(entry: str) -> tuple[str, str]:
    pattern, _, operator = entry.rpartition("=")  # an expression may hold an equals sign, an operator's name does not
    if not pattern.strip() or not operator.strip():
        raise ValueError(rf"--operators: expected REGEX=OPERATOR, for example 'mixer\.in$=attn_qkv', got {entry!r}")
    return pattern.strip(), operator.strip()


def _of_file(path: Path) -> list[tuple[str, str]]:
    from ..diagnostics.store.bounded_json import read_bounded

    if not path.is_file():
        raise FileNotFoundError(rf"--operators: expected a file, or REGEX=OPERATOR such as 'mixer\.in$=attn_qkv'; there is no file {path}")
    text = read_bounded(path, MAX_BYTES).decode(errors="replace").strip()
    if not text.startswith("{"):
        return [_pair(line) for line in text.splitlines() if line.strip() and not line.lstrip().startswith("#")]
    try:
        return list(json.loads(text).items())
    except (ValueError, RecursionError) as error:
        raise ValueError(
            f"--operators: {path}: expected one JSON object, {{REGEX: OPERATOR, …}}, or lines REGEX=OPERATOR ({error})"
        ) from None


@contextmanager
def _typed() -> Iterator[None]:
    """Errors of the block, which begin with an option's name, with that name as it is typed."""
    try:
        yield
    except (ValueError, TypeError) as error:
        raise type(error)(f"--{error}") from None
