"""Opening a run: only committed records, read lazily."""

from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import xarray as xr
from numpy.typing import NDArray

from ..diagnostics.nan_quantile import nan_quantile
from ..diagnostics.newton_schulz.families import Coefficients
from ..diagnostics.newton_schulz.recorded_spectra import NsSchedule, ns_schedules_of, residual_in_force, residuals_under
from ..diagnostics.operators import ordered
from ..diagnostics.store.lineages import folder_of, lineage_contents
from ..diagnostics.store.opening import ADVICE, described
from ..diagnostics.store.root_document import Contents, read_document
from ..diagnostics.store.run_error import RunError
from .in_parts import windows
from .lazy_arrays import Run
from .lineages import of_lineage

LONG = 1_000  # characters of a name
# Bytes of an array, of one of spectra, up to which it is read once for all studies of an opened run, and of all that are.
KEPT, SPECTRA_KEPT, ALL_KEPT = 20_000_000, 130_000_000, 400_000_000
OF_MATRICES = ("name", "operator", "layer", "rows", "cols", "optimizer")  # coordinates along `matrix` that every recorder writes
# Quantities that runs of all versions hold.
IN_ALL_VERSIONS = {
    "geometry": (
        "sigma_quantile", "condition_number", "condition_is_floor", "stable_rank", "ns_schedule", "ns_residual",
        "ns_residual_achieved",
    ),
    "update": ("lr", "update_rms_per_lr", "update_rms_target", "update_noise"),
}  # fmt: skip
TEXTS = ("name", "operator", "optimizer", "of")  # coordinates along `matrix`


def open_run(path: str | Path, lineage: int | None = None) -> xr.DataTree:
    """The run at `path`: groups `geometry`, `update`, `second_moment` and `scalars`, as far as they were recorded.

    Arrays are read when used, at every use: `records` keeps the small ones. A run that is still being written, or whose writer was killed, shows its committed records;
    open it again to see newer ones.

    Args:
        path: the folder that was passed to `attach`.
        lineage: of a run that was restarted from an earlier checkpoint, a number of what it held before (from 0 on), as the result's attribute
            `lineages` lists them; by default the newest.

    Raises:
        FileNotFoundError: there is nothing at `path`.
        RunError: it is no Optiscope run, one of a newer schema, damaged, or has no such lineage (a ValueError).
    """
    path = Path(path)
    if not path.exists():
        raise FileNotFoundError(f"run: nothing found at {path}; give the folder that was passed to `attach`, for example run.zarr")
    folder = path.resolve()
    try:
        run = of_lineage(_tree(folder, described(folder, read_document(folder))), lineage, partial(_lineages, folder))
    except RunError as error:
        raise error.told(place=path, advice=ADVICE) from error
    except (OSError, ValueError) as error:
        raise RunError(f"cannot be read ({error})", place=path, advice=ADVICE) from error
    run.encoding = {"source": str(folder)}  # where xarray says what a dataset was opened from; schedules name it
    return run


def _tree(folder: Path, found: Contents) -> xr.DataTree:
    return xr.open_datatree(folder, engine=Run, chunks=None, cache=False, of=found)


def _lineages(folder: Path, entries: Sequence[Mapping[str, Any]]) -> list[xr.DataTree]:
    """Those of which the run says `entries`, the first one whole, of the others the groups that it has too."""
    own, *others = lineage_contents(folder, entries)
    names = {group.path for group in own.groups}
    kept = [own, *(Contents({}, tuple(group for group in other.groups if group.path in names)) for other in others)]
    return [_lineage(folder, folder_of(entry), one) for entry, one in zip(entries, kept, strict=True)]


def _lineage(folder: Path, place: str, found: Contents) -> xr.DataTree:
    try:
        return _tree(folder / place, found)
    except RunError as error:
        raise error.told(folder=place) from error


def records(run: xr.DataTree, group: str) -> xr.Dataset:
    """One group of a run, names as plain strings. What has one number per matrix and record is read, once for an opened run; all else when used.

    Raises:
        ValueError: as :func:`unread`.
    """
    dataset = unread(run, group)
    _keep(run, [variable.variable for variable in dataset.data_vars.values() if variable.ndim < 3], KEPT)
    _keep(run, [coordinate.variable for name, coordinate in dataset.coords.items() if coordinate.dtype.kind != "T" or name in TEXTS], KEPT)
    # Zarr gives NumPy's variable-width strings, which few functions take.
    texts = {name: ("matrix", _texts(dataset[name].values.tolist())) for name in TEXTS if name in dataset}
    return dataset.assign_coords(texts) if "matrix" in dataset.dims else dataset


def unread(run: xr.DataTree, group: str) -> xr.Dataset:
    """One group of a run, nothing of it read.

    Raises:
        ValueError: the run has no records of that group, and the text says how to record them; or what every recorder says of matrices is not there.
    """
    dataset = run[group].to_dataset() if group in run.children else xr.Dataset()
    if not dataset.sizes.get("step"):
        raise RunError(f"no {group} records; to record them, {_how_to_record(group)}")
    if "matrix" in dataset.dims:
        _expect(dataset, group, OF_MATRICES)
    return dataset


def whole_records(run: xr.DataTree, group: str) -> xr.Dataset:
    """:func:`records` of a group with what runs of all versions hold in it.

    Raises:
        ValueError: there are none, or something else wrote them.
    """
    dataset = records(run, group)
    _expect(dataset, group, IN_ALL_VERSIONS[group])
    return dataset


def _expect(dataset: xr.Dataset, group: str, names: Sequence[str]) -> None:
    if missing := [name for name in names if name not in dataset.variables]:
        raise RunError(f"{group}: expected what every recorder writes, {', '.join(names)}; there is no {', '.join(missing)}")


def _texts(values: list[str]) -> NDArray[Any]:
    """Strings of one width, or objects where one endless name would make them all as wide."""
    return np.array(values, dtype=object if max(map(len, values), default=0) > LONG else str)


def _keep(run: xr.DataTree, variables: Sequence[xr.Variable], most: int) -> None:
    """Read arrays of up to `most` bytes, and no more than `ALL_KEPT` of a run; a group's dataset shares its variables with the tree, so that the next study need not."""
    kept = sum(one.nbytes for group in run.subtree for one in group.variables.values() if isinstance(one._data, np.ndarray))
    for variable in variables:
        if variable.nbytes > min(most, ALL_KEPT - kept) or isinstance(variable._data, np.ndarray):
            continue
        kept += variable.nbytes
        if variable.nbytes <= KEPT:
            variable.load()
        else:
            # In parts: read at once it would be in memory three times, packed and unpacked too.
            read = np.empty(variable.shape, variable.dtype)
            for window in windows(variable):
                read[window] = variable[window].values
            variable.data = read


def _how_to_record(group: str) -> str:
    return "call recorder.curvature(loss_fn) from time to time" if group == "curvature" else f"attach with measure=(…, {group!r})"


def recorded(run: xr.DataTree, group: str, *names: str, otherwise: str) -> xr.Dataset:
    """Chosen quantities of a group, read, of those matrices for which the first of them was recorded at least once.

    Args:
        run: as from `open_run`.
        group: its name in the catalogue.
        names: of quantities of the group; the first is the one without which there is nothing to study.
        otherwise: why a record may hold none of it, for the message: "no optimizer in it keeps …".

    Raises:
        ValueError: the group was not recorded, or by a version without these quantities, or the first is missing throughout.
    """
    dataset = records(run, group)
    if unknown := [name for name in names if name not in dataset]:
        raise RunError(f"recorded by an earlier version, without {', '.join(unknown)}; to record it, {_how_to_record(group)}")
    dataset = dataset[list(names)].load()
    first = dataset[names[0]]
    there = (first.values >= 0) if first.dtype.kind == "i" else np.isfinite(first.values)
    kept = np.flatnonzero(there.reshape(*first.shape[:2], -1).any(axis=(0, 2)))
    if not len(kept):
        raise RunError(f"{otherwise}")
    return dataset.isel(matrix=kept)


def common(*datasets: xr.Dataset) -> list[xr.Dataset]:
    """Of groups of one run, the records and matrices that all of them have: a run may have been continued with other groups.

    Raises:
        ValueError: there are none.
    """
    steps = [dataset["step"].values.tolist() for dataset in datasets]
    names = [dataset["name"].values.tolist() for dataset in datasets]
    shared = [set(labels[0]).intersection(*labels[1:]) for labels in (steps, names)]
    if not all(shared):
        raise RunError("the groups this needs were never recorded together; attach with all of them in one measure=(…)")
    # In the order of the first, whatever order a later record of the run has.
    matrices = [name for name in names[0] if name in shared[1]]
    chosen = []
    for dataset, own_steps, own_names in zip(datasets, steps, names, strict=True):
        place = {name: i for i, name in enumerate(own_names)}
        kept = [i for i, step in enumerate(own_steps) if step in shared[0]]
        chosen.append(dataset.isel(step=kept, matrix=[place[name] for name in matrices]))
    return chosen


def ns_schedules(geometry: xr.Dataset) -> list[NsSchedule]:
    """The schedules that the variable `ns_schedule` points to."""
    return ns_schedules_of(geometry.attrs.get("ns_schedules", []))


def spectra(run: xr.DataTree) -> xr.Dataset:
    """The group `geometry` of a run that holds at least one spectrum.

    Raises:
        ValueError: it holds none.
    """
    geometry = whole_records(run, "geometry")
    if not np.isfinite(geometry["condition_number"].values).any():
        raise RunError("every recorded NS input is zero or not finite, so there is no spectrum to study; see `diag check`")
    return geometry


def orthogonalised(run: xr.DataTree) -> xr.Dataset:
    """The geometry of those matrices that were orthogonalised in some record.

    Raises:
        ValueError: there are none, or none has a spectrum.
    """
    if "geometry" in run.children:
        whole = run["geometry"].to_dataset()
        _keep(run, [whole[name].variable for name in ("sigma_quantile", "ns_residual") if name in whole], SPECTRA_KEPT)
    geometry = spectra(run)
    used = (geometry["ns_schedule"] >= 0).any("step").values
    if not used.any():
        raise RunError("no optimizer in it orthogonalises (Muon does), so there is no Newton–Schulz residual to study")
    return geometry if used.all() else geometry.isel(matrix=np.flatnonzero(used))


def residual_of_records(geometry: xr.Dataset, coefficients: Coefficients) -> NDArray[np.float64]:
    """Gram residual under `coefficients` of every recorded spectrum, from the stored singular values, shape (step, matrix)."""
    return np.asarray(residuals_of_records(geometry, [coefficients])[0])


def residuals_of_records(geometry: xr.Dataset, schedules: Sequence[Coefficients]) -> NDArray[np.float64]:
    """:func:`residuals_under` of the records of a dataset, shape (schedule, step, matrix)."""
    return residuals_under(geometry["sigma_quantile"].values, ranks(geometry), schedules)


def ranks(geometry: xr.Dataset) -> NDArray[np.integer[Any]]:
    """r = min(rows, cols) of every matrix."""
    return np.asarray(np.minimum(geometry["rows"].values, geometry["cols"].values))


def own_residual(geometry: xr.Dataset) -> xr.DataArray:
    """Predicted Gram residual at the number of steps that was in force, dimensions (step, matrix); missing where not recorded."""
    index, schedules = geometry["ns_schedule"], ns_schedules(geometry)
    # What no schedule is too long for needs no spectrum.
    residual = residual_in_force(geometry["ns_residual"].values, index.values, schedules, geometry["sigma_quantile"], ranks(geometry))
    return xr.DataArray(residual, dims=("step", "matrix"), coords=index.coords)


def betas(run: xr.DataTree) -> dict[str, tuple[float, float]]:
    """β₁ and β₂ of the run's optimizers, by label; only of those that have both, the same in all groups."""
    found = {}
    for optimizer in run.attrs.get("optimizers", []):
        pairs = {tuple(group.get("betas") or ()) for group in optimizer["groups"]}
        if len(pairs) == 1 and len(pair := pairs.pop()) > 1:
            found[optimizer["label"]] = (float(pair[0]), float(pair[1]))
    return found


def operators_of(dataset: xr.Dataset | xr.DataArray) -> list[str]:
    """The operators of a dataset, in the table's order."""
    return ordered(dataset["operator"].values.tolist())


def median_by(values: xr.DataArray, labels: Any, order: Sequence[Any], quantile: float = 0.5) -> NDArray[np.float64]:
    """Quantile over the matrices of each label, missing values left out; `values` (step, matrix) → shape (step, len(order))."""
    return np.stack([nan_quantile(values.values[:, own], quantile) for own in places_of(labels, order)], axis=1)


def places_of(labels: Any, order: Sequence[Any]) -> list[NDArray[np.intp]]:
    """Where each of `order` stands among `labels`, in one pass however many there are.

    >>> [places.tolist() for places in places_of(["a", "b", "a"], ["a", "c"])]
    [[0, 2], []]
    """
    found: dict[Any, list[int]] = {}
    for place, label in enumerate(np.asarray(labels).tolist()):
        found.setdefault(label, []).append(place)
    return [np.array(found.get(label, []), np.intp) for label in order]
