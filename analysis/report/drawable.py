"""Labels that a figure can draw, whatever the names of a run are."""

import numpy as np
import xarray as xr

from ...diagnostics.escape import escaped
from ...diagnostics.operators import ordered

LONGEST, SHORT = 40, 26  # characters of a label, of one among more than a few; longer ones would leave no room for the picture
FEW = 8
MAX_DRAWN = 20  # operators, or runs, optimizers, schedules: what a legend and a row of panels have room for


def fewer(dataset: xr.Dataset) -> tuple[xr.Dataset, str]:
    """The dataset without operators, or other labels along a dimension, beyond the first :data:`MAX_DRAWN`, and a note that says so; empty where all are kept."""
    labels = {str(d): dataset[d].values for d in dataset.dims if d in dataset.coords and dataset[d].dtype.kind in "UOT"}
    if "matrix" in dataset.dims and "operator" in dataset.coords and dataset["operator"].dims == ("matrix",):
        labels["matrix"] = dataset["operator"].values
    operators = ordered(next((labels[d].tolist() for d in ("operator", "of_operator", "matrix") if d in labels), []))
    notes = [f"{MAX_DRAWN} of {len(operators)} operators"] if len(operators) > MAX_DRAWN else []
    kept = {}
    for dimension, values in labels.items():
        if set(values.tolist()) <= set(operators):
            kept[dimension] = np.flatnonzero([label in operators[:MAX_DRAWN] for label in values.tolist()])
        elif len(values) > MAX_DRAWN:
            kept[dimension] = np.arange(MAX_DRAWN)
            notes.append(f"{MAX_DRAWN} of {len(values)} along {dimension}")
    return dataset.isel(kept), f"Drawn: {', '.join(notes)}; the tables hold all" if notes else ""


def drawable(dataset: xr.Dataset) -> xr.Dataset:
    r"""The dataset with labels, and texts among its attributes, that can be drawn: one line, not endless, and never read as a formula.

    Matplotlib reads what stands between two dollar signs as a formula, and refuses to draw one that it cannot parse; `\$` is a plain one.

    >>> drawable(xr.Dataset(coords={"operator": ["attn_q", "a\n$b$"]}))["operator"].values.tolist()
    ['attn_q', 'a\\n\\$b\\$']
    """
    texts = {name: values for name, values in dataset.variables.items() if values.dtype.kind in "UOT" and values.size}
    shown = {name: (values.dims, _labels(values.values)) for name, values in texts.items()}
    labelled = dataset.assign_coords({k: v for k, v in shown.items() if k in dataset.coords}).assign(
        {k: v for k, v in shown.items() if k not in dataset.coords}
    )
    return labelled.assign_attrs({k: _escaped(_cut(escaped(v))) for k, v in dataset.attrs.items() if isinstance(v, str)})


def _labels(values: np.ndarray) -> np.ndarray:
    """Labels for drawing; where cutting makes two the same, they are numbered."""
    distinct = dict.fromkeys(map(str, values.ravel()))
    cut = {text: _cut(escaped(text), LONGEST if len(distinct) <= FEW else SHORT) for text in distinct}
    seen: dict[str, int] = {}
    for text, label in cut.items():
        seen[label] = seen.get(label, 0) + 1
        if seen[label] > 1:
            cut[text] = f"{label} ({seen[label]})"
    return np.array([_escaped(cut[str(text)]) for text in values.ravel()], dtype=str).reshape(values.shape)


def _escaped(label: str) -> str:
    """As Matplotlib reads it: a dollar sign begins a formula, and a label that begins with an underscore is left out of legends."""
    return (f" {label}" if label.startswith("_") else label).replace("$", r"\$")


def _cut(text: str, longest: int = LONGEST) -> str:
    return text if len(text) <= longest else f"{text[: longest - 13]}…{text[-12:]}"
