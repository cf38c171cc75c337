"""`diag analyze`: tables and figures of every study, and what they mean."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from .app import JsonOption, command
from .check import print_findings
from .console import LineageOption, RunArgument, console, print_json, say, sibling

if TYPE_CHECKING:
    import xarray as xr


@command
def analyze(
    run: RunArgument,
    output: Annotated[
        Path | None, typer.Option("-o", "--output", help="Folder for tables and figures; by default RUN-analysis.", show_default=False)
    ] = None,
    study: Annotated[
        list[str] | None,
        typer.Option(help="Only this study, as docs/studies.md names it. May be repeated.", metavar="NAME", show_default=False),
    ] = None,
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


def analyse_into(run: "xr.DataTree", folder: Path, only: list[str] | None = None, *, path: Path | None = None) -> dict[str, Any]:
    """Run studies with progress on standard error; the report's content. All studies of a large run at `path` are made by two processes."""
    from rich.progress import track

    from ..analysis import STUDIES
    from ..analysis.evenly_sampled import evenly_sampled
    from ..analysis.report.folder import analyse_study, finish_report
    from ..analysis.report.two_processes import FINDINGS, analysed, pays

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
    print_findings(result["findings"])
    if result.get("records_studied"):
        say("studied", f"{result['records_studied']}, evenly spread; findings are of all records")
    few = sum(len(said.get("tables_of", ())) for said in result["studies"].values())
    spread = f"; {few} tables hold evenly spread records, which summary.json counts" if few else ""
    say("figures and tables", result["folder"] + spread)
