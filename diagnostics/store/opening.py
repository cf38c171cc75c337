"""Opening a run, the same for whoever does: what its root says, checked, and what tells its records and matrices apart, read."""

from collections.abc import Mapping
from math import prod
from pathlib import Path
from typing import Any

from numpy.typing import NDArray

from .bounds import MAX_UNBACKED_CELLS
from .files import METADATA
from .format import TOP
from .reading import read_all
from .root_document import Contents, contents
from .run_error import RunError

ADVICE = "`diag verify` tells what is whole"


def described(folder: Path, document: Mapping[str, Any]) -> Contents:
    """What the document of the run in `folder` says of it, be it nothing yet.

    Raises:
        RunError: something that a recorder does not write; told without the run.
    """
    found = contents(document)
    if "consolidated_metadata" not in document and has_records(folder):
        raise RunError("it lists no groups, and records lie beside it", file=METADATA)
    return found


def has_records(folder: Path) -> bool:
    """Whether steps of records lie in the folder, whatever its root says."""
    return any(any((folder / group / "step").glob(keys)) for group in TOP for keys in ("c/*", "c.*"))


def labels(folder: Path, found: Contents) -> dict[str, NDArray[Any]]:
    """The steps of all groups, and the names of their matrices, by path of the array.

    Raises:
        RunError: one of them cannot be read, steps do not ascend, or the metadata demand more memory than the files bear out; told without the run.
        OSError: a file cannot be read.
    """
    _refuse_unbacked(folder, found)
    read: dict[str, NDArray[Any]] = {}
    for group in found.groups:
        for name in {"step", "name"} & group.arrays.keys():
            array = group.arrays[name]
            if name == "step" or "matrix" in array.dimensions:
                read[array.path] = read_all(folder, array)
        steps = read.get(f"{group.path}/step")
        if steps is not None and not ascending(steps):
            raise RunError("expected steps in ascending order from 0 on, got others", file=f"{group.path}/step")
    return read


def ascending(steps: NDArray[Any]) -> bool:
    """Whether these can be the steps of a group's records."""
    return bool((steps[:1] >= 0).all() and (steps[1:] > steps[:-1]).all())


def _refuse_unbacked(folder: Path, found: Contents) -> None:
    """Refuse more cells than metadata alone may demand memory for, where the run's files do not hold a byte for each; a recorder writes hundreds."""
    cells = max((prod(array.shape[:2]) for group in found.groups for array in group.arrays.values()), default=0)
    if cells > MAX_UNBACKED_CELLS:
        held = sum(file.lstat().st_size for file in folder.rglob("*"))
        if held < cells:
            raise RunError(f"expected files of at least {cells:,} bytes for as many records times matrices, got {held:,}", file=METADATA)
