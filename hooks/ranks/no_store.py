"""What a rank has that does not write the run: the same lists of matrices as the writer's, and no file."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any, TypeAlias

from numpy.typing import NDArray

from ...diagnostics.store.writer import Row, Writer


class NoStore:
    """A :class:`Writer` for ranks other than the first: what is handed to it is at rank 0, or nobody's."""

    def __init__(self, path: Path, attributes: Mapping[str, Any]) -> None:
        self.path = path
        self.is_new = True
        self.attributes: dict[str, dict[str, Any]] = {"": dict(attributes)}
        self.committed: dict[str, int] = {}
        self.unwritten: set[int] = set()
        self.last_step = 0
        self._arrays: dict[str, set[str]] = {}
        self._coordinates: dict[tuple[str, str], list[Any]] = {}

    def has(self, group: str, name: str | None = None) -> bool:
        """Whether the group was made, or an array of it."""
        return group in self._arrays and (name is None or name in self._arrays[group])

    def create_group(self, name: str, coordinates: Mapping[str, NDArray[Any]], attributes: Mapping[str, Any]) -> None:
        """Know of it, and its coordinates."""
        self.attributes[name] = dict(attributes)
        self._arrays[name] = {"step"}
        for key, values in coordinates.items():
            self.create_coordinate(name, key, values)

    def extend_group(self, name: str, coordinates: Mapping[str, NDArray[Any]]) -> None:
        """Know of more matrices."""
        for key, values in coordinates.items():
            self._coordinates[name, key] = self._coordinates[name, key] + list(values)

    def create_coordinate(self, group: str, name: str, values: NDArray[Any]) -> None:
        """Know its values."""
        self._arrays[group].add(name)
        self._coordinates[group, name] = list(values)

    def create_array(self, group: str, name: str, *description: Any) -> None:
        """Know that it is there."""
        self._arrays[group].add(name)

    def coordinate(self, group: str, name: str) -> list[Any]:
        """Its values."""
        return self._coordinates[group, name]

    def append(self, group: str, step: int, row: Row) -> bool:
        """Nothing; no chunk is full."""
        return False

    def trim(self) -> list[int]:
        """Nothing waits."""
        return []

    def flush(self) -> None:
        """Nothing."""

    close = release = flush

    def lay_out_for_reading(self) -> int:
        """Nothing is laid out."""
        return 0


RunWriter: TypeAlias = Writer | NoStore
