"""NorMuon divides O's rows and keeps its norm: O is read back from the weights all the same, and with it the residual that was achieved."""

from pathlib import Path
from typing import Any
from unittest.mock import patch

import numpy as np
import pytest
import torch
from pytorch_optimizer.optimizer.muon import normuon
from torch import Tensor

from optiscope.analysis import open_run
from optiscope.diagnostics.quantities.step_taken import StepTaken
from optiscope.hooks import attach


def step_taken(o: np.ndarray, divisors: np.ndarray | None, **changes: Any) -> StepTaken:
    """W ← W − η·s·c·O/d from W = 0, in float64."""
    divided = o if divisors is None else o / divisors[:, None]
    update = divided * (np.linalg.norm(o) / np.linalg.norm(divided))
    given = {"lr": 0.1, "output_scale": 0.3, "row_divisors": divisors, **changes}
    return StepTaken(np.zeros_like(o), -0.03 * update, 0.0, 1.0, 1.0, weight_decay=0.0, decoupled_decay=0.0, **given)


def test_the_output_is_what_was_divided() -> None:
    rng = np.random.default_rng(0)
    o, divisors = rng.standard_normal((5, 8)), rng.uniform(0.1, 2, 5)
    np.testing.assert_allclose(step_taken(o, divisors).output, o, rtol=1e-12)
    assert np.abs(step_taken(o, divisors, row_divisors=None).output - o).max() > 0.1  # which it is not without them


@pytest.mark.parametrize(("settings", "is_read"), [({}, True), ({"use_adjusted_lr": True}, True), ({"update_scale": "match_rms"}, False)])
def test_the_achieved_residual_is_that_of_the_iterations_output(settings: dict[str, Any], is_read: bool, tmp_path: Path) -> None:
    torch.manual_seed(0)
    weights = [torch.nn.Parameter(0.05 * torch.randn(*shape)) for shape in ((24, 32), (32, 24), (24, 24))]
    optimizer = normuon.NorMuon([{"params": weights, "use_muon": True}], lr=0.02, weight_decay=0.1, foreach=False, **settings)
    iteration, outputs = normuon.zero_power_via_newton_schulz_5, []

    def seen(*args: Any, **given: Any) -> Tensor:
        outputs.append(iteration(*args, **given))
        outputs[-1] = outputs[-1].double()
        return outputs[-1].to(torch.bfloat16)

    with (
        patch.object(normuon, "zero_power_via_newton_schulz_5", seen),
        attach(optimizer, None, tmp_path / "run.zarr", every=1, on_error="raise"),
    ):
        for step in range(4):
            generator = torch.Generator().manual_seed(step)
            for p in weights:
                p.grad = torch.randn(p.shape, generator=generator)
            optimizer.step()
    achieved = open_run(tmp_path / "run.zarr")["geometry"]["ns_residual_achieved"].values[-1]
    assert np.isfinite(achieved).all() == is_read
    for found, o in zip(achieved, outputs[-len(weights) :], strict=True):
        wide = o if o.shape[0] <= o.shape[1] else o.T
        exact = float((wide @ wide.T - torch.eye(len(wide))).norm()) / len(wide) ** 0.5
        assert not is_read or found == pytest.approx(exact, rel=1e-3)
