"""What a restarted run held before it went back, against the definition of lineages, record by record."""

import json
import shutil

import numpy as np
import pytest
import xarray as xr
import zarr
from zarr.errors import ZarrUserWarning

from optiscope.analysis import open_run
from optiscope.diagnostics.catalogue import SCHEMA
from optiscope.diagnostics.store.format import seal
from optiscope.diagnostics.store.lineages import lineage_contents

# By place in the run: after which step it was left, and by group its steps, its matrices, its variables beside "size".
PLACES = {
    "": (None, {"update": ([1, 2, 3, 10, 11], 4, ("late",)), "scalars": ([2, 3, 7], 0, ()), "curvature": ([11], 4, ())}),
    "lineages/0": (4, {"update": ([5, 6, 8], 2, ()), "scalars": ([], 0, ())}),
    "lineages/1": (3, {"update": ([4, 5, 30, 31], 3, ()), "scalars": ([4], 0, ())}),
    "lineages/2": (9, {"update": ([20, 21], 4, ("late",)), "scalars": ([12, 13], 0, ()), "curvature": ([], 4, ())}),
}
LEFT = 3


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    path = tmp_path_factory.mktemp("lineages") / "run.zarr"
    generator, listed = np.random.default_rng(0), []
    for place, (after, groups) in PLACES.items():
        for name, (steps, matrices, variables) in groups.items():
            shape, dims = ((len(steps), matrices, 2), ("step", "matrix", "q")) if matrices else ((len(steps),), ("step",))
            data = {key: (dims, generator.normal(size=shape).astype("float32")) for key in ("size", *variables)}
            coordinates = {"step": ("step", np.array(steps, "int64"))}
            if matrices:
                coordinates |= {"name": ("matrix", [f"{i}" for i in range(matrices)]), "rows": ("matrix", 7 + np.arange(matrices))}
            attributes = {"of": f"{place}/{name}"}
            dataset = xr.Dataset(data, coordinates, attributes)
            dataset["name"] = dataset["name"].astype(np.dtypes.StringDType()) if matrices else 0
            dataset.drop_vars([] if matrices else "name").to_zarr(path / place, group=name, mode="a", consolidated=False, zarr_format=3)
        attributes = {"optiscope_schema": SCHEMA, "note": place or "now"}
        if place:
            steps = [step for of, _, _ in groups.values() for step in of]
            records = max(len(of) for of, _, _ in groups.values())
            listed.append({"lineage": int(place[-1]), "after": after, "last_step": max(steps), "records": records})
            attributes |= listed[-1]
        zarr.open_group(path / place).attrs.update(attributes)
        with pytest.warns(ZarrUserWarning, match="Consolidated metadata"):
            zarr.consolidate_metadata(path / place)
    for place in PLACES:
        rewrite(path / place, lambda document: document["attributes"].update({} if place else {"lineages": listed}))  # noqa: B023
    return path


def rewrite(folder, change):
    """Change a document, and seal it again."""
    document = json.loads((folder / "zarr.json").read_text())
    change(document)
    document["attributes"]["checksum"] = seal(document)
    (folder / "zarr.json").write_text(json.dumps(document))


def defined(run, number):
    """The definition word by word: records by group and step as dictionaries of values, of the first matrices."""
    place = f"lineages/{number}" if number < LEFT else ""
    with xr.open_datatree(run / place, engine="zarr") as tree:
        own = {
            group: {int(step): tree[group].to_dataset().sel(step=step).load() for step in steps}
            for group, (steps, _, _) in PLACES[place][1].items()
        }
    if number == LEFT:
        return own
    later = defined(run, number + 1)
    after = PLACES[place][0]
    return {group: {s: d for s, d in later.get(group, {}).items() if s <= after} | records for group, records in own.items()}


@pytest.mark.parametrize("number", [0, 1, 2, 3, None])
def test_a_lineage_is_what_its_definition_says(run, number):
    tree = open_run(run, number)
    number = LEFT if number is None else number
    expected = defined(run, number)
    assert set(tree.children) == set(expected)
    for name, records in expected.items():
        dataset = tree[name].to_dataset()
        steps, matrices, variables = PLACES[f"lineages/{number}" if number < LEFT else ""][1][name]
        assert dataset["step"].values.tolist() == list(records)
        assert list(records)[len(records) - len(steps) :] == steps
        assert set(dataset.data_vars) == {"size", *variables}
        if matrices:
            assert dataset["rows"].values.tolist() == [7 + i for i in range(matrices)]
        for variable in dataset.data_vars:
            values = dataset[variable].values
            want = [record[variable].values[:matrices] if matrices else record[variable].values for record in records.values()]
            assert values.tobytes() == np.array(want, "float32").reshape(values.shape).tobytes()
    assert tree.attrs["note"] == ("now" if number == LEFT else f"lineages/{number}")
    assert tree.attrs["lineage"] == number
    assert [(entry["after"], entry["last_step"], entry["records"]) for entry in tree.attrs["lineages"]] == [
        (4, 8, 3), (3, 31, 4), (9, 21, 2), (None, 11, 5),
    ]  # fmt: skip


def test_parts_are_read_as_they_are_used(run):
    """Whatever is asked for of an array that lies in several places."""
    size = open_run(run, 0)["update"]["size"].variable
    assert not isinstance(size._data, np.ndarray)
    whole = open_run(run, 0)["update"]["size"].values
    assert whole.shape == (7, 2, 2)
    for key in (
        2,
        -1,
        slice(2, 4),
        slice(None, None, -2),
        [5, 0, 3],
        [],
        slice(4, 4),
        (slice(1, 5), 1),
        ([4, 2], [1, 0]),
        (3, slice(None), 0),
    ):
        keys = key if isinstance(key, tuple) else (key,)
        expected = whole
        for axis in reversed(range(len(keys))):
            expected = np.take(expected, np.arange(whole.shape[axis])[keys[axis]], axis)
        assert np.array_equal(size[key].values, expected), key


def test_one_lineage_only(recorded):
    assert "lineages" not in open_run(recorded).attrs
    assert set(open_run(recorded, 0).children) == set(open_run(recorded).children)
    with pytest.raises(ValueError, match=r"^lineage: .*run\.zarr has none of number 1; it has one only, 0$"):
        open_run(recorded, 1)


@pytest.mark.parametrize("number", [4, -1])
def test_a_lineage_that_there_is_not(run, number):
    with pytest.raises(ValueError, match=rf"^lineage: .*run\.zarr has none of number {number}; it has 0 to 3, the newest$"):
        open_run(run, number)


@pytest.mark.parametrize(
    "change",
    [
        lambda listed: listed[1].pop("after"),
        lambda listed: listed[1].update(after=True),
        lambda listed: listed[1].update(after=-1),
        lambda listed: listed[1].update(records="4"),
        lambda listed: listed.pop(1),
    ],
)
def test_a_damaged_list_is_told_of(run, tmp_path, change):
    damaged = shutil.copytree(run, tmp_path / "run.zarr")
    rewrite(damaged, lambda document: change(document["attributes"]["lineages"]))
    with pytest.raises(ValueError, match=r"^run: .*zarr.json: expected lineage"):
        open_run(damaged)


def linked(path):
    path.parent.rename(path.parents[2] / "elsewhere")
    path.parent.symlink_to(path.parents[2] / "elsewhere")


@pytest.mark.parametrize(
    ("change", "why"),
    [
        (lambda path: path.unlink(), "there is no such file"),
        (lambda path: path.write_text(path.read_text().replace('"after": 3', '"after": 2')), "it is not that of the lineage which the run lists"),
        (lambda path: path.write_bytes((path.parents[1] / "0" / "zarr.json").read_bytes()), "it is not that of the lineage which the run lists"),
        (lambda path: path.write_text("[]"), "it is not that of the lineage which the run lists"),
        (lambda path: path.write_text("{"), "expected JSON in UTF-8, got something else"),
        (lambda path: path.write_text(" " * 16_000_001), r"expected at most 1\d,\d{3},\d{3} bytes, got 16,000,001"),
        (linked, "expected a file within the run, got a link"),
    ],
)  # fmt: skip
def test_one_that_is_damaged_is_told_of_by_those_that_need_it(run, tmp_path, change, why):
    damaged = shutil.copytree(run, tmp_path / "run.zarr")
    change(damaged / "lineages" / "1" / "zarr.json")
    for number in (0, 1):
        with pytest.raises(ValueError, match=rf"^run: .*run.zarr: lineages/1/zarr\.json: .*{why}.*; `diag verify` tells what is whole$"):
            open_run(damaged, number)
    for number in (2, 3, None):
        assert open_run(damaged, number).identical(open_run(run, number))


def test_documents_that_are_read_together_are_within_the_bounds_of_one(tmp_path):
    """Eleven lineages, each left before the one before it, of 2,001 nodes each; 20,000 are read together."""
    run = tmp_path / "run.zarr"
    listed = [{"lineage": n, "after": 100 - n, "last_step": 200, "records": 1} for n in range(11)]
    group = {"attributes": {}, "zarr_format": 3, "node_type": "group"}
    for place, attributes in [("", {"lineages": listed}), *((f"lineages/{n}", entry) for n, entry in enumerate(listed))]:
        (run / place).mkdir(parents=True)
        document = {**group, "attributes": {"optiscope_schema": SCHEMA, **attributes}}
        document["consolidated_metadata"] = {"metadata": {f"g{i}": group for i in range(2001 if place else 0)}}
        document["attributes"]["checksum"] = seal(document)
        (run / place / "zarr.json").write_text(json.dumps(document))
    assert sum(len(one.groups) for one in lineage_contents(run, listed[2:])) == 18_009
    with pytest.raises(ValueError, match=r"lineages/9: expected at most 20,000 groups and arrays in lineages that are read together"):
        open_run(run, 0)
