"""The store on the writing side: one Zarr v3 group per run, appended in whole chunks, committed by one atomic write.

The commit rule. Arrays of a flush are written first. Then the root's consolidated metadata, which carries the shape of
every array, is replaced by one rename. Readers that open the run through it (plain xarray does) see either all arrays
of a flush or none; what a killed process wrote after the last commit lies outside every committed shape, and the next
writer writes over it.
"""

import json
import os
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any
from uuid import uuid4

import numpy as np
import zarr
from numpy.typing import NDArray

from ..diagnostics.catalogue import SCHEMA
from ..diagnostics.run_format import newer_schema, schema_of
from ..diagnostics.run_lock import LOCK_FILES, RunLock

Row = Mapping[str, NDArray[Any] | float]

CHUNK_STEPS = 64
SCALAR_CHUNK_STEPS = 1024


class TakenOver(RuntimeError):
    """Another writer has taken the run over."""


class Writer:
    """Appends records to one run. Rows are buffered until :meth:`flush`; :attr:`committed` counts those on disk per group."""

    def __init__(self, path: str | Path, attributes: Mapping[str, Any], lock: RunLock | None = None) -> None:
        """Open the run at `path`, making it if nothing is there; `lock` is kept until :meth:`release`.

        Raises:
            ValueError: `path` holds something else, or a run of another schema version.
        """
        self._lock = lock
        self.path = Path(path)
        self.is_new = nothing_or_a_run(self.path)
        if self.is_new:
            _clear(self.path)
            self._root = zarr.create_group(store=self.path, zarr_format=3, attributes={"optiscope_schema": SCHEMA, **attributes})
        else:
            self._root = _open_run(self.path)
        # Attributes by group, "" the run's own: changed in memory, written by the next commit.
        self.attributes: dict[str, dict[str, Any]] = {"": dict(self._root.attrs)}
        self._writers = (self.attributes[""].get("writer"), uuid4().hex)  # whoever wrote last, and this one
        self.attributes[""]["writer"] = self._writers[1]
        self._groups: dict[str, dict[str, zarr.Array[Any]]] = {}
        self._static: dict[str, set[str]] = {}
        self._pending: dict[str, list[tuple[int, Row]]] = {}
        self.committed: dict[str, int] = {}
        # Never a listing of the folder: zarr warns of every file that it does not know, the lock's for one.
        for name, group in () if self.is_new else self._root.groups():
            arrays = dict(group.arrays())
            self._adopt(name, dict(group.attrs), arrays)
            # A writer killed in a flush leaves arrays that are longer than committed; back to what is committed.
            for key, array in arrays.items():
                if _metadata(self.path / name / key)["shape"] != list(array.shape):
                    array.resize(array.shape)
        # From here on as it is on disk: the consolidated metadata knows nothing of what is added.
        self._root = zarr.open_group(self.path, mode="r+", zarr_format=3, use_consolidated=False)

    def create_group(self, name: str, coordinates: Mapping[str, NDArray[Any]], attributes: Mapping[str, Any]) -> None:
        """Add a group of records with static coordinates along `matrix` (and `quantile`, where two-dimensional).

        Coordinates along other dimensions are added by :meth:`create_coordinate`.

        Raises:
            TakenOver: as in :meth:`flush`.
        """
        self._check_ours()
        # Read by xarray as the names of its non-index coordinates.
        declared = {"coordinates": " ".join(coordinates)} if coordinates else {}
        group = self._root.create_group(name, attributes={**attributes, **declared}, overwrite=True)
        arrays = {
            key: group.create_array(key, data=values, dimension_names=("matrix", "quantile")[: values.ndim])
            for key, values in coordinates.items()
        }
        arrays["step"] = group.create_array(
            "step", shape=(0,), chunks=(SCALAR_CHUNK_STEPS,), dtype="int64", dimension_names=("step",), fill_value=-1,
            attributes={"long_name": "optimizer steps taken", "units": "1"},
        )  # fmt: skip
        self._adopt(name, {**attributes, **declared}, arrays)

    def extend_group(self, name: str, coordinates: Mapping[str, NDArray[Any]]) -> None:
        """Add matrices to a group; earlier records hold missing values for them.

        A reader goes on seeing the committed shapes, and no value within them changes, until the next commit.

        Raises:
            TakenOver: as in :meth:`flush`.
        """
        self._check_ours()
        along_matrix: list[Any] = [self._root[f"{name}/{key}"] for key in coordinates]
        records: list[Any] = [array for array in self._groups[name].values() if array.ndim > 1]
        shapes = [array.shape for array in (*along_matrix, *records)]
        try:
            for coordinate, values in zip(along_matrix, coordinates.values(), strict=True):
                before = coordinate.shape[0]
                coordinate.resize((before + len(values), *coordinate.shape[1:]))
                coordinate[before:] = values
            for array in records:
                array.resize((array.shape[0], array.shape[1] + len(values), *array.shape[2:]))
        except BaseException:
            # All or none: the next commit takes every array at the length it then has.
            for array, shape in zip((*along_matrix, *records), shapes, strict=True):
                array.resize(shape)
            raise

    def create_coordinate(self, group: str, name: str, values: NDArray[Any]) -> None:
        """Add a static coordinate along the dimension of its own name."""
        self._root[group].create_array(name, data=values, dimension_names=(name,), overwrite=True)  # type: ignore[union-attr]
        self._static[group].add(name)

    def create_array(
        self,
        group: str,
        name: str,
        shape: tuple[int, ...],
        dimensions: tuple[str, ...],
        dtype: str,
        attributes: Mapping[str, Any],
        missing: float = float("nan"),
    ) -> None:
        """Add a variable of `shape` and `dimensions` after `step`; `missing` for records already there."""
        self._groups[group][name] = self._root[group].create_array(  # type: ignore[union-attr]
            name, shape=(self.committed[group], *shape), chunks=(_chunk_steps(group), *(max(size, 1) for size in shape)),
            dtype=dtype, fill_value=missing, dimension_names=("step", *dimensions), attributes=dict(attributes), overwrite=True,
        )  # fmt: skip

    def coordinate(self, group: str, name: str) -> list[Any]:
        """A static coordinate of a group, as a list."""
        return list(np.asarray(self._root[group][name][:]))  # type: ignore[index]

    def has(self, group: str, name: str | None = None) -> bool:
        """Whether the run has the group, or the group the variable."""
        return group in self._groups and (name is None or name in self._groups[group] or name in self._static[group])

    @property
    def last_step(self) -> int:
        """Largest step of any record, committed or pending; 0 for an empty run."""
        pending = [rows[-1][0] for rows in self._pending.values() if rows]
        return max([*map(self._last_committed, self._groups), *pending, 0])

    def _last_committed(self, group: str) -> int:
        """Step of the group's last committed record, −1 where there is none."""
        last = self.committed[group] - 1
        return int(np.asarray(self._groups[group]["step"][last])) if last >= 0 else -1

    def append(self, group: str, step: int, row: Row) -> bool:
        """Buffer one record; true when the group's buffer now ends a chunk and is best flushed.

        A further row of the group's last step is merged with the one there, so that steps stay unique.
        """
        pending = self._pending[group]
        if not pending and self._last_committed(group) == step:
            last = self.committed[group] - 1
            pending.append((step, {key: np.asarray(array[last]) for key, array in self._groups[group].items() if key != "step"}))
            self.committed[group] = last  # taken back into the buffer; on disk it stays until it is written anew
        if pending and pending[-1][0] == step:
            pending[-1] = (step, {**pending[-1][1], **row})
        else:
            pending.append((step, row))
        return (self.committed[group] + len(self._pending[group])) % _chunk_steps(group) == 0

    def flush(self) -> None:
        """Write what is buffered and commit it. Where that fails, nothing is committed and the buffer is kept.

        Raises:
            TakenOver: another writer has committed to the run since; going on would undo what it committed.
        """
        self._check_ours()
        written = {name: len(rows) for name, rows in self._pending.items()}
        for name, count in written.items():
            if count:
                self._write(name, self._pending[name])
        self._commit()
        for name, count in written.items():
            # In one statement, so that an interrupt cannot fall between and make the next flush write rows twice.
            self.committed[name], self._pending[name] = self.committed[name] + count, self._pending[name][count:]

    def _check_ours(self) -> None:
        if _metadata(self.path)["attributes"].get("writer") not in self._writers:
            raise TakenOver(f"{self.path} is now written by another recorder")

    def release(self) -> None:
        """Give the lock of the run back, where it was given one: another recorder may write."""
        if self._lock is not None:
            self._lock.release()

    def trim(self) -> int:
        """Drop the oldest of what is buffered beyond 4 chunks a group, for a store that cannot be written; how many records."""
        dropped = 0
        for name, rows in self._pending.items():
            excess = max(0, len(rows) - 4 * _chunk_steps(name))
            del rows[:excess]
            dropped += excess
        return dropped

    def _adopt(self, name: str, attributes: dict[str, Any], arrays: "dict[str, zarr.Array[Any]]") -> None:
        self.attributes[name] = attributes
        # Static coordinates have no step dimension and take no part in appending.
        self._groups[name] = {key: array for key, array in arrays.items() if "step" in (array.metadata.dimension_names or ())}  # type: ignore[union-attr]
        self._static[name] = arrays.keys() - self._groups[name].keys()
        self._pending[name] = []
        self.committed[name] = int(self._groups[name]["step"].shape[0])

    def _write(self, name: str, rows: list[tuple[int, Row]]) -> None:
        start = self.committed[name]
        stop = start + len(rows)
        for key, array in self._groups[name].items():
            block = np.full((len(rows), *array.shape[1:]), array.fill_value, dtype=array.dtype)
            for i, (step, row) in enumerate(rows):
                if key == "step":
                    block[i] = step
                elif key in row:
                    value = np.asarray(row[key])
                    within: tuple[int | slice, ...] = (i, *(slice(size) for size in value.shape))
                    block[within] = value  # a row may be from before matrices were added
            array.resize((stop, *array.shape[1:]))
            array[start:stop] = block

    def _commit(self) -> None:
        # What `zarr.consolidate_metadata` writes, without its warning that the format may change: silencing that
        # would reset the warning filters of the training process at every flush.
        nodes: dict[str, Any] = {}
        for name in sorted(self._groups):
            folder = self.path / name
            group = {**_metadata(folder), "attributes": self.attributes[name]}
            _replace(folder / "zarr.json", group)
            nodes[name] = {**group, "consolidated_metadata": _consolidated({})}
            # Not whatever lies in the folder: a killed writer may have left a variable it did not commit.
            for child in sorted(self._static[name] | self._groups[name].keys()):
                nodes[f"{name}/{child}"] = _metadata(folder / child)
        root = {**_metadata(self.path), "attributes": self.attributes[""], "consolidated_metadata": _consolidated(nodes)}
        _replace(self.path / "zarr.json", root)


def _chunk_steps(group: str) -> int:
    return SCALAR_CHUNK_STEPS if group == "scalars" else CHUNK_STEPS


def _consolidated(nodes: dict[str, Any]) -> dict[str, Any]:
    return {"kind": "inline", "must_understand": False, "metadata": nodes}


def _metadata(node: Path) -> dict[str, Any]:
    document: dict[str, Any] = json.loads((node / "zarr.json").read_text(encoding="utf-8"))
    return document


def _replace(target: Path, document: dict[str, Any]) -> None:
    partial = target.with_suffix(".json.partial")
    partial.write_text(json.dumps(document), encoding="utf-8")
    os.replace(partial, target)


def nothing_or_a_run(path: Path) -> bool:
    """Whether a run is to be made at `path`, rather than continued: there is nothing, or one whose writer was killed before its first commit.

    Raises:
        ValueError: it holds something else, or a run that this version cannot continue.
    """
    if not path.exists() or (path.is_dir() and all(entry.name in LOCK_FILES or entry.suffix == ".partial" for entry in path.iterdir())):
        return True
    try:
        document = _metadata(path)
        attributes = document["attributes"]
    except (OSError, ValueError, KeyError, TypeError):
        attributes = None
    schema = schema_of(attributes)
    if schema is None:
        raise ValueError(f"store: {path} exists and is not an Optiscope run; choose another path")
    if newer := newer_schema(attributes):
        raise ValueError(f"store: {path} {newer}, or choose another path")
    if schema != SCHEMA:
        raise ValueError(f"store: {path} has schema {schema!r}, this version appends to schema {SCHEMA}; choose another path")
    return "consolidated_metadata" not in document


def _clear(path: Path) -> None:
    """Take away what a writer left that was killed before its first commit; the lock is ours by now."""
    for entry in path.iterdir() if path.exists() else ():
        if entry.name not in LOCK_FILES:
            shutil.rmtree(entry) if entry.is_dir() else entry.unlink()


def _open_run(path: Path) -> "zarr.Group":
    try:
        root = zarr.open_group(path, mode="r+", zarr_format=3)
    except (FileExistsError, FileNotFoundError, NotADirectoryError, ValueError):
        raise ValueError(f"store: {path} exists and is not an Optiscope run; choose another path") from None
    # A killed writer leaves the temporary file of the write it was in.
    for partial in path.rglob("*.partial"):
        partial.unlink()
    return root
