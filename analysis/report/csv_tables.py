"""Tables as CSV: comma, a first line of names, numbers as they are, texts quoted where they need it (RFC 4180), a missing value an empty cell.

Spreadsheets take a text that begins like a formula for one, quoted or not, and run it. Such a text gets an apostrophe in front, which
shows it as the text that it is; unprintable characters are spelled out. The true names are in the run.
"""

import re
from typing import Any

import pandas as pd

from ...diagnostics.escape import escaped

FORMULA = re.compile(r"\s*[=+\-@＝＋－＠]")


def as_csv(table: pd.DataFrame, float_format: str | None = None) -> str:
    """The text of a table, without its index."""
    texts = {name: column.map(cell) for name, column in table.items() if not pd.api.types.is_numeric_dtype(column)}
    shown = table.assign(**texts).rename(columns=cell)
    return str(shown.to_csv(index=False, float_format=float_format, lineterminator="\n"))


def cell(value: Any) -> Any:
    """A value as it may stand in a cell.

    >>> cell("=1+1"), cell("layers.0.weight"), cell(-1.5)
    ("'=1+1", 'layers.0.weight', -1.5)
    """
    if not isinstance(value, str):
        return value
    return f"'{escaped(value)}" if FORMULA.match(value) else escaped(value)
