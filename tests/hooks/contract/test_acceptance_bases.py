"""What is known in closed form of optimizers that work in a basis of their own, and of the update that an optimizer intends."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from contract import cases_bases, cases_elementwise, cases_torch
from contract.harness import Case, float64, relative_error, train
from contract.one_matrix import by_name, momentum, random, recorded, second_moment
from optiscope.hooks.adapters.pytorch_optimizer_bases import lifted
from optiscope.hooks.observing.snapshot import Snapshot


def test_soap_momentum_follows_the_gradients(tmp_path: Path) -> None:
    """Its cosine with an average of them kept here, from the second step on: the first only makes the basis. Across a renewal of it."""
    gradients = [random(6, 4) + 0.5 * random(6, 4, seed=t) for t in range(1, 9)]
    build = by_name("SOAP", lr=1e-3, precondition_frequency=3)
    _, optimizer, parameter = recorded(build, random(6, 4), gradients, tmp_path / "run.zarr")
    average = np.zeros((6, 4))
    for gradient in gradients[1:]:
        average = 0.95 * average + 0.05 * float64(gradient)
    read = float64(momentum(optimizer, parameter))
    assert np.sum(read * average) / np.linalg.norm(read) / np.linalg.norm(average) > 0.99999
    rotated = second_moment(optimizer, parameter)
    assert rotated.form == "rotated"
    # What the contract takes from the optimizer: an orthogonal basis.
    for q in optimizer.state[parameter]["Q"]:
        np.testing.assert_allclose(float64(q).T @ float64(q), np.eye(len(q)), atol=1e-6)


@pytest.mark.parametrize("shape", [(8, 5), (5, 8), (6, 6)], ids=["tall", "wide", "square"])
@pytest.mark.parametrize("kind", ["std", "reverse_std", "left", "right", "full", "random"])
def test_a_moment_is_lifted_as_the_library_lifts_its_update(kind: str, shape: tuple[int, int]) -> None:
    from pytorch_optimizer.optimizer.utils.galore import GaLoreProjector

    projector = GaLoreProjector(rank=3, scale=1.0, projection_type=kind)
    low = projector.project(random(*shape), 1)
    whole = lifted(low, projector, shape)
    assert whole is not None
    assert torch.equal(whole, projector.project_back(low))
    assert whole.shape == shape


def test_galore_lifts_the_gradient_to_its_best_approximation(tmp_path: Path) -> None:
    """Eckart–Young: after one step the lifted moment is (1 − β₁) times the gradient without its smaller singular values."""
    gradient = random(8, 5)

    def build(p: Sequence[nn.Parameter]) -> Any:
        group = {"params": p, "rank": 2, "update_proj_gap": 10, "scale": 0.25, "projection_type": "std"}
        return by_name("GaLore", lr=0.01)([group])  # type: ignore[list-item]

    _, optimizer, parameter = recorded(build, random(8, 5), [gradient], tmp_path / "run.zarr")
    u, s, vt = np.linalg.svd(float64(gradient), full_matrices=False)
    assert relative_error(float64(momentum(optimizer, parameter)), 0.1 * (u[:, :2] * s[:2]) @ vt[:2]) < 1e-5


# The update that an optimizer intends, read from its state, is asked for with coarse weights; with float32 ones it must be the applied one.

_INTENDED = [
    "SGD", "SGD with momentum", "AdaGrad", "RMSProp", "RMSProp with momentum", "AMSGrad", "AdamW", "Adamax", "Adafactor (torch)", "Adafactor (Transformers)",
    "Adafactor (Transformers), with momentum", "AdaFactor (pytorch_optimizer)", "Yogi", "AdaBelief", "LARS", "LAMB, decoupled decay",
    "Sophia-H", "Adam-mini (pytorch_optimizer)", "GaLore (pytorch_optimizer)",
]  # fmt: skip
_CASES = {case.system: case for case in (*cases_torch.CASES, *cases_elementwise.CASES, *cases_bases.CASES)}
# torch bounds what Adafactor divides by, by the machine epsilon: of bfloat16 weights, by this, far above what small gradients make of it.
_COARSE = Case("Adafactor with the ε of bfloat16", "torch", lambda m: torch.optim.Adafactor(m.parameters(), lr=0.02, eps=(2.0**-7, 1e-3)))


@pytest.mark.parametrize("case", [*(_CASES[system] for system in _INTENDED), _COARSE], ids=lambda case: case.system)
def test_intended_update_is_the_applied_one(case: Case, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    read, errors = Snapshot.read, []

    def spy(self: Snapshot) -> Any:
        readings = read(self)
        reading, adapter = self.reading, self.adapter
        lr, decay = adapter.learning_rate(reading), adapter.decoupled_decay(reading)
        applied = (float64(reading.weight) * (1 - lr * decay) - float64(reading.parameter)) / lr
        if readings:
            intended = adapter.intended(reading)
            assert intended is not None
            errors.append(relative_error(float64(intended), applied))
        return readings

    monkeypatch.setattr(Snapshot, "read", spy)
    train(case, tmp_path / "run.zarr")
    # Rounding of float32 weights, and ηλ = 1e-3 where decay comes after the update (GaLore).
    assert errors
    assert max(errors) < 2e-3
