"""Training one matrix on gradients that are given, and what is read of its optimizer then: what tests of acceptance share."""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
import xarray as xr
from torch import Tensor, nn

from optiscope.hooks import attach
from optiscope.hooks.adapters import Adapter, Reading, SecondMoment, adapter_for

Build = Callable[[Sequence[nn.Parameter]], Any]


class Model(nn.Module):
    """One matrix, which is what an optimizer here is watched on."""

    def __init__(self, weight: Tensor) -> None:
        super().__init__()
        self.matrix = nn.Parameter(weight.clone())


def by_name(name: str, **settings: Any) -> Build:
    """A maker of an optimizer of pytorch_optimizer."""

    def build(parameters: Sequence[nn.Parameter]) -> Any:
        import pytorch_optimizer

        return getattr(pytorch_optimizer, name)(parameters, **settings)

    return build


def recorded(
    build: Build, weight: Tensor, gradients: Sequence[Tensor], store: Path, **of_step: Any
) -> tuple[xr.Dataset, Any, nn.Parameter]:
    """Group `update` of a run over these gradients, with the optimizer and the parameter as they are after it."""
    model = Model(weight)
    optimizer = build([model.matrix])
    with attach(optimizer, model, store, every=1, on_error="raise"):
        for gradient in gradients:
            model.matrix.grad = gradient.clone()
            optimizer.step(**of_step)
    with xr.open_datatree(store, engine="zarr") as tree:
        return tree["update"].load().to_dataset(), optimizer, model.matrix


def _reading(optimizer: Any, parameter: nn.Parameter) -> tuple[Adapter, Reading]:
    group = optimizer.param_groups[0]
    adapter = adapter_for(optimizer, group)
    assert adapter is not None
    return adapter, Reading(optimizer, parameter, parameter.detach(), dict(group), optimizer.state[parameter])


def momentum(optimizer: Any, parameter: nn.Parameter) -> Tensor:
    """The first moment as its adapter reads it."""
    adapter, reading = _reading(optimizer, parameter)
    read = adapter.momentum(reading)
    assert read is not None
    return read


def second_moment(optimizer: Any, parameter: nn.Parameter) -> SecondMoment:
    """The second moment as its adapter reads it."""
    adapter, reading = _reading(optimizer, parameter)
    read = adapter.second_moment(reading)
    assert read is not None
    return read


def random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))
