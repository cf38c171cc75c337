"""Optimizers stepped otherwise than by one call after a backward: within the backward, compiled, wrapped, copied, in DDP."""

import copy
import gc
import io
import logging
import pickle
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist
import xarray as xr
from torch import nn
from torch.nn.parallel import DistributedDataParallel
from torch.optim import SGD, AdamW, Muon

from optiscope.hooks import attach
from optiscope.hooks.recording.lifetime import still_open

Make = Callable[..., nn.Sequential]
Read = Callable[[str | Path], xr.DataTree]


# torch.distributed.optim scripts a function when it is imported.
with warnings.catch_warnings():
    warnings.simplefilter("ignore", DeprecationWarning)
    from torch.distributed.optim import _apply_optimizer_in_backward


def data(seed: int) -> torch.Tensor:
    return torch.randn(16, 8, generator=torch.Generator().manual_seed(seed))


def bits(model: nn.Module) -> list[bytes]:
    return [p.detach().numpy().tobytes() for p in model.parameters()]


def test_optimizers_in_the_backward(mlp: Make, tmp_path: Path, read: Read) -> None:
    """One optimizer per parameter, stepped as soon as its gradient is there, which is gone after the backward."""

    def train(store: Path | None) -> tuple[list[bytes], Any]:
        model = mlp(dropout=0.0)
        _apply_optimizer_in_backward(SGD, model.parameters(), {"lr": 0.1, "momentum": 0.9})
        optimizers = [optimizer for p in model.parameters() for optimizer in p._in_backward_optimizers]  # type: ignore[attr-defined]
        recorder = attach(optimizers, model, store, every=1, on_error="raise") if store else None
        for t in range(4):
            model(data(t)).square().mean().backward()
            assert all(p.grad is None for p in model.parameters())
        if recorder is not None:
            assert recorder.step == 4
            recorder.close()
        return bits(model), None

    assert train(None) == train(tmp_path / "run.zarr")
    update = read(tmp_path / "run.zarr")["update"]
    assert update["step"].values.tolist() == [1, 2, 3, 4]
    assert update["name"].values.tolist() == ["0.weight", "3.weight", "6.weight"]
    for name in ("update_rms", "grad_rms", "momentum_rms"):
        assert (update[name].values > 0).all()


@pytest.mark.filterwarnings("ignore:`torch.jit:DeprecationWarning")  # of torch, while it traces its own optimizer
def test_compiled_steps(mlp: Make, tmp_path: Path, read: Read) -> None:
    """The hooks are kept out of the graph; the eager backend runs the captured graph as it is."""

    def train(store: Path | None) -> list[bytes]:
        torch._dynamo.reset()
        model = mlp(dropout=0.0)
        optimizer = AdamW(model.parameters(), lr=0.01)
        recorder = attach(optimizer, model, store, every=2, on_error="raise") if store else None
        compiled = torch.compile(optimizer.step, backend="eager")
        for t in range(4):
            model.zero_grad()
            model(data(t)).square().mean().backward()
            compiled()
        if recorder is not None:
            recorder.close()
        return bits(model)

    assert train(None) == train(tmp_path / "run.zarr")
    update = read(tmp_path / "run.zarr")["update"]
    assert update["step"].values.tolist() == [2, 4]
    assert np.isfinite(update["momentum_rms"].values).all()


def test_compiled_model_has_no_more_graph_breaks(mlp: Make, tmp_path: Path, read: Read) -> None:
    def breaks(model: nn.Module) -> tuple[int, int]:
        torch._dynamo.reset()
        explained = torch._dynamo.explain(model)(data(0))
        return explained.graph_count, explained.graph_break_count

    model = mlp(dropout=0.0)
    plain = breaks(model)
    compiled = torch.compile(model, backend="eager")
    optimizer = Muon([p for p in model.parameters() if p.ndim == 2])
    with attach(optimizer, compiled, tmp_path / "run.zarr", every=1, on_error="raise"):  # type: ignore[arg-type]
        for t in range(2):
            compiled(data(t)).square().mean().backward()
            optimizer.step()
        assert breaks(model) == plain == (1, 0)
    assert read(tmp_path / "run.zarr")["update"]["name"].values.tolist() == ["0.weight", "3.weight", "6.weight"]


def test_a_step_that_is_captured_into_a_cuda_graph_is_refused_once(
    mlp: Make, tmp_path: Path, read: Read, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """No accelerator is needed to show what the hooks do where torch says that a capture goes on: nothing but one sentence.

    Reading a tensor is what breaks a capture, so a read under it fails the test; steps 3 and 4 are "captured", which carries nothing out.
    """
    model = mlp(dropout=0.0)
    optimizer = AdamW(model.parameters(), lr=0.01)

    def read_under_capture(*args: object, **kwargs: object) -> None:
        raise AssertionError("read while a graph was captured")

    with attach(optimizer, model, tmp_path / "run.zarr", every=1, on_error="raise") as recorder:
        for t in range(6):
            model.zero_grad()
            model(data(t)).square().mean().backward()
            with monkeypatch.context() as under:
                if t in (2, 3):
                    under.setattr(torch.cuda, "is_initialized", lambda: True)
                    under.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
                    under.setattr(optimizer, "param_groups", [])  # nothing is carried out
                    for name in ("clone", "cpu", "item", "tolist", "__float__"):
                        under.setattr(torch.Tensor, name, read_under_capture)
                optimizer.step()
        assert recorder.step == 4
    told = [r.getMessage() for r in caplog.records]
    assert [message for message in told if "CUDA graph" in message] == [message for message in told if "AdamW" in message]
    assert len([message for message in told if "keep the optimizer's step out of the graph" in message]) == 1
    update = read(tmp_path / "run.zarr")["update"]
    assert update["step"].values.tolist() == [1, 2, 3, 4]
    assert np.isfinite(update["update_rms"].values).all()


def test_a_recorder_that_saw_no_step_says_what_may_be_why(mlp: Make, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    model = mlp(dropout=0.0)
    with attach(AdamW(model.parameters()), model, tmp_path / "run.zarr"):
        pass
    assert "no step of AdamW was seen; attach to the very objects whose step() is called" in caplog.text
    assert "replayed from a CUDA graph" in caplog.text


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda o: pickle.loads(pickle.dumps(o))], ids=["deepcopy", "pickle"])
def test_copy_of_a_hooked_optimizer_is_a_free_one(copied: Callable[[Any], Any], mlp: Make, tmp_path: Path) -> None:
    """Model and optimizer copied together, as for a later comparison: the copy steps to the same bits and records nothing."""
    model = mlp(dropout=0.0)
    optimizer = AdamW(model.parameters(), lr=0.01)
    with attach(optimizer, model, tmp_path / "run.zarr", every=1, on_error="raise") as recorder:
        for t in range(4):
            model.zero_grad()
            model(data(t)).square().mean().backward()
            if t == 2:
                twin, its_optimizer = copied((model, optimizer))
            optimizer.step()
            if t >= 2:
                twin.zero_grad()
                twin(data(t)).square().mean().backward()
                its_optimizer.step()
        assert recorder.step == 4
    assert bits(twin) == bits(model)
    assert not its_optimizer._optimizer_step_pre_hooks


def test_state_dict_holds_nothing_of_the_recorder(mlp: Make, tmp_path: Path) -> None:
    """A checkpoint saved under a recorder is byte for byte the one saved without."""

    def checkpoint(store: Path | None) -> bytes:
        model = mlp(dropout=0.0)
        optimizer = AdamW(model.parameters(), lr=0.01)
        recorder = attach(optimizer, model, store, every=1, on_error="raise") if store else None
        model(data(0)).square().mean().backward()
        optimizer.step()
        file = io.BytesIO()
        torch.save({"model": model.state_dict(), "optimizer": optimizer.state_dict()}, file)
        if recorder is not None:
            recorder.close()
        return file.getvalue()

    assert checkpoint(None) == checkpoint(tmp_path / "run.zarr")


def test_hooked_optimizer_in_ddp(mlp: Make, tmp_path: Path, read: Read) -> None:
    def train(store: Path | None) -> list[bytes]:
        model = mlp(dropout=0.0)
        optimizer = AdamW(model.parameters(), lr=0.01)
        before = attach(optimizer, model, store, every=1, on_error="raise") if store else None
        wrapped = DistributedDataParallel(model)
        for t in range(3):
            optimizer.zero_grad()
            wrapped(data(t)).square().mean().backward()
            optimizer.step()
        if before is not None:
            before.close()
            with attach(optimizer, wrapped, tmp_path / "wrapped.zarr", every=1):
                pass
        return bits(model)

    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/rendezvous", rank=0, world_size=1)
    try:
        assert train(None) == train(tmp_path / "run.zarr")
    finally:
        dist.destroy_process_group()
    names = [read(tmp_path / store)["update"]["name"].values.tolist() for store in ("run.zarr", "wrapped.zarr")]
    assert names == [["0.weight", "3.weight", "6.weight"]] * 2  # DDP's `module.` is not part of a name
    assert np.isfinite(read(tmp_path / "run.zarr")["update"]["grad_rms"].values).all()


def test_attaching_and_detaching_many_times_leaves_nothing(mlp: Make, tmp_path: Path) -> None:
    """500 cycles: hooks, state and the list of open recorders are as they were, and no object is left behind."""
    model = mlp(dropout=0.0)
    optimizer = SGD(model.parameters(), lr=0.1, momentum=0.9)
    model(data(0)).square().mean().backward()
    optimizer.step()
    hooks = {name: dict(value) for name, value in vars(optimizer).items() if "hooks" in name}
    state = copy.deepcopy(optimizer.state_dict())
    keys = set(vars(optimizer)) | set(vars(model))
    others = set(still_open)

    def cycles(count: int) -> int:
        """How many objects Python's collector knows of after so many cycles."""
        for _ in range(count):
            attach(optimizer, model, tmp_path / "run.zarr", every=10**6, measure=["update"]).close()
        gc.collect()
        return len(gc.get_objects())

    logging.getLogger("optiscope").setLevel(logging.CRITICAL)  # every cycle says that no step was seen
    try:
        cycles(10)
        early = cycles(10)
        late = cycles(480)
    finally:
        logging.getLogger("optiscope").setLevel(logging.NOTSET)
    assert {name: dict(value) for name, value in vars(optimizer).items() if "hooks" in name} == hooks
    assert str(optimizer.state_dict()) == str(state)
    assert set(vars(optimizer)) | set(vars(model)) == keys
    assert still_open == others
    assert late - early < 100  # one object a cycle would be 480; seen: 0


def test_autocast(mlp: Make, tmp_path: Path, read: Read) -> None:
    """Activations in bfloat16, weights and gradients in float32: recorded as float32, training the same to the bit."""

    def train(store: Path | None) -> list[bytes]:
        model = mlp(dropout=0.1)
        optimizer = AdamW(model.parameters(), lr=0.01)
        recorder = attach(optimizer, model, store, every=1, on_error="raise") if store else None
        sizes = []
        for t in range(3):
            optimizer.zero_grad()
            with torch.autocast("cpu", dtype=torch.bfloat16):
                output = model(data(t))
            assert output.dtype == torch.bfloat16
            output.float().square().mean().backward()
            sizes.append([p.grad.double().square().mean().sqrt().item() for p in model.parameters() if p.ndim == 2])
            optimizer.step()
        if recorder is not None:
            recorder.close()
            assert read(tmp_path / "run.zarr")["update"]["grad_rms"].values == pytest.approx(np.array(sizes), rel=1e-12)
        return bits(model)

    assert train(None) == train(tmp_path / "run.zarr")


def test_bfloat16_weights_tell_the_applied_update_from_the_intended_one(mlp: Make, tmp_path: Path, read: Read) -> None:
    """At a small learning rate most bfloat16 weights do not move; what AdamW meant to do follows from its state."""
    model = mlp(dropout=0.0, dtype=torch.bfloat16)
    optimizer = AdamW(model.parameters(), lr=1e-4, betas=(0.9, 0.99), eps=1e-8, weight_decay=0.0)
    intended, applied = [], []
    with attach(optimizer, model, tmp_path / "run.zarr", every=1, on_error="raise"):
        for t in range(1, 5):
            optimizer.zero_grad()
            model(data(t).bfloat16()).square().mean().backward()
            weights = [p for p in model.parameters() if p.ndim == 2]
            before = [p.detach().double() for p in weights]
            optimizer.step()
            states = [optimizer.state[p] for p in weights]
            updates = [(s["exp_avg"].double() / (1 - 0.9**t)) / ((s["exp_avg_sq"].double() / (1 - 0.99**t)).sqrt() + 1e-8) for s in states]
            intended.append([u.square().mean().sqrt().item() for u in updates])
            applied.append([(a - b.detach().double()).square().mean().sqrt().item() / 1e-4 for a, b in zip(before, weights, strict=True)])
    update = read(tmp_path / "run.zarr")["update"]
    np.testing.assert_allclose(update["update_rms_intended"].values, intended, rtol=1e-5)  # read in float32
    np.testing.assert_allclose(update["update_rms_per_lr"].values, applied, rtol=1e-9)
    assert (update["update_noise"].values > 0.1).all()
    assert np.abs(np.divide(applied, intended) - 1).min() > 0.05
