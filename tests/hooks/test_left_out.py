"""What cannot be recorded of a model is named, once: complex, integer, 8-bit and sparse weights, and weights whose gradients are sparse."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import xarray as xr
from torch import Tensor, nn
from torch.optim import LBFGS, SGD, Adadelta, Adagrad, Adam, Adamax, AdamW, NAdam, Optimizer, RAdam, RMSprop, Rprop, SparseAdam

from optiscope.hooks import attach

Read = Callable[[str | Path], xr.DataTree]
STEPS = 4

# All of torch's optimizers that take complex parameters, but for LBFGS, whose step along one weight depends on all others.
COMPLEX = {
    "SGD": lambda ps: SGD(ps, lr=0.1), "momentum": lambda ps: SGD(ps, lr=0.1, momentum=0.9), "Adam": lambda ps: Adam(ps, lr=0.1),
    "AMSGrad": lambda ps: Adam(ps, lr=0.1, amsgrad=True), "AdamW": lambda ps: AdamW(ps, lr=0.1), "Adamax": lambda ps: Adamax(ps, lr=0.1),
    "NAdam": lambda ps: NAdam(ps, lr=0.1), "RAdam": lambda ps: RAdam(ps, lr=0.1), "Adagrad": lambda ps: Adagrad(ps, lr=0.1),
    "Adadelta": lambda ps: Adadelta(ps, lr=0.1), "RMSprop": lambda ps: RMSprop(ps, lr=0.1, momentum=0.9), "Rprop": lambda ps: Rprop(ps, lr=0.1),
}  # fmt: skip
# All that take sparse gradients; SparseAdam takes nothing else.
SPARSE = {
    "SGD": lambda ps: SGD(ps, lr=0.1), "Adagrad": lambda ps: Adagrad(ps, lr=0.1), "SparseAdam": lambda ps: SparseAdam(ps, lr=0.1),
    "LBFGS": lambda ps: LBFGS(ps, lr=0.1, max_iter=1),
}  # fmt: skip


class Unknown(Optimizer):
    """A class that is not in the adapter table, whose moments are looked for by numbers."""

    def __init__(self, params: Any) -> None:
        super().__init__(params, {"lr": 0.1})

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> None:
        for p in self.param_groups[0]["params"]:
            slow = self.state[p].setdefault("slow", torch.zeros_like(p)).mul_(0.9).add_(p.grad)
            p.sub_(slow, alpha=0.1)


class Odd(nn.Module):
    """A real matrix, and one or two of another kind."""

    def __init__(self, *odd: Tensor) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(0)
        self.real = nn.Parameter(torch.randn(8, 8, generator=generator))
        for i, tensor in enumerate(odd):
            setattr(self, f"odd{i}", nn.Parameter(tensor, requires_grad=tensor.is_floating_point() or tensor.is_complex()))


def as_bytes(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: as_bytes(inner) for key, inner in value.items()}
    if isinstance(value, list):
        return [as_bytes(inner) for inner in value]
    if not isinstance(value, Tensor):
        return value
    dense = value.detach().to_dense() if value.layout is not torch.strided else value.detach()
    return dense.contiguous().view(torch.uint8).numpy().tobytes() if dense.ndim else dense.item()


def train(model: Odd, optimizer: Any, gradient: Callable[[str, nn.Parameter, torch.Generator], Tensor | None], steps: int = STEPS) -> Any:
    """Its fingerprint: weights, gradients, state, and the random numbers that come next."""
    torch.manual_seed(1)
    gradients = []
    for step in range(steps):
        for name, p in model.named_parameters():
            p.grad = gradient(name, p, torch.Generator().manual_seed(step)) if p.requires_grad else None
        optimizer.step(*([lambda: torch.tensor(1.0)] if isinstance(optimizer, LBFGS) else []))
        gradients.append([as_bytes(p.grad) for p in model.parameters()])
    state = [as_bytes(dict(optimizer.state.get(p, {}))) for p in model.parameters()]
    return [as_bytes(p) for p in model.parameters()], gradients, state, torch.get_rng_state().tolist()


def dense(name: str, p: nn.Parameter, generator: torch.Generator) -> Tensor:
    return torch.randn(p.shape, dtype=p.dtype, generator=generator)


def sparse(name: str, p: nn.Parameter, generator: torch.Generator) -> Tensor:
    """Rows 1 and 3, the second one twice, as nn.Embedding(sparse=True) makes it; the real matrix's is dense."""
    if name == "real":
        return dense(name, p, generator)
    rows, values = torch.tensor([[1, 3, 3]]), torch.randn(3, *p.shape[1:], generator=generator)
    return torch.sparse_coo_tensor(rows, values, p.shape, check_invariants=True)


def complex_matrix() -> Tensor:
    return torch.randn(6, 5, dtype=torch.complex64, generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("name", [*COMPLEX, "unknown"])
def test_complex_matrices_are_named_once(name: str, tmp_path: Path, read: Read, caplog: pytest.LogCaptureFixture) -> None:
    """The real matrix is recorded as if the others were not there, and the training is what it is without a recorder."""
    build = COMPLEX.get(name, Unknown)
    fingerprints = []
    for path, odd in ((None, 2), ("both.zarr", 2), ("real.zarr", 0)):
        model = Odd(*[complex_matrix() for _ in range(odd)])
        optimizer = build(model.parameters())
        if path is None:
            fingerprints.append(train(model, optimizer, dense))
            continue
        with attach(optimizer, model, tmp_path / path, every=1, on_error="raise") as recorder:
            fingerprints.append(train(model, optimizer, dense))
        assert recorder.errors == 0
    assert fingerprints[0] == fingerprints[1]
    both, real = read(tmp_path / "both.zarr"), read(tmp_path / "real.zarr")
    for group in set(real.children) - {"scalars"}:  # which holds the recorder's own clocks
        xr.testing.assert_identical(both[group].ds.drop_attrs(), real[group].ds.drop_attrs())
    messages = [record.getMessage() for record in caplog.records]
    assert messages == [
        f"optiscope: 2 complex matrices of {type(optimizer).__name__} (the first: odd0) are not recorded: what is measured here is of real numbers; keep "
        "real and imaginary parts in parameters of their own to have them recorded."
    ]


FORMATS: dict[str, tuple[Callable[[], Tensor], str]] = {
    "int8": (lambda: torch.ones(4, 5, dtype=torch.int8), "integer or quantised"),
    "bool": (lambda: torch.ones(4, 5, dtype=torch.bool), "integer or quantised"),
    "qint8": (lambda: torch.quantize_per_tensor(torch.ones(4, 5), 0.1, 0, torch.qint8), "integer or quantised"),
    "float8": (lambda: torch.ones(4, 5).to(torch.float8_e4m3fn), "8-bit floating-point"),
    "COO": (lambda: torch.eye(5).to_sparse(), "sparse or packed"),
    "MKL-DNN": (lambda: torch.eye(5).to_mkldnn(), "sparse or packed"),
}


@pytest.mark.parametrize("kind", FORMATS)
@pytest.mark.filterwarnings("ignore:torch.quantize_per_tensor:UserWarning")  # that torch will drop them
def test_other_formats_are_named_and_keep_nothing_from_being_recorded(
    kind: str, tmp_path: Path, read: Read, caplog: pytest.LogCaptureFixture
) -> None:
    """Some of them would have taken what is recorded between steps of all matrices with them."""
    make, called = FORMATS[kind]
    model = Odd(make())
    optimizer = SGD(model.parameters(), lr=0.1)
    with attach(optimizer, model, tmp_path / "run.zarr", every=1, on_error="raise"):
        train(model, optimizer, lambda name, p, generator: dense(name, p, generator) if name == "real" else None)
    update = read(tmp_path / "run.zarr")["update"]
    assert update["name"].values.tolist() == ["real"]
    assert np.isfinite(update["update_rms"].values).all()
    assert update["changed_outside"].values[:, 0].tolist() == [-1, 0, 0, 0]
    [message] = [record.getMessage() for record in caplog.records]
    assert message.startswith(f"optiscope: 1 {called} matrix of SGD (the first: odd0) is not recorded: ")


@pytest.mark.filterwarnings("ignore:Sparse invariant checks:UserWarning")  # of torch's Adagrad
@pytest.mark.parametrize("background", [False, True])
@pytest.mark.parametrize("name", [*SPARSE, "unknown"])
def test_sparse_gradients_are_told_of_once(
    name: str, background: bool, tmp_path: Path, read: Read, caplog: pytest.LogCaptureFixture
) -> None:
    build = SPARSE.get(name, Unknown)
    fingerprints = []
    for recorded in (False, True):
        model = Odd(torch.ones(9, 4), torch.ones(9, 3))
        if name == "SparseAdam":
            del model.real
        optimizer = build(model.parameters())
        if not recorded:
            fingerprints.append(train(model, optimizer, sparse))
            continue
        with attach(optimizer, model, tmp_path / "run.zarr", every=1, on_error="raise", background=background) as recorder:
            fingerprints.append(train(model, optimizer, sparse))
        assert recorder.errors == 0
    assert fingerprints[0] == fingerprints[1]
    messages = [record.getMessage() for record in caplog.records]
    assert messages == [
        f"optiscope: {type(optimizer).__name__} gets sparse gradients (the first: odd0). Of such matrices neither update, gradient, spectrum nor "
        "optimizer state is recorded, only whether something else than the optimizer changed them; build the layer with sparse=False to have them recorded."
    ]
    update = read(tmp_path / "run.zarr")["update"]
    names = update["name"].values.tolist()
    measured = np.isfinite(update["update_rms"].values)
    assert {name: measured[:, i].any() for i, name in enumerate(names)} == {name: name == "real" for name in names}
    assert (update["changed_outside"].values[0] == -1).all()
    if not background:  # where records may be left out, which chance decides
        assert (update["changed_outside"].values[1:] == 0).all()


def test_a_gradient_that_becomes_dense_is_recorded(tmp_path: Path, read: Read) -> None:
    model = Odd(torch.ones(9, 4))
    optimizer = SGD(model.parameters(), lr=0.1)
    with attach(optimizer, model, tmp_path / "run.zarr", every=1, on_error="raise"):
        train(model, optimizer, sparse, 2)
        train(model, optimizer, dense, 2)
    update = read(tmp_path / "run.zarr")["update"]
    assert np.isfinite(update["update_rms"].values[:, update["name"].values.tolist().index("odd0")]).tolist() == [False, False, True, True]


def test_what_is_added_later_is_told_of_too(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """Per optimizer and kind; nothing again for what was told of."""
    model = Odd(complex_matrix())
    optimizer, other = SGD([model.real], lr=0.1), SGD([model.odd0], lr=0.1)
    with attach([optimizer, other], model, tmp_path / "run.zarr", every=1, on_error="raise"):
        train(model, optimizer, dense, 2)
        model.late = nn.Parameter(complex_matrix())
        optimizer.add_param_group({"params": [model.late]})
        train(model, optimizer, dense, 2)
    assert [
        record.getMessage().partition(" are ")[0].partition(" is ")[0] for record in caplog.records if "complex" in record.getMessage()
    ] == [
        "optiscope: 1 complex matrix of SGD#2 (the first: odd0)",
        "optiscope: 1 complex matrix of SGD (the first: late)",
    ]


def test_nothing_but_complex_matrices_is_refused(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    model = Odd(complex_matrix())
    with pytest.raises(
        ValueError, match=r"SGD hold no weight matrix \(a dense floating-point parameter with two or more dimensions\) to record"
    ):
        attach(SGD([model.odd0], lr=0.1), model, tmp_path / "run.zarr")
    assert "1 complex matrix of SGD" in caplog.text
