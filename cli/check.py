"""`diag check`: what is to be known of a run, and the exit code that says so."""

from typing import Annotated, Any, Literal

import typer

from .app import CLEAN, FINDINGS, JsonOption, command
from .console import LineageOption, RunArgument, print_json, say, who_writes


@command
def check(
    run: RunArgument,
    fail_on: Annotated[
        Literal["info", "warning", "error"],
        typer.Option(help="Least severity that makes the exit code 1: info, warning or error.", metavar="SEVERITY"),
    ] = "warning",
    lineage: LineageOption = None,
    as_json: JsonOption = False,
) -> None:
    """Judge a run: exit code 0 clean, 1 findings, 2 unreadable.

    Update sizes, coefficients, ε, spikes, dead matrices: what is wrong, in a sentence with its numbers, and what to do.
    """
    from ..analysis import check as find
    from ..analysis import open_run
    from ..analysis.findings import SEVERITIES

    opened = open_run(run, lineage)
    now = who_writes(run, opened)
    findings = find(opened)
    failing = [f for f in findings if SEVERITIES.index(f.severity) >= SEVERITIES.index(fail_on)]
    if as_json:
        activity = None if now is None else now.as_dict()
        print_json({"findings": [f.as_dict() for f in findings], "failing": len(failing), "activity": activity})
    else:
        print_findings([f.as_dict() for f in findings])
        if now is not None:
            say("now", str(now))
    raise typer.Exit(FINDINGS if failing else CLEAN)


def print_findings(findings: list[dict[str, Any]]) -> None:
    """A line for each finding."""
    if not findings:
        say("findings", "none")
    for finding in findings:
        names = finding["matrices"]
        concerned = f" ({', '.join(names[:3])}{f' and {len(names) - 3} more' if len(names) > 3 else ''})" if names else ""
        say(f"{finding['severity']} {finding['rule']}", f"{finding['sentence']}{concerned} {finding['advice']}")
