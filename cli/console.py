"""What commands share: how a run is named, and how lines, tables and JSON are printed."""

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

if TYPE_CHECKING:
    import xarray as xr

    from ..diagnostics.store.activity import Activity

ROWS = 1_000  # of a table on the terminal

RunArgument = Annotated[Path, typer.Argument(help="The run's folder, as passed to attach.", metavar="RUN.zarr", show_default=False)]
LineageOption = Annotated[
    int | None,
    typer.Option(
        help="One of the lineages that `diag info` lists, of a run that went back to a checkpoint; by default the newest.",
        metavar="N",
        show_default=False,
    ),
]

WindowOption = Annotated[
    str | None,
    typer.Option(
        help="Steps to average over, both included; by default 1 % of the run after warm-up, at least 8 records.",
        metavar="FIRST:LAST",
        show_default=False,
    ),
]


def sibling(run: Path, suffix: str) -> Path:
    """A path beside the run: run.zarr → run-analysis."""
    # From inside the run its path is ".", which has no name.
    run = run.resolve() if run.name in ("", "..") else run
    return run.with_name(run.name.removesuffix(".zarr") + suffix)


def say(topic: object, text: str) -> None:
    """One line: a topic in bold, and a sentence. Names and texts of a run are printed as they are, never as markup."""
    from rich.text import Text

    console().print(Text.assemble((_shown(topic), "bold"), ": ", _shown(text)))


def first_of(what: str, entries: list[Any]) -> Iterator[Any]:
    """The first entries, and a line that counts them where there are more."""
    yield from entries[:ROWS]
    if len(entries) > ROWS:
        say(what, f"{ROWS} of {len(entries)}; --json has all")


def console(stderr: bool = False) -> Any:
    """A terminal that colours nothing by itself and leaves line breaks to the reader."""
    from rich.console import Console

    return Console(stderr=stderr, highlight=False, soft_wrap=True)


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


def _shown(text: object) -> str:
    from ..diagnostics.escape import escaped, shortened

    return shortened(escaped(text), 1_000)


def print_json(result: Any) -> None:
    """One JSON document on standard output."""
    from ..diagnostics.escape import json_text

    print(json_text(result))


def who_writes(name: object, run: "xr.DataTree") -> "Activity | None":
    """Who is writing to an opened run; None where nobody does.

    Raises:
        ValueError: somebody is who has not committed a record yet.
    """
    from ..analysis.describe import being_written
    from ..analysis.findings import has_records

    now = being_written(run)
    if now is not None and not has_records(run):
        raise ValueError(f"run: no record is committed yet; {name} is {replace(now, last_commit=None)}")
    return now


def parse_window(text: str | None) -> slice | None:
    """FIRST:LAST as a slice of steps, both included."""
    if text is None:
        return None
    first, colon, last = text.partition(":")
    if not colon or not all(part == "" or part.isdecimal() for part in (first, last)):
        raise ValueError(f"--window: expected FIRST:LAST in optimizer steps, for example 20:100, got {text!r}")
    return slice(int(first) if first else None, int(last) if last else None)
