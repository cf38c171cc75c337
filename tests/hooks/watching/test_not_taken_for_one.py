"""Optimizers that orthogonalise nothing by Newton–Schulz, under classes that the table does not hold: none is taken for one that does."""

import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import pytorch_optimizer as po
import torch
from contract.harness import Model, as_list, hidden
from torch import nn, optim

from optiscope.analysis import open_run
from optiscope.hooks import attach

STEPS = 5


def unknown(cls: Any, **settings: Any) -> Callable[[list[nn.Parameter]], Any]:
    """A maker of an optimizer of a subclass with a `step` of its own, which no row speaks of."""

    def step(self: Any, closure: Any = None) -> Any:
        return cls.step(self, closure)

    return lambda params: type(f"Unknown{cls.__name__}", (cls,), {"step": step})(params, **settings)


MAKERS: dict[str, Callable[[list[nn.Parameter]], Any]] = {
    "SGD": unknown(optim.SGD, lr=0.1, momentum=0.9, nesterov=True),
    "Adagrad": unknown(optim.Adagrad, lr=0.01),
    "RMSprop": unknown(optim.RMSprop, lr=1e-3, momentum=0.9),
    "AdamW": unknown(optim.AdamW, lr=1e-3, amsgrad=True),
    "AdamW, foreach": unknown(optim.AdamW, lr=1e-3, foreach=True),
    "NAdam": unknown(optim.NAdam, lr=1e-3),
    "Adafactor of torch": unknown(optim.Adafactor, lr=1e-2),
    "AdaFactor": unknown(po.AdaFactor, lr=1e-3),
    "Lion": unknown(po.Lion, lr=1e-3),
    "LAMB": unknown(po.Lamb, lr=1e-2),
    "LARS": unknown(po.LARS, lr=0.1),
    "CAME": unknown(po.CAME, lr=1e-3),
    "Adan": unknown(po.Adan, lr=1e-3),
    "MARS": unknown(po.MARS, lr=1e-3),
    "Prodigy": unknown(po.Prodigy, lr=1.0),
    "SOAP": unknown(po.SOAP, lr=1e-2),
    "Shampoo": unknown(po.Shampoo, lr=1e-2, preconditioning_compute_steps=1),
    "ScalableShampoo": unknown(po.ScalableShampoo, lr=1e-2, start_preconditioning_step=1, preconditioning_compute_steps=1, block_size=16),
    "Kron": unknown(po.Kron, lr=1e-3),
    "Conda": unknown(po.Conda, lr=1e-2),
    "RACS": unknown(po.RACS, lr=1e-2),
    "Alice": unknown(po.Alice, lr=1e-2, rank=8, leading_basis=4),
    "SPlus": unknown(po.SPlus, lr=1e-2),
    "SophiaH": unknown(po.SophiaH, lr=1e-2),
}


@pytest.mark.parametrize("name", MAKERS)
@pytest.mark.filterwarnings("ignore:Using backward:UserWarning")  # with create_graph, which SophiaH needs
@pytest.mark.filterwarnings("ignore:.*deprecated.*")  # calls of the libraries' own
def test_no_iteration_is_seen(name: str, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    def train(store: Path | None) -> list[torch.Tensor]:
        torch.manual_seed(0)
        np.random.seed(0)  # noqa: NPY002, which Kron draws from: whether it balances its factors
        model = Model()
        optimizer = MAKERS[name](hidden(model)[:6])
        assert type(optimizer).__name__.startswith("Unknown")
        recorder = attach(optimizer, model, store, every=1, on_error="raise") if store else None
        for step in range(STEPS):
            batch = torch.randint(24, (8, 13), generator=torch.Generator().manual_seed(step))
            loss = nn.functional.cross_entropy(model(batch[:, :-1]).flatten(0, 1), batch[:, 1:].flatten())
            loss.backward(create_graph=name == "SophiaH")
            for one in as_list(optimizer):
                one.step()
                one.zero_grad()
        if recorder is not None:
            recorder.close()
        return [*(p.detach() for p in model.parameters()), torch.get_rng_state()]

    with caplog.at_level(logging.WARNING, "optiscope"):
        recorded = train(tmp_path / "run.zarr")
    assert not caplog.messages
    run = open_run(tmp_path / "run.zarr")
    entry = run.attrs["optimizers"][0]
    assert [told.get("iterations", []) for told in entry["watched"]] == [[]] * len(entry["spectrum_of"]), entry["watched"]
    # SophiaH differentiates its gradients once more on some steps, which the gradients of a copy do not allow.
    said = ("no Newton–Schulz iteration in a step that was watched", *(["could not be watched"] if name == "SophiaH" else []))
    assert all(any(part in text for part in said) for text in entry["spectrum_of"]), entry["watched"]
    assert (run["geometry"]["ns_schedule"].values == -1).all()
    assert all(torch.equal(a, b) for a, b in zip(recorded, train(None), strict=True))
