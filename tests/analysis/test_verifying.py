"""`verify` names every kind of damage, and `repair` keeps whatever is whole: against the run as it was before it was damaged."""

import json
import os
import shutil

import numpy as np
import pytest
import xarray as xr

from optiscope.analysis import open_run
from optiscope.analysis.repairing import repair
from optiscope.analysis.verifying import verify
from optiscope.diagnostics.run_lock import RunLock
from optiscope.hooks.writer import Writer

RECORDS, MATRICES = 1100, 3  # two chunks of steps, 18 of all else


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """A run of which every value tells its record: geometry and update recorded together, curvature at other steps."""
    path = tmp_path_factory.mktemp("whole") / "run.zarr"
    writer = Writer(path, {"optimizers": [], "created": "then"})
    names = np.array([f"layers.{i}.weight" for i in range(MATRICES)], np.dtypes.StringDType())
    for group in ("geometry", "update", "curvature"):
        static = {"name": names, "operator": names, "rows": np.arange(MATRICES) + 1, "cols": np.arange(MATRICES) + 2}
        writer.create_group(group, static, {})
        for name in ("a", "b"):
            writer.create_array(group, name, (MATRICES,), ("matrix",), "float64", {})
    for step in range(RECORDS):
        for group, shift in (("geometry", 0), ("update", 0), ("curvature", 5)):
            writer.append(group, 10 * step + shift, {"a": np.full(MATRICES, step), "b": np.full(MATRICES, -step)})
    writer.close()
    return path


@pytest.fixture
def run(whole, tmp_path):
    shutil.copytree(whole, tmp_path / "run.zarr")
    return tmp_path / "run.zarr"


def flip(file, at=20):
    content = bytearray(file.read_bytes())
    content[at] ^= 4
    file.write_bytes(content)


def cut(file):
    file.write_bytes(file.read_bytes()[:-9])


def gone(file):
    file.unlink()


B = "geometry/b/c/2/0"
DAMAGE = {
    # What is done to which file: kind, the steps that are told, what differs afterwards.
    "a flipped bit": (flip, B, "flipped bit", (1280, 1910)),
    "a chunk cut short": (cut, B, "truncated chunk", (1280, 1910)),
    "a chunk that is gone": (gone, B, "missing chunk", (1280, 1910)),
    "an array's metadata": (gone, "geometry/b/zarr.json", "missing metadata", None),
    "an array's metadata, changed": (flip, "geometry/b/zarr.json", "damaged metadata", None),
    "the root's metadata": (gone, "zarr.json", "missing metadata", None),
    "the root's metadata, cut": (cut, "zarr.json", "damaged metadata", None),
    "the root's metadata, changed": (lambda file: flip(file, 3000), "zarr.json", "damaged metadata", None),
    "steps": (flip, "geometry/step/c/0", "flipped bit", None),
    "names": (flip, "update/name/c/0", "flipped bit", None),
}  # fmt: skip


@pytest.mark.parametrize("case", DAMAGE)
def test_damage_is_named_and_what_is_whole_is_kept(case, run, whole):
    spoil, file, kind, steps = DAMAGE[case]
    assert not verify(run).damage
    spoil(run / file)
    found = verify(run).damage
    assert [(one.kind, one.file, one.steps) for one in found] == [(kind, file, steps)]
    done = repair(run)
    assert done["done"]
    assert not verify(run).damage
    before, after, plain = open_run(whole), open_run(run), xr.open_datatree(run, engine="zarr")
    assert after.identical(plain)
    for group in before.children:
        for name, variable in before[group].variables.items():
            expected = variable.values.copy()
            if steps and (group, name) == ("geometry", "b"):
                expected[128:192] = np.nan
            np.testing.assert_array_equal(after[group].variables[name].values, expected)
    # Nothing is deleted: what was damaged is aside, with a list of it.
    aside = next((run / ".damaged").iterdir())
    assert json.loads((aside / "damage.json").read_text())["damage"][0]["file"] == file
    assert spoil is gone or (aside / file).is_file()
    assert repair(run) == {"aside": None, "done": []}


def test_records_whose_steps_are_lost_are_moved_aside_and_later_ones_stay(run, whole):
    """No other group was recorded at the steps of `curvature`."""
    flip(run / "curvature/step/c/0")
    repair(run)
    assert not verify(run).damage
    after = open_run(run)["curvature"]
    assert after.identical(xr.open_datatree(run, engine="zarr")["curvature"])
    assert after.to_dataset().identical(open_run(whole)["curvature"].to_dataset().isel(step=slice(1024, None)).load())


def test_a_group_whose_names_nobody_has_is_moved_aside(run):
    flip(run / "curvature/name/c/0")
    for group in ("geometry", "update"):
        flip(run / group / "name/c/0")
    repair(run)
    assert not verify(run).damage
    assert not open_run(run).children


@pytest.mark.parametrize("renames", [0, 1])
def test_a_repair_that_is_broken_off_is_finished_by_another(renames, run, monkeypatch):
    flip(run / B)
    real, done = os.replace, []

    def killed(source, target):
        if len(done) == renames:
            raise KeyboardInterrupt
        done.append(target)
        real(source, target)

    monkeypatch.setattr("optiscope.analysis.repairing.os.replace", killed)
    with pytest.raises(KeyboardInterrupt):
        repair(run)
    monkeypatch.setattr("optiscope.analysis.repairing.os.replace", real)
    open_run(run)["geometry"]["a"].load()
    repair(run)
    assert not verify(run).damage
    assert not (run / B).exists()


def test_a_run_that_is_written_is_not_repaired(run):
    flip(run / B)
    lock = RunLock(run)
    with pytest.raises(ValueError, match="is being written by process"):
        repair(run)
    lock.release()
    assert not (run / ".damaged").exists()


def test_what_a_killed_writer_leaves_is_harmless(run):
    (run / ".0123.7.partial").write_bytes(b"half")
    shutil.copytree(run / B.removesuffix("/0"), run / "geometry/b/c/99")
    found = verify(run)
    assert not found.damage
    assert found.harmless == {"half-written file": 1, "chunk after the last commit": 1}


def test_what_is_no_run_is_not_verified(tmp_path):
    with pytest.raises(FileNotFoundError, match="nothing found at"):
        verify(tmp_path / "none")
    with pytest.raises(ValueError, match="is not an Optiscope run"):
        verify(tmp_path)
    assert not list(tmp_path.iterdir())
