"""Classes in the adapter table held against one watched step: right ones agree or nothing is said, and one changed line is named."""

import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from contract import cases
from contract.harness import STEPS, Case, as_list, plain_step
from muons import TwoLayers, newton_schulz
from test_neutrality import as_bytes, random_numbers, seed_everything
from torch import Tensor, nn
from torch.optim import Muon, Optimizer

from optiscope.analysis import check, open_run
from optiscope.hooks import attach
from optiscope.hooks.adapters import adapter_for
from optiscope.hooks.watching import row_check
from optiscope.hooks.watching.row_check import RowCheck
from optiscope.hooks.watching.watched_step import watch_step

JORDAN = (3.4445, -4.7750, 2.0315)
QUINTIC = (2.0, -1.5, 0.5)


def told(store: Path) -> list[list[str]]:
    """What the run holds of every group that was held against its row."""
    groups = [group for entry in open_run(store).attrs["optimizers"] for group in entry.get("watched", ())]
    return [group["differs_from_row"] for group in groups if "differs_from_row" in group]


# Right classes


def orthogonalises(case: Case) -> bool:
    torch.manual_seed(0)
    adapters = [adapter_for(one, group) for one in as_list(case.build(case.model())) for group in getattr(one, "param_groups", ())]
    return any(adapter is not None and adapter.orthogonalisation is not None for adapter in adapters)


ORTHOGONALISING = {case.system: case for case in cases.CASES if orthogonalises(case)}
# A Gram matrix is iterated on, the gradient is all there is, several matrices are one, and rows are scaled before: nothing that could be compared.
SILENT = {"Muon (pytorch_optimizer), Gram Newton–Schulz", "SCIONLight", "TEON", "Turbo-Muon (AOL)"}


@pytest.mark.parametrize("system", ORTHOGONALISING)
def test_a_right_class_agrees_or_nothing_is_said(system: str, tmp_path: Path) -> None:
    case = ORTHOGONALISING[system]
    torch.manual_seed(0)
    model = case.model()
    built = case.build(model)
    with attach(built, model, tmp_path / "run.zarr", every=1, on_error="raise"):
        for batch in torch.randint(24, (STEPS, 8, 13), generator=torch.Generator().manual_seed(1)):

            def loss(batch: Tensor = batch) -> Tensor:
                return nn.functional.cross_entropy(model(batch[:, :-1]).flatten(0, 1), batch[:, 1:].flatten())

            (case.step or plain_step)(built, model, loss)
    assert told(tmp_path / "run.zarr") == ([] if system in SILENT else [[]])


def spectra() -> dict[str, Callable[[int], Any]]:
    def of(*values: float) -> Callable[[int], Any]:
        return lambda rank: np.array([*values, *[0.0] * rank])[:rank]

    return {
        **{f"rank {rank}": of(*np.geomspace(1, 0.1, rank)) for rank in (1, 2, 3, 5, 8)},
        "one value": lambda rank: np.ones(rank),
        "two values": lambda rank: np.where(np.arange(rank) % 2, 1.0, 0.3),
        "nearly one value": lambda rank: np.linspace(1, 0.999, rank),
        "one large": lambda rank: np.where(np.arange(rank), 1e-4, 1.0),
        "falling fast": lambda rank: np.geomspace(1, 1e-9, rank),
        "falling": lambda rank: np.geomspace(1, 1e-3, rank),
        "even": lambda rank: np.linspace(1, 0.05, rank),
        "huge": lambda rank: 1e18 * np.linspace(1, 0.05, rank),
        "tiny": lambda rank: 1e-18 * np.linspace(1, 0.05, rank),
        "NaN": lambda rank: np.full(rank, np.nan),
        "infinite": lambda rank: np.full(rank, np.inf),
        "zero": lambda rank: np.zeros(rank),
    }  # fmt: skip


@pytest.mark.parametrize("spectrum", spectra())
@pytest.mark.parametrize("system", ["Muon (torch)", "Muon (pytorch_optimizer), Polar Express", "Muon (dion), Nesterov", "Scion"])
def test_no_spectrum_makes_a_right_class_wrong(system: str, spectrum: str, tmp_path: Path) -> None:
    """Those that once did: of one or few values many lists of coefficients do the same, and NaN is not told at all."""
    case = ORTHOGONALISING[system]
    torch.manual_seed(0)
    model = case.model()
    built = case.build(model)
    with attach(built, model, tmp_path / "run.zarr", every=1):
        for step in range(3):
            rng = np.random.default_rng(step)
            for p in model.parameters():
                if p.ndim == 1:
                    p.grad = torch.ones_like(p)
                    continue
                u, _, vt = np.linalg.svd(rng.standard_normal(p.shape), full_matrices=False)
                with np.errstate(invalid="ignore"):
                    p.grad = torch.from_numpy((u * spectra()[spectrum](min(p.shape))) @ vt).to(p.dtype)
            for one in as_list(built):
                one.step()
    assert told(tmp_path / "run.zarr") in ([], [[]])


# One line changed


class KellerJordan(Optimizer):
    """Arithmetic and state of `muon.SingleDeviceMuon`, under whose name it goes."""

    coefficients = (JORDAN,) * 5
    dtype = torch.bfloat16

    def __init__(self, params: Any, lr: float = 0.02, momentum: float = 0.95) -> None:
        super().__init__(params, {"lr": lr, "momentum": momentum, "weight_decay": 0.0})

    def ns_input(self, gradient: Tensor, momentum: Tensor, beta: float) -> Tensor:
        return gradient.lerp(momentum, beta)

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]
        for group in self.param_groups:
            for p in group["params"]:
                momentum = self.state[p].setdefault("momentum_buffer", torch.zeros_like(p)).lerp_(p.grad, 1 - group["momentum"])
                output = newton_schulz(self.ns_input(p.grad, momentum, group["momentum"]), self.coefficients, self.dtype)
                p.sub_(output.to(p.dtype), alpha=group["lr"] * max(1, p.shape[0] / p.shape[1]) ** 0.5)


KellerJordan.__module__, KellerJordan.__qualname__ = "muon", "SingleDeviceMuon"


class InFloat32(KellerJordan):
    dtype = torch.float32


class OtherCoefficients(KellerJordan):
    coefficients = (QUINTIC,) * 5


class OtherLast(KellerJordan):
    coefficients = (*[JORDAN] * 4, QUINTIC)


class Slightly(InFloat32):
    coefficients = ((3.4, -4.7750, 2.0315), *[JORDAN] * 4)


class OneMore(KellerJordan):
    coefficients = (JORDAN,) * 6


class OneLess(InFloat32):
    coefficients = (JORDAN,) * 4


class NoNesterov(KellerJordan):
    def ns_input(self, gradient: Tensor, momentum: Tensor, beta: float) -> Tensor:
        return momentum


class Sign(KellerJordan):
    def ns_input(self, gradient: Tensor, momentum: Tensor, beta: float) -> Tensor:
        return gradient.lerp(momentum, beta).sign()


def trained(kind: type[Optimizer], store: Path | None, steps: int = 5) -> tuple[list[bytes], Any]:
    model = TwoLayers()
    optimizer = kind(model.of_muon().values())  # type: ignore[call-arg]
    seed_everything()
    recorder = None if store is None else attach(optimizer, model, store, every=1, on_error="raise")
    for step in range(steps):
        model.give_gradients(step)
        optimizer.step()
    numbers = random_numbers()
    if recorder is not None:
        recorder.close()
    return [as_bytes(p) for p in model.parameters()], numbers


@pytest.mark.parametrize("kind", [KellerJordan, InFloat32], ids=lambda kind: kind.__name__)
def test_the_same_arithmetic_agrees(kind: type[Optimizer], tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING, "optiscope"):
        trained(kind, tmp_path / "run.zarr")
    assert told(tmp_path / "run.zarr") == [[]]
    assert not caplog.messages
    assert not [finding for finding in check(open_run(tmp_path / "run.zarr")) if finding.rule == "row_differs"]


@pytest.mark.parametrize(
    ("kind", "said"),
    [
        (OtherCoefficients, "step 1 has other coefficients (2, -1.5, 0.5)"),
        (OtherLast, "step 5 has other coefficients (2, -1.5, 0.5)"),
        (Slightly, "step 1 has other coefficients (3.4, -4.775, 2.031)"),
        (OneMore, "it runs 6 Newton–Schulz steps, not 5"),
        (OneLess, "it runs 4 Newton–Schulz steps, not 5"),
        (NoNesterov, "its iteration is given another matrix (cosine 0."),
        (Sign, "its iteration is given another matrix (cosine 0."),
    ],
    ids=lambda value: getattr(value, "__name__", ""),
)
def test_one_changed_line_is_named_once(kind: type[Optimizer], said: str, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    kind.__module__, kind.__qualname__ = "muon", f"{kind.__name__}"
    with caplog.at_level(logging.WARNING, "optiscope"):
        recorded = trained(kind, tmp_path / "run.zarr")
    [[text]] = told(tmp_path / "run.zarr")
    assert text.startswith(said)
    [message] = caplog.messages
    assert f"is in the adapter table, but a step of a copy differs from its row: {text}." in message
    run = open_run(tmp_path / "run.zarr")
    [spectrum_of] = run.attrs["optimizers"][0]["spectrum_of"]
    assert spectrum_of.endswith(f"; in the table, but a watched step differs: {text}")
    assert [text in finding.sentence for finding in check(run) if finding.rule == "row_differs"] == [True]
    assert recorded == trained(kind, None)


@pytest.mark.parametrize("kind", [KellerJordan, InFloat32], ids=lambda kind: kind.__name__)
def test_small_singular_values_hide_no_step(kind: type[Optimizer]) -> None:
    """All under 0.07 of ‖M‖_F: the first step makes 3.4445·X₀ of X₀ to within 1 %, as a division by a norm would."""
    u, _, vt = np.linalg.svd(np.random.default_rng(0).standard_normal((256, 256)))
    matrix = nn.Parameter(torch.zeros(256, 256))
    matrix.grad = torch.from_numpy((u * np.linspace(1, 0.8, 256)) @ vt).float()
    optimizer = kind([matrix])  # type: ignore[call-arg]
    [match] = watch_step(optimizer, optimizer.param_groups[0], [matrix]).matches
    # b and c of the first steps are not told in bfloat16.
    assert [a for a, _, _ in match.chain.triples] == pytest.approx([JORDAN[0]] * 5)
    optimizer.step()
    check = RowCheck(optimizer)
    assert check.watch((), {}) is (kind is InFloat32)  # so that nothing is said of that
    assert check.differs == ([] if kind is InFloat32 else None)


def test_one_step_is_watched_and_no_more(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The second: in the first the momentum is the gradient, mixed or not."""
    steps: list[int] = []
    original = row_check.watch_step

    def spy(optimizer: Any, *args: Any) -> Any:
        steps.append(len(optimizer.state))
        return original(optimizer, *args)

    monkeypatch.setattr(row_check, "watch_step", spy)
    trained(Muon, tmp_path / "run.zarr", steps=8)
    assert steps == [8]  # all eight matrices have a momentum


def test_a_copy_that_fails_says_nothing(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    class Locked(KellerJordan):
        def __init__(self, params: Any) -> None:
            super().__init__(params)
            self.frames = (frame for frame in ())  # a generator cannot be copied

    with caplog.at_level(logging.WARNING, "optiscope"):
        trained(Locked, tmp_path / "run.zarr")
    assert told(tmp_path / "run.zarr") == []
    assert not caplog.messages
