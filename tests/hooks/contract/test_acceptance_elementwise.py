"""What is known of these optimizers in closed form, seen through what is recorded of them."""

import warnings
from collections.abc import Sequence
from math import log, sqrt
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import xarray as xr
from torch import Tensor, nn

from contract.harness import float64
from contract.one_matrix import Build, Model, by_name, random, recorded, second_moment
from contract.transcriptions_elementwise import rms
from optiscope.hooks import attach

# Weight decay: where the gradient is zero, nothing else moves the weights.

_DECAYING = {
    "AdaBelief": {},
    "AdaBound": {},
    "AdaFactor": {},
    "AdaFactor, relative step off": {"relative_step": False, "scale_parameter": False},
    "APOLLO": {},
    "Lamb": {},
    "Lion": {},
    "MARS": {},
    "NovoGrad": {},
    "SophiaH": {},
}


@pytest.mark.parametrize("fixed", [False, True], ids=["", "fixed"])
@pytest.mark.parametrize("name", _DECAYING)
def test_decoupled_decay_is_all_that_a_zero_gradient_leaves(name: str, fixed: bool, tmp_path: Path) -> None:
    """W' = W(1 − ηλ) to the bit or nearly, so that nothing of the update is left once the decay that was read is taken out."""
    lr, decay = 0.03, 0.1
    build = by_name(name.split(",")[0], lr=lr, weight_decay=decay, weight_decouple=True, fixed_decay=fixed, **_DECAYING[name])
    of_step = {"hessian": [torch.zeros(6, 4)]} if name == "SophiaH" else {}
    run, _, _ = recorded(build, random(6, 4), [torch.zeros(6, 4)] * 3, tmp_path / "run.zarr", **of_step)
    lost = run["update_rms"] / run["weight_rms"]
    assert (lost > 1e-5).all()
    if fixed:
        np.testing.assert_allclose(lost, decay, rtol=1e-5)
    elif name not in ("AdaFactor", "APOLLO"):  # whose rate is not lr
        np.testing.assert_allclose(lost, lr * decay, rtol=1e-4)
    # A difference of float32 weights: rounding of 2⁻²⁴ relative to W.
    assert (run["update_rms_per_lr"] * run["lr"] < 1e-7 * run["weight_rms"]).all()


@pytest.mark.parametrize(
    "name", ["AdaBelief", "AdaBound", "AdaFactor", "APOLLO", "Lamb", "LARS", "Lion", "MARS", "NovoGrad", "Shampoo", "SophiaH", "Yogi"]
)
def test_coupled_decay_stays_inside_the_update(name: str, tmp_path: Path) -> None:
    settings = {} if name == "LARS" else {"weight_decouple": False}
    of_step = {"hessian": [torch.ones(6, 4)]} if name == "SophiaH" else {}
    gradients = [random(6, 4, seed=t) for t in range(3)]
    run, _, _ = recorded(by_name(name, lr=0.03, weight_decay=0.1, **settings), random(6, 4), gradients, tmp_path / "run.zarr", **of_step)
    np.testing.assert_allclose(run["update_rms_per_lr"] * run["lr"], run["update_rms"], rtol=1e-12)


def test_a_step_of_adamw_without_gradient_multiplies_by_one_less_the_decay(tmp_path: Path) -> None:
    def build(p: Sequence[nn.Parameter]) -> Any:
        return torch.optim.AdamW(p, lr=0.01, weight_decay=0.1)

    weight = random(6, 4)
    run, _, after = recorded(build, weight, [torch.zeros(6, 4)], tmp_path / "run.zarr")
    assert torch.equal(after.detach(), weight * (1 - 0.01 * 0.1))
    np.testing.assert_allclose(run["update_to_weight"], 1e-3, rtol=1e-4)


# Trust ratios.


@pytest.mark.parametrize("scale", [1.0, 8.0, 1000.0])
def test_lars_ratio_does_not_see_a_common_scale_of_weights_and_gradient(scale: float, tmp_path: Path) -> None:
    """U = trust·‖w‖/(‖g‖ + λ‖w‖)·(g + λw): what multiplies g + λw stays."""
    weight, gradient = random(6, 4, seed=1), random(6, 4, seed=2)
    expected = 1e-3 * float(weight.norm() / (gradient.norm() + 0.1 * weight.norm())) * rms(float64(gradient + 0.1 * weight))
    run, _, _ = recorded(by_name("LARS", lr=0.5, weight_decay=0.1), scale * weight, [scale * gradient], tmp_path / "run.zarr")
    np.testing.assert_allclose(run["update_rms_per_lr"] / scale, expected, rtol=1e-4)
    np.testing.assert_allclose(run["trust_ratio"], 1e-3 * float(weight.norm() / (gradient.norm() + 0.1 * weight.norm())), rtol=1e-6)


@pytest.mark.parametrize("scale", [1.0, 100.0])
def test_lamb_update_has_the_norm_of_the_weights_whatever_the_gradient(scale: float, tmp_path: Path) -> None:
    """φ is the identity up to the library's cap of 10; ε → 0. Without its division by 1 − β₁ᵗ, which comes after the ratio."""
    build = by_name("Lamb", lr=1e-3, eps=1e-12, adam_debias=True)
    gradients = [scale * random(6, 4, seed=t) for t in range(3)]
    run, _, _ = recorded(build, random(6, 4), gradients, tmp_path / "run.zarr")
    np.testing.assert_allclose(run["update_rms_per_lr"], run["weight_rms"], rtol=1e-4)
    # ratio·‖U‖ = ‖w‖, U = m/√v of the averages written out.
    m = v = torch.zeros(6, 4)
    for t, gradient in enumerate(gradients):
        m, v = 0.9 * m + 0.1 * gradient, 0.999 * v + 0.001 * gradient**2
        length = float((m / v.sqrt()).norm())
        np.testing.assert_allclose(run["trust_ratio"].values[t] * length, run["weight_rms"].values[t] * sqrt(24), rtol=1e-4)


def test_lamb_of_the_library_begins_ten_times_larger(tmp_path: Path) -> None:
    """Its default divides by 1 − β₁ᵗ after the ratio: ‖U‖ = ‖w‖/0.1 at the first step, ‖w‖/0.19 at the second."""
    run, _, _ = recorded(by_name("Lamb", lr=1e-3, eps=1e-12), random(6, 4), [random(6, 4, seed=t) for t in range(2)], tmp_path / "run.zarr")
    np.testing.assert_allclose(run["update_rms_per_lr"].values[:, 0], run["weight_rms"].values[:, 0] / [0.1, 0.19], rtol=1e-4)


def test_lamb_caps_the_norm_of_large_weights_at_ten(tmp_path: Path) -> None:
    run, _, _ = recorded(by_name("Lamb", lr=1e-3, eps=1e-12, adam_debias=True), 50 * random(6, 4), [random(6, 4)], tmp_path / "run.zarr")
    np.testing.assert_allclose(run["update_rms_per_lr"] * sqrt(24), 10.0, rtol=1e-3)


def test_optimizers_without_a_trust_ratio_have_none(tmp_path: Path) -> None:
    for name, settings in (("Yogi", {}), ("Lamb", {"adam": True})):
        run, _, _ = recorded(by_name(name, lr=1e-3, **settings), random(6, 4), [random(6, 4)], tmp_path / f"{name}.zarr")
        np.testing.assert_array_equal(run["trust_ratio"].values, [[1.0 if settings else np.nan]])


# Adafactor: V̂ = r cᵀ/mean(r).


def _of_transformers(parameters: Sequence[nn.Parameter]) -> Any:
    from transformers.optimization import Adafactor

    return Adafactor(parameters)


_ADAFACTORS: dict[str, Build] = {
    "torch": lambda p: torch.optim.Adafactor(p, lr=0.01),
    "transformers": _of_transformers,
    "pytorch_optimizer": by_name("AdaFactor"),
}


@pytest.mark.parametrize("library", _ADAFACTORS)
def test_adafactor_loses_two_log_two_of_the_identity(library: str, tmp_path: Path) -> None:
    """V = I₂ has V̂ = 1/2 everywhere, and the I-divergence Σ v·log(v/v̂) − v + v̂ between them is 2·ln 2. β₂ is 0 at the first step."""
    _, optimizer, parameter = recorded(_ADAFACTORS[library], random(2, 2), [torch.eye(2)], tmp_path / "run.zarr")
    read = second_moment(optimizer, parameter)
    estimate = float64(read.values)
    assert read.form == "row_col"
    np.testing.assert_allclose(estimate, 0.5, rtol=1e-6)
    divergence = sum(log(1 / estimate[i, i]) - 1 for i in range(2)) + estimate.sum()
    assert divergence == pytest.approx(2 * log(2), rel=1e-6)


@pytest.mark.parametrize("library", _ADAFACTORS)
def test_adafactor_is_exact_on_rank_one(library: str, tmp_path: Path) -> None:
    gradient = torch.outer(torch.tensor([1.0, 2.0, 5.0]), torch.tensor([3.0, 0.5]))
    run, optimizer, parameter = recorded(_ADAFACTORS[library], random(3, 2), [gradient], tmp_path / "run.zarr")
    np.testing.assert_allclose(float64(second_moment(optimizer, parameter).values), float64(gradient) ** 2, rtol=1e-6)
    if library != "pytorch_optimizer":  # whose momentum has seen a tenth of it
        np.testing.assert_allclose(run["update_rms_per_lr"], 1.0, rtol=1e-4)  # sign(g), as Adam's first step


@pytest.mark.parametrize("library", _ADAFACTORS)
def test_adafactor_step_is_relative_to_the_weights(library: str, tmp_path: Path) -> None:
    """The recorded η is α = RMS(W)·min(0.01, 1/√t): of weights a thousand times larger, a thousand times larger."""
    for scale in (1.0, 1000.0):
        run, _, _ = recorded(_ADAFACTORS[library], scale * random(6, 4), [random(6, 4)] * 2, tmp_path / f"{scale}.zarr")
        np.testing.assert_allclose(run["lr"], 0.01 * run["weight_rms"], rtol=1e-6)


# Adam-mini, Lion, Sophia, SAM.


def test_adam_mini_with_blocks_of_one_coordinate_is_adam(tmp_path: Path) -> None:
    """Heads of num_embeds²/num_heads = 1 coordinate each."""

    def mini(p: Sequence[nn.Parameter]) -> Any:
        from pytorch_optimizer import AdamMini

        model = nn.Module()
        model.q_proj = nn.Module()
        model.q_proj.weight = p[0]
        return AdamMini(model, lr=1e-3, weight_decay=0.0, num_embeds=1, num_heads=1)

    weight, gradients = random(6, 4), [random(6, 4, seed=t) for t in range(4)]
    by_block, optimizer, parameter = recorded(mini, weight, gradients, tmp_path / "mini.zarr")
    adam, reference, other = recorded(lambda p: torch.optim.Adam(p, lr=1e-3), weight, gradients, tmp_path / "adam.zarr")
    read = second_moment(optimizer, parameter)
    assert read.form == "block"
    np.testing.assert_allclose(float64(read.values).reshape(6, 4), float64(reference.state[other]["exp_avg_sq"]), rtol=1e-6)
    for name in ("update_rms", "momentum_rms", "update_rms_per_lr"):
        np.testing.assert_allclose(by_block[name], adam[name], rtol=1e-4)


def test_lion_moves_every_entry_by_the_learning_rate(tmp_path: Path) -> None:
    run, _, _ = recorded(by_name("Lion", lr=2.0**-10), random(6, 4), [random(6, 4, seed=t) for t in range(3)], tmp_path / "run.zarr")
    np.testing.assert_allclose(run["update_rms_per_lr"], 1.0, rtol=1e-4)


@pytest.mark.parametrize(("hessian", "size"), [(1e30, 0.0), (0.0, 0.01), (-1.0, 0.01)], ids=["steep", "flat", "negative"])
def test_sophia_stands_still_where_it_is_steep_and_takes_signs_where_it_is_flat(hessian: float, size: float, tmp_path: Path) -> None:
    """clip(m/max(h, ε), p) with p = 0.01: 0 for h → ∞, p·sign(m) for h → 0 and below."""
    run, optimizer, parameter = recorded(
        by_name("SophiaH", lr=0.1), random(6, 4), [random(6, 4)], tmp_path / "run.zarr", hessian=[torch.full((6, 4), hessian)]
    )
    np.testing.assert_allclose(run["update_rms_per_lr"], size, rtol=1e-4, atol=1e-12)
    read = second_moment(optimizer, parameter)
    assert read.form == "hessian"
    np.testing.assert_allclose(float64(read.values), 0.01 * hessian, rtol=1e-6)  # an average, whose first value is 0


def test_one_rademacher_draw_tells_a_diagonal_hessian_exactly(tmp_path: Path) -> None:
    """E[z ⊙ Hz] = diag(H), and z ⊙ Hz is that for every z of signs where H is diagonal."""
    curvature, model = random(6, 4).square() + 0.1, Model(random(6, 4, seed=1))
    optimizer = by_name("SophiaH", lr=0.1, hessian_distribution="rademacher")([model.matrix])
    with attach(optimizer, model, tmp_path / "run.zarr", every=1, on_error="raise"):
        with warnings.catch_warnings():
            # torch warns of the reference cycle that a graph of gradients makes; it goes with the model.
            warnings.filterwarnings("ignore", "Using backward\\(\\) with create_graph=True", UserWarning)
            (0.5 * curvature * model.matrix**2).sum().backward(create_graph=True)
        optimizer.step()
    np.testing.assert_allclose(float64(second_moment(optimizer, model.matrix).values), 0.01 * float64(curvature), rtol=1e-6)
    model.matrix.grad = None


@pytest.mark.parametrize("closure", [False, True], ids=["two calls", "closure"])
def test_the_gradient_of_sam_is_the_one_at_the_perturbed_weights(closure: bool, tmp_path: Path) -> None:
    """L = ½‖W‖²: g = W, e = ρW/‖W‖, and the gradient that is stepped with is (1 + ρ/‖W‖)W."""
    from pytorch_optimizer import SAM

    model = Model(random(6, 4))
    optimizer = SAM([model.matrix], torch.optim.SGD, rho=0.5, lr=0.1)

    def loss() -> Tensor:
        optimizer.zero_grad()
        value = 0.5 * model.matrix.square().sum()
        value.backward()
        return value

    with attach(optimizer, model, tmp_path / "run.zarr", every=1, on_error="raise"):
        for _ in range(3):
            loss()
            if closure:
                optimizer.step(loss)
            else:
                optimizer.first_step()
                loss()
                optimizer.second_step()
    with xr.open_datatree(tmp_path / "run.zarr", engine="zarr") as tree:
        run = tree["update"].load()
    assert run["step"].values.tolist() == [1, 2, 3]
    np.testing.assert_allclose(run["grad_rms"], run["weight_rms"] + 0.5 / sqrt(24), rtol=1e-6)
    np.testing.assert_allclose(run["update_rms"], 0.1 * run["grad_rms"], rtol=1e-5)
