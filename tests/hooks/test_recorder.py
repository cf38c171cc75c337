"""When records are made, the numbers a user logs, and what happens when recording fails."""

import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import zarr
from torch import nn
from torch.optim import SGD, AdamW, Muon, Optimizer

import optiscope.hooks.recorder as recorder_module
from optiscope.hooks import attach

Make = Callable[..., nn.Sequential]
Read = Callable[[str | Path], Any]


def weights(model: nn.Module) -> list[nn.Parameter]:
    return [p for p in model.parameters() if p.ndim == 2]


def give_gradients(*parameters: nn.Parameter) -> None:
    for p in parameters:
        p.grad = torch.linspace(-1, 2, p.numel()).view_as(p).sin().to(p.dtype)


def steps_in(run: Any, group: str = "update") -> list[int]:
    return run[group]["step"].values.tolist()


def present(run: Any, matrix: int) -> list[int]:
    """Steps at which the matrix has an update."""
    update = run["update"]
    return update["step"].values[np.isfinite(update["update_rms"].values[:, matrix])].tolist()


# When


@pytest.mark.parametrize(("every", "steps", "expected"), [(1, 4, [1, 2, 3, 4]), (3, 10, [3, 6, 9]), (20, 10, [])])
def test_records_fall_on_multiples(
    every: int, steps: int, expected: list[int], two: tuple[nn.Module, Optimizer, Optimizer], tmp_path: Path, read: Read
) -> None:
    model, d, _ = two
    with attach(d, model, tmp_path / "run.zarr", every=every, on_error="raise") as recorder:
        for _ in range(steps):
            d.step()
    run = read(tmp_path / "run.zarr")
    assert steps_in(run, "update") == steps_in(run, "geometry") == expected
    assert recorder.step == steps


def test_two_optimizers_share_one_counter(two: tuple[nn.Module, Optimizer, Optimizer], tmp_path: Path, read: Read) -> None:
    model, d, g = two
    with attach([d, g], model, tmp_path / "run.zarr", every=2, on_error="raise") as recorder:
        for _ in range(6):
            d.step()
            g.step()
            recorder.log(loss=0.5)
    run = read(tmp_path / "run.zarr")
    assert steps_in(run) == present(run, 0) == present(run, 1) == [2, 4, 6]
    assert steps_in(run, "scalars") == [1, 2, 3, 4, 5, 6]
    assert recorder.step == 6


def test_resumed_counter_continues(two: tuple[nn.Module, Optimizer, Optimizer], tmp_path: Path, read: Read) -> None:
    """By default from the last record of the run, else from `first_step`, wherever that lies between multiples."""
    model, d, _ = two
    for first_step, expected in ((None, [3, 6]), (None, [3, 6, 9, 12]), (100, [3, 6, 9, 12, 102, 105])):
        with attach(d, model, tmp_path / "run.zarr", every=3, first_step=first_step, on_error="raise") as recorder:
            begun = recorder.step
            for _ in range(6):
                d.step()
        run = read(tmp_path / "run.zarr")
        assert begun == (expected[-3] if first_step is None and len(expected) > 2 else first_step or 0)
        assert steps_in(run) == expected


def test_optimizer_that_steps_every_third_time(two: tuple[nn.Module, Optimizer, Optimizer], tmp_path: Path, read: Read) -> None:
    """As the generator of a GAN: its part of a record is its first step after, unless the next record comes first."""
    model, d, g = two
    for every, first, second in ((1, list(range(1, 13)), [3, 6, 9, 12]), (4, [4, 8, 12], [4, 8, 12])):
        with attach([d, g], model, tmp_path / f"{every}.zarr", every=every, on_error="raise") as recorder:
            for _ in range(4):
                for _ in range(3):
                    d.step()
                g.step()
        run = read(tmp_path / f"{every}.zarr")
        assert (present(run, 0), present(run, 1)) == (first, second)
        assert recorder.step == 12


@pytest.mark.parametrize("every", [1, 7, 30])
def test_optimizer_that_stops_stepping_does_not_hold_records_up(
    every: int, two: tuple[nn.Module, Optimizer, Optimizer], tmp_path: Path, read: Read
) -> None:
    model, d, g = two
    with attach([d, g], model, tmp_path / "run.zarr", every=every, on_error="raise"):
        for step in range(100):
            d.step()
            if step < 20:
                g.step()
    run = read(tmp_path / "run.zarr")
    assert present(run, 0) == list(range(every, 101, every))
    assert present(run, 1) == list(range(every, 21, every))


def test_step_that_raises_is_neither_counted_nor_recorded(mlp: Make, tmp_path: Path, read: Read) -> None:
    class Fragile(SGD):
        fail = False

        def step(self, closure: Any = None) -> Any:
            if self.fail:
                raise FloatingPointError("overflow")
            return super().step(closure)

    model = mlp()
    optimizer = Fragile(model.parameters(), lr=0.1)
    give_gradients(*model.parameters())
    with attach(optimizer, model, tmp_path / "run.zarr", every=1, on_error="raise") as recorder:
        for fail in (False, True, True, False):
            optimizer.fail = fail
            if fail:
                with pytest.raises(FloatingPointError, match="overflow"):
                    optimizer.step()
                with torch.no_grad():
                    model[0].weight.add_(1)  # must not be taken for the next step's update
            else:
                before = model[0].weight.detach().double().clone()
                optimizer.step()
        last = (before - model[0].weight.detach().double()).square().mean().sqrt().item()
    update = read(tmp_path / "run.zarr")["update"]
    assert recorder.step == 2
    assert update["step"].values.tolist() == [1, 2]
    assert update["update_rms"].values[1, 0] == pytest.approx(last, rel=1e-12)


def test_skipped_and_accumulated_steps(mlp: Make, tmp_path: Path, read: Read) -> None:
    """What counts is `optimizer.step()`: batches accumulated or skipped in between do not; the gradient is their sum."""
    model = mlp(dropout=0.0)
    optimizer = AdamW(model.parameters())
    sums = []
    with attach(optimizer, model, tmp_path / "run.zarr", every=1, on_error="raise") as recorder:
        for micro_step in range(1, 13):
            model(torch.full((2, 8), float(micro_step))).square().mean().backward()
            if micro_step % 3 == 0 and micro_step != 6:
                sums.append([p.grad.double().square().mean().sqrt().item() for p in weights(model)])  # type: ignore[union-attr]
                optimizer.step()
                optimizer.zero_grad()
    update = read(tmp_path / "run.zarr")["update"]
    assert recorder.step == 3
    np.testing.assert_allclose(update["grad_rms"].values, sums, rtol=1e-12)


def test_off_steps_only_count(two: tuple[nn.Module, Optimizer, Optimizer], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model, d, g = two
    snapshots: list[int] = []
    taken = recorder_module.take_snapshot
    monkeypatch.setattr(recorder_module, "take_snapshot", lambda *args: snapshots.append(recorder.step) or taken(*args))
    with attach([d, g], model, tmp_path / "run.zarr", every=5, on_error="raise") as recorder:
        for step in range(1, 13):
            spent = recorder.overhead_seconds
            for optimizer in (d, g):
                optimizer.step()
            assert (recorder.overhead_seconds > spent) == (step in (5, 10))  # the recorder's clock did not even start
    assert snapshots == [4, 5, 9, 10]  # steps taken before: one snapshot per optimizer on steps 5 and 10


# Scalars


def test_scalars_are_merged_by_step_and_missing_before(two: tuple[nn.Module, Optimizer, Optimizer], tmp_path: Path, read: Read) -> None:
    model, d, _ = two
    with attach(d, model, tmp_path / "run.zarr", every=2, on_error="raise") as recorder:
        recorder.log(loss=9.0)
        d.step()
        recorder.log(loss=torch.tensor(8.0, requires_grad=True) * 1)
        recorder.log(accuracy=torch.tensor([0.25], dtype=torch.bfloat16))
        d.step()
        d.step()
        recorder.flush()
        recorder.log(loss=7, accuracy=np.float32(0.5))
        recorder.log(loss=6, **{"valid/top/1": True})
    scalars = read(tmp_path / "run.zarr")["scalars"]
    assert scalars["step"].values.tolist() == [0, 1, 2, 3]
    nan = np.nan
    np.testing.assert_array_equal(scalars["loss"].values, [9, 8, nan, 6])
    np.testing.assert_array_equal(scalars["accuracy"].values, [nan, 0.25, nan, 0.5])
    np.testing.assert_array_equal(scalars["valid.top.1"].values, [nan, nan, nan, 1])
    elapsed, overhead = scalars["elapsed_seconds"].values, scalars["overhead_seconds"].values
    assert (np.diff(elapsed) > 0).all()
    assert (np.diff(overhead) > 0).all()
    assert (overhead < elapsed).all()


def test_values_that_are_no_numbers_do_not_raise(
    two: tuple[nn.Module, Optimizer, Optimizer], tmp_path: Path, read: Read, caplog: pytest.LogCaptureFixture
) -> None:
    model, d, _ = two
    with attach(d, model, tmp_path / "run.zarr", every=1) as recorder:
        for bad in ("much", None, torch.ones(3), object()):
            d.step()
            recorder.log(loss=1.0, bad=bad)
        d.step()
        recorder.log(loss=float("nan"), big=float("inf"))
    scalars = read(tmp_path / "run.zarr")["scalars"]
    assert recorder.errors == 4
    assert len(caplog.records) == 1
    assert "bad" not in scalars
    np.testing.assert_array_equal(scalars["loss"].values, [1, 1, 1, 1, np.nan])
    assert scalars["big"].values[-1] == np.inf


# Failures


@pytest.mark.parametrize("broken", ["take_snapshot", "measure_update", "measure_geometry", "empty_rows", "create_scalar"])
def test_failing_measurement_leaves_training_alone(
    broken: str, mlp: Make, tmp_path: Path, read: Read, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """Whatever part fails, for five steps: training is bitwise the same, one message, and later records are whole."""

    def train(path: Path | None) -> list[bytes]:
        model = mlp()
        optimizers = [Muon(weights(model), lr=0.05), AdamW([p for p in model.parameters() if p.ndim == 1])]
        recorder = attach(optimizers, model, path, every=1) if path else None
        torch.manual_seed(1)
        for step in range(12):
            with monkeypatch.context() as patched:
                if recorder and 3 <= step < 8:
                    patched.setattr(recorder_module, broken, lambda *args: 1 / 0)
                model(torch.randn(4, 8)).square().mean().backward()
                for optimizer in optimizers:
                    optimizer.step()
                    optimizer.zero_grad()
                if recorder:
                    recorder.log(loss=step, **{f"of_step_{step}": 1})
        if recorder:
            recorder.close()
            assert recorder.errors >= 5
        return [p.detach().numpy().tobytes() for p in model.parameters()]

    with caplog.at_level(logging.WARNING, "optiscope"):
        assert train(tmp_path / "run.zarr") == train(None)
    [message] = [record.getMessage() for record in caplog.records]
    assert "ZeroDivisionError" in message
    assert "Training goes on" in message
    run = read(tmp_path / "run.zarr")
    assert run.attrs["errors"] >= 5
    for matrix in range(3):
        assert {1, 2, 3, 9, 10, 11, 12} <= set(present(run, matrix))
    residual = run["geometry"]["ns_residual"].sel(step=[1, 2, 3, 9, 10, 11, 12])
    assert np.isfinite(residual.values).all()


def test_errors_of_a_continued_run_add_up(two: tuple[nn.Module, Optimizer, Optimizer], tmp_path: Path, read: Read) -> None:
    model, d, _ = two
    for expected in (1, 2):
        with attach(d, model, tmp_path / "run.zarr", every=1) as recorder:
            recorder.log(bad="much")
            assert recorder.errors == 1
        assert read(tmp_path / "run.zarr").attrs["errors"] == expected


def test_on_error_raise(two: tuple[nn.Module, Optimizer, Optimizer], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model, d, _ = two
    with attach(d, model, tmp_path / "run.zarr", every=1, on_error="raise") as recorder:
        with pytest.raises(ValueError, match="could not convert"):
            recorder.log(bad="much")
        monkeypatch.setattr(recorder_module, "measure_update", lambda *args: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            d.step()


def test_full_disk_loses_nothing(
    two: tuple[nn.Module, Optimizer, Optimizer], tmp_path: Path, read: Read, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, d, _ = two

    def no_space(*args: Any) -> None:
        raise OSError(28, "No space left on device")

    with attach(d, model, tmp_path / "run.zarr", every=1) as recorder:
        d.step()
        with monkeypatch.context() as patched:
            patched.setattr(zarr.Array, "__setitem__", no_space)
            for _ in range(3):
                d.step()
                recorder.flush()
        assert recorder.errors == 3
        assert steps_in(read(tmp_path / "run.zarr")) == []
        d.step()
    assert steps_in(read(tmp_path / "run.zarr")) == present(read(tmp_path / "run.zarr"), 0) == [1, 2, 3, 4, 5]


def test_run_moved_away_while_training_goes_on(
    two: tuple[nn.Module, Optimizer, Optimizer], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    model, d, _ = two
    with attach(d, model, tmp_path / "run.zarr", every=1) as recorder:
        (tmp_path / "run.zarr").rename(tmp_path / "elsewhere")
        d.step()
    assert recorder.errors > 0
    assert len(caplog.records) == 1
    assert not (tmp_path / "run.zarr").exists()
