"""What is known of these optimizers in closed form, and decoding by hand of what they keep quantised."""

from collections.abc import Callable, Sequence
from importlib import import_module
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from torch import nn

from contract.one_matrix import Build, momentum, random, recorded, second_moment


def made(package: str, name: str, **settings: Any) -> Build:
    return lambda parameters: getattr(import_module(package), name)(parameters, **settings)


def in_training(build: Build) -> Build:
    """An optimizer that has to be told that training begins."""

    def told(parameters: Sequence[nn.Parameter]) -> Any:
        optimizer = build(parameters)
        optimizer.train()
        return optimizer

    return told


def by_blocks(codes: NDArray[Any], levels: NDArray[Any], scales: NDArray[Any], shape: tuple[int, ...]) -> NDArray[Any]:
    """The level of every code, times the scale of its block of equal length."""
    return (levels[codes].reshape(len(scales), -1) * scales[:, None]).reshape(shape)


def _bitsandbytes(state: dict[str, Any], which: int, shape: tuple[int, ...]) -> NDArray[Any]:
    codes, levels, scales = (state[f"{key}{which}"].numpy() for key in ("state", "qmap", "absmax"))
    return by_blocks(codes.ravel(), levels, scales, shape)


def _torchao(state: dict[str, Any], which: int, shape: tuple[int, ...]) -> NDArray[Any]:
    kept = state["exp_avg" if which == 1 else "exp_avg_sq"]
    codes, scales = kept.codes, kept.scale.numpy()
    if not hasattr(kept, "qmap"):  # float8 numbers are their own levels
        return by_blocks(np.arange(codes.numel()), codes.float().numpy().ravel(), scales, shape)
    unpacked = np.stack([codes.numpy() >> 4, codes.numpy() & 15], -1) if codes.ndim == 1 else codes.numpy()
    return by_blocks(unpacked.ravel(), kept.qmap.numpy(), scales, shape)


Decoder = Callable[[dict[str, Any], int, tuple[int, ...]], NDArray[Any]]


@pytest.mark.parametrize(
    ("package", "name", "decode"),
    [
        ("bitsandbytes.optim", "AdamW8bit", _bitsandbytes),
        ("torchao.optim", "AdamW8bit", _torchao),
        ("torchao.optim", "AdamW4bit", _torchao),
        ("torchao.optim", "AdamWFp8", _torchao),
    ],
)
def test_quantised_moments_are_decoded(package: str, name: str, decode: Decoder, tmp_path: Path) -> None:
    """Level of the code × scale of its block, for a matrix of 5120 numbers; and the first moment points where the gradients did."""
    gradients = [random(64, 80, seed=t) for t in range(3)]
    with torch.compiler.set_stance("force_eager"):
        run, optimizer, parameter = recorded(made(package, name), random(64, 80), gradients, tmp_path / "run.zarr")
    state = optimizer.state[parameter]
    m, v = momentum(optimizer, parameter), second_moment(optimizer, parameter)
    assert v.form == "quantised"
    np.testing.assert_allclose(m.numpy(), decode(state, 1, (64, 80)), rtol=1e-6)
    np.testing.assert_allclose(v.values.numpy(), decode(state, 2, (64, 80)), rtol=1e-6)
    np.testing.assert_allclose(run["momentum_rms"][-1, 0], np.sqrt(np.mean(m.double().numpy() ** 2)), rtol=1e-12)
    average = sum(0.1 * 0.9 ** (2 - t) * gradient for t, gradient in enumerate(gradients))
    assert float(torch.nn.functional.cosine_similarity(m.flatten(), average.flatten(), dim=0)) > 0.95


@pytest.mark.parametrize("build", [made("lion_pytorch", "Lion", lr=0.01), made("bitsandbytes.optim", "Lion8bit", lr=0.01)])
def test_every_coordinate_of_lions_update_is_plus_or_minus_one(build: Build, tmp_path: Path) -> None:
    run, _, _ = recorded(build, random(16, 12), [random(16, 12, seed=t) for t in range(4)], tmp_path / "run.zarr")
    np.testing.assert_allclose(run["update_rms_per_lr"], 1.0, rtol=1e-5)


@pytest.mark.parametrize(
    "build",
    [
        in_training(made("schedulefree", "AdamWScheduleFree", lr=0.01, weight_decay=0.1)),
        in_training(made("pytorch_optimizer", "ScheduleFreeAdamW", lr=0.01, weight_decay=0.1)),
        made("bitsandbytes.optim", "AdamW8bit", lr=0.01, weight_decay=0.1),
        made("prodigyopt", "Prodigy", d0=0.01, use_bias_correction=True, weight_decay=0.1),
        made("pytorch_optimizer", "Prodigy", d0=0.01, bias_correction=True, weight_decay=0.1),
    ],
)
def test_adams_first_step_has_the_learning_rate_in_every_coordinate(build: Build, tmp_path: Path) -> None:
    """m̂/√v̂ = ±1 once the decay is taken out; of Schedule-Free, x = y = z after one step."""
    run, _, _ = recorded(build, random(16, 12), [random(16, 12, seed=1)], tmp_path / "run.zarr")
    np.testing.assert_allclose(run["update_rms_per_lr"], 1.0, rtol=1e-5)


def test_sophias_update_is_a_sign_without_curvature_and_nothing_under_much(tmp_path: Path) -> None:
    """U = clip(m/(ρBh), 1): ±1 for h = 0, and 0 for h → ∞."""
    gradients = [random(8, 6, seed=t) for t in range(2)]
    flat, _, _ = recorded(made("sophia_opt", "SophiaG", lr=0.01, weight_decay=0.1), random(8, 6), gradients, tmp_path / "flat.zarr")
    np.testing.assert_allclose(flat["update_rms_per_lr"], 1.0, rtol=1e-5)

    def curved(parameters: Sequence[nn.Parameter]) -> Any:
        optimizer = made("sophia_opt", "SophiaG", lr=0.01, weight_decay=0.0)(parameters)
        parameters[0].grad = torch.full((8, 6), 1e6)
        optimizer.update_hessian()
        return optimizer

    run, optimizer, parameter = recorded(curved, random(8, 6), gradients, tmp_path / "curved.zarr")
    assert (run["update_rms"] < 1e-9).all()
    assert second_moment(optimizer, parameter).form == "hessian"
    np.testing.assert_allclose(second_moment(optimizer, parameter).values.numpy(), 0.01 * 1e12, rtol=1e-6)


@pytest.mark.parametrize(
    ("build", "share"),
    [
        (made("lion_pytorch", "Lion", lr=0.03, weight_decay=0.1), 0.003),
        (made("lion_pytorch", "Lion", lr=0.03, weight_decay=0.1, decoupled_weight_decay=True), 0.1),
        (made("bitsandbytes.optim", "Adam8bit", lr=0.03, weight_decay=0.1), 0.003),
        (made("sophia_opt", "SophiaG", lr=0.03, weight_decay=0.1), 0.003),
        (made("pytorch_optimizer", "Prodigy", d0=0.01, lr=0.5, weight_decay=0.1, fixed_decay=True), 0.1),
    ],
)
def test_decay_is_all_that_a_small_gradient_leaves(build: Build, share: float, tmp_path: Path) -> None:
    """W of size 1000 loses the share η·λ that was read; what then is left of the update is of Lion's size, ±1, or less."""
    run, _, _ = recorded(build, 1000 * random(16, 12), [1e-20 * random(16, 12, seed=1)], tmp_path / "run.zarr")
    np.testing.assert_allclose(run["update_rms"] / run["weight_rms"], share, rtol=2e-2)
    assert (run["update_rms_per_lr"] < 1.1).all()
