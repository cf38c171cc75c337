"""`diag compare`: two or more runs under the fair-comparison protocol."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from .app import JsonOption, command
from .console import LineageOption, print_json, print_table, say

if TYPE_CHECKING:
    import xarray as xr


@command
def compare(
    runs: Annotated[list[Path], typer.Argument(help="Two or more runs.", metavar="RUN.zarr", show_default=False)],
    baseline: Annotated[
        str | None,
        typer.Option(
            help="The run that the others are compared with, by its name in the table or its path; by default the first.",
            metavar="NAME",
            show_default=False,
        ),
    ] = None,
    target_loss: Annotated[
        float | None,
        typer.Option(help="The training loss to reach; by default the baseline's last smoothed one.", metavar="X", show_default=False),
    ] = None,
    output: Annotated[Path | None, typer.Option("-o", "--output", help="Folder for the figure and the tables.", show_default=False)] = None,
    lineage: LineageOption = None,
    as_json: JsonOption = False,
) -> None:
    """Compare runs: what each took to reach one loss.

    Whether data and budget are the same is told with it, and how far seeds scatter.
    """
    from ..analysis import compare as comparison
    from ..analysis import open_run
    from ..analysis.report.answer import Answer
    from ..analysis.report.folder import write_answer

    names = _names(runs)
    chosen = None if baseline is None else names.get(Path(baseline).resolve(), baseline)
    dataset = comparison.study({name: open_run(path, lineage) for path, name in names.items()}, chosen, target_loss)
    summary = comparison.summary(dataset)
    files = write_answer(Answer(comparison, dataset), "compare", output) if output is not None else []
    if as_json:
        print_json({"summary": summary, "folder": None if output is None else str(output), "files": files, **_plain(dataset)})
        return
    print_table(("condition", "", *map(str, dataset["run"].values)), _conditions(dataset))
    print_table(("run", "steps", "tokens", "wall s", "saved", "last loss", "validation"), _efforts(dataset))
    say("compare", summary)
    if output is not None:
        say("figures and tables", str(output))


def _names(paths: list[Path]) -> dict[Path, str]:
    """A name for every run: its folder's, with as many parents as tell it from the others."""
    resolved = [path.resolve() for path in paths]
    if len(set(resolved)) < len(resolved):
        raise ValueError("runs: expected different runs, got the same one twice")
    for depth in range(1, max(len(path.parts) for path in resolved) + 1):
        names = ["/".join(path.parts[-depth:]).removesuffix(".zarr") for path in resolved]
        if len(set(names)) == len(names):
            break
    return dict(zip(resolved, names, strict=True))


def _conditions(dataset: "xr.Dataset") -> list[tuple[Any, ...]]:
    rows = zip(*(dataset[name].values.tolist() for name in ("condition", "verdict", "value")), strict=True)
    return [(condition, verdict, *(values[:1] if verdict == "same" else values)) for condition, verdict, values in rows]


def _efforts(dataset: "xr.Dataset") -> list[tuple[Any, ...]]:
    """What each run took to reach the target."""
    return [
        (
            str(name),
            *(_number(one["to_target"].sel(unit=unit).item(), ".4g") for unit in ("steps", "tokens", "seconds")),
            _number(one["saved"].sel(unit="steps").item(), ".1%"),
            _number(one["last"].item(), ".4f"),
            _number(one["last_validation"].item(), ".4f"),
        )
        for name in dataset["run"].values
        for one in (dataset.sel(run=name),)
    ]


def _number(value: float, form: str) -> str:
    return format(value, form) if value == value else "–"


def _plain(dataset: "xr.Dataset") -> dict[str, Any]:
    """Per run, per setting and per condition, without the curves; null where a number is missing."""

    def table(dimension: str) -> dict[str, dict[str, Any]]:
        names = [str(name) for name in dataset[dimension].values]
        chosen = [v for v in dataset.data_vars if dimension in dataset[v].dims and "point" not in dataset[v].dims]
        return {name: {str(v): _value(dataset[v].isel({dimension: i})) for v in chosen} for i, name in enumerate(names)}

    return {
        "attributes": {str(k): v for k, v in dataset.attrs.items()},
        "runs": table("run"),
        "settings": table("setting"),
        "conditions": table("condition"),
    }


def _value(array: "xr.DataArray") -> Any:
    if array.dims:
        return {str(key): _value(array.isel({array.dims[0]: i})) for i, key in enumerate(array[array.dims[0]].values)}
    value = array.item()
    return None if value != value else value
