"""Where each optimizer keeps what: the adapter table, and what stands behind it for classes it does not hold."""

from .adapter import (
    Adapter,
    Averages,
    Group,
    Orthogonalisation,
    Reader,
    Reading,
    SecondMoment,
    State,
    entry,
    group_setting,
    number,
    parameter_state,
    second_moment,
    state_of,
)
from .table import UNKNOWN, adapter_for, class_name, register_adapter, row_of

__all__ = [
    "UNKNOWN",
    "Adapter",
    "Averages",
    "Group",
    "Orthogonalisation",
    "Reader",
    "Reading",
    "SecondMoment",
    "State",
    "adapter_for",
    "class_name",
    "entry",
    "group_setting",
    "number",
    "parameter_state",
    "register_adapter",
    "row_of",
    "second_moment",
    "state_of",
]
