"""Joining the other ranks at `attach`: the roll call, what the run is to hold, and rank 0's word that it has begun."""

import logging
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, TypeVar, cast

from ...diagnostics.options import Options
from ..observing.matrix import Matrix
from ..observing.placement import is_cut, placements_in_words
from .catalogue import held, together
from .ranks import Ranks
from .roll_call import RollCall, call_roll, processes
from .words import packed, unpacked

T = TypeVar("T")

log = logging.getLogger("optiscope")

# Rank 0 opens the run meanwhile, which takes longer the more it holds.
_BEGIN_SECONDS = 600.0


# Options by which ranks that do not agree would wait for each other in vain, or measure what is not asked of them.
_THE_SAME = ("every", "measure", "heads", "background", "ranks")


class Unable(RuntimeError):
    """The ranks cannot record together, for a reason that is no fault of what was passed."""


@dataclass(frozen=True)
class Joined:
    """The ranks that have answered the roll call, all of them.

    Attributes:
        matrices: of all ranks, without what is made of them.
    """

    call: RollCall
    own: list[Matrix]
    matrices: list[Matrix]
    share: bool
    timeout: float

    def describe(self) -> dict[str, Any]:
        """For the run: how many ranks there are, and how this one's pieces lie."""
        placed = sorted({", ".join(placements_in_words(m.parameter)) for m in self.own if is_cut(m.parameter)})
        return {"world_size": self.call.size, "shared": self.share, "placements": placed}

    @property
    def writes(self) -> bool:
        """Whether this rank writes the run."""
        return self.call.rank == 0

    def say_begun(self, first_step: int) -> None:
        """At rank 0: the run is open, and so many steps have been taken."""
        self.call.say("begun", packed((first_step, "")))

    def say_refused(self, why: str) -> None:
        """At rank 0: it is not, and why."""
        self.call.say("begun", packed((0, why)))

    def hear_begun(self) -> int:
        """Elsewhere: the steps that have been taken.

        Raises:
            ValueError: rank 0 has refused what it was given.
            Unable: it says nothing.
        """
        told = self.call.hear("begun", _BEGIN_SECONDS)
        if told is None:
            raise Unable("rank 0 has not opened the run")
        first_step, why = unpacked(told)
        if why:
            raise ValueError(f"{why} (rank 0)")
        return int(first_step)

    def meet(self, matrices: Sequence[Matrix], labels: Sequence[str]) -> Ranks:
        """Connect to the others. `matrices` are those of all ranks, with what is made of them; `labels` those of this rank's optimizers.

        Raises:
            ValueError: ranks make different things of them.
            Unable: one is gone since the roll call.
        """
        here = [m for m in self.own if not m.members]
        try:
            return Ranks(self.call, matrices, here, labels, share=self.share, timeout=self.timeout)
        except RuntimeError as error:
            raise Unable(f"the ranks could not connect to each other: {str(error).splitlines()[0][:200]}") from error


def join(own: list[Matrix], options: Options, store: str) -> Joined | None:
    """Hear which ranks record, where there are several, or parameters in pieces; None where this process records by itself.

    Args:
        own: the matrices of this process.
        options: which are to be the same on all ranks, as far as they decide when and what is measured.
        store: as the user has named it, which is to be the same on all ranks.

    Raises:
        ValueError: ranks name or ask for what does not fit together.
        Unable: not all are here, and this is not rank 0, or holds pieces.
    """
    pieces = [m.name for m in own if is_cut(m.parameter)]
    if options.ranks == "alone" or (not pieces and processes()[1] == 1):
        if pieces:
            raise ValueError(
                f"ranks: {pieces[0]} lies in pieces on several ranks, which 'alone' does not put together; attach on every rank without it"
            )
        return None
    said = {name: getattr(options, name) for name in _THE_SAME} | {"store": store}
    call = call_roll(packed((held(own), said)), options.rank_timeout)
    if call.missing:
        _without(call, pieces, options.rank_timeout)
        return None
    answers = {rank: unpacked(answer) for rank, answer in call.answers.items()}
    for rank, (_, other) in answers.items():
        if differing := [key for key, value in answers[0][1].items() if other[key] != value]:
            raise ValueError(
                f"{differing[0]}: expected the same on every rank, got {answers[0][1][differing[0]]!r} on rank 0 and {other[differing[0]]!r} on rank {rank}"
            )
    matrices = together(own, {rank: matrices for rank, (matrices, _) in answers.items()})
    return Joined(call, own, matrices, options.ranks == "share", options.rank_timeout)


def as_rank_0_says(own: T, timeout: float) -> T:
    """What rank 0 gives here; what this rank gives, where there is one process, or rank 0 says nothing in time."""
    if processes()[1] == 1:
        return own
    told = call_roll(packed(own), timeout).answers.get(0)
    return own if told is None else cast(T, unpacked(told))


def _without(call: RollCall, pieces: Sequence[str], timeout: float) -> None:
    """What becomes of this rank where others are missing: the first records by itself what is whole there. Raises Unable where that is nothing."""
    missing = f"rank{'s' if len(call.missing) > 1 else ''} {', '.join(map(str, call.missing))} did not attach within {timeout:g} s"
    if pieces:
        raise Unable(f"{missing}, and {pieces[0]} lies in pieces on several ranks; call attach on every rank")
    if call.rank:
        raise Unable(
            f"{missing}, and this rank does not record by itself; call attach on every rank, or on rank 0 alone with ranks='alone'"
        )
    log.warning(
        "optiscope: %s: rank 0 records by itself what is whole on it. Call attach on every rank, or pass ranks='alone' so that nobody is waited for.",
        missing,
    )
