"""A run whose training was restarted from a checkpoint goes back too: what it holds behind that step becomes a lineage of its own."""

from typing import Any

from .format import LINEAGES
from .lineages import leave
from .writer import Writer

# Lists among a run's attributes that tell of steps, and under what; a list that indices point into, as `ns_schedules`, stays as it is.
_TOLD_OF = {"decisions": "step", "alignment_events": "step"}
# What is the lock's, the commit's or the newest lineage's, and not the recording's.
_OF_THE_COMMIT = ("writer", "checksum", "chunks", LINEAGES)


def fork(writer: Writer, after: int) -> int:
    """Leave the records behind step `after`, and what the run's attributes tell of later steps, by one commit; nothing is deleted.

    A writer that is killed leaves the run as it was before or as it is behind it. Readers that have the run open still see what they saw, until new
    records take the place of those that were left.

    Args:
        writer: of a run that holds records behind that step.
        after: the last step that both lineages have in common; records of it stay.

    Returns:
        The number of the lineage that was left.

    Raises:
        TakenOver: as in `Writer.flush`.
        OSError: it could not be written; nothing is committed then, and the writer is of no use any more.
    """
    writer.flush()
    left = writer.attributes[""].get(LINEAGES, [])
    attributes = {**writer.attributes, "": {key: value for key, value in writer.attributes[""].items() if key not in _OF_THE_COMMIT}}
    entry = leave(writer._files, len(left), writer._groups, attributes, after, writer._read)
    writer.attributes[""][LINEAGES] = [*left, entry]
    _go_back(writer.attributes[""], after)
    for group in writer._groups.values():
        group.cut(sum(step <= after for step in group.steps))
    writer.flush()
    return entry["lineage"]


def _go_back(attributes: dict[str, Any], after: int) -> None:
    """Take out what is told of later steps: a schedule that was decided on there is not in force."""
    for name, key in _TOLD_OF.items():
        if name in attributes:
            attributes[name] = [entry for entry in attributes[name] if entry[key] <= after]
    if "continued" in attributes:
        # One that began there has recorded nothing that stays.
        attributes["continued"] = [entry for entry in attributes["continued"] if entry["first_step"] < after]
