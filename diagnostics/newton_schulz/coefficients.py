"""A list of coefficients for any family and any number of steps, to put into force or to ask what if."""

from .families import FAMILIES, Coefficients, Family, repeat_last
from .polar_express import matched_coefficients

# What acts on σ/‖M‖_F, which is what a schedule in force is given and what spectra are recorded as. "matched" is one design per step count.
SCHEDULE_FAMILIES: tuple[str, ...] = (
    "matched", "jordan", "polar_express",
    *(name for name, f in FAMILIES.items() if f.scaling == "frobenius" and name not in ("jordan", "polar_express")),
)  # fmt: skip


def matched(steps: int) -> Family:
    """The design for that many steps, as a family of its own."""
    return Family(
        "matched", matched_coefficients(steps), f"arXiv 2505.16932, designed anew for every number of steps, here {steps}", steps, "exact"
    )


def coefficients_of(family: str, steps: int) -> Coefficients:
    """The first `steps` triples of a family, the last held where the list is shorter; of "matched" the design for that many steps.

    Where a family's authors would begin the list anew or take no other number of steps (:meth:`.Family.schedule` raises there), holding the
    last triple is the one continuation that does no harm; a cut list remains a poor short schedule, and :mod:`.validation` says how poor.

    Raises:
        ValueError: no such family, fewer than 1 step, or a number of steps that "matched" has no design for (it has 3 to 8).

    >>> coefficients_of("you", 7)[4:] == FAMILIES["you"].coefficients[-1:] * 3
    True
    """
    if family not in SCHEDULE_FAMILIES:
        raise ValueError(f"family: expected one of {', '.join(SCHEDULE_FAMILIES)}, got {family!r}")
    if family == "matched":
        return matched_coefficients(steps)
    if steps < 1:
        raise ValueError(f"steps: expected at least 1, got {steps}")
    return repeat_last(FAMILIES[family].coefficients, steps)
