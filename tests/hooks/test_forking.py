"""A run that goes back: what it held stays to be read, exactly, whatever cuts the going back off."""

import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from contextlib import suppress
from copy import deepcopy
from pathlib import Path
from typing import Any

import forked_runs
import numpy as np
import pytest
import torch
import xarray as xr
from forked_runs import MATRICES, begin, record
from torch import nn

from optiscope.analysis import open_run
from optiscope.diagnostics.store.forking import fork
from optiscope.diagnostics.store.writer import Writer
from optiscope.hooks import attach

KILLS, SEED = 12, 0

Rows = dict[str, xr.Dataset]


def rows(path: Path) -> Rows:
    """What the run now holds, read with plain xarray."""
    nodes = json.loads((path / "zarr.json").read_text())["consolidated_metadata"]["metadata"]
    return {name: xr.load_dataset(path, group=name, engine="zarr") for name in nodes if "/" not in name}


def listed(path: Path) -> list[Any]:
    """Which lineages are committed."""
    return list(json.loads((path / "zarr.json").read_text())["attributes"].get("lineages", []))


def lineage(path: Path, number: int | None = None) -> Rows:
    return {name: group.to_dataset().load() for name, group in open_run(path, number).children.items()}


def assert_same(found: Rows, expected: Rows) -> None:
    assert set(found) == set(expected)
    for name, dataset in expected.items():
        xr.testing.assert_identical(found[name], dataset)
        for key, variable in dataset.variables.items():
            assert found[name][key].dtype == variable.dtype


def assert_holds(found: Rows, before: Rows, after: int, upto: int, session: int) -> None:
    """Records of `before` up to step `after`, then those of `session` up to step `upto`."""
    steps = {"update": range(1, 10_000), "curvature": range(10, 10_000, 10), "scalars": range(7, 10_000, 7)}
    for name, dataset in before.items():
        xr.testing.assert_identical(found[name].sel(step=slice(None, after)), dataset.sel(step=slice(None, after)))
        new = found[name].sel(step=slice(after + 1, None))
        assert new["step"].values.tolist() == [step for step in steps[name] if after < step <= upto]
        values = new["step"].values + 1000 * session
        if name == "scalars":
            assert new["loss"].values.tolist() == (values / 3).tolist()
        else:
            np.testing.assert_array_equal(new["size"].values, values[:, None] + np.arange(MATRICES) / 7)
            assert (new["curve"].values == values[:, None, None]).all()
            assert (new["choice"].values == values[:, None]).all()


def test_every_lineage_is_what_the_run_held(tmp_path: Path) -> None:
    """In the middle of a chunk, before an earlier fork, at the end of a chunk, at a step that has no record, and at the beginning."""
    path = tmp_path / "run.zarr"
    writer = begin(path)
    kept = [rows(path)]
    for session, (after, upto) in enumerate([(100, 140), (30, 200), (128, 129), (999, 1000), (64, 70), (0, 3)], 1):
        if after == 999:  # no steps between 129 and 1200, where the training went on unrecorded
            record(writer, [1200], session)
            kept[-1] = rows(path)
        assert fork(writer, after) == session - 1
        last = max(int(group["step"].values[-1]) for group in kept[-1].values() if group.sizes["step"])
        assert writer.last_step == min(after, last) if after != 999 else 129
        record(writer, range(after + 1, upto + 1), session)
        kept.append(rows(path))
        assert_holds(kept[-1], kept[-2], after, upto, session)
        if session % 2:
            writer = Writer(path, {})
    for number, expected in enumerate(kept):
        assert_same(lineage(path, number), expected)
    assert [(entry["after"], entry["last_step"], entry["records"]) for entry in open_run(path).attrs["lineages"]] == [
        (100, 150, 50), (30, 140, 110), (128, 200, 72), (999, 1200, 1), (64, 1000, 66), (0, 70, 70), (None, 3, 3),
    ]  # fmt: skip


def test_what_is_left_does_not_show_in_records_that_miss_it(tmp_path: Path) -> None:
    """Chunks of what was left lie where those of new records will; where all of these are missing, nothing of the old comes through."""
    path = tmp_path / "run.zarr"
    writer = begin(path)
    fork(writer, 10)
    for step in range(11, 200):
        writer.append("update", step, {})
    writer.flush()
    found = rows(path)["update"].sel(step=slice(11, None))
    assert found.sizes["step"] == 189
    assert np.isnan(found["size"].values).all()
    assert np.isnan(found["curve"].values).all()
    assert (found["choice"].values == -1).all()


def test_matrices_and_scalars_that_came_later_are_not_in_an_earlier_lineage(tmp_path: Path) -> None:
    path = tmp_path / "run.zarr"
    writer = begin(path, 20)
    before = rows(path)
    fork(writer, 15)
    writer.extend_group("update", {"name": np.array(["d"], dtype=np.dtypes.StringDType()), "rows": np.array([9])})
    writer.create_array("scalars", "late", (), (), "float64", {})
    writer.append("update", 16, {"size": np.arange(4.0)})
    writer.append("scalars", 16, {"late": 1.0})
    writer.create_group("blocks", {}, {})
    writer.append("blocks", 16, {})
    writer.flush()
    assert_same(lineage(path, 0), before)
    assert lineage(path)["update"].sizes == {"step": 16, "matrix": 4, "ns_step": 5}
    between = rows(path)
    fork(Writer(path, {}), 3)
    assert_same(lineage(path, 0), before)
    assert_same(lineage(path, 1), between)


def test_what_is_told_of_later_steps_is_left_too(tmp_path: Path) -> None:
    """And is there in the lineage; what indices point into stays."""
    writer = begin(tmp_path / "run.zarr", 20)
    told = {
        "decisions": [{"step": step, "kind": "commit", "optimizer": "Muon", "why": "told", "steps": None} for step in (5, 10, 15)],
        "alignment_events": [{"step": 11, "optimizer": "Muon", "group": 0, "event": "off", "alignment": 0.1, "factor": 1.0}],
        "continued": [{"first_step": step, "optimizers": []} for step in (4, 10, 12)],
    }
    writer.attributes[""].update(told, errors=2)
    writer.attributes["update"]["ns_schedules"] = [{"coefficients": [[1, 0, 0]]}, {"coefficients": [[2, 0, 0]]}]
    writer.flush()
    fork(writer, 10)
    run, left = open_run(tmp_path / "run.zarr"), open_run(tmp_path / "run.zarr", 0)
    assert [entry["step"] for entry in run.attrs["decisions"]] == [5, 10]
    assert run.attrs["alignment_events"] == []
    assert [entry["first_step"] for entry in run.attrs["continued"]] == [4]
    assert {key: left.attrs[key] for key in told} == told
    assert not {"writer", "checksum", "chunks", "after", "records"} & set(left.attrs)
    for one in (run, left):
        assert (one.attrs["note"], one.attrs["errors"], len(one["update"].attrs["ns_schedules"])) == ("begun", 2, 2)


def test_a_compacted_run_goes_back(tmp_path: Path) -> None:
    path = tmp_path / "run.zarr"
    begin(path, 1100).lay_out_for_reading()
    assert list((path / "update" / "size").glob("c.*"))
    before = rows(path)
    writer = Writer(path, {})
    fork(writer, 1050)
    record(writer, range(1051, 1060), 1)
    writer.lay_out_for_reading()
    assert list((path / "update" / "size").glob("c.*"))
    assert_holds(rows(path), before, 1050, 1059, 1)
    for name, dataset in before.items():
        left = xr.load_dataset(path / "lineages" / "0", group=name, engine="zarr")
        xr.testing.assert_identical(left, dataset.sel(step=slice(1051, None)))
    fork(Writer(path, {}), 3)
    assert_same(lineage(path, 0), before)


def test_a_further_lineage_costs_the_root_a_line(tmp_path: Path) -> None:
    """30 lineages, left after random steps, each against what was recorded; by the root's growth, a thousand are 100 kB."""
    path, rng = tmp_path / "run.zarr", random.Random(SEED)
    writer = begin(path, 30)
    sizes, held = [], {step: 0 for step in range(1, 31)}  # the session of each step
    kept = []
    for session in range(1, 31):
        kept.append(held)
        after = rng.randrange(1, max(held))
        fork(writer, after)
        upto = after + rng.randrange(2, 10)
        record(writer, range(after + 1, upto + 1), session)
        held = {step: of for step, of in held.items() if step <= after} | dict.fromkeys(range(after + 1, upto + 1), session)
        sizes.append((path / "zarr.json").stat().st_size)
    assert max(np.diff(sizes)) < 100  # seen: 64
    for number, expected in enumerate([*kept, held]):
        found = lineage(path, number)
        values = {step: step + 1000 * of for step, of in expected.items()}
        assert dict(zip(found["update"]["step"].values.tolist(), found["update"]["curve"].values[:, 0, 0].tolist(), strict=True)) == values
        thirds = {step: value / 3 for step, value in values.items() if step % 7 == 0}
        assert dict(zip(found["scalars"]["step"].values.tolist(), found["scalars"]["loss"].values.tolist(), strict=True)) == thirds


class Killed(BaseException):
    """Ends the writer where it stands, as a kill would."""


def cut_off(writer: Writer, k: int, error: BaseException | None, look: Callable[[], None] = lambda: None) -> int:
    """Fork at step 100, the k-th renaming of a file into place raising; how many there were."""
    count = 0
    replace = os.replace

    def counted(*args: Any, **kwargs: Any) -> None:
        nonlocal count
        count += 1
        look()
        if count == k and error is not None:
            raise error
        replace(*args, **kwargs)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(os, "replace", counted)
        if error is None:
            fork(writer, 100)
        else:
            with pytest.raises(type(error)):
                fork(writer, 100)
    return count


def test_fork_that_is_cut_off_leaves_the_run_as_it_was(tmp_path: Path) -> None:
    """At any file, by a kill or a full disk; the next writer clears up, and can do it."""
    begin(tmp_path / "run.zarr")
    before = rows(tmp_path / "run.zarr")
    total = cut_off(Writer(shutil.copytree(tmp_path / "run.zarr", tmp_path / "counted"), {}), 0, None)
    assert total > 40  # 13 static and record arrays each have chunks and a document
    for k in range(1, total + 1, 7):
        path = shutil.copytree(tmp_path / "run.zarr", tmp_path / str(k))
        cut_off(Writer(path, {}), k, Killed() if k % 2 else OSError(28, "No space left on device"))
        assert_same(rows(path), before)
        assert_same(lineage(path), before)
        writer = Writer(path, {})
        assert list((path / "lineages").glob("[0-9]*")) == []
        record(writer, [151], 0)
        fork(writer, 100)
        assert_holds(rows(path), before, 100, 100, 0)
        assert lineage(path, 0)["update"]["step"].values.tolist() == list(range(1, 152))
        shutil.rmtree(path)


def test_reader_sees_the_run_before_or_behind_a_fork(tmp_path: Path) -> None:
    path = tmp_path / "run.zarr"
    writer = begin(path)
    before, held = rows(path), open_run(path)
    seen = 0

    def look() -> None:
        nonlocal seen
        seen += 1
        if seen % 8 == 0:
            assert_same(rows(path), before)

    total = cut_off(writer, 0, None, look)
    assert seen == total > 40
    assert_holds(rows(path), before, 100, 100, 0)
    # One that was open goes on seeing what it saw.
    assert_same({name: group.to_dataset().load() for name, group in held.children.items()}, before)


def test_killed_at_random_moments(tmp_path: Path) -> None:
    path, rng = tmp_path / "run.zarr", random.Random(SEED)
    begin(path)
    kept, left = [rows(path)], 0
    command = [sys.executable, "-W", "error", forked_runs.__file__]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdin is not None
        assert process.stdout is not None
        took = 0.0
        for session in range(KILLS + 1):
            after = rng.randrange(10, int(kept[-1]["update"]["step"].values[-1]))
            copying = path / f"lineages/{len(kept) - 1}"
            process.stdin.write(json.dumps([str(path), after, session]) + "\n")
            process.stdin.flush()
            worker = int(process.stdout.readline())
            while not copying.exists():
                time.sleep(0.0002)
            begun = time.perf_counter()
            if session:  # the first tells how long it takes
                time.sleep(rng.uniform(0, took))
                with suppress(ProcessLookupError):
                    os.kill(worker, signal.SIGKILL)
            while not (line := process.stdout.readline()).startswith("ended"):
                took = took or time.perf_counter() - begun
            assert line in ("ended -9\n", "ended 0\n")
            now, before = rows(path), kept[-1]
            if (path / f"lineages/{len(kept) - 1}").exists() and len(listed(path)) == len(kept):
                assert_holds(now, before, after, int(now["update"]["step"].values[-1]), session)
                kept.append(now)
            else:
                assert_same(now, before)
                left += (path / f"lineages/{len(kept) - 1}").exists()
        process.kill()
    for number, expected in enumerate(kept):
        assert_same(lineage(path, number), expected)
    assert left  # seen: 4
    print(f"{len(kept) - 1} of {KILLS + 1} forks committed, {left} left half a copy")


# attach


def train(path: Path, steps: int, kind: Any = torch.optim.SGD, load: Any = None, before: int = 0, **options: Any) -> tuple[Any, Any]:
    """A recorded training of one matrix; its recorder, and the optimizer's state at its end."""
    model = nn.Linear(4, 3, bias=False)
    model.weight.grad = torch.ones_like(model.weight)
    optimizer = kind(model.parameters(), lr=0.1)
    if load is not None:
        optimizer.load_state_dict(deepcopy(load))
    for _ in range(before):
        optimizer.step()
    with attach(optimizer, model, path, every=1, on_error="raise", **options) as recorder:
        for _ in range(steps):
            optimizer.step()
        recorder.log(loss=float(recorder.step))
    return recorder, deepcopy(optimizer.state_dict())  # as a checkpoint has it


def steps_in(path: Path, number: int | None = None) -> list[int]:
    return open_run(path, number)["update"]["step"].values.tolist()


def test_restarting_from_an_earlier_step(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    path = tmp_path / "run.zarr"
    train(path, 10, about={"seed": 0})
    first = rows(path)
    caplog.clear()
    train(path, 2, first_step=4, about={"seed": 1})
    assert caplog.records[0].getMessage() == (
        f"optiscope: {path} holds records up to step 10, and this training goes on from step 4: the later ones are kept as lineage 0, which "
        "`diag info` lists, and it is recorded from step 5 on"
    )
    assert_same(lineage(path, 0), first)
    assert set(first) == {"geometry", "update", "second_moment", "scalars"}
    assert steps_in(path) == [1, 2, 3, 4, 5, 6]
    run = open_run(path)
    assert (run.attrs["about"], [entry["about"] for entry in run.attrs["continued"]]) == ({"seed": 0}, [{"seed": 1}])
    # From the very beginning: nothing of the first is left, so that the run is the new training's.
    train(path, 1, first_step=0, about={"seed": 2})
    run = open_run(path)
    assert (run.attrs["about"], run.attrs["first_step"], "continued" in run.attrs) == ({"seed": 2}, 0, False)
    assert open_run(path, 1).attrs["about"] == {"seed": 0}
    assert (steps_in(path), steps_in(path, 1), steps_in(path, 0)) == ([1], [1, 2, 3, 4, 5, 6], list(range(1, 11)))


def test_adams_own_count_tells_of_a_restart(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """Where it counted from is known, so that neither steps before recording began nor an optimizer that is new mislead it."""
    path, adam = tmp_path / "run.zarr", torch.optim.AdamW
    _, four = train(path, 4, adam, before=3)
    _, nine = train(path, 5, adam, load=four)
    assert steps_in(path) == list(range(1, 10))
    caplog.clear()
    recorder, _ = train(path, 1, adam, load=four)
    assert (recorder.first_step, steps_in(path)) == (4, [1, 2, 3, 4, 5])
    assert "goes on from step 4, as its optimizers' own state counts: the later" in caplog.text
    # Behind the last record, as after steps that were not recorded.
    recorder, _ = train(path, 1, adam, load=nine)
    assert (recorder.first_step, steps_in(path)) == (9, [1, 2, 3, 4, 5, 10])
    # A training that begins anew goes on behind; and its own checkpoints count from there.
    recorder, three = train(path, 3, adam)
    assert (recorder.first_step, steps_in(path)[-3:]) == (10, [11, 12, 13])
    train(path, 2, adam, load=three)
    recorder, _ = train(path, 1, adam, load=three)
    assert (recorder.first_step, steps_in(path)[-3:]) == (13, [12, 13, 14])
    # What is stated counts; and SGD tells nothing.
    recorder, _ = train(path, 1, adam, load=three, first_step=50)
    assert recorder.first_step == 50
    caplog.clear()
    recorder, _ = train(tmp_path / "sgd.zarr", 2)
    recorder, _ = train(tmp_path / "sgd.zarr", 1)
    assert recorder.first_step == 2
    assert "recorded after them, from step 3 on; if it was restarted from an earlier checkpoint, pass first_step" in caplog.text
