"""A run that `diag verify` calls damaged is not continued: it is refused in a sentence, and nothing of it changes. Repaired, it goes on."""

import json
import logging
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import zarr
from torch import nn

from optiscope.analysis import open_run
from optiscope.diagnostics.options import Options
from optiscope.diagnostics.store.codecs import encode
from optiscope.diagnostics.store.format import seal
from optiscope.diagnostics.store.repairing import repair
from optiscope.diagnostics.store.run_error import RunError
from optiscope.diagnostics.store.verifying import verify
from optiscope.diagnostics.store.writer import Writer
from optiscope.hooks import attach
from optiscope.hooks.trainers.callback_session import CallbackSession

Attack = Callable[[Path], object]
CHUNK = "update/weight_rms/c/0/0"


def training() -> tuple[nn.Module, torch.optim.Optimizer]:
    model = nn.Linear(4, 3, bias=False)
    model.weight.grad = torch.ones_like(model.weight)
    return model, torch.optim.SGD(model.parameters(), lr=0.1)


def train(path: Path, steps: int, **options: Any) -> None:
    model, optimizer = training()
    with attach(optimizer, model, path, every=1, on_error="raise", measure=["update", "second_moment"], **options) as recorder:
        for _ in range(steps):
            optimizer.step()
            recorder.log(loss=float(recorder.step))


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Five records, after a training that was restarted after the third of eight."""
    path = tmp_path_factory.mktemp("whole") / "run.zarr"
    train(path, 8)
    train(path, 2, first_step=3)
    return path


@pytest.fixture
def run(whole: Path, tmp_path: Path) -> Path:
    return shutil.copytree(whole, tmp_path / "run.zarr")


def nodes(document: Any) -> Any:
    return document["consolidated_metadata"]["metadata"]


def edit(change: Callable[[Any], object], *, sealed: bool = False, file: str = "zarr.json") -> Attack:
    def attack(run: Path) -> None:
        document = json.loads((run / file).read_text())
        change(document)
        if sealed:
            document["attributes"]["checksum"] = seal(document)
        (run / file).write_text(json.dumps(document))

    return attack


def records(group: str, count: int, but: str = "") -> Callable[[Any], None]:
    """The arrays of a group say so many records."""

    def change(document: Any) -> None:
        for path, node in nodes(document).items():
            if path.startswith(f"{group}/") and node["dimension_names"][:1] == ["step"] and path != but:
                node["shape"][0] = count

    return change


def without(*names: str) -> Callable[[Any], None]:
    def change(document: Any) -> None:
        for name in names:
            (document if name in document else document["attributes"]).pop(name)

    return change


def flip(file: str) -> Attack:
    def attack(run: Path) -> None:
        content = bytearray((run / file).read_bytes())
        content[len(content) // 2] ^= 4
        (run / file).write_bytes(content)

    return attack


def gone(file: str) -> Attack:
    return lambda run: (run / file).unlink()


def steps(*values: int) -> Attack:
    """In the place of the update group's."""
    padded = np.array([*values, *[-1] * (1024 - len(values))])
    return lambda run: (run / "update/step/c/0").write_bytes(encode(padded))


# What is done to the run, and what is said of it.
DAMAGE: dict[str, tuple[Attack, str]] = {
    "three of five records": (edit(records("update", 3)), "zarr.json: its checksum does not match"),
    "three records, and no checksum": (edit(lambda d: (records("update", 3)(d), without("checksum")(d))), "zarr.json: it has no checksum"),
    "no checksum": (edit(without("checksum")), "zarr.json: it has no checksum"),
    "no groups": (edit(without("consolidated_metadata")), "zarr.json: its checksum does not match"),
    "no groups, no checksum": (edit(without("consolidated_metadata", "checksum")), "zarr.json: it has no checksum"),
    "no groups, as before the first commit": (
        edit(without("consolidated_metadata", "checksum", "chunks", "writer")), "zarr.json: it lists no groups, and records lie beside it"
    ),
    "an array shorter than its group": (edit(records("update", 3, but="update/step"), sealed=True), "along step as elsewhere in its group, got"),
    "fewer scalars than told": (edit(records("scalars", 9), sealed=True), "scalars/step: expected steps in ascending order"),
    "no root": (gone("zarr.json"), "is not an Optiscope run (there is no zarr.json in it)"),
    "an empty root": (lambda run: (run / "zarr.json").write_text(""), "is not an Optiscope run (expected JSON in UTF-8, got an empty file)"),
    "half a root": (lambda run: (run / "zarr.json").write_bytes((run / "zarr.json").read_bytes()[:999]), "is not an Optiscope run (expected JSON"),
    "a root of something else": (lambda run: (run / "zarr.json").write_text("{}"), "is not an Optiscope run"),
    "steps that are gone": (gone("update/step/c/0"), "update/step/c/0: expected a file, got none"),
    "steps of another bit": (flip("update/step/c/0"), "update/step/c/0: the chunk is damaged"),
    "steps out of order": (steps(1, 2, 4, 3, 5), "update/step: expected steps in ascending order from 0 on"),
    "steps that are too few": (steps(1, 2, 3), "update/step: expected steps in ascending order from 0 on"),
    "names of another bit": (flip("update/name/c/0"), "update/name/c/0: the chunk is damaged"),
    "sizes of another bit": (flip("update/rows/c/0"), "update/rows/c/0: the chunk is damaged"),
    "the chunk that it goes on in, gone": (gone(CHUNK), f"{CHUNK}: expected a file, got none"),
    "the chunk that it goes on in, of another bit": (flip(CHUNK), f"{CHUNK}: the chunk is damaged"),
    "a lineage's document, gone": (gone("lineages/0/zarr.json"), "lineages/0/zarr.json: there is no such file"),
    "a lineage's document, changed": (edit(records("update", 1), file="lineages/0/zarr.json"), "lineages/0/zarr.json: its checksum does not match"),
    "a lineage that is gone": (lambda run: shutil.rmtree(run / "lineages/0"), "lineages/0/zarr.json: there is no such file"),
    "a lineage that is no longer listed": (edit(without("lineages")), "zarr.json: its checksum does not match"),
}  # fmt: skip


def content(run: Path) -> dict[str, bytes]:
    """Every file; what says who writes is no part of a run."""
    return {file.relative_to(run).as_posix(): file.read_bytes() for file in run.rglob("*") if file.is_file() and file.name != ".lock"}


@pytest.mark.parametrize("case", DAMAGE)
def test_what_is_damaged_is_refused_and_stays_as_it_is(case: str, run: Path, whole: Path) -> None:
    attack, says = DAMAGE[case]
    attack(run)
    before = content(run)
    model, optimizer = training()
    for first_step in (None, 4):  # going on, and going back
        with pytest.raises(RunError) as refused:
            attach(optimizer, model, run, every=1, first_step=first_step)
        assert str(refused.value).startswith(f"store: {run}")
        assert says in str(refused.value)
        assert str(refused.value).endswith(f"; `diag verify --repair {run}` saves what can be saved of it, or record to another path")
        assert (refused.value.subject, refused.value.place) == ("store", run)
        assert content(run) == before
    assert not optimizer._optimizer_step_pre_hooks
    assert verify(run).damage
    # What the sentence says to do helps.
    repair(run)
    assert not verify(run).damage
    # Steps in disorder are nobody's: their group is aside.
    kept = 0 if case in ("steps out of order", "steps that are too few") else 5
    assert [group.sizes["step"] for name, group in open_run(run).children.items() if name == "update"] == [kept] * bool(kept)
    train(run, 2)
    assert not verify(run).damage
    assert open_run(run)["update"].sizes["step"] == kept + 2


def test_records_that_the_root_no_longer_tells_of_are_not_lost(run: Path) -> None:
    """Against plain Zarr, which reads an array's chunks whatever the root says."""
    held = np.asarray(zarr.open_array(run / "update" / "weight_rms", mode="r")[:])
    edit(records("update", 3))(run)
    with pytest.raises(ValueError, match="diag verify --repair"):
        train(run, 2)
    repair(run)
    train(run, 2)
    np.testing.assert_array_equal(open_run(run)["update"]["weight_rms"].values[:5], held)
    assert open_run(run)["update"]["step"].values.tolist() == [1, 2, 3, 4, 5, 6, 7]


@pytest.mark.parametrize(
    "case", ["three of five records", "no groups, as before the first commit", "no root", "half a root", "steps that are gone"]
)
def test_a_trainer_which_cannot_ask_goes_on_beside_it(case: str, run: Path, caplog: pytest.LogCaptureFixture) -> None:
    DAMAGE[case][0](run)
    before = content(run)
    model, optimizer = training()
    session = CallbackSession(run, Options(every=1, measure=["update"], on_error="raise"))
    with caplog.at_level(logging.WARNING, logger="optiscope"):
        session.begin(optimizer, model, 5)
    assert session.recorder is not None
    assert session.recorder.store == run.with_name("run-2.zarr").resolve()
    [message] = [record.getMessage() for record in caplog.records]
    assert message.startswith(f"optiscope: recording to {run.with_name('run-2.zarr')}, because {run} cannot be continued (store: {run}")
    optimizer.step()
    session.end()
    assert open_run(run.with_name("run-2.zarr"))["update"]["step"].values.tolist() == [6]
    assert content(run) == before


def test_a_compacted_run_is_looked_at_before_it_is_laid_out_anew(tmp_path: Path) -> None:
    """A bit of its first shard: no array has been laid out for writing when it is refused."""
    path = tmp_path / "run.zarr"
    train(path, 1100)
    shards = [file for file in path.rglob("c.0.0*") if file.is_file()]
    assert len(shards) > 5
    for shard in (min(shards), max(shards)):
        whole = shard.read_bytes()
        flip(str(shard.relative_to(path)))(path)
        before = content(path)
        with pytest.raises(RunError, match=r"the chunk is damaged .*; `diag verify --repair "):
            Writer(path, {})
        assert content(path) == before
        shard.write_bytes(whole)
    Writer(path, {})
    assert not list(path.rglob("c.0.0*"))


def test_a_record_that_is_to_be_left_and_is_damaged_is_refused(tmp_path: Path) -> None:
    """Chunks that going on would not read, going back has to."""
    path = tmp_path / "run.zarr"
    train(path, 200)
    flip("update/weight_rms/c/1/0")(path)
    before = content(path)
    with pytest.raises(RunError, match=r"c/1/0: the chunk is damaged .*; `diag verify --repair "):
        train(path, 1, first_step=70)
    assert content(path) == before
    train(path, 1)
    assert [one.file for one in verify(path).damage] == ["update/weight_rms/c/1/0"]


def test_what_was_written_otherwise_is_laid_out_anew(run: Path) -> None:
    """A whole run whose arrays somebody has packed by Zstandard in chunks of seven records: a writer that wrote into these would mix two forms."""
    before = open_run(run).load()
    file = run / "update/weight_rms"
    values = np.asarray(zarr.open_array(file, mode="r")[:])
    shutil.rmtree(file)
    odd = zarr.create_array(
        file, shape=values.shape, chunks=(7, 1), dtype=values.dtype, compressors=[zarr.codecs.ZstdCodec()], fill_value=np.nan, dimension_names=("step", "matrix")
    )  # fmt: skip
    odd[:] = values
    own = json.loads((file / "zarr.json").read_text())

    def change(document: Any) -> None:
        nodes(document)["update/weight_rms"].update({key: own[key] for key in ("codecs", "chunk_grid", "chunk_key_encoding")})

    edit(change, sealed=True)(run)
    (file / "zarr.json").write_text(json.dumps(nodes(json.loads((run / "zarr.json").read_text()))["update/weight_rms"]))
    assert not verify(run).damage
    train(run, 70)
    after = open_run(run)
    assert not verify(run).damage
    assert after["update"].to_dataset().isel(step=slice(0, 5)).load().identical(before["update"].to_dataset())
    assert np.isfinite(after["update"]["weight_rms"].values).all()
    assert after["update"].sizes["step"] == 75
