"""The adapter table: which row reads which optimizer class, matched by name so that no library is imported for it."""

import inspect
import logging
from collections.abc import Callable
from importlib import import_module
from typing import Any, TypeAlias

from .adapter import Adapter, Group

log = logging.getLogger("optiscope")

# An adapter, or a function that chooses one for a parameter group (a Muon that runs AdamW on some of its groups).
Row: TypeAlias = Adapter | Callable[[Group], Adapter]

# Modules of rows, by library or theme.
_ROW_MODULES = (
    "torch_optim",
    "adafactor",
    "pytorch_optimizer",
    "pytorch_optimizer_bases",
    "references_muon",
    "references_other",
    "repositories",
    "muons",
    "pytorch_optimizer_muons",
    "heavyball",
    "quantised",
    "packages",
)

UNKNOWN = Adapter(
    "gradient; this optimizer class is not known, its moments and the kind of its weight decay are not read",
    decoupled_decay=lambda reading: float("nan") if reading.group.get("weight_decay") else 0.0,
    read_by="nothing",
)

_registered: dict[str, Row] = {}
_broken: list[Row] = []  # functions that failed, so that each is reported once


def register_adapter(optimizer_class: type | str, row: Row) -> None:
    """Read optimizers of a class by an adapter of your own; it takes precedence over one that Optiscope has.

    Args:
        optimizer_class: the class, or its full name "module.Class".
        row: an `Adapter`, or a function that takes a parameter group and returns one.

    Raises:
        TypeError: `optimizer_class` or `row` is something else.

    Example:
        >>> from optiscope.hooks.adapters import Adapter, entry
        >>> register_adapter("mylab.optim.Nova", Adapter("momentum nu after the step", momentum=entry("nu")))
    """
    if not isinstance(optimizer_class, (type, str)):
        raise TypeError(f"optimizer_class: expected a class or its full name 'module.Class', got {optimizer_class!r}")
    if not isinstance(row, Adapter) and not callable(row):
        raise TypeError(f"row: expected an Adapter, or a function from a parameter group to one; got {type(row).__name__}")
    _registered[optimizer_class if isinstance(optimizer_class, str) else class_name(optimizer_class)] = row


def class_name(cls: type) -> str:
    """Full name of a class, as the table spells it."""
    return f"{cls.__module__}.{cls.__qualname__}"


def row_of(optimizer: object) -> Row | None:
    """The row of the optimizer's class, or of a base class whose `step` it inherits; None where there is none.

    A subclass with a `step` of its own may do anything with the state it inherits.
    """
    for cls in type(optimizer).__mro__:
        if (row := _registered.get(class_name(cls), table().get(class_name(cls)))) is not None:
            # torch wraps `step` per class, to run hooks; what is compared is the function within.
            return row if inspect.unwrap(_step(type(optimizer))) is inspect.unwrap(_step(cls)) else None
    return None


def adapter_for(optimizer: object, group: Group) -> Adapter | None:
    """The adapter for one parameter group of an optimizer, None where its class is not in the table."""
    row = row_of(optimizer)
    if row is None or isinstance(row, Adapter):
        return row
    try:
        adapter = row(group)
        if not isinstance(adapter, Adapter):
            raise TypeError(f"expected an Adapter, got {type(adapter).__name__}")
        return adapter
    except Exception as error:
        if row not in _broken:
            _broken.append(row)
            log.warning(
                "optiscope: the adapter registered for %s failed (%s: %s); the optimizer is read as an unknown one.",
                class_name(type(optimizer)), type(error).__name__, error,
            )  # fmt: skip
        return None


def _step(cls: Any) -> Any:
    return cls.step


def table() -> dict[str, Row]:
    """All rows, by the full names of their classes."""
    if not _rows:
        for module in _ROW_MODULES:
            _rows.update(import_module(f".{module}", __package__).ROWS)
    return _rows


_rows: dict[str, Row] = {}
