"""Cases for the reference optimizers of `examples/optimizers` that run no Newton–Schulz iteration."""

from collections import deque
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.optim import AdamW

from contract.harness import Case, Expected, Floats, Transcription, float64, hidden, is_hidden, others
from contract.transcriptions_examples import aro, caspr, onebit_adam, sophia_g

TOKENS = 12  # of a batch of 3 by 4
EVERY = 2
FREEZE = 3


def _aro(model: nn.Module) -> Any:
    from optiscope.examples.optimizers.aro import ARO

    return [ARO(hidden(model), lr=0.02, momentum=0.9, weight_decay=0.1), AdamW(others(model), lr=1e-3)]


def _caspr(model: nn.Module) -> Any:
    from optiscope.examples.optimizers.caspr import CASPR

    return [CASPR(hidden(model), lr=0.02, eps=1e-6, weight_decay=0.1), AdamW(others(model), lr=1e-3)]


def _onebit_adam(model: nn.Module) -> Any:
    from optiscope.examples.optimizers.onebit_adam import OneBitAdam

    return OneBitAdam(model.parameters(), lr=1e-3, weight_decay=0.1, freeze_step=FREEZE)


def _sophia_g(model: nn.Module) -> Any:
    from optiscope.examples.optimizers.sophia_g import SophiaG

    _handed_over.clear()
    _labels.manual_seed(5)
    return SophiaG(model.parameters(), lr=1e-3, gamma=0.05, weight_decay=0.1, every=EVERY)


# The estimates of a training reach the transcription in the order they were made; labels are drawn by a generator of their own.
_handed_over: dict[str, deque[Floats]] = {}
_labels = torch.Generator()


def _estimate_and_step(optimizer: Any, model: nn.Module, loss: Callable[[], Tensor]) -> None:
    if optimizer.hessian_due:
        logits = model(torch.randint(24, (3, 4), generator=_labels)).flatten(0, 1)
        drawn = torch.multinomial(logits.softmax(-1), 1, generator=_labels).flatten()
        F.cross_entropy(logits, drawn).backward()
        optimizer.update_hessian(tokens=TOKENS)
        for name, p in model.named_parameters():
            assert p.grad is not None
            _handed_over.setdefault(name, deque()).append(float64(p.grad))
        optimizer.zero_grad()
    loss().backward()
    optimizer.step()
    optimizer.zero_grad()


def _sophia_of(name: str, shape: tuple[int, ...]) -> Transcription:
    def estimates() -> Iterator[Floats | None]:
        for drawn in list(_handed_over[name]):
            yield drawn
            yield from [None] * (EVERY - 1)

    made = estimates()
    return sophia_g(lambda: next(made), TOKENS)


def _momentum_of_aro(name: str, shape: tuple[int, ...]) -> Transcription:
    step = aro(shape)

    def momentum_alone(g: Floats, w: Floats) -> Expected:
        return replace(step(g, w), update=None)

    return momentum_alone


CASES = (
    Case(
        "ARO",
        "optiscope",
        _aro,
        _momentum_of_aro,
        only=is_hidden,
        note="The update is compared in float64 elsewhere: a model's first gradients are nearly of rank one, and rows of rounding are normalised too.",
    ),
    Case(
        "CASPR",
        "optiscope",
        _caspr,
        lambda name, shape: caspr(shape, eps=1e-6),
        only=is_hidden,
        note="The second moment is the one that both factors imply.",
    ),
    Case(
        "1-bit Adam",
        "optiscope",
        _onebit_adam,
        lambda name, shape: onebit_adam(shape, FREEZE),
        note="With one worker; the momentum is what was sent, one sign and one scale, and the second moment stands still from then on.",
    ),
    Case(
        "Sophia-G",
        "optiscope",
        _sophia_g,
        _sophia_of,
        step=_estimate_and_step,
        note="The second moment is the estimate of the Hessian's diagonal, of the whole batch.",
    ),
)
