"""Matrices in pieces: which part of a whole a process holds, whether parts make a whole, and who is dealt what to measure."""

from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from math import prod


@dataclass(frozen=True)
class Box:
    """A part of an array: a range of indices along every dimension.

    Attributes:
        offset: where it begins.
        shape: how far it goes; a size of 0 is a part that holds nothing.
    """

    offset: tuple[int, ...]
    shape: tuple[int, ...]

    @property
    def size(self) -> int:
        """How many numbers it holds."""
        return prod(self.shape)

    @property
    def slices(self) -> tuple[slice, ...]:
        """The index that selects it from the whole."""
        return tuple(slice(start, start + length) for start, length in zip(self.offset, self.shape, strict=True))


def cover(boxes: Iterable[Box], shape: Sequence[int]) -> bool:
    """Whether boxes that do not overlap make up an array of `shape`: they lie within it and hold as many numbers.

    >>> cover([Box((0, 0), (2, 3)), Box((2, 0), (1, 3))], (3, 3)), cover([Box((0, 0), (2, 3))], (3, 3))
    (True, False)
    """
    held = list(boxes)
    within = all(
        start >= 0 and start + length <= size for box in held for start, length, size in zip(box.offset, box.shape, shape, strict=True)
    )
    return within and sum(box.size for box in held) == prod(shape)


def cut_like(shape: Sequence[int], whole: Sequence[int], part: Box) -> tuple[tuple[int, ...], Box] | None:
    """What array a plain tensor of `shape` is a part of, where it belongs to a parameter of the shape `whole` of which `part` is held here.

    Along every dimension it has the length of the part (and is cut as the parameter is), of the whole, or 1 (averaged away).

    Returns:
        The shape of that array and which part of it the tensor is; None where the lengths are others.

    >>> cut_like((2, 1), (4, 6), Box((2, 0), (2, 6)))
    ((4, 1), Box(offset=(2, 0), shape=(2, 1)))
    """
    if len(shape) != len(whole):
        return None
    sizes, offsets = [], []
    for length, size, start, held in zip(shape, whole, part.offset, part.shape, strict=True):
        if length == held:
            sizes.append(size)
            offsets.append(start)
        elif length in (1, size):
            sizes.append(length)
            offsets.append(0)
        else:
            return None
    return tuple(sizes), Box(tuple(offsets), tuple(shape))


def cost(rows: int, cols: int) -> int:
    """What measuring the spectrum of a matrix takes, up to a factor: m·n·min(m, n)."""
    return rows * cols * min(rows, cols)


def deal(costs: Mapping[int, int], holders: Mapping[int, Collection[int]]) -> dict[int, int]:
    """Give every unit of work to one of its holders, the costliest first, each to the one that has least so far.

    Everybody who knows the costs and the holders comes to the same answer.

    Args:
        costs: of every unit.
        holders: those that can do it; a unit without any is given to nobody.

    >>> deal({0: 5, 1: 3, 2: 3}, {0: (0, 1), 1: (0, 1), 2: (0, 1)})
    {0: 0, 1: 1, 2: 1}
    """
    load: dict[int, int] = {}
    given: dict[int, int] = {}
    for unit in sorted(costs, key=lambda unit: (-costs[unit], unit)):
        if holders[unit]:
            chosen = min(holders[unit], key=lambda holder: (load.get(holder, 0), holder))
            load[chosen] = load.get(chosen, 0) + costs[unit]
            given[unit] = chosen
    return given


def rounds(sizes: Sequence[Sequence[int]], bound: int) -> list[list[int]]:
    """Units of work in groups of consecutive ones, in which nobody handles more than `bound` bytes, or one unit alone.

    Args:
        sizes: of every unit, the bytes that each of those who handle it holds of it meanwhile.

    >>> rounds([[4, 0], [0, 4], [4, 4]], 6)
    [[0, 1], [2]]
    """
    groups: list[list[int]] = []
    held: list[int] = []
    for unit, own in enumerate(sizes):
        if groups and all(before + more <= bound for before, more in zip(held, own, strict=True)):
            groups[-1].append(unit)
            held = [before + more for before, more in zip(held, own, strict=True)]
        else:
            groups.append([unit])
            held = list(own)
    return groups
