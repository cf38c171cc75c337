"""Every recorded estimate against the exact Hessian and Gauss–Newton matrix of a small transformer in float64."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.optim import SGD

from optiscope.diagnostics.catalogue import LEVELS
from optiscope.diagnostics.quantities.adam_mini import row_blocks
from optiscope.hooks import attach

PROBES = 400


@pytest.fixture
def record(case: Any, tmp_path: Path, read: Callable[..., Any]) -> Callable[..., Any]:
    """`record(case, **options)`: one call of curvature with those options, and the group as it was written."""

    def record(built: Any, with_loss: bool = True, with_logits: bool = False, **options: Any) -> Any:
        path = tmp_path / f"{len(list(tmp_path.iterdir()))}.zarr"
        with attach(SGD(built.model.parameters(), lr=0.1), built.model, path, heads=2, on_error="raise") as recorder:
            recorder.curvature(built.loss if with_loss else None, logits_fn=built.logits if with_logits else None, **options)
        return read(path)["curvature"].to_dataset().isel(step=0).set_index(matrix="name")

    return record


def of(found: Any, name: str, quantity: str) -> Any:
    return found[quantity].sel(matrix=f"{name}.weight").values


def mean_diagonals(built: Any) -> dict[str, float]:
    h = built.hessian()
    return {name: float(h[name, name].diagonal().mean()) for name in built.names}


@pytest.mark.parametrize("distribution", ["rademacher", "gaussian"])
@pytest.mark.parametrize("method", ["double_backward", "central_difference"])
def test_hutchinson_is_within_three_errors_of_the_exact_hessian(case: Any, record: Any, distribution: str, method: str) -> None:
    built = case()
    found = record(built, probes=PROBES, distribution=distribution, method=method)
    h = built.hessian()
    exact = mean_diagonals(built)
    for name in built.names:
        own = name.removesuffix(".weight")
        n = h[name, name].shape[0]
        mean, error = of(found, own, "hessian_mean"), of(found, own, "hessian_mean_error")
        assert abs(mean - exact[name]) < 3 * error, name
        # The error itself: the closed form of a probe's variance. A sample variance of 400 probes is known to about √((kurtosis − 1)/400)/2.
        inside = h[name, name]
        variance = 2 * float((inside**2).sum()) + sum(float((h[name, other] ** 2).sum()) for other in built.names if other != name)
        variance -= 2 * float((inside.diagonal() ** 2).sum()) if distribution == "rademacher" else 0
        assert error == pytest.approx(variance**0.5 / n / PROBES**0.5, rel=0.3)
        assert of(found, own, "hessian_trace") == pytest.approx(n * mean)
        assert of(found, own, "hessian_trace_error") == pytest.approx(n * error)
    assert set(found["hessian_probes"].values) == {PROBES}
    assert found.attrs["methods"][int(found["hessian_method"][0])] == method
    assert found.attrs["distributions"][int(found["hessian_distribution"][0])] == distribution


def test_the_spread_of_elements_is_the_closed_form(case: Any, record: Any) -> None:
    """Var_i = Σ_j H_ij² + H_ii² (Gaussian) and Σ_{j≠i} H_ij² (Rademacher), over all weights that are probed."""
    built = case()
    h = built.hessian()
    for distribution in ("gaussian", "rademacher"):
        found = record(built, probes=PROBES, distribution=distribution)
        for name in built.names:
            rows = torch.cat([h[name, other] for other in built.names], dim=1)
            diagonal = h[name, name].diagonal()
            variance = (rows**2).sum(1) + (diagonal**2 if distribution == "gaussian" else -(diagonal**2))
            own = name.removesuffix(".weight")
            # 400 probes of up to 36 elements.
            assert of(found, own, "hessian_element_deviation") == pytest.approx(float(variance.mean()) ** 0.5, rel=0.15)
            # What is left of the mean's noise after it is taken out stands beside the diagonal.
            rms, noise = float((diagonal**2).mean()), float(variance.mean()) / PROBES
            assert of(found, own, "hessian_rms") ** 2 == pytest.approx(rms, abs=4 * noise + 2 * (rms * noise) ** 0.5)


class Quadratic(nn.Module):
    """½Σ a_i w_i², whose Hessian is diagonal and known."""

    def __init__(self) -> None:
        super().__init__()
        self.w = nn.Parameter(torch.randn(5, 7, dtype=torch.float64, generator=torch.Generator().manual_seed(0)))
        self.a = torch.linspace(-1, 3, 35, dtype=torch.float64).view(5, 7)

    def loss(self) -> torch.Tensor:
        return (self.a * self.w.square()).sum() / 2


def quadratic(tmp_path: Path, read: Any, **options: Any) -> Any:
    model = Quadratic()
    with attach(SGD(model.parameters(), lr=0.1), model, tmp_path / "q.zarr", on_error="raise") as recorder:
        recorder.curvature(model.loss, **options)
    return model, read(tmp_path / "q.zarr")["curvature"].to_dataset().isel(step=0, matrix=0)


@pytest.mark.parametrize("method", ["double_backward", "central_difference"])
def test_one_rademacher_probe_is_exact_on_a_diagonal_hessian(tmp_path: Path, read: Any, method: str) -> None:
    _, found = quadratic(tmp_path, read, method=method)
    # Differences of a quadratic have no truncation; their rounding was 5e-12.
    assert float(found["hessian_mean"]) == pytest.approx(1.0, abs=1e-9 if method == "central_difference" else 1e-14)
    # The bound is the spread of the diagonal: it does not know that the rest of the Hessian is zero.
    a = np.linspace(-1, 3, 35)
    assert float(found["hessian_mean_error"]) == pytest.approx(np.sqrt(2 * a.var() / 35), rel=1e-6)
    assert np.isnan(found["hessian_quantile"]).all()
    assert np.isnan(found["hessian_negative_share"])


def test_quantiles_and_signs_from_64_probes_on(tmp_path: Path, read: Any) -> None:
    model, found = quadratic(tmp_path, read, probes=64)
    np.testing.assert_allclose(
        found["hessian_quantile"], np.quantile(model.a.numpy().ravel(), LEVELS), rtol=2**-13, atol=1e-12
    )  # 12 bits are recorded
    assert float(found["hessian_negative_share"]) == pytest.approx(float((model.a < 0).double().mean()), rel=1e-6)
    assert float(found["hessian_mean_error"]) == pytest.approx(0, abs=1e-14)
    np.testing.assert_allclose(found["hessian_probe_mean"], 1.0)


def test_a_gaussian_probe_of_a_diagonal_hessian_has_the_relative_deviation_root_two(tmp_path: Path, read: Any) -> None:
    _, found = quadratic(tmp_path, read, probes=2000, distribution="gaussian")
    a = np.linspace(-1, 3, 35)
    # 70,000 squares of χ²: the deviation's own error is about √(14/70000)/2 = 0.7 %, more as the largest elements count most.
    assert float(found["hessian_element_deviation"]) == pytest.approx(np.sqrt(2 * np.mean(a**2)), rel=0.03)


def test_central_differences_against_double_backward(case: Any, record: Any) -> None:
    # One probe each, the same one. Seen: 2e-10 in float64, 1.2e-4 in float32, relative to the largest matrix mean.
    for dtype, bound in ((torch.float64, 1e-8), (torch.float32, 1e-3)):
        exact, found = (
            record(case(dtype=dtype), method=method)["hessian_mean"].values for method in ("double_backward", "central_difference")
        )
        assert np.abs(found - exact).max() < bound * np.abs(exact).max()


def test_gauss_newton_is_within_three_errors_and_is_not_the_hessian(case: Any, record: Any) -> None:
    built = case()
    found = record(built, with_loss=False, with_logits=True, draws=1000)
    exact, hessian = built.gauss_newton(), mean_diagonals(built)
    told_apart = []
    for name in built.names:
        own = name.removesuffix(".weight")
        mean, error = of(found, own, "gauss_newton_mean"), of(found, own, "gauss_newton_mean_error")
        assert abs(mean - float(exact[name].mean())) < 3 * error, name
        told_apart.append(abs(mean - hessian[name]) > 5 * error)
    assert any(told_apart)
    assert set(found["gauss_newton_labels"].values) == {15}  # 3 sequences of 5 tokens
    assert set(found["gauss_newton_draws"].values) == {1000}
    assert np.isnan(found["hessian_mean"]).all()
    # Quantiles of the averaged diagonal; its elements are known to about 1.4/√1000 = 4 %.
    largest = [float(exact[name].max()) for name in built.names]
    np.testing.assert_allclose([of(found, n.removesuffix(".weight"), "gauss_newton_quantile")[-1] for n in built.names], largest, rtol=0.15)


def test_where_logits_are_linear_all_three_agree(tmp_path: Path, read: Any) -> None:
    torch.manual_seed(1)
    model, x, y = nn.Linear(4, 3, bias=False).double(), torch.randn(40, 4).double(), torch.randint(3, (40,))
    p = (x @ model.weight.T).softmax(-1).detach()
    exact = float(((p * (1 - p)).T @ x**2 / 40).mean())  # mean p_c(1 − p_c) x_i²
    with attach(SGD(model.parameters(), lr=0.1), model, tmp_path / "run.zarr", on_error="raise") as recorder:
        recorder.curvature(lambda: F.cross_entropy(model(x), y), logits_fn=lambda: model(x), probes=PROBES, draws=1000)
    found = read(tmp_path / "run.zarr")["curvature"].to_dataset().isel(step=0, matrix=0)
    for kind in ("hessian", "gauss_newton"):
        assert abs(float(found[f"{kind}_mean"]) - exact) < 3 * float(found[f"{kind}_mean_error"])
        assert float(found[f"{kind}_mean_error"]) < 0.05 * exact


def test_what_lies_in_blocks_against_the_exact_hessian(case: Any, record: Any) -> None:
    built = case()
    found = record(built, block_probes=200)
    h, inside_seen = built.hessian(), []
    for name in built.names:
        own = h[name, name]
        rows, cols = dict(built.model.named_parameters())[name].shape
        operator = {"embed": "embed", "q_proj": "attn_q", "k_proj": "attn_k", "lm_head": "head"}.get(name.removesuffix(".weight"), "other")
        partition, block_of_row = row_blocks(operator, rows, cols, (2, 2))
        same = torch.as_tensor(np.repeat(block_of_row, cols)[:, None] == np.repeat(block_of_row, cols))
        exact = float((own[same] ** 2).sum() / (own**2).sum())
        stem = name.removesuffix(".weight")
        share, error = of(found, stem, "hessian_in_block_share"), of(found, stem, "hessian_in_block_error")
        # A ratio's bias of order 1/200 and the store's float32 stand beside the error, which is 0 where there is one block.
        assert abs(share - exact) < 3 * error + 1e-6, name
        assert of(found, stem, "hessian_in_block_null") == pytest.approx(float(same.double().mean()), rel=1e-6)
        assert found.attrs["partitions"][int(of(found, stem, "hessian_partition"))] == partition
        inside_seen.append(partition)
    assert {"head", "token", "row"} <= set(inside_seen)


@pytest.mark.parametrize("method", ["double_backward", "central_difference"])
def test_exact_hessians_of_rows(case: Any, record: Any, method: str) -> None:
    built = case()
    found = record(built, with_logits=True, exact=16, probes=64, draws=8, method=method)
    h = built.hessian()
    for name in built.names:
        stem, own = name.removesuffix(".weight"), h[name, name]
        rows, cols = dict(built.model.named_parameters())[name].shape
        count = {4: 4, 6: 2}[cols]  # rows of together up to 16 coordinates, a power of two
        assert of(found, stem, "preconditioning_size") == cols
        # Which rows it was is not recorded: the exact mean and the whole map belong to one of the windows.
        candidates = [own[i * cols : (i + count) * cols, i * cols : (i + count) * cols] for i in range(rows - count + 1)]
        mean = of(found, stem, "exact_mean")
        chosen = min(candidates, key=lambda block: abs(float(block.diagonal().mean()) - mean))
        assert mean == pytest.approx(float(chosen.diagonal().mean()), rel=1e-6, abs=1e-9)
        tiles = of(found, stem, "hessian_map")
        size = len(chosen)
        # Zeros, which the map holds as missing logarithms, are not compared; the rest is recorded with 12 bits.
        expected = np.log10(np.maximum(chosen.abs().numpy(), 1e-30)).ravel() if size <= 16 else None
        large = expected > -6
        np.testing.assert_allclose(tiles[: size * size][large], expected[large], rtol=2**-13)
        for i in range(count):
            block = chosen[i * cols : (i + 1) * cols, i * cols : (i + 1) * cols].numpy()
            eigenvalues = np.abs(np.linalg.eigvalsh(block))
            kappa, tau = of(found, stem, "preconditioning_condition")[i], of(found, stem, "preconditioning_dominance")[i]
            if np.isfinite(kappa) and method == "double_backward":
                assert kappa == pytest.approx(eigenvalues.max() / eigenvalues.min(), rel=1e-3)
            if np.isfinite(tau):
                assert tau == pytest.approx(np.abs(np.diag(block)).sum() / np.abs(block).sum(), rel=1e-4, abs=1e-6)
        assert abs(of(found, stem, "exact_hutchinson_mean") - mean) < 4 * of(found, stem, "exact_hutchinson_error") + 1e-9
        assert of(found, stem, "exact_gauss_newton_mean") > 0
    assert np.isfinite(found["preconditioning_ratio"]).sum() > 8
