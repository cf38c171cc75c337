"""`diag info`: what is in a run."""

from typing import Any

from .app import JsonOption, command
from .console import LineageOption, RunArgument, first_of, print_json, print_table, say


@command
def info(run: RunArgument, lineage: LineageOption = None, as_json: JsonOption = False) -> None:
    """Tell what is in a run."""
    from ..analysis import open_run
    from ..analysis.describe import describe, what_recording_took

    described = describe(open_run(run, lineage))
    if as_json:
        print_json(described)
        return
    say(run, f"begun {described['created']}")
    if described["activity"] is not None:
        say("now", described["activity"]["words"])
    for entry in first_of("lineages", described["lineages"]):
        say(f"lineage {entry['lineage']}", _of_lineage(entry, described["lineage"]))
    if described["ranks"] is not None:
        say("ranks", _of_ranks(described["ranks"]))
    for optimizer in first_of("optimizers", described["optimizers"]):
        around = "".join(f"{wrapper} around " for wrapper in optimizer.get("wrapped_by", ()))
        read_by = ", ".join(dict.fromkeys(optimizer.get("read_by", ())))
        say(
            optimizer["label"],
            f"{around}{optimizer['class']}, read by {read_by or 'table'}; geometry describes the {optimizer['geometry_describes']}",
        )
    for group, records in first_of("groups", list(described["groups"].items())):
        say(
            group,
            f"{records['records']} record{'' if records['records'] == 1 else 's'}"
            + (f", steps {records['first_step']} to {records['last_step']}" if records["records"] else ""),
        )
    if described["operators"]:
        print_table(
            ("operator", "matrices", "shapes", "layers"),
            [(o["operator"], o["matrices"], o["shapes"], o["layers"]) for o in described["operators"]],
        )
    for decision in first_of("decisions", described["decisions"]):
        steps = ", ".join(f"{operator} {k}" for operator, k in (decision["steps"] or {}).items())
        say(
            f"step {decision['step']}",
            f"schedule of {decision['optimizer']}, {decision['kind']}{steps and f': {steps}'} ({decision['why']})",
        )
    for name, value in first_of("scalars", list(described["last_scalars"].items())):
        say(f"last {name}", f"{value:.6g}")
    for event in first_of("events", described["alignment_events"]):
        say(
            "update size",
            f"step {event['step']}, {event['optimizer']} group {event['group']}: {event['event']} at {event['alignment']:.3g} times the target, "
            f"learning rate times {event['factor']:.3g}",
        )
    if described["overhead"] is not None:
        say("recording", what_recording_took(described))


def _of_ranks(ranks: dict[str, Any]) -> str:
    words = [f"{ranks['world_size']} process{'' if ranks['world_size'] == 1 else 'es'}"]
    if ranks["placements"]:
        words.append(f"in pieces ({'; '.join(ranks['placements'])})")
    if ranks.get("measured"):
        words.append(f"parameters measured by each: {', '.join(map(str, ranks['measured']))}")
        words.append(f"{ranks['bytes_moved'] / 1e6:.3g} MB of pieces moved a record")
    return ", ".join(words)


def _of_lineage(entry: dict[str, Any], shown: int) -> str:
    extent = f"{entry['records']} record{'' if entry['records'] == 1 else 's'} of its own, to step {entry['last_step']}"
    left = "the newest" if entry["after"] is None else f"left after step {entry['after']}"
    return f"{left}, {extent}{'; shown here' if entry['lineage'] == shown else ''}"
