"""What a run is, as rows of text: when and with what it was made, how its optimizers were read, what was recorded."""

from collections.abc import Iterator
from typing import Any

from ..describe import what_recording_took

Row = tuple[str, list[str]]


def identity(described: dict[str, Any]) -> list[Row]:
    """Headings with the lines under them, from what `describe` gives."""
    return list(_rows(described))


def _rows(described: dict[str, Any]) -> Iterator[Row]:
    if described.get("created"):
        yield "Begun", [str(described["created"]).replace("T", " ").replace("+00:00", " UTC")]
    for optimizer in described.get("optimizers", []):
        yield f"Optimizer {optimizer['label']}", list(_optimizer(optimizer))
    if groups := described.get("groups"):
        yield "Recorded", [f"{name.replace('_', ' ')}: {_extent(group)}" for name, group in groups.items()]
    if last := described.get("last_scalars"):
        yield "Last logged", [f"{name} {value:.6g}" for name, value in last.items()]
    if described.get("overhead") is not None:
        yield "Recording", [what_recording_took(described)]
    if versions := described.get("versions"):
        yield "Versions", [", ".join(f"{name} {version}" for name, version in versions.items())]
    for name, value in described.items():
        if name not in _SHOWN and value not in (None, [], {}, ""):
            yield name.replace("_", " ").capitalize(), list(_lines(value))


_SHOWN = {"created", "optimizers", "groups", "last_scalars", "overhead", "background", "lost", "versions", "operators"}


def _optimizer(optimizer: dict[str, Any]) -> Iterator[str]:
    around = "".join(f"{wrapper} around " for wrapper in optimizer.get("wrapped_by", ()))
    yield f"{around}{optimizer['class']}, read by {', '.join(dict.fromkeys(optimizer.get('read_by', ()))) or 'table'}"
    if optimizer.get("geometry_describes"):
        yield f"geometry describes the {optimizer['geometry_describes']}"
    settings = [_lines_of(group) for group in optimizer.get("groups", [])]
    for setting in dict.fromkeys(settings):
        times = settings.count(setting)
        yield f"{times} groups: {setting}" if times > 1 else setting


def _extent(group: dict[str, Any]) -> str:
    many = f"{group['records']} record{'' if group['records'] == 1 else 's'}"
    return f"{many}, steps {group['first_step']} to {group['last_step']}" if group["records"] else many


def _lines(value: Any) -> Iterator[str]:
    for entry in value if isinstance(value, list) else [value]:
        yield _lines_of(entry)


def _lines_of(value: Any) -> str:
    """A value of the run's attributes on one line.

    >>> _lines_of({"lr": 0.02, "betas": [0.9, 0.999], "fused": None})
    'lr 0.02, betas (0.9, 0.999)'
    """
    if isinstance(value, dict):
        return ", ".join(f"{name} {_lines_of(inner)}" for name, inner in value.items() if inner is not None)
    if isinstance(value, list):
        return f"({', '.join(_lines_of(inner) for inner in value)})"
    return f"{value:.6g}" if isinstance(value, float) else str(value)
