"""What `attach` refuses, and how a recorder ends: closed, forgotten, replaced, forked, or with the interpreter."""

import gc
import os
import subprocess
import sys
import weakref
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
import zarr
from torch import nn
from torch.optim import SGD, AdamW, Muon, Optimizer

from optiscope.diagnostics.store.writer import Writer
from optiscope.hooks import attach

Make = Callable[..., nn.Sequential]
Read = Callable[[str | Path], Any]


def steps_in(run: Any, group: str = "update") -> list[int]:
    return run[group]["step"].values.tolist()


# What `attach` refuses


def test_bad_arguments(mlp: Make, tmp_path: Path) -> None:
    model = mlp()
    optimizer = SGD(model.parameters(), lr=0.1)
    store = tmp_path / "run.zarr"

    def refused(kind: type[Exception], message: str, *args: Any, **options: Any) -> None:
        with pytest.raises(kind, match=message):
            attach(*(args or (optimizer, model, store)), **options)
        assert not store.exists()
        assert not optimizer._optimizer_step_pre_hooks

    refused(ValueError, "^optimizers: expected at least one optimizer, got none$", [], model, store)
    refused(TypeError, r"^optimizers: expected torch.optim.Optimizer objects, got Sequential$", [model], model, store)
    refused(TypeError, r"^model: expected a torch.nn.Module or None, got str$", optimizer, "run.zarr", store)
    refused(TypeError, r"^optimizers: expected torch.optim.Optimizer objects, got Parameter$", model.parameters(), model, store)
    refused(ValueError, "^optimizers: SGD hold no weight matrix .*nothing can be recorded$", SGD([model[0].bias], lr=0.1), model, store)
    refused(ValueError, "^every: expected a number of steps of at least 1, got 0; ", every=0)
    refused(ValueError, "^overhead: expected a share of the training time above 0 and up to 1, got 2$", overhead=2)
    refused(ValueError, "^overhead: .* got 0$", overhead=0)
    refused(
        ValueError,
        r"^measure: expected one or more of geometry, update, second_moment, second_moment_map, gradient, blocks, stacking, precision; got \['spectra'\]$",
        measure=["spectra"],
    )
    refused(ValueError, r"^measure: .*; got \(\)$", measure=())
    for step in (-1, True, 1.5):
        refused(ValueError, rf"^first_step: expected the number of steps already taken, 0 or more, got {step}$", first_step=step)
    refused(ValueError, "^on_error: expected 'warn' or 'raise', got 'ignore'$", on_error="ignore")


def test_measure_that_leaves_nothing_to_record(tmp_path: Path) -> None:
    embedding = nn.ModuleDict({"embed_tokens": nn.Embedding(5, 3)})
    with pytest.raises(ValueError, match="nothing can be recorded"):
        attach(AdamW(embedding.parameters()), embedding, tmp_path / "run.zarr", measure=["geometry"])
    assert not (tmp_path / "run.zarr").exists()


def test_stores_that_cannot_be_continued(mlp: Make, tmp_path: Path) -> None:
    model = mlp()
    optimizer = SGD(model.parameters(), lr=0.1)
    file, folder, foreign = tmp_path / "file", tmp_path / "folder", tmp_path / "foreign.zarr"
    file.write_text("precious")
    folder.mkdir()
    (folder / "precious").write_text("precious")
    zarr.create_group(foreign, attributes={"precious": True}).create_array("data", data=np.arange(3))
    for path, message in (
        (file, "exists and is not an Optiscope run; choose another path"),
        (folder, "exists and is not an Optiscope run; choose another path"),
        (foreign, "exists and is not an Optiscope run; choose another path"),
    ):
        with pytest.raises(ValueError, match=f"^store: {path} {message}$"):
            attach(optimizer, model, path)
    assert file.read_text() == (folder / "precious").read_text() == "precious"
    assert zarr.open_group(foreign, mode="r")["data"][:].tolist() == [0, 1, 2]  # type: ignore[index]


def test_run_of_other_matrices(two: tuple[nn.Module, Optimizer, Optimizer], tmp_path: Path, read: Read) -> None:
    """Other names; the same names with other shapes; the same matrices under another optimizer. More matrices are another matter."""
    model, d, g = two
    with attach(d, model, tmp_path / "run.zarr", every=1):
        d.step()
    wider = nn.ModuleDict({"d": nn.Linear(5, 3, bias=False)})
    for others, of in ((g, model), (SGD(wider.parameters(), lr=0.1), wider), (Muon(model["d"].parameters()), model)):
        with pytest.raises(ValueError, match=r"run\.zarr holds a run of other matrices; record to another path$"):
            attach(others, of, tmp_path / "run.zarr")
    assert steps_in(read(tmp_path / "run.zarr")) == [1]


def test_recorder_whose_run_another_process_took_over_detaches(
    two: tuple[nn.Module, Optimizer, Optimizer], tmp_path: Path, read: Read, caplog: pytest.LogCaptureFixture
) -> None:
    model, d, _ = two
    recorder = attach(d, model, tmp_path / "run.zarr", every=1)
    d.step()
    recorder.flush()
    Writer(tmp_path / "run.zarr", {}).flush()  # as another process would
    d.step()
    recorder.flush()
    assert not d._optimizer_step_pre_hooks
    assert not d._optimizer_step_post_hooks
    assert "is now written by another recorder" in caplog.text
    recorder.close()
    assert steps_in(read(tmp_path / "run.zarr")) == [1]


def test_a_relative_store_stays_where_it_was_meant(
    two: tuple[nn.Module, Optimizer, Optimizer], tmp_path: Path, read: Read, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Hydra and many a script change the working folder."""
    model, d, _ = two
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path)
    recorder = attach(d, model, "run.zarr", every=1, on_error="raise")
    d.step()
    monkeypatch.chdir("elsewhere")
    recorder.flush()
    d.step()
    recorder.close()
    assert steps_in(read(tmp_path / "run.zarr")) == [1, 2]
    assert recorder.store == (tmp_path / "run.zarr").resolve()
    assert list((tmp_path / "elsewhere").iterdir()) == []


def test_a_recorder_that_saw_no_step_says_so(
    two: tuple[nn.Module, Optimizer, Optimizer], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    model, d, _ = two
    attach(d, model, tmp_path / "run.zarr").close()
    assert "no step of" in caplog.text


def test_wrapper_that_runs_no_hooks_is_looked_into(two: tuple[nn.Module, Optimizer, Optimizer], tmp_path: Path, read: Read) -> None:
    """Accelerate's optimizer is one: a subclass without hooks of its own, around the optimizer that steps."""
    model, d, _ = two
    wrapper = SimpleNamespace(optimizer=d, param_groups=d.param_groups)
    with attach(wrapper, model, tmp_path / "run.zarr", every=1):  # type: ignore[arg-type]
        d.step()
    assert steps_in(read(tmp_path / "run.zarr")) == [1]


def test_settings_of_a_continued_run_are_recorded_as_they_are(tmp_path: Path, read: Read) -> None:
    model = nn.Linear(8, 4, bias=False)
    model.weight.grad = torch.ones_like(model.weight)
    for adjust in ("original", "match_rms_adamw"):
        muon = Muon([model.weight], adjust_lr_fn=adjust)
        with attach(muon, model, tmp_path / "run.zarr", every=1, on_error="raise"):
            muon.step()
    run = read(tmp_path / "run.zarr")
    # 1/√fan_in for the wide shape, then 0.2.
    assert run["update"]["update_rms_target"].values[:, 0] == pytest.approx([8**-0.5, 0.2])
    assert run.attrs["continued"][0]["optimizers"][0]["groups"][0]["adjust_lr_fn"] == "match_rms_adamw"


def test_what_the_user_states_is_kept(tmp_path: Path, read: Read) -> None:
    model = nn.Linear(8, 4, bias=False)
    optimizer = SGD(model.parameters(), lr=0.1)
    model.weight.grad = torch.ones_like(model.weight)
    for seed in (np.int64(0), 1):
        with attach(optimizer, model, tmp_path / "run.zarr", every=1, about={"data": "ones", "seed": seed}):
            optimizer.step()
    attributes = read(tmp_path / "run.zarr").attrs
    assert attributes["about"] == {"data": "ones", "seed": 0}
    assert [session["about"] for session in attributes["continued"]] == [{"data": "ones", "seed": 1}]
    with attach(optimizer, model, tmp_path / "plain.zarr", every=1):
        optimizer.step()
    assert "about" not in read(tmp_path / "plain.zarr").attrs
    with pytest.raises(TypeError, match=r"^about: expected a text, a number or a truth value for 'data', got list$"):
        attach(optimizer, model, tmp_path / "refused.zarr", about={"data": ["a"]})  # type: ignore[dict-item]
    assert not (tmp_path / "refused.zarr").exists()


# The end


def test_what_was_left_open_is_committed_at_exit(tmp_path: Path, read: Read) -> None:
    """Also for a recorder nothing refers to any more, and after an exception nobody caught."""
    script = """
import sys, torch
from optiscope.hooks import attach
from optiscope.diagnostics.store.writer import Writer

def train():
    model = torch.nn.Linear(3, 2)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    recorder = attach(optimizer, model, sys.argv[1], every=1)
    for _ in range(5):
        model(torch.ones(1, 3)).sum().backward()
        optimizer.step()
        recorder.log(loss=2.5)

train()
raise SystemExit(3)
"""
    done = subprocess.run([sys.executable, "-W", "error", "-c", script, str(tmp_path / "run.zarr")], capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (3, "")
    run = read(tmp_path / "run.zarr")
    assert steps_in(run) == [1, 2, 3, 4, 5]
    assert run["scalars"]["loss"].values.tolist() == [2.5] * 5


def test_closed_recorder_lets_go(two: tuple[nn.Module, Optimizer, Optimizer], tmp_path: Path) -> None:
    """Of the model too: nothing global or in the optimizer keeps either."""
    model, d, _ = two
    recorder = attach(d, model, tmp_path / "run.zarr", every=1)
    d.step()
    recorder.close()
    gone = weakref.ref(recorder)
    del recorder
    gc.collect()
    assert gone() is None


def test_forked_child_does_not_close(
    two: tuple[nn.Module, Optimizer, Optimizer], tmp_path: Path, read: Read, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A data loader's worker has a copy of the recorder and ends before it; what is buffered is the parent's to write."""
    model, d, _ = two
    with attach(d, model, tmp_path / "run.zarr", every=1) as recorder:
        d.step()
        d.step()
        with monkeypatch.context() as child:
            child.setattr(os, "getpid", lambda: -1)
            recorder.close()
        assert steps_in(read(tmp_path / "run.zarr")) == [1]  # the first is committed at once
        d.step()
    assert steps_in(read(tmp_path / "run.zarr")) == [1, 2, 3]
