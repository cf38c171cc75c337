"""Which known family a list of coefficients is, or was meant to be: corrupted copies circulate, lists of one with rows of another."""

from dataclasses import dataclass

from .families import FAMILIES, Coefficients, Family, Triple, repeat_last, safety_scaled

# Lists are copied with four decimals at the least.
ROUNDED = 6e-5

# What a slide deck prints of Jordan's: another a, and b without its sign.
MISPRINTED: Triple = (3.1415, 4.7750, 2.0315)


@dataclass(frozen=True)
class Nearest:
    """The known list that shares most rows with a given one.

    Attributes:
        family: its name.
        differing: rows, counted from 1, that are not the family's (its last held where it is shorter).
        shared: how many different triples are.
        taken: row → family whose row it is instead, where it is one.
        unnormalised: the factor that its authors divide ‖M‖_F by beside, where the list is as printed and that is not folded in; else 1.
    """

    family: str
    differing: tuple[int, ...]
    shared: int
    taken: dict[int, str]
    unnormalised: float = 1.0


def nearest_family(coefficients: Coefficients) -> Nearest | None:
    """The family with most rows in common, to four decimals; None where none has one.

    The first row may be the family's at another scale, (a/s, b/s³, c/s⁵) with s within 10 % of 1: that is a normalisation folded in.
    """
    best, fewest = None, (0, 0.0, 0)
    for family in FAMILIES.values():
        for form, pre in _forms(family):
            known = repeat_last(form, len(coefficients))
            same = [_equal(x, y) or (t == 0 and _rescaled(x, y)) for t, (x, y) in enumerate(zip(coefficients, known, strict=True))]
            # Of equals the list that is of that length, then the one whose first row needs no scale.
            rank = sum(same), float(_equal(coefficients[0], known[0])), -abs(len(form) - len(coefficients))
            if any(same) and rank > fewest:
                fewest = rank
                differing = tuple(t + 1 for t, equal in enumerate(same) if not equal)
                shared = len({row for row, equal in zip(known, same, strict=True) if equal})
                taken = {t: owner for t in differing if (owner := _owner(coefficients[t - 1], family.name))}
                best = Nearest(family.name, differing, shared, taken, pre)
    return best


def known_as_wrong(coefficients: Coefficients) -> str:
    """What is known to be wrong about a list, by its first triple; "" where nothing is."""
    first = coefficients[0]
    if _equal(first, MISPRINTED):
        return "Jordan's triple misprinted; it is (3.4445, −4.7750, 2.0315)"
    return next((family.wrong for family in FAMILIES.values() if family.wrong and _equal(first, family.coefficients[0])), "")


def _forms(family: Family) -> list[tuple[Coefficients, float]]:
    """How a family is written down: as it acts on σ/‖M‖_F, before its normalisation is folded in, and as printed."""
    forms = [(family.coefficients, 1.0)]
    if family.pre != 1:
        forms.append((safety_scaled(family.published, family.safety), family.pre))
    return forms


def _owner(row: Triple, other_than: str) -> str:
    return next((f.name for f in FAMILIES.values() if f.name != other_than and any(_equal(row, own) for own in f.coefficients)), "")


def _equal(x: Triple, y: Triple) -> bool:
    return all(abs(a - b) <= ROUNDED for a, b in zip(x, y, strict=True))


def _rescaled(x: Triple, y: Triple) -> bool:
    if not x[0] or not 0.9 < (s := y[0] / x[0]) < 1.1:
        return False
    return all(abs(a * s**power - b) <= 2e-5 * abs(b) + ROUNDED for a, b, power in zip(x, y, (1, 3, 5), strict=True))
