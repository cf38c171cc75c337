"""A folder with every study's figure and tables, and a summary of what they say."""

import io
import math
import warnings
from collections.abc import Hashable
from pathlib import Path
from typing import Any

import numpy as np
import xarray as xr
from numpy.typing import NDArray

from ...diagnostics.escape import json_text
from ...diagnostics.evenly_spread import evenly_spread
from ...diagnostics.store.whole_file import write_whole
from ..evenly_sampled import TOLD, evenly_sampled
from ..figures import settle
from ..findings import check
from .answer import Answer, ask
from .csv_tables import as_csv

ROWS = 20_000  # of a table: a million take longer to write than all studies to make


def analyse_study(run: xr.DataTree, name: str, folder: Path, *, required: bool) -> dict[str, Any]:
    """Run one study, write its figure and tables into `folder`, and give its sentence.

    Tables that hold evenly spread records only (`write_answer`) are told under `tables_of`: "285 of 2000 step".
    A study that a run does not allow (no orthogonalised matrix, say) is skipped with the reason, unless `required`.
    """
    try:
        answer = ask(run, name)
    except ValueError as error:
        if required:
            raise
        return {"summary": f"skipped: {error}", "files": [], "skipped": True}
    said = {"summary": answer.summary, "files": write_answer(answer, name, folder), "skipped": False}
    few = {f"{name}.{dims}.csv": kept for dims, table in answer.tables().items() if (kept := _thinned_to(table))}
    return {**said, "tables_of": few} if few else said


def write_answer(answer: Answer, name: str, folder: Path) -> list[str]:
    """A study's figure and tables in `folder`; the files' names.

    A table that would have more than 20,000 rows is of evenly spread records, as many as fit; the study itself saw all that it says.
    """
    folder.mkdir(parents=True, exist_ok=True)
    picture, figure, drawn = folder / f"{name}.png", answer.plot(), io.BytesIO()
    settle(figure)
    with warnings.catch_warnings():
        # A name may be written in a script that the font lacks; it shows boxes.
        warnings.filterwarnings("ignore", message="Glyph .* missing from font")
        figure.savefig(drawn)
    write_whole(picture, drawn.getvalue())
    written = [picture.name]
    for dimensions, table in answer.tables().items():
        path = folder / f"{name}.{dimensions}.csv"
        write_whole(path, as_csv(_thinned(table).to_dataframe().reset_index(), "%.8g"))
        written.append(path.name)
    return written


def finish_report(
    run: xr.DataTree, folder: Path, studies: dict[str, dict[str, Any]], findings: list[dict[str, Any]] | None = None
) -> dict[str, Any]:
    """Add the findings, made now where they are not given, and write everything said as `summary.json`.

    Raises:
        ValueError: no study could be made of the run; the reason of the first.
    """
    if all(said["skipped"] for said in studies.values()):
        raise ValueError(next(iter(studies.values()))["summary"].removeprefix("skipped: "))
    found = findings if findings is not None else found_in(run)
    told = evenly_sampled(run).attrs.get(TOLD)
    result = {"folder": str(folder), "studies": studies, "findings": found, **({TOLD: told} if told else {})}
    write_whole(folder / "summary.json", json_text(result) + "\n")
    return result


def found_in(run: xr.DataTree) -> list[dict[str, Any]]:
    """The run's findings in plain values."""
    return [finding.as_dict() for finding in check(run)]


def _thinned(table: xr.Dataset) -> xr.Dataset:
    along, kept = _kept(table)
    return table.isel({along: kept}) if len(kept) < table.sizes[along] else table


def _thinned_to(table: xr.Dataset) -> str:
    """How many of what a table is of, where that is not all."""
    along, kept = _kept(table)
    return f"{len(kept)} of {table.sizes[along]} {along}" if len(kept) < table.sizes[along] else ""


def _kept(table: xr.Dataset) -> tuple[Hashable, NDArray[np.int64]]:
    """The first dimension, and which of its coordinates a table of at most `ROWS` rows has."""
    along = next(iter(table.data_vars.values())).dims[0]
    count, rows = table.sizes[along], math.prod(table.sizes.values())
    return along, evenly_spread(count, count if rows <= ROWS else max(1, count * ROWS // rows))
