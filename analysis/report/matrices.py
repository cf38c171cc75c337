"""The table of a run's matrices: one row each, with the last recorded value of what was measured."""

from collections.abc import Hashable, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import pandas as pd
import xarray as xr

from ...diagnostics.catalogue import QUANTITIES
from ..run import own_residual, records

# Group, quantity, heading, after κ, residual and alignment. What a run lacks has no column.
COLUMNS = (
    ("geometry", "stable_rank", "stable rank"),
    ("geometry", "fro_norm", "‖M‖_F"),
    ("update", "update_rms_per_lr", "update RMS / lr"),
    ("update", "update_to_weight", "update / weight"),
    ("update", "weight_rms", "weight RMS"),
    ("update", "grad_rms", "gradient RMS"),
    ("second_moment", "second_moment_mean", "mean of v"),
    ("second_moment", "eps_share", "under ε"),
    ("second_moment", "rank1_information", "rank-1 information"),
)
DEFINITIONS = {quantity.name: f"{quantity.definition} ({quantity.units})" for quantity in QUANTITIES}


@dataclass(frozen=True)
class Column:
    """A column of numbers: its heading, what it is, and a value per matrix, NaN where nothing was recorded."""

    heading: str
    definition: str
    values: np.ndarray
    at_least: np.ndarray  # whether it is only known to be at least that


@dataclass(frozen=True)
class Matrices:
    """Names and kinds of the matrices (columns name, operator, layer, rows, cols, optimizer), and the columns of numbers."""

    kinds: pd.DataFrame
    columns: list[Column]

    @property
    def widest(self) -> int:
        """Characters of the longest name."""
        return int(self.kinds["name"].str.len().max())

    def rows(self) -> Iterator[tuple[dict[Hashable, Any], list[tuple[float, bool]]]]:
        """Each matrix with its numbers in the columns' order, and whether they are bounds."""
        for i, kind in enumerate(self.kinds.to_dict("records")):
            yield kind, [(float(column.values[i]), bool(column.at_least[i])) for column in self.columns]


def matrices(run: xr.DataTree) -> Matrices:
    """The matrices of all groups, in the order of the first that names them."""
    groups = {name: records(run, name).load() for name in dict.fromkeys(g for g, _, _ in COLUMNS) if _recorded(run, name)}
    kinds = pd.concat([_kinds(dataset) for dataset in groups.values()]).drop_duplicates("name", ignore_index=True)
    found: list[Column] = []

    def add(heading: str, definition: str, dataset: xr.Dataset, values: xr.DataArray, at_least: xr.DataArray | None = None) -> None:
        placed = _placed(dataset, values, kinds)
        if np.isfinite(placed).any():
            bounds = np.zeros(len(kinds), dtype=bool) if at_least is None else _placed(dataset, at_least, kinds) == 1
            found.append(Column(heading, definition, placed, bounds))

    if "geometry" in groups:
        geometry = groups["geometry"]
        kappa = geometry["condition_number"]
        add("κ", DEFINITIONS["condition_number"], geometry, kappa, geometry["condition_is_floor"].where(np.isfinite(kappa)))
        add(
            "residual ε̃",
            "predicted Gram residual of the Newton–Schulz steps in force; 0: an exact polar factor (1)",
            geometry,
            own_residual(geometry),
        )
    if "update" in groups:
        update = groups["update"]
        size = update["update_rms_per_lr"]
        if "update_rms_intended" in update:  # of weights too coarse to read the applied one back from
            size = update["update_rms_intended"].where(np.isfinite(update["update_rms_intended"]), size)
        add(
            "alignment a",
            "size of the update over the one that an exact polar factor would have (1)",
            update,
            size / update["update_rms_target"],
        )
    for group, quantity, heading in COLUMNS:
        if group in groups and quantity in groups[group]:
            add(heading, DEFINITIONS[quantity], groups[group], groups[group][quantity])
    return Matrices(kinds, found)


def last_recorded(values: np.ndarray) -> np.ndarray:
    """The last finite value along the first axis, NaN where there is none.

    >>> last_recorded(np.array([[1.0, np.nan], [2.0, np.nan], [np.nan, np.nan]])).tolist()
    [2.0, nan]
    """
    known = np.isfinite(values)
    last = len(values) - 1 - known[::-1].argmax(axis=0)
    return np.where(known.any(axis=0), np.take_along_axis(values, last[None], axis=0)[0], np.nan)


def _recorded(run: xr.DataTree, group: str) -> bool:
    return group in run.children and bool(run[group].sizes.get("step")) and bool(run[group].sizes.get("matrix"))


def _kinds(dataset: xr.Dataset) -> pd.DataFrame:
    return pd.DataFrame({name: dataset[name].values for name in ("name", "operator", "layer", "rows", "cols", "optimizer")})


def _placed(dataset: xr.Dataset, values: xr.DataArray, kinds: pd.DataFrame) -> np.ndarray:
    """The last value of each matrix of `dataset`, where it stands in `kinds`."""
    last = pd.Series(last_recorded(values.transpose("step", "matrix").values.astype(np.float64)), index=dataset["name"].values)
    placed: np.ndarray = last[~last.index.duplicated()].reindex(kinds["name"]).to_numpy()
    return placed
