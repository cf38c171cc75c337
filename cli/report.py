"""`diag report`: one page about a run, or about several beside each other."""

from pathlib import Path
from typing import Annotated

import typer

from .app import JsonOption, command
from .console import LineageOption, console, print_json, say, who_writes

RunArguments = Annotated[
    list[Path], typer.Argument(help="Folders of runs, as passed to attach; several give one comparing page.", metavar="RUN.zarr")
]


@command
def report(
    runs: RunArguments,
    output: Annotated[Path, typer.Option("-o", "--output", help="Where to write the page.")] = Path("report.html"),
    lineage: LineageOption = None,
    as_json: JsonOption = False,
) -> None:
    """Write one self-contained HTML page about a run or several.

    It holds the findings, every study with its picture, and a table of every matrix.
    """
    from rich.progress import track

    if output.is_dir():
        raise ValueError(f"--output: {output} is a folder; give a file's name, for example {output / 'report.html'}")
    if not output.parent.is_dir():
        raise ValueError(f"--output: the folder {output.parent} does not exist; make it, or write elsewhere")

    from ..analysis import open_run
    from ..analysis.report.page import write_report

    terminal = console(stderr=True)
    opened = {name: open_run(path, lineage) for name, path in _names(runs).items()}
    activities = {name: now for name, one in opened.items() if (now := who_writes(name, one)) is not None}
    written = write_report(
        opened, output, lambda studies: track(studies, "analysing", console=terminal, transient=True, disable=not terminal.is_terminal)
    )
    if as_json:
        print_json({**written, "activity": {name: now.as_dict() for name, now in activities.items()}})
        return
    found = ", ".join(f"{number} {severity}" for severity, number in written["findings"].items())
    say("report", f"{output}, {written['size'] / 1e6:.1f} MB; findings: {found}")
    for name, now in activities.items():
        say(name, str(now))


def _names(runs: list[Path]) -> dict[str, Path]:
    """Each run under its folder's name; under its path where two have the same."""
    resolved = [path.resolve() for path in runs]
    short = [path.name for path in resolved]
    names = [str(given) if short.count(name) > 1 else name for given, name in zip(runs, short, strict=True)]
    if len(set(names)) < len(names):
        raise ValueError(f"runs: expected different ones, got {', '.join(map(str, runs))}")
    return dict(zip(names, runs, strict=True))
