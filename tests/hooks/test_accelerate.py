"""Accelerate needs nothing of its own: `attach` takes its optimizers, before and after `prepare`."""

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from optiscope.examples.byte_llama import ByteLlama, Config, batches, language_reference
from optiscope.hooks import attach

accelerate = pytest.importorskip("accelerate")

Read = Callable[[str | Path], Any]

CONFIG = Config(d=32, layers=1, heads=2, kv_heads=1, inner=48, sequence=16, batch=4)


@pytest.fixture(autouse=True)
def _accelerate_as_it_was() -> Iterator[None]:
    """Accelerate keeps its settings, of gradient accumulation among others, for the whole process."""
    yield
    accelerate.state.AcceleratorState._reset_state(reset_partial_state=True)
    accelerate.state.GradientState._reset_state()


def train(store: Path | None = None, *, prepared: bool = False) -> tuple[list[bytes], list[dict[str, Tensor]], int]:
    """Train for 10 batches, 5 steps: the weights and moments it leaves, the gradients of every step, and the hooks that stay."""
    accelerator = accelerate.Accelerator(cpu=True, gradient_accumulation_steps=2)
    torch.manual_seed(0)
    model = ByteLlama(CONFIG)
    hidden = [p for p in model.layers.parameters() if p.ndim == 2]
    rest = [p for p in model.parameters() if not any(p is h for h in hidden)]
    optimizers: Any = [torch.optim.Muon(hidden, lr=0.02), torch.optim.AdamW(rest, lr=3e-3)]
    bare = list(optimizers)
    recorder = attach(optimizers, model, store, every=1, on_error="raise") if store and not prepared else None
    prepared_model, *optimizers = accelerator.prepare(model, *optimizers)
    if store and prepared:
        assert all(isinstance(o, accelerate.optimizer.AcceleratedOptimizer) for o in optimizers)
        recorder = attach(optimizers, prepared_model, store, every=1, on_error="raise")

    generator, (text, _) = torch.Generator().manual_seed(0), language_reference()
    gradients: list[dict[str, Tensor]] = []
    for _ in range(10):
        with accelerator.accumulate(prepared_model):
            loss = prepared_model(*batches(text, CONFIG, generator))
            accelerator.backward(loss)
            if accelerator.sync_gradients:
                gradients.append({name: p.grad.clone() for name, p in model.named_parameters()})
            for optimizer in optimizers:
                optimizer.step()
                optimizer.zero_grad()
            if recorder and accelerator.sync_gradients:
                recorder.log(loss=loss)
    if recorder:
        recorder.close()
        assert (recorder.step, recorder.errors) == (5, 0)
    moments = [v for o in bare for group in o.param_groups for p in group["params"] for v in o.state[p].values()]
    left = [t.detach().numpy().tobytes() for t in (*model.parameters(), *moments)]
    return left, gradients, sum(len(o._optimizer_step_pre_hooks) + len(o._optimizer_step_post_hooks) for o in bare)


@pytest.mark.parametrize("prepared", [False, True], ids=["before prepare", "after prepare"])
def test_attaching(prepared: bool, tmp_path: Path, read: Read) -> None:
    plain, gradients, _ = train()
    left, _, hooks = train(tmp_path / "run.zarr", prepared=prepared)
    assert left == plain
    assert hooks == 0
    run = read(tmp_path / "run.zarr")
    for group in ("geometry", "update", "scalars"):
        assert run[group]["step"].values.tolist() == [1, 2, 3, 4, 5]
    assert np.isfinite(run["scalars"]["loss"]).all()
    update = run["update"].ds
    names = update["name"].values.tolist()
    assert set(update["optimizer"].values.tolist()) == {"Muon", "AdamW"}
    assert set(run["geometry"]["operator"].values.tolist()) == {
        "attn_q", "attn_k", "attn_v", "attn_o", "mlp_gate", "mlp_up", "mlp_down",
    }  # fmt: skip
    # The gradient is that of both batches of a step, as Accelerate has scaled it.
    for i, name in enumerate(names):
        expected = [seen[name].double().square().mean().sqrt().item() for seen in gradients]
        np.testing.assert_allclose(update["grad_rms"][:, i], expected, rtol=1e-6)
