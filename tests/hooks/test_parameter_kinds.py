"""Parameters that are no plain matrix of one layer: expert stacks, convolutions, tied, shared and frozen ones, fused projections."""

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
import xarray as xr
from torch import Tensor, nn
from torch.optim import SGD, AdamW

from optiscope.hooks import attach

Read = Callable[[str | Path], xr.DataTree]


def rms(tensor: Tensor) -> float:
    return tensor.double().square().mean().sqrt().item()


class Experts(nn.Module):
    """A stack of expert matrices beside a convolution whose kernel has three dimensions too."""

    def __init__(self) -> None:
        super().__init__()
        self.w1 = nn.Parameter(torch.randn(3, 6, 10, generator=torch.Generator().manual_seed(0)))
        self.mixer = nn.Conv1d(4, 5, 3)
        self.position = nn.Parameter(torch.randn(1, 7, 6, generator=torch.Generator().manual_seed(1)))

    def forward(self, x: Tensor) -> Tensor:
        mixed = self.mixer(x)  # 5 × 6
        scaled = torch.einsum("emn,bcm->ebcn", self.w1 * torch.tensor([1.0, 10.0, 0.1]).view(3, 1, 1), mixed)
        return scaled.tanh().sum() + (self.position * mixed.mean((0, 1))).square().sum()


def test_expert_stack_is_recorded_matrix_by_matrix(tmp_path: Path, read: Read) -> None:
    model = Experts()
    optimizer = SGD(model.parameters(), lr=0.1, momentum=0.9)
    gradients, updates = [], []
    with attach(optimizer, model, tmp_path / "run.zarr", every=1, on_error="raise"):
        for t in range(3):
            model.zero_grad()
            model(torch.randn(2, 4, 8, generator=torch.Generator().manual_seed(t))).backward()
            before = model.w1.detach().clone()
            optimizer.step()
            assert model.w1.grad is not None
            gradients.append([rms(g) for g in model.w1.grad])
            updates.append([rms(a - b) for a, b in zip(before, model.w1.detach(), strict=True)])
    run = read(tmp_path / "run.zarr")
    update = run["update"]
    shapes = {str(n): (int(r), int(c)) for n, r, c in zip(*(update[k].values for k in ("name", "rows", "cols")), strict=True)}
    assert shapes == {"w1[0]": (6, 10), "w1[1]": (6, 10), "w1[2]": (6, 10), "position": (7, 6), "mixer.weight": (5, 12)}
    experts = [n in ("w1[0]", "w1[1]", "w1[2]") for n in map(str, update["name"].values)]
    np.testing.assert_allclose(update["grad_rms"].values[:, experts], gradients, rtol=1e-12)
    np.testing.assert_allclose(update["update_rms"].values[:, experts], updates, rtol=1e-6)  # torch's difference is in float32
    geometry = run["geometry"]
    buffer = optimizer.state[model.w1]["momentum_buffer"].double().numpy()
    rows = [geometry["name"].values.tolist().index(f"w1[{i}]") for i in range(3)]
    assert geometry["condition_number"].values[-1, rows] == pytest.approx([np.linalg.cond(m) for m in buffer], rel=1e-6)
    assert geometry["fro_norm"].values[-1, rows] == pytest.approx([np.linalg.norm(m) for m in buffer], rel=1e-12)
    kernel = optimizer.state[model.mixer.weight]["momentum_buffer"].double().numpy().reshape(5, 12)
    at = geometry["name"].values.tolist().index("mixer.weight")
    assert geometry["condition_number"].values[-1, at] == pytest.approx(np.linalg.cond(kernel), rel=1e-6)


def test_experts_keep_their_operator_and_layer(tmp_path: Path, read: Read) -> None:
    model = nn.Module()
    model.layers = nn.ModuleList(nn.Module() for _ in range(2))
    for layer in model.layers:
        layer.mlp = nn.Module()
        layer.mlp.experts = nn.Module()
        layer.mlp.experts.down_proj = nn.Parameter(torch.ones(2, 4, 3))
    with attach(SGD(model.parameters(), lr=0.1), model, tmp_path / "run.zarr", every=1):
        pass
    update = read(tmp_path / "run.zarr")["update"]
    assert update["operator"].values.tolist() == ["mlp_down"] * 4
    assert update["layer"].values.tolist() == [0, 0, 1, 1]
    assert update["expert"].values.tolist() == [0, 1, 0, 1]


def test_moments_of_an_expert_are_those_of_its_slice(tmp_path: Path, read: Read) -> None:
    model = Experts()
    optimizer = AdamW([model.w1], lr=0.1)
    with attach(optimizer, model, tmp_path / "run.zarr", every=1, on_error="raise"):
        model(torch.randn(2, 4, 8, generator=torch.Generator().manual_seed(0))).backward()
        optimizer.step()
    run, state = read(tmp_path / "run.zarr"), optimizer.state[model.w1]
    assert run["update"]["momentum_rms"].values[0] == pytest.approx([rms(m) for m in state["exp_avg"]], rel=1e-12)
    assert run["second_moment"]["second_moment_mean"].values[0] == pytest.approx(
        [v.double().mean().item() for v in state["exp_avg_sq"]], rel=1e-12
    )
    forms = run["second_moment"].attrs["forms"]
    assert [forms[i] for i in run["second_moment"]["second_moment_form"].values[0]] == ["full"] * 3


def test_tied_weights_are_recorded_once_and_frozen_ones_are_missing(tmp_path: Path, read: Read) -> None:
    class Tied(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.embed = nn.Embedding(9, 4)
            self.first, self.again, self.frozen = nn.Linear(4, 4, bias=False), nn.Linear(4, 4, bias=False), nn.Linear(4, 4, bias=False)
            self.again.weight = self.first.weight
            self.head = nn.Linear(4, 9, bias=False)
            self.head.weight = self.embed.weight
            self.frozen.weight.requires_grad_(False)

        def forward(self, tokens: Tensor) -> Tensor:
            out: Tensor = self.head(self.frozen(self.again(self.first(self.embed(tokens)).tanh())))
            return out

    torch.manual_seed(0)
    model = Tied()
    optimizer = SGD(model.parameters(), lr=0.1)
    with attach(optimizer, model, tmp_path / "run.zarr", every=1, on_error="raise"):
        for _ in range(2):
            model.zero_grad()
            model(torch.arange(5)).square().mean().backward()
            optimizer.step()
    update = read(tmp_path / "run.zarr")["update"]
    recorded = dict(zip(map(str, update["name"].values), np.isfinite(update["update_rms"].values).all(axis=0).tolist(), strict=True))
    assert recorded == {"embed.weight": True, "first.weight": True, "frozen.weight": False}


def test_fused_projection_is_one_matrix_as_the_optimizer_sees_it(tmp_path: Path, read: Read) -> None:
    attention = nn.MultiheadAttention(8, 2, bias=False)
    optimizer = SGD(attention.parameters(), lr=0.1)
    x = torch.randn(5, 8, generator=torch.Generator().manual_seed(0))
    with attach(optimizer, attention, tmp_path / "run.zarr", every=1, on_error="raise"):
        attention(x, x, x)[0].square().sum().backward()
        optimizer.step()
    update = read(tmp_path / "run.zarr")["update"]
    fused = update["name"].values.tolist().index("in_proj_weight")
    assert (update["rows"].values[fused], update["cols"].values[fused], update["operator"].values[fused]) == (24, 8, "attn_qkv")
