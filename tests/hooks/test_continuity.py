"""Weights that something else than the optimizer changes between its steps are marked in the record, and told of once."""

import copy
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import xarray as xr
from torch import nn
from torch.optim import SGD

from optiscope.hooks import attach

Make = Callable[..., nn.Sequential]
Read = Callable[[str | Path], xr.DataTree]


def step(model: nn.Module, optimizer: torch.optim.Optimizer, seed: int) -> None:
    model.zero_grad()
    model(torch.randn(16, 8, generator=torch.Generator().manual_seed(seed))).square().mean().backward()
    optimizer.step()


@pytest.mark.parametrize("every", [1, 2])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_change_between_steps_is_marked(
    dtype: torch.dtype, every: int, mlp: Make, tmp_path: Path, read: Read, caplog: pytest.LogCaptureFixture
) -> None:
    """A swap with an average before step 4; a swap there and back, as for an evaluation, before step 6 leaves no trace."""
    model = mlp(dropout=0.0, dtype=dtype)
    average = copy.deepcopy(model.state_dict())
    optimizer = SGD(model.parameters(), lr=0.1)
    with attach(optimizer, model, tmp_path / "run.zarr", every=every, on_error="raise"):
        for t in range(1, 9):
            if t == 4:
                with torch.no_grad():
                    model[0].weight.copy_(average["0.weight"].lerp(model[0].weight, 0.9))
            if t == 6:
                mine = copy.deepcopy(model.state_dict())
                model.load_state_dict(average)
                model.load_state_dict(mine)
            model.zero_grad()
            model(torch.randn(16, 8, generator=torch.Generator().manual_seed(t)).to(dtype)).square().mean().backward()
            optimizer.step()
    update = read(tmp_path / "run.zarr")["update"]
    marks = dict(zip(update["step"].values.tolist(), update["changed_outside"].values.tolist(), strict=True))
    quiet = [0, 0, 0]
    expected = {1: [-1, -1, -1], 4: [1, 0, 0]}  # before the first step nothing was seen
    assert marks == {t: expected.get(t, quiet) for t in range(every, 9, every)}
    [message] = [record.getMessage() for record in caplog.records]
    assert "weights of 1 matrices of SGD changed between its steps, before step 4" in message


def test_tiny_change_is_seen(mlp: Make, tmp_path: Path, read: Read) -> None:
    """One entry of 144, by one part in 10⁵."""
    model = mlp(dropout=0.0)
    optimizer = SGD(model.parameters(), lr=0.1)
    with attach(optimizer, model, tmp_path / "run.zarr", every=1, on_error="raise"):
        step(model, optimizer, 0)
        with torch.no_grad():
            model[3].weight[2, 2] *= 1 + 1e-5
        step(model, optimizer, 1)
    assert read(tmp_path / "run.zarr")["update"]["changed_outside"].values.tolist() == [[-1, -1, -1], [0, 1, 0]]


def test_change_inside_a_step_belongs_to_the_step(mlp: Make, tmp_path: Path, read: Read) -> None:
    """A subclass that changes weights after its base's step: the recorded update is that of the whole step."""

    class Clipped(SGD):
        def step(self, closure: object = None) -> None:  # type: ignore[override]
            super().step()
            with torch.no_grad():
                for p in self.param_groups[0]["params"]:
                    p.clamp_(-0.1, 0.1)

    SGD([nn.Parameter(torch.ones(1))])  # the base's `step` runs hooks once an instance of the base was made
    model = mlp(dropout=0.0)
    optimizer = Clipped(model.parameters(), lr=0.1)
    expected = []
    with attach(optimizer, model, tmp_path / "run.zarr", every=1, on_error="raise"):
        for t in range(3):
            before = [p.detach().double() for p in model.parameters() if p.ndim == 2]
            step(model, optimizer, t)
            after = [p.detach().double() for p in model.parameters() if p.ndim == 2]
            expected.append([(a - b).square().mean().sqrt().item() for a, b in zip(before, after, strict=True)])
    update = read(tmp_path / "run.zarr")["update"]
    assert update["step"].values.tolist() == [1, 2, 3]
    assert update["update_rms"].values.ravel() == pytest.approx([e for row in expected for e in row], rel=1e-12)
    assert (update["changed_outside"].values[1:] == 0).all()
