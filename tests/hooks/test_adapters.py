"""What is read from each optimizer, against what it really did: torch's Newton–Schulz function intercepted, moments written out."""

import importlib
from collections.abc import Callable
from dataclasses import dataclass, replace
from math import sqrt
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.optim import SGD, Adagrad, Adam, AdamW, Muon, Optimizer
from torch.optim import _muon as torch_muon
from torch.utils._python_dispatch import _get_current_dispatch_mode

import optiscope.hooks.recording.record as record_module
from optiscope.diagnostics.quantities.observation import Observation
from optiscope.hooks import attach
from optiscope.hooks.adapters import row_of
from optiscope.hooks.adapters.table import table

Make = Callable[..., nn.Sequential]
Floats = NDArray[np.float64]


def weights(model: nn.Module) -> list[nn.Parameter]:
    return [p for p in model.parameters() if p.ndim == 2]


def float64(tensor: Tensor) -> Floats:
    return tensor.detach().to(torch.float64, copy=True).numpy()


def rms(array: Floats) -> float:
    return float(np.sqrt(np.mean(np.square(array))))


def backward(model: nn.Module, seed: int) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    data = torch.randn(16, 8, generator=generator).to(next(model.parameters()).dtype)
    model.zero_grad()
    loss = model(data).square().mean()
    loss.backward()
    return loss


@dataclass
class Call:
    """One call of torch's Newton–Schulz function: copies of what it got and gave."""

    ns_input: Tensor
    output: Tensor


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> list[Call]:
    """Every call of torch's Newton–Schulz function since, but for those of a copy that is watched."""
    seen: list[Call] = []
    original = torch_muon._zeropower_via_newtonschulz

    def spy(grad: Tensor, *args: Any) -> Tensor:
        before = grad.clone()
        output = original(grad, *args)
        if _get_current_dispatch_mode() is None:
            seen.append(Call(before, output.clone()))
        return output

    monkeypatch.setattr(torch_muon, "_zeropower_via_newtonschulz", spy)
    return seen


@pytest.fixture
def observed(monkeypatch: pytest.MonkeyPatch) -> list[Observation]:
    """Every observation whose geometry was measured since."""
    seen: list[Observation] = []
    original = record_module.measure_geometry

    def spy(observation: Observation) -> Any:
        assert observation.problem is not None
        # A buffer may be seen through an alias; kept as it was then.
        seen.append(replace(observation, problem=replace(observation.problem, matrix=observation.problem.matrix.copy())))
        return original(observation)

    monkeypatch.setattr(record_module, "measure_geometry", spy)
    return seen


# The Newton–Schulz input of Muon


@pytest.mark.parametrize("closure", [False, True], ids=["", "closure"])
@pytest.mark.parametrize("nesterov", [True, False], ids=["nesterov", "plain"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_muon_ns_input_is_bitwise_what_torch_orthogonalises(
    dtype: torch.dtype, nesterov: bool, closure: bool, mlp: Make, tmp_path: Path, calls: list[Call], observed: list[Observation]
) -> None:
    model = mlp(dropout=0.0, dtype=dtype)
    optimizer = Muon(weights(model), lr=0.02, nesterov=nesterov, momentum=0.9)
    with attach(optimizer, model, tmp_path / "run.zarr", every=1, on_error="raise"):
        for step in range(4):
            if closure:
                optimizer.step(lambda: backward(model, step))  # noqa: B023
            else:
                backward(model, step)
                optimizer.step()
    # With bfloat16 weights the recorder runs the iteration once more after each step, for the update that was intended.
    own = [call for i, call in enumerate(calls) if dtype == torch.float32 or i // 3 % 2 == 0]
    assert len(observed) == len(own) == 4 * 3
    for observation, call in zip(observed, own, strict=True):
        assert observation.problem is not None
        assert observation.problem.matrix.tobytes() == call.ns_input.float().numpy().tobytes()
        assert observation.problem.roundoff == {torch.float32: 2.0**-24, torch.bfloat16: 2.0**-8}[dtype]


def test_muon_ns_input_is_none_of_the_near_misses(mlp: Make, tmp_path: Path, calls: list[Call]) -> None:
    """The gradient, the buffer before and the buffer after the step all differ from it: the test above can tell."""
    model = mlp(dropout=0.0)
    optimizer = Muon(weights(model), lr=0.02)
    backward(model, 0)
    optimizer.step()
    before = [optimizer.state[p]["momentum_buffer"].clone() for p in weights(model)]
    backward(model, 1)
    optimizer.step()
    for p, old, call in zip(weights(model), before, calls[3:], strict=True):
        for miss in (p.grad, old, optimizer.state[p]["momentum_buffer"]):
            assert not torch.equal(miss, call.ns_input)


def test_trap_bfloat16_buffer_is_overwritten_by_the_step(mlp: Make, tmp_path: Path, calls: list[Call], observed: list[Observation]) -> None:
    """torch normalises in place, which for bfloat16 without Nesterov is the momentum buffer: read after the step it is wrong."""
    model = mlp(dropout=0.0, dtype=torch.bfloat16)
    optimizer = Muon(weights(model), lr=0.02, nesterov=False)
    with attach(optimizer, model, tmp_path / "run.zarr", every=1, on_error="raise"):
        backward(model, 0)
        optimizer.step()
    for p, call, observation in zip(weights(model), calls[:3], observed, strict=True):
        buffer = optimizer.state[p]["momentum_buffer"].float()
        assert buffer.norm().item() == pytest.approx(1, rel=0.01)  # normalised
        assert call.ns_input.float().norm().item() < 0.1
        assert observation.problem is not None
        assert observation.problem.matrix.tobytes() == call.ns_input.float().numpy().tobytes()


# What Muon achieved, read back from the weights


@pytest.mark.parametrize("adjust", ["original", "match_rms_adamw"])
def test_muon_output_is_read_back_from_the_weights(
    adjust: str, mlp: Make, tmp_path: Path, read: Callable[..., Any], calls: list[Call]
) -> None:
    model = mlp(dropout=0.0)
    optimizer = Muon(weights(model), lr=0.02, weight_decay=0.1, adjust_lr_fn=adjust)
    with attach(optimizer, model, tmp_path / "run.zarr", every=1, on_error="raise"):
        for step in range(5):
            backward(model, step)
            optimizer.step()
    run = read(tmp_path / "run.zarr")
    geometry, update = run["geometry"], run["update"]
    for i, call in enumerate(calls):
        step, matrix = divmod(i, 3)
        m, output = float64(call.ns_input), float64(call.output)
        o = np.linalg.svd(output, compute_uv=False)
        residual = sqrt(np.mean((1 - o**2) ** 2))
        alignment = np.sum(m * output) / np.linalg.svd(m, compute_uv=False).sum()
        # Differences come from rounding the new float32 weights, lr·O ≈ 0.006 beside weights ≈ 0.3. Largest seen: 7.8e-7
        # for the residual, 1.0e-6 for the alignment (both stored as float32), 6.2e-7 for √mean o².
        assert geometry["ns_residual_achieved"].values[step, matrix] == pytest.approx(residual, abs=4e-6)
        assert geometry["alignment"].values[step, matrix] == pytest.approx(alignment, abs=4e-6)
        size = update["update_rms_per_lr"].values[step, matrix] / update["update_rms_target"].values[step, matrix]
        assert size == pytest.approx(sqrt(np.mean(o**2)), rel=3e-6)


def test_muon_rms_target_is_the_size_of_an_exact_polar_factor(mlp: Make, tmp_path: Path, read: Callable[..., Any]) -> None:
    """Written out per shape: √max(1, m/n)·√(r/(mn)) originally, 0.2·√max(m, n)·√(r/(mn)) = 0.2 under match_rms_adamw."""
    model = mlp()
    muon = Muon([{"params": [p], "adjust_lr_fn": fn} for p, fn in zip(weights(model), (None, "original", "match_rms_adamw"), strict=True)])
    adamw = AdamW([p for p in model.parameters() if p.ndim == 1] + [nn.Parameter(torch.ones(2, 3))])
    with attach([muon, adamw], model, tmp_path / "run.zarr", every=1):
        for parameter in [p for group in (*muon.param_groups, *adamw.param_groups) for p in group["params"]]:
            parameter.grad = torch.ones_like(parameter)
        muon.step()
        adamw.step()
    targets = read(tmp_path / "run.zarr")["update"]["update_rms_target"].values[0]
    assert targets[:3] == pytest.approx([sqrt(12 / 8) * sqrt(8 / (12 * 8)), sqrt(12 / (12 * 12)), 0.2], rel=1e-12)
    assert np.isnan(targets[3])


def test_muon_settings_are_those_of_each_group(mlp: Make, tmp_path: Path, read: Callable[..., Any]) -> None:
    model = mlp()
    first, second, third = weights(model)
    optimizer = Muon([{"params": [first], "ns_steps": 3}, {"params": [second], "ns_coefficients": (1.5, -0.5, 0.0)}, {"params": [third]}])
    with attach(optimizer, model, tmp_path / "run.zarr", every=1):
        backward(model, 0)
        optimizer.step()
        optimizer.param_groups[0]["ns_steps"] = 7
        optimizer.step()
    geometry = read(tmp_path / "run.zarr")["geometry"]
    schedules = [[entry["coefficients"], entry["eps"]] for entry in geometry.attrs["ns_schedules"]]
    jordan = [3.4445, -4.7750, 2.0315]
    used = [[schedules[i] for i in row] for row in geometry["ns_schedule"].values]
    assert used == [
        [[[jordan] * 3, 1e-7], [[[1.5, -0.5, 0.0]] * 5, 1e-7], [[jordan] * 5, 1e-7]],
        [[[jordan] * 7, 1e-7], [[[1.5, -0.5, 0.0]] * 5, 1e-7], [[jordan] * 5, 1e-7]],
    ]


# Sizes of updates and moments


def test_first_adamw_step_moves_every_entry_by_the_learning_rate(mlp: Make, tmp_path: Path, read: Callable[..., Any]) -> None:
    model = mlp(dropout=0.0)
    optimizer = AdamW(model.parameters(), lr=1e-2, weight_decay=0.0, eps=1e-15)
    with attach(optimizer, model, tmp_path / "run.zarr", every=1):
        backward(model, 0)
        optimizer.step()
    update = read(tmp_path / "run.zarr")["update"]
    # The new weights, about 0.3, are rounded to float32, up to 1.5e-8 beside 1e-2 each. Seen: 8.5e-8.
    assert update["update_rms_per_lr"].values == pytest.approx(1, rel=2e-6)
    assert update["update_rms"].values == pytest.approx(1e-2, rel=2e-6)
    assert update["lr"].values.tolist() == [[1e-2] * 3]


def test_decoupled_decay_is_taken_out(mlp: Make, tmp_path: Path, read: Callable[..., Any], calls: list[Call]) -> None:
    """AdamW's and Muon's steps written out, with large weights so that the decay would show: left in, 50 % and more off."""
    model = mlp(dropout=0.0)
    with torch.no_grad():
        for p in weights(model):
            p.mul_(5)
    lr, decay = 0.01, 2.0
    first, second, third = weights(model)
    adamw = AdamW([first, second], lr=lr, weight_decay=decay, betas=(0.8, 0.95), eps=1e-6)
    muon = Muon([third], lr=lr, weight_decay=decay, adjust_lr_fn="match_rms_adamw")
    m, v = {first: 0.0, second: 0.0}, {first: 0.0, second: 0.0}
    expected, with_decay = [], []
    with attach([adamw, muon], model, tmp_path / "run.zarr", every=1, on_error="raise"):
        for t in range(1, 5):
            backward(model, t)
            before = [float64(p) for p in weights(model)]
            directions = []
            for p in (first, second):
                g = float64(p.grad)  # type: ignore[arg-type]
                m[p], v[p] = 0.8 * m[p] + 0.2 * g, 0.95 * v[p] + 0.05 * g * g
                directions.append((m[p] / (1 - 0.8**t)) / (np.sqrt(v[p] / (1 - 0.95**t)) + 1e-6))
            adamw.step()
            muon.step()
            directions.append(0.2 * sqrt(12) * float64(calls[-1].output))
            expected.append([rms(u) for u in directions])
            with_decay.append([rms(u + decay * w) for u, w in zip(directions, before, strict=True)])
    update = read(tmp_path / "run.zarr")["update"]
    # Rounding of float32 weights of up to 1.8 beside updates of 0.002 (Muon) and 0.005: largest seen 1.0e-5 and 1.6e-6.
    np.testing.assert_allclose(update["update_rms_per_lr"].values, expected, rtol=4e-5)
    np.testing.assert_allclose(update["update_rms"].values / lr, with_decay, rtol=1e-5)
    assert np.all(np.divide(with_decay, expected) > 1.5)


def test_coupled_decay_stays_inside_the_update(mlp: Make, tmp_path: Path, read: Callable[..., Any]) -> None:
    """Adam's first step with weight decay is sign(g + λW)·lr: nothing can be taken out of it."""
    model = mlp(dropout=0.0)
    optimizer = Adam(model.parameters(), lr=1e-2, weight_decay=0.5, eps=1e-15)
    with attach(optimizer, model, tmp_path / "run.zarr", every=1):
        backward(model, 0)
        optimizer.step()
    update = read(tmp_path / "run.zarr")["update"]
    assert update["update_rms_per_lr"].values == pytest.approx(1, rel=2e-6)  # float32 weights; seen 1.1e-7
    assert update["weight_decay"].values.tolist() == [[0.5] * 3]


MOMENTA: dict[str, tuple[Callable[[list[nn.Parameter]], Optimizer], Callable[[Floats | None, Floats, Floats], Floats]]] = {
    "Muon": (lambda ps: Muon(ps, lr=0.02, momentum=0.9), lambda m, g, w: (0 if m is None else 0.9 * m) + 0.1 * g),
    "AdamW": (lambda ps: AdamW(ps, betas=(0.8, 0.99)), lambda m, g, w: (0 if m is None else 0.8 * m) + 0.2 * g),
    "Adam": (
        lambda ps: Adam(ps, betas=(0.8, 0.99), weight_decay=0.1),
        lambda m, g, w: (0 if m is None else 0.8 * m) + 0.2 * (g + 0.1 * w),
    ),
    "SGD": (lambda ps: SGD(ps, lr=0.02, momentum=0.9), lambda m, g, w: g if m is None else 0.9 * m + g),
    "SGD with Nesterov": (lambda ps: SGD(ps, lr=0.02, momentum=0.9, nesterov=True), lambda m, g, w: g if m is None else 0.9 * m + g),
}


@pytest.mark.parametrize("name", MOMENTA)
def test_momentum_and_gradient_rms(name: str, mlp: Make, tmp_path: Path, read: Callable[..., Any]) -> None:
    build, recurrence = MOMENTA[name]
    model = mlp(dropout=0.0)
    optimizer = build(weights(model))
    momenta: list[Floats | None] = [None] * 3
    expected, gradients, spectra = [], [], []
    with attach(optimizer, model, tmp_path / "run.zarr", every=1):
        for step in range(5):
            backward(model, step)
            momenta = [
                recurrence(m, float64(p.grad), float64(p))  # type: ignore[arg-type]
                for m, p in zip(momenta, weights(model), strict=True)
            ]
            gradients.append([rms(float64(p.grad)) for p in weights(model)])  # type: ignore[arg-type]
            expected.append([rms(m) for m in momenta if m is not None])
            spectra.append([np.linalg.svd(m, compute_uv=False)[0] / np.linalg.norm(m) for m in momenta if m is not None])
            optimizer.step()
    run = read(tmp_path / "run.zarr")
    np.testing.assert_allclose(run["update"]["grad_rms"].values, gradients, rtol=1e-12)  # seen: 2.6e-16
    np.testing.assert_allclose(run["update"]["momentum_rms"].values, expected, rtol=1e-6)  # float32 state; seen: 5.5e-8
    if name != "Muon":
        # The spectrum of what does not orthogonalise is that of its momentum; recorded with 12 bits.
        np.testing.assert_allclose(run["geometry"]["sigma_quantile"].values[..., -1], spectra, rtol=2**-13 + 1e-6)
        assert np.isnan(run["geometry"]["ns_residual"].values).all()
        assert (run["geometry"]["ns_schedule"].values == -1).all()


def test_sgd_without_momentum_gives_the_spectrum_of_the_gradient(mlp: Make, tmp_path: Path, read: Callable[..., Any]) -> None:
    model = mlp(dropout=0.0)
    optimizer = SGD(model.parameters(), lr=0.02)
    with attach(optimizer, model, tmp_path / "run.zarr", every=1):
        backward(model, 0)
        optimizer.step()
    run = read(tmp_path / "run.zarr")
    norms = [np.linalg.norm(float64(p.grad)) for p in weights(model)]  # type: ignore[arg-type]
    assert run["geometry"]["fro_norm"].values[0] == pytest.approx(norms, rel=1e-12)
    assert np.isnan(run["update"]["momentum_rms"].values).all()


# Optimizers the table does not know


class SignDescent(Optimizer):
    """W ← W − η·sign(G); spoils its gradient as some optimizers do, by writing into it or by dropping it."""

    def __init__(self, params: Any, spoil: str) -> None:
        super().__init__(params, {"lr": 0.1})
        self.spoil = spoil

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:
        for p in self.param_groups[0]["params"]:
            p.add_(p.grad.sign(), alpha=-0.1)
            if self.spoil == "overwritten":
                p.grad.sign_()
            elif self.spoil == "dropped":
                p.grad = None


@pytest.mark.parametrize("spoil", ["kept", "overwritten", "dropped"])
def test_unknown_optimizer_gives_updates_and_the_spectrum_of_the_gradient(
    spoil: str, mlp: Make, tmp_path: Path, read: Callable[..., Any]
) -> None:
    model = mlp(dropout=0.0)
    optimizer = SignDescent(weights(model), spoil)
    with attach(optimizer, model, tmp_path / "run.zarr", every=1, on_error="raise"):
        backward(model, 0)
        gradients = [float64(p.grad) for p in weights(model)]  # type: ignore[arg-type]
        optimizer.step()
    run = read(tmp_path / "run.zarr")
    assert run["geometry"]["fro_norm"].values[0] == pytest.approx([np.linalg.norm(g) for g in gradients], rel=1e-12)
    conditions = [np.linalg.cond(g) for g in gradients]
    assert run["geometry"]["condition_number"].values[0] == pytest.approx(conditions, rel=1e-4)
    assert run["update"]["update_rms_per_lr"].values[0] == pytest.approx(1, rel=2e-6)  # float32 weights; seen 7.1e-9
    assert run["update"]["grad_rms"].values[0] == pytest.approx([rms(g) for g in gradients], rel=1e-12)
    assert np.isnan(run["update"]["momentum_rms"].values).all()
    [entry] = run.attrs["optimizers"]
    assert (entry["read_by"], entry["label"]) == (["names in the state"], "SignDescent")  # of which there are none
    assert "else the gradient" in entry["spectrum_of"][0]


def test_first_adagrad_step_is_of_the_size_of_the_learning_rate(mlp: Make, tmp_path: Path, read: Callable[..., Any]) -> None:
    """Its first step is lr·g/(|g| + ε): of size lr."""
    model = mlp(dropout=0.0)
    optimizer = Adagrad(model.parameters(), lr=0.1, eps=1e-15)
    with attach(optimizer, model, tmp_path / "run.zarr", every=1, on_error="raise"):
        backward(model, 0)
        optimizer.step()
    run = read(tmp_path / "run.zarr")
    assert run["update"]["update_rms_per_lr"].values[0] == pytest.approx(1, rel=2e-6)  # float32 weights; seen 1.7e-8
    assert np.isfinite(run["geometry"]["condition_number"].values).all()
    assert np.isnan(run["update"]["momentum_rms"].values).all()


def test_optimizer_without_a_learning_rate_of_its_own(mlp: Make, tmp_path: Path, read: Callable[..., Any]) -> None:
    """Some set lr=None and find it themselves: the applied update is still right, per learning rate it is missing."""
    model = mlp(dropout=0.0)
    optimizer = SignDescent(weights(model), "kept")
    optimizer.param_groups[0].update(lr=None, weight_decay=None)
    with attach(optimizer, model, tmp_path / "run.zarr", every=1, on_error="raise"):
        backward(model, 0)
        optimizer.step()
    update = read(tmp_path / "run.zarr")["update"]
    assert update["update_rms"].values[0] == pytest.approx(0.1, rel=2e-6)
    for missing in ("lr", "weight_decay", "update_rms_per_lr"):
        assert np.isnan(update[missing].values).all()


def test_sparse_gradients_are_missing_not_an_error(tmp_path: Path, read: Callable[..., Any]) -> None:
    embedding = nn.Embedding(10, 4, sparse=True)
    optimizer = SGD(embedding.parameters(), lr=0.1)
    with attach(optimizer, embedding, tmp_path / "run.zarr", every=1, on_error="raise"):
        embedding(torch.tensor([1, 2])).sum().backward()
        optimizer.step()
    assert np.isnan(read(tmp_path / "run.zarr")["update"]["update_rms"].values).all()


# The table


def installed(name: str) -> Any:
    """The class that a row names; None where its library is not installed, or is a stand-in's."""
    module, _, qualname = name.rpartition(".")
    try:
        return getattr(importlib.import_module(module), qualname)
    except ModuleNotFoundError:
        return None


TORCHS_AND_OURS = [name for name in table() if name.startswith(("torch.optim", "optiscope."))]


@pytest.mark.parametrize("name", TORCHS_AND_OURS)
def test_every_row_names_a_class_that_exists(name: str) -> None:
    cls = installed(name)
    assert issubclass(cls, Optimizer)
    assert f"{cls.__module__}.{cls.__qualname__}" == name


def test_there_are_rows_for_all_of_torchs_optimizers() -> None:
    """But those that keep their state elsewhere (LBFGS) or take other gradients (SparseAdam)."""
    own = {cls for cls in vars(torch.optim).values() if isinstance(cls, type) and issubclass(cls, Optimizer)}
    rows = {installed(name) for name in TORCHS_AND_OURS}
    assert own - rows == {Optimizer, torch.optim.LBFGS, torch.optim.SparseAdam}


def test_subclass_without_a_step_of_its_own_is_read_as_its_base() -> None:
    class Named(AdamW):
        pass

    class Defaulted(Named):
        def __init__(self, params: Any) -> None:
            super().__init__(params, lr=0.1)

    # Before and after torch has wrapped the base's own `step`: it wraps that of each class when first instantiated.
    assert row_of(Named([nn.Parameter(torch.ones(2, 2))])) is table()["torch.optim.adamw.AdamW"]
    AdamW([nn.Parameter(torch.ones(2, 2))])
    assert row_of(Defaulted([nn.Parameter(torch.ones(2, 2))])) is table()["torch.optim.adamw.AdamW"]


def test_subclass_with_a_step_of_its_own_is_unknown_and_counted_once(mlp: Make, tmp_path: Path, read: Callable[..., Any]) -> None:
    """What its step does with the inherited state cannot be known. Where it calls the base's, torch runs the hooks twice."""

    class Careful(AdamW):
        def step(self, closure: Any = None) -> Any:
            return super().step(closure)

    AdamW([nn.Parameter(torch.ones(1))])  # the base's `step` runs hooks once an instance of the base was made
    model = mlp(dropout=0.0)
    optimizer = Careful(weights(model), lr=1e-2, weight_decay=0.0, eps=1e-15)
    fired: list[int] = []
    optimizer.register_step_post_hook(lambda *_: fired.append(1))
    with attach(optimizer, model, tmp_path / "run.zarr", every=1, on_error="raise") as recorder:
        for step in range(3):
            backward(model, step)
            optimizer.step()
    assert (len(fired), recorder.step) == (6, 3)
    run = read(tmp_path / "run.zarr")
    update = run["update"]
    assert update["step"].values.tolist() == [1, 2, 3]
    assert update["update_rms_per_lr"].values[0] == pytest.approx(1, rel=2e-6)
    assert run.attrs["optimizers"][0]["read_by"] == ["names in the state"]
    assert update["momentum_rms"].values[-1] == pytest.approx(
        [rms(float64(optimizer.state[p]["exp_avg"])) for p in weights(model)], rel=1e-12
    )
