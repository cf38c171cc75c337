"""What a user states about a run, which no recorder can see: its data, the tokens of a step, its seed, its budget.

Kept as the root attribute `about`. Any name will do; those of :data:`READ` are read when runs are compared.
"""

from collections.abc import Iterable, Mapping
from math import isfinite
from numbers import Integral, Real
from typing import TypeAlias

from .escape import storable

Value: TypeAlias = str | int | float | bool

READ = {
    "data": "what was trained on: a name, a version, a hash",
    "tokens_per_step": "tokens (or samples) that one optimizer step sees, of all processes together",
    "seed": "of everything random",
    "budget": "what was to be spent, in tokens, steps or FLOPs",
}

ENTRIES, NAME_LENGTH, TEXT_LENGTH = 64, 100, 1000  # it is read with every opening of a run


def checked(about: Mapping[str, object] | None) -> dict[str, Value]:
    """Plain JSON values under plain names.

    Raises:
        TypeError: no mapping, or a value of another kind.
        ValueError: too much or too long, or a number that JSON or a reader of it cannot hold.

    >>> checked({"seed": 1, "data": "wiki-2024"})
    {'seed': 1, 'data': 'wiki-2024'}
    """
    if about is None:
        return {}
    if not isinstance(about, Mapping):
        raise TypeError(f"about: expected a mapping such as {{'seed': 0, 'tokens_per_step': 8192}}, got {type(about).__name__}")
    if len(about) > ENTRIES:
        raise ValueError(f"about: expected at most {ENTRIES} entries, got {len(about)}; name a file that holds the rest")
    return {_name(name): _plain(name, value) for name, value in about.items()}


def parsed(entries: Iterable[str]) -> dict[str, Value]:
    """Entries NAME=VALUE of a command line; numbers, `true` and `false` are read as such.

    Raises:
        ValueError: an entry of another form, or as in :func:`checked`.

    >>> parsed(["seed=1", "data=wiki", "lr=1e-3", "warm=true"])
    {'seed': 1, 'data': 'wiki', 'lr': 0.001, 'warm': True}
    """
    pairs = {}
    for entry in entries:
        name, equals, text = entry.partition("=")
        if not equals:
            raise ValueError(f"about: expected NAME=VALUE, for example seed=0, got {entry!r}")
        pairs[name.strip()] = _read(text.strip())
    return checked(pairs)


def _read(text: str) -> Value:
    if text in ("true", "false"):
        return text == "true"
    for kind in (int, float):
        try:
            number = kind(text)
        except ValueError:
            continue
        return number if isfinite(number) else text
    return text


def _name(name: object) -> str:
    if not isinstance(name, str) or not name.strip() or len(name) > NAME_LENGTH:
        raise ValueError(f"about: expected names of 1 to {NAME_LENGTH} characters, got {str(name)[:NAME_LENGTH]!r}")
    return storable(name)


def _plain(name: str, value: object) -> Value:
    if isinstance(value, str):
        if len(value) > TEXT_LENGTH:
            raise ValueError(f"about: expected texts of at most {TEXT_LENGTH} characters, {name!r} has {len(value)}; give a hash or a path")
        return storable(value)
    if isinstance(value, bool):
        return value
    if isinstance(value, Integral) and abs(int(value)) < 2**63:
        return int(value)
    if isinstance(value, Real) and not isinstance(value, Integral) and isfinite(value):
        return float(value)
    if isinstance(value, Real):
        raise ValueError(f"about: expected a finite number of 64 bits for {name!r}, got {value}")
    raise TypeError(f"about: expected a text, a number or a truth value for {name!r}, got {type(value).__name__}")
