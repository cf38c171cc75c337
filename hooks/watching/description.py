"""What was found by watching a group's steps, as facts for the run and in words."""

from collections import Counter
from math import isnan
from typing import Any

from ..adapters import Group
from ..adapters.own_coefficients import own_coefficients
from .iterated import Iterated
from .watching import SAME_STEP, OfGroup

_PARTS = {
    "whole": "",
    "slice": ", slice by slice",
    "rows": ", in {} blocks of rows",
    "columns": ", in {} blocks of columns",
    "selected rows": ", on rows that each step selects",
    "selected columns": ", on columns that each step selects",
}
_THEN = {
    "scale": "",
    "rows": ", then a factor for every row",
    "columns": ", then a factor for every column",
    "elements": ", then more than a factor",
}


def facts(found: OfGroup, optimizer: object, group: Group) -> dict[str, Any]:
    """What has been found, with how well it fits; empty before a step was watched.

    `iterations`: every kind that was seen, with how many matrices it is run on. `unexplained`: the most that a polynomial step leaves of an iterate,
    relative. `difference`: of the copy's step from the optimizer's own. `failed`: why no copy could be stepped; `holds_coefficients`: whether the class
    refers to such coefficients all the same.
    """
    if found.failed:
        own = own_coefficients(optimizer, group)
        return {"failed": found.failed[-1], "holds_coefficients": own.one_triple or bool(own.lists)}
    if not found.found:
        return {"iterations": [], "matrices": found.matrices} if found.without else {}
    kinds = Counter(map(_kind, found.found.values()))
    names = ("coefficients", "dtype", "part", "parts", "then", "decay")
    return {
        "iterations": [{"count": count, **dict(zip(names, kind, strict=True))} for kind, count in kinds.most_common()],
        "matrices": found.matrices,
        "inputs": dict(found.inputs),
        "by_rule": found.rule is not None,
        "unexplained": max(one.unexplained for one in found.found.values()),
        **_rescaled(found),
        "difference": None if isnan(found.difference) else found.difference,
    }


def _rescaled(found: OfGroup) -> dict[str, Any]:
    """`weights_multiplied`: of how many matrices the weights were multiplied once the update was in them, and the `least` and `most` of those factors."""
    if not found.rescaled:
        return {}
    least, most = min(least for least, _ in found.rescaled.values()), max(most for _, most in found.rescaled.values())
    return {"weights_multiplied": {"matrices": len(found.rescaled), "least": least, "most": most}}


def _kind(one: Iterated) -> tuple[Any, ...]:
    decay = "cautious" if one.cautious else "decoupled" if one.decay else "none seen"
    return one.coefficients, str(one.dtype).removeprefix("torch."), one.part, one.parts, one.factor, decay


def spectrum_of(found: OfGroup, otherwise: str) -> str:
    """What the spectra of a group's matrices are of; `otherwise` is what those are of that no iteration was found for."""
    if found.failed:
        return f"{otherwise}; its step could not be watched ({found.failed[-1]})"
    if not found.found:
        return f"{otherwise}; no Newton–Schulz iteration in a step that was watched" if found.without else otherwise
    whole = [one for one in found.found.values() if one.part in ("whole", "slice")]
    texts = []
    if whole:
        inputs = ", ".join(text for text, _ in found.inputs.most_common(3))
        texts.append(f"exact NS input of {len(whole)} of {found.matrices} matrices: {inputs or 'not read any more'}")
    kinds = Counter(map(_kind, found.found.values())).most_common(3)
    texts.append(
        "found by watching a step: "
        + "; ".join(f"{len(c)} steps in {dtype}{_PARTS[part].format(parts)}{_THEN[then]}" for (c, dtype, part, parts, then, _), _ in kinds)
    )
    if len(whole) < found.matrices:
        texts.append(f"of the other {found.matrices - len(whole)}: {otherwise}")
    if rescaled := _rescaled(found):
        told = rescaled["weights_multiplied"]
        texts.append(
            f"once the update was in them, the weights of {told['matrices']} were multiplied by {_between(told['least'], told['most'])} (a clip, "
            "or a norm that is kept), and updates are recorded without that"
        )
    if found.difference > SAME_STEP:
        texts.append(f"the copy's step differed from the optimizer's by {found.difference:.2g} of it, and where it did: {otherwise}")
    return "; ".join(texts)


def _between(least: float, most: float) -> str:
    one, other = f"{least:.4g}", f"{most:.4g}"
    return one if one == other else f"{one} to {other}"


def read_by(found: OfGroup, otherwise: str) -> str:
    """How a group is read."""
    return f"watching a step, {otherwise}" if found.found else otherwise
