"""Rows for libraries that cannot be installed here: packing, algorithms by group, schedules, sizes, and what gets flagged."""

from collections.abc import Callable
from math import sqrt
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from contract import standins_muon
from contract.harness import Floats
from contract.standins import SOAP, DistributedShampoo, KFACPreconditioner
from contract.standins_muon import SPEEDRUN, YOU, AdaptiveMuon, Dion, DionMuon, DionNorMuon, MarsM, NvidiaMuon
from torch import Tensor, nn
from torch.utils._python_dispatch import _get_current_dispatch_mode

from optiscope.analysis import check, open_run
from optiscope.hooks import attach
from optiscope.hooks.adapters import class_name
from optiscope.hooks.adapters.repositories import packed_diagonal


def gradient(shape: tuple[int, ...], seed: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def steps(optimizer: Any, parameters: list[nn.Parameter], count: int) -> list[list[Floats]]:
    """Step with gradients drawn anew; the gradients, in float64."""
    given = []
    for t in range(count):
        for i, p in enumerate(parameters):
            p.grad = gradient(tuple(p.shape), 100 * t + i)
        given.append([p.grad.double().numpy() for p in parameters])  # type: ignore[union-attr]
        optimizer.step()
    return given


def rms(x: Floats) -> float:
    return float(np.sqrt(np.mean(np.square(x))))


@pytest.mark.parametrize("size", [1, 2, 7, 256])
def test_packed_diagonal(size: int) -> None:
    whole = gradient((size, size), 0)
    packed = whole[tuple(torch.triu_indices(size, size))]
    assert len(packed) == size * (size + 1) // 2
    for factor in (whole, packed):
        assert torch.equal(packed_diagonal(factor), whole.diag())


def test_small_matrix_that_shampoo_merges_into_one_axis(tmp_path: Path, read: Callable[..., Any]) -> None:
    """One factor, of all coordinates: its diagonal is the average of g² itself."""
    w = nn.Parameter(gradient((2, 3), 0))
    optimizer = DistributedShampoo([w], max_preconditioner_dim=8)
    with attach(optimizer, None, tmp_path / "run.zarr", every=1, on_error="raise"):
        given = steps(optimizer, [w], 3)
    assert optimizer.state[w]["block_0"]["filtered_grad"].shape == (6,)
    v = 0.99 * (0.99 * 0.01 * given[0][0] ** 2 + 0.01 * given[1][0] ** 2) + 0.01 * given[2][0] ** 2
    assert read(tmp_path / "run.zarr")["second_moment"]["second_moment_mean"].values[-1, 0] == pytest.approx(v.mean(), rel=1e-6)


def test_dion_update_is_the_projection_that_error_feedback_takes_out(tmp_path: Path, read: Callable[..., Any]) -> None:
    """M after a step is B − 0.05·PPᵀB, B = M_before + G, P a basis of B·Q; the update √(m/n)·P·Q'ᵀ has RMS √(m/n)·√(rank/(mn))."""
    w = nn.Parameter(gradient((6, 8), 0))
    optimizer = Dion([w], lr=0.01, weight_decay=2.0, rank=3)
    expected: list[float] = []
    with attach(optimizer, None, tmp_path / "run.zarr", every=1, on_error="raise"):
        for t in range(4):
            state = optimizer.state.get(w, {})
            m = state["momentum"].double().numpy().copy() if t else np.zeros((6, 8))
            q = state["Q"].double().numpy() if t else torch.randn(8, 3, generator=torch.Generator().manual_seed(0)).double().numpy()
            w.grad = gradient((6, 8), 10 + t)
            b = m + w.grad.double().numpy()
            p = np.linalg.svd(b @ q, full_matrices=False)[0]
            expected.append(rms(b - 0.05 * p @ (p.T @ b)))
            optimizer.step()
    update = read(tmp_path / "run.zarr")["update"]
    np.testing.assert_allclose(update["momentum_rms"].values[:, 0], expected, rtol=1e-6)
    # Left in, the decay would add 2·RMS(W) ≈ 2 to 0.22.
    np.testing.assert_allclose(update["update_rms_per_lr"].values[:, 0], sqrt(6 / 8) * sqrt(3 / 48), rtol=1e-4)


def test_dion_reads_each_group_by_its_algorithm(tmp_path: Path, read: Callable[..., Any]) -> None:
    one, two = nn.Parameter(gradient((6, 8), 0)), nn.Parameter(gradient((4, 5), 1))
    optimizer = DionMuon([{"params": [one]}, {"params": [two], "algorithm": "adamw"}])
    with attach(optimizer, None, tmp_path / "run.zarr", every=1, on_error="raise"):
        given = steps(optimizer, [one, two], 2)
    run = read(tmp_path / "run.zarr")
    v = 0.95 * 0.05 * given[0][1] ** 2 + 0.05 * given[1][1] ** 2
    assert run["second_moment"]["second_moment_mean"].values[-1, 1] == pytest.approx(v.mean(), rel=1e-6)
    assert run["second_moment"]["second_moment_form"].values[-1].tolist() == [-1, 0]
    assert (run["geometry"]["ns_schedule"].values == [[0, -1]]).all()
    m = 0.9 * 0.1 * given[0][1] + 0.1 * given[1][1]
    assert run["update"]["momentum_rms"].values[-1, 1] == pytest.approx(rms(m), rel=1e-6)


@pytest.mark.parametrize(("adjust_lr", "target"), [("spectral_norm", sqrt(12 / 20) / sqrt(20)), ("rms_norm", 0.2), (None, 1 / sqrt(20))])
@pytest.mark.parametrize("cls", [DionMuon, DionNorMuon])
def test_dion_sizes_and_schedule(cls: Any, adjust_lr: str | None, target: float, tmp_path: Path, read: Callable[..., Any]) -> None:
    """Updates have the size an exact polar factor would, within what the residual of the recorded schedule explains."""
    w = nn.Parameter(gradient((12, 20), 0))
    optimizer = cls([w], lr=0.01, weight_decay=1.0, adjust_lr=adjust_lr)
    with attach(optimizer, None, tmp_path / "run.zarr", every=1, on_error="raise"):
        steps(optimizer, [w], 4)
    run = read(tmp_path / "run.zarr")
    assert run["update"]["update_rms_target"].values[:, 0] == pytest.approx(target, rel=1e-12)
    alignment = run["update"]["update_rms_per_lr"].values / run["update"]["update_rms_target"].values
    residual = run["geometry"]["ns_residual"].values[..., 5]
    assert (np.abs(alignment**2 - 1) <= residual + 0.02).all()
    [schedule] = run["geometry"].attrs["ns_schedules"]
    a, b, c = SPEEDRUN[0]
    np.testing.assert_allclose(schedule["coefficients"], [(a / 1.02, b / 1.02**3, c / 1.02**5), *SPEEDRUN[1:]], rtol=1e-12)
    if cls is DionMuon:
        # bfloat16 iterates against the scalar recurrence; seen: 0.012. Without the 1.02 it would be 0.03 off.
        np.testing.assert_allclose(run["geometry"]["ns_residual_achieved"].values, residual, atol=0.018)


def test_dion_function_of_the_users_own_is_not_described(tmp_path: Path, read: Callable[..., Any]) -> None:
    w = nn.Parameter(gradient((4, 6), 0))
    optimizer = DionMuon([w], newton_schulz_func=lambda matrices, epsilon: matrices)
    with attach(optimizer, None, tmp_path / "run.zarr", every=1, on_error="raise"):
        steps(optimizer, [w], 1)
    geometry = read(tmp_path / "run.zarr")["geometry"]
    assert (geometry["ns_schedule"].values == -1).all()
    assert np.isfinite(geometry["condition_number"].values).all()


def test_normuon_second_moment_is_of_the_orthogonalised_rows(
    tmp_path: Path, read: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    outputs: list[Floats] = []

    def polar_express(matrices: Tensor, epsilon: float) -> Tensor:
        output = original(matrices, epsilon)
        if _get_current_dispatch_mode() is None:  # not of the copy whose step is watched
            outputs.append(output[0].double().numpy())
        return output

    original = standins_muon.polar_express
    monkeypatch.setattr(standins_muon, "polar_express", polar_express)
    w = nn.Parameter(gradient((20, 12), 0))
    optimizer = DionNorMuon([w])
    with attach(optimizer, None, tmp_path / "run.zarr", every=1, on_error="raise"):
        steps(optimizer, [w], 3)
    v, expected = 0.0, []
    for o in outputs:
        v = 0.95 * v + 0.05 * np.square(o).mean()  # the mean over rows of the rows' means
        expected.append(v)
    np.testing.assert_allclose(read(tmp_path / "run.zarr")["second_moment"]["second_moment_mean"].values[:, 0], expected, rtol=1e-6)


def test_adaptive_muon_is_flagged(tmp_path: Path) -> None:
    """Dividing by √V makes the RMS 1, and √max(m, n) follows as if it were a polar factor's: √20 times too large."""
    w = nn.Parameter(torch.zeros(12, 20))
    optimizer = AdaptiveMuon([w], lr=0.01, weight_decay=0.0)
    with attach(optimizer, None, tmp_path / "run.zarr", every=1, on_error="raise"):
        steps(optimizer, [w], 80)
    run = open_run(tmp_path / "run.zarr")
    assert run["geometry"].attrs["ns_schedules"] == [{"coefficients": [list(t) for t in YOU], "eps": 1e-7}]
    update = run["update"].load()
    assert update["update_rms_target"].values == pytest.approx(0.2, rel=1e-12)
    late = update["update_rms_per_lr"].values[60:, 0] / 0.2
    # RMS(O/√V) tends to about 1 as V, an average over 20 steps without bias correction, fills. Seen: 4.482 beside √20 = 4.472.
    assert late.mean() == pytest.approx(sqrt(20), rel=0.05)
    [finding] = [found for found in check(run) if found.rule == "rms_off_target"]
    assert finding.severity == "error"


def test_soap_second_moment_keeps_the_mean_of_squares(tmp_path: Path, read: Callable[..., Any]) -> None:
    """Rotations keep ‖G‖: in whatever basis, the mean of exp_avg_sq is the average of mean(g²), without the first step's."""
    w = nn.Parameter(gradient((6, 8), 0))
    before = w.detach().clone()
    optimizer = SOAP([w])
    with attach(optimizer, None, tmp_path / "run.zarr", every=1, on_error="raise"):
        given = steps(optimizer, [w], 1)
        assert torch.equal(w.detach(), before)
        given += steps(optimizer, [w], 5)
    run, v, expected = read(tmp_path / "run.zarr"), 0.0, [0.0]
    for [g] in given[1:]:
        v = 0.95 * v + 0.05 * np.square(g).mean()
        expected.append(v)
    np.testing.assert_allclose(run["second_moment"]["second_moment_mean"].values[:, 0], expected, rtol=1e-5)
    # The trap: as it is kept, exp_avg points elsewhere; only its size is that of the momentum.
    kept = optimizer.state[w]["exp_avg"].double().numpy()
    m: Any = 0.0
    for [g] in given[1:]:
        m = 0.95 * m + 0.05 * g
    assert abs(np.sum(kept * m)) < 0.9 * np.sum(m * m)
    assert run["update"]["momentum_rms"].values[-1, 0] == pytest.approx(rms(m), rel=1e-5)


def test_kfac_is_seen_through_the_optimizer_it_feeds(tmp_path: Path, read: Callable[..., Any]) -> None:
    """K-FAC rewrites gradients before the optimizer's step: gradient, momentum and update are of (G + γI)⁻¹·∇W·(A + γI)⁻¹."""
    torch.manual_seed(0)
    model = nn.Linear(5, 4, bias=False)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    kfac = KFACPreconditioner(model, damping=0.1, factor_decay=0.95)
    data, target = gradient((16, 5), 1), gradient((16, 4), 2)
    a_factor, g_factor = np.eye(5), np.eye(4)
    m: Any = 0.0
    gradients, momenta, raw_sizes = [], [], []
    with attach(optimizer, model, tmp_path / "run.zarr", every=1, on_error="raise"):
        for _ in range(3):
            w, x, y = (t.detach().double().numpy() for t in (model.weight, data, target))
            backward = 2 * (x @ w.T - y) / y.size  # of the mean of squares
            raw = backward.T @ x
            aa, gg = x.T @ x / 16, backward.T @ backward / 16
            a_factor, g_factor = 0.95 * a_factor + 0.05 * aa, 0.95 * g_factor + 0.05 * gg
            turned = np.linalg.solve(g_factor + 0.1 * np.eye(4), raw) @ np.linalg.inv(a_factor + 0.1 * np.eye(5))
            m = 0.9 * m + turned
            gradients.append(rms(turned))
            momenta.append(rms(m))
            raw_sizes.append(rms(raw))
            optimizer.zero_grad()
            (model(data) - target).square().mean().backward()
            kfac.step()
            optimizer.step()
    update = read(tmp_path / "run.zarr")["update"]
    np.testing.assert_allclose(update["grad_rms"].values[:, 0], gradients, rtol=1e-5)
    np.testing.assert_allclose(update["momentum_rms"].values[:, 0], momenta, rtol=1e-5)
    np.testing.assert_allclose(update["update_rms_per_lr"].values[:, 0], momenta, rtol=1e-5)
    # The trap: what backward left is something else.
    assert (np.abs(np.array(gradients) / raw_sizes - 1) > 0.1).all()


@pytest.mark.parametrize("cls", [DistributedShampoo, Dion, DionMuon, NvidiaMuon, AdaptiveMuon, SOAP, MarsM], ids=class_name)
def test_decay_alone_is_taken_out(cls: Any, tmp_path: Path, read: Callable[..., Any]) -> None:
    """Without gradients W ← W(1 − ηλ) is all that happens, but in SOAP's first step, which is skipped, decay and all."""
    w = nn.Parameter(gradient((6, 8), 0))
    size = rms(w.detach().double().numpy())
    optimizer = cls([w], lr=0.01, **{"wd" if cls is MarsM else "weight_decay": 2.0})
    with attach(optimizer, None, tmp_path / "run.zarr", every=1, on_error="raise"):
        for _ in range(2):
            w.grad = torch.zeros_like(w)
            optimizer.step()
    update = read(tmp_path / "run.zarr")["update"]
    taken = [0, 0.02] if cls is SOAP else [0.02, 0.02 * 0.98]
    np.testing.assert_allclose(update["update_rms"].values[:, 0], np.multiply(taken, size), rtol=1e-5)
    # float32 weights of about 1: at most 6e-8/0.01 each. Left in, the decay would be 2·RMS(W).
    assert (update["update_rms_per_lr"].values[:, 0] < 6e-6).all()
