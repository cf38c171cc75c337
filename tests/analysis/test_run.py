"""Opening runs: what is readable is read, lazily, and what is not is said in one sentence."""

import json
import shutil
import subprocess
import sys
import warnings
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
import xarray as xr

from optiscope import analysis
from optiscope.analysis import open_run
from optiscope.analysis.findings.update_size import with_alignment
from optiscope.analysis.run import common, median_by, ns_schedules, operators_of, orthogonalised, own_residual, records
from optiscope.analysis.run import recorded as recorded_quantities


def test_a_recorded_run_is_what_plain_xarray_reads(recorded):
    plain = xr.open_datatree(recorded, engine="zarr")
    assert open_run(recorded).identical(plain)
    assert open_run(str(recorded)).identical(plain)
    assert sorted(plain.children) == ["geometry", "scalars", "second_moment", "update"]


def test_built_runs_look_like_recorded_ones(recorded, build_run):
    """Holds the maker of the other tests' runs to what the recorder writes."""
    real, built = open_run(recorded), build_run({"layers.0.attn.q_proj.weight": {"sigma": (2.0, 1.0)}})

    def layout(tree):
        return {
            (group, name): (variable.dims, variable.dtype)
            for group in ("geometry", "update")
            for name, variable in tree[group].to_dataset().variables.items()
        }

    assert layout(built) == layout(real)
    assert built["geometry"].attrs.keys() == real["geometry"].attrs.keys()
    assert ns_schedules(built["geometry"].to_dataset()) == ns_schedules(real["geometry"].to_dataset())


def rewrite(path, change):
    document = json.loads((path / "zarr.json").read_text())
    change(document)
    (path / "zarr.json").write_text(json.dumps(document))


UNREADABLE = {
    "nothing there": (lambda path: shutil.rmtree(path), FileNotFoundError, "nothing found at"),
    "a file": (lambda path: (shutil.rmtree(path), path.write_text("x")), ValueError, "is not an Optiscope run"),
    "an empty folder": (lambda path: (shutil.rmtree(path), path.mkdir()), ValueError, "is not an Optiscope run"),
    "somebody's Zarr group": (lambda path: rewrite(path, lambda d: d.update(attributes={})), ValueError, "is not an Optiscope run"),
    "JSON of another kind": (lambda path: (path / "zarr.json").write_text("[1]"), ValueError, "is not an Optiscope run"),
    "no JSON": (lambda path: (path / "zarr.json").write_bytes(b"\xff{"), ValueError, "is not an Optiscope run"),
    "a newer schema": (lambda path: rewrite(path, lambda d: d["attributes"].update(optiscope_schema=1000)), ValueError, "with schema 1000; this version reads up to "),
    "a schema that is no number": (lambda path: rewrite(path, lambda d: d["attributes"].update(optiscope_schema="1")), ValueError, "is not an Optiscope run"),
    "a schema that is a truth value": (lambda path: rewrite(path, lambda d: d["attributes"].update(optiscope_schema=True)), ValueError, "is not an Optiscope run"),
    "a schema before the first": (lambda path: rewrite(path, lambda d: d["attributes"].update(optiscope_schema=0)), ValueError, "is not an Optiscope run"),
}  # fmt: skip


@pytest.mark.parametrize("case", UNREADABLE)
def test_what_is_no_run_is_named(case, recorded, tmp_path):
    path = tmp_path / "run.zarr"
    shutil.copytree(recorded, path)
    spoil, error, message = UNREADABLE[case]
    spoil(path)
    with pytest.raises(error) as caught:
        open_run(path)
    text = str(caught.value)
    assert text.startswith("run: ")
    assert message in text
    assert str(path) in text
    assert "\n" not in text


def test_a_run_killed_before_its_first_commit_is_empty(recorded, tmp_path):
    shutil.copytree(recorded, tmp_path / "run.zarr")
    rewrite(
        tmp_path / "run.zarr",
        lambda document: (
            document.pop("consolidated_metadata"),
            [document["attributes"].pop(name) for name in ("checksum", "chunks", "writer")],
        ),
    )
    # Steps lie there: it is one that was changed.
    with pytest.raises(ValueError, match=r"zarr\.json: it lists no groups, and records lie beside it; `diag verify` tells what is whole$"):
        open_run(tmp_path / "run.zarr")
    for group in ("geometry", "update", "second_moment", "scalars"):
        shutil.rmtree(tmp_path / "run.zarr" / group / "step" / "c")
    run = open_run(tmp_path / "run.zarr")
    assert not run.children
    assert run.attrs["optimizers"][0]["label"] == "Muon"
    with pytest.raises(ValueError, match=r"^run: no geometry records; to record them, attach with measure=\(…, 'geometry'\)$"):
        records(run, "geometry")


def test_a_run_without_records_has_empty_groups(record, tmp_path):
    run = open_run(record(tmp_path / "run.zarr", steps=0))
    assert run["geometry"].sizes["step"] == run["update"].sizes["step"] == 0
    for group in ("geometry", "update", "scalars"):
        with pytest.raises(ValueError, match=f"no {group} records"):
            records(run, group)


def test_only_what_is_used_is_read(recorded, tmp_path):
    shutil.copytree(recorded, tmp_path / "run.zarr")
    for chunk in (tmp_path / "run.zarr" / "geometry" / "sigma_quantile" / "c").rglob("0"):
        if chunk.is_file():
            chunk.write_bytes(b"unreadable")
    geometry = records(open_run(tmp_path / "run.zarr"), "geometry")
    assert np.isfinite(geometry["condition_number"].values).all()
    with pytest.raises(ValueError, match=r"^run: .*run\.zarr: geometry/sigma_quantile/c/0/0/0: the chunk is damaged \(.*`diag verify`"):
        geometry["sigma_quantile"].load()


def test_records_have_plain_names(recorded):
    dataset = records(open_run(recorded), "geometry")
    for name in ("name", "operator", "optimizer"):
        assert dataset[name].dtype.kind == "U"
    assert operators_of(dataset) == ["attn_q", "mlp_up"]
    assert dataset["name"].values.tolist()[0] == "layers.0.attn.q_proj.weight"


def loaded(code, *arguments):
    """Names of the modules that are loaded after `code` in a fresh interpreter."""
    command = [sys.executable, "-c", f"import sys; {code}; print(*sys.modules)", *arguments]
    return set(subprocess.run(command, capture_output=True, text=True, check=True).stdout.split())


def test_opening_a_run_loads_neither_torch_nor_plotting(recorded):
    modules = loaded("import optiscope.analysis as a; a.open_run(sys.argv[1])['geometry']['condition_number'].load()", str(recorded))
    assert "xarray" in modules
    assert not {"torch", "seaborn", "matplotlib", "scipy"} & modules


def test_the_studies_load_no_torch():
    modules = loaded("from optiscope.analysis import *")
    assert "seaborn" in modules
    assert "torch" not in modules


def test_no_function_of_the_package_is_named_like_a_module():
    # An imported submodule is bound in its package: it would take the function's place.
    folder = Path(analysis.__file__).parent
    assert {name for name in analysis.__all__ if list(folder.rglob(f"{name}.py"))} == {
        name for name in analysis.__all__ if isinstance(getattr(analysis, name), ModuleType)
    }


def test_unknown_names_of_the_package_are_attribute_errors():
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        _ = analysis.nothing


JORDAN, CUBIC = ((3.4445, -4.7750, 2.0315),) * 5, ((1.5, -0.5, 0.0),) * 3


def test_own_residual_follows_the_schedule_in_force(build_run, output):
    sigma = [np.array([1.0, 0.5, 0.1]), np.array([1.0, 0.2, 0.05]), np.array([1.0, 0.9, 0.8])]
    matrices = {
        "layers.0.attn.q_proj.weight": {"sigma": sigma, "schedule": [0, 1, 2]},
        "layers.0.attn.k_proj.weight": {"sigma": [None, *sigma[1:]]},
        "layers.0.attn.v_proj.weight": {"sigma": sigma, "optimizer": "AdamW"},
    }
    geometry = records(build_run(matrices, schedules=(JORDAN, CUBIC, ())), "geometry")
    expected = np.full((3, 3), np.nan)
    for t, (schedule, s) in enumerate(zip((JORDAN, CUBIC, ()), sigma, strict=True)):
        o = output(s / np.linalg.norm(s), schedule)
        expected[t, 0] = np.sqrt(sum((1 - value**2) ** 2 for value in o) / 3)
    for t in (1, 2):
        o = output(sigma[t] / np.linalg.norm(sigma[t]), JORDAN)
        expected[t, 1] = np.sqrt(sum((1 - value**2) ** 2 for value in o) / 3)
    # Stored as float32: 2^-24 relative.
    np.testing.assert_allclose(own_residual(geometry).values, expected, rtol=1e-7)
    assert own_residual(geometry).dims == ("step", "matrix")


def test_own_residual_of_more_steps_than_curves_hold(build_run, output):
    """Curves end at 10 steps; Jordan does not converge, so its residual after 13 is another one."""
    s = np.array([1.0, 0.5, 0.1])
    long = JORDAN[:1] * 13
    geometry = records(build_run({"layers.0.attn.q_proj.weight": {"sigma": s}}, schedules=(long,)), "geometry")
    after = {k: np.sqrt(sum((1 - o**2) ** 2 for o in output(s / np.linalg.norm(s), long[:k])) / 3) for k in (10, 13)}
    assert abs(after[10] - after[13]) > 0.01
    np.testing.assert_allclose(own_residual(geometry).values, after[13], rtol=1e-5)


def test_orthogonalised_leaves_out_what_no_record_orthogonalised(build_run):
    run = build_run(
        {
            "layers.0.attn.q_proj.weight": {"sigma": [None, (2.0, 1.0), None]},
            "layers.0.attn.k_proj.weight": {"sigma": (2.0, 1.0), "optimizer": "AdamW"},
        }
    )
    assert orthogonalised(run)["name"].values.tolist() == ["layers.0.attn.q_proj.weight"]


def test_median_by_is_numpys_quantile_with_gaps():
    rng = np.random.default_rng(0)
    values, labels = rng.standard_normal((40, 12)), np.repeat(["a", "b", "c"], (1, 4, 7))
    values[rng.random(values.shape) < 0.4] = np.nan
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", RuntimeWarning)  # rows without a value
        for q in (0, 0.05, 0.25, 0.5, 0.9, 1):
            expected = np.stack([np.nanquantile(values[:, labels == label], q, axis=1) for label in "abc"], axis=1)
            # Both interpolate linearly, in another order: 2e-16 apart.
            np.testing.assert_allclose(
                median_by(xr.DataArray(values, dims=("step", "matrix")), labels, list("abc"), q), expected, rtol=1e-14
            )
    infinite = xr.DataArray([[1.0, np.inf, np.inf, np.nan]], dims=("step", "matrix"))
    assert median_by(infinite, list("aaaa"), "a")[0, 0] == np.inf


def test_median_by_is_the_quantile_of_each_label():
    values = np.array([[3.0, 1.0, 2.0, np.nan, 9.0], [np.nan, np.nan, np.nan, 4.0, 9.0]])
    found = median_by(xr.DataArray(values, dims=("step", "matrix")), list("aaabc"), ["b", "a"])
    np.testing.assert_array_equal(found, [[np.nan, 2.0], [4.0, np.nan]])
    upper = median_by(xr.DataArray(values, dims=("step", "matrix")), list("aaabc"), ["a"], 0.75)
    np.testing.assert_array_equal(upper, [[2.5], [np.nan]])
    # A label that no matrix has is missing, not an error.
    assert np.isnan(median_by(xr.DataArray(values, dims=("step", "matrix")), list("aaabc"), ["none"])).all()


def test_recorded_quantities_are_those_of_matrices_that_have_them(build_run):
    names = [f"layers.{i}.attn.q_proj.weight" for i in range(3)]
    values = np.array([[0.5, np.nan, np.nan], [0.25, np.nan, 1.0], [np.nan, np.nan, 2.0]])
    run = build_run({name: {"sigma": (2.0, 1.0)} for name in names}, groups={"second_moment": {"block_dispersion": values}})
    found = recorded_quantities(run, "second_moment", "block_dispersion", "block_cosine", otherwise="none")
    assert found["name"].values.tolist() == [names[0], names[2]]
    np.testing.assert_array_equal(found["block_dispersion"].values, values[:, [0, 2]].astype(np.float32))
    # Quantities along a further dimension count where any of it is there, and an index where it points to something.
    cosine, index = np.full((3, 3, 4), np.nan), np.full((3, 3), -1)
    cosine[1, 2, 3], index[0, 1] = 0.5, 0
    run = build_run(
        {name: {"sigma": (2.0, 1.0)} for name in names}, groups={"second_moment": {"block_cosine": cosine, "block_partition": index}}
    )
    for quantity, name in (("block_cosine", names[2]), ("block_partition", names[1])):
        assert recorded_quantities(run, "second_moment", quantity, otherwise="none")["name"].values.tolist() == [name]


def test_what_was_not_recorded_is_told_from_what_no_optimizer_has(build_run):
    matrices = {"layers.0.attn.q_proj.weight": {"sigma": (2.0, 1.0)}}

    def message(run):
        with pytest.raises(ValueError, match=r"^run: ") as caught:
            recorded_quantities(run, "second_moment", "block_dispersion", "block_cosine", otherwise="no optimizer in it keeps one")
        return str(caught.value)

    assert message(build_run(matrices)) == "run: no second_moment records; to record them, attach with measure=(…, 'second_moment')"
    run = build_run(matrices, groups={"second_moment": {}})
    assert message(run) == "run: no optimizer in it keeps one"
    del run["second_moment"]["block_cosine"]
    assert message(run) == (
        "run: recorded by an earlier version, without block_cosine; to record it, attach with measure=(…, 'second_moment')"
    )


def test_common_records_and_matrices_of_groups(build_run):
    names = [f"layers.{i}.attn.q_proj.weight" for i in range(3)]
    run = build_run({name: {"sigma": (2.0, 1.0)} for name in names}, steps=(10, 20, 30))
    geometry = records(run, "geometry").isel(step=[1, 2], matrix=[2, 0])
    update = records(run, "update").isel(step=[0, 1], matrix=[0, 1, 2])
    first, second = common(geometry, update)
    for found in (first, second):
        assert found["step"].values.tolist() == [20]
        assert found["name"].values.tolist() == [names[2], names[0]]
    with pytest.raises(ValueError, match=r"^run: the groups this needs were never recorded together; attach with all of them"):
        common(geometry, update.isel(step=[0]))


def test_only_so_much_of_a_run_is_kept_in_memory(recorded, monkeypatch):
    """All quantities of a group are kept where there is room for them, and are the same where there is not."""

    def kept(run):
        return sum(one.nbytes for one in run["update"].to_dataset().data_vars.values() if isinstance(one.variable._data, np.ndarray))

    whole, little = open_run(recorded), open_run(recorded)
    expected = records(whole, "update")
    assert kept(whole) == sum(variable.nbytes for variable in expected.data_vars.values())
    monkeypatch.setattr("optiscope.analysis.run.ALL_KEPT", kept(whole) // 2)
    assert records(little, "update").identical(expected)
    assert kept(whole) / 3 < kept(little) < kept(whole) / 2


def test_findings_read_a_quantity_once(recorded):
    """What the alignment of updates was made from is the same memory as what the rules see."""
    run = open_run(recorded)
    ready = with_alignment(run)
    for name in ("lr", "update_rms"):
        assert np.shares_memory(run["update"][name].values, ready["update"][name].values)
