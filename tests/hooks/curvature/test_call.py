"""`recorder.curvature` as a guest in a training: bitwise neutral, harmless when it fails, and readable and continuable in the store."""

import logging
import random
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.optim import SGD, AdamW

from optiscope.diagnostics.catalogue import in_group
from optiscope.hooks import attach


def as_bytes(tensor: Tensor | None) -> bytes | None:
    return None if tensor is None else tensor.detach().to_dense().contiguous().flatten().view(torch.uint8).numpy().tobytes()


def everything(model: nn.Module, optimizer: Any) -> list[Any]:
    state = [[as_bytes(v) for v in optimizer.state[p].values()] for p in model.parameters() if p in optimizer.state]
    numbers = [as_bytes(torch.get_rng_state()), np.random.get_state()[1].tobytes(), random.getstate()]  # noqa: NPY002
    tensors = (
        [as_bytes(p) for p in model.parameters()] + [as_bytes(p.grad) for p in model.parameters()] + [as_bytes(b) for b in model.buffers()]
    )
    return [
        tensors,
        [m.training for m in model.modules()],
        [p.requires_grad for p in model.parameters()],
        state,
        numbers,
        torch.is_grad_enabled(),
    ]


def net() -> nn.Sequential:
    """Batch normalisation, dropout, an unused and a frozen weight, buffers that cannot simply be written to."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(8, 12), nn.BatchNorm1d(12), nn.Tanh(), nn.Dropout(0.3), nn.Linear(12, 5))
    model.register_parameter("unused", nn.Parameter(torch.randn(3, 3)))
    model.register_parameter("frozen", nn.Parameter(torch.randn(3, 3), requires_grad=False))
    model.register_buffer("expanded", torch.arange(3.0).expand(4, 3))
    model.register_buffer("sparse", torch.eye(3).to_sparse())
    with torch.inference_mode():
        model.register_buffer("inferred", torch.ones(2))
    return model


OPTIONS: dict[str, dict[str, Any]] = {
    "one probe": {},
    "central differences": {"method": "central_difference", "probes": 2},
    "everything": {"probes": 2, "distribution": "gaussian", "block_probes": 2, "exact": 24, "draws": 2, "with_logits": True},
}


@pytest.mark.parametrize("name", [None, *OPTIONS])
def test_training_is_bitwise_what_it_would_be_without(name: str | None, tmp_path: Path) -> None:
    def train(options: dict[str, Any] | None) -> list[Any]:
        model = net()
        optimizer = AdamW([p for n, p in model.named_parameters() if n != "unused"], lr=0.01)
        seen: list[Any] = []
        torch.manual_seed(1)
        with attach(optimizer, model, tmp_path / f"{name}.zarr", every=1, on_error="raise") as recorder:
            for _ in range(4):
                x = torch.randn(6, 8)

                def loss(x: Tensor = x) -> Tensor:
                    np.random.rand(), random.random()  # noqa: NPY002
                    out = model(x).square().mean()
                    model.eval()  # as a careless loss might
                    return out

                optimizer.zero_grad()
                training_loss = model(x).square().mean()
                if options is not None:
                    given = {k: v for k, v in options.items() if k != "with_logits"}
                    before = everything(model, optimizer)
                    # Between forward and backward: the training's graph holds the weights and buffers.
                    recorder.curvature(loss, logits_fn=(lambda x=x: model(x)) if "with_logits" in options else None, **given)
                    assert everything(model, optimizer) == before
                training_loss.backward()
                optimizer.step()
                seen.append(everything(model, optimizer))
        return seen

    assert train(OPTIONS[name] if name else {}) == train(None)


def test_dropout_is_the_same_in_all_evaluations(tmp_path: Path, read: Any) -> None:
    """Central differences of a loss with dropout, which would be noise otherwise, agree with the double backward."""
    found = []
    for method in ("double_backward", "central_difference"):
        model = net().double()
        x = torch.randn(6, 8, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
        with attach(SGD(model.parameters(), lr=0.1), model, tmp_path / f"{method}.zarr", on_error="raise") as recorder:
            recorder.curvature(lambda: model(x).square().mean(), method=method)  # noqa: B023
        found.append(read(tmp_path / f"{method}.zarr")["curvature"].to_dataset().isel(step=0))
    for name, exact, difference in zip(found[0]["name"].values, *(f["hessian_mean"].values for f in found), strict=True):
        if name == "frozen":
            assert np.isnan(exact)
        elif name == "unused":
            assert exact == difference == 0
        else:
            assert difference == pytest.approx(exact, rel=1e-5)


class Attention(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.qkv = nn.Linear(8, 24, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return F.scaled_dot_product_attention(*self.qkv(x).view(2, 4, 3, 1, 8).permute(2, 0, 3, 1, 4)).square().mean()


def test_a_kernel_without_second_backward_is_found_out_once(tmp_path: Path, read: Any, caplog: Any) -> None:
    torch.manual_seed(0)
    model, x = Attention(), torch.randn(2, 4, 8)
    with attach(SGD(model.parameters(), lr=0.1), model, tmp_path / "run.zarr", on_error="raise") as recorder:
        for _ in range(2):
            recorder.curvature(lambda: model(x), probes=8)
        told = [r for r in caplog.records if "no second backward pass" in r.getMessage()]
        assert len(told) == 1
    found = read(tmp_path / "run.zarr")["curvature"].to_dataset().isel(step=0, matrix=0)
    assert found.attrs["methods"][int(found["hessian_method"])] == "central_difference"
    attached = attach(SGD(model.parameters(), lr=0.1), model, tmp_path / "math.zarr", on_error="raise")
    with torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH), attached as recorder:
        recorder.curvature(lambda: model(x), probes=8)
    exact = read(tmp_path / "math.zarr")["curvature"].to_dataset().isel(step=0, matrix=0)
    assert exact.attrs["methods"][int(exact["hessian_method"])] == "double_backward"
    # float32 differences: seen 4e-6 of the mean's size.
    assert float(found["hessian_mean"]) == pytest.approx(float(exact["hessian_mean"]), rel=1e-3)


def test_a_kernel_that_the_first_call_did_not_meet_is_found_out_later(tmp_path: Path, read: Any, caplog: Any) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(8, 8), Attention())
    model.register_parameter("beside", nn.Parameter(torch.randn(3, 3)))
    x, optimizer = torch.randn(2, 4, 8), SGD(model.parameters(), lr=0.1)
    with attach(optimizer, model, tmp_path / "run.zarr", on_error="raise") as recorder:
        for only in ("beside", None):
            recorder.curvature(lambda: model(x) + model.beside.square().sum(), only=only)
            optimizer.step()  # records of one step would be merged
    found = read(tmp_path / "run.zarr")["curvature"].to_dataset().set_index(matrix="name")
    by, differences = found["hessian_method"], found.attrs["methods"].index("central_difference")
    assert found.attrs["methods"][int(by.sel(matrix="beside")[0])] == "double_backward"
    assert set(by[1].values) == {differences}
    assert sum("no second backward pass" in r.getMessage() for r in caplog.records) == 1


def fails(model: nn.Module) -> dict[str, tuple[Any, str]]:
    x = torch.randn(4, 8)

    def raising() -> Tensor:
        raise RuntimeError("out of data")

    return {
        "raises": (raising, "out of data"),
        "no tensor": (lambda: 1.0, "got float"),
        "not one number": (lambda: model(x), r"shape \(4, 5\)"),
        "not finite": (lambda: model(x).sum() * float("nan"), "the loss is nan"),
        "no graph": (lambda: model(x).sum().detach(), "no graph"),
        "backward inside": (lambda: [loss := model(x).square().sum(), loss.backward()][0], "second time"),
        "no function": (3.0, "write loss_fn=lambda"),
    }


@pytest.mark.parametrize("name", fails(nn.Linear(8, 5)))
def test_what_fails_warns_is_missing_and_training_goes_on(name: str, mlp: Any, tmp_path: Path, read: Any, caplog: Any) -> None:
    model = mlp()
    function, text = fails(model)[name]
    optimizer = SGD(model.parameters(), lr=0.1)
    recorder = attach(optimizer, model, tmp_path / "run.zarr", every=1)
    before = [as_bytes(p) for p in model.parameters()]
    recorder.curvature(function)
    assert recorder.errors == 1
    assert any(record.levelno == logging.WARNING and "Training goes on" in record.getMessage() for record in caplog.records)
    assert [as_bytes(p) for p in model.parameters()] == before
    assert all(p.grad is None for p in model.parameters())
    model(torch.randn(4, 8)).sum().backward()
    optimizer.step()
    recorder.close()
    found = read(tmp_path / "run.zarr")["curvature"]
    assert found["step"].values.tolist() == [0]
    assert np.isnan(found["hessian_mean"]).all()
    with attach(optimizer, model, tmp_path / "raise.zarr", on_error="raise") as recorder, pytest.raises(Exception, match=text):
        recorder.curvature(function)


@pytest.mark.parametrize(
    ("options", "text"),
    [
        ({"probes": 0}, "probes: expected a whole number from 1 to 32767, got 0"),
        ({"exact": 1.5}, "exact: expected a whole number from 0"),
        ({"distribution": "normal"}, "distribution: expected one of rademacher, gaussian; got 'normal'"),
        ({"method": "forward"}, "method: expected one of auto, double_backward, central_difference"),
        ({"only": "nothing"}, "only: expected a pattern"),
    ],
)
def test_arguments_are_checked(options: dict[str, Any], text: str, mlp: Any, tmp_path: Path) -> None:
    model = mlp()
    with attach(SGD(model.parameters(), lr=0.1), model, tmp_path / "run.zarr", on_error="raise") as recorder:
        with pytest.raises(ValueError, match=text):
            recorder.curvature(lambda: model(torch.ones(2, 8)).sum(), **options)
        with pytest.raises(ValueError, match="loss_fn: expected a function"):
            recorder.curvature()


def test_records_merge_at_a_step_and_runs_are_continued(mlp: Any, tmp_path: Path, read: Any) -> None:
    model, x = mlp(dropout=0.0), torch.randn(4, 8)

    def loss() -> Tensor:
        return model(x).square().mean()

    def run(steps: int, **options: Any) -> Any:
        optimizer = SGD(model.parameters(), lr=0.1)
        recorder = attach(optimizer, model, tmp_path / "run.zarr", every=1, on_error="raise")
        for _ in range(steps):
            loss().backward()
            optimizer.step()
            recorder.curvature(loss, **options)
        return recorder

    recorder = run(2)
    recorder.curvature(logits_fn=lambda: model(x))
    recorder.curvature(loss, only=r"^0\.")
    recorder.close()
    found = read(tmp_path / "run.zarr")["curvature"]
    assert set(found.data_vars) == {q.name for q in in_group("curvature")}
    assert found["step"].values.tolist() == [1, 2]
    assert np.isfinite(found["gauss_newton_mean"].values).tolist() == [[False] * 3, [True] * 3]
    assert np.isfinite(found["hessian_mean"].values).tolist() == [[True] * 3, [True, False, False]]
    # An ordinary record makes no row of curvature, and a closed recorder nothing at all.
    recorder.curvature(loss)
    run(1).close()
    continued = read(tmp_path / "run.zarr")
    assert continued["curvature"]["step"].values.tolist() == continued["update"]["step"].values.tolist() == [1, 2, 3]
    assert float(continued["scalars"]["overhead_seconds"][-1]) > 0


def test_a_parameter_added_while_a_record_waits_for_an_optimizer(tmp_path: Path, read: Any) -> None:
    first, second, late = (nn.Parameter(torch.ones(2, 2)) for _ in range(3))
    optimizers = [SGD([first], lr=0.1), SGD([second], lr=0.1)]

    def loss() -> Tensor:
        return first.square().sum() + second.square().sum() + late.square().sum()

    with attach(optimizers, None, tmp_path / "run.zarr", every=1, on_error="raise") as recorder:
        for step in range(3):
            loss().backward()
            optimizers[0].step()
            if step == 1:
                optimizers[1].add_param_group({"params": [late]})
                recorder.curvature(loss)
            optimizers[1].step()
    run = read(tmp_path / "run.zarr")
    assert np.isfinite(run["update"]["update_rms"].values).sum(axis=1).tolist() == [2, 2, 3]
    np.testing.assert_allclose(run["curvature"]["hessian_mean"], [[2.0, 2.0]])


def test_calling_on_a_closed_recorder_warns(mlp: Any, tmp_path: Path, caplog: Any, read: Any) -> None:
    model = mlp()
    recorder = attach(SGD(model.parameters(), lr=0.1), model, tmp_path / "run.zarr")
    recorder.close()
    recorder.curvature(lambda: model(torch.ones(2, 8)).sum())
    assert "is closed" in caplog.text
    assert "curvature" not in read(tmp_path / "run.zarr").children


def test_bfloat16_tied_weights_experts_and_a_model_that_is_not_given(tmp_path: Path, read: Any) -> None:
    torch.manual_seed(0)
    embed = nn.Parameter(torch.randn(6, 4).bfloat16())
    experts = nn.Parameter(torch.randn(2, 4, 4).bfloat16())
    tokens = torch.tensor([0, 1, 2, 3])

    def loss() -> Tensor:  # the embedding is the head too
        return F.cross_entropy((embed[tokens] @ experts).tanh().sum(0) @ embed.T, tokens)

    with attach(SGD([embed, experts], lr=0.1), None, tmp_path / "run.zarr", on_error="raise") as recorder:
        for method in ("double_backward", "central_difference"):
            recorder.curvature(loss, method=method, probes=2)
            assert recorder.errors == 0
    found = read(tmp_path / "run.zarr")["curvature"].to_dataset().isel(step=0)
    assert found.sizes["matrix"] == 3
    assert np.isfinite(found["hessian_mean"].values).all()
