r"""Names and texts that somebody else may have chosen, made harmless to what shows them. What is stored stays as it is; this is for output.

A run comes from a model's author, a colleague, a stranger. Whatever its texts hold, a terminal, a log, a page, a table and a JSON document
show it spelled out: escape sequences, line breaks, reversed and unseen writing as `\x1b`, `\n`, `\u202e`, `\u200b`.
"""

import json
import re
from math import isfinite
from typing import Any

WORD = 160  # characters of a word that is shown whole on a page
MARKS = 4  # combining marks on one letter; the scripts that need most have three


def escaped(text: object) -> str:
    r"""The text with what would steer a terminal or a line spelled out, and marks piled up on one letter from the fifth on.

    >>> escaped("κ\x1b[2J")
    'κ\\x1b[2J'
    """
    text = str(text)
    if text.isascii() and text.isprintable():
        return text
    return re.sub(r"[^\x20-\x7e]+", lambda found: _spelled_out(found[0]), text)


def shortened(text: str, longest: int = WORD) -> str:
    """Without the middle of endless words, which would fill pages, and of what is longer than forty such words.

    >>> shortened("a xxxxxxxxxxxx b", 8)
    'a xxxx…xx b'
    """
    text = re.sub(rf"\S{{{longest},}}", lambda word: f"{word[0][: longest // 2]}…{word[0][-longest // 4 :]}", text)
    return text if len(text) <= 40 * longest else f"{text[: 30 * longest]}…{text[-9 * longest :]}"


def json_text(value: Any, *, indent: int | None = 2) -> str:
    r"""Strict JSON on one or several lines: null for NaN and infinities, which JSON lacks; a text's unprintable characters as `\u….`, so that it reads back the same.

    >>> json_text({"κ\x9b": float("nan")}, indent=None)
    '{"κ\\u009b": null}'
    """
    text = json.dumps(_finite(value), indent=indent, ensure_ascii=False, allow_nan=False, default=str)
    return re.sub(r"[^\x20-\x7e\n]", lambda found: found[0] if found[0].isprintable() else json.dumps(found[0])[1:-1], text)


def storable(text: str) -> str:
    r"""The text as UTF-8 can hold it: halves of surrogate pairs, which no file can, spelled out.

    >>> storable("a\ud800κ")
    'a\\ud800κ'
    """
    return text.encode("utf-8", "backslashreplace").decode("utf-8")


def _spelled_out(text: str) -> str:
    import unicodedata  # 1 MB, of use to few texts

    shown, marks = [], 0
    for c in text:
        marks = marks + 1 if unicodedata.category(c) in ("Mn", "Me") else 0
        shown.append(c if c.isprintable() and marks <= MARKS else c.encode("unicode_escape").decode())
    return "".join(shown)


def _finite(value: Any) -> Any:
    if isinstance(value, dict):
        return {key if isinstance(key, str) else str(key): _finite(inner) for key, inner in value.items()}
    if isinstance(value, (list, tuple)):
        return [_finite(inner) for inner in value]
    return None if isinstance(value, float) and not isfinite(value) else value
