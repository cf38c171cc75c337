"""What is known of second moments in closed form, driven through real optimizers and seen in what is recorded of them."""

from collections.abc import Sequence
from math import log10, sqrt
from pathlib import Path
from typing import Any
from unittest.mock import patch

import numpy as np
import pytest
import torch
import xarray as xr
from torch import Tensor

from contract import standins
from contract.harness import float64
from contract.one_matrix import Build, Model, by_name, random
from optiscope.hooks import attach


def train(
    build: Build, weight: Tensor, gradients: Sequence[Tensor], store: Path, *, every: int = 1, **settings: Any
) -> tuple[xr.DataTree, Any, Model]:
    """The run of one matrix over these gradients."""
    model = Model(weight)
    optimizer = build([model.matrix])
    with attach(optimizer, model, store, every=every, on_error="raise", **settings):
        for gradient in gradients:
            model.matrix.grad = gradient.clone()
            optimizer.step()
    with xr.open_datatree(store, engine="zarr") as tree:
        return tree.load(), optimizer, model


def last(run: xr.DataTree, name: str, group: str = "second_moment") -> Any:
    return run[group][name].values[-1, 0]


# Adam's bound.


@pytest.mark.parametrize(("betas", "bound"), [((0.9, 0.999), 7.270), ((0.9, 0.95), 1.165), ((0.9, 0.9), 1.0)])
def test_the_signal_to_noise_ratio_of_adam_reaches_its_bound(betas: tuple[float, float], bound: float, tmp_path: Path) -> None:
    """(1 − β₁)/√(1 − β₂)/√(1 − β₁²/β₂), by Cauchy–Schwarz, attained by g_i ∝ (β₁/β₂)^i, i steps back."""
    beta1, beta2 = betas
    # Further back it is below 1e-8 of the last gradient, or of no weight; equal gradients for equal decays.
    steps = min(int(16 / -np.log(beta1 / beta2)), 200) if beta1 != beta2 else 200
    gradients = [torch.full((2, 3), (beta1 / beta2) ** (steps - 1 - t)) for t in range(steps)]
    # Corrections of a short run are those of an infinite one to 1 − βᵗ: many zero gradients come first.
    still = [torch.zeros(2, 3)] * (0 if beta2 < 0.99 else 8000)
    run, _, _ = train(
        lambda p: torch.optim.AdamW(p, lr=1e-9, betas=betas, eps=1e-30),
        random(2, 3),
        [*still, *gradients],
        tmp_path / "run.zarr",
        every=len(still) + steps,
    )
    assert last(run, "snr_quantile")[-1] == pytest.approx(bound, rel=1e-3)
    assert (1 - beta1) / sqrt(1 - beta2) / sqrt(1 - beta1**2 / beta2) == pytest.approx(bound, rel=1e-3)


def test_noise_gives_adams_update_the_rms_of_theory(tmp_path: Path) -> None:
    """√((1 − β₁)/(1 + β₁)) = 0.2294 of i.i.d. gradients. 64 × 64, 400 steps: over 100 seeds 0.2296 with a standard deviation of 0.0021."""
    generator = torch.Generator().manual_seed(0)
    gradients = [torch.randn(64, 64, generator=generator) for _ in range(400)]
    run, _, _ = train(
        lambda p: torch.optim.AdamW(p, lr=1e-3, weight_decay=0.0, betas=(0.9, 0.999)),
        random(64, 64),
        gradients,
        tmp_path / "run.zarr",
        every=400,
    )
    assert last(run, "update_rms_per_lr", "update") == pytest.approx(0.2294, abs=0.01)
    # The median of |N(0, 0.2294)|, to a bin.
    assert last(run, "snr_quantile")[7] == pytest.approx(0.6745 * 0.2294, rel=2**-4 + 0.03)


# Weight decay.


def test_adamws_first_step_moves_every_weight_by_the_learning_rate(tmp_path: Path) -> None:
    weight = random(6, 4)
    run, _, model = train(
        lambda p: torch.optim.AdamW(p, lr=2.0**-10, weight_decay=0.0), weight, [random(6, 4, seed=1)], tmp_path / "run.zarr"
    )
    np.testing.assert_allclose(np.abs(float64(weight) - float64(model.matrix)), 2.0**-10, rtol=2e-4)  # float32 weights of about 1
    np.testing.assert_allclose(last(run, "snr_quantile"), 1.0, rtol=2**-4)  # |m̂| = √v̂
    assert last(run, "snr_quantile")[[0, -1]] == pytest.approx([1.0, 1.0], rel=2**-13)  # of 12 bits


def test_weights_of_adamw_settle_at_the_rms_of_theory(tmp_path: Path) -> None:
    """RMS(W) = RMS(u)·√(η/2λ) for updates u that do not hang together: β₁ = 0, i.i.d. gradients. The mean over 20 records, 1,000 entries
    each, 1/(ηλ) = 100 steps apart: over 100 seeds 0.4 % above (0.25 % are of finite steps, 1/√(1 − ηλ/2)) with a standard deviation of 0.8 %."""
    lr, decay, steps = 0.1, 0.1, 2500
    generator = torch.Generator().manual_seed(0)
    gradients = [torch.randn(50, 20, generator=generator) for _ in range(steps)]
    build = lambda p: torch.optim.AdamW(p, lr=lr, weight_decay=decay, betas=(0.0, 0.999))  # noqa: E731
    run, _, _ = train(build, 0.7 * random(50, 20), gradients, tmp_path / "run.zarr", every=100, measure=("update",))
    update = run["update"].isel(matrix=0, step=slice(5, None))
    u = float(np.sqrt((update["update_rms_per_lr"] ** 2).mean()))
    assert float(np.sqrt((update["weight_rms"] ** 2).mean())) == pytest.approx(u * sqrt(lr / (2 * decay)), rel=0.03)


def test_l2_and_decoupled_decay_are_one_for_sgd_and_two_for_adam(tmp_path: Path) -> None:
    """W(1 − λ) − ηg = W − η(g + (λ/η)W); Adam divides the added term by √v̂, coordinate by coordinate."""
    lr, decay, weight = 0.05, 0.02, random(40, 30)
    scale = torch.exp(2 * random(40, 30, seed=9))
    gradients = [scale * random(40, 30, seed=t) for t in range(3)]
    coupled, _, by_sgd = train(lambda p: torch.optim.SGD(p, lr=lr, weight_decay=decay / lr), weight, gradients, tmp_path / "sgd.zarr")
    decoupled = weight.clone()
    for gradient in gradients:
        decoupled = decoupled * (1 - decay) - lr * gradient
    np.testing.assert_allclose(float64(by_sgd.matrix), float64(decoupled), rtol=1e-4, atol=1e-5)
    assert "decay_spread" in coupled["second_moment"]
    assert np.isnan(last(coupled, "decay_spread"))

    adam, optimizer, model = train(lambda p: torch.optim.Adam(p, lr=1e-3, weight_decay=1e-6), weight, gradients, tmp_path / "adam.zarr")
    root = np.sqrt(float64(optimizer.state[model.matrix]["exp_avg_sq"]) / (1 - 0.999**3))
    wanted = log10(np.quantile(1 / (root + 1e-8), 0.95) / np.quantile(1 / (root + 1e-8), 0.05))
    # To the width of a bin at both ends: 2·log10(1 + 2⁻⁵), and the gaps between 1,200 order statistics.
    assert last(adam, "decay_spread") == pytest.approx(wanted, abs=0.03)
    assert wanted > 1
    adamw, _, _ = train(lambda p: torch.optim.AdamW(p, lr=1e-3, weight_decay=0.1), weight, gradients, tmp_path / "adamw.zarr")
    assert last(adamw, "decay_spread") == 0


# Sophia.


@pytest.mark.parametrize(
    ("hessian", "win_rate", "nonpositive"), [(1e30, 1.0, 0.0), (0.0, 0.0, 1.0), (-1.0, 0.0, 1.0)], ids=["steep", "flat", "negative"]
)
def test_sophias_win_rate(hessian: float, win_rate: float, nonpositive: float, tmp_path: Path) -> None:
    """h → ∞: no coordinate is clipped and none moves; h → 0 and below: all are, to signs."""
    model = Model(random(6, 4))
    optimizer = by_name("SophiaH", lr=0.1)([model.matrix])
    with attach(optimizer, model, tmp_path / "run.zarr", every=1, on_error="raise"):
        model.matrix.grad = random(6, 4)
        optimizer.step(hessian=[torch.full((6, 4), hessian)])
    with xr.open_datatree(tmp_path / "run.zarr", engine="zarr") as tree:
        run = tree.load()
    assert (last(run, "sophia_win_rate"), last(run, "sophia_nonpositive_share")) == (win_rate, nonpositive)
    assert last(run, "update_rms_per_lr", "update") == pytest.approx(0.0 if win_rate else 0.01, rel=1e-4, abs=1e-12)


def test_win_rates_are_those_of_the_ratio_written_out(tmp_path: Path) -> None:
    """|m|/max(γh, ε) < 1 in the project's SophiaG, |m|/(ρBh + 1e-15) < 1 in sophia-opt's, whose B nothing keeps."""
    import sophia_opt

    from optiscope.examples.optimizers.sophia_g import SophiaG

    gradients, tokens = [random(60, 40, seed=t) for t in range(3)], 8
    for name, make in (("ours", lambda p: SophiaG(p, lr=1e-3)), ("sophia-opt", lambda p: sophia_opt.SophiaG(p, lr=1e-3, rho=0.05))):
        model = Model(random(60, 40))
        optimizer = make([model.matrix])
        with attach(optimizer, model, tmp_path / f"{name}.zarr", every=1, on_error="raise"):
            for gradient in gradients:
                model.matrix.grad = gradient.clone()
                if name == "ours":
                    optimizer.update_hessian(tokens)
                    optimizer.step()
                else:
                    optimizer.step(bs=20)
                    optimizer.update_hessian()
        state = optimizer.state[model.matrix]
        m, h = float64(state["exp_avg"]), float64(state["hessian"])
        with xr.open_datatree(tmp_path / f"{name}.zarr", engine="zarr") as tree:
            run = tree.load()
        if name == "ours":
            wanted = np.mean(np.abs(m) / np.maximum(0.05 * h, 1e-12) < 1)
        else:
            h = (h - (1 - 0.99) * float64(gradients[-1]) ** 2) / 0.99  # as it was in the step
            wanted = np.mean(np.abs(m) / (0.05 * 20 * h + 1e-15) < 1)
        assert 0.01 < wanted < 0.9
        assert last(run, "sophia_win_rate") == pytest.approx(wanted, abs=2 / m.size)


# Kronecker factors.


def test_shampoos_factors_are_those_of_its_gradients(tmp_path: Path) -> None:
    gradients = [random(5, 8, seed=t) @ torch.diag(torch.linspace(0.2, 3, 8)) for t in range(12)]
    run, _, _ = train(by_name("Shampoo", lr=1e-3, momentum=0.0, matrix_eps=1e-6), random(5, 8), gradients, tmp_path / "run.zarr")
    left = sum(float64(g) @ float64(g).T for g in gradients) + 1e-6 * np.eye(5)
    right = sum(float64(g).T @ float64(g) for g in gradients) + 1e-6 * np.eye(8)
    for side, factor in enumerate((left, right)):
        sigma = np.linalg.svd(factor, compute_uv=False)
        assert last(run, "factor_condition")[side] == pytest.approx(sigma[0] / sigma[-1], rel=1e-3)  # float32 sums, κ about 1e3
        assert last(run, "factor_effective_rank")[side] == pytest.approx(np.trace(factor) / sigma[0], rel=1e-5)
    assert last(run, "factor_exponent") == -0.25


def test_soaps_basis_is_up_to_date_when_it_is_made_and_ages(tmp_path: Path) -> None:
    """Of the first gradient, whose eigenvectors Q is, nothing is off the diagonal; other gradients turn the factors away from it."""
    gradients = [random(6, 4, seed=t) for t in range(6)]
    run, optimizer, model = train(
        by_name("SOAP", lr=1e-3, precondition_frequency=100), random(6, 4), [gradients[0], *gradients], tmp_path / "run.zarr"
    )
    energy = run["second_moment"]["eigenbasis_off_diagonal"].values[:, 0]
    state = optimizer.state[model.matrix]
    for side in (0, 1):
        turned = float64(state["Q"][side]).T @ float64(state["GG"][side]) @ float64(state["Q"][side])
        wanted = 1 - np.sum(np.diag(turned) ** 2) / np.sum(turned**2)
        assert energy[-1, side] == pytest.approx(wanted, rel=1e-4)
        assert wanted > 0.01
    assert (energy[0] < 1e-10).all()
    v = float64(state["exp_avg_sq"])
    p = v / v.sum()
    information = np.sum(p * np.log(p / np.outer(p.sum(1), p.sum(0))))
    assert last(run, "eigenbasis_information") == pytest.approx(information, abs=1e-7)
    # |m̂'|/√v̂' with both in the basis; five averages of equal decays 0.95 after the skipped step.
    turned_m = float64(state["Q"][0]).T @ float64(state["exp_avg"]) @ float64(state["Q"][1])
    ratio = np.abs(turned_m) / np.sqrt(v) / sqrt(1 - 0.95**6)
    assert last(run, "snr_quantile")[-1] == pytest.approx(ratio.max(), rel=1e-3)


# Adafactor's and Adam-mini's losses, measured where all coordinates are kept.


def test_adam_on_the_identity_and_on_rank_one(tmp_path: Path) -> None:
    """After one step v ∝ g²: of I₂ rank 1 loses MI = ln 2 (an I-divergence of 2 ln 2 at S = 2), of an outer product nothing."""
    of_identity, _, _ = train(lambda p: torch.optim.Adam(p, lr=1e-3), random(2, 2), [torch.eye(2)], tmp_path / "identity.zarr")
    assert last(of_identity, "rank1_information") == pytest.approx(np.log(2), rel=1e-6)
    outer = torch.outer(torch.tensor([1.0, 2.0, 5.0]), torch.tensor([3.0, 0.5]))
    of_outer, _, _ = train(lambda p: torch.optim.Adam(p, lr=1e-3), random(3, 2), [outer], tmp_path / "outer.zarr")
    assert last(of_outer, "rank1_information") < 1e-7
    assert last(of_outer, "rank1_log_error_max") < 1e-6


def test_a_column_has_rows_of_one_coordinate_for_which_adam_mini_is_adam(tmp_path: Path) -> None:
    run, _, _ = train(
        lambda p: torch.optim.Adam(p, lr=1e-3), random(50, 1), [random(50, 1, seed=t) for t in range(3)], tmp_path / "run.zarr"
    )
    assert last(run, "block_dispersion") == 0
    np.testing.assert_allclose(last(run, "block_cosine"), 1.0, rtol=1e-6)
    assert last(run, "block_step_ratio") == pytest.approx(1, rel=1e-6)


def test_maps_are_recorded_when_asked_for(tmp_path: Path) -> None:
    run, optimizer, model = train(
        lambda p: torch.optim.Adam(p, lr=1e-3), random(8, 4), [random(8, 4)], tmp_path / "run.zarr", measure=("second_moment_map",)
    )
    assert set(run.children) == {"second_moment_map", "scalars"}
    v = float64(optimizer.state[model.matrix]["exp_avg_sq"])
    tiles = last(run, "second_moment_map", "second_moment_map")
    np.testing.assert_allclose(tiles[:32], np.log10(v).ravel(), rtol=2**-13)
    assert np.isnan(tiles[32:]).all()
    rank1 = np.log10(np.outer(v.sum(1), v.sum(0)) / v.sum())
    np.testing.assert_allclose(last(run, "rank1_map", "second_moment_map")[:32], rank1.ravel(), rtol=2**-13)  # of 12 bits


def _caspr(p: Sequence[Any]) -> Any:
    from optiscope.examples.optimizers.caspr import CASPR

    return CASPR(p, lr=1e-3)


_AVERAGING: dict[str, Build] = {
    "CASPR": _caspr,
    "Distributed Shampoo, packed": lambda p: standins.DistributedShampoo(p, lr=1e-3, max_preconditioner_dim=16),
    "Distributed Shampoo, whole": lambda p: standins.DistributedShampoo(p, lr=1e-3, max_preconditioner_dim=16, use_symmetric_packing=False),
}


@pytest.mark.parametrize("name", _AVERAGING)
def test_averaged_factors_are_those_of_the_gradients(name: str, tmp_path: Path) -> None:
    """With β₂ = 0.99 in all of them; of which exponent they take is not one, or can be overridden."""
    gradients = [random(5, 8, seed=t) @ torch.diag(torch.linspace(0.5, 2, 8)) for t in range(12)]
    run, _, _ = train(_AVERAGING[name], random(5, 8), gradients, tmp_path / "run.zarr")
    weights = [0.99 ** (len(gradients) - 1 - t) for t in range(len(gradients))]
    left = sum(w * float64(g) @ float64(g).T for w, g in zip(weights, gradients, strict=True))
    right = sum(w * float64(g).T @ float64(g) for w, g in zip(weights, gradients, strict=True))
    for side, factor in enumerate((left, right)):
        sigma = np.linalg.svd(factor, compute_uv=False)
        assert last(run, "factor_condition")[side] == pytest.approx(sigma[0] / sigma[-1], rel=1e-3)
        assert last(run, "factor_effective_rank")[side] == pytest.approx(np.trace(factor) / sigma[0], rel=1e-4)
    assert np.isnan(last(run, "factor_exponent"))
    assert np.isnan(last(run, "eigenbasis_off_diagonal")).all()


def test_a_matrix_in_blocks_has_no_two_factors(tmp_path: Path) -> None:
    build: Build = lambda p: standins.DistributedShampoo(p, lr=1e-3, max_preconditioner_dim=4)  # noqa: E731
    run, _, _ = train(build, random(5, 8), [random(5, 8)], tmp_path / "run.zarr")
    assert np.isnan(last(run, "factor_condition")).all()
    assert last(run, "second_moment_form") >= 0


def _heavyball_soap(p: Sequence[Any]) -> Any:
    import heavyball

    return heavyball.SOAP(p, lr=3e-3)


_SOAPS: dict[str, Build] = {
    "heavyball": _heavyball_soap,
    "official": lambda p: standins.SOAP(p, lr=3e-3),
    "official, long rows": lambda p: standins.SOAP(p, lr=3e-3, max_precond_dim=6),
}


@pytest.mark.parametrize("name", _SOAPS)
def test_soaps_factors_and_bases_are_those_of_its_state(name: str, tmp_path: Path) -> None:
    """A side without a factor has none recorded."""
    from heavyball import utils

    with patch.object(utils, "compile_mode", None):
        run, optimizer, model = train(_SOAPS[name], random(5, 8), [random(5, 8, seed=t) for t in range(5)], tmp_path / "run.zarr")
    state = optimizer.state[model.matrix]
    if name == "heavyball":
        view = {key.rpartition("_")[0].removeprefix("scale_by_soap_"): value for key, value in state[0].items()}
        state = {"GG": [f[0] for f in view["GG"]], "Q": [q[0] for q in view["Q"]], "exp_avg_sq": view["exp_avg_sq"][0]}
    for side in (0, 1):
        told = [last(run, key)[side] for key in ("factor_condition", "factor_effective_rank", "eigenbasis_off_diagonal")]
        if not len(state["GG"][side]):
            assert np.isnan(told).all()
            continue
        factor, basis = float64(state["GG"][side]), float64(state["Q"][side])
        sigma, turned = np.linalg.svd(factor, compute_uv=False), basis.T @ factor @ basis
        condition = min(sigma[0] / sigma[-1], 1e12)
        assert told[0] == pytest.approx(condition, rel=1e-4) or condition > 1e6  # of rank 5 on the longer side, but for rounding
        assert told[1:] == pytest.approx(
            [np.trace(factor) / sigma[0], 1 - np.sum(np.diag(turned) ** 2) / np.sum(turned**2)], rel=1e-4, abs=1e-9
        )
    p = float64(state["exp_avg_sq"]) / float64(state["exp_avg_sq"]).sum()
    logs = np.log(p / np.outer(p.sum(1), p.sum(0)), out=np.zeros_like(p), where=p > 0)
    assert last(run, "eigenbasis_information") == pytest.approx(np.sum(p * logs), abs=1e-6)
    assert np.isnan(last(run, "rank1_information"))
