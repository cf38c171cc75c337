"""What is hazardous about a schedule, from its measured facts (:mod:`.facts`): each hazard a sentence with numbers, and advice.

Severities: "error" where update directions are reversed, values leave for infinity or a spectrum is ruined; "warning" where the schedule
does not do what such lists are for, or may not in bfloat16; "info" for what one should know and may well want.
"""

from collections.abc import Iterator
from math import isfinite

from ..finding import Finding, Severity, worst_first
from .facts import Validation
from .families import FAMILIES
from .hazards import Interval
from .nearest_family import known_as_wrong
from .spectral_map import gram_residual

# Output for x ≥ 0.01. The widest bands of lists in use are [0.774, 1.300] (cubic5) and [0.713, 1.281] (matched, 3 steps); prefixes of
# longer lists and wrong copies reach 1.56 and more.
BAND = (0.3, 1.5)
# Largest singular value in bfloat16 over that of exact arithmetic. Exact minimax without safety factor: 12.8 and 53; others: at most 1.13.
ROUNDING_GROWTH = 1.25
# Gram residual that a schedule which is simply continued should come under.
LIMIT_RESIDUAL = 0.1


def verdict(facts: Validation) -> tuple[Finding, ...]:
    """All hazards of a schedule, the worst first."""
    return tuple(worst_first(hazard for rule in _RULES for hazard in rule(facts)))


def outside(band: Interval) -> bool:
    """Whether an output band is wider than that of any list in use."""
    return not (BAND[0] <= band[0] and band[1] <= BAND[1])


def told(band: Interval) -> str:
    """Where values end, in words."""
    return f"end in [{band[0]:.3g}, {band[1]:.3g}]" if isfinite(band[0]) and isfinite(band[1]) else "grow beyond all bounds"


def _from(facts: Validation) -> str:
    return f"singular values from {facts.lower:g} to 1 of ‖M‖_F {told(facts.band)}"


def _known_wrong(facts: Validation) -> Iterator[Finding]:
    if wrong := known_as_wrong(facts.coefficients):
        yield Finding("known_wrong", "error", f"This is {wrong}.", "Take the list from its source.")


def _escape(facts: Validation) -> Iterator[Finding]:
    if left := facts.escape:
        sentence = f"Singular values reach {left.reached:.6g} after step {left.step}, and beyond {left.bound:.6g} the next step only enlarges them: {_from(facts)}."
        advice = "Divide (a, b, c) by (s, s³, s⁵) with s = 1.01 or more, or take another list."
        yield Finding("escape", "error", sentence, advice, numbers=left._asdict())


def _sign(facts: Validation) -> Iterator[Finding]:
    if facts.negative:
        low = facts.negative[0][0]
        # A first coefficient below zero turns every value, and no stable rank comes near 1e12.
        where = f"where the stable rank is below {low**-2:.4g}" if low > 1e-6 else "whatever its stable rank"
        sentence = (
            f"Singular values above {low:.4f} of ‖M‖_F turn negative: the update goes against its leading direction {where}, "
            "which no residual sees."
        )
        yield Finding("sign", "error", sentence, "Take coefficients whose first polynomial is positive up to 1.", numbers={"from": low})


def _cycled(facts: Validation) -> Iterator[Finding]:
    advice = "Past the end of a list hold its last triple, or take a list made for that many steps."
    again = facts.past_end["cycle"]
    if facts.restart is not None:
        sentence = f"The list begins anew at step {facts.restart + 1}, where values are no longer small: {_from(facts)}."
        yield Finding("cycled", "error" if outside(facts.band) else "warning", sentence, advice, numbers={"step": facts.restart + 1})
    elif facts.after_last == "cycle" and len(set(facts.coefficients)) > 1:
        sentence = f"One step more would begin the list anew, and singular values from {facts.lower:g} on would {told(again)}."
        yield Finding("cycled", "info", sentence, advice, numbers={"lowest": again[0], "highest": again[1]})


def _band(facts: Validation) -> Iterator[Finding]:
    low, high = facts.band
    if not outside(facts.band) or facts.escape or facts.negative or facts.restart is not None:
        return  # told already, with the reason
    numbers = {"lowest": low, "highest": high}
    at_lower = facts.lower * facts.slope
    steps = len(facts.coefficients)
    if high <= BAND[1] and low > 0.5 * min(at_lower, 1):
        sentence = f"{steps} step{'s are' if steps > 1 else ' is'} few for this list: x = {facts.lower:g} is raised to {low:.3g} alone."
        yield Finding("slow", "info", sentence, "Take more steps, or a list that is steeper at 0.", numbers=numbers)
        return
    nearest = facts.nearest
    cut = ""
    if nearest and not nearest.differing and steps < len(FAMILIES[nearest.family].coefficients):
        cut = f" They are the first {steps} of the {len(FAMILIES[nearest.family].coefficients)} triples of {nearest.family}; a prefix is a poor short schedule."
    severity: Severity = "warning" if isfinite(high) and isfinite(low) else "error"
    yield Finding(
        "band", severity, f"The coefficients do not orthogonalise: {_from(facts)}, where 1 is meant.{cut}",
        "Check the list against its source; take one made for this number of steps.", numbers=numbers,
    )  # fmt: skip


def _bfloat16(facts: Validation) -> Iterator[Finding]:
    largest, high = facts.bfloat16, max(facts.band[1], 1.0)
    if facts.restart is not None or not isfinite(high) or not largest > ROUNDING_GROWTH * high:
        return
    reached = f"{largest:.3g}" if isfinite(largest) else "infinity"
    sentence = f"In bfloat16 singular values of small matrices reach {reached}, where exact arithmetic ends at {high:.3f}: the list has no room for rounding."
    advice = "Run it in float32, or divide (a, b, c) of all triples but the last by (s, s³, s⁵), s = 1.01."
    yield Finding("bfloat16", "warning", sentence, advice, numbers={"largest": largest, "exact": high})


def _corrupted(facts: Validation) -> Iterator[Finding]:
    nearest = facts.nearest
    if nearest is None or not nearest.differing or nearest.shared < 2:
        return
    rows = ", ".join(f"{t} (of {nearest.taken[t]})" if t in nearest.taken else str(t) for t in nearest.differing)
    sentence = f"The list is {nearest.family} but for row{'s' if len(nearest.differing) > 1 else ''} {rows}."
    advice = f"If {nearest.family} is meant, copy it anew; if not, judge the list by its band."
    yield Finding("corrupted", "warning", sentence, advice, numbers={f"row_{t}": t for t in nearest.differing})


def _normalisation(facts: Validation) -> Iterator[Finding]:
    if facts.nearest and facts.nearest.unnormalised != 1:
        factor = facts.nearest.unnormalised
        sentence = f"{facts.nearest.family} as printed is for M/({factor:g}·‖M‖_F); here it is judged on M/‖M‖_F."
        advice = f"Divide the first triple by ({factor:g}, {factor:g}³, {factor:g}⁵) where the iteration starts from M/‖M‖_F."
        yield Finding("normalisation", "info", sentence, advice, numbers={"factor": factor})


def _no_convergence(facts: Validation) -> Iterator[Finding]:
    residual = float(gram_residual(facts.cycle)) if facts.cycle else float("nan")
    if facts.after_last == "exact" or not isfinite(facts.band[1]) or residual <= LIMIT_RESIDUAL:
        return
    if not facts.cycle:
        ends = "settles on no cycle of up to 64 values"
    elif len(facts.cycle) == 1:
        ends = f"converges to {facts.cycle[0]:.4f}, which leaves a residual of {residual:.3f}"
    else:
        values = " → ".join(f"{x:.4f}" for x in facts.cycle)
        ends = f"ends on a cycle of {len(facts.cycle)}, {values}, which leaves a residual of {residual:.3f}"
    yield Finding(
        "no_convergence", "info", f"The last triple repeated does not converge to 1: it {ends}.",
        "More steps do not lower the residual beyond that; close with a convergent triple, (2, −1.5, 0.5), where it matters.",
        numbers={"limit_residual": residual, "cycle": len(facts.cycle)},
    )  # fmt: skip


_RULES = (_known_wrong, _escape, _sign, _cycled, _band, _corrupted, _bfloat16, _no_convergence, _normalisation)
