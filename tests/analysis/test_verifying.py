"""`verify` names every kind of damage, and `repair` keeps whatever is whole: against the run as it was before it was damaged."""

import json
import os
import shutil

import numpy as np
import pytest
import xarray as xr

from optiscope.analysis import open_run
from optiscope.diagnostics.store.forking import fork
from optiscope.diagnostics.store.format import seal
from optiscope.diagnostics.store.lock import RunLock
from optiscope.diagnostics.store.repairing import repair
from optiscope.diagnostics.store.verifying import verify
from optiscope.diagnostics.store.writer import Writer

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


def folder(file):
    file.unlink()
    file.mkdir()


def renamed(file):
    document = json.loads(file.read_text())
    file.write_text(json.dumps({**document, "attributes": {**document["attributes"], "units": "m"}}))


def lengthened(file):
    file.write_text(json.dumps({**json.loads(file.read_text()), "x": 1}))


B = "geometry/b/c/2/0"
DAMAGE = {
    # What is done to which file: kind, the steps that are told, what differs afterwards.
    "a flipped bit": (flip, B, "flipped bit", (1280, 1910)),
    "a chunk cut short": (cut, B, "truncated chunk", (1280, 1910)),
    "a chunk that is gone": (gone, B, "missing chunk", (1280, 1910)),
    "a folder in its place": (folder, B, "damaged chunk", (1280, 1910)),
    "an array's metadata": (gone, "geometry/b/zarr.json", "missing metadata", None),
    "an array's metadata, changed": (flip, "geometry/b/zarr.json", "damaged metadata", None),
    "an array's metadata of another unit": (renamed, "geometry/b/zarr.json", "damaged metadata", None),
    "a group's metadata with more in it": (lengthened, "geometry/zarr.json", "damaged metadata", None),
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
    assert spoil is gone or (aside / file).exists()
    assert repair(run) == {"aside": None, "done": []}


def test_lost_documents_of_steps_are_made_again_with_the_root(run, whole):
    """What they say is the same in every run."""
    for file in ("zarr.json", "geometry/step/zarr.json", "curvature/zarr.json"):
        (run / file).unlink()
    repair(run)
    assert not verify(run).damage
    for group in ("geometry", "update", "curvature"):
        assert open_run(run)[group].to_dataset().identical(open_run(whole)[group].to_dataset())


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

    monkeypatch.setattr("optiscope.diagnostics.store.repairing.os.replace", killed)
    with pytest.raises(KeyboardInterrupt):
        repair(run)
    monkeypatch.setattr("optiscope.diagnostics.store.repairing.os.replace", real)
    open_run(run)["geometry"]["a"].load()
    repair(run)
    assert not verify(run).damage
    assert not (run / B).exists()


def test_neighbouring_chunks_that_are_lost_make_one_entry(run):
    """Else a run with many of them would outgrow what its root's document may hold: 9 of 18 chunks of `b`, in three stretches of 64 records each."""
    for chunk in (0, 1, 2, 3, 7, 8, 10, 16, 17):
        flip(run / f"geometry/b/c/{chunk}/0")
    cut(run / "geometry/b/c/9/0")  # of another kind
    repair(run)
    told = [(one["array"], one["kind"], one["steps"]) for one in open_run(run).attrs["damaged"]]
    assert told == [
        ("geometry/b", "flipped bit", [0, 2550]),
        ("geometry/b", "flipped bit", [4480, 5750]),
        ("geometry/b", "flipped bit", [6400, 7030]),
        ("geometry/b", "flipped bit", [10240, 10990]),
        ("geometry/b", "truncated chunk", [5760, 6390]),
    ]
    missing = np.isnan(open_run(run)["geometry"]["b"].values[:, 0]).reshape(-1)
    assert missing.nonzero()[0].tolist() == [*range(256), *range(448, 704), *range(1024, 1100)]


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


def test_a_chunk_that_no_commit_knows_is_not_read(run, whole):
    """What was not written holds missing values, whatever lies in its place."""
    document = json.loads((run / "zarr.json").read_text())
    document["attributes"]["chunks"]["geometry/b"] = "3"
    document["attributes"]["checksum"] = seal(document)
    (run / "zarr.json").write_text(json.dumps(document))
    flip(run / B)
    after = open_run(run)["geometry"]["b"].values
    np.testing.assert_array_equal(after[:128], open_run(whole)["geometry"]["b"].values[:128])
    assert np.isnan(after[128:]).all()
    found = verify(run)
    assert not found.damage
    assert found.harmless == {"chunk after the last commit": 16}


@pytest.mark.parametrize("length", [1, 3, 64])
def test_any_elements_are_read_in_any_order(length):
    """Against NumPy, of positions that are not sorted and come twice."""
    from optiscope.diagnostics.store.reading import _places

    rng = np.random.default_rng(0)
    positions = rng.integers(0, 100, 50)
    found = _places(positions, length)
    assert list(found) == sorted({int(p) // length for p in positions})
    again = np.full(50, -1)
    for number, (there, here) in found.items():
        again[there] = here + number * length
    np.testing.assert_array_equal(again, positions)


def test_what_is_no_run_is_not_verified(tmp_path):
    with pytest.raises(FileNotFoundError, match="nothing found at"):
        verify(tmp_path / "none")
    with pytest.raises(ValueError, match="is not an Optiscope run"):
        verify(tmp_path)
    assert not list(tmp_path.iterdir())


# Lineages: runs of their own, below the run


@pytest.fixture(scope="module")
def forked(whole, tmp_path_factory):
    """The run, left behind records 899 and then 399, 50 records each later."""
    path = shutil.copytree(whole, tmp_path_factory.mktemp("forked") / "run.zarr")
    for after in (8999, 3999):
        writer = Writer(path, {})
        fork(writer, after)
        for step in range(after + 1, after + 501, 10):
            for group in ("geometry", "update", "curvature"):
                writer.append(group, step, {"a": np.full(MATRICES, after), "b": np.full(MATRICES, -after)})
        writer.close()
    return path


LEFT = "lineages/0/zarr.json"
LEFT_DAMAGE = {
    # What is done to which files, and what is told of it.
    "a chunk": ([(flip, "lineages/0/geometry/b/c/1/0")], ["flipped bit"]),
    "its names": ([(flip, "lineages/0/update/name/c/0")], ["flipped bit"]),
    "its document": ([(gone, LEFT)], ["missing metadata"]),
    "its document, changed": ([(lambda file: flip(file, 3000), LEFT)], ["damaged metadata"]),
    "the root's document, cut": ([(cut, "zarr.json")], ["damaged metadata"]),
    "both documents": ([(gone, LEFT), (gone, "zarr.json")], ["missing metadata", "missing metadata"]),
    "the root's, and the last lineage's": ([(gone, "lineages/1/zarr.json"), (cut, "zarr.json")], ["damaged metadata", "missing metadata"]),
}


@pytest.mark.parametrize("case", LEFT_DAMAGE)
def test_each_lineage_is_verified_and_repaired_as_a_run_of_its_own(case, forked, tmp_path):
    run = shutil.copytree(forked, tmp_path / "run.zarr")
    spoiled, kinds = LEFT_DAMAGE[case]
    assert not verify(run).damage
    for how, file in spoiled:
        how(run / file)
    found = verify(run).damage
    assert sorted((one.kind, one.file) for one in found) == sorted(
        zip(kinds, (file for _, file in sorted(spoiled, key=lambda one: one[1] != "zarr.json")), strict=True)
    )
    assert repair(run)["done"]
    assert not verify(run).damage
    for number in (0, 1, None):
        before, after = open_run(forked, number), open_run(run, number)
        assert after.attrs["lineages"] == before.attrs["lineages"]
        for group in before.children:
            for name, variable in before[group].variables.items():
                expected = variable.values.copy()
                if case == "a chunk" and (number, group, name) == (0, "geometry", "b"):
                    expected[964:1028] = np.nan
                np.testing.assert_array_equal(after[group].variables[name].values, expected)
    asides = list((run / ".damaged").iterdir())
    assert all(how is gone or any((aside / file).is_file() for aside in asides) for how, file in spoiled)
    assert repair(run) == {"aside": None, "done": []}
    writer = Writer(run, {})
    assert [path.name for path in sorted((run / "lineages").iterdir())] == ["0", "1"]
    assert writer.last_step == 4490


def test_damage_of_a_lineage_says_its_steps(forked, tmp_path):
    run = shutil.copytree(forked, tmp_path / "run.zarr")
    flip(run / "lineages/0/geometry/b/c/1/0")
    (one,) = verify(run).damage
    assert (one.array, one.steps) == ("lineages/0/geometry/b", (9640, 10270))
    assert open_run(run)["geometry"]["b"].values.size  # what does not need it does not see it
    repair(run)
    assert [entry["array"] for entry in open_run(run, 0).attrs["damaged"]] == ["geometry/b"]


def test_a_lineage_that_is_gone_leaves_the_others(forked, tmp_path):
    run = shutil.copytree(forked, tmp_path / "run.zarr")
    shutil.rmtree(run / "lineages/0")
    assert [one.file for one in verify(run).damage] == [LEFT]
    repair(run)
    assert not verify(run).damage
    assert open_run(run, 1).identical(open_run(forked, 1))
    assert not open_run(run, 0).children


def test_a_lineage_that_is_gone_with_the_root_leaves_the_later_ones(forked, tmp_path):
    """Else the next writer would take them for half a copy, and remove them."""
    run = shutil.copytree(forked, tmp_path / "run.zarr")
    shutil.rmtree(run / "lineages/0")
    (run / "zarr.json").unlink()
    repair(run)
    Writer(run, {}).close()
    assert not verify(run).damage
    found, expected = open_run(run, 1), open_run(forked, 1)
    assert all(found[group].to_dataset().identical(expected[group].to_dataset()) for group in expected.children)


def test_a_lineage_half_copied_is_harmless(forked, tmp_path):
    run = shutil.copytree(forked, tmp_path / "run.zarr")
    shutil.copytree(run / "lineages/0/update", run / "lineages/2/update")
    found = verify(run)
    assert not found.damage
    assert found.harmless["lineage half copied"] == 1
    Writer(run, {})
    assert not (run / "lineages/2").exists()


def test_a_whole_document_of_another_lineage_is_named(forked, tmp_path):
    run = shutil.copytree(forked, tmp_path / "run.zarr")
    document = json.loads((run / LEFT).read_text())
    document["attributes"]["after"] = 7999
    document["attributes"]["checksum"] = seal(document)
    (run / LEFT).write_text(json.dumps(document))
    (one,) = verify(run).damage
    assert (one.kind, one.file, one.why) == ("damaged metadata", LEFT, "it is not that of the lineage which the run lists")


def test_a_root_lost_behind_a_fork_is_made_again_without_what_was_left(whole, tmp_path):
    """Its chunks are still there: records 1,024 to 1,099, of which the second chunk of steps tells."""
    run = shutil.copytree(whole, tmp_path / "run.zarr")
    writer = Writer(run, {})
    fork(writer, 3999)
    for group in ("geometry", "update", "curvature"):
        writer.append(group, 4000, {"a": np.full(MATRICES, 7)})
    writer.flush()
    before = open_run(run)
    assert (run / "update/step/c/1").exists()
    (run / "zarr.json").unlink()
    repair(run)
    after = open_run(run)
    assert not verify(run).damage
    assert after["update"].sizes["step"] == 401
    assert all(after[group].to_dataset().identical(before[group].to_dataset()) for group in before.children)
    assert open_run(run, 0)["update"].to_dataset().identical(open_run(whole)["update"].to_dataset())
