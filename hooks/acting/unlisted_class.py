"""What a live schedule asks of an optimizer whose class is in no table: that watched steps show an iteration, and a field that steers it."""

from ..adapters import class_name
from ..observing.watched import Watched
from .proving import fields_by_watching, orthogonalises


def shown_when_built(watched: Watched, *, apply: bool) -> bool:
    """Whether a step of a copy shows an iteration, and to `apply` a schedule a field that steers it; nothing has to have stepped.

    False where no copy could be stepped yet, or its step moved nothing: the recorder's own watching of the first recorded steps will tell
    (:func:`shown_by_now`).

    Raises:
        TypeError: the copy's step moved weights by no iteration, or none of the fields steers the iteration.
    """
    seen = [orthogonalises(watched.optimizer, group) for group in watched.optimizer.param_groups]
    if not any(seen):
        if None in seen:
            return False
        raise TypeError(
            f"optimizer: no Newton–Schulz iteration was seen in a step of a copy of {_name(watched)}, so nothing can be derived from its records; "
            "where it does orthogonalise, register an adapter for it, as docs/adapters.md shows"
        )
    if apply:
        _check_steered(watched)
    return True


def shown_by_now(watched: Watched, *, apply: bool) -> bool:
    """The same by the steps that the recorder has watched; False while it has watched none, or one that moved nothing.

    Raises:
        TypeError: as above, or no step of a copy could be watched.
    """
    if watched.watching is None:  # recorded no more
        return False
    groups = watched.optimizer.param_groups
    found = [watched.watching.of(group) for group in groups]
    if any(one.found for one in found):
        if apply:
            _check_steered(watched)
        return True
    if not all(one.settled for one in found if one.failed or one.without):
        return False
    if failed := next((one.failed[-1] for one in found if one.failed), None):
        raise TypeError(
            f"optimizer: no step of a copy of {_name(watched)} could be watched ({failed}), so it is not known what it orthogonalises"
        )
    if any(one.without for one in found):
        raise TypeError(f"optimizer: no Newton–Schulz iteration was seen in watched steps of {_name(watched)}")
    return False


def _check_steered(watched: Watched) -> None:
    if not any(fields_by_watching(watched.optimizer, group) for group in watched.optimizer.param_groups):
        raise TypeError(
            f"optimizer: none of the fields in the parameter groups of {_name(watched)} steers its Newton–Schulz iteration, as steps of copies "
            "show, so no schedule can be put into force; read steps and coefficients from the group, or pass apply=False"
        )


def _name(watched: Watched) -> str:
    return class_name(type(watched.optimizer))
