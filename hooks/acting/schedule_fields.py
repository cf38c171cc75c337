"""How an optimizer takes a Newton–Schulz schedule: the fields of its parameter groups that hold steps and coefficients."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from torch.optim import Muon

from ...diagnostics.newton_schulz.families import Coefficients
from ..adapters import Group, class_name
from .muon_iteration import replace_torch_newton_schulz


@dataclass(frozen=True)
class ScheduleFields:
    """Where a parameter group takes steps and coefficients.

    Attributes:
        coefficients: the field that takes a list of triples, one per step; None where only the number of steps can be set.
        prepare: called before the first schedule; what the optimizer needs to understand such a list.
        steps: the field that takes the number of steps; None where the length of the list is it.
    """

    coefficients: str | None
    prepare: Callable[[], None] = lambda: None
    steps: str | None = "ns_steps"

    def write(self, group: dict[str, Any], coefficients: Coefficients) -> None:
        """Put the steps, and the coefficients if there is a field for them, into the group."""
        if self.steps is not None:
            group[self.steps] = len(coefficients)
        if self.coefficients is not None:
            # Plain containers, so that a checkpoint loads with weights_only; pytorch_optimizer insists on a list of tuples.
            group[self.coefficients] = [(a, b, c) for a, b, c in coefficients]
            if "safety_factor" in group:
                group["safety_factor"] = 1.0  # timm starts from M/(safety_factor·‖M‖_F); a schedule's coefficients act on σ/‖M‖_F


# Classes whose groups hold one triple, and yet a list can be put into force.
_OF_CLASS = {
    class_name(Muon): ScheduleFields("ns_coefficients", replace_torch_newton_schulz),
    "timm.optim.muon.Muon": ScheduleFields("ns_coefficients"),  # a name, a triple or a list, looked at in every step
}

# Every other class by its fields: pytorch_optimizer's Muon and its kin, then those that spell it as torch does.
COEFFICIENT_FIELDS = ("ns_coeffs", "ns_coefficients")

# Why a class that does orthogonalise takes no schedule, by the beginning of its full name, and what to do instead.
_STEPS_ELSEWHERE = {
    "heavyball": "heavyball runs five hard-coded Newton–Schulz steps; use torch.optim.Muon",
    "muon": "its number of steps is the default argument of a function; use torch.optim.Muon",
    "dion": "dion takes one Newton–Schulz function per optimizer; build an optimizer per operator, each with a newton_schulz_func of its own",
    "emerging_optimizers": "its steps are fixed when it is built; build an optimizer per operator, each with its own num_ns_steps",
    "pytorch_optimizer.optimizer.scion": (
        "it takes steps from `norm_kwargs`; give every operator a group with norm_type=LMONorm.SPECTRAL and norm_kwargs={'num_steps': …}"
        " (LMONorm.AUTO ignores them)"
    ),
}


def runs_newton_schulz(group: Group) -> bool:
    """Whether the group's number of steps is in the group, and its matrices are not left to AdamW."""
    return "ns_steps" in group and bool(group.get("use_muon", True)) and not group.get("use_fallback", False)


def fields_of(optimizer: object, group: Group) -> ScheduleFields:
    """How a group that :func:`runs_newton_schulz` takes a schedule."""
    for cls in type(optimizer).__mro__:
        if (fields := _OF_CLASS.get(class_name(cls))) is not None:
            return fields
    return ScheduleFields(next((key for key in COEFFICIENT_FIELDS if key in group and _takes_a_list(optimizer, group[key])), None))


def why_not(optimizer: object) -> str:
    """The sentence for an optimizer none of whose groups :func:`runs_newton_schulz`."""
    name = class_name(type(optimizer))
    prefix = next((prefix for prefix in _STEPS_ELSEWHERE if name.startswith(f"{prefix}.")), None)
    advice = "use torch.optim.Muon, or another Muon that reads its steps there" if prefix is None else _STEPS_ELSEWHERE[prefix]
    return f"optimizer: a schedule acts through `ns_steps` in the parameter groups, and those of {name} hold none: {advice}"


def gram_form_warning(group: Group, coefficients: Coefficients) -> str | None:
    """What there is to say where the Gram form of the iteration would run longer than it was set up for, None if nothing.

    pytorch_optimizer's `gram_newton_schulz` works in float16 on (XXᵀ) and starts anew after the steps `ns_reset_steps`. With
    its default (2,) and a matrix of condition number 1000, eight steps gave NaN; starting anew every two steps, an error of 1.4 %.
    """
    if group.get("ns_method") != "gram_newton_schulz" or len(coefficients) <= group["ns_steps"]:
        return None
    return (
        f"{len(coefficients)} steps of the Gram form in float16 that starts anew after {tuple(group.get('ns_reset_steps', ()))}: it can overflow to NaN; "
        f"set ns_reset_steps to {tuple(range(2, len(coefficients), 2))}, or ns_method to 'newton_schulz'"
    )


def _takes_a_list(optimizer: object, value: Any) -> bool:
    """Whether a list may stand in the place of these coefficients: not in that of one triple, nor, in a class that is not known, of a name."""
    if isinstance(value, str):
        return any(cls.__module__.startswith("pytorch_optimizer.") for cls in type(optimizer).__mro__)
    return not (isinstance(value, (list, tuple)) and bool(value) and isinstance(value[0], (int, float)))
