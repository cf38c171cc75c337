"""A large run's studies see evenly spread records: which ones, their values, and that it is told."""

import numpy as np
import pytest
import xarray as xr
import zarr
from hypothesis import given
from hypothesis import strategies as st

from optiscope.analysis import evenly_sampled as module
from optiscope.analysis.evenly_sampled import evenly_sampled
from optiscope.analysis.in_parts import windows


def written(path, arrays, chunks, shards=None):
    """A store of groups {group: {name: values}} with a dimension `step` of every group; read lazily."""
    root = zarr.create_group(path, zarr_format=3)
    for group, variables in arrays.items():
        for name, values in variables.items():
            whole = values.ndim == 1
            dims = ("step",) if whole else ("step", "matrix", "quantile")[: values.ndim]
            root.create_array(
                f"{group}/{name}", data=values, dimension_names=dims,
                chunks=values.shape if whole else (*chunks, *values.shape[2:]), shards=None if whole or shards is None else (*shards, *values.shape[2:]),
            )  # fmt: skip
    return xr.open_datatree(path, engine="zarr", chunks=None, cache=False, consolidated=False)


STEPS = np.arange(1, 31) * 10


@pytest.fixture(params=[((4, 5), None), ((12, 2), (12, 6))], ids=["chunks", "shards"])
def arrays_and_run(request, tmp_path, monkeypatch):
    monkeypatch.setattr(module, "CELLS", 35)
    generator = np.random.default_rng(0)
    arrays = {
        "geometry": {"step": STEPS, "x": generator.random((30, 5, 3)), "y": generator.random((30, 5))},
        "update": {"step": STEPS[::2], "z": generator.random((15, 4))},
        "curvature": {"step": STEPS[7:9], "w": generator.random((2, 5))},
        "scalars": {"step": STEPS, "loss": generator.random(30)},
    }
    return arrays, written(tmp_path / "run.zarr", arrays, *request.param)


def test_the_same_steps_of_all_large_groups_and_all_of_the_others(arrays_and_run):
    arrays, run = arrays_and_run
    sampled = evenly_sampled(run)
    # By hand: 35 // 5 = 7 of the 30 steps, every fifth but for rounding; of those update has the odd multiples of ten.
    assert sampled["geometry"]["step"].values.tolist() == [10, 60, 110, 150, 200, 250, 300]
    assert sampled["update"]["step"].values.tolist() == [10, 110, 150, 250]
    assert (sampled["curvature"].sizes["step"], sampled["scalars"].sizes["step"]) == (2, 30)
    assert sampled.attrs[module.TOLD] == "geometry: 7 of 30 records, update: 4 of 15 records"
    for group, variables in arrays.items():
        kept = np.isin(variables["step"], sampled[group]["step"].values)
        for name, values in variables.items():
            assert np.array_equal(sampled[group][name].values, values[kept])


def test_parts_of_an_array_are_read_as_numpy_chooses_them(arrays_and_run):
    _, run = arrays_and_run
    x = evenly_sampled(run)["geometry"]["x"]
    whole = x.values
    for key in (3, -1, slice(2, 6), slice(None, None, 3), np.array([4, 0, 4])):
        assert np.array_equal(x[key].values, whole[key])
    assert np.array_equal(x[2:5, [3, 1], -1].values, whole[2:5][:, [3, 1], -1])
    assert np.array_equal(x.isel(matrix=0, quantile=slice(2)).values, whole[:, 0, :2])


def test_a_small_run_is_itself(arrays_and_run, monkeypatch):
    monkeypatch.setattr(module, "CELLS", 150)
    _, run = arrays_and_run
    assert evenly_sampled(run) is run


@given(st.tuples(*[st.integers(1, 40)] * 4), st.sampled_from([1, 100, 2000]))
def test_windows_are_whole_chunks_that_cover_everything_once(sizes, most):
    steps, matrices, high, wide = sizes
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("optiscope.analysis.in_parts.BYTES", most)
        parts = windows(xr.Variable(("step", "matrix"), np.zeros((steps, matrices)), encoding={"chunks": (high, wide)}))
    seen = np.zeros((steps, matrices), int)
    for part in parts:
        seen[part] += 1
        assert part[0].start % min(high, steps) == 0
        assert part[1].start % min(wide, matrices) == 0
        one_chunk = part[0].stop - part[0].start <= high and part[1].stop - part[1].start <= wide
        assert one_chunk or seen[part].size * 8 <= most
    assert (seen == 1).all()
