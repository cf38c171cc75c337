"""A folder with every study's figure and tables, and a summary of what they say."""

import json
from collections import defaultdict
from importlib import import_module
from pathlib import Path
from typing import Any

import xarray as xr

from .findings import check


def analyse_study(run: xr.DataTree, name: str, folder: Path, *, required: bool) -> dict[str, Any]:
    """Run one study, write its figure and tables into `folder`, and give its sentence.

    A study that a run does not allow (no orthogonalised matrix, say) is skipped with the reason, unless `required`.
    """
    module = import_module(f".studies.{name}", __package__)
    try:
        dataset = module.study(run)
    except ValueError as error:
        if required:
            raise
        return {"summary": f"skipped: {error}", "files": [], "skipped": True}
    folder.mkdir(parents=True, exist_ok=True)
    figure = folder / f"{name}.png"
    module.plot(dataset).savefig(figure)
    return {"summary": module.summary(dataset), "files": [figure.name, *_write_tables(dataset, name, folder)], "skipped": False}


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


def _write_tables(dataset: xr.Dataset, name: str, folder: Path) -> list[str]:
    """One CSV per set of dimensions: variables of different dimensions do not share rows."""
    by_dimensions: dict[tuple[str, ...], list[str]] = defaultdict(list)
    for variable in dataset.data_vars:
        by_dimensions[tuple(map(str, dataset[variable].dims))].append(str(variable))
    written = []
    for dimensions, variables in by_dimensions.items():
        path = folder / f"{name}.{'-'.join(dimensions)}.csv"
        if dimensions:
            dataset[variables].to_dataframe().to_csv(path, float_format="%.8g")
            written.append(path.name)
    return written
