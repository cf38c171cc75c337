"""`diag schedule --what-if`: every family and number of steps side by side, from logged spectra."""

import csv
import io
import math
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .console import print_json, print_table, say

if TYPE_CHECKING:
    import xarray as xr

# A table of all families for every operator would be no table any more.
FEW = 3


def answer_what_if(
    run: "xr.DataTree", families: list[str] | None, window: slice | None, output: Path | None, *, by_operator: bool, as_json: bool
) -> None:
    """Compute, print, and write the table to `output` as CSV."""
    from ..analysis.report.csv_tables import cell
    from ..analysis.what_if import DEFAULT_FAMILIES, hazardous, summary, table, what_if
    from ..diagnostics.store.whole_file import write_whole

    chosen = list(dict.fromkeys(families or DEFAULT_FAMILIES))
    if by_operator and not families:
        chosen = chosen[:FEW]
    found = what_if(run, window, chosen)
    rows = table(found)
    if output is not None:
        text = io.StringIO(newline="")
        writer = csv.DictWriter(text, list(dict.fromkeys(name for row in rows for name in row)))
        writer.writeheader()
        writer.writerows({name: cell(value) for name, value in row.items()} for row in rows)
        write_whole(output, text.getvalue())
    if as_json:
        print_json(
            {"summary": summary(found), "window": _window(found), "in_force": _in_force(found), "rows": [_plain(row) for row in rows]}
        )
        return
    unsafe = hazardous(found)
    _print(found, by_operator, unsafe)
    if unsafe:
        say("(!)", f"not to be put into force, whatever the residual: `diag ns` tells what is wrong with {', '.join(unsafe)}")
    say("observed", "{records} records, steps {first} to {last}".format(**_window(found)))
    say("what if", summary(found))
    if output is not None:
        say("table", str(output))


def _print(found: "xr.Dataset", by_operator: bool, unsafe: list[str]) -> None:
    marked = {str(f): f"{f} (!)" if f in unsafe else str(f) for f in found["family"].values}
    steps = found["k"].values.tolist()
    header = ("family", *(f"{k} steps" for k in steps))
    for title, name, precision in (
        ("mean residual in bfloat16", "mean_residual", "bfloat16"),
        ("mean residual in exact arithmetic", "mean_residual", "float64"),
        ("mean alignment in bfloat16", "mean_alignment", "bfloat16"),
    ):
        say(title, f"by family and number of steps, over {int(found['matrices'].sum())} matrices")
        values = found[name].sel(precision=precision)
        print_table(header, [(marked[str(f)], *(_number(v) for v in values.sel(family=f).values)) for f in values["family"].values])
    costs = found["relative_cost"]
    kinds: dict[tuple[str, ...], list[str]] = {}
    for family in costs["family"].values:
        kinds.setdefault(tuple(f"{c:.0%}" for c in costs.sel(family=family).values), []).append(str(family))
    # Quintic steps cost alike whatever their coefficients.
    for shares, names in kinds.items():
        these = ", ".join(names) if len(names) <= FEW else f"{', '.join(names[:FEW])} and {len(names) - FEW} more"
        say("FLOPs relative to five quintic steps", f"{', '.join(shares)} ({these})")
    if by_operator:
        say("by operator", "residual in bfloat16, alignment in bfloat16")
        low = found.sel(precision="bfloat16")
        print_table(
            ("operator", *header),
            [
                (str(o), marked[str(f)], *(f"{_number(r)}, {_number(a)}" for r, a in zip(
                    low["residual"].sel(operator=o, family=f).values, low["alignment"].sel(operator=o, family=f).values, strict=True)))
                for o in low["operator"].values for f in low["family"].values
            ],
        )  # fmt: skip
    rows = [
        (
            row["operator"],
            *(_number(row[key]) for key in ("achieved_residual", "residual_bfloat16", "residual_float64", "achieved_alignment", "alignment_bfloat16")),
            f"{row['recoverable']:.0%}",
        )
        for row in _in_force(found)
    ]  # fmt: skip
    say("in force", "what was achieved, read back from the updates, beside what is predicted")
    print_table(("operator", "residual", "in bfloat16", "exact", "alignment", "in bfloat16", "σ over bf16"), rows)


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
