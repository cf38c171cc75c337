"""The Newton–Schulz coefficients that an optimizer brings itself: how many steps it can run where only their number can be set.

`for a, b, c in coefficients[:ns_steps]` over a list of five runs five, whatever `ns_steps` says. Nothing is called to find such a list: it is
looked for in the parameter group, on the optimizer, and in what the code of its `step` refers to.
"""

import dis
import functools
import inspect
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import chain
from math import inf
from types import CodeType, FunctionType, ModuleType
from typing import Any

from torch import Tensor

from .adapter import Group

# What is looked into: functions of `step` and below, but for those of libraries that hold no optimizer's coefficients.
_FUNCTIONS = 500
_NOT_INTO = ("torch", "numpy", "math", "typing", "collections", "functools")


@dataclass(frozen=True)
class OwnCoefficients:
    """What was found.

    Attributes:
        lists: (where it is, how many it has) of every list of two or more triples.
        one_triple: whether one was found that stands by itself, as for any number of steps.
    """

    lists: tuple[tuple[str, int], ...]
    one_triple: bool

    @property
    def most(self) -> int | None:
        """The most steps that it runs; None where the code found tells of no end, or nothing was found."""
        return max(count for _, count in self.lists) if self.lists and not self.one_triple else None

    @property
    def surely(self) -> float:
        """The steps up to which it runs as many as it is told to, whichever of what was found it uses."""
        return min((count for _, count in self.lists), default=inf if self.one_triple else 0)


def own_coefficients(optimizer: object, group: Group) -> OwnCoefficients:
    """The lists of triples (a, b, c), a > 0 > b, in the group, else on the optimizer, else in the code that its `step` runs."""
    places = (
        ((f"`{key}` of the parameter group", value) for key, value in group.items() if key != "params"),
        (
            (f"`{key}` of the optimizer", value)
            for key, value in getattr(optimizer, "__dict__", {}).items()
            if key not in ("state", "param_groups", "defaults")
        ),
        _in_code(type(optimizer)),
    )
    for place in places:
        counts = [(where, count) for where, value in place for count in _counts(value)]
        if counts:
            return OwnCoefficients(tuple(dict.fromkeys(found for found in counts if found[1] > 1)), any(count == 1 for _, count in counts))
    return OwnCoefficients((), False)


def _counts(value: Any) -> Iterator[int]:
    """How many triples the value holds, if that is what it is; of a table of lists each."""
    if isinstance(value, dict):
        yield from chain.from_iterable(_counts(inner) for inner in value.values() if not isinstance(inner, dict))
        return
    if (isinstance(value, Tensor) or hasattr(value, "__array__")) and getattr(value, "ndim", 0) == 2 and value.shape[1] == 3:
        value = value.tolist() if len(value) < 100 else ()
    if _is_triple(value):
        yield 1
    elif isinstance(value, (list, tuple)) and value and all(map(_is_triple, value)):
        yield len(value)


def _is_triple(value: Any) -> bool:
    """The coefficients of a step that converges: they raise small singular values (a > 0) and bend back (b < 0). No three betas do."""
    is_three = isinstance(value, (list, tuple)) and len(value) == 3 and all(type(v) in (int, float) for v in value)
    return is_three and value[0] > 0 > value[1] and float in map(type, value)


def _in_code(cls: type) -> Iterator[tuple[str, Any]]:
    """What the functions that `step` runs refer to, and the constants in them, with the names they have there."""
    pending: list[Any] = [getattr(cls, "step", None)]
    seen: set[int] = set()
    while pending and len(seen) < _FUNCTIONS:
        function = _function(pending.pop())
        if function is None or id(function) in seen or (function.__module__ or "").partition(".")[0] in _NOT_INTO:
            continue
        seen.add(id(function))
        place = f"{function.__module__}.{function.__qualname__}"
        defaults = [*(function.__defaults__ or ()), *(function.__kwdefaults__ or {}).values()]
        yield from ((f"a default of {place}", value) for value in defaults)
        yield from ((f"a constant of {place}", value) for code in _codes(function.__code__) for value in code.co_consts)
        for name, value in _referred_to(function, cls):
            yield f"{name} of {function.__module__}", value
            pending.append(value)
        pending += defaults


def _function(value: Any) -> FunctionType | None:
    """The Python function within what decorators, torch.compile among them, and partial make of it."""
    while isinstance(value, (functools.partial, staticmethod, classmethod)):
        value = value.func if isinstance(value, functools.partial) else value.__func__
    value = inspect.unwrap(value) if callable(value) and not isinstance(value, type) else value
    return value if isinstance(value, FunctionType) else None


def _referred_to(function: FunctionType, cls: type) -> Iterator[tuple[str, Any]]:
    """Globals, cells, methods of the class and members of modules that a function names."""
    for cell, name in zip(function.__closure__ or (), function.__code__.co_freevars, strict=True):
        try:
            yield name, cell.cell_contents
        except ValueError:  # not filled yet
            continue
    modules: list[ModuleType] = []
    members: list[str] = []
    for code in _codes(function.__code__):
        for instruction in dis.get_instructions(code):
            name = instruction.argval
            if instruction.opname == "LOAD_GLOBAL" and name in function.__globals__:
                value = function.__globals__[name]
                modules += [value] if isinstance(value, ModuleType) else []
                yield name, value
            elif instruction.opname in ("LOAD_ATTR", "LOAD_METHOD"):
                members.append(name)
    for name in members:
        yield name, inspect.getattr_static(cls, name, None)
        for module in modules:
            if module.__name__.partition(".")[0] not in _NOT_INTO:
                yield name, vars(module).get(name)


def _codes(code: CodeType) -> Iterator[CodeType]:
    """A function's code and that of the functions and comprehensions within it."""
    yield code
    for constant in code.co_consts:
        if isinstance(constant, CodeType):
            yield from _codes(constant)
