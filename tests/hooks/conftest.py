"""What the tests of hooks share: tiny models, and reading a run the way a user without Optiscope would."""

import gc
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
import xarray as xr
from torch import nn
from torch.optim import SGD, Optimizer
from torch.optim import _muon as torch_muon
from torch.optim.optimizer import register_optimizer_step_pre_hook

from optiscope.diagnostics.options import Options
from optiscope.hooks.trainers.script_run import ScriptRun


@pytest.fixture(autouse=True)
def _torch_muon_as_it_was(monkeypatch: pytest.MonkeyPatch) -> None:
    """A schedule put into force replaces a function of torch for the whole process; not for the next test."""
    monkeypatch.setattr(torch_muon, "_zeropower_via_newtonschulz", torch_muon._zeropower_via_newtonschulz)


@pytest.fixture
def mlp() -> Callable[..., nn.Sequential]:
    """A maker of small networks with weights 12×8 (tall), 12×12, and 5×12 (wide), in that order, and dropout."""

    def make(seed: int = 0, dropout: float = 0.2, dtype: torch.dtype = torch.float32) -> nn.Sequential:
        torch.manual_seed(seed)
        return nn.Sequential(
            nn.Linear(8, 12), nn.Tanh(), nn.Dropout(dropout), nn.Linear(12, 12), nn.Tanh(), nn.Dropout(dropout), nn.Linear(12, 5)
        ).to(dtype)  # fmt: skip

    return make


@pytest.fixture
def two() -> tuple[nn.Module, Optimizer, Optimizer]:
    """Two one-matrix layers, `d` 3×4 and `g` 5×3, each with an optimizer of its own, and gradients that stay."""
    torch.manual_seed(0)
    model = nn.ModuleDict({"d": nn.Linear(4, 3, bias=False), "g": nn.Linear(3, 5, bias=False)})
    for p in model.parameters():
        p.grad = torch.linspace(-1, 2, p.numel()).view_as(p).sin()
    return model, SGD(model["d"].parameters(), lr=0.1, momentum=0.9), SGD(model["g"].parameters(), lr=0.1)


@pytest.fixture
def script_run(tmp_path: Path) -> Iterator[ScriptRun]:
    """A run that is told of every step of this process, as under `diag run`."""
    # What other tests keep is put out of the garbage collector's sight.
    gc.collect()
    gc.freeze()
    script_run = ScriptRun(tmp_path / "run.zarr", Options(every=1, overhead=1.0))
    handle = register_optimizer_step_pre_hook(lambda optimizer, args, kwargs: script_run.before_step(optimizer))
    yield script_run
    handle.remove()
    script_run.end()
    gc.unfreeze()


@pytest.fixture
def read() -> Callable[[str | Path], xr.DataTree]:
    """Reads what a run has committed, with plain xarray; any warning of it fails the test."""

    def read(path: str | Path) -> xr.DataTree:
        with xr.open_datatree(path, engine="zarr") as tree:
            return tree.load()

    return read
