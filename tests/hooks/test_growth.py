"""Parameters and optimizers that come after `attach`: rows of their own, missing before, nothing moved that was there."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import xarray as xr
from torch import nn
from torch.optim import SGD, AdamW

import optiscope.hooks.recording.layout as layout_module
from optiscope.diagnostics.store.files import Files
from optiscope.diagnostics.store.writer import Writer
from optiscope.hooks import attach

Make = Callable[..., nn.Sequential]
Read = Callable[[str | Path], xr.DataTree]


def backward(model: nn.Module, seed: int) -> None:
    model.zero_grad()
    model(torch.randn(16, 8, generator=torch.Generator().manual_seed(seed))).square().mean().backward()


def rows_with_values(run: xr.DataTree, step: int) -> dict[str, bool]:
    update = run["update"]
    values = update["update_rms"].sel(step=step).values
    return {str(name): bool(np.isfinite(value)) for name, value in zip(update["name"].values, values, strict=True)}


def test_group_added_later_gets_rows_of_its_own(mlp: Make, tmp_path: Path, read: Read) -> None:
    """As when layers are unfrozen one after the other. Records before and after are those of runs that had them all along."""
    runs = []
    for late in (False, True):
        model = mlp(dropout=0.0)
        optimizer = SGD(model[0].parameters(), lr=0.1, momentum=0.9)
        if not late:
            optimizer.add_param_group({"params": list(model[3].parameters()), "lr": 0.0})
        store = tmp_path / f"{late}.zarr"
        with attach(optimizer, model, store, every=1, on_error="raise") as recorder:
            for step in range(1, 7):
                backward(model, step)
                if step == 4:
                    if late:
                        optimizer.add_param_group({"params": list(model[3].parameters()), "lr": 0.2})
                    else:
                        optimizer.param_groups[1]["lr"] = 0.2
                        for p in model[3].parameters():
                            optimizer.state[p].clear()
                optimizer.step()
                if step == 2:
                    recorder.flush()
        runs.append(read(store))
    always, grown = runs
    assert [rows_with_values(grown, step) for step in (3, 4)] == [
        {"0.weight": True, "3.weight": False},
        {"0.weight": True, "3.weight": True},
    ]
    for group in ("update", "geometry"):
        assert grown[group]["name"].values.tolist() == ["0.weight", "3.weight"]
        for name, values in grown[group].data_vars.items():
            # From the step before on (whether the weights were changed since then) the new matrix is seen.
            expected = always[group][name].values[3:]
            if name == "changed_outside":
                np.testing.assert_array_equal(values.values[4:], expected[1:])
            else:
                np.testing.assert_array_equal(values.values[3:], expected, err_msg=str(name))
                np.testing.assert_array_equal(values.values[:3, 0], always[group][name].values[:3, 0], err_msg=str(name))
    np.testing.assert_array_equal(grown["geometry"]["quantile_level"].values, always["geometry"]["quantile_level"].values)


def test_rows_are_added_twice_and_a_reader_sees_what_was_committed(mlp: Make, tmp_path: Path, read: Read) -> None:
    model = mlp(dropout=0.0)
    optimizer = SGD(model[0].parameters(), lr=0.1)
    with attach(optimizer, model, tmp_path / "run.zarr", every=1, on_error="raise") as recorder:
        for step, layer in enumerate((0, 3, 6)):
            if layer:
                optimizer.add_param_group({"params": list(model[layer].parameters())})
            backward(model, step)
            optimizer.step()
            recorder.flush()
            run = read(tmp_path / "run.zarr")
            assert run["update"]["name"].values.tolist() == [f"{i}.weight" for i in (0, 3, 6)[: step + 1]]
            assert all(rows_with_values(run, step + 1).values())


def test_grown_run_is_continued_whatever_order_its_matrices_now_have(mlp: Make, tmp_path: Path, read: Read) -> None:
    model = mlp(dropout=0.0)
    optimizer = SGD(model[3].parameters(), lr=0.1)
    with attach(optimizer, model, tmp_path / "run.zarr", every=1, on_error="raise"):
        backward(model, 0)
        optimizer.step()
        optimizer.add_param_group({"params": list(model[0].parameters())})
        backward(model, 1)
        optimizer.step()
    optimizer = SGD(model.parameters(), lr=0.1)
    with attach(optimizer, model, tmp_path / "run.zarr", every=1, on_error="raise"):
        backward(model, 2)
        sizes = {name: p.detach().square().mean().sqrt().item() for name, p in model.named_parameters()}
        optimizer.step()
    update = read(tmp_path / "run.zarr")["update"]
    assert update["name"].values.tolist() == ["3.weight", "0.weight", "6.weight"]
    assert update["weight_rms"].values[2] == pytest.approx([sizes[str(n)] for n in update["name"].values], rel=1e-6)
    assert np.isnan(update["weight_rms"].values[0, 1:]).all()


def test_optimizer_made_later(mlp: Make, tmp_path: Path, read: Read) -> None:
    model = mlp(dropout=0.0)
    first = SGD(model[0].parameters(), lr=0.1)
    with attach(first, model, tmp_path / "run.zarr", every=1, on_error="raise") as recorder:
        backward(model, 0)
        first.step()
        second, third = AdamW(model[3].parameters()), SGD(model[6].parameters(), lr=0.1)
        recorder.watch(second, third)
        recorder.watch(first, second)  # watched already
        for step in (1, 2):
            backward(model, step)
            for optimizer in (first, second, third):
                optimizer.step()
        with pytest.raises(TypeError, match=r"^optimizers: expected torch.optim.Optimizer objects, got Linear$"):
            recorder.watch(model[0])
    run = read(tmp_path / "run.zarr")
    assert run["update"]["optimizer"].values.tolist() == ["SGD", "AdamW", "SGD#2"]
    assert [entry["label"] for entry in run.attrs["optimizers"]] == ["SGD", "AdamW", "SGD#2"]
    assert [sum(rows_with_values(run, step).values()) for step in (1, 2, 3)] == [1, 3, 3]
    for optimizer in (first, second, third):
        assert not optimizer._optimizer_step_pre_hooks


def test_parameters_without_two_dimensions_add_nothing(mlp: Make, tmp_path: Path, read: Read) -> None:
    model = mlp(dropout=0.0)
    optimizer = SGD([model[0].weight], lr=0.1)
    with attach(optimizer, model, tmp_path / "run.zarr", every=1, on_error="raise"):
        optimizer.add_param_group({"params": [model[0].bias, model[3].bias]})
        backward(model, 0)
        optimizer.step()
    assert read(tmp_path / "run.zarr")["update"].sizes["matrix"] == 1


def test_failing_growth_is_reported_and_the_rest_recorded(
    mlp: Make, tmp_path: Path, read: Read, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def broken(*args: Any) -> Any:
        raise RuntimeError("no names")

    model = mlp(dropout=0.0)
    optimizer = SGD([model[0].weight], lr=0.1)
    with attach(optimizer, model, tmp_path / "run.zarr", every=1) as recorder:
        monkeypatch.setattr(layout_module, "find_matrices", broken)
        optimizer.add_param_group({"params": [model[3].weight]})
        for step in range(3):
            backward(model, step)
            optimizer.step()
    assert recorder.errors == 3
    assert len(caplog.records) == 1
    assert np.isfinite(read(tmp_path / "run.zarr")["update"]["update_rms"].values[:, 0]).all()


def test_growth_cut_off_by_a_full_disk_leaves_nothing_half_done(
    mlp: Make, tmp_path: Path, read: Read, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whichever write fails, records of the old matrices stay readable, and once there is room the new one gets its rows."""
    written = Files.replace
    for failing in (0, 3, 7, 10):
        model = mlp(dropout=0.0)
        optimizer = SGD([model[0].weight], lr=0.1)
        store = tmp_path / f"{failing}.zarr"
        with attach(optimizer, model, store, every=1) as recorder:
            backward(model, 0)
            optimizer.step()
            optimizer.add_param_group({"params": [model[3].weight]})
            count = iter(range(1000))

            def full(files: Files, *args: Any, failing: int = failing, count: Any = count) -> None:
                if next(count) == failing:
                    raise OSError(28, "No space left on device")
                written(files, *args)

            with monkeypatch.context() as patched:
                patched.setattr(Files, "replace", full)
                optimizer.step()
            recorder.flush()
            run = read(store)
            assert run["update"].sizes["matrix"] == run["update"]["name"].size
            optimizer.step()
        assert recorder.errors == 0  # it is the disk that failed, and no measurement
        assert rows_with_values(read(store), 3) == {"0.weight": True, "3.weight": True}


def test_growth_cut_off_by_a_kill_is_taken_back(mlp: Make, tmp_path: Path, read: Read) -> None:
    """Killed after the arrays were made longer and before the commit: a reader sees the run before, and the next writer goes on from there."""
    model = mlp(dropout=0.0)
    optimizer = SGD([model[0].weight], lr=0.1)
    with attach(optimizer, model, tmp_path / "run.zarr", every=1):
        backward(model, 0)
        optimizer.step()
    dead = Writer(tmp_path / "run.zarr", {})
    text = np.dtypes.StringDType()
    strings = {key: np.array(["ghost"], dtype=text) for key in ("name", "operator", "optimizer")}
    dead.extend_group("update", {**strings, **{key: np.array([1]) for key in ("layer", "rows", "cols")}})
    assert read(tmp_path / "run.zarr")["update"]["name"].values.tolist() == ["0.weight"]
    with attach(optimizer, model, tmp_path / "run.zarr", every=1, on_error="raise"):
        optimizer.step()
    run = read(tmp_path / "run.zarr")
    assert run["update"]["name"].values.tolist() == ["0.weight"]
    assert run["update"]["update_rms"].shape == (2, 1)
