"""A folder with every study's figure and tables, and a summary of what they say."""

import json
from pathlib import Path
from typing import Any

import xarray as xr

from .answer import Answer, ask
from .findings import check


def analyse_study(run: xr.DataTree, name: str, folder: Path, *, required: bool) -> dict[str, Any]:
    """Run one study, write its figure and tables into `folder`, and give its sentence.

    A study that a run does not allow (no orthogonalised matrix, say) is skipped with the reason, unless `required`.
    """
    try:
        answer = ask(run, name)
    except ValueError as error:
        if required:
            raise
        return {"summary": f"skipped: {error}", "files": [], "skipped": True}
    folder.mkdir(parents=True, exist_ok=True)
    figure = folder / f"{name}.png"
    answer.plot().savefig(figure)
    return {"summary": answer.summary, "files": [figure.name, *_write_tables(answer, name, folder)], "skipped": False}


def finish_report(run: xr.DataTree, folder: Path, studies: dict[str, dict[str, Any]]) -> dict[str, Any]:
    """Add the findings and write everything said as `summary.json`.

    Raises:
        ValueError: no study could be made of the run; the reason of the first.
    """
    if all(said["skipped"] for said in studies.values()):
        raise ValueError(next(iter(studies.values()))["summary"].removeprefix("skipped: "))
    result = {"folder": str(folder), "studies": studies, "findings": [finding.as_dict() for finding in check(run)]}
    (folder / "summary.json").write_text(json.dumps(result, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
    return result


def _write_tables(answer: Answer, name: str, folder: Path) -> list[str]:
    written = []
    for dimensions, table in answer.tables().items():
        path = folder / f"{name}.{dimensions}.csv"
        table.to_dataframe().to_csv(path, float_format="%.8g")
        written.append(path.name)
    return written
