"""The page: what a run's record says, in one HTML file that needs nothing else."""

import base64
import hashlib
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any
from urllib.parse import quote

import xarray as xr
from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup

from ...diagnostics.escape import escaped, shortened
from ...diagnostics.store.run_error import RunError
from ...diagnostics.store.whole_file import write_whole
from .. import STUDIES, THEMES, compare
from ..describe import describe
from ..evenly_sampled import TOLD, evenly_sampled
from ..findings import check
from .answer import Answer, ask
from .csv_tables import as_csv
from .curves import kappa_plot, loss_plot, script
from .identity import identity
from .matrices import matrices
from .pictures import svg_uri
from .verdict import counts, verdict

HERE = Path(__file__).parent
SHOWN, DOWNLOAD = 240, 3_000  # cells of a table that is shown whole, and of one that can be downloaded from the page
WORDS = {  # of the studies' names, as they are read
    "kappa": "κ", "vs": "against", "ns": "Newton–Schulz", "rms": "RMS", "rank1": "of rank 1", "lr": "learning-rate",
    "precond": "preconditioning", "hdiag": "Hessian-diagonal", "hessian": "Hessian", "soap": "SOAP", "sophia": "Sophia",
}  # fmt: skip

Progress = Callable[[Sequence[str]], Iterable[str]]


def write_report(runs: Mapping[str, xr.DataTree], path: Path, progress: Progress = lambda names: names) -> dict[str, Any]:
    """Write the page of one run, or of several beside each other, each under the name to show it by.

    The same runs under the same names give the same bytes. `progress` may wrap the iteration over the studies. Returns the path, the size in
    bytes, and the findings of all runs counted by severity.

    Raises:
        ValueError: a run has no records.
    """
    found = {name: [finding.as_dict() for finding in check(run)] for name, run in runs.items()}
    html = _page(runs, found, progress)
    write_whole(path, html)
    return {"report": str(path), "size": len(html.encode()), "findings": counts([f for one in found.values() for f in one])}


def _page(runs: Mapping[str, xr.DataTree], found: Mapping[str, list[dict[str, Any]]], progress: Progress) -> str:
    single = evenly_sampled(next(iter(runs.values()))) if len(runs) == 1 else None
    described = {name: describe(run) for name, run in runs.items()}
    if single is not None and TOLD in single.attrs:
        described[next(iter(runs))][TOLD] = f"{single.attrs[TOLD]}, evenly spread; findings are of all records"
    answers, absent = _ask_all(single, progress) if single is not None else ({}, {})
    comparison = None
    if single is None:
        comparison, absent = _compared(runs)
    plots = {"plot-loss": loss_plot(runs, "plot-loss"), "plot-kappa": kappa_plot(single, "plot-kappa") if single is not None else None}
    library, own = Markup(script()), Markup((HERE / "page.js").read_text(encoding="utf-8"))
    return _environment().get_template("page.html").render(
        runs=[
            {"name": name, "findings": found[name], "verdict": verdict(found[name]), "counts": counts(found[name]),
             "identity": identity(described[name]), "operators": described[name]["operators"]}
            for name in runs
        ],
        themes={theme: [answers[name] for name in names if name in answers] for theme, names in THEMES.items()},
        comparison=comparison,
        absent=absent,
        plots={name: plot for name, plot in plots.items() if plot is not None},
        matrices=matrices(single) if single is not None else None,
        style=Markup((HERE / "page.css").read_text(encoding="utf-8")), library=library, script=own,
        script_hashes=" ".join(f"'sha256-{_digest(text)}'" for text in (own, library)),
    )  # fmt: skip


def _environment() -> Environment:
    """Templates with everything escaped that a run brings in; only this package's own files are markup."""
    environment = Environment(
        loader=FileSystemLoader(HERE),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        finalize=lambda value: value if isinstance(value, Markup) else shortened(escaped(value)),
    )
    environment.filters["number"] = number
    # The plotting library reads a reference only after the object that it refers to.
    environment.policies["json.dumps_kwargs"] = {"sort_keys": False}
    return environment


def number(value: float) -> str:
    """A number to read: four digits, and a dash where there is none.

    >>> number(123456.0), number(0.25), number(float("nan"))
    ('1.235e+05', '0.25', '–')
    """
    return f"{value:.4g}" if math.isfinite(value) else "–"


def _ask_all(run: xr.DataTree, progress: Progress) -> tuple[dict[str, dict[str, Any]], dict[str, str]]:
    """Every study's answer for the template, and the reason of those that the run does not allow."""
    answers, absent = {}, {}
    for name in progress(STUDIES):
        try:
            answer = ask(run, name)
        except ValueError as error:
            absent[name] = error.reason if isinstance(error, RunError) else str(error)
            continue
        answers[name] = _shown(name, answer)
    return answers, absent


def _compared(runs: Mapping[str, xr.DataTree]) -> tuple[dict[str, Any] | None, dict[str, str]]:
    """The comparison for the template, or the reason why there is none."""
    try:
        return _shown("compare", Answer(compare, compare.study(runs))), {}
    except ValueError as error:
        return None, {"compare": str(error)}


def _shown(name: str, answer: Answer) -> dict[str, Any]:
    figure = answer.plot()
    width, height = figure.get_size_inches() * 96
    return {
        "name": name,
        "title": title(name),
        "question": answer.question,
        "reading": answer.reading,
        "summary": answer.summary,
        "picture": Markup(svg_uri(figure, name)),
        "width": round(width),
        "height": round(height),
        "tables": [_table(f"{name}.{dims}", table) for dims, table in answer.tables().items()],
    }


def title(name: str) -> str:
    """A study's name to read.

    >>> title("kappa_by_operator"), title("ns_band"), title("v_rank1")
    ('κ by operator', 'Newton–Schulz band', 'v of rank 1')
    """
    words = " ".join(WORDS.get(word, word) for word in name.split("_"))
    return words[0].upper() + words[1:] if words[0] not in "κv" else words


def _table(name: str, dataset: xr.Dataset) -> dict[str, Any]:
    """What the page carries of a table: its cells where there are few, a file where it is small, and else its size alone."""
    rows = math.prod(dataset.sizes.values())
    size = rows * len(dataset.variables)
    table: dict[str, Any] = {"name": name, "rows": rows, "header": [], "cells": [], "csv": None}
    if size <= DOWNLOAD:
        flat = dataset.to_dataframe().reset_index()
        csv = as_csv(flat, "%.6g")
        table["csv"] = Markup("data:text/csv;charset=utf-8," + quote(csv, safe=" ,"))
        if size <= SHOWN:
            table["header"] = list(map(str, flat.columns))
            table["cells"] = [
                [number(cell) if isinstance(cell, float) else str(cell) for cell in row] for row in flat.itertuples(index=False)
            ]
    return table


def _digest(text: str) -> str:
    return base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()
