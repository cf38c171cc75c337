"""Parameters and gradients that are missing, bad or change: their values are missing, the others' are not; and what matrices are called."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn
from torch.optim import SGD, AdamW, Muon, Optimizer

from optiscope.hooks import attach

Make = Callable[..., nn.Sequential]
Read = Callable[[str | Path], Any]


def weights(model: nn.Module) -> list[nn.Parameter]:
    return [p for p in model.parameters() if p.ndim == 2]


def give_gradients(*parameters: nn.Parameter) -> None:
    for p in parameters:
        p.grad = torch.linspace(-1, 2, p.numel()).view_as(p).sin().to(p.dtype)


def present(run: Any, matrix: int) -> list[int]:
    """Steps at which the matrix has an update."""
    update = run["update"]
    return update["step"].values[np.isfinite(update["update_rms"].values[:, matrix])].tolist()


def test_gradient_that_is_none_is_missing(mlp: Make, tmp_path: Path, read: Read) -> None:
    model = mlp()
    optimizer = Muon(weights(model), lr=0.1)
    with attach(optimizer, model, tmp_path / "run.zarr", every=1, on_error="raise"):
        give_gradients(*weights(model))
        model[3].weight.grad = None
        optimizer.step()
        give_gradients(*weights(model))
        optimizer.step()
    run = read(tmp_path / "run.zarr")
    assert [present(run, matrix) for matrix in range(3)] == [[1, 2], [2], [1, 2]]
    assert np.isnan(run["geometry"]["fro_norm"].values).tolist() == [[False, True, False], [False, False, False]]
    assert run["geometry"]["ns_schedule"].values.tolist() == [[0, -1, 0], [0, 0, 0]]


@pytest.mark.parametrize("within_step", [False, True])
@pytest.mark.parametrize("shape", [(6, 12), (8, 12), (96,), ()], ids=str)
def test_parameter_that_changes_shape_is_missing(shape: tuple[int, ...], within_step: bool, mlp: Make, tmp_path: Path, read: Read) -> None:
    """Also when the number of entries stays the same; the other matrices are recorded as ever."""

    class Resizing(SGD):
        def step(self, closure: Any = None) -> Any:
            if within_step:
                resize()
            return super().step(closure)

    model = mlp()
    first = model[0].weight

    def resize() -> None:
        first.grad = None
        first.data = torch.ones(shape)
        first.grad = torch.ones(shape)

    optimizer = Resizing(weights(model), lr=0.1)
    give_gradients(*weights(model))
    with attach(optimizer, model, tmp_path / "run.zarr", every=1, on_error="raise"):
        if not within_step:
            resize()
        optimizer.step()
    run = read(tmp_path / "run.zarr")
    assert [present(run, matrix) for matrix in range(3)] == [[], [1], [1]]


@pytest.mark.parametrize("value", [float("nan"), float("inf"), 0.0])
@pytest.mark.parametrize("build", [lambda ps: Muon(ps), lambda ps: SGD(ps, lr=0.1), lambda ps: AdamW(ps)], ids=["Muon", "SGD", "AdamW"])
def test_bad_gradients_are_data(
    build: Callable[[Any], Optimizer], value: float, mlp: Make, tmp_path: Path, read: Read, recwarn: pytest.WarningsRecorder
) -> None:
    model = mlp()
    optimizer = build(weights(model))
    give_gradients(*weights(model))
    with torch.no_grad():
        model[3].weight.grad.fill_(0).view(-1)[5] = value
    with attach(optimizer, model, tmp_path / "run.zarr", every=1, on_error="raise"):
        optimizer.step()
    run = read(tmp_path / "run.zarr")
    assert not recwarn.list
    geometry, update = run["geometry"], run["update"]
    np.testing.assert_array_equal(update["grad_rms"].values[0, 1], abs(value) / 12 if value else 0.0)
    assert not geometry["fro_norm"].values[0, 1] > 0 or np.isinf(geometry["fro_norm"].values[0, 1])
    assert np.isnan(geometry["condition_number"].values[0, 1])
    assert np.isnan(geometry["sigma_quantile"].values[0, 1]).all()
    assert np.isfinite(geometry["condition_number"].values[0, [0, 2]]).all()
    assert np.isfinite(update["update_rms"].values[0, [0, 2]]).all()


def test_parameter_that_leaves_its_optimizer_is_missing(mlp: Make, tmp_path: Path, read: Read) -> None:
    model = mlp()
    optimizer = SGD(weights(model), lr=0.1)
    give_gradients(*weights(model))
    with attach(optimizer, model, tmp_path / "run.zarr", every=1, on_error="raise"):
        optimizer.step()
        optimizer.param_groups[0]["params"].pop(0)
        optimizer.add_param_group({"params": [nn.Parameter(torch.ones(2, 2))]})
        optimizer.step()
    run = read(tmp_path / "run.zarr")
    assert [present(run, matrix) for matrix in range(3)] == [[1], [1, 2], [1, 2]]


def test_names_layers_and_operators(tmp_path: Path, read: Read) -> None:
    """Convolutions as (out, rest); wide token tables without geometry; without a model, numbered names."""
    model = nn.ModuleDict({
        "embed_tokens": nn.Embedding(11, 4), "layers": nn.ModuleList([nn.ModuleDict({"q_proj": nn.Linear(4, 6)})]),
        "conv1": nn.Conv2d(3, 5, 2),
    })  # fmt: skip
    first, second = AdamW(model["embed_tokens"].parameters()), AdamW([*model["layers"].parameters(), *model["conv1"].parameters()])
    give_gradients(*model.parameters())
    with attach([first, second], model, tmp_path / "named.zarr", every=1, on_error="raise"):
        first.step()
        second.step()
    run = read(tmp_path / "named.zarr")
    update = run["update"]
    table = {key: update[key].values.tolist() for key in ("name", "operator", "layer", "rows", "cols", "optimizer")}
    assert table == {
        "name": ["embed_tokens.weight", "layers.0.q_proj.weight", "conv1.weight"],
        "operator": ["embed", "attn_q", "conv"],
        "layer": [-1, 0, -1],
        "rows": [11, 6, 5],
        "cols": [4, 4, 12],
        "optimizer": ["AdamW", "AdamW#2", "AdamW#2"],
    }
    assert run["geometry"]["name"].values.tolist() == ["layers.0.q_proj.weight", "conv1.weight"]
    assert np.isfinite(run["geometry"]["condition_number"].values).all()

    attach([first, second], None, tmp_path / "bare.zarr").close()
    bare = read(tmp_path / "bare.zarr")["update"]
    assert bare["name"].values.tolist() == ["AdamW.group0.param0", "AdamW#2.group0.param0", "AdamW#2.group0.param2"]

    rule = {r"q_proj": "mixer"}
    attach([first, second], model, tmp_path / "ruled.zarr", operators=rule, measure=["update"]).close()
    ruled = read(tmp_path / "ruled.zarr")
    assert "geometry" not in ruled
    assert ruled["update"]["operator"].values.tolist() == ["embed", "mixer", "conv"]
