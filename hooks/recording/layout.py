"""How a run is laid out: its groups, arrays and coordinates, from the catalogue and the matrices."""

from collections.abc import Callable, Iterable, Sequence
from copy import deepcopy
from dataclasses import replace
from typing import TYPE_CHECKING, Any, TypeAlias

import numpy as np
from numpy.typing import NDArray

from ...diagnostics.catalogue import (
    DISTRIBUTIONS,
    EXTRA_COORDINATES,
    EXTRA_DIMENSIONS,
    HESSIAN_METHODS,
    PARTITIONS,
    PROBE_SEED,
    SECOND_MOMENT_FORMS,
    Quantity,
    in_group,
)
from ..observing.composites import compose
from ..observing.matrices import Names, coordinates, find_matrices, quantile_levels
from ..observing.matrix import Kind, Matrix
from ..ranks.no_store import RunWriter

if TYPE_CHECKING:
    from ..observing.watched import Watched

# Lists that variables of a group hold indices into.
_ATTRIBUTES: dict[str, dict[str, Any]] = {
    "geometry": {"ns_schedules": []},
    "second_moment": {"forms": list(SECOND_MOMENT_FORMS), "partitions": list(PARTITIONS)},
    "curvature": {
        "methods": list(HESSIAN_METHODS),
        "distributions": list(DISTRIBUTIONS),
        "partitions": list(PARTITIONS),
        "seed": PROBE_SEED,
    },
}

Key: TypeAlias = tuple[str, int, int, str]  # what tells a row of the store: name, rows, cols, optimizer


class Layout:
    """Which row of which group belongs to which matrix.

    Attributes:
        row_of: matrix → row, by group.
    """

    def __init__(self, writer: RunWriter, groups: Iterable[str]) -> None:
        self._writer = writer
        self.row_of: dict[str, dict[Matrix, int]] = {group: {} for group in groups}
        self._keys = {group: _stored_keys(writer, group) for group in self.row_of if writer.has(group)}

    def describes(self, matrices: Sequence[Matrix]) -> bool:
        """Whether the run could be one of these matrices: it holds all of them, or some of them and no other."""
        for group, keys in self._keys.items():
            stored, found = set(keys), {_key(m) for m in matrices if belongs(m, group)}
            if not (stored <= found or found <= stored):
                return False
        return True

    def include(self, matrices: Sequence[Matrix]) -> None:
        """Give every matrix its rows, where there are none adding them to the run, and commit.

        Groups in which no matrix belongs are not made.
        """
        for group, row_of in self.row_of.items():
            wanted = [m for m in matrices if belongs(m, group)]
            keys = self._keys.setdefault(group, [])
            known = set(keys)
            new = [m for m in wanted if _key(m) not in known]
            if new and not self._writer.has(group):
                self._writer.create_group(group, _coordinates(group, new), {})
            elif new:
                # A run of an earlier version has fewer coordinates.
                known_there = {key: values for key, values in _coordinates(group, new).items() if self._writer.has(group, key)}
                self._writer.extend_group(group, known_there)
            keys += map(_key, new)
            if self._writer.has(group):
                self._create_variables(group, len(keys))
                # What a run of an earlier version has stays: its records hold indices into that.
                for name, value in _ATTRIBUTES.get(group, {}).items():
                    self._writer.attributes[group].setdefault(name, deepcopy(value))
            row = {key: i for i, key in enumerate(keys)}
            row_of.update({m: row[_key(m)] for m in wanted})
        if not self._writer.has("scalars"):
            self._writer.create_group("scalars", {}, {})
        self._writer.flush()

    def keep(self, matrices: Iterable[Matrix]) -> None:
        """Forget all other matrices; their rows stay in the run, and records go on knowing theirs."""
        kept = set(matrices)
        self.row_of = {group: {m: row for m, row in row_of.items() if m in kept} for group, row_of in self.row_of.items()}

    def empty_rows(self) -> dict[str, dict[str, NDArray[Any]]]:
        """One record with everything missing, by group."""
        return {
            group: {q.name: np.full(_shape(q, len(self._keys[group])), q.missing, dtype=q.dtype) for q in in_group(group)}
            for group in self.row_of
            if self._keys[group]
        }

    def _create_variables(self, group: str, matrices: int) -> None:
        """Those that the group lacks: all of a new one, those that a run of an earlier version did not have."""
        for quantity in in_group(group):
            if quantity.extra in EXTRA_COORDINATES and not self._writer.has(group, quantity.extra):
                self._writer.create_coordinate(group, quantity.extra, _along(quantity.extra))
            if not self._writer.has(group, quantity.name):
                texts = {"long_name": quantity.long_name, "units": quantity.units, "definition": quantity.definition}
                dimensions = ("matrix",) if quantity.extra is None else ("matrix", quantity.extra)
                shape = _shape(quantity, matrices)
                self._writer.create_array(group, quantity.name, shape, dimensions, quantity.dtype, texts, quantity.missing)


def include_new_parameters(layout: Layout, watched: "Sequence[Watched]", names: Names, turn: Callable[[], None]) -> None:
    """Give parameters that were added to an optimizer, or came with a new one, their rows in the run; `turn` waits until it can be written to."""
    held = {one.label: {id(p) for group in one.optimizer.param_groups for p in group["params"] if p.ndim >= 2} for one in watched}
    for one in watched:
        # What has left the optimizer is let go of; its row is found again by name should it come back. What has another shape is another matrix.
        parts = {m: [part for part in (m, *m.members) if not part.members] for m in one.matrices}
        gone = {m for m, of in parts.items() if any(id(p.parameter) not in held[one.label] or not p.fits(p.parameter) for p in of)}
        if gone:
            one.matrices = [m for m in one.matrices if m not in gone]
    layout.keep(m for one in watched for m in one.matrices)
    known = {id(m.parameter) for one in watched for m in one.matrices}
    if set().union(*held.values()) <= known:
        return
    taken = {m.name for one in watched for m in one.matrices}
    # Numbered names are free again once a parameter has left its group, and so may be two at once.
    found = (m for m in find_matrices(watched, names) if id(m.parameter) not in known)
    new = [replace(m, name=f"{m.name}#2") if m.name in taken else m for m in found]
    before = [m for one in watched for m in one.matrices]
    made = {(m.kind, m.name) for m in before if m.members}
    new += [m for m in compose(watched, [*before, *new], layout.row_of) if (m.kind, m.name) not in made]
    if new:
        turn()
        layout.include(new)
    for one in watched:
        one.matrices = one.matrices + [m for m in new if m.optimizer == one.label]


# Which kinds of matrices the rows of a group are; those of all other groups are parameters' own.
_KINDS: dict[str, tuple[Kind, ...]] = {
    "geometry": ("matrix", "stack"),
    "gradient": ("matrix", "stack"),
    "precision": ("matrix", "stack"),
    "blocks": ("block",),
    "stacking": ("pair",),
}


def belongs(matrix: Matrix, group: str) -> bool:
    """Whether a matrix has a row in the group: spectra are of what has a geometry, everything else of parameters."""
    return matrix.kind in _KINDS.get(group, ("matrix",)) and (matrix.geometry or group not in _KINDS)


def _key(matrix: Matrix) -> Key:
    return matrix.name, matrix.rows, matrix.cols, matrix.optimizer


def _stored_keys(writer: RunWriter, group: str) -> list[Key]:
    names, rows, cols, optimizers = (writer.coordinate(group, name) for name in ("name", "rows", "cols", "optimizer"))
    return [(str(n), int(r), int(c), str(o)) for n, r, c, o in zip(names, rows, cols, optimizers, strict=True)]


def _coordinates(group: str, matrices: Sequence[Matrix]) -> dict[str, NDArray[Any]]:
    along_matrix = coordinates(matrices)
    if group == "blocks":
        along_matrix["of"] = np.array([m.members[0].name for m in matrices], dtype=np.dtypes.StringDType())
    return (
        {**along_matrix, "quantile_level": quantile_levels(matrices)}
        if any(q.extra == "quantile" for q in in_group(group))
        else along_matrix
    )


def _along(dimension: str) -> NDArray[Any]:
    values = EXTRA_COORDINATES[dimension]
    return np.array(values, dtype=np.dtypes.StringDType()) if isinstance(values[0], str) else np.array(values)


def _shape(quantity: Quantity, matrices: int) -> tuple[int, ...]:
    return (matrices,) if quantity.extra is None else (matrices, EXTRA_DIMENSIONS[quantity.extra])
