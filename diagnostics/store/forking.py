"""A run whose training was restarted from a checkpoint goes back too: what it holds after that step becomes a lineage of its own."""

from typing import Any

from .format import LINEAGES
from .writer import Writer

# Lists among a run's attributes that tell of steps, and under what; a list that indices point into, as `ns_schedules`, stays as it is.
_TOLD_OF = {"decisions": "step", "alignment_events": "step"}
# What is the lock's, the commit's or the newest lineage's, and not the recording's.
_OF_THE_COMMIT = ("writer", "checksum", "chunks", LINEAGES)


def fork(writer: Writer, after: int) -> int:
    """Leave the records after step `after`, and what the run's attributes tell of later steps, by one commit; nothing is deleted.

    A writer that is killed leaves the run as it was before or as it is afterwards. Readers that have the run open still see what they saw, until new
    records take the place of those that were left.

    Args:
        writer: of a run that holds records after that step.
        after: the last step that both lineages have in common; records of it stay.

    Returns:
        The number of the lineage that was left.

    Raises:
        RunError: a record that is to be left is damaged; nothing has changed then.
        TakenOver: as in `Writer.flush`.
        OSError: it could not be written; nothing is committed then, and the writer is of no use any more.
    """
    left = writer.attributes[""].get(LINEAGES, [])
    attributes = {**writer.attributes, "": {key: value for key, value in writer.attributes[""].items() if key not in _OF_THE_COMMIT}}
    entry = writer.leave(len(left), attributes, after)
    writer.attributes[""][LINEAGES] = [*left, entry]
    _go_back(writer.attributes[""], after)
    writer.cut(after)
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
