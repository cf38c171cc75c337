"""What copies on several ranks tell when they are compared: where they have parted."""

from collections.abc import Mapping
from typing import Any

from ..observing.fingerprints import Fingerprints


def parted(step: int, told: Mapping[int, Fingerprints]) -> list[dict[str, Any]]:
    """One entry per parameter and what of it (weights, gradient, state) differs between ranks that hold the same part of it.

    Args:
        told: by rank.
    """
    first: dict[Any, tuple[int, int]] = {}
    differing: dict[tuple[str, str], set[int]] = {}
    for rank in sorted(told):
        for key, number in told[rank].items():
            before, known = first.setdefault(key, (rank, number))
            if known != number:
                differing.setdefault(key[:2], {before}).add(rank)
    return [{"step": step, "name": name, "what": what, "ranks": sorted(ranks)} for (name, what), ranks in differing.items()]
