"""Where in the training a rank is: by what it has counted, never by a clock, so that no record is made of two steps of it.

That all are at their tenth step does not say that it is the same one: a rank that left a step out takes its tenth when the others take their eleventh.
As a rule it cannot, since it waits for the others in the training's own collectives; but those on an accelerator are waited for by nobody yet when the
optimizer steps, and in the background a rank may fill a record that the others have filled a step before. So ranks compare as well how many steps of
any optimizer they have begun, and how many collectives they have issued on the groups that they share.
"""

from collections.abc import Iterable, Mapping, Sequence
from contextlib import suppress
from typing import Any

from torch import Tensor

from ..observing.placement import is_cut
from .peers import digest

_GROUPS = 4  # of the training's, for all that a mesh of four dimensions has
ROOM = 2 * (1 + _GROUPS)  # whole numbers that tell of one place

Counters = Mapping[int, int]  # by what is counted, as a number


class Place:
    """One rank's.

    Attributes:
        begun: steps of its optimizers, those included that an exception has left.
    """

    def __init__(self, labels: Sequence[str], parameters: Iterable[Tensor]) -> None:
        """Of a rank with optimizers of these labels, and of the meshes that its parameters lie on."""
        self.begun = 0
        # Only ranks with the same optimizers take as many steps: stages of a pipeline may have others.
        self._steps = digest(repr(("steps", *labels)).encode())
        self._groups = {digest(name.encode()): group for name, group in sorted(_groups(parameters).items())[:_GROUPS]}

    def now(self) -> Counters:
        """What it has counted so far."""
        counted = {self._steps: self.begun}
        for key, group in self._groups.items():
            with suppress(RuntimeError):  # of a backend that does not count, or a group that the training has ended
                counted[key] = group._get_sequence_number_for_group()
        return counted


def told(places: Mapping[str, Counters], length: int) -> list[int]:
    """Places by a name each, as so many whole numbers."""
    pairs = [(digest(repr((name, key)).encode()), count) for name, counted in places.items() for key, count in counted.items()]
    numbers = [number for pair in pairs for number in pair][:length]
    return numbers + [0] * (length - len(numbers))


def differ(ranks: Iterable[Sequence[int]]) -> bool:
    """Whether any two of what ranks have told differ in what both have counted."""
    first: dict[int, int] = {}
    return any(first.setdefault(key, count) != count for one in ranks for key, count in zip(one[::2], one[1::2], strict=True))


def _groups(parameters: Iterable[Tensor]) -> dict[str, Any]:
    """Groups in which all ranks issue the same collectives, by name: those of the meshes that parameters lie on. (In the group of all ranks some may send to others.)"""
    found: dict[str, Any] = {}
    for parameter in parameters:
        mesh: Any = parameter.device_mesh if is_cut(parameter) else None  # type: ignore[attr-defined]
        if mesh is not None and mesh.get_coordinate() is not None:
            for group in (mesh.get_group(i) for i in range(mesh.ndim)):
                found[group.group_name] = group
    return found
