"""Newton–Schulz coefficient families, as data.

One step of a family maps every singular value x to p(x) = a·x + b·x³ + c·x⁵. The first step sees x = σ/‖M‖_F; where a
family's authors divide by more than ‖M‖_F, that factor is folded into the first triple (:func:`fold_normalisation`), so
that a list of triples is the whole definition. Steps past the end of a list repeat its last triple.
"""

from dataclasses import dataclass
from typing import TypeAlias

Triple: TypeAlias = tuple[float, float, float]
Coefficients: TypeAlias = tuple[Triple, ...]


@dataclass(frozen=True)
class Family:
    """A named list of coefficient triples and where they were published."""

    name: str
    coefficients: Coefficients
    source: str


def repeat_last(coefficients: Coefficients, steps: int) -> Coefficients:
    """The triples of the first `steps` steps, the last triple repeated where the list is shorter.

    Raises:
        ValueError: `coefficients` is empty or `steps` is negative.

    >>> repeat_last(((3.0, 0.0, 0.0), (2.0, 0.0, 0.0)), 3)
    ((3.0, 0.0, 0.0), (2.0, 0.0, 0.0), (2.0, 0.0, 0.0))
    """
    if not coefficients:
        raise ValueError("coefficients: expected at least one (a, b, c) triple, got none")
    if steps < 0:
        raise ValueError(f"steps: expected 0 or more, got {steps}")
    return (coefficients + coefficients[-1:] * max(0, steps - len(coefficients)))[:steps]


def fold_normalisation(coefficients: Coefficients, factor: float) -> Coefficients:
    """The list that acts on σ/‖M‖_F as `coefficients` act on σ/(factor·‖M‖_F).

    p(x/f) = (a/f)·x + (b/f³)·x³ + (c/f⁵)·x⁵, so only the first triple changes.
    """
    return (_at_scale(coefficients[0], factor), *coefficients[1:])


def safety_scaled(coefficients: Coefficients, safety: float) -> Coefficients:
    """Every triple but the last made safe for singular values up to `safety` (Polar Express, arXiv 2505.16932, §4.4)."""
    return (*(_at_scale(triple, safety) for triple in coefficients[:-1]), coefficients[-1])


def _at_scale(triple: Triple, factor: float) -> Triple:
    a, b, c = triple
    return a / factor, b / factor**3, c / factor**5


JORDAN: Triple = (3.4445, -4.7750, 2.0315)

# The published list, ℓ = 1e-3, cushion 0.0240732743, before the safety factor.
POLAR_EXPRESS_RAW: Coefficients = (
    (8.28721201814563, -23.595886519098837, 17.300387312530933),
    (4.107059111542203, -2.9478499167379106, 0.5448431082926601),
    (3.9486908534822946, -2.908902115962949, 0.5518191394370137),
    (3.3184196573706015, -2.488488024314874, 0.51004894012372),
    (2.300652019954817, -1.6689039845747493, 0.4188073119525673),
    (1.891301407787398, -1.2679958271945868, 0.37680408948524835),
    (1.8750014808534479, -1.2500016453999487, 0.3750001645474248),
    (1.875, -1.25, 0.375),
)

FAMILIES: dict[str, Family] = {
    family.name: family
    for family in (
        Family("cubic", ((1.5, -0.5, 0.0),), "classical Newton–Schulz, order 3"),
        Family("quintic", ((15 / 8, -10 / 8, 3 / 8),), "classical Newton–Schulz, order 5"),
        Family("jordan", (JORDAN,), "KellerJordan/Muon; the default of torch.optim.Muon"),
        Family(
            "polar_express",
            # 1.01 twice: the authors' normalisation, and their safety factor on all but the last polynomial.
            fold_normalisation(safety_scaled(POLAR_EXPRESS_RAW, 1.01), 1.01),
            "arXiv 2505.16932 as published for use: safety 1.01, X0 = M/(1.01·‖M‖_F)",
        ),
    )
}
