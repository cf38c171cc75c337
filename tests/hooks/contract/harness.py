"""The contract that every supported optimizer is held to: one small training, plain and recorded, and what is compared.

A `Case` says how a user makes the optimizer and steps it, and gives an independent float64 transcription of what it keeps.
`run_case` trains without and with a recorder, at once and in the background, and returns a `Result`: the measured differences. The tests assert on
results, and the coverage document is printed from them.
"""

import copy
import importlib
import threading
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any
from unittest.mock import patch

import numpy as np
import torch
import xarray as xr
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.utils._python_dispatch import _get_current_dispatch_mode

from optiscope.hooks import Recorder, attach
from optiscope.hooks.observing.snapshot import Snapshot
from optiscope.hooks.recording.record import Readings

Floats = NDArray[np.float64]

STEPS = 6
EXACT = 1e-5  # relative; float32 state against a float64 transcription: at most 2e-6 seen over six steps


@dataclass(frozen=True)
class Expected:
    """What an optimizer keeps of one parameter after a step, and the step it took, all in float64.

    Attributes:
        momentum: first moment in the parameter's basis; None where there is none.
        second: second moment in the form the optimizer keeps it; None where there is none.
        update: U = (W_t(1 − ηλ) − W_{t+1})/η; None where it is not transcribed.
        averages: what the update divides m and v by, to correct their bias, and its denominator at v = 0 in units of √v̂, NaN for what
            it does not have; None where they are not compared.
    """

    momentum: Floats | None = None
    second: Floats | None = None
    update: Floats | None = None
    averages: tuple[float, float, float] | None = None


# One parameter's: called once per step with gradient and weights before the step.
Transcription = Callable[[Floats, Floats], Expected]


@dataclass(frozen=True)
class Case:
    """One optimizer as a user makes and steps it.

    Attributes:
        system: name in the coverage table.
        package: distribution that holds the class; "optiscope" for the examples; "stand-in" where the library cannot be installed.
        build: makes the optimizer (or several) for the parameters of a model.
        transcription: makes the reference of one parameter, given its name and shape; None where there is nothing to compare.
        step: one training step; by default backward, step, zero_grad.
        newton_schulz: dotted names of the function that the optimizer orthogonalises with, as the optimizer's module looks
            it up; called with the matrix as its first argument.
        momentum_bound, second_bound, update_bound: largest relative error ‖x − reference‖/‖reference‖ to accept.
        replay: the output of the intercepted function, times the optimizer's scale, is the update; False where more follows.
        note: what a reader of the coverage table should know, in one sentence.
        only: which parameters the transcription speaks of.
        warmup: first steps whose values are not compared (optimizers that skip their first step).
        model: makes what is trained.
    """

    system: str
    package: str
    build: Callable[[nn.Module], Any]
    transcription: Callable[[str, tuple[int, ...]], Transcription] | None = None
    step: Callable[[Any, nn.Module, Callable[[], Tensor]], None] | None = None
    newton_schulz: str | None = None
    momentum_bound: float = EXACT
    second_bound: float = EXACT
    update_bound: float = 1e-3  # a difference of float32 weights: about 6e-8·RMS(W)/RMS(ΔW)
    replay: bool = True
    note: str = ""
    only: Callable[[str], bool] = lambda name: True
    warmup: int = 0
    model: Callable[[], nn.Module] = lambda: Model()


@dataclass
class Result:
    """What was measured of a case. Errors are the largest over steps and parameters; None where there is nothing to compare.

    Attributes:
        neutral: training was the same to the bit with the recorder, in the background too.
        behind: what the run of a recorder in the background holds is, to the bit, what the other one's does at the same steps.
        recorded: steps of the records.
        fired: real steps taken.
        read_by, spectrum_of: as written into the run, of the group that the first hidden matrix is in.
        ns_input: bitwise equal to what the intercepted function was given; None without one.
        replay: error of s·O of the intercepted function against the update.
        momentum, second, update: errors of the adapter's readings against the transcription.
        stored: error of the run's momentum_rms, second_moment_mean, update_rms, update_rms_per_lr against what was read.
        quantiles: relative error of the run's quantiles of v̂ and of |m̂|/√v̂ against those of the transcription.
        shares: whether the run's ε, and the shares under it and under 1000·ε, are those counted in what was read.
        forms: forms of the second moment.
    """

    neutral: bool
    behind: bool
    recorded: list[int]
    fired: int
    read_by: str
    class_name: str
    spectrum_of: str
    ns_input: bool | None = None
    replay: float | None = None
    momentum: float | None = None
    second: float | None = None
    update: float | None = None
    stored: dict[str, float] = field(default_factory=dict)
    quantiles: dict[str, float] = field(default_factory=dict)
    shares: bool | None = None
    forms: list[str] = field(default_factory=list)
    warnings: list[str] = field(default_factory=list)


class Block(nn.Module):
    """One layer with the names and shapes of a Llama's."""

    def __init__(self, d: int, inner: int) -> None:
        super().__init__()
        self.q_proj, self.k_proj, self.v_proj, self.o_proj = (nn.Linear(d, size, bias=False) for size in (d, d // 2, d // 2, d))
        self.up_proj, self.down_proj = nn.Linear(d, inner, bias=False), nn.Linear(inner, d, bias=False)
        self.norm = nn.LayerNorm(d)

    def forward(self, x: Tensor) -> Tensor:
        y = self.norm(x)
        scores = (self.q_proj(y)[..., : y.shape[-1] // 2] @ self.k_proj(y).mT).softmax(-1)
        mixed = scores @ self.v_proj(y)
        x = x + self.o_proj(torch.cat([mixed, mixed], -1))
        return x + self.down_proj(torch.tanh(self.up_proj(x)))


class Model(nn.Module):
    """Two layers between an embedding and a head; 32 dimensions, matrices square, tall and wide."""

    def __init__(self, d: int = 32, inner: int = 48, vocabulary: int = 24) -> None:
        super().__init__()
        self.embed_tokens = nn.Embedding(vocabulary, d)
        self.layers = nn.ModuleList(Block(d, inner) for _ in range(2))
        self.lm_head = nn.Linear(d, vocabulary, bias=False)

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.embed_tokens(tokens)
        for layer in self.layers:
            x = layer(x)
        logits: Tensor = self.lm_head(x)
        return logits


def hidden(model: nn.Module) -> list[nn.Parameter]:
    """The matrices of the layers, which a Muon takes."""
    return [p for name, p in model.named_parameters() if p.ndim == 2 and "layers" in name]


def others(model: nn.Module) -> list[nn.Parameter]:
    """Everything else."""
    taken = {id(p) for p in hidden(model)}
    return [p for p in model.parameters() if id(p) not in taken]


def is_hidden(name: str) -> bool:
    """Whether a parameter is one of :func:`hidden`, by its name."""
    return "_proj" in name


def plain_step(optimizer: Any, model: nn.Module, loss: Callable[[], Tensor]) -> None:
    """Backward, step, zero_grad."""
    loss().backward()
    for one in as_list(optimizer):
        one.step()
        one.zero_grad()


def as_list(optimizer: Any) -> list[Any]:
    """One optimizer or several, as a list."""
    return list(optimizer) if isinstance(optimizer, (list, tuple)) else [optimizer]


@dataclass
class Seen:
    """One parameter at one recorded step: what the harness itself copied, and what the adapter read."""

    gradient: Floats
    before: Floats
    after: Floats
    momentum: Floats | None
    second: Floats | None
    form: str | None
    ns_input: Tensor | None
    lr: float
    decay: float
    scale: float


def train(
    case: Case, store: Path | None, seen: dict[str, list[Seen]] | None = None, *, background: bool = False
) -> tuple[list[Tensor], int, "Recorder | None"]:
    """Train a fresh model; weights, gradients, the optimizer's state and the random state of every step, and the real steps.

    In the background every other step is recorded, and measured only when the one behind it has overwritten all it may.
    """
    torch.manual_seed(0)
    model = case.model()
    built = case.build(model)
    names = {id(p): name for name, p in model.named_parameters()}
    data = torch.randint(24, (STEPS, 8, 13), generator=torch.Generator().manual_seed(1))
    trace: list[Tensor] = []
    with ExitStack() as stack:
        recorder = None
        if store is not None:
            overwritten = stack.enter_context(_held()) if background else None
            every = 2 if background else 1
            recorder = stack.enter_context(attach(built, model, store, every=every, background=background, on_error="raise"))
            if overwritten is not None:
                stack.callback(overwritten.set)  # closing the recorder waits for the last record
            if seen is not None:
                stack.enter_context(_watching(seen, names))
        for batch in data:

            def loss(batch: Tensor = batch) -> Tensor:
                return nn.functional.cross_entropy(model(batch[:, :-1]).flatten(0, 1), batch[:, 1:].flatten())

            (case.step or plain_step)(built, model, loss)
            if recorder is not None and overwritten is not None and recorder.step % 2:
                overwritten.set()
                assert recorder.session.journal.worker is not None
                recorder.session.journal.worker.wait()
                overwritten.clear()
            trace += [p.detach().clone() for p in model.parameters()]
            trace += [p.grad.clone() for p in model.parameters() if p.grad is not None]
            trace.append(torch.get_rng_state())
        trace += [tensor for one in as_list(built) for tensor in tensors_in(getattr(one, "state", {}))]
    return trace, STEPS, recorder


def tensors_in(state: Any) -> Iterator[Tensor]:
    """Copies of every tensor in nested state, in order."""
    if hasattr(state, "__tensor_flatten__"):  # a tensor that is made of others: codes and scales of a quantised one
        yield from tensors_in({name: getattr(state, name) for name in state.__tensor_flatten__()[0]})
    elif isinstance(state, Tensor):
        yield state.detach().clone()
    elif isinstance(state, dict):
        for value in state.values():
            yield from tensors_in(value)
    elif isinstance(state, (list, tuple)):
        for value in state:
            yield from tensors_in(value)


@contextmanager
def _held() -> Iterator[threading.Event]:
    """No record is measured before the event."""
    event, measure = threading.Event(), Readings.measure

    def late(self: Readings, *of: Any) -> None:
        assert event.wait(30)
        measure(self, *of)

    with patch.object(Readings, "measure", late):
        yield event


@contextmanager
def _watching(seen: dict[str, list[Seen]], names: dict[int, str]) -> Iterator[None]:
    """Copy, around every step, what the optimizer was given and did, and what its adapter reads."""
    read, see_gradient = Snapshot.read, Snapshot.see_gradient
    gradients: dict[int, Floats] = {}

    def spy_gradient(self: Snapshot, grad_scale: Tensor | None = None) -> None:
        gradient = self.reading.parameter.grad
        if gradient is not None:
            gradients[id(self.reading.parameter)] = float64(gradient)
        see_gradient(self, grad_scale)

    def spy(self: Snapshot) -> Any:
        readings = read(self)
        reading, adapter, p = self.reading, self.adapter, self.reading.parameter
        if readings:
            ns, second = adapter.orthogonalisation, adapter.second_moment(reading)
            momentum = adapter.momentum(reading)
            seen.setdefault(names[id(p)], []).append(
                Seen(
                    gradients[id(p)],
                    float64(reading.weight),
                    float64(p),
                    None if momentum is None else float64(momentum),
                    None if second is None else float64(second.values),
                    None if second is None else second.form,
                    None if ns is None else copied(ns.ns_input(reading)),
                    adapter.learning_rate(reading),
                    adapter.decoupled_decay(reading),
                    float("nan") if ns is None else ns.output_scale(reading, p.shape[0], p.numel() // p.shape[0]),
                )
            )
        return readings

    with patch.object(Snapshot, "read", spy), patch.object(Snapshot, "see_gradient", spy_gradient):
        yield


def copied(tensor: Tensor | None) -> Tensor | None:
    """A copy, None for None."""
    return None if tensor is None else tensor.detach().clone()


def float64(tensor: Tensor) -> Floats:
    """A copy in float64."""
    return tensor.detach().to(torch.float64, copy=True).numpy()


@dataclass
class Call:
    """One call of a library's Newton–Schulz function: copies of what it got and gave."""

    given: Tensor
    output: Tensor


@contextmanager
def intercepted(dotted: str | None) -> Iterator[list[Call]]:
    """Every call of a function since, while it is looked up under this name; not those of a copy's step, which a dispatch mode watches."""
    calls: list[Call] = []
    if dotted is None:
        yield calls
        return
    module, _, name = dotted.rpartition(".")
    try:
        owner: Any = importlib.import_module(module)
    except ModuleNotFoundError:
        module, _, cls = module.rpartition(".")
        owner = getattr(importlib.import_module(module), cls)
    original = getattr(owner, name)

    def spy(*args: Any, **kwargs: Any) -> Any:
        given = next(a for a in (*args, *kwargs.values()) if isinstance(a, Tensor)).detach().clone()
        output = original(*args, **kwargs)
        if _get_current_dispatch_mode() is None:
            calls.append(Call(given, output.detach().clone()))
        return output

    with patch.object(owner, name, spy):
        yield calls


def run_case(case: Case) -> Result:
    """Train plain and recorded, and compare."""
    plain, _, _ = train(case, None)
    with TemporaryDirectory() as folder:
        store = Path(folder) / "run.zarr"
        recorded, fired, _ = train(case, store)
        again, late = Path(folder) / "again.zarr", Path(folder) / "background.zarr"
        beside, _, _ = train(case, late, background=True)
        neutral = all(len(plain) == len(trace) and all(map(same, plain, trace)) for trace in (recorded, beside))
        seen: dict[str, list[Seen]] = {}
        with intercepted(case.newton_schulz) as calls:
            train(case, again, seen)
        with xr.open_datatree(store, engine="zarr") as tree:
            run = tree.load()
        with xr.open_datatree(late, engine="zarr") as tree:
            behind = _holds_the_same(tree.load(), run)
    entry, group = _group_of_hidden(run)
    result = Result(
        neutral=neutral,
        behind=behind,
        recorded=run["update"]["step"].values.tolist(),
        fired=fired,
        class_name="` around `".join([*entry["wrapped_by"], entry["class"]]),
        read_by=entry["read_by"][group],
        spectrum_of=entry["spectrum_of"][group],
    )
    result.forms = sorted({s.form for name, many in seen.items() if case.only(name) for s in many if s.form is not None})
    _compare_moments(case, run, seen, result)
    _compare_stored(run, seen, result)
    if case.newton_schulz is not None:
        _compare_newton_schulz(case, seen, calls, result)
    return result


def same(a: Tensor, b: Tensor) -> bool:
    """Bitwise equal, NaN included."""
    return a.shape == b.shape and a.dtype == b.dtype and torch.equal(*(t.flatten().view(torch.uint8) for t in (a, b)))


def same_values(a: NDArray[Any], b: NDArray[Any]) -> bool:
    """Bitwise equal, NaN included; texts as texts."""
    return a.tolist() == b.tolist() if a.dtype.kind in "TO" else a.tobytes() == b.tobytes()


def _holds_the_same(behind: xr.DataTree, run: xr.DataTree) -> bool:
    """Whether all variables of all records are, to the bit, those of the other run at the same steps."""
    found = []
    for name in set(run.children) - {"scalars"}:
        group = behind[name].to_dataset()
        other = run[name].to_dataset().sel(step=group["step"])
        found.append(
            set(group.variables) == set(other.variables) and all(same_values(group[v].values, other[v].values) for v in group.variables)
        )
    return bool(found) and all(found) and behind["update"]["step"].values.tolist() == run["update"]["step"].values.tolist()[1::2]


def _group_of_hidden(run: xr.DataTree) -> tuple[dict[str, Any], int]:
    update = run["update"]
    name = next(str(n) for n in update["name"].values if "q_proj" in str(n))
    label = str(update["optimizer"].values[update["name"].values.tolist().index(name)])
    entry = next(e for e in run.attrs["optimizers"] if e["label"] == label)
    return copy.deepcopy(entry), 0


def _compare_moments(case: Case, run: xr.DataTree, seen: dict[str, list[Seen]], result: Result) -> None:
    if case.transcription is None:
        return
    for name, many in seen.items():
        if not case.only(name):
            continue
        reference = case.transcription(name, many[0].before.shape)
        for t, s in enumerate(many):
            kept = reference(s.gradient, s.before)
            if t < case.warmup:
                continue
            result.momentum = _worst(result.momentum, s.momentum, kept.momentum, f"momentum of {name}")
            result.second = _worst(result.second, s.second, kept.second, f"second moment of {name}")
            if kept.update is not None:
                result.update = _worst(result.update, applied(s), kept.update, f"update of {name}")
            _compare_averages(case, run, name, t, s, kept, result)


def _compare_averages(case: Case, run: xr.DataTree, name: str, t: int, s: Seen, kept: Expected, result: Result) -> None:
    """What the run holds of v̂, m̂ and ε against the transcription's; of moments that are kept exactly."""
    stored = run["second_moment"]
    names = [str(n) for n in stored["name"].values]
    if kept.averages is None or kept.second is None or s.second is None or name not in names:
        return
    of_first, of_second, eps = kept.averages
    cell = stored.isel(step=t, matrix=names.index(name))
    expected = {}
    if case.second_bound == EXACT:
        expected["second_moment_quantile"] = kept.second / of_second
    if s.form in ("full", "frozen") and kept.momentum is not None and case.second_bound == case.momentum_bound == EXACT and of_first > 0:
        with np.errstate(divide="ignore", invalid="ignore"):
            ratio = np.abs(kept.momentum / of_first) / np.sqrt(kept.second / of_second)
        expected["snr_quantile"] = np.where(np.isnan(ratio), 0.0, ratio)  # a coordinate without gradient does not move
    for key, values in expected.items():
        # Of the rank ⌊level·(n − 1)⌋, as the bins count.
        wanted = np.quantile(values, stored["level"].values, method="lower")
        # Not what a float32 rotation leaves of nothing (SOAP), and infinity where only m has seen a gradient (1-bit Adam).
        largest = np.max(wanted, where=np.isfinite(wanted), initial=0.0)
        compared = np.isfinite(wanted) & (np.abs(wanted) > 1e-9 * largest)
        assert np.array_equal(np.isfinite(wanted), np.isfinite(cell[key].values)), f"{key} of {name}"
        # A momentum of float32 that all but cancels is known to about 1e-7 of the largest; which bits are left depends on the processor.
        distance = np.maximum(np.abs(cell[key].values[compared] - wanted[compared]) - 2e-7 * largest, 0.0)
        error = float(np.max(distance / np.abs(wanted[compared]), initial=0.0))
        result.quantiles[key] = max(result.quantiles.get(key, 0.0), error)
    root = np.sqrt(np.maximum(s.second / of_second, 0))  # an estimate of the Hessian, which has no ε, may be negative
    told = [float(cell[key]) for key in ("second_moment_eps", "eps_share", "near_eps_share")]
    if not np.isfinite(eps):
        wanted_shares = [np.nan] * 3
    else:
        wanted_shares = [eps, float(np.float32(np.mean(root < eps))), float(np.float32(np.mean(root < 1000 * eps)))]
    right = np.allclose(told[:1], wanted_shares[:1], rtol=1e-9, equal_nan=True) and np.array_equal(
        told[1:], wanted_shares[1:], equal_nan=True
    )
    result.shares = right if result.shares is None else result.shares and right


def applied(s: Seen) -> Floats:
    """The update per learning rate, decoupled decay taken out, from the harness's own copies of the weights."""
    return (s.before * (1 - s.lr * s.decay) - s.after) / s.lr


def _worst(so_far: float | None, value: Floats | None, reference: Floats | None, what: str) -> float | None:
    if reference is None:
        return so_far
    assert value is not None, f"{what} was not read"
    assert value.shape == reference.shape, f"{what}: read as {value.shape}, transcribed as {reference.shape}"
    return max(so_far or 0.0, relative_error(value, reference))


def relative_error(value: Floats, reference: Floats) -> float:
    """‖x − reference‖/‖reference‖."""
    return float(np.linalg.norm(value - reference) / max(np.linalg.norm(reference), 1e-30))


def _compare_stored(run: xr.DataTree, seen: dict[str, list[Seen]], result: Result) -> None:
    """What the run holds against means over what was read and copied."""
    update, second = run["update"], run["second_moment"]
    names = [str(n) for n in update["name"].values]

    def rms(x: Floats) -> float:
        return float(np.sqrt(np.mean(np.square(x))))

    for name, many in seen.items():
        if name not in names:
            continue
        i = names.index(name)
        for t, s in enumerate(many):
            expected = {"update_rms": rms(s.before - s.after), "grad_rms": rms(s.gradient)}
            if s.lr and np.isfinite(s.lr * s.decay):
                expected["update_rms_per_lr"] = rms(applied(s))
            if s.momentum is not None:
                expected["momentum_rms"] = rms(s.momentum)
            for key, value in expected.items():
                result.stored[key] = max(result.stored.get(key, 0.0), _difference(float(update[key].values[t, i]), value))
            if s.second is not None:
                stored = float(second["second_moment_mean"].values[t, i])
                result.stored["second_moment_mean"] = max(
                    result.stored.get("second_moment_mean", 0.0), _difference(stored, float(s.second.mean()))
                )


def _difference(stored: float, expected: float) -> float:
    return abs(stored - expected) / abs(expected) if expected else abs(stored)


def _compare_newton_schulz(case: Case, seen: dict[str, list[Seen]], calls: list[Call], result: Result) -> None:
    """Every matrix that the iteration was given is one that was read, to the bit, and its output is the update."""
    given = [(matrix, output) for call in calls for matrix, output in _matrices(call)]
    assert given, "the Newton–Schulz function was not called"
    result.ns_input, result.replay = True, 0.0 if case.replay else None
    for many in seen.values():
        for s in many:
            if s.ns_input is None:
                continue
            match = next((output for matrix, output in given if _same_matrix(matrix, s.ns_input)), None)
            result.ns_input = result.ns_input and match is not None
            if match is not None and case.replay:
                turned = match if match.shape == s.after.shape else match.mT
                result.replay = max(result.replay or 0.0, relative_error(applied(s), s.scale * float64(turned)))


def _matrices(call: Call) -> Iterator[tuple[Tensor, Tensor]]:
    """The matrices of a call, which may be given a batch of them."""
    if call.given.ndim == 3:
        yield from zip(call.given, call.output, strict=True)
    else:
        yield call.given, call.output


def _same_matrix(given: Tensor, read: Tensor) -> bool:
    """Equal to the bit, in the format the function was given; some libraries hand it the transpose."""
    read = read.reshape(read.shape[0], -1).to(given.dtype)
    return any(candidate.shape == given.shape and torch.equal(candidate, given) for candidate in (read, read.mT))


def installed_version(package: str) -> str:
    """Version of a distribution, empty for what is none."""
    try:
        return version(package)
    except PackageNotFoundError:
        return ""
