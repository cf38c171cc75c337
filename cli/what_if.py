"""`diag what-if`: every family and number of steps side by side, from logged spectra."""

import csv
import io
import math
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from .app import JsonOption, command
from .console import LineageOption, RunArgument, WindowOption, parse_window, print_json, print_table, say

if TYPE_CHECKING:
    import xarray as xr

    from ..analysis.what_if_answer import Rule

# Families of which every operator is told: a table of all of them for every operator would be no table any more.
FEW = 3


@command
def what_if(
    run: RunArgument,
    family: Annotated[
        list[str] | None,
        typer.Option(
            help="Only this family, matched or one of `diag ns`. May be repeated; by default all.", metavar="NAME", show_default=False
        ),
    ] = None,
    budget: Annotated[
        int | None,
        typer.Option(
            help="The answer may cost as many FLOPs as so many quintic steps for all, 3 to 8; by default as many as what is in force.",
            metavar="N",
            show_default=False,
        ),
    ] = None,
    rule: Annotated[
        Literal["mean", "minimax"],
        typer.Option(
            help="What the answer leaves least of: mean, the mean residual, or minimax, the largest residual of an operator.",
            metavar="RULE",
        ),
    ] = "mean",
    recoverable: Annotated[
        bool,
        typer.Option("--recoverable", help="Count only singular values above bfloat16's rounding noise; these residuals are exact ones."),
    ] = False,
    window: WindowOption = None,
    by_operator: Annotated[
        bool, typer.Option("--by-operator", help="Tell every operator too, under the three best families or those of --family.")
    ] = False,
    output: Annotated[
        Path | None, typer.Option("-o", "--output", help="Write all numbers into this CSV file.", metavar="FILE", show_default=False)
    ] = None,
    lineage: LineageOption = None,
    as_json: JsonOption = False,
) -> None:
    """Tell which Newton–Schulz coefficients and steps would do best.

    Which family and number of steps would leave the least residual for the FLOPs of what is in force, and what every other one
    would leave, exactly and as bfloat16 iterates. Nothing is trained or put into force.
    """
    from ..analysis import open_run
    from ..analysis.what_if import DEFAULT_FAMILIES, table
    from ..analysis.what_if import what_if as ask
    from ..analysis.what_if_answer import best, plain, summary, why_not_scheduled

    found = ask(open_run(run, lineage), parse_window(window), list(dict.fromkeys(family or DEFAULT_FAMILIES)))
    answer = best(found, budget, rule, recoverable=recoverable)
    sentence, why = summary(found, budget, rule, recoverable=recoverable), why_not_scheduled(found, answer)
    rows = table(found)
    if output is not None:
        _write(rows, output)
    if as_json:
        print_json(
            {
                "summary": sentence, "answer": plain(answer), "window": _window(found), "in_force": _in_force(found),
                "rows": [_plain(row) for row in rows],
            }
        )  # fmt: skip
        return
    say("what if", sentence)
    if why is not None:
        say("schedule", why)
    _print(found, recoverable, _told_of_each(found, rule, recoverable, family) if by_operator else [])
    say("observed", "{records} records, steps {first} to {last}; a residual measures geometry, not loss".format(**_window(found)))
    if output is not None:
        say("table", str(output))


def _told_of_each(found: "xr.Dataset", rule: "Rule", recoverable: bool, chosen: Sequence[str] | None) -> list[str]:
    """Families whose operators are told: those that were asked for, else those that leave least at five steps."""
    from ..analysis.what_if import hazardous
    from ..analysis.what_if_answer import judged

    if chosen:
        return list(dict.fromkeys(chosen))
    left = judged(found, rule, recoverable=recoverable).sel(k=5).to_series().dropna().drop(hazardous(found), errors="ignore")
    return [str(name) for name in left.nsmallest(FEW).index]


def _print(found: "xr.Dataset", recoverable: bool, told: list[str]) -> None:
    from ..analysis.what_if import hazardous

    unsafe = hazardous(found)
    marked = {str(f): f"{f} (!)" if f in unsafe else str(f) for f in found["family"].values}
    header = ("family", *(f"{k} steps" for k in found["k"].values.tolist()))
    tables = [
        ("mean residual in bfloat16", found["mean_residual"].sel(precision="bfloat16")),
        ("mean residual in exact arithmetic", found["mean_residual"].sel(precision="float64")),
        ("mean alignment in bfloat16", found["mean_alignment"].sel(precision="bfloat16")),
    ]
    if recoverable:
        tables.insert(0, ("mean residual above bfloat16's noise", found["mean_residual_recoverable"]))
    for title, values in tables:
        say(title, f"by family and number of steps, over {int(found['matrices'].sum())} matrices")
        print_table(header, [(marked[str(f)], *(_number(v) for v in values.sel(family=f).values)) for f in values["family"].values])
    if unsafe:
        say("(!)", f"not to be put into force, whatever the residual: `diag ns` tells what is wrong with {', '.join(unsafe)}")
    costs = found["relative_cost"]
    kinds: dict[tuple[str, ...], list[str]] = {}
    for family in costs["family"].values:
        kinds.setdefault(tuple(f"{c:.0%}" for c in costs.sel(family=family).values), []).append(str(family))
    # Quintic steps cost alike whatever their coefficients.
    for shares, names in kinds.items():
        these = ", ".join(names) if len(names) <= FEW else f"{', '.join(names[:FEW])} and {len(names) - FEW} more"
        say("FLOPs relative to five quintic steps", f"{', '.join(shares)} ({these})")
    for family in told:
        say("by operator", f"residual in bfloat16 under {marked[family]}")
        values = found["residual"].sel(precision="bfloat16", family=family)
        rows = [(str(o), *(_number(r) for r in values.sel(operator=o).values)) for o in values["operator"].values]
        print_table(("operator", *header[1:]), rows)
    achieved = [
        (
            row["operator"],
            *(_number(row[key]) for key in ("achieved_residual", "residual_bfloat16", "residual_float64", "achieved_alignment", "alignment_bfloat16")),
            f"{row['recoverable']:.0%}",
        )
        for row in _in_force(found)
    ]  # fmt: skip
    say("in force", "what was achieved, read back from the updates, beside what is predicted")
    print_table(("operator", "residual", "in bfloat16", "exact", "alignment", "in bfloat16", "σ over bf16"), achieved)


def _write(rows: list[dict[str, Any]], output: Path) -> None:
    from ..analysis.report.csv_tables import cell
    from ..diagnostics.store.whole_file import write_whole

    text = io.StringIO(newline="")
    writer = csv.DictWriter(text, list(dict.fromkeys(name for row in rows for name in row)))
    writer.writeheader()
    writer.writerows({name: cell(value) for name, value in row.items()} for row in rows)
    write_whole(output, text.getvalue())


def _in_force(found: "xr.Dataset") -> list[dict[str, Any]]:
    rows = []
    for i, operator in enumerate(found["operator"].values.tolist()):
        achieved, (exact, low) = float(found["achieved_residual"].values[i]), found["in_force_residual"].values[i].tolist()
        rows.append(
            _plain({
                "operator": operator, "achieved_residual": achieved, "residual_float64": exact, "residual_bfloat16": low,
                "cost_of_low_precision": achieved - exact, "achieved_alignment": float(found["achieved_alignment"].values[i]),
                "alignment_float64": float(found["in_force_alignment"].values[i, 0]),
                "alignment_bfloat16": float(found["in_force_alignment"].values[i, 1]), "recoverable": float(found["recoverable"].values[i]),
            })
        )  # fmt: skip
    return rows


def _window(found: "xr.Dataset") -> dict[str, int]:
    return {"records": found.attrs["records"], "first": found.attrs["first_step"], "last": found.attrs["last_step"]}


def _plain(row: dict[str, Any]) -> dict[str, Any]:
    """JSON has no NaN and no infinity."""
    return {key: None if isinstance(value, float) and not math.isfinite(value) else value for key, value in row.items()}


def _number(value: float | None) -> str:
    return "–" if value is None or math.isnan(value) else "diverges" if abs(value) > 1e3 else f"{value:.3f}"
