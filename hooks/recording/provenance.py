"""What made a run: software versions, optimizers and their settings, as JSON-safe attributes of the store."""

import platform
from datetime import UTC, datetime
from functools import cache
from importlib.metadata import version
from typing import Any

from torch import Tensor

from ...diagnostics.escape import storable
from ..adapters import class_name
from ..observing.watched import Watched


def describe_software() -> dict[str, Any]:
    """Versions of everything that touched the numbers, and the time."""
    return {"created": datetime.now(UTC).isoformat(timespec="seconds"), "versions": dict(_versions())}


@cache
def _versions() -> dict[str, str]:
    return {"python": platform.python_version(), **{name: version(name) for name in ("optiscope", "torch", "numpy", "zarr")}}


def describe_optimizer(watched: Watched) -> dict[str, Any]:
    """Label and class of an optimizer, what wraps it, how each of its groups is read and what their settings are."""
    read_by, spectrum_of, seen = zip(*map(watched.reading_of, watched.optimizer.param_groups), strict=True)
    return {
        "label": watched.label,
        "class": class_name(type(watched.optimizer)),
        "wrapped_by": [class_name(type(layer)) for layer in watched.layers[:-1]],
        "read_by": list(read_by),
        "spectrum_of": list(spectrum_of),
        **({"watched": list(seen)} if any(seen) else {}),
        "groups": [
            {storable(str(key)): _plain(value) for key, value in group.items() if key != "params"}
            for group in watched.optimizer.param_groups
        ],
    }


def _plain(value: Any) -> Any:
    if isinstance(value, Tensor) and value.numel() == 1:
        return _plain(value.item())
    if isinstance(value, (list, tuple)):
        return [_plain(item) for item in value]
    # Infinity and NaN are no JSON; a reader is better served by their names than by a file it cannot parse.
    if isinstance(value, float) and not abs(value) < float("inf"):
        return str(value)
    return value if isinstance(value, (bool, int, float, type(None))) else storable(value if isinstance(value, str) else repr(value))
