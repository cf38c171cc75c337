"""Training with a recorder is bitwise the training without: parameters, gradients, optimizer state, random numbers.

The fingerprint of a training is the bytes of all of these. That it can tell is shown first, on hooks that do disturb.
"""

import copy
import pickle
import random
import threading
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.optim import SGD, Adam, AdamW, Muon, Optimizer
from torch.optim import _muon as torch_muon
from torch.optim.lr_scheduler import StepLR

from optiscope.examples.byte_llama import ByteLlama, Config
from optiscope.hooks import Recorder, attach

STEPS = 50

Build = Callable[[nn.Module], list[Optimizer]]
Make = Callable[..., nn.Sequential]
Watch = Callable[[list[Optimizer], nn.Module], Recorder]


def matrices(model: nn.Module) -> list[nn.Parameter]:
    return [p for p in model.parameters() if p.ndim == 2]


def vectors(model: nn.Module) -> list[nn.Parameter]:
    return [p for p in model.parameters() if p.ndim != 2]


OPTIMIZERS: dict[str, Build] = {
    "Muon": lambda model: [Muon(matrices(model), lr=0.05)],
    "Muon without Nesterov": lambda model: [Muon(matrices(model), lr=0.05, nesterov=False)],
    "Muon, original": lambda model: [Muon(matrices(model), lr=0.05, adjust_lr_fn="original", nesterov=False)],
    "Muon, match_rms_adamw": lambda model: [Muon(matrices(model), lr=0.05, adjust_lr_fn="match_rms_adamw")],
    "AdamW": lambda model: [AdamW(model.parameters(), lr=0.01, weight_decay=0.1)],
    "Adam with coupled decay": lambda model: [Adam(model.parameters(), lr=0.01, weight_decay=0.1)],
    "SGD": lambda model: [SGD(model.parameters(), lr=0.05)],
    "SGD with momentum": lambda model: [SGD(model.parameters(), lr=0.05, momentum=0.9, weight_decay=0.01)],
    "SGD with Nesterov": lambda model: [SGD(model.parameters(), lr=0.05, momentum=0.9, nesterov=True)],
    "Muon and AdamW": lambda model: [Muon(matrices(model), lr=0.05), AdamW(vectors(model), lr=0.01)],
}


def as_bytes(tensor: Tensor) -> bytes:
    return tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().tobytes()


def random_numbers() -> tuple[Any, ...]:
    """The state of every global generator."""
    return as_bytes(torch.get_rng_state()), pickle.dumps(np.random.get_state()), random.getstate()  # noqa: NPY002


def seed_everything() -> None:
    torch.manual_seed(1)
    np.random.seed(1)  # noqa: NPY002
    random.seed(1)


def state_bytes(optimizer: Optimizer) -> list[dict[str, Any]]:
    """Everything in `optimizer.state`, parameters in the groups' order; None where a parameter has no entry."""
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    assert set(optimizer.state) <= set(parameters)
    entries = [optimizer.state.get(p) for p in parameters]
    return [{k: as_bytes(v) if isinstance(v, Tensor) else v for k, v in entry.items()} if entry is not None else None for entry in entries]


def batch(model: nn.Module, step: int) -> Tensor:
    """A loss whose data draw from all three global generators."""
    data = torch.randn(6, 8) + float(np.random.rand()) + random.random()  # noqa: NPY002
    return model(data.to(next(model.parameters()).dtype)).square().mean()


def train(
    build: Build, model: nn.Module, watch: Watch | None, steps: int = STEPS, loss_of: Callable[[nn.Module, int], Tensor] = batch
) -> dict[str, Any]:
    """Train and give the fingerprint: the gradients of every step, and everything as it is in the end."""
    optimizers = build(model)
    recorder = watch(optimizers, model) if watch else None
    seed_everything()
    gradients: list[bytes] = []
    losses: list[float] = []
    for step in range(1, steps + 1):
        for optimizer in optimizers:
            optimizer.zero_grad()
        loss = loss_of(model, step)
        loss.backward()
        for optimizer in optimizers:
            optimizer.step()
        if recorder:
            recorder.log(loss=loss)
        losses.append(loss.item())
        gradients += [as_bytes(p.grad) for p in model.parameters() if p.grad is not None]
    if recorder:
        recorder.close()
        assert (recorder.step, recorder.errors) == (steps, 0)
    return {
        "parameters": [as_bytes(p) for p in model.parameters()],
        "gradients": gradients,
        "losses": losses,
        "state": [state_bytes(o) for o in optimizers],
        "groups": [[{k: v for k, v in g.items() if k != "params"} for g in o.param_groups] for o in optimizers],
        "random numbers": random_numbers(),
    }


def recording(path: Path, **options: Any) -> Watch:
    return lambda optimizers, model: attach(optimizers, model, path, on_error="raise", **options)


def test_fingerprint_sees_a_hook_that_draws_a_random_number(mlp: Make) -> None:
    def disturbed(optimizers: list[Optimizer], model: nn.Module) -> Any:
        optimizers[0].register_step_post_hook(lambda *_: torch.rand(1))

    plain = train(OPTIMIZERS["AdamW"], mlp(), None, steps=2)
    other = train(OPTIMIZERS["AdamW"], mlp(), disturbed, steps=2)
    assert {key for key in plain if plain[key] != other[key]} >= {"parameters", "gradients", "random numbers"}


def test_fingerprint_sees_a_hook_that_looks_up_missing_state(mlp: Make) -> None:
    def disturbed(optimizers: list[Optimizer], model: nn.Module) -> Any:
        optimizers[0].register_step_post_hook(lambda optimizer, *_: [optimizer.state[p] for p in model.parameters()])

    plain = train(OPTIMIZERS["SGD"], mlp(), None, steps=2)
    other = train(OPTIMIZERS["SGD"], mlp(), disturbed, steps=2)
    assert {key for key in plain if plain[key] != other[key]} == {"state"}


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_bitwise_neutral(name: str, mlp: Make, tmp_path: Path, read: Callable[..., Any]) -> None:
    plain = train(OPTIMIZERS[name], mlp(), None)
    for every, records in ((1, 50), (7, 7)):
        path = tmp_path / f"{every}.zarr"
        assert train(OPTIMIZERS[name], mlp(), recording(path, every=every)) == plain
        assert read(path)["update"].sizes["step"] == records


@pytest.mark.parametrize("name", ["Muon", "Muon without Nesterov", "Muon and AdamW", "SGD with Nesterov"])
def test_bitwise_neutral_for_bfloat16_parameters(name: str, mlp: Make, tmp_path: Path) -> None:
    plain = train(OPTIMIZERS[name], mlp(dtype=torch.bfloat16), None)
    for every in (1, 7):
        assert train(OPTIMIZERS[name], mlp(dtype=torch.bfloat16), recording(tmp_path / f"{every}.zarr", every=every)) == plain


def test_bitwise_neutral_on_a_llama_with_the_cadence_left_to_the_recorder(tmp_path: Path) -> None:
    config = Config(d=32, layers=1, heads=2, kv_heads=1, inner=48, sequence=16, batch=4)

    def llama() -> nn.Module:
        torch.manual_seed(0)
        model = ByteLlama(config)
        model.norm.register_forward_hook(lambda module, args, output: F.dropout(output, 0.1))
        return model

    def build(model: nn.Module) -> list[Optimizer]:
        hidden = [p for name, p in model.named_parameters() if p.ndim == 2 and name.startswith("layers")]
        return [Muon(hidden, lr=0.02), AdamW([p for p in model.parameters() if not any(p is h for h in hidden)], lr=3e-3)]

    def loss_of(model: nn.Module, step: int) -> Tensor:
        tokens = torch.randint(256, (config.batch, config.sequence + 1))
        return model(tokens[:, :-1], tokens[:, 1:])

    plain = train(build, llama(), None, loss_of=loss_of)
    assert train(build, llama(), recording(tmp_path / "auto.zarr", overhead=0.5), loss_of=loss_of) == plain
    assert train(build, llama(), recording(tmp_path / "7.zarr", every=7), loss_of=loss_of) == plain


@pytest.mark.parametrize("positional", [True, False])
@pytest.mark.parametrize("name", ["Muon", "AdamW", "SGD with momentum"])
def test_bitwise_neutral_with_closures(name: str, positional: bool, mlp: Make, tmp_path: Path) -> None:
    def train_with_closure(path: Path | None) -> list[Any]:
        model = mlp()
        [optimizer] = OPTIMIZERS[name](model)
        recorder = attach(optimizer, model, path, every=2, on_error="raise") if path else None
        seed_everything()
        losses = []
        for step in range(20):

            def closure() -> Tensor:
                optimizer.zero_grad()
                loss = batch(model, step)  # noqa: B023
                loss.backward()
                assert torch.is_grad_enabled()
                return loss

            losses.append((optimizer.step(closure) if positional else optimizer.step(closure=closure)).item())
        if recorder:
            recorder.close()
        return [losses, [as_bytes(p) for p in model.parameters()], state_bytes(optimizer), random_numbers()]

    assert train_with_closure(tmp_path / "run.zarr") == train_with_closure(None)


def test_bitwise_neutral_with_lbfgs_which_calls_its_closure_many_times(mlp: Make, tmp_path: Path) -> None:
    def train_with_lbfgs(path: Path | None) -> list[Any]:
        model = mlp(dropout=0.0)
        optimizer = torch.optim.LBFGS(model.parameters(), lr=0.1, max_iter=4)
        recorder = attach(optimizer, model, path, every=1, on_error="raise") if path else None
        data, calls = torch.randn(6, 8, generator=torch.Generator().manual_seed(0)), []

        def closure() -> Tensor:
            optimizer.zero_grad()
            loss = model(data).square().mean()
            loss.backward()
            calls.append(loss.item())
            return loss

        for _ in range(3):
            optimizer.step(closure)
        if recorder:
            recorder.close()
        return [calls, [as_bytes(p) for p in model.parameters()], optimizer.state_dict()["state"][0]["func_evals"]]

    plain = train_with_lbfgs(None)
    assert len(plain[0]) > 3
    assert train_with_lbfgs(tmp_path / "run.zarr") == plain


def test_bitwise_neutral_with_accumulation_and_a_scheduler(mlp: Make, tmp_path: Path) -> None:
    def train_accumulating(path: Path | None) -> list[Any]:
        model = mlp()
        optimizers = OPTIMIZERS["Muon and AdamW"](model)
        schedulers = [StepLR(o, step_size=3, gamma=0.5) for o in optimizers]
        recorder = attach(optimizers, model, path, every=1, on_error="raise") if path else None
        seed_everything()
        for step in range(8):
            for _ in range(4):
                (batch(model, step) / 4).backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 0.1)
            for optimizer, scheduler in zip(optimizers, schedulers, strict=True):
                optimizer.step()
                scheduler.step()
                optimizer.zero_grad()
        if recorder:
            recorder.close()
            assert recorder.step == 8
        rates = [s.get_last_lr() for s in schedulers]
        return [rates, [as_bytes(p) for p in model.parameters()], [state_bytes(o) for o in optimizers], random_numbers()]

    assert train_accumulating(tmp_path / "run.zarr") == train_accumulating(None)


def test_step_arguments_that_are_no_closure_pass_through(mlp: Make, tmp_path: Path) -> None:
    class Scaled(Optimizer):
        """Its step takes a number where others take a closure, and calls a function with an argument of its own."""

        def __init__(self, params: Iterator[nn.Parameter]) -> None:
            super().__init__(params, {"lr": None})

        @torch.no_grad()
        def step(self, scale: float, closure: Callable[[str], float] | None = None) -> float:  # type: ignore[override]
            for group in self.param_groups:
                for p in group["params"]:
                    p.add_(p.grad, alpha=-scale)
            return closure("now") if closure else scale

    model = mlp()
    before = [p.detach().clone() for p in model.parameters()]
    optimizer = Scaled(model.parameters())
    with attach(optimizer, model, tmp_path / "run.zarr", every=1, on_error="raise"):
        batch(model, 0).backward()
        assert optimizer.step(0.5) == 0.5  # type: ignore[arg-type]
        assert optimizer.step(0.5, closure=len) == 3  # type: ignore[arg-type]
    for p, old in zip(model.parameters(), before, strict=True):
        assert torch.equal(p, (old - 0.5 * p.grad) - 0.5 * p.grad)


def test_hooks_are_gone_after_close_and_stay_out_of_copies(mlp: Make, tmp_path: Path) -> None:
    model = mlp()
    optimizers = OPTIMIZERS["Muon and AdamW"](model)
    with attach(optimizers, model, tmp_path / "run.zarr", every=1) as recorder:
        batch(model, 0).backward()
        for optimizer in optimizers:
            optimizer.step()
            assert len(optimizer._optimizer_step_pre_hooks) == len(optimizer._optimizer_step_post_hooks) == 1
            for twin in (copy.deepcopy(optimizer), pickle.loads(pickle.dumps(optimizer))):
                assert not twin._optimizer_step_pre_hooks
                assert not twin._optimizer_step_post_hooks
                for p in twin.param_groups[0]["params"]:
                    p.grad = torch.ones_like(p)
                twin.step()
        assert recorder.step == 1
    recorder.close()
    for optimizer in optimizers:
        assert not optimizer._optimizer_step_pre_hooks
        assert not optimizer._optimizer_step_post_hooks
        optimizer.step()
    assert recorder.step == 1


def test_hooks_survive_load_state_dict_and_stay_out_of_state_dict(mlp: Make, tmp_path: Path) -> None:
    model, reference = mlp(), mlp()
    [optimizer], [plain] = OPTIMIZERS["Muon"](model), OPTIMIZERS["Muon"](reference)
    with attach(optimizer, model, tmp_path / "run.zarr", every=1) as recorder:
        for m, o in ((model, optimizer), (reference, plain)):
            seed_everything()
            batch(m, 0).backward()
            o.step()
        assert pickle.dumps(optimizer.state_dict()["param_groups"]) == pickle.dumps(plain.state_dict()["param_groups"])
        assert state_bytes(optimizer) == state_bytes(plain)
        optimizer.load_state_dict(plain.state_dict())
        optimizer.step()
        assert recorder.step == 2


def test_no_state_for_a_parameter_that_never_gets_a_gradient(mlp: Make, tmp_path: Path) -> None:
    model = mlp()
    optimizer = AdamW(model.parameters())
    unused = model[0].weight
    unused.requires_grad_(False)
    with attach(optimizer, model, tmp_path / "run.zarr", every=1):
        batch(model, 0).backward()
        optimizer.step()
    assert unused not in optimizer.state
    assert len(optimizer.state) == len(list(model.parameters())) - 1


def test_global_state_is_left_alone(mlp: Make, tmp_path: Path) -> None:
    def global_state() -> dict[str, Any]:
        return {
            "grad mode": torch.is_grad_enabled(),
            "default dtype": torch.get_default_dtype(),
            "torch threads": torch.get_num_threads(),
            "matmul precision": torch.get_float32_matmul_precision(),
            "deterministic": torch.are_deterministic_algorithms_enabled(),
            "warning filters": list(warnings.filters),
            "NumPy errors": np.geterr(),
            "NumPy printing": np.get_printoptions(),
            "torch.optim._muon": dict(vars(torch_muon)),
            "random numbers": random_numbers(),
            "exception hook": threading.excepthook,
        }

    model = mlp()
    optimizers = OPTIMIZERS["Muon and AdamW"](model)
    batch(model, 0).backward()
    before = global_state()
    recorder = attach(optimizers, model, tmp_path / "run.zarr", every=1)
    assert global_state() == before
    for optimizer in optimizers:
        optimizer.step()
    recorder.log(loss=1.0)
    recorder.flush()
    assert global_state() == before
    recorder.close()
    assert global_state() == before


def test_no_grad_of_the_caller_stays_in_force(mlp: Make, tmp_path: Path) -> None:
    model = mlp()
    [optimizer] = OPTIMIZERS["AdamW"](model)
    batch(model, 0).backward()
    with attach(optimizer, model, tmp_path / "run.zarr", every=1), torch.no_grad():
        optimizer.step()
        assert not torch.is_grad_enabled()
    assert torch.is_grad_enabled()
