"""`log` from anywhere: every open recorder takes the numbers by its own rules, and without one nothing happens."""

import multiprocessing
import threading

import pytest
import torch
from torch import nn

from optiscope.hooks import attach, log
from optiscope.hooks.recording.lifetime import still_open


@pytest.fixture(autouse=True)
def _only_recorders_of_the_test():
    """Recorders that tests before left open in this process are told nothing: which those are depends on the order of the tests."""
    others = set(still_open)
    still_open.difference_update(others)
    yield
    still_open.update(others)


def scalars(run):
    """Steps and values of what the user logged."""
    data = run["scalars"].to_dataset()
    own = [name for name in data.data_vars if not str(name).endswith("_seconds")]
    return {name: dict(zip(data["step"].values.tolist(), data[name].values.tolist(), strict=True)) for name in own}


def test_without_a_recorder_nothing_happens_and_nothing_is_read(two, tmp_path, read):
    class Unread:
        def __float__(self):
            raise AssertionError("read")

    log(loss=Unread())
    model, d, _ = two
    with attach(d, model, tmp_path / "run.zarr", every=1, on_error="raise"):
        d.step()
    log(loss=Unread())
    assert scalars(read(tmp_path / "run.zarr")) == {}


def test_every_open_recorder_takes_it_at_its_own_step(two, tmp_path, read):
    model, d, g = two
    with attach(d, model, tmp_path / "d.zarr", every=1, on_error="raise"):
        d.step()
        with attach(g, model, tmp_path / "g.zarr", every=1, on_error="raise"):
            log(loss=torch.ones(1, requires_grad=True) * 3, **{"train/self": 2})
            g.step()
        d.step()
        log(loss=4.0)
    assert scalars(read(tmp_path / "d.zarr")) == {
        "loss": {1: 3.0, 2: 4.0},
        "train.self": {1: 2.0, 2: pytest.approx(float("nan"), nan_ok=True)},
    }
    assert scalars(read(tmp_path / "g.zarr"))["loss"][0] == 3.0


def test_what_is_no_number_is_counted_and_told_and_costs_only_itself(two, tmp_path, read, caplog):
    model, d, _ = two
    with attach(d, model, tmp_path / "run.zarr", every=1) as recorder:
        d.step()
        log(loss=1.0, bad="words", worse=torch.ones(2), step=3)
    assert recorder.errors == 3
    assert caplog.text.count("recording failed at step 1 (ValueError: ") == 1
    assert scalars(read(tmp_path / "run.zarr")) == {"loss": {1: 1.0}}


def test_a_recorder_that_is_to_raise_raises(two, tmp_path):
    model, d, _ = two
    with attach(d, model, tmp_path / "run.zarr", every=1, on_error="raise"), pytest.raises(ValueError, match="could not convert string"):
        log(loss="words")


def test_a_listener_and_another_thread_may_log(two, tmp_path, read):
    model, d, _ = two
    with attach(d, model, tmp_path / "run.zarr", every=1, on_error="raise") as recorder:
        recorder.on_record(lambda record: log(seen=record.step))
        d.step()
        thread = threading.Thread(target=log, kwargs={"loss": 2.0})
        thread.start()
        thread.join()
    assert scalars(read(tmp_path / "run.zarr")) == {"seen": {1: 1.0}, "loss": {1: 2.0}}


def test_a_forked_child_logs_nothing(two, tmp_path, read):
    model, d, _ = two
    with attach(d, model, tmp_path / "run.zarr", every=1, on_error="raise"):
        d.step()
        child = multiprocessing.get_context("fork").Process(target=log, kwargs={"loss": 5.0})
        child.start()
        child.join()
        assert child.exitcode == 0
        log(loss=6.0)
    assert scalars(read(tmp_path / "run.zarr")) == {"loss": {1: 6.0}}


def test_a_training_that_logs_is_bitwise_the_one_that_does_not(mlp, tmp_path):
    def trained(record):
        model = mlp(seed=3)
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
        with attach(optimizer, model, tmp_path / "run.zarr", every=2, on_error="raise") if record else torch.enable_grad():
            for _ in range(5):
                optimizer.zero_grad()
                loss = nn.functional.mse_loss(model(torch.randn(4, 8)), torch.zeros(4, 5))
                log(loss=loss)
                loss.backward()
                optimizer.step()
        return [p.detach().clone() for p in model.parameters()], torch.get_rng_state()

    (plain, state), (recorded, state_of_recorded) = trained(record=False), trained(record=True)
    assert all(torch.equal(a, b) for a, b in zip(plain, recorded, strict=True))
    assert torch.equal(state, state_of_recorded)
