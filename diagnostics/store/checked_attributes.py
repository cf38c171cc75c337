"""What a run's and its groups' attributes may hold: all that readers iterate over is of the kind and the length that a recorder writes."""

from collections.abc import Mapping
from types import UnionType
from typing import Any, NoReturn

from .bounds import MAX_LOGGED, MAX_NODES
from .files import METADATA
from .format import LINEAGES, OF_LINEAGE
from .run_error import RunError

# What the run's own attributes are lists of, and what each entry must hold.
_LISTS: dict[str, dict[str, type | UnionType]] = {
    "optimizers": {"label": str, "class": str, "groups": list, "spectrum_of": str | list},
    "continued": {"first_step": int, "optimizers": list},
    "decisions": {"step": int, "optimizer": str, "kind": str, "why": str, "steps": dict | None},
    "alignment_events": {"step": int, "optimizer": str, "group": int, "event": str, "alignment": float | int, "factor": float | int},
    "parted": {"step": int, "name": str, "what": str, "ranks": list},
    "by_shard": {"step": int, "name": str, "optimizer": str, "whole": float | int, "pieces": float | int},
    LINEAGES: dict.fromkeys(OF_LINEAGE, int),
}


def check_attributes(attributes: Mapping[str, Any]) -> None:
    """Refuse attributes of a run that hold what no recorder writes.

    Raises:
        RunError: it is so; told without the run.
    """
    for name, needed in _LISTS.items():
        entries = attributes.get(name, [])
        whole = isinstance(entries, list) and len(entries) <= MAX_LOGGED and all(isinstance(entry, dict) for entry in entries)
        if not whole or not all(isinstance(entry.get(key), kind) for entry in entries for key, kind in needed.items()):
            _refuse(f"expected {name} to be a list of at most {MAX_LOGGED:,} that say {', '.join(needed)}, got something else")
    if len(left := attributes.get(LINEAGES, [])) > MAX_NODES:
        _refuse(f"expected at most {MAX_NODES:,} lineages, got {len(left):,}")
    for number, entry in enumerate(left):
        if entry["lineage"] != number or any(type(entry[name]) is not int or entry[name] < 0 for name in OF_LINEAGE):
            _refuse(f"expected lineage {number} in its place, and steps from 0 on, got {entry!r:.80}")
    for optimizer in [
        *attributes.get("optimizers", []),
        *(one for entry in attributes.get("continued", []) for one in entry["optimizers"]),
    ]:
        if not isinstance(optimizer, dict) or not all(isinstance(group, dict) for group in optimizer.get("groups", [])):
            _refuse(f"expected optimizers to say their groups, got {optimizer!r:.60}")
        for name in ("wrapped_by", "read_by", "spectrum_of"):
            texts = optimizer.get(name, [])
            if not isinstance(texts, (str, list)) or not all(isinstance(text, str) for text in texts):
                _refuse(f"expected {name} of an optimizer to be texts, got {texts!r:.60}")
        _check_watched(optimizer.get("watched", []))
    for optimizer in (one for entry in (attributes, *attributes.get("continued", [])) for one in entry.get("optimizers", [])):
        if type(count := optimizer.get("own_steps", 0)) is not int or count < 0:
            _refuse(f"expected own_steps of an optimizer to be a count, got {count!r:.60}")
    for entry in (attributes, *attributes.get("continued", [])):
        _check_ranks(entry.get("ranks", {"world_size": 1, "placements": []}))
    for name in ("first_step", "missed", "dropped", "errors"):
        if type(count := attributes.get(name, 0)) is not int or not 0 <= count < 2**63:
            _refuse(f"expected {name} to be a count, got {count!r:.60}")
    for name in ("versions", "about", "chunks"):
        if not isinstance(attributes.get(name, {}), dict):
            _refuse(f"expected {name} to be an object, got {attributes[name]!r:.60}")


def _check_ranks(ranks: Any) -> None:
    """How many processes recorded, how their pieces lie, and how much each measured."""
    whole = isinstance(ranks, dict) and type(ranks.get("world_size")) is int and type(ranks.get("bytes_moved", 0)) is int
    lists = {"placements": str, "measured": int}
    if not whole or not all(
        isinstance(values := ranks.get(name, []), list) and len(values) <= MAX_LOGGED and all(type(value) is kind for value in values)
        for name, kind in lists.items()
    ):
        _refuse(f"expected ranks to tell how many processes recorded, got {ranks!r:.60}")


def _check_watched(groups: Any) -> None:
    """What was found by watching a step: per parameter group nothing, why it could not be watched, the iterations, or what differs from a row of the table."""
    whole = isinstance(groups, list) and all(isinstance(group, dict) and isinstance(group.get("failed", ""), str) for group in groups)
    for texts in (group.get("differs_from_row", []) for group in groups) if whole else ():
        if not isinstance(texts, list) or not all(isinstance(text, str) for text in texts):
            _refuse(f"expected watched of an optimizer to tell in texts what differs from its row, got {texts!r:.60}")
    iterations = [group.get("iterations", []) for group in groups] if whole else [None]
    for of_group in iterations:
        if not isinstance(of_group, list) or not all(
            isinstance(one, dict) and type(one.get("parts")) is int and isinstance(one.get("part"), str) for one in of_group
        ):
            _refuse(f"expected watched of an optimizer to tell iterations, got {groups!r:.60}")


def check_schedules(path: str, schedules: Any) -> None:
    """Refuse Newton–Schulz schedules, among the attributes of the group at `path`, that are none: they are iterated over every spectrum.

    Raises:
        RunError: it is so; told without the run.
    """
    whole = isinstance(schedules, list) and len(schedules) <= MAX_LOGGED and all(isinstance(one, dict) for one in schedules)
    if not whole or not all(_triples(one.get("coefficients")) for one in schedules):
        raise RunError("expected ns_schedules to be a list of coefficients, each of at most 100 steps, got something else", file=path)


def _triples(steps: Any) -> bool:
    return (
        isinstance(steps, list)
        and len(steps) <= 100
        and all(isinstance(step, list) and len(step) == 3 and all(type(c) in (int, float) for c in step) for step in steps)
    )


def _refuse(reason: str) -> NoReturn:
    raise RunError(reason, file=METADATA)
