"""How one optimizer is read: what its row in the adapter table says, and what the row is given to read from."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from math import nan, sqrt
from typing import Any, TypeAlias

from torch import Tensor

from ...diagnostics.catalogue import SECOND_MOMENT_FORMS
from ...diagnostics.quantities.problem import NewtonSchulz
from .kronecker import Kronecker
from .stacked_state import stacked_state

Group: TypeAlias = Mapping[str, Any]  # a parameter group
State: TypeAlias = Mapping[str, Any]  # the optimizer's state of one parameter; empty before its first step


@dataclass
class Reading:
    """One parameter around one step: what every reader of an adapter is given. Readers change nothing in it.

    Attributes:
        optimizer: the (innermost) optimizer.
        parameter: the parameter itself; its weights are those of before the step in `Adapter.before`, else of after it.
        weight: copy of the weights before the step.
        group: copy of the parameter group's settings before the step.
        state: the optimizer's live state of the parameter: before the step in `Adapter.before`, else after it.
        gradient: copy of the gradient that the optimizer was handed, unscaled.
        before: what `Adapter.before` returned.
        arguments: what the step was called with, by name; no closure.
    """

    optimizer: Any
    parameter: Tensor
    weight: Tensor
    group: Group
    state: State
    gradient: Tensor | None = None
    before: Any = None
    arguments: Mapping[str, Any] = field(default_factory=dict)


def state_of(optimizer: Any, parameter: Tensor) -> State:
    """The optimizer's live state of a parameter; empty where it keeps none, or none that is a mapping.

    `get`, not `[]`: the state is a defaultdict, looking must not add to it.
    """
    states = optimizer.state
    state = states.get(parameter) if isinstance(states, Mapping) else None
    return state if isinstance(state, Mapping) else {}


def parameter_state(optimizer: Any, parameter: Tensor) -> State:
    """The same, with the parameter's parts of what is kept for its whole group in one tensor."""
    own = state_of(optimizer, parameter)
    if any(isinstance(value, Tensor) and value.shape == parameter.shape for value in own.values()):
        return own
    stacked = stacked_state(optimizer, parameter)
    return {**own, **stacked} if stacked else own


Reader: TypeAlias = Callable[[Reading], Tensor | None]


@dataclass(frozen=True)
class SecondMoment:
    """A second moment as the optimizer keeps it, without bias correction.

    Attributes:
        values: decoded: of the parameter's shape, or of the smaller shape that the form has.
        form: one of `diagnostics.catalogue.SECOND_MOMENT_FORMS`.
        moment: the first moment in the basis of `values` and of their shape, where that is not the parameter's own (rotated, projected).

    Raises:
        ValueError: another form.
    """

    values: Tensor
    form: str
    moment: Tensor | None = None

    def __post_init__(self) -> None:
        if self.form not in SECOND_MOMENT_FORMS:
            raise ValueError(f"form: expected one of {', '.join(SECOND_MOMENT_FORMS)}, got {self.form!r}")


@dataclass(frozen=True)
class Averages:
    """How an update is made of the two averages.

    Attributes:
        first, second: weight of all gradients in them, as the optimizer corrects for it: 1 − β₁ᵗ and 1 − β₂ᵗ; 1 where it does not
            correct; NaN where that is not known, or `Adapter.momentum` is no average of gradients.
        eps: the denominator at v = 0, in units of √v̂: ε of √v̂ + ε, ε/√(1 − β₂ᵗ) where √v + ε is corrected as a whole, √ε of √(v̂ + ε);
            NaN where there is none or it is not known.
        decay_in_gradient: weight decay that is not decoupled is added to the gradient that both average.
    """

    first: float = nan
    second: float = nan
    eps: float = nan
    decay_in_gradient: bool = True


def state_step(reading: Reading) -> float:
    """t, as the state counts it."""
    return number(reading.state.get("step"))


def corrected(steps: Callable[[Reading], float] = state_step, *, as_a_whole: bool = False) -> Callable[[Reading], Averages]:
    """A reader for m̂/(√v̂ + ε) with the group's `betas` and `eps`; `as_a_whole`: for m/(√v + ε), corrected after."""

    def read(reading: Reading) -> Averages:
        group, step = reading.group, steps(reading)
        betas = group["betas"] if "betas" in group else (group["beta1"], group["beta2"])
        first, second = (1 - number(beta) ** step for beta in betas[:2])
        eps = number(group.get("eps"))
        return Averages(first, second, eps / sqrt(second) if as_a_whole and second > 0 else eps)

    return read


def uncorrected(reading: Reading) -> Averages:
    """For m/(√v + ε) with the group's `eps`."""
    return Averages(1.0, 1.0, number(reading.group.get("eps")))


def group_setting(key: str) -> Callable[[Reading], float]:
    """A reader of one number in the parameter group, 0 where the group has no such entry."""
    return lambda reading: number(reading.group.get(key, 0.0))


NOT_ORTHOGONAL = "the optimizer does not orthogonalise"  # ends what is said of a spectrum that no iteration is run on

_LEARNING_RATE = group_setting("lr")


@dataclass(frozen=True)
class Orthogonalisation:
    """The Newton–Schulz part of a Muon-type optimizer.

    Attributes:
        ns_input: the exact matrix that the iteration is run on, of the parameter's shape.
        settings: coefficients of every step and eps; None where the iteration is none that coefficients describe.
        output_scale: s(reading, rows, cols) in ΔW = −η·s·O; NaN where more than a scale follows the iteration.
        target_rms: RMS of ΔW/η if O were the exact polar factor; by default that of s·O.
        row_divisors: d, one for every row, where ΔW = −η·s·c·O/d and c gives O/d the Frobenius norm of O (NorMuon); None where nothing but s follows.
        batched: three-dimensional parameters are orthogonalised slice by slice, not flattened to one matrix.
    """

    ns_input: Reader
    settings: Callable[[Reading], NewtonSchulz | None]
    output_scale: Callable[[Reading, int, int], float]
    target_rms: Callable[[Reading, int, int], float] | None = None
    row_divisors: Reader | None = None
    batched: bool = False

    def target(self, reading: Reading, rows: int, cols: int) -> float:
        """RMS of ΔW/η for an exact polar factor, whose own RMS is √(r/(mn)) = 1/√max(m, n)."""
        if self.target_rms is not None:
            return self.target_rms(reading, rows, cols)
        return self.output_scale(reading, rows, cols) / sqrt(max(rows, cols))


@dataclass(frozen=True)
class Adapter:
    """How to read one optimizer class. Every reader is called after the step, but `before`.

    Attributes:
        spectrum_of: what the group `geometry` describes, in words; written into the run.
        momentum: first moment, decoded into the parameter's basis and shape; None where there is none.
        second_moment: second moment with its form; None where there is none.
        averages: how the update is made of the two moments.
        kronecker: Kronecker factors of a matrix; None where the optimizer keeps none, or not one of each side.
        clipped: the update's coordinates before they are clipped at 1; None where it is not clipped so.
        learning_rate: η that scales the update, the number that `update_rms_per_lr` divides by.
        decoupled_decay: λ in W(1 − ηλ); 0 where weight decay is coupled to the gradient, NaN where that is not known.
        intended: the update per η, decay aside, that the optimizer computes before it is rounded into the weights. Asked for
            only with weights of low precision, where the applied one does not tell it.
        orthogonalisation: None where the optimizer does not orthogonalise.
        before: called before the step, as soon as the gradient is there; what it returns is `Reading.before` afterwards.
        stacks: the lists of a group's parameters whose Newton–Schulz problem is one matrix, their momenta side by side.
        correction: the variance-reduced gradient that is averaged in the place of the gradient, in the sign of that; None where there is none.
        rotation: R before and after the step, M, f(M) and R f(RᵀM) of an optimizer that works in rotated coordinates, as
            :class:`...diagnostics.quantities.rotation.Rotation` describes them.
        trust_ratio: the factor by which this parameter's step was scaled; NaN where there is none.
        weight_factor: the factor, broadcastable with the parameter, by which the step multiplied the weights once the update was in them, and which
            is no part of that (QK-Clip); 1 where it multiplied them by nothing, None where that is not known.
        read_by: how this adapter was chosen: "table", "names in the state", "numbers", one for each moment, or "nothing".
    """

    spectrum_of: str
    momentum: Reader = lambda reading: None
    second_moment: Callable[[Reading], SecondMoment | None] = lambda reading: None
    averages: Callable[[Reading], Averages] = lambda reading: Averages()
    kronecker: Callable[[Reading], Kronecker | None] = lambda reading: None
    clipped: Reader = lambda reading: None
    learning_rate: Callable[[Reading], float] = _LEARNING_RATE
    decoupled_decay: Callable[[Reading], float] = lambda reading: 0.0
    intended: Reader = lambda reading: None
    orthogonalisation: Orthogonalisation | None = None
    before: Callable[[Reading], Any] | None = None
    stacks: Callable[[Group], Sequence[Sequence[Tensor]]] | None = None
    correction: Reader = lambda reading: None
    rotation: Callable[[Reading], Sequence[Tensor] | None] = lambda reading: None
    trust_ratio: Callable[[Reading], float] = lambda reading: nan
    weight_factor: Reader = lambda reading: None
    read_by: str = "table"


def entry(*keys: str) -> Reader:
    """A reader of a tensor in the state, under the first of `keys` that is there."""

    def read(reading: Reading) -> Tensor | None:
        return next((reading.state[key] for key in keys if isinstance(reading.state.get(key), Tensor)), None)

    return read


def second_moment(key: str, form: str = "full") -> Callable[[Reading], SecondMoment | None]:
    """A reader of a second moment that the state holds under `key`."""

    def read(reading: Reading) -> SecondMoment | None:
        values = reading.state.get(key)
        return SecondMoment(values, form) if isinstance(values, Tensor) else None

    return read


def adam_update(moment: Tensor, v: Tensor, moment_weight: float, v_weight: float, eps: float) -> Tensor:
    """m̂/(√v̂ + ε) in float32, the weights being those of all gradients in each average, 1 − β₁ᵗ and 1 − β₂ᵗ."""
    return (moment.float() / moment_weight) / ((v.float() / v_weight).sqrt() + float(eps))


def number(setting: Any) -> float:
    """A group's setting as a number; NaN for what is none (optimizers that find their own learning rate set lr=None)."""
    try:
        return float(setting)
    except (TypeError, ValueError):
        return float("nan")
