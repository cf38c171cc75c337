"""Runs that a stranger made: each attack is refused in one sentence, within bounds of time and memory, and so is whatever chance makes of a run."""

import json
import os
import re
import shutil
import struct
import subprocess
import sys
from copy import deepcopy
from pathlib import Path

import google_crc32c
import numpy as np
import pytest
from numcodecs.blosc import Blosc
from numcodecs.zstd import Zstd

from optiscope.analysis import check, open_run
from optiscope.analysis.describe import describe
from optiscope.diagnostics.catalogue import EXTRA_DIMENSIONS, GROUPS
from optiscope.diagnostics.store.format import seal

FUZZING = Path(__file__).with_name("fuzzing.py")
CHUNK = "geometry/fro_norm/c/0/0"


def nodes(document):
    return document["consolidated_metadata"]["metadata"]


def edit(change):
    """An attack on the root's document, which is sealed again."""

    def attack(run):
        document = json.loads((run / "zarr.json").read_text())
        change(document)
        document["attributes"]["checksum"] = seal(document)
        (run / "zarr.json").write_text(json.dumps(document))

    return attack


def of_array(change, name="geometry/fro_norm"):
    return edit(lambda document: change(nodes(document)[name]))


def sealed(content):
    return content + struct.pack("<I", google_crc32c.value(content))


def write(key, content):
    return lambda run: (run / key).write_bytes(content)


def both(*attacks):
    return lambda run: [attack(run) for attack in attacks]


def linked(run):
    (run.parent / "secret").write_bytes((run / CHUNK).read_bytes())
    (run / CHUNK).unlink()
    (run / CHUNK).symlink_to(run.parent / "secret")


def linked_folder(run):
    shutil.move(run / "geometry" / "fro_norm", run.parent / "fro_norm")
    (run / "geometry" / "fro_norm").symlink_to(run.parent / "fro_norm")


def pipe(key):
    return lambda run: ((run / key).unlink(), os.mkfifo(run / key))


def sparse(key, size):
    return lambda run: os.truncate(run / key, size)


def longer(dimension, size):
    """All arrays of a group say that they are longer."""

    def change(document):
        for path, node in nodes(document).items():
            if path.startswith("geometry/") and dimension in node["dimension_names"]:
                node["shape"][node["dimension_names"].index(dimension)] = size

    return edit(change)


def as_zstd(content):
    """A chunk as earlier versions had them."""
    return both(
        of_array(lambda node: node.update(codecs=[node["codecs"][0], {"name": "zstd", "configuration": {"level": 0}}])),
        write(CHUNK, content),
    )


def blosc_saying(size):
    content = bytearray(Blosc("zstd").encode(np.zeros(64 * 5)))
    content[4:8] = struct.pack("<I", size)
    return write(CHUNK, sealed(bytes(content)))


def shard(*index):
    codecs = [{"name": "bytes", "configuration": {"endian": "little"}}, {"name": "crc32c"}]

    def change(node):
        inside = {"chunk_shape": [64, 5], "codecs": node["codecs"], "index_codecs": codecs, "index_location": "end"}
        node["chunk_grid"]["configuration"]["chunk_shape"] = [128, 5]
        node["codecs"] = [{"name": "sharding_indexed", "configuration": inside}]

    return both(of_array(change), write(CHUNK, bytes(100) + sealed(np.array(index, "<u8").tobytes())))


def texts(count, length=64):
    return write("geometry/name/c/0", sealed(Blosc("zstd").encode(struct.pack("<I", count) + bytes(length))))


def nested(depth):
    return lambda run: (run / "zarr.json").write_text('{"attributes": {"optiscope_schema": 2, "x": ' + "[" * depth + "]" * depth + "}}")


def many_groups(run):
    node = '"g%d": {"attributes": {}, "zarr_format": 3, "node_type": "group"}'
    groups = ", ".join(node % i for i in range(1_000_000))
    (run / "zarr.json").write_text('{"attributes": {"optiscope_schema": 2}, "consolidated_metadata": {"metadata": {' + groups + "}}}")


def some_groups(document):
    nodes(document).update({f"g{i}": {"attributes": {}, "zarr_format": 3, "node_type": "group"} for i in range(30_000)})


def many_chunks(document):
    """Of one element each, none of which was written: 5·10⁷ in every array."""
    for path, node in nodes(document).items():
        if path.startswith("geometry/") and node["dimension_names"][:1] == ["step"] and path != "geometry/step":
            node["shape"][:2] = [10_000, 5_000]
            node["chunk_grid"]["configuration"]["chunk_shape"] = [1] * len(node["shape"])
            document["attributes"]["chunks"][path] = "0"


def long_groups(document):
    """Ten of as many records as a run may have, in which opening would look for their order."""
    node = deepcopy(nodes(document)["geometry/step"])
    node["shape"] = node["chunk_grid"]["configuration"]["chunk_shape"] = [10_000_000]
    for i in range(10):
        nodes(document)[f"g{i}"], nodes(document)[f"g{i}/step"] = nodes(document)["scalars"], node


def unmapped(document):
    """Chunks of which nothing tells whether they are there, in very many arrays."""
    node = nodes(document)["geometry/fro_norm"]
    node["shape"][1] = 5
    node["chunk_grid"]["configuration"]["chunk_shape"] = [1, 1]
    nodes(document).update({f"geometry/x{i}": node for i in range(10_000)})
    del document["attributes"]["chunks"]


ATTACKS = {
    "a codec that runs code": (of_array(lambda node: node["codecs"].insert(1, {"name": "numcodecs.pickle", "configuration": {}})), "expected the codecs bytes"),
    "another codec": (of_array(lambda node: node["codecs"].__setitem__(1, {"name": "gzip", "configuration": {"level": 1}})), "expected the codecs bytes"),
    "objects": (of_array(lambda node: node.update(data_type="object")), "expected one of the data types"),
    "a type with a configuration": (of_array(lambda node: node.update(data_type={"name": "struct"})), "expected one of the data types"),
    "storage transformers": (of_array(lambda node: node.update(storage_transformers=[{"name": "x"}])), "no storage transformers"),
    "a name that leads out": (edit(lambda d: nodes(d).update({"geometry/../../x": nodes(d)["geometry/fro_norm"]})), "expected names of groups and arrays"),
    "an absolute name": (edit(lambda d: nodes(d).update({"/etc/x": nodes(d)["geometry/fro_norm"]})), "expected names of groups and arrays"),
    "a name with a backslash": (edit(lambda d: nodes(d).update({"geometry/..\\x": nodes(d)["geometry/fro_norm"]})), "expected names of groups and arrays"),
    "a deep name": (edit(lambda d: nodes(d).update({"a/b/c/d/e/f": nodes(d)["geometry/fro_norm"]})), "expected names of groups and arrays"),
    "an array in no group": (edit(lambda d: nodes(d).update({"x/y": nodes(d)["geometry/fro_norm"]})), "in a group of the run"),
    "a chunk that is a link": (linked, "got a link"),
    "a folder that is a link": (linked_folder, "got a link"),
    "a chunk that is a pipe": (pipe(CHUNK), "expected a file, got something else"),
    "metadata that are a pipe": (pipe("zarr.json"), "expected a file, got something else"),
    "a chunk of 1 TB": (sparse(CHUNK, 10**12), "expected at most"),
    "metadata of 1 GB": (sparse("zarr.json", 10**9), "expected at most 16,000,000 bytes"),
    "10¹² elements": (of_array(lambda node: node.update(shape=[12, 10**12])), "whole numbers as shape"),
    "10¹² elements in two dimensions": (of_array(lambda node: node.update(shape=[10**6, 10**6])), "expected at most 100,000 along matrix"),
    "a size of 4,000 digits": (of_array(lambda node: node.update(shape=[10**4000, 5])), "whole numbers as shape"),
    "spectra of 300 values": (longer("quantile", 300), "expected at most 256 along quantile; got 300"),
    "matrices that have no name": (longer("matrix", 90_000), "expected a file, got none"),
    "records that have no step": (longer("step", 1_000_000), "expected steps in ascending order"),
    "more cells than memory": (both(longer("matrix", 100_000), longer("step", 10_000_000)), "records times matrices"),
    "more cells than bytes": (both(longer("matrix", 50_000), longer("step", 2_000)), "files of at least 100,000,000 bytes for as many"),
    "a chunk of 10¹² bytes": (of_array(lambda node: node["chunk_grid"]["configuration"].update(chunk_shape=[64, 2 * 10**9])), "expected chunks of at most"),
    "5·10⁷ chunks": (edit(many_chunks), "expected at most 400,000 chunks"),
    "10⁶ chunks without a map": (edit(unmapped), "expected at most 100,000 chunks of arrays without a map"),
    "steps that are no whole numbers": (of_array(lambda node: node.update(data_type="float64", fill_value="NaN"), "geometry/step"), "expected step, whole numbers along step"),
    "names that are no texts": (of_array(lambda node: node.update(data_type="int64", fill_value=0, codecs=[{"name": "bytes"}, *node["codecs"][1:]]), "geometry/name"), "expected name, texts along matrix"),
    "decisions that say nothing": (edit(lambda d: d["attributes"].update(decisions=[{"step": 1, "optimizer": "Muon", "kind": "keep"}])), "expected decisions to be a list"),
    "events that say nothing": (edit(lambda d: d["attributes"].update(alignment_events=[{"step": 1, "optimizer": "Muon"}])), "expected alignment_events to be a list"),
    "optimizers read by a number": (edit(lambda d: d["attributes"]["optimizers"][0].update(read_by=7)), "expected read_by of an optimizer to be texts"),
    "errors that are no count": (edit(lambda d: d["attributes"].update(errors=[1])), "expected errors to be a count"),
    "layers that are no whole numbers": (of_array(lambda node: node.update(data_type="float32", fill_value="NaN"), "update/layer"), "update/layer: expected whole numbers along matrix"),
    "a quantity of something else": (of_array(lambda node: node.update(dimension_names=["step", "column"]), "update/lr"), "update/lr: expected numbers along step, matrix"),
    "more steps than memory": (edit(long_groups), "expected at most 536,870,912 bytes of steps and names"),
    "a file of names for each": (both(of_array(lambda node: node["chunk_grid"]["configuration"].update(chunk_shape=[1]), "geometry/name"), texts(1, 6_000_000)), "it would become 6,000,004 bytes of"),
    "chunks of nothing": (of_array(lambda node: node["chunk_grid"]["configuration"].update(chunk_shape=[0, 5])), "whole numbers as chunk shape"),
    "lengths that contradict": (of_array(lambda node: node.update(shape=[11, 5])), "as elsewhere in its group"),
    "a million groups": (many_groups, "expected at most 16,000,000 bytes"),
    "30,000 groups": (edit(some_groups), "expected at most 20,000 groups and arrays"),
    "nested 100,000 deep": (nested(100_000), "nested at most 32 deep"),
    "nested 500 deep": (nested(500), "nested at most 32 deep"),
    "a million coefficients": (edit(lambda d: nodes(d)["geometry"]["attributes"].update(ns_schedules=[{"coefficients": [[1, 2, 3]] * 300_000, "eps": 0}])), "at most 1,000,000 lists and objects|at most 100 steps"),
    "a map of a million chunks": (edit(lambda d: d["attributes"]["chunks"].update({"geometry/fro_norm": "f" * 250_000})), "mask of the chunks"),
    "a map of chunks that cannot be": (edit(lambda d: d["attributes"]["chunks"].update({"geometry/fro_norm": "ff"})), "chunks of 'geometry/fro_norm' to have been written"),
    "half a character": (edit(lambda d: d["attributes"].update(created="\ud800")), "expected JSON in UTF-8"),
    "a seal that is of something else": (lambda run: (run / "zarr.json").write_text((run / "zarr.json").read_text().replace("Frobenius", "Probenius")), "its checksum does not match"),
    "a Zstandard bomb": (as_zstd(Zstd().encode(np.zeros(100_000_000, "u1"))), "it would become 100,000,000 bytes of"),
    "a Zstandard bomb of two frames": (as_zstd(Zstd().encode(np.zeros(64 * 5)) + Zstd().encode(np.zeros(100_000_000, "u1"))), "the chunk is damaged"),
    "a Zstandard frame of unknown size": (as_zstd(bytes.fromhex("28b52ffd00580100000000")), "does not say how large it is"),
    "a Blosc bomb": (blosc_saying(2**31 - 20), "it would become 2,147,483,628 bytes of"),
    "a Blosc buffer of negative size": (blosc_saying(2**32 - 1), "it would become"),
    "4·10⁹ texts": (texts(2**32 - 1), "4,294,967,295 texts of 4"),
    "texts longer than their chunk": (both(texts(4), write("geometry/name/c/0", sealed(Blosc("zstd").encode(struct.pack("<2I", 4, 2**32 - 1) + bytes(64))))), "the chunk is damaged"),
    "a shard's chunk outside": (shard(10**6, 50, 2**64 - 1, 2**64 - 1), "within a file of"),
    "a shard's chunk that wraps round": (shard(2**64 - 60, 50, 2**64 - 1, 2**64 - 1), "within a file of"),
    "a shard's chunk of 2⁶³ bytes": (shard(0, 2**63, 2**64 - 1, 2**64 - 1), "expected at most"),
    "a shard cut short": (both(shard(0, 50, 0, 50), write(CHUNK, b"short")), "it is cut short"),
    "a chunk that is gone": (lambda run: (run / CHUNK).unlink(), "expected a file, got none; if the run was written to since"),
    "a flipped bit": (lambda run: write(CHUNK, bytes([(run / CHUNK).read_bytes()[0] ^ 1]) + (run / CHUNK).read_bytes()[1:])(run), "its checksum does not match"),
    "steps before the first": (write("geometry/step/c/0", sealed(Blosc("zstd", typesize=8).encode(np.arange(-1024, 0, dtype="<i8")))), "steps in ascending order from 0 on"),
    "steps that wrap round": (write("geometry/step/c/0", sealed(Blosc("zstd", typesize=8).encode(np.array([*range(10), 2**63 - 1, -(2**63) + 2, *[0] * 1012], "<i8")))), "steps in ascending order from 0 on"),
    "steps out of order": (write("geometry/step/c/0", sealed(Blosc("zstd", typesize=8).encode(np.zeros(1024, "<i8")))), "steps in ascending order"),
}  # fmt: skip


@pytest.fixture(scope="module")
def outcomes(recorded, tmp_path_factory):
    """What comes of each attack, in one process that may not take more than 1.2 GB beyond its libraries, nor 5 s for each."""
    folder, runs = tmp_path_factory.mktemp("hostile"), []
    for number, (attack, _) in enumerate(ATTACKS.values()):
        runs.append(folder / f"{number}" / "run.zarr")
        shutil.copytree(recorded, runs[-1])
        attack(runs[-1])
    done = subprocess.run([sys.executable, FUZZING, "--use", recorded, *runs], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    whole, *found = map(json.loads, done.stdout.splitlines())
    assert whole["outcome"] == "read"
    return dict(zip(ATTACKS, found, strict=True))


@pytest.mark.parametrize("attack", ATTACKS)
def test_an_attack_is_refused_in_a_sentence(attack, outcomes):
    assert outcomes[attack]["outcome"].startswith("run: ")
    assert re.search(ATTACKS[attack][1], outcomes[attack]["outcome"])


def test_matrices_of_which_nothing_says_what_they_are_are_refused_where_they_are_used(recorded, tmp_path):
    run = shutil.copytree(recorded, tmp_path / "run.zarr")
    edit(lambda document: [nodes(document).pop(f"{group}/layer") for group in ("geometry", "update")])(run)
    for use in (describe, check):
        with pytest.raises(ValueError, match=r"run: update: expected what every recorder writes, .* there is no layer"):
            use(open_run(run))


def test_whatever_chance_makes_of_a_run_is_read_or_refused(recorded):
    """60 of the mutations that `fuzzing.py` makes more of; it fails where one takes 5 s or 1.2 GB, or reading raises what is no sentence."""
    done = subprocess.run([sys.executable, FUZZING, "--run", recorded, "--rounds", "60"], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    outcomes = json.loads(done.stdout)["outcomes"]
    # Some do harm and some do none, else nothing was tried.
    assert outcomes["refused"] > 15
    assert outcomes["read"] > 5


def test_metadata_that_hold_anything_are_read_or_refused(recorded):
    """30 of the examples that `metadata_fuzzing.py` makes more of: in each, a repair too ends in a whole run or a sentence, and nothing is written elsewhere."""
    command = [sys.executable, FUZZING.with_name("metadata_fuzzing.py"), "--run", recorded, "--examples", "30"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    outcomes = json.loads(done.stdout)
    assert min(outcomes[kind] for kind in ("refused", "read", "whole after repair")) > 3


def test_a_large_run_of_odd_names_is_no_attack(tmp_path):
    """30,000 records of 2,000 matrices: nothing of it is refused; of its chunks, which are missing values, none is read."""
    from optiscope.diagnostics.store.writer import Writer

    writer = Writer(tmp_path / "run.zarr", {"optimizers": []})
    names = np.array([f"层.{i}.Ωμέγα \u202e'\"<b>.weight" for i in range(2000)], np.dtypes.StringDType())
    sizes = np.full(2000, 4096)
    writer.create_group("geometry", {"name": names, "operator": names, "rows": sizes, "cols": sizes}, {})
    for name, extra in (("sigma_quantile", ("quantile",)), ("fro_norm", ())):
        shape = (2000, *(EXTRA_DIMENSIONS[one] for one in extra))
        writer.create_array("geometry", name, shape, ("matrix", *extra), "float32", {})
    for step in range(30_000):
        writer.append("geometry", step, {})
    writer.flush()
    run = open_run(tmp_path / "run.zarr")
    assert "geometry" in GROUPS
    assert dict(run["geometry"].sizes) == {"step": 30_000, "matrix": 2000, "quantile": 64}
    assert run["geometry"]["name"].values.tolist() == names.tolist()
    assert np.isnan(run["geometry"]["sigma_quantile"][29_999, 1999, :]).all()
