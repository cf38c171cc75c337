"""One optimizer step of one matrix, as arrays, and everything that is measured on it."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Literal, TypeAlias

import numpy as np
from numpy.typing import NDArray

from ..catalogue import NS_STEPS
from ..newton_schulz.aol import aol_start
from ..newton_schulz.families import Coefficients, repeat_last
from ..newton_schulz.matrix_iteration import orthogonalised
from ..newton_schulz.spectral_map import achieved_residual, alignment, residual_curves
from ..spectra.spectrum import BFLOAT16_ROUNDOFF, Spectrum, largest_magnitude, precision_floor, spectrum
from ..spectra.spectrum_sketch import sketch
from .moments import Moments, measure_maps, measure_moments
from .output_dispersion import row_dispersion
from .rotation import Rotation, rotation_drift, rotation_gain
from .update_size import READABLE_NOISE, Sizes, reading_noise, rms, sizes, update_without_decay
from .variance_reduction import cosine, variance_ratio

Floats = NDArray[np.float64]
# Quantity name → value of one matrix: a number, or a vector along the quantity's extra dimension.
Measured: TypeAlias = dict[str, float | Floats]


@dataclass(frozen=True)
class NewtonSchulz:
    """How an optimizer orthogonalises: X₀, then one step per triple.

    Attributes:
        scaling: "frobenius": X₀ = M/max(‖M‖_F, eps); "aol": X₀ = diag(d)·M, row sums of |MMᵀ| at least eps (see :mod:`..newton_schulz.aol`).
    """

    coefficients: Coefficients
    eps: float
    scaling: Literal["frobenius", "aol"] = "frobenius"

    def repeated(self, steps: int) -> Coefficients:
        """Its first `steps` triples, the last one repeated; an optimizer set to zero steps has none to apply, and stays at X₀."""
        return repeat_last(self.coefficients, steps) if self.coefficients else ((1.0, 0.0, 0.0),) * steps


@dataclass(frozen=True)
class Observation:
    """What one optimizer step saw and did to one matrix, shape (rows, cols).

    Attributes:
        weight_before, weight_after: W_t and W_{t+1}, in their own format; arithmetic on them is in float64.
        weight_roundoff: unit roundoff of the format the weights are stored in.
        grad_rms, momentum_rms: RMS of gradient and first moment; NaN where there is none.
        lr: η that scales the update; of the parameter group, or what the optimizer makes of it.
        weight_decay: of the parameter group.
        decoupled_decay: the λ of W(1 − ηλ); 0 where decay is coupled or absent.
        ns_input: the matrix whose spectrum is measured: the exact NS input, or momentum or gradient where the optimizer
            does not orthogonalise; None where geometry is not measured.
        ns_roundoff: unit roundoff of the format `ns_input` is stored in.
        gram: as :func:`..spectra.spectrum.spectrum` takes it, of `ns_input`; None where that is to make it itself.
        newton_schulz: None where the optimizer does not orthogonalise.
        output_scale: s in ΔW = −η·s·O, decay aside; NaN where more than a scale follows the iteration.
        target_rms: RMS of ΔW/η if O were the exact polar factor, under the optimizer's own scaling.
        moments: first and second moment as kept; None where there is no second one.
        intended_rms: RMS of the update per learning rate before it was rounded into the weights, decay aside; NaN where not known.
        trust_ratio: the factor by which the optimizer scaled this matrix's step; NaN where it has none.
        gradient: G; None where nothing that was asked for needs it.
        gradient_roundoff: unit roundoff of the format `gradient` is stored in.
        corrected: the variance-reduced gradient that was averaged in the place of G; then `gradient` is there too.
        rotation: what the step did with the rotation that the optimizer keeps.
    """

    weight_before: NDArray[np.floating]
    weight_after: NDArray[np.floating]
    weight_roundoff: float
    grad_rms: float
    momentum_rms: float
    lr: float
    weight_decay: float
    decoupled_decay: float
    ns_input: NDArray[np.floating] | None = None
    ns_roundoff: float = 0.0
    gram: Floats | None = None
    newton_schulz: NewtonSchulz | None = None
    output_scale: float = float("nan")
    target_rms: float = float("nan")
    moments: Moments | None = None
    intended_rms: float = float("nan")
    trust_ratio: float = float("nan")
    gradient: NDArray[np.floating] | None = None
    gradient_roundoff: float = 0.0
    corrected: NDArray[np.floating] | None = None
    rotation: Rotation | None = None

    @property
    def applied(self) -> Floats:
        """W_t − W_{t+1}, everything included."""
        return self.weight_before.astype(np.float64) - self.weight_after

    @property
    def update(self) -> NDArray[np.floating]:
        """The update per learning rate, decoupled decay taken out."""
        return update_without_decay(self.weight_before, self.weight_after, self.lr, self.decoupled_decay)

    @cached_property
    def sizes(self) -> Sizes:
        """RMS values of W_t, `applied` and `update`."""
        return sizes(self.weight_before, self.weight_after, self.lr, self.decoupled_decay)

    @cached_property
    def update_noise(self) -> float:
        """Relative rounding error of the applied update as read back."""
        return reading_noise(self.sizes.weight, self.sizes.applied, self.weight_roundoff)

    @cached_property
    def spectrum(self) -> Spectrum | None:
        """Of the NS input; None where that is not there, zero, or not finite."""
        if self.ns_input is None or not np.isfinite(largest := largest_magnitude(self.ns_input)) or largest == 0:
            return None
        return spectrum(self.ns_input, unit_roundoff=self.ns_roundoff, gram=self.gram)

    @cached_property
    def output(self) -> NDArray[np.floating] | None:
        """O, read back from the applied update where nothing but a scale followed the iteration; None where it is not known so.

        In float32 unless the weights are float64: rounding it is less than what rounding the weights has left.
        """
        if self.newton_schulz is None or not self.update_noise <= READABLE_NOISE or not np.isfinite(self.output_scale):
            return None
        dtype = np.float64 if self.weight_before.dtype == np.float64 else np.float32
        return update_without_decay(
            self.weight_before, self.weight_after, self.lr, self.decoupled_decay, divided_by=self.output_scale, dtype=dtype
        )


def side_by_side(observations: Sequence[Observation]) -> Observation:
    """One observation of the matrix [M_1 … M_K], which an optimizer orthogonalises as one; settings are those of the first."""
    first = observations[0]

    def joined(field: Callable[[Observation], NDArray[np.floating] | None]) -> NDArray[np.floating] | None:
        parts = [field(seen) for seen in observations]
        return None if any(part is None for part in parts) else np.hstack([part for part in parts if part is not None])

    before, after = joined(lambda seen: seen.weight_before), joined(lambda seen: seen.weight_after)
    assert before is not None
    assert after is not None
    ns_input, gradient = joined(lambda seen: seen.ns_input), joined(lambda seen: seen.gradient)
    return replace(first, weight_before=before, weight_after=after, ns_input=ns_input, gram=None, gradient=gradient)


def part_of(seen: Observation, axis: int, indices: NDArray[np.int64]) -> Observation:
    """One observation of some rows (axis 0) or columns (axis 1), which the optimizer did not see as a matrix of their own."""

    def part(matrix: NDArray[np.floating]) -> NDArray[np.floating]:
        return np.asarray(matrix.take(indices, axis))

    ns_input = None if seen.ns_input is None else part(seen.ns_input)
    before, after = part(seen.weight_before), part(seen.weight_after)
    # What was said of the whole matrix alone is left out.
    return replace(
        seen,
        weight_before=before,
        weight_after=after,
        ns_input=ns_input,
        gram=None,
        newton_schulz=None,
        gradient=None,
        corrected=None,
        rotation=None,
        moments=None,
    )


# A run that diverges is data: inf and NaN come out, and no warning appears in somebody's training loop.
quietly = np.errstate(over="ignore", invalid="ignore", divide="ignore")


@quietly
def measure_update(seen: Observation) -> Measured:
    """The quantities of the group `update` (see the catalogue for each definition)."""
    update_rms, weight_rms = seen.sizes.applied, seen.sizes.weight
    return {
        "update_rms": update_rms,
        "update_norm": update_rms * float(np.sqrt(seen.weight_before.size)),
        "update_rms_per_lr": seen.sizes.update,
        "update_rms_target": seen.target_rms,
        "update_rms_intended": seen.intended_rms,
        "update_noise": seen.update_noise,
        "weight_rms": weight_rms,
        "grad_rms": seen.grad_rms,
        "momentum_rms": seen.momentum_rms,
        "update_to_weight": update_rms / weight_rms if weight_rms > 0 else float("nan"),
        "lr": seen.lr,
        "weight_decay": seen.weight_decay,
        "trust_ratio": seen.trust_ratio,
        **_correction(seen),
    }


def _correction(seen: Observation) -> Measured:
    if seen.corrected is None or seen.gradient is None:
        return {}
    return {
        "correction_variance_ratio": variance_ratio(seen.corrected, seen.gradient),
        "correction_cosine": cosine(seen.corrected, seen.gradient),
    }


@quietly
def measure_second_moment(seen: Observation) -> Measured:
    """The quantities of the group `second_moment` but its form; none without a second moment."""
    return {} if seen.moments is None else measure_moments(seen.moments)


@quietly
def measure_second_moment_map(seen: Observation) -> Measured:
    """The quantities of the group `second_moment_map`."""
    return {} if seen.moments is None else measure_maps(seen.moments)


@quietly
def measure_geometry(seen: Observation) -> Measured:
    """The quantities of the group `geometry` but `ns_schedule`; only `fro_norm` where the NS input is zero or not finite."""
    assert seen.ns_input is not None
    of_input = seen.spectrum
    if of_input is None:
        return {"fro_norm": rms(seen.ns_input) * float(np.sqrt(seen.ns_input.size))}
    measured: Measured = {
        "sigma_quantile": sketch(of_input.normalised),
        "fro_norm": of_input.fro_norm,
        "condition_number": of_input.condition_number,
        "condition_is_floor": of_input.condition_is_floor,
        "stable_rank": of_input.stable_rank,
        "below_floor": of_input.below_floor,
        "recoverable_share": _recoverable_share(of_input, *seen.ns_input.shape[:2]),
    }
    if seen.rotation is not None:
        measured["rotation_drift"], measured["rotation_gain"] = rotation_drift(seen.rotation), rotation_gain(seen.rotation)
    if seen.newton_schulz is not None:
        x, cosines = _start(seen.ns_input, of_input, seen.newton_schulz)
        measured["ns_residual"], measured["ns_residual_polar"] = residual_curves(x, seen.newton_schulz.repeated(NS_STEPS), cosines)
        if seen.output is not None:
            measured["ns_residual_achieved"] = achieved_residual(seen.output)
            measured["alignment"] = alignment(seen.ns_input, seen.output, of_input.nuclear_norm)
        output = seen.output if seen.output is not None else _replayed(seen.ns_input, seen.newton_schulz)
        measured["row_dispersion"], measured["column_dispersion"] = row_dispersion(output), row_dispersion(output.T)
    return measured


def _recoverable_share(of_input: Spectrum, rows: int, cols: int) -> float:
    return float(np.mean(of_input.normalised >= precision_floor(rows, cols, BFLOAT16_ROUNDOFF)))


def _replayed(ns_input: NDArray[np.floating], newton_schulz: NewtonSchulz) -> NDArray[np.floating]:
    """O of the optimizer's own schedule run once more, in float32."""
    return orthogonalised(ns_input, newton_schulz.coefficients, newton_schulz.eps, newton_schulz.scaling)


def _start(ns_input: NDArray[np.floating], of_input: Spectrum, newton_schulz: NewtonSchulz) -> tuple[Floats, Floats | float]:
    """Singular values of X₀, and the cosines that :func:`polar_residual` takes."""
    if newton_schulz.scaling == "aol":
        start = aol_start(ns_input, newton_schulz.eps)
        return start.x, start.cosines
    return of_input.sigma / max(of_input.fro_norm, newton_schulz.eps), 1.0
