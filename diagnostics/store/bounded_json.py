"""JSON from a stranger: read within bounds of memory, time and depth."""

import json
import re
from enum import Enum
from pathlib import Path
from typing import Any

DEPTH = 32
# A list or an object takes 56 bytes and more where its text takes two: with both bounds, reading takes less than 0.4 GB and a second or two.
MAX_BYTES, MAX_CONTAINERS = 16_000_000, 1_000_000
_SURROGATE = re.compile(rb"\\u[dD][89abAB]")


class Problem(Enum):
    """What is wrong with a text that was to be JSON, each as a whole message without a subject."""

    TOO_LONG = f"expected at most {MAX_BYTES:,} bytes, got more"
    TOO_MANY = f"expected JSON of at most {MAX_CONTAINERS:,} lists and objects, got more"
    TOO_DEEP = f"expected JSON nested at most {DEPTH} deep, got more"
    EMPTY = "expected JSON in UTF-8, got an empty file"
    NO_JSON = "expected JSON in UTF-8, got something else"


class JsonError(ValueError):
    """A text that :func:`parse_bounded` does not read; `problem` says why."""

    def __init__(self, problem: Problem) -> None:
        super().__init__(problem.value)
        self.problem = problem


def read_bounded(path: str | Path, most: int = MAX_BYTES) -> bytes:
    """What is in a file of at most `most` bytes.

    Raises:
        OSError: it cannot be read.
        ValueError: it is longer.
    """
    with open(path, "rb") as file:
        content = file.read(most + 1)
    if len(content) > most:
        raise ValueError(f"{path}: expected at most {most:,} bytes, got more")
    return content


def parse_bounded(content: bytes) -> Any:
    """The value that a JSON text in UTF-8 stands for. Every text in it can be encoded again.

    Raises:
        JsonError: no JSON, or one nested deeper than 32, or one of more than a million lists and objects; told without a subject.

    >>> parse_bounded(b'{"a": [1, 2]}')
    {'a': [1, 2]}
    >>> parse_bounded(b"[" * 100_000)
    Traceback (most recent call last):
    optiscope.diagnostics.store.bounded_json.JsonError: expected JSON nested at most 32 deep, got more
    """
    if len(content) > MAX_BYTES:
        raise JsonError(Problem.TOO_LONG)
    if content.count(b"[") + content.count(b"{") > MAX_CONTAINERS:
        raise JsonError(Problem.TOO_MANY)
    if not content.strip():
        raise JsonError(Problem.EMPTY)
    try:
        document = json.loads(content.decode())
        if _SURROGATE.search(content):
            json.dumps(document, ensure_ascii=False).encode()
    except RecursionError:
        raise JsonError(Problem.TOO_DEEP) from None
    except ValueError:
        raise JsonError(Problem.NO_JSON) from None
    level = [document]
    for _ in range(DEPTH + 1):
        containers = [node for node in level if isinstance(node, (dict, list))]
        if not containers:
            return document
        level = [child for node in containers for child in (node.values() if isinstance(node, dict) else node)]
    raise JsonError(Problem.TOO_DEEP)
