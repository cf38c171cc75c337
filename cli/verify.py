"""`diag verify`: whether a run is whole, and what can be saved of one that is not."""

from typing import Annotated, Any

import typer

from .app import CLEAN, FINDINGS, JsonOption, command
from .console import RunArgument, print_json, say

_NAMED = 20


@command
def verify(
    run: RunArgument,
    repair: Annotated[
        bool, typer.Option("--repair", help="Keep every record that is whole, and move the rest into RUN.zarr/.damaged.")
    ] = False,
    compact: Annotated[
        bool, typer.Option("--compact", help="Lay a long run out for reading, where the end of its training was cut off before that.")
    ] = False,
    as_json: JsonOption = False,
) -> None:
    """Check every file of a run against its checksum.

    Exit code 0 whole, 1 damaged, 2 unreadable.
    """
    from ..diagnostics.store.compacting import compact as compacted
    from ..diagnostics.store.repairing import repair as repaired
    from ..diagnostics.store.verifying import verify as verified

    found = verified(run)
    done: dict[str, Any] = repaired(run) if repair and found.damage else {"aside": None, "done": []}
    after = verified(run) if done["aside"] else found
    arrays = compacted(run) if compact and not after.damage else 0
    if as_json:
        print_json({**found.as_dict(), "repair": done, "compacted": arrays, "whole_now": not after.damage})
    else:
        _print(run, found)
        for sentence in done["done"]:
            say("repaired", sentence)
        if done["aside"]:
            say("moved aside", done["aside"])
            say("now", "whole" if not after.damage else f"{len(after.damage)} damaged")
        if compact:
            say("compacted", _compacted(arrays, bool(after.damage)))
    raise typer.Exit(FINDINGS if after.damage else CLEAN)


def _compacted(arrays: int, damaged: bool) -> str:
    if damaged:
        return "nothing, for what is damaged is repaired first: --repair"
    return f"{arrays} array{'' if arrays == 1 else 's'}" if arrays else "nothing, for no array of more than 1,024 records is left to be"


def _print(run: Any, found: Any) -> None:
    for one in found.damage[:_NAMED]:
        records = f"; records of steps {one.steps[0]} to {one.steps[1]}" if one.steps else ""
        say(one.kind, f"{one.file}{records}; {one.why}")
    if (more := len(found.damage) - _NAMED) > 0:
        say("and", f"{more} more, which --json names")
    for kind, count in found.harmless.items():
        say("harmless", f"{count} {kind}{'' if count == 1 else 's'}, which belong to no commit")
    without = "" if found.checksums else "; recorded without checksums, so that a flipped bit is seen only where a chunk cannot be decoded"
    whole = "whole" if not found.damage else f"{len(found.damage)} damaged"
    say(str(run), f"{whole}; {found.arrays} arrays, {found.chunks} chunks checked{without}")
