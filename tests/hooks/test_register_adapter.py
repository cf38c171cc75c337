"""Adapters of a user's own: as the documentation shows them, and broken in every way."""

import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import xarray as xr
from torch import nn
from torch.optim import SGD, Optimizer

import optiscope.hooks.adapters.table as table_module
from optiscope.diagnostics.quantities.problem import NewtonSchulz
from optiscope.hooks import attach, register_adapter
from optiscope.hooks.adapters import Adapter, Orthogonalisation, SecondMoment, entry

Make = Callable[..., nn.Sequential]
Read = Callable[[str | Path], xr.DataTree]

DOCUMENT = Path(__file__).parents[2] / "docs" / "adapters.md"
ETA, DECAY = 0.05, 0.5


class Nova(Optimizer):
    """nu ← 0.8 nu + 0.2 g, xi ← 0.9 xi + 0.1 g², W ← W(1 − ηλ) − η·nu/√(xi + 1)."""

    def __init__(self, params: Any) -> None:
        super().__init__(params, {"lr": ETA, "weight_decay": DECAY})

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:
        for group in self.param_groups:
            for p in group["params"]:
                state = self.state[p]
                if not state:
                    state["nu"], state["xi"] = torch.zeros_like(p), torch.zeros_like(p)
                state["nu"].mul_(0.8).add_(p.grad, alpha=0.2)
                state["xi"].mul_(0.9).addcmul_(p.grad, p.grad, value=0.1)
                p.mul_(1 - ETA * DECAY).addcdiv_(state["nu"], (state["xi"] + 1).sqrt(), value=-ETA)


@pytest.fixture(autouse=True)
def _registry_as_it_was(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setattr(table_module, "_registered", {})
    monkeypatch.setattr(table_module, "_broken", [])
    return


def train(optimizer: Optimizer, model: nn.Module, steps: int = 3) -> list[bytes]:
    for t in range(steps):
        optimizer.zero_grad()
        model(torch.randn(16, 8, generator=torch.Generator().manual_seed(t))).square().mean().backward()
        optimizer.step()
    return [p.detach().numpy().tobytes() for p in model.parameters()]


def blocks() -> list[str]:
    return re.findall(r"```python\n(.*?)```", DOCUMENT.read_text(encoding="utf-8"), re.DOTALL)


def test_the_documented_adapter_reads_the_documented_optimizer(mlp: Make, tmp_path: Path, read: Read) -> None:
    """The document's first block is run as it stands; it is ten lines long."""
    first = blocks()[0]
    exec(first, {"Nova": Nova})
    assert len(first.split("nova = ")[1].strip().splitlines()) <= 10
    model = mlp(dropout=0.0)
    optimizer = Nova(model.parameters())
    with attach(optimizer, model, tmp_path / "run.zarr", every=1, on_error="raise"):
        train(optimizer, model)
    run = read(tmp_path / "run.zarr")
    weights = [p for p in model.parameters() if p.ndim == 2]
    nu, xi = ([optimizer.state[p][key].double().numpy() for p in weights] for key in ("nu", "xi"))
    last = run["update"].isel(step=-1)
    assert last["momentum_rms"].values == pytest.approx([np.sqrt(np.mean(m**2)) for m in nu], rel=1e-12)
    assert last["update_rms_per_lr"].values == pytest.approx(
        [np.sqrt(np.mean((m / np.sqrt(v + 1)) ** 2)) for m, v in zip(nu, xi, strict=True)],
        rel=2e-5,  # read back from float32 weights of 0.3 beside updates of 1e-3; seen: 2.1e-6
    )
    assert run["second_moment"].isel(step=-1)["second_moment_mean"].values == pytest.approx([v.mean() for v in xi], rel=1e-12)
    assert run["geometry"].isel(step=-1)["fro_norm"].values == pytest.approx([np.linalg.norm(m) for m in nu], rel=1e-12)
    [description] = run.attrs["optimizers"]
    assert (description["read_by"], description["spectrum_of"]) == (["table"], ["momentum nu after the step"])


def test_the_other_documented_adapters_are_adapters() -> None:
    names: dict[str, Any] = {"Nova": Nova}
    for block in blocks():
        exec(block, names)
    assert isinstance(names["my_muon"], Adapter)
    rows, cols = torch.tensor([1.0, 3.0]), torch.tensor([2.0, 4.0, 6.0])
    factored = names["factored"](type("R", (), {"state": {"v_row": rows, "v_col": cols}}))
    assert factored.values.tolist() == [[1.0, 2.0, 3.0], [3.0, 6.0, 9.0]]


def test_own_adapter_precedes_the_table_and_may_depend_on_the_group(mlp: Make, tmp_path: Path, read: Read) -> None:
    register_adapter(SGD, lambda group: Adapter("mine" if group["lr"] > 0.1 else "other"))
    model = mlp()
    optimizer = SGD([{"params": [model[0].weight], "lr": 0.2}, {"params": [model[3].weight], "lr": 0.1}])
    with attach(optimizer, model, tmp_path / "run.zarr", every=1):
        pass
    assert read(tmp_path / "run.zarr").attrs["optimizers"][0]["spectrum_of"] == ["mine", "other"]


def fail(*args: Any) -> Any:
    raise RuntimeError("out of order")


def muon(**broken: Any) -> Adapter:
    whole: dict[str, Any] = {
        "ns_input": entry("nu"),
        "settings": lambda reading: NewtonSchulz(((1.5, -0.5, 0.0),), 1e-7),
        "output_scale": lambda reading, rows, cols: 1.0,
    }
    return Adapter("broken", momentum=entry("nu"), orthogonalisation=Orthogonalisation(**(whole | broken)))


BROKEN: dict[str, tuple[Any, str, set[str]]] = {
    # What is broken: the row, a part of the one message, what is missing of the run besides.
    "momentum": (Adapter("broken", momentum=fail), "out of order", {"momentum_rms", "second_moment_mean"}),
    "momentum of another shape": (
        Adapter("broken", momentum=lambda reading: reading.state["nu"][0]),
        r"momentum of the adapter: expected a tensor of the parameter's shape \(\d+, \d+\), got one of shape \(\d+,\)",
        {"momentum_rms", "second_moment_mean"},
    ),
    "momentum that is no tensor": (Adapter("broken", momentum=lambda reading: 3), "got int", {"momentum_rms", "second_moment_mean"}),
    "second moment": (Adapter("broken", second_moment=fail), "out of order", {"second_moment_mean", "momentum_rms"}),
    "form": (
        Adapter("broken", momentum=entry("nu"), second_moment=lambda reading: SecondMoment(reading.state["xi"], "odd")),
        "form: expected one of full, .*, got 'odd'",
        {"second_moment_mean"},
    ),
    "learning rate": (
        Adapter("broken", momentum=entry("nu"), learning_rate=fail),
        "out of order",
        {"lr", "update_rms_per_lr", "second_moment_mean"},
    ),
    "decay": (Adapter("broken", momentum=entry("nu"), decoupled_decay=fail), "out of order", {"update_rms_per_lr", "second_moment_mean"}),
    "before": (Adapter("broken", momentum=entry("nu"), before=fail), "out of order", {"second_moment_mean"}),
    "NS input": (muon(ns_input=fail), "out of order", {"fro_norm", "second_moment_mean"}),
    "NS settings": (muon(settings=fail), "out of order", {"second_moment_mean"}),
    "NS scale": (muon(output_scale=fail), "out of order", {"second_moment_mean", "update_rms_target"}),
    "function of the group": (fail, "adapter registered for .*Nova failed", set()),
    "function that gives no adapter": (lambda group: 3, "expected an Adapter, got int", set()),
}


@pytest.mark.parametrize("case", BROKEN)
def test_a_broken_adapter_is_reported_once_and_never_reaches_the_training(
    case: str, mlp: Make, tmp_path: Path, read: Read, caplog: pytest.LogCaptureFixture
) -> None:
    row, message, missing = BROKEN[case]
    plain = mlp(dropout=0.0)
    expected = train(Nova(plain.parameters()), plain)
    register_adapter(Nova, row)
    model = mlp(dropout=0.0)
    optimizer = Nova(model.parameters())
    with attach(optimizer, model, tmp_path / "run.zarr", every=1):
        assert train(optimizer, model) == expected
    assert len(caplog.records) == 1
    assert re.search(message, caplog.text)
    run = read(tmp_path / "run.zarr")
    found = {**run["update"].data_vars, **run["geometry"].data_vars, **run["second_moment"].data_vars}
    for name in ("update_rms", "grad_rms", "update_rms_per_lr", "lr", "momentum_rms", "fro_norm", "second_moment_mean"):
        if row is not fail and "group" not in case and "gives no" not in case:
            assert bool(np.isnan(found[name].values).all()) == (name in missing), name
    assert np.isfinite(found["update_rms"].values).all()


@pytest.mark.parametrize(
    ("cls", "row", "message"),
    [
        (3, Adapter("x"), r"^optimizer_class: expected a class or its full name 'module.Class', got 3$"),
        (SGD, {"momentum": "nu"}, r"^row: expected an Adapter, or a function from a parameter group to one; got dict$"),
    ],
)
def test_what_cannot_be_registered(cls: Any, row: Any, message: str) -> None:
    with pytest.raises(TypeError, match=message):
        register_adapter(cls, row)
