"""The ranks of one recording: when they record together, who measures what, and what becomes of it when one of them is gone."""

import logging
from collections.abc import Collection, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

from torch import Tensor

from ...diagnostics.pieces import cost
from ..observing.matrix import Matrix
from ..observing.piece_snapshot import Key, PieceSnapshot
from .exchange import layout_of, put_together
from .peers import Peers, digest
from .place import ROOM, Counters, Place, differ, told
from .plan import Layout, Plan
from .roll_call import RollCall
from .words import packed, unpacked

log = logging.getLogger("optiscope")

# A rank that measures much is waited for this long by those that have measured; one that has died is known at once.
MEASURING_SECONDS = 1800.0
# Nobody holds more bytes of other ranks' pieces at a time, if a single matrix does not have more.
STAGED_BYTES = 2**28

_BEGIN, _BUSY, _LATER = range(3)  # what a rank says to a record that is due


class Apart(RuntimeError):
    """The ranks no longer record together."""


class Agreement(NamedTuple):
    """What the ranks have agreed on.

    Attributes:
        begins: whether a record begins now, on all of them.
        due: the step at which they ask each other again.
    """

    begins: bool
    due: int


class Ranks:
    """One rank's place among those that record one run. Rank 0 writes it.

    Two groups of connections, as two threads may use them at a time: the training thread asks whether a record begins, and whoever measures makes it.

    Attributes:
        rank, size: of this one, and how many there are.
        matrices: of all ranks, in one order.
        place: where in the training this rank is.
        over: why they no longer record together; None while they do.
    """

    def __init__(
        self, call: RollCall, matrices: Sequence[Matrix], here: Collection[Matrix], labels: Sequence[str], *, share: bool, timeout: float
    ) -> None:
        """Waits for the others to do the same, up to `timeout` seconds.

        Args:
            here: the matrices that this rank holds, or pieces of them.
            labels: of this rank's optimizers.

        Raises:
            RuntimeError: they did not.
            ValueError: other matrices are made of theirs.
        """
        self.rank, self.size = call.rank, call.size
        self.matrices = list(matrices)
        self.over: str | None = None
        self._asking = Peers(_board(call, "asking"), call.rank, call.size, timeout)
        self._making = Peers(_board(call, "making"), call.rank, call.size, timeout)
        self._share = share
        self._units = units(self.matrices)
        self._here = {m.parameter_name: m for m in here if not m.members}
        self._asked = self._made = 0
        self._layouts: dict[int, tuple[int, Layout]] = {}  # by rank, with what tells them apart
        self._plan: Plan | None = None
        whole = [m for m in self.matrices if not m.members]
        self.place = Place(labels, [m.parameter for m in here])
        self._room = ROOM * len({m.optimizer for m in whole})
        # What others measure is told by a matrix's number in this list.
        number = digest(repr([(m.kind, m.name) for m in self.matrices]).encode())
        if len({one[0] for one in self._asking.share([number])}) > 1:
            self.leave()
            raise ValueError(
                "operators: ranks divide their matrices differently into heads and blocks; pass the same model and options on every rank"
            )

    # In the training thread.

    def ask(self, step: int, *, busy: bool, due: int, later: bool) -> Agreement:
        """Whether a record of `step` begins: where no rank is busy with the last one, and rank 0 does not put it off. The next time is rank 0's `due`.

        Raises:
            Apart: another rank is at another step, is gone, or has not answered.
        """
        self._asked += 1
        words = _BUSY if busy else _LATER if later and self.rank == 0 else _BEGIN
        try:
            said = self._asking.share([self._asked, step, words, due, *told({"": self.place.now()}, ROOM)])
        except RuntimeError as error:
            raise self._apart(f"at step {step} another rank was waited for, and {_in_words(error)}") from error
        if len({tuple(one[:2]) for one in said}) > 1:
            raise self._apart(f"ranks are at different steps: {', '.join(f'rank {i} at {one[1]}' for i, one in enumerate(said))}")
        if differ(one[4:] for one in said):
            raise self._apart(f"ranks come to their step {step} at different places of the training: one has left out a step")
        return Agreement(all(one[2] == _BEGIN for one in said), said[0][3])

    def is_elsewhere(self, matrix: Matrix) -> bool:
        """Whether another rank is known to measure a parameter that is whole here, so that nothing of it needs to be read."""
        return self._plan is not None and self._plan.owner.get(matrix.parameter_name, self.rank) != self.rank

    def has_copies(self, name: str) -> bool:
        """Whether several ranks hold the same of a parameter; where that is not known yet, they may."""
        return self._plan is None or self._plan.has_copies(name)

    # In whichever thread measures.

    @property
    def made(self) -> int:
        """How many records they have made, or begun to make."""
        return self._made

    def meet(self, step: int, pieces: Mapping[str, PieceSnapshot], has_state: Mapping[str, bool], places: Mapping[str, Counters]) -> Plan:
        """Begin to make a record together: every rank knows what all hold, and from that who measures what.

        Args:
            step: of the record.
            pieces: what is here of parameters in pieces, by name.
            has_state: whether the optimizer keeps state here of those that are whole, by name.
            places: where each optimizer's part was read, by its label.

        Raises:
            Apart: another rank makes the record of another step, or has read it elsewhere in the training, is gone, or has not answered.
        """
        self._made += 1
        own = packed(layout_of(pieces, has_state))
        number = digest(own)
        try:
            said = self._making.share([self._made, step, number, len(own), *told(places, self._room)])
            if len({tuple(one[:2]) for one in said}) > 1:
                raise self._apart(
                    f"ranks make the records of different steps: {', '.join(f'rank {i} of {one[1]}' for i, one in enumerate(said))}"
                )
            if differ(one[4:] for one in said):
                raise self._apart(f"ranks have read the record of step {step} at different places of the training: one has left out a step")
            if any(self._layouts.get(rank, (None,))[0] != one[2] for rank, one in enumerate(said)):
                layouts = self._making.share_bytes(own, [one[3] for one in said])
                self._layouts = {rank: (one[2], unpacked(layout)) for rank, (one, layout) in enumerate(zip(said, layouts, strict=True))}
                self._plan = None
        except RuntimeError as error:
            raise self._gone(step, error) from error
        if self._plan is None:
            layouts_of_all = [layout for _, (_, layout) in sorted(self._layouts.items())]
            self._plan = Plan(layouts_of_all, self._units, share=self._share, bound=STAGED_BYTES)
        return self._plan

    def wholes(self, step: int, plan: Plan, pieces: Mapping[str, PieceSnapshot]) -> Iterator[dict[str, dict[Key, Tensor]]]:
        """Round by round, the arrays of the parameters that this rank owns; measure those of a round before the next, so that memory holds one.

        Raises:
            Apart: another rank is gone, or has not answered.
        """
        for names in plan.rounds:
            try:
                yield put_together(plan, names, pieces, self._making, MEASURING_SECONDS)
            except RuntimeError as error:
                raise self._gone(step, error) from error

    def deliver(self, step: int, measured: bytes) -> list[bytes]:
        """Give rank 0 what was measured; there what every rank has, elsewhere nothing.

        Raises:
            Apart: another rank is gone, or has not answered.
        """
        try:
            lengths = [one[0] for one in self._making.share([len(measured)], MEASURING_SECONDS)]
            return self._making.collect(measured, lengths)
        except RuntimeError as error:
            raise self._gone(step, error) from error

    # Its end.

    def leave(self) -> None:
        """Wait for nobody, and let nobody wait for this rank."""
        self.over = self.over or "this rank has closed its recorder"
        self._asking.leave()
        self._making.leave()

    def fail(self, error: BaseException) -> None:
        """This rank cannot go on with the record under way, for a reason of its own: the others hear of it at once."""
        self._apart(f"making a record failed ({type(error).__name__}: {error})")
        self.leave()

    def describe(self) -> dict[str, Any]:
        """For the run: how many parameters each of them measures, and how many bytes of pieces a record moves."""
        if self._plan is None:
            return {}
        owned = [0] * self.size
        for rank in self._plan.owner.values():
            owned[rank] += 1
        return {"measured": owned, "bytes_moved": self._plan.moved_bytes()}

    def _gone(self, step: int, error: RuntimeError) -> "Apart":
        return (
            error
            if isinstance(error, Apart)
            else self._apart(f"in the record of step {step} another rank was waited for, and {_in_words(error)}")
        )

    def _apart(self, why: str) -> Apart:
        if self.over is None:
            self.over = why
            log.warning("optiscope: recording ends on rank %d: %s. Training goes on; what was recorded before is kept.", self.rank, why)
        return Apart(why)


def units(matrices: Sequence[Matrix]) -> dict[tuple[str, ...], int]:
    """Parameters that are measured together, since something is made of several of them, with what that takes (m·n·min(m, n) where a spectrum is measured)."""
    unit: dict[str, list[str]] = {}
    for m in matrices:
        merged = list(dict.fromkeys(name for part in m.members or (m,) for name in unit.get(part.parameter_name, [part.parameter_name])))
        unit.update({name: merged for name in merged})
    costs: dict[tuple[str, ...], int] = {}
    for m in matrices:
        key = tuple(unit[(m.members[0] if m.members else m).parameter_name])
        costs[key] = costs.get(key, 0) + (cost(m.rows, m.cols) if m.geometry else m.rows * m.cols)
    return costs


def _board(call: RollCall, name: str) -> Any:
    from torch._C._distributed_c10d import PrefixStore

    return PrefixStore(name, call.board)


def _in_words(error: BaseException) -> str:
    """What gloo says of a rank, without where in its source."""
    text = str(error)
    if "Timed out" in text:
        return "it did not answer in time"
    if "onnection" in text:
        return "its connection is closed"
    return (text.splitlines() or [type(error).__name__])[0][:200]
