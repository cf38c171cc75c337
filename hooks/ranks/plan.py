"""Who measures which parameter, and which pieces go where: from what all ranks say they hold, the same on every rank."""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TypeAlias

import torch

from ...diagnostics.pieces import Box, cover, deal, rounds
from ..observing.piece_snapshot import Key

_ALIGNED = 16  # every piece begins at a multiple of so many bytes, so that it can be looked at as numbers of any format


@dataclass(frozen=True)
class Part:
    """A piece of one of a parameter's arrays.

    Attributes:
        shape: of the whole array.
    """

    key: Key
    dtype: torch.dtype
    shape: tuple[int, ...]
    box: Box

    @property
    def bytes(self) -> int:
        """Its length on the way."""
        return -(-self.box.size * self.dtype.itemsize // _ALIGNED) * _ALIGNED


@dataclass(frozen=True)
class Share:
    """What one rank holds of one parameter: the whole (then no parts are listed), or pieces.

    Attributes:
        has_state: whether its optimizer keeps state of it.
    """

    is_whole: bool
    has_state: bool
    parts: tuple[Part, ...] = ()


Layout: TypeAlias = dict[str, Share]  # what one rank holds, by the parameter's name


class Plan:
    """Of all ranks' layouts.

    Attributes:
        owner: the rank that measures a parameter, by its name; a parameter that nobody can is not among them.
        rounds: the parameters in pieces, by name, in groups that come together at once.
    """

    def __init__(self, layouts: Sequence[Layout], units: Mapping[tuple[str, ...], int], *, share: bool, bound: int) -> None:
        """`units` are parameters that are measured together, with what that costs. Whole ones are measured where their state is, copies by the first
        rank that has them or, with `share`, dealt out; what is in pieces is always dealt out. Nobody handles more than `bound` bytes in a round,
        but for a single unit.
        """
        self._layouts = layouts
        # Of several ranks that hold the same part, as copies of a shard, the first sends it.
        first: dict[tuple[str, Key, Box], int] = {}
        for rank, layout in enumerate(layouts):
            for name, share_of in layout.items():
                for part in share_of.parts:
                    if part.box.size:
                        first.setdefault((name, part.key, part.box), rank)
        self._first = first
        self._copied = {
            name for rank, layout in enumerate(layouts) for name, share_of in layout.items()
            if (share_of.is_whole and len(self._ranks(name)) > 1) or any(first.get((name, part.key, part.box), rank) != rank for part in share_of.parts)
        }  # fmt: skip
        present = {held: value for names, value in units.items() if (held := tuple(name for name in names if self._ranks(name)))}
        dealt = list(self._parted(present))
        holders = {i: self._holders(names) for i, (names, _) in enumerate(dealt)}
        if not share:
            holders = {i: ranks[:1] if all(map(self._is_whole, dealt[i][0])) else ranks for i, ranks in holders.items()}
        given = deal({i: value for i, (_, value) in enumerate(dealt)}, holders)
        self.owner = {name: rank for i, rank in given.items() for name in dealt[i][0]}
        cut = [pieces for i in sorted(given) if (pieces := [name for name in dealt[i][0] if not self._is_whole(name)])]
        moved = [[sum(self._moved(rank, name) for name in names) for rank in range(len(layouts))] for names in cut]
        self.rounds = [[name for i in group for name in cut[i]] for group in rounds(moved, bound)]

    def has_copies(self, name: str) -> bool:
        """Whether several ranks hold the same of a parameter: the whole, or a piece."""
        return name in self._copied

    def boxes(self, name: str) -> list[Box]:
        """The pieces that a parameter lies in."""
        return [box for of, key, box in self._first if of == name and key == ("after",)]

    def sent(self, rank: int, name: str) -> list[Part]:
        """The pieces of a parameter that a rank sends to its owner, in order."""
        share = self._layouts[rank].get(name)
        return [] if share is None else [part for part in share.parts if self._first.get((name, part.key, part.box)) == rank]

    def moved_bytes(self) -> int:
        """How much a record moves from rank to rank: pieces, without what is measured of them."""
        return sum(
            part.bytes
            for rank in range(len(self._layouts))
            for name, owner in self.owner.items()
            if owner != rank
            for part in self.sent(rank, name)
        )

    def sent_bytes(self, rank: int, names: Iterable[str], to: int) -> int:
        """How much a rank sends of these parameters to another."""
        return sum(part.bytes for name in names if self.owner[name] == to for part in self.sent(rank, name))

    def arrays(self, name: str) -> dict[Key, Part]:
        """The arrays of a parameter whose pieces make a whole, each with one of them."""
        found: dict[Key, list[Part]] = {}
        for rank in range(len(self._layouts)):
            for part in self.sent(rank, name):
                found.setdefault(part.key, []).append(part)
        return {
            key: parts[0]
            for key, parts in found.items()
            if len({(part.shape, part.dtype) for part in parts}) == 1 and cover((part.box for part in parts), parts[0].shape)
        }

    def _ranks(self, name: str) -> list[int]:
        return [rank for rank, layout in enumerate(self._layouts) if name in layout]

    def _is_whole(self, name: str) -> bool:
        return all(layout[name].is_whole for layout in self._layouts if name in layout)

    def _parted(self, units: Mapping[tuple[str, ...], int]) -> Iterator[tuple[tuple[str, ...], int]]:
        """The units; where no rank has all of one, its parameters one by one."""
        for names, value in units.items():
            if self._holders(names):
                yield names, value
            else:
                yield from (((name,), value // len(names)) for name in names)

    def _holders(self, names: Sequence[str]) -> list[int]:
        """Ranks that can measure these together: that have them, and the state of each of which anybody has some."""
        stateful = [name for name in names if any(self._layouts[rank][name].has_state for rank in self._ranks(name))]
        return [
            rank
            for rank, layout in enumerate(self._layouts)
            if all(name in layout for name in names) and all(layout[name].has_state for name in stateful)
        ]

    def _moved(self, rank: int, name: str) -> int:
        """Bytes that a rank handles of it: what it sends, and at its owner all."""
        own = sum(part.bytes for part in self.sent(rank, name))
        if self.owner[name] != rank:
            return own
        return own + sum(part.bytes for other in range(len(self._layouts)) for part in self.sent(other, name))
