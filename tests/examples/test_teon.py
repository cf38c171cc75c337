"""TEON: the paper's formulas in float64, what stacking does, and the one row of geometry that a recorder keeps per stack."""

from unittest.mock import patch

import numpy as np
import pytest
import torch
import xarray as xr
from contract.harness import Expected
from torch import nn

from optiscope.examples.optimizers import teon
from optiscope.examples.optimizers.newton_schulz import JORDAN
from optiscope.examples.optimizers.teon import TEON
from optiscope.hooks import attach
from optiscope.hooks.recording import record

LR, DECAY, MU = 0.02, 0.5, 0.9
# A classical triple and enough steps to reach the polar factor to float64.
EXACT = {"ns_steps": 60, "ns_coefficients": [(1.5, -0.5, 0.0)], "ns_dtype": torch.float64}


def transcription(shape, count, through_svd, triples):
    """M^(k) ← μM^(k) + G^(k); NS of [M^(1) … M^(K)], cut into K; U = √(m/n)·O^(k). Several layers at once."""
    momenta = [np.zeros(shape)] * count

    def step(gradients):
        nonlocal momenta
        momenta = [MU * m + g for m, g in zip(momenta, gradients, strict=True)]
        o = through_svd(np.hstack(momenta), triples)
        return [Expected(m, None, np.sqrt(shape[0] / shape[1]) * part) for m, part in zip(momenta, np.hsplit(o, count), strict=True)]

    return step


@pytest.mark.parametrize("shape", [(5, 5), (3, 7), (7, 3), (20, 3)], ids=str)
@pytest.mark.parametrize("stack", [1, 2, 3, 4])
def test_steps_are_those_of_the_paper(shape, stack, gaussian, through_svd):
    """Four layers: as one stack, as two, with a remainder, and each by itself."""
    layers = [nn.Parameter(gaussian(shape, i)) for i in range(4)]
    optimizer = TEON(layers, lr=LR, momentum=MU, weight_decay=DECAY, stack=stack, ns_dtype=torch.float64)
    cuts = [slice(i, min(i + stack, 4)) for i in range(0, 4, stack)]
    references = [transcription(shape, len(layers[cut]), through_svd, [JORDAN] * 5) for cut in cuts]
    for seed in range(1, 6):
        before = [p.detach().numpy().copy() for p in layers]
        for i, p in enumerate(layers):
            p.grad = gaussian(shape, 10 * seed + i)
        optimizer.step()
        for cut, reference in zip(cuts, references, strict=True):
            for p, w, kept in zip(layers[cut], before[cut], reference([p.grad.numpy() for p in layers[cut]]), strict=True):
                np.testing.assert_allclose(optimizer.state[p]["momentum_buffer"], kept.momentum, atol=1e-14)
                np.testing.assert_allclose(p.detach(), w * (1 - LR * DECAY) - LR * kept.update, atol=1e-12)


@pytest.mark.parametrize("count", [2, 3])
def test_equal_layers_get_their_own_polar_factor_over_the_root_of_their_number(count, gaussian):
    """[Q … Q]/√K is the polar factor of [G … G]."""
    layers = [nn.Parameter(torch.zeros(4, 6, dtype=torch.float64)) for _ in range(count)]
    optimizer = TEON(layers, lr=1.0, stack=count, **EXACT)
    for p in layers:
        p.grad = gaussian((4, 6), 1)
    optimizer.step()
    u, _, vt = torch.linalg.svd(gaussian((4, 6), 1), full_matrices=False)
    for p in layers:
        torch.testing.assert_close(-p.detach() / np.sqrt(4 / 6), u @ vt / np.sqrt(count), rtol=0, atol=1e-12)


def test_each_slice_is_whitened_by_all(gaussian):
    """O^(k) = (Σ_j G_jG_jᵀ)^(−1/2) G_k, by the eigenvectors of the sum."""
    layers = [nn.Parameter(torch.zeros(4, 6, dtype=torch.float64)) for _ in range(3)]
    optimizer = TEON(layers, lr=1.0, stack=3, **EXACT)
    for i, p in enumerate(layers):
        p.grad = (1 + i) * gaussian((4, 6), i)
    optimizer.step()
    values, vectors = torch.linalg.eigh(sum(p.grad @ p.grad.T for p in layers))
    for p in layers:
        expected = vectors @ torch.diag(values**-0.5) @ vectors.T @ p.grad
        torch.testing.assert_close(-p.detach() / np.sqrt(4 / 6), expected, rtol=0, atol=1e-12)


def test_stacks_of_unlike_layers_are_refused():
    square, wide = nn.Parameter(torch.ones(3, 3)), nn.Parameter(torch.ones(3, 4))
    with pytest.raises(ValueError, match=r"params: expected one shape in every stack, got \(3, 3\) and \(3, 4\); reorder the group"):
        TEON([square, wide])
    with pytest.raises(ValueError, match="stack: expected 1 or more, got 0"):
        TEON([square], stack=0)
    TEON([square, nn.Parameter(torch.ones(3, 3)), wide])  # the last one is a stack of its own


class Layers(nn.Module):
    """Five layers of one shape, with names."""

    def __init__(self, gaussian):
        super().__init__()
        for i in range(5):
            self.register_parameter(f"q{i}", nn.Parameter(0.01 * gaussian((4, 6), i, torch.float32)))


def train(model, gaussian, steps=3, without=()):
    """Steps of `TEON` in stacks of two; gradients of all layers but those named."""
    optimizer = TEON(model.parameters(), lr=LR, momentum=MU, weight_decay=DECAY, ns_dtype=torch.float64)
    for seed in range(1, steps + 1):
        for i, (name, p) in enumerate(model.named_parameters()):
            p.grad = None if name in without else gaussian((4, 6), 10 * seed + i, torch.float32)
        yield optimizer
        optimizer.step()


def recorded(tmp_path, gaussian, **options):
    model = Layers(gaussian)
    stepping = train(model, gaussian, **options)
    with attach(next(stepping), model, tmp_path / "run.zarr", every=1, on_error="raise"):
        for _ in stepping:
            pass
    with xr.open_datatree(tmp_path / "run.zarr", engine="zarr") as run:
        return run["geometry"].load(), run["update"].load()


def test_a_stack_is_one_row_of_geometry_and_its_layers_are_rows_of_updates(tmp_path, gaussian, through_svd):
    given, seen = [], []
    original, measure = teon.orthogonalise, record.measure_geometry

    def iteration(matrix, *rest):
        given.append(matrix.clone())
        return original(matrix, *rest)

    def measured(observation):
        seen.append(observation.problem.matrix.copy())
        return measure(observation)

    with patch.object(teon, "orthogonalise", iteration), patch.object(record, "measure_geometry", measured):
        geometry, update = recorded(tmp_path, gaussian)
    assert sorted(geometry["name"].values.tolist()) == ["q0|q1", "q2|q3", "q4"]
    assert sorted(update["name"].values.tolist()) == ["q0", "q1", "q2", "q3", "q4"]
    shapes = dict(zip(geometry["name"].values.tolist(), zip(geometry["rows"].values, geometry["cols"].values, strict=True), strict=True))
    assert shapes == {"q0|q1": (4, 12), "q2|q3": (4, 12), "q4": (4, 6)}
    # What was measured is what the iterations were given, to the bit: three problems in each of three steps.
    assert len(given) == len(seen) == 9
    assert {matrix.numpy().tobytes() for matrix in given} == {matrix.tobytes() for matrix in seen}
    of_name = {name: i for i, name in enumerate(geometry["name"].values.tolist())}
    for t in range(3):
        for name, matrix in zip(("q0|q1", "q2|q3", "q4"), given[3 * t : 3 * t + 3], strict=True):
            row = geometry.isel(step=t, matrix=of_name[name])
            o = through_svd(matrix, [JORDAN] * 5)
            residual = np.linalg.norm(np.eye(4) - o @ o.T) / 2
            sigma = np.linalg.svd(matrix.double().numpy(), compute_uv=False)
            assert float(row["condition_number"]) == pytest.approx(sigma[0] / sigma[-1], rel=1e-6)
            assert float(row["ns_residual"][5]) == pytest.approx(residual, rel=1e-5)
            assert float(row["ns_residual_achieved"]) == pytest.approx(residual, rel=1e-3)  # float32 weights; seen: 1e-5
            assert float(row["alignment"]) == pytest.approx((matrix.double().numpy() * o).sum() / sigma.sum(), rel=1e-4)
    # What an exact polar factor would weigh is known of a layer by itself only.
    target = dict(zip(update["name"].values.tolist(), update["update_rms_target"].values[0], strict=True))
    assert target["q4"] == pytest.approx(np.sqrt(4 / 6) / np.sqrt(6))
    assert np.isnan([target[f"q{i}"] for i in range(4)]).all()


def test_a_stack_that_lacks_a_gradient_is_not_measured_and_its_other_layers_move_alone(tmp_path, gaussian, through_svd):
    geometry, update = recorded(tmp_path, gaussian, steps=1, without=("q1",))
    finite = dict(zip(geometry["name"].values.tolist(), geometry["fro_norm"].notnull().values[0], strict=True))
    assert finite == {"q0|q1": False, "q2|q3": True, "q4": True}
    moved = dict(zip(update["name"].values.tolist(), update["update_rms_per_lr"].values[0], strict=True))
    assert np.isnan(moved["q1"])
    o = through_svd(gaussian((4, 6), 10, torch.float32), [JORDAN] * 5)
    assert moved["q0"] == pytest.approx(np.sqrt(4 / 6) * np.linalg.norm(o) / np.sqrt(24), rel=1e-4)
