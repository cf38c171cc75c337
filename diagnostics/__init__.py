"""What is measured: pure functions of arrays, the catalogue of quantities, operator names, the schedule file."""

from .catalogue import QUANTITIES, Quantity
from .newton_schulz.families import FAMILIES, JORDAN, Coefficients, Family, Triple, repeat_last
from .newton_schulz.polar_express import matched_coefficients, polar_express
from .newton_schulz.probed_residual import ProbedResidual, probed_residual
from .newton_schulz.spectral_map import achieved_residual, alignment, gram_residual, ns_flops, ns_map, polar_residual, residual_curves
from .operators import OPERATORS, classify, layer_index
from .schedules.schedule_file import OperatorSchedule, Schedule
from .spectra.spectrum import Spectrum, precision_floor, spectrum

__all__ = [
    "FAMILIES", "JORDAN", "OPERATORS", "QUANTITIES",
    "Coefficients", "Family", "OperatorSchedule", "ProbedResidual", "Quantity", "Schedule", "Spectrum", "Triple",
    "achieved_residual", "alignment", "classify", "gram_residual", "layer_index", "matched_coefficients",
    "ns_flops", "ns_map", "polar_express", "polar_residual", "precision_floor", "probed_residual", "repeat_last", "residual_curves", "spectrum",
]  # fmt: skip
