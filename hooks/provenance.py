"""What made a run: software versions, optimizers and their settings, as JSON-safe attributes of the store."""

import platform
from collections.abc import Mapping
from datetime import UTC, datetime
from importlib.metadata import version
from typing import Any

from torch import Tensor
from torch.optim import Optimizer

from .adapters import UNKNOWN, adapter_for


def describe_software() -> dict[str, Any]:
    """Versions of everything that touched the numbers, and the time."""
    packages = ("optiscope", "torch", "numpy", "zarr")
    return {
        "created": datetime.now(UTC).isoformat(timespec="seconds"),
        "versions": {"python": platform.python_version(), **{name: version(name) for name in packages}},
    }


def describe_optimizers(optimizers: Mapping[str, Optimizer]) -> list[dict[str, Any]]:
    """Per optimizer: label, class, whether it is known, what `geometry` describes for it, and its groups' settings."""
    return [
        {
            "label": label,
            "class": f"{type(optimizer).__module__}.{type(optimizer).__qualname__}",
            "known": adapter_for(optimizer) is not UNKNOWN,
            "spectrum_of": adapter_for(optimizer).spectrum_of,
            "groups": [{key: _plain(value) for key, value in group.items() if key != "params"} for group in optimizer.param_groups],
        }
        for label, optimizer in optimizers.items()
    ]


def _plain(value: Any) -> Any:
    if isinstance(value, Tensor) and value.numel() == 1:
        return value.item()
    if isinstance(value, (list, tuple)):
        return [_plain(item) for item in value]
    # Infinity and NaN are no JSON; a reader is better served by their names than by a file it cannot parse.
    if isinstance(value, float) and not abs(value) < float("inf"):
        return str(value)
    return value if isinstance(value, (bool, int, float, str, type(None))) else repr(value)
