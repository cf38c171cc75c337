"""Under which conditions runs were made, and which of them are the same: what has to be equal for a comparison of optimizers to be fair."""

import json
from collections import Counter
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import xarray as xr

from .run import records, unread
from .training_curve import stated

SAME, DIFFERS, UNKNOWN = "same", "differs", "not stated"
TOLERANCE = 0.01  # by which steps and tokens of a run may differ and still be one budget


def conditions(runs: Mapping[str, xr.DataTree], spent: Mapping[str, Mapping[str, float]]) -> xr.Dataset:
    """What each run says of its conditions, and whether they agree.

    Variables: `value` (condition, run), as text; `verdict` (condition): "same", "differs" or "not stated"; `required` (condition): whether a fair
    comparison asks for it to be the same (what is compared, the optimizers and their settings, may differ).

    Args:
        runs: by name, as from `open_run`.
        spent: steps, tokens and seconds of each.
    """
    rows: list[tuple[str, bool, list[Any]]] = [
        (name, True, [stated(run).get(name) for run in runs.values()]) for name in ("data", "tokens_per_step", "budget")
    ]
    if not any(rows[-1][2]):
        del rows[-1]  # steps and tokens are a budget too
    rows += [(unit, True, [spent[name][unit] for name in runs]) for unit in ("steps", "tokens")]
    recorded: tuple[tuple[str, bool, Callable[[xr.DataTree], Any]], ...] = (
        ("matrices", True, _shapes),
        ("seed", False, lambda run: stated(run).get("seed")),
        ("optimizers", False, _optimizers),
        ("learning rate", False, _learning_rate),
        ("software", False, lambda run: ", ".join(f"{k} {v}" for k, v in run.attrs.get("versions", {}).items()) or None),
    )
    rows += [(name, required, [of(run) for run in runs.values()]) for name, required, of in recorded]
    return xr.Dataset(
        {
            "value": (("condition", "run"), [[_text(v) for v in values] for _, _, values in rows]),
            "verdict": ("condition", [_verdict(values) for _, _, values in rows]),
            "required": ("condition", [required for _, required, _ in rows]),
        },
        coords={"condition": [name for name, _, _ in rows], "run": list(runs)},
    )


def setting(run: xr.DataTree) -> str:
    """Everything that runs which differ only in their seed have in common, as one comparable text."""
    about = {key: value for key, value in stated(run).items() if key != "seed"}
    optimizers = [{"class": o["class"], "groups": o.get("groups")} for o in run.attrs.get("optimizers", [])]
    return json.dumps([about, optimizers, _shapes(run), _learning_rate(run)], sort_keys=True, default=str)


def _verdict(values: list[Any]) -> str:
    if any(value is None or value != value for value in values):
        return UNKNOWN
    if all(isinstance(value, float) for value in values):
        return SAME if max(values) - min(values) <= TOLERANCE * abs(max(values)) else DIFFERS
    return SAME if all(value == values[0] for value in values) else DIFFERS


def _text(value: Any) -> str:
    if value is None or value != value:
        return UNKNOWN
    return f"{value:.6g}" if isinstance(value, float) else str(value)


def _shapes(run: xr.DataTree) -> str | None:
    """How many matrices of which shape, all optimizers together."""
    for group in ("update", "geometry"):
        if group in run.children and run[group].sizes.get("matrix") and run[group].sizes.get("step"):
            dataset = unread(run, group)
            counts = Counter(zip(dataset["rows"].values.tolist(), dataset["cols"].values.tolist(), strict=True))
            return ", ".join(f"{count} of {rows}×{cols}" for (rows, cols), count in sorted(counts.items()))
    return None


def _optimizers(run: xr.DataTree) -> str | None:
    return " + ".join(str(o["class"]).rsplit(".", 1)[-1] for o in run.attrs.get("optimizers", [])) or None


def _learning_rate(run: xr.DataTree) -> str | None:
    """The largest one of each optimizer, as it was in force."""
    if "update" not in run.children or not run["update"].sizes.get("step"):
        return None
    update = records(run, "update")
    lr, optimizer = update["lr"].values, update["optimizer"].values
    largest = {str(o): lr[:, optimizer == o] for o in dict.fromkeys(optimizer.tolist())}
    return ", ".join(f"{o} {np.nanmax(v):.4g}" for o, v in largest.items() if np.isfinite(v).any()) or None
