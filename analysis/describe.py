"""What is in a run, in plain values."""

from typing import Any

import numpy as np
import xarray as xr

from ..diagnostics.operators import ordered
from ..diagnostics.store.activity import Activity, activity
from .run import unread


def describe(run: xr.DataTree) -> dict[str, Any]:
    """Optimizers, groups with their steps, matrices per operator, the last logged scalars, the share of time recording took, who is writing to it, what was decided and noted live, the lineages that there are."""
    groups = {}
    for name in sorted(run.children):
        group = run[name].to_dataset()
        steps = np.asarray(group["step"].values)
        groups[name] = {
            "records": len(steps),
            "first_step": int(steps[0]) if len(steps) else None,
            "last_step": int(steps[-1]) if len(steps) else None,
            "variables": sorted(str(variable) for variable in group.data_vars),
        }
    scalars = run["scalars"].to_dataset() if groups.get("scalars", {}).get("records") else xr.Dataset()
    own = {"overhead_seconds", "overhead_cpu_seconds", "background_cpu_seconds", "elapsed_seconds"}
    last = {}
    for name in sorted(set(map(str, scalars.data_vars)) - own):
        values = scalars[name].values  # one at a time
        if (known := np.isfinite(values)).any():
            last[name] = float(values[known][-1])
    now = being_written(run)
    return {
        "activity": None if now is None else now.as_dict(),
        "lineage": run.attrs.get("lineage"),
        "lineages": run.attrs.get("lineages", []),
        "created": run.attrs.get("created"),
        "versions": run.attrs.get("versions", {}),
        "ranks": next(iter(run.attrs.get("continued", [])[-1:]), run.attrs).get("ranks"),
        "optimizers": [{**entry, "geometry_describes": _joined(entry["spectrum_of"])} for entry in run.attrs.get("optimizers", [])],
        "groups": groups,
        "operators": _operators(run),
        "last_scalars": last,
        "decisions": run.attrs.get("decisions", []),
        "alignment_events": run.attrs.get("alignment_events", []),
        "overhead": _share(scalars, "overhead_seconds"),
        "background": _share(scalars, "background_cpu_seconds"),
        "lost": {name: int(run.attrs.get(name, 0)) for name in ("missed", "dropped", "errors")},
    }


def being_written(run: xr.DataTree) -> Activity | None:
    """Who writes to a run that was opened from a folder; None where nobody does."""
    source = run.encoding.get("source")
    return None if source is None else activity(source)


def what_recording_took(described: dict[str, Any]) -> str:
    """The share of time, what it was spent on, and what was lost, in a sentence."""
    beside = "" if described["background"] is None else f", and its thread's CPU time was {described['background']:.2%} of it"
    records = max((group["records"] for name, group in described["groups"].items() if name not in ("scalars", "curvature")), default=0)
    lost = described["lost"]
    return (
        f"took {described['overhead']:.2%} of the wall time{beside}; {records} record{'' if records == 1 else 's'}, {lost['missed']} missed while "
        f"another was measured, {lost['dropped']} dropped because the store stayed unwritable, {lost['errors']} errors"
    )


def _share(scalars: xr.Dataset, spent: str) -> float | None:
    """What recording took of the wall time, by its last word; None where it says nothing."""
    if not {spent, "elapsed_seconds"} <= set(map(str, scalars.data_vars)):
        return None
    seconds, elapsed = scalars[spent].values, scalars["elapsed_seconds"].values
    known = np.flatnonzero(np.isfinite(seconds) & (elapsed > 0))
    return float(seconds[known[-1]] / elapsed[known[-1]]) if len(known) else None


def _joined(texts: str | list[str]) -> str:
    """What the groups of an optimizer say, each once; runs of earlier versions hold one text."""
    return texts if isinstance(texts, str) else "; ".join(dict.fromkeys(texts))


def _operators(run: xr.DataTree) -> list[dict[str, Any]]:
    group = next((g for g in ("update", "geometry") if g in run.children and run[g].sizes.get("step")), None)
    if group is None:
        return []
    dataset = unread(run, group)
    found: dict[str, list[tuple[str, int]]] = {}
    for operator, m, n, layer in zip(*(dataset[name].values.tolist() for name in ("operator", "rows", "cols", "layer")), strict=True):
        found.setdefault(str(operator), []).append((f"{m}×{n}", int(layer)))
    described = []
    for operator in ordered(list(found)):
        layers = sorted({layer for _, layer in found[operator] if layer >= 0})
        described.append(
            {
                "operator": operator,
                "matrices": len(found[operator]),
                "shapes": ", ".join(dict.fromkeys(shape for shape, _ in found[operator])),
                "layers": f"{layers[0]}–{layers[-1]}" if layers else "",
            }
        )
    return described
