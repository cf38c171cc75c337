"""Running a loss without a trace: what that changes in a training is put back bitwise."""

import random
from collections.abc import Iterable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn


class RandomState:
    """The state of every global generator (torch's on the CPU and all CUDA devices, NumPy's, Python's) when this was made."""

    def __init__(self) -> None:
        self._cpu = torch.get_rng_state()
        # Asking a device that was never used would make a context on it.
        used = torch.cuda.is_available() and torch.cuda.is_initialized()  # type: ignore[no-untyped-call]
        self._cuda = torch.cuda.get_rng_state_all() if used else []
        self._numpy = np.random.get_state()  # noqa: NPY002
        self._python = random.getstate()

    def put_back(self) -> None:
        """Make it the state again."""
        torch.set_rng_state(self._cpu)
        if self._cuda:
            torch.cuda.set_rng_state_all(self._cuda)
        np.random.set_state(self._numpy)  # noqa: NPY002
        random.setstate(self._python)


@contextmanager
def undisturbed(model: nn.Module | None, parameters: Iterable[nn.Parameter]) -> Iterator[RandomState]:
    """Put back, after the block: random states, gradients, the model's buffers, and which modules are in training mode.

    Within it there are no gradients, and gradient mode is on. Yields the random states, so that every evaluation of the loss
    can begin with the same ones.
    """
    modules = [] if model is None else list(model.modules())
    owned = {id(p): p for p in (*(p for module in modules for p in module.parameters(recurse=False)), *parameters)}
    with ExitStack() as back:  # what cannot be put back keeps nothing else from it
        back.callback(_forget_autocast)
        for module in modules:
            back.callback(setattr, module, "training", module.training)
            for name, buffer in module._buffers.items():
                back.callback(_put_back, module, name, buffer, _copy(buffer))
        for p in owned.values():
            back.callback(setattr, p, "grad", p.grad)
            p.grad = None
        state = RandomState()
        back.callback(state.put_back)
        with torch.inference_mode(False), torch.enable_grad():
            yield state


@contextmanager
def shifted(parameters: list[nn.Parameter], direction: list[Tensor], size: float) -> Iterator[None]:
    """The parameters at W + size·direction, and bitwise as they were after the block."""
    kept = [p.detach().clone() for p in parameters]
    try:
        for p, u in zip(parameters, direction, strict=True):
            p.data.add_(u, alpha=size)
        _forget_autocast()
        yield
    finally:
        for p, weight in zip(parameters, kept, strict=True):
            p.data.copy_(weight)
        _forget_autocast()


def _copy(buffer: Any) -> Tensor | None:
    return _once(buffer).detach().clone() if isinstance(buffer, Tensor) else None


def _put_back(module: nn.Module, name: str, buffer: Any, copy: Tensor | None) -> None:
    module._buffers[name] = buffer
    if copy is not None:
        with torch.inference_mode(buffer.is_inference()):
            # By `data`, whose writes do not count as changes: a graph of the training that holds the buffer stays valid.
            _once(buffer.data).copy_(copy)


def _once(tensor: Tensor) -> Tensor:
    """Every number of an expanded tensor once: it cannot be written to as it is."""
    if tensor.layout != torch.strided:
        return tensor
    return tensor[tuple(slice(1 if stride == 0 and size > 1 else None) for size, stride in zip(tensor.shape, tensor.stride(), strict=True))]


def _forget_autocast() -> None:
    """Casts of weights, which an autocast context keeps until its end: those of shifted ones, and those that hang on our graph."""
    torch.clear_autocast_cache()
