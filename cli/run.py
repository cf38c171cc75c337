"""Commands that read a run: info, analyze, check."""

from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from .app import CLEAN, FINDINGS, JsonOption, command, print_json

if TYPE_CHECKING:
    import xarray as xr

ROWS = 1_000  # of a table on the terminal

RunArgument = Annotated[Path, typer.Argument(help="The run's folder, as passed to attach.", metavar="RUN.zarr", show_default=False)]
LineageOption = Annotated[
    int | None,
    typer.Option(
        help="Of a run that was restarted from an earlier checkpoint, one that was left, as `diag info` numbers them; by default the newest.",
        metavar="N",
        show_default=False,
    ),
]


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
    for entry in _first("lineages", described["lineages"]):
        say(f"lineage {entry['lineage']}", _of_lineage(entry, described["lineage"]))
    for optimizer in _first("optimizers", described["optimizers"]):
        around = "".join(f"{wrapper} around " for wrapper in optimizer.get("wrapped_by", ()))
        read_by = ", ".join(dict.fromkeys(optimizer.get("read_by", ())))
        say(
            optimizer["label"],
            f"{around}{optimizer['class']}, read by {read_by or 'table'}; geometry describes the {optimizer['geometry_describes']}",
        )
    for group, records in _first("groups", list(described["groups"].items())):
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
    for decision in _first("decisions", described["decisions"]):
        steps = ", ".join(f"{operator} {k}" for operator, k in (decision["steps"] or {}).items())
        say(
            f"step {decision['step']}",
            f"schedule of {decision['optimizer']}, {decision['kind']}{steps and f': {steps}'} ({decision['why']})",
        )
    for name, value in _first("scalars", list(described["last_scalars"].items())):
        say(f"last {name}", f"{value:.6g}")
    for event in _first("events", described["alignment_events"]):
        say(
            "update size",
            f"step {event['step']}, {event['optimizer']} group {event['group']}: {event['event']} at {event['alignment']:.3g} times the target, "
            f"learning rate times {event['factor']:.3g}",
        )
    if described["overhead"] is not None:
        say("recording", what_recording_took(described))


def _first(what: str, entries: list[Any]) -> Iterator[Any]:
    """The first entries, and a line that counts them where there are more."""
    yield from entries[:ROWS]
    if len(entries) > ROWS:
        say(what, f"{ROWS} of {len(entries)}; --json has all")


def _of_lineage(entry: dict[str, Any], shown: int) -> str:
    extent = f"{entry['records']} record{'' if entry['records'] == 1 else 's'} of its own, to step {entry['last_step']}"
    left = "the newest" if entry["after"] is None else f"left after step {entry['after']}"
    return f"{left}, {extent}{'; shown here' if entry['lineage'] == shown else ''}"


@command
def analyze(
    run: RunArgument,
    output: Annotated[
        Path | None, typer.Option("-o", "--output", help="Folder for tables and figures; by default RUN-analysis.", show_default=False)
    ] = None,
    study: Annotated[list[str] | None, typer.Option(help="Only this study; may be given several times.", show_default=False)] = None,
    lineage: LineageOption = None,
    as_json: JsonOption = False,
) -> None:
    """Write tables and figures of every study and say what they mean."""
    from ..analysis import open_run

    suffix = "-analysis" if lineage is None else f"-lineage-{lineage}-analysis"
    result = analyse_into(open_run(run, lineage), output or sibling(run, suffix), study, path=run)
    if as_json:
        print_json(result)
        return
    print_analysis(result)


@command
def check(
    run: RunArgument,
    fail_on: Annotated[Literal["info", "warning", "error"], typer.Option(help="Least severity that makes the exit code 1.")] = "warning",
    lineage: LineageOption = None,
    as_json: JsonOption = False,
) -> None:
    """Check update sizes and hazards: exit code 0 clean, 1 findings, 2 unreadable."""
    from ..analysis import check as find
    from ..analysis import open_run
    from ..analysis.findings import SEVERITIES

    findings = find(open_run(run, lineage))
    failing = [f for f in findings if SEVERITIES.index(f.severity) >= SEVERITIES.index(fail_on)]
    if as_json:
        print_json({"findings": [f.as_dict() for f in findings], "failing": len(failing)})
    else:
        _print_findings([f.as_dict() for f in findings])
    raise typer.Exit(FINDINGS if failing else CLEAN)


def analyse_into(run: "xr.DataTree", folder: Path, only: list[str] | None = None, *, path: Path | None = None) -> dict[str, Any]:
    """Run studies with progress on standard error; the report's content. All studies of a large run at `path` are made by two processes."""
    from rich.progress import track

    from ..analysis import STUDIES
    from ..analysis.evenly_sampled import evenly_sampled
    from ..analysis.report_folder import analyse_study, finish_report
    from ..analysis.two_processes import FINDINGS, analysed, pays

    if unknown := set(only or ()) - set(STUDIES):
        raise ValueError(f"--study: {', '.join(sorted(unknown))} is none of {', '.join(STUDIES)}")
    terminal = console(stderr=True)
    names = only or STUDIES
    if only is None and path is not None and pays(run):
        results = analysed(run, path, folder, names)
    else:
        studied = evenly_sampled(run)
        results = ((name, analyse_study(studied, name, folder, required=only is not None)) for name in names)
    said = dict(track(results, "analysing", len(names), console=terminal, transient=True, disable=not terminal.is_terminal))
    found = said.pop(FINDINGS, None)
    return finish_report(run, folder, {name: said[name] for name in names}, found)


def print_analysis(result: dict[str, Any]) -> None:
    """Every study's sentence, the findings, and where the files are."""
    for name, said in result["studies"].items():
        say(name, said["summary"])
    _print_findings(result["findings"])
    if result.get("records_studied"):
        say("studied", f"{result['records_studied']}, evenly spread; findings are of all records")
    few = sum(len(said.get("tables_of", ())) for said in result["studies"].values())
    spread = f"; {few} tables hold evenly spread records, which summary.json counts" if few else ""
    say("figures and tables", result["folder"] + spread)


def sibling(run: Path, suffix: str) -> Path:
    """A path beside the run: run.zarr → run-analysis."""
    # From inside the run its path is ".", which has no name.
    run = run.resolve() if run.name in ("", "..") else run
    return run.with_name(run.name.removesuffix(".zarr") + suffix)


def say(topic: object, text: str) -> None:
    """One line: a topic in bold, and a sentence. Names and texts of a run are printed as they are, never as markup."""
    from rich.text import Text

    console().print(Text.assemble((_shown(topic), "bold"), ": ", _shown(text)))


def _shown(text: object) -> str:
    from ..diagnostics.inert import inert, shortened

    return shortened(inert(text), 1_000)


def console(stderr: bool = False) -> Any:
    """A terminal that colours nothing by itself and leaves line breaks to the reader."""
    from rich.console import Console

    return Console(stderr=stderr, highlight=False, soft_wrap=True)


def _print_findings(findings: list[dict[str, Any]]) -> None:
    if not findings:
        say("findings", "none")
    for finding in findings:
        names = finding["matrices"]
        concerned = f" ({', '.join(names[:3])}{f' and {len(names) - 3} more' if len(names) > 3 else ''})" if names else ""
        say(f"{finding['severity']} {finding['rule']}", f"{finding['sentence']}{concerned} {finding['advice']}")


def print_table(header: tuple[str, ...], rows: list[tuple[Any, ...]]) -> None:
    from rich.table import Table
    from rich.text import Text

    table = Table(box=None, header_style="bold")
    for name in header:
        table.add_column(name, overflow="fold")
    for row in rows[:ROWS]:
        table.add_row(*(Text(_shown(cell)) for cell in row))
    # What is too wide goes on below, where soft wrapping would cut it.
    console().print(table, soft_wrap=False)
    if len(rows) > ROWS:
        say("rows", f"{ROWS} of {len(rows)}; --json has all")
