"""One record that several ranks make: each measures what is its own, and the first writes what all have measured."""

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from ..observing.fingerprints import Fingerprints, of_pieces
from ..observing.matrix import Matrix
from ..ranks.by_shard import told as told_by_shard
from ..ranks.copies_compared import parted
from ..ranks.plan import Plan
from ..ranks.ranks import Ranks
from ..ranks.words import packed, unpacked
from .journal import Journal
from .record import Readings, Record

# In so many records it is looked whether pieces are orthogonalised one by one: an optimizer does not change that.
_LOOKS = 3
# So many entries of a kind a run says.
MAX_TOLD = 200


class Measured(NamedTuple):
    """What one rank has measured.

    Attributes:
        rows: by group, which matrices (their places among those of all ranks) and their values.
        changed: of the matrices that this rank holds, or pieces of them, whether something else than the optimizer changed them.
        ns_schedules: which the values of `ns_schedule` are indices into.
        errors: how many measurements have failed so far.
        fingerprints: of what other ranks may have copies of.
        by_shard: of parameters whose pieces are orthogonalised one by one.
    """

    rows: dict[str, tuple[list[int], dict[str, NDArray[Any]]]]
    changed: dict[int, int]
    ns_schedules: list[dict[str, Any]]
    errors: int
    fingerprints: Fingerprints
    by_shard: list[dict[str, Any]]


def make_together(ranks: Ranks, by_optimizer: Mapping[str, Readings], record: Record, journal: Journal) -> bool:
    """Measure what this rank is to, and at rank 0 fill in what the others have; whether the record is now whole, which it is at rank 0 alone.

    Raises:
        Apart: the ranks no longer record together.
    """
    readings = list(by_optimizer.values())
    pieces = {snapshot.matrices[0].parameter_name: snapshot for of in readings for snapshot in of.pieces}
    has_state = {name: known for of in readings for name, known in of.has_state.items()}
    plan = ranks.meet(record.step, pieces, has_state, {label: of.place for label, of in by_optimizer.items()})
    for of in readings:
        of.observations = [(m, made) for m, made in of.observations if plan.owner.get(m.parameter_name) == ranks.rank]
        of.measure(record, journal)
    fingerprints = {key: number for of in readings for key, number in of.fingerprints.items()}
    for name, snapshot_of_pieces in pieces.items():
        if plan.has_copies(name):
            fingerprints.update(of_pieces(name, snapshot_of_pieces))
    by_shard: list[dict[str, Any]] = []
    for arrays in ranks.wholes(record.step, plan, pieces):
        own = Readings([m for of in readings for m in of.matrices])
        for name, tensors in arrays.items():
            with journal.guard(record.step):
                snapshot = pieces[name].whole(tensors)
                own.observations += snapshot.observations()
                for error in snapshot.errors:
                    journal.failed(error, record.step)
                if ranks.made <= _LOOKS:
                    by_shard += told_by_shard(snapshot, plan.boxes(name), record.step)
        arrays.clear()
        own.measure(record, journal)
    for snapshot_of_pieces in pieces.values():
        snapshot_of_pieces.copies.give_back()
    own_part = _measured(ranks, plan, readings, record, journal)._replace(fingerprints=fingerprints, by_shard=by_shard)
    told: dict[int, Measured] = {rank: unpacked(data) for rank, data in enumerate(ranks.deliver(record.step, packed(own_part)))}
    others = {rank: measured for rank, measured in told.items() if rank}
    for rank, measured in others.items():
        _fill_in(measured, ranks.matrices, record)
        journal.failed_elsewhere(rank, measured.errors, record.step)
    for measured in others.values():
        _mark_changed(measured, ranks.matrices, record)
    if told:
        journal.entry.setdefault("ranks", {}).update(ranks.describe())
    _tell(journal, "by_shard", [entry for measured in told.values() for entry in measured.by_shard], ("name",))
    _tell(journal, "parted", parted(record.step, {rank: measured.fingerprints for rank, measured in told.items()}), ("name", "what"))
    return bool(told)


def _tell(journal: Journal, attribute: str, entries: Sequence[dict[str, Any]], by: tuple[str, ...]) -> None:
    """Add entries to a list of the run's, the first of each kind alone."""
    if entries:
        known = journal.attributes.setdefault(attribute, [])
        kinds = {tuple(one[key] for key in by) for one in known}
        known += [one for one in entries if tuple(one[key] for key in by) not in kinds][: MAX_TOLD - len(known)]


def _measured(ranks: Ranks, plan: Plan, readings: Sequence[Readings], record: Record, journal: Journal) -> Measured:
    own = {
        i: m for i, m in enumerate(ranks.matrices) if all(plan.owner.get(part.parameter_name) == ranks.rank for part in m.members or (m,))
    }
    rows: dict[str, tuple[list[int], dict[str, NDArray[Any]]]] = {}
    for group, values in record.rows.items():
        there = [i for i, m in own.items() if m in record.row_of[group]]
        at = [record.row_of[group][own[i]] for i in there]
        rows[group] = there, {name: array[at] for name, array in values.items()}
    place = {m: i for i, m in enumerate(ranks.matrices)}
    changed = {place[m]: int(known["changed_outside"]) for of in readings for m, known in of.known.items() if m in place}
    return Measured(rows, changed, record.ns_schedules, journal.errors, {}, [])


def _fill_in(measured: Measured, matrices: Sequence[Matrix], record: Record) -> None:
    """What another rank has measured."""
    schedules = np.array([record.schedule_index(entry) for entry in measured.ns_schedules] + [-1])
    for group, (places, values) in measured.rows.items():
        rows = [record.row_of[group][matrices[i]] for i in places]
        for name, array in values.items():
            record.rows[group][name][rows] = schedules[array] if name == "ns_schedule" else array


def _mark_changed(measured: Measured, matrices: Sequence[Matrix], record: Record) -> None:
    for i, value in measured.changed.items():
        # Of a matrix in pieces it has changed where one of them has.
        row = record.row_of["update"].get(matrices[i]) if "update" in record.row_of else None
        if row is not None:
            record.rows["update"]["changed_outside"][row] = max(record.rows["update"]["changed_outside"][row], value)
