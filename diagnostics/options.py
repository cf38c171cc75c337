"""How a training is recorded: the options that `attach`, the callbacks of trainers and `diag run` share, and what is refused of them."""

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from numbers import Integral, Real
from typing import Any, Literal, TypeAlias, TypeGuard

from .about import Value, checked
from .catalogue import DEFAULT_GROUPS, MEASURES
from .operators import OperatorRule
from .quantities.adam_mini import Heads

HeadsGiven: TypeAlias = int | tuple[int, int] | None
OnError: TypeAlias = Literal["warn", "raise"]
Together: TypeAlias = Literal["auto", "share", "alone"]


@dataclass
class Options:
    """Options as of :func:`optiscope.hooks.attach`, whose documentation says what each means.

    `measure`, `heads` and `about` are kept in one form: a tuple, a pair or None, a dict of plain values.

    Raises:
        TypeError, ValueError: an option that `attach` does not take; the text begins with its name.
    """

    every: int | None = None
    overhead: float = 0.01
    measure: Sequence[str] = DEFAULT_GROUPS
    operators: OperatorRule | None = None
    heads: HeadsGiven = None
    background: bool = False
    about: Mapping[str, Value] | None = None
    ranks: Together = "auto"
    rank_timeout: float = 10.0
    on_error: OnError = "warn"

    def __post_init__(self) -> None:
        if self.every is not None and not (_is_number(self.every) and self.every >= 1 and self.every == self.every // 1):
            raise ValueError(
                f"every: expected a number of steps of at least 1, got {self.every!r}; without it, records are spaced to keep under overhead"
            )
        if not (_is_number(self.overhead) and 0 < self.overhead <= 1):
            raise ValueError(f"overhead: expected a share of the training time above 0 and up to 1, got {self.overhead!r}")
        groups = (self.measure,) if isinstance(self.measure, str) else tuple(self.measure) if isinstance(self.measure, Iterable) else ()
        if not groups or any(group not in MEASURES for group in groups):
            raise ValueError(f"measure: expected one or more of {', '.join(MEASURES)}; got {self.measure!r}")
        if not isinstance(self.background, bool):
            raise TypeError(f"background: expected True or False, got {self.background!r}")
        if self.ranks not in ("auto", "share", "alone"):
            raise ValueError(f"ranks: expected 'auto', 'share' or 'alone', got {self.ranks!r}")
        if not (_is_number(self.rank_timeout) and 0 < self.rank_timeout < float("inf")):
            raise ValueError(f"rank_timeout: expected a number of seconds above 0, got {self.rank_timeout!r}")
        if self.on_error not in ("warn", "raise"):
            raise ValueError(f"on_error: expected 'warn' or 'raise', got {self.on_error!r}")
        _check_operators(self.operators)
        self.every = None if self.every is None else int(self.every)
        self.measure = groups
        self.heads = head_counts(self.heads)
        self.about = checked(self.about)


def head_counts(heads: Any) -> Heads | None:
    """What the user gave as (query heads, key/value heads); None where it is to be found.

    Raises:
        TypeError, ValueError: something else than one or two positive numbers, the second a divisor of the first.

    >>> head_counts(8), head_counts((8, 2))
    ((8, 8), (8, 2))
    """
    if heads is None:
        return None
    pair = tuple(heads) if isinstance(heads, (tuple, list)) else (heads, heads)
    if len(pair) != 2 or not all(is_count(count) for count in pair) or pair[0] % pair[1]:
        kind = ValueError if isinstance(heads, (int, tuple, list)) else TypeError
        raise kind(
            f"heads: expected a positive number, or (query heads, key/value heads) with the second dividing the first; got {heads!r}"
        )
    return int(pair[0]), int(pair[1])


def is_count(value: Any) -> TypeGuard[int]:
    """Whether it is a positive whole number."""
    return isinstance(value, Integral) and not isinstance(value, bool) and int(value) > 0


def _is_number(value: object) -> bool:
    return isinstance(value, Real) and not isinstance(value, bool)


def _check_operators(rule: object) -> None:
    if rule is None or callable(rule):
        return
    if not isinstance(rule, Mapping):
        raise TypeError(f"operators: expected a mapping from regular expressions to operators, or a function of the name, got {rule!r}")
    for pattern, operator in rule.items():
        if not isinstance(operator, str) or not operator.strip():
            raise ValueError(f"operators: expected the name of an operator for {pattern!r}, such as attn_q, got {operator!r}")
        try:
            re.compile(pattern)
        except (re.error, TypeError) as error:
            raise ValueError(f"operators: expected a regular expression, got {pattern!r} ({error})") from None
