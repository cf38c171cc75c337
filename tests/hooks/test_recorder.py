"""When records are made, the numbers a user logs, and what happens when recording fails."""

import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn
from torch.optim import SGD, AdamW, Muon, Optimizer

import optiscope.hooks.recording.record as record_module
from optiscope.analysis import open_run
from optiscope.diagnostics.store.files import Files
from optiscope.hooks import attach
from optiscope.hooks.observing.snapshot import Snapshot
from optiscope.hooks.observing.watched import Watched
from optiscope.hooks.recording.layout import Layout
from optiscope.hooks.recording.scalars import ScalarRow

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
    taken = Watched.take_snapshots
    monkeypatch.setattr(Watched, "take_snapshots", lambda self, *args: snapshots.append(recorder.step) or taken(self, *args))
    with attach([d, g], model, tmp_path / "run.zarr", every=5, on_error="raise") as recorder:
        for step in range(1, 13):
            spent = recorder.overhead_seconds
            for optimizer in (d, g):
                optimizer.step()
            # On others the recorder's clock does not even start; the step before a record notes how it leaves the weights.
            assert (recorder.overhead_seconds > spent) == (step in (4, 5, 9, 10))
    assert snapshots == [4, 5, 9, 10]  # steps taken before: one snapshot per optimizer on steps 5 and 10


# Listeners


def test_a_listener_gets_what_the_run_holds(mlp: Make, tmp_path: Path, read: Read) -> None:
    """Every record once, behind its last optimizer's step and with all its matrices, until the handle is removed."""
    model = mlp()
    optimizers = [Muon(weights(model)[:2], lr=0.05), SGD(weights(model)[2:], lr=0.1)]
    give_gradients(*model.parameters())
    heard: list[Any] = []
    with attach(optimizers, model, tmp_path / "run.zarr", every=2, on_error="raise") as recorder:
        handle = recorder.on_record(heard.append)
        for step in range(1, 7):
            if step == 5:
                handle.remove()
            optimizers[0].step()
            assert len(heard) == min((step - 1) // 2, 2)
            optimizers[1].step()
            assert len(heard) == min(step // 2, 2)
    run = read(tmp_path / "run.zarr")
    assert steps_in(run) == [2, 4, 6]
    assert [record.step for record in heard] == [2, 4]
    for group in ("geometry", "update"):
        names = run[group]["name"].values.tolist()
        row_of = heard[0].row_of[group]
        assert {names[row]: (m.operator, m.layer, m.rows, m.cols) for m, row in row_of.items()} == {
            str(n): (o, layer, m, k)
            for n, o, layer, m, k in zip(*(run[group][key].values for key in ("name", "operator", "layer", "rows", "cols")), strict=True)
        }
        for i, record in enumerate(heard):
            for name, rows in record.rows[group].items():
                np.testing.assert_array_equal(rows, run[group][name].values[i])
    assert heard[0].ns_schedules == run["geometry"].attrs["ns_schedules"]


def test_a_listener_that_raises_leaves_training_and_record_alone(
    two: tuple[nn.Module, Optimizer, Optimizer], tmp_path: Path, read: Read, caplog: pytest.LogCaptureFixture
) -> None:
    model, d, _ = two
    heard: list[int] = []
    with caplog.at_level(logging.WARNING, "optiscope"), attach(d, model, tmp_path / "run.zarr", every=1) as recorder:
        recorder.on_record(lambda record: 1 / 0)
        recorder.on_record(lambda record: heard.append(record.step))
        for _ in range(3):
            d.step()
    [message] = [record.getMessage() for record in caplog.records]
    assert "ZeroDivisionError" in message
    assert recorder.errors == read(tmp_path / "run.zarr").attrs["errors"] == 3
    assert steps_in(read(tmp_path / "run.zarr")) == heard == [1, 2, 3]
    with pytest.raises(ValueError, match=r"^recorder: expected one that is open, got one that is closed"):
        recorder.on_record(heard.append)


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


@pytest.mark.parametrize(
    ("module", "broken"),
    [
        (Watched, "take_snapshots"),
        (Watched, "note_weights"),
        (Snapshot, "see_gradient"),
        (record_module, "measure_update"),
        (record_module, "measure_geometry"),
        (Layout, "empty_rows"),
        (ScalarRow, "set"),
    ],
)
def test_failing_measurement_leaves_training_alone(
    module: Any,
    broken: str,
    mlp: Make,
    tmp_path: Path,
    read: Read,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
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
                    patched.setattr(module, broken, lambda *args: 1 / 0)
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
        monkeypatch.setattr(record_module, "measure_update", lambda *args: 1 / 0)
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
            patched.setattr(Files, "replace", no_space)
            for _ in range(3):
                d.step()
                recorder.flush()
        assert (recorder.errors, recorder.dropped) == (0, 0)
        assert steps_in(read(tmp_path / "run.zarr")) == [1]  # the first, committed at once
        d.step()
    assert "errors" not in read(tmp_path / "run.zarr").attrs
    assert steps_in(read(tmp_path / "run.zarr")) == present(read(tmp_path / "run.zarr"), 0) == [1, 2, 3, 4, 5]


@pytest.mark.parametrize("background", [False, True], ids=["foreground", "background"])
def test_a_listener_may_log_flush_and_close(
    background: bool, two: tuple[nn.Module, Optimizer, Optimizer], tmp_path: Path, read: Read
) -> None:
    """Done in that order when the step's work ends; the same step's end finds the recorder closed."""
    model, d, _ = two
    recorder = attach(d, model, tmp_path / "run.zarr", every=1, background=background, on_error="raise")
    heard = []

    def listener(record: Any) -> None:
        heard.append(record.step)
        if record.step == 2:
            recorder.log(seen=record.step)
            recorder.flush()
            recorder.close()

    recorder.on_record(listener)
    for _ in range(4):
        d.step()
        if recorder.session.journal.worker is not None:
            recorder.session.journal.worker.wait()
    assert recorder.step == 2  # in the background as the third one begins, of which nothing is recorded
    assert not d._optimizer_step_pre_hooks
    run = read(tmp_path / "run.zarr")
    assert heard[:2] == [1, 2]
    assert steps_in(run) == [1, 2]
    assert run["scalars"]["seen"].values[-1] == 2


def test_memory_is_bounded_while_a_disk_stays_full(
    two: tuple[nn.Module, Optimizer, Optimizer], tmp_path: Path, read: Read, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The oldest records beyond four chunks are dropped and counted; the newest are written once there is room."""
    model, d, _ = two

    def no_space(*args: Any) -> None:
        raise OSError(28, "No space left on device")

    with attach(d, model, tmp_path / "run.zarr", every=1) as recorder:
        with monkeypatch.context() as patched:
            patched.setattr(Files, "replace", no_space)
            for _ in range(5 * 64):
                d.step()
        assert recorder.dropped == 64  # each in all three groups
    run = read(tmp_path / "run.zarr")
    assert steps_in(run) == list(range(65, 321))
    assert run.attrs["dropped"] == 64


def test_one_bad_matrix_leaves_the_others_recorded(mlp: Make, tmp_path: Path, read: Read, monkeypatch: pytest.MonkeyPatch) -> None:
    measured = record_module.measure_update

    def measure(seen: Any) -> Any:
        return 1 / 0 if seen.weight_before.shape == (12, 12) else measured(seen)

    monkeypatch.setattr(record_module, "measure_update", measure)
    model = mlp()
    optimizer = SGD(model.parameters(), lr=0.1)
    with attach(optimizer, model, tmp_path / "run.zarr", every=1) as recorder:
        model(torch.ones(4, 8)).square().mean().backward()
        optimizer.step()
    finite = np.isfinite(read(tmp_path / "run.zarr")["update"]["update_rms"].values[0])
    shapes = [tuple(p.shape) for p in model.parameters() if p.ndim == 2]
    assert finite.tolist() == [shape != (12, 12) for shape in shapes]
    assert recorder.errors == shapes.count((12, 12)) > 0


def test_complex_parameters_are_left_out(tmp_path: Path, read: Read) -> None:
    parameters = [nn.Parameter(torch.ones(3, 3, dtype=torch.complex64)), nn.Parameter(torch.ones(2, 3))]
    for parameter in parameters:
        parameter.grad = torch.ones_like(parameter)
    optimizer = SGD(parameters, lr=0.1)
    with attach(optimizer, None, tmp_path / "run.zarr", every=1, on_error="raise"):
        optimizer.step()
    assert read(tmp_path / "run.zarr")["update"]["rows"].values.tolist() == [2]


@pytest.mark.parametrize("measure", ["update", "geometry"])
def test_a_single_group_can_be_recorded(measure: str, mlp: Make, tmp_path: Path, read: Read) -> None:
    model = mlp()
    optimizer = Muon(weights(model), lr=0.1)
    with attach(optimizer, model, tmp_path / "run.zarr", every=1, measure=[measure], on_error="raise"):
        model(torch.ones(4, 8)).square().mean().backward()
        optimizer.step()
    run = read(tmp_path / "run.zarr")
    assert set(run.children) == {measure, "scalars"}
    assert np.isfinite(run[measure]["fro_norm" if measure == "geometry" else "update_rms"].values).all()


@pytest.mark.parametrize("name", ["", ".", "..", "step", "zarr.json", "elapsed_seconds", "x" * 300])
def test_names_the_store_cannot_hold_lose_only_themselves(
    name: str, two: tuple[nn.Module, Optimizer, Optimizer], tmp_path: Path, read: Read
) -> None:
    model, d, _ = two
    with attach(d, model, tmp_path / "run.zarr", every=1) as recorder:
        d.step()
        recorder.log(**{"loss": 1.0, name: 7.0, "accuracy": 0.5})
    scalars = read(tmp_path / "run.zarr")["scalars"]
    assert (scalars["loss"].values[-1], scalars["accuracy"].values[-1]) == (1.0, 0.5)
    assert scalars["elapsed_seconds"].values[-1] < 7
    assert recorder.errors == 1


def test_what_is_logged_after_close_is_written(two: tuple[nn.Module, Optimizer, Optimizer], tmp_path: Path, read: Read) -> None:
    model, d, _ = two
    with attach(d, model, tmp_path / "run.zarr", every=1) as recorder:
        d.step()
        recorder.log(loss=1.0)
    recorder.log(test_loss=2.0)
    scalars = read(tmp_path / "run.zarr")["scalars"]
    assert (scalars["loss"].sel(step=1), scalars["test_loss"].sel(step=1)) == (1.0, 2.0)


def test_scalar_steps_stay_unique_over_a_continued_run(two: tuple[nn.Module, Optimizer, Optimizer], tmp_path: Path, read: Read) -> None:
    model, d, _ = two
    for session in (1, 2):
        with attach(d, model, tmp_path / "run.zarr", every=1, on_error="raise") as recorder:
            recorder.log(**{f"before_{session}": 1.0})
            for _ in range(2):
                d.step()
                recorder.flush()
                recorder.log(loss=session)
    scalars = read(tmp_path / "run.zarr")["scalars"]
    assert scalars["step"].values.tolist() == [0, 1, 2, 3, 4]
    assert scalars["loss"].values.tolist()[1:] == [1, 1, 2, 2]
    assert (scalars["before_1"].sel(step=0), scalars["before_2"].sel(step=2)) == (1.0, 1.0)


@pytest.mark.parametrize("fused", [True, False])
def test_loss_scaling_is_taken_out_and_skipped_steps_do_not_count(fused: bool, tmp_path: Path, read: Read) -> None:
    """A fused optimizer gets scaled gradients, and runs its hooks on a step that it skips for an infinity."""
    torch.manual_seed(0)
    model = nn.Linear(6, 4, bias=False)
    optimizer = AdamW(model.parameters(), lr=1e-2, fused=fused)
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
    true: list[float] = []
    with attach(optimizer, model, tmp_path / "run.zarr", every=1, on_error="raise") as recorder:
        for step in range(5):
            x = torch.randn(3, 6)
            loss = model(x).square().mean()
            scaler.scale(loss * (float("inf") if step == 2 else 1.0)).backward()
            if step != 2:
                true.append(model.weight.grad.double().square().mean().sqrt().item() / scaler.get_scale())  # type: ignore[union-attr]
            scaler.step(optimizer)
            scaler.update()
            optimizer.zero_grad()
    update = read(tmp_path / "run.zarr")["update"]
    assert recorder.step == 4
    assert update["step"].values.tolist() == [1, 2, 3, 4]
    np.testing.assert_allclose(update["grad_rms"].values[:, 0], true, rtol=1e-6)
    assert (update["update_rms"].values > 0).all()


def test_run_moved_away_while_training_goes_on(
    two: tuple[nn.Module, Optimizer, Optimizer], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    model, d, _ = two
    with attach(d, model, tmp_path / "run.zarr", every=1) as recorder:
        (tmp_path / "run.zarr").rename(tmp_path / "elsewhere")
        d.step()
    assert recorder.errors == 0
    trouble, loss = (record.getMessage() for record in caplog.records)
    assert "could not be written (FileNotFoundError" in trouble
    assert "1 records, of steps 1 to 1, could not be written" in loss
    assert not (tmp_path / "run.zarr").exists()


@pytest.mark.parametrize("background", [False, True])
def test_the_first_record_is_committed_at_once(tmp_path, background):
    """Whoever looks at a run that has just begun sees a record, not an empty run for half a minute."""
    model = torch.nn.Linear(4, 4)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    with attach(optimizer, model, tmp_path / "run.zarr", every=1, background=background) as recorder:
        for _ in range(2):
            model(torch.ones(2, 4)).sum().backward()
            optimizer.step()
            if recorder.session.journal.worker is not None:
                recorder.session.journal.worker.wait()
            steps = open_run(tmp_path / "run.zarr")["update"]["step"].values.tolist()
            assert steps == [1]  # the second waits for the next commit
