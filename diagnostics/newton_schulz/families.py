"""Newton–Schulz coefficient families, as data.

One step of a family maps every singular value x to p(x) = a·x + b·x³ + c·x⁵. The first step sees x = σ/‖M‖_F, or those of diag(d)·M
where a family starts from almost orthogonal rows (:mod:`.aol`). Where a family's authors divide by more than ‖M‖_F or shrink the argument
of its polynomials for safety, that is folded into the triples (:attr:`Family.coefficients`), so that a list of triples is the whole definition.
"""

from dataclasses import dataclass
from functools import cached_property
from typing import Literal, TypeAlias

Triple: TypeAlias = tuple[float, float, float]
Coefficients: TypeAlias = tuple[Triple, ...]
AfterLast: TypeAlias = Literal["repeat", "cycle", "exact"]


@dataclass(frozen=True)
class Family:
    """A named list of coefficient triples and how its authors run it.

    Attributes:
        name: its key in `FAMILIES`.
        published: the triples as its authors print them.
        source: where they were published, and to how many digits.
        steps: how many its authors take.
        after_last: what follows the last triple in their code: it is held ("repeat"), the list begins anew ("cycle"), or nothing, the list
            being for exactly its own number of steps ("exact").
        safety: s in (a/s, b/s³, c/s⁵), with which they run all triples but the last, or all (`safe_last`); 1 where it is in the triples.
        pre: their X₀ is M/(pre·‖M‖_F).
        eps: what they add to that norm, or bound it by, as far as known.
        scaling: "frobenius", or "aol" where X₀ is diag(d)·M.
        wrong: why the list is not to be used, where its authors withdrew it or it is a misprint.
    """

    name: str
    published: Coefficients
    source: str
    steps: int = 5
    after_last: AfterLast = "repeat"
    safety: float = 1.0
    safe_last: bool = False
    pre: float = 1.0
    eps: float = 1e-7
    scaling: Literal["frobenius", "aol"] = "frobenius"
    wrong: str = ""

    @cached_property
    def coefficients(self) -> Coefficients:
        """The list that acts on x, safety and normalisation folded in."""
        safe = safety_scaled(self.published, self.safety)
        if self.safe_last:
            safe = (*safe[:-1], _at_scale(safe[-1], self.safety))
        return fold_normalisation(safe, self.pre)

    def schedule(self, steps: int, after_last: AfterLast | None = None) -> Coefficients:
        """The triples of `steps` steps, beyond the list's end as `after_last` says, by default as its authors go on.

        Raises:
            ValueError: the list is for exactly its own number of steps, or would begin anew, which feeds values near 1 to polynomials made for
                small ones; with `after_last` given either is done.

        >>> [len(FAMILIES["polar_express"].schedule(steps)) for steps in (3, 12)]
        [3, 12]
        """
        own = len(self.coefficients)
        if after_last is None and self.after_last == "exact" and steps != own:
            raise ValueError(
                f'steps: {self.name} is a list for exactly {own} steps, got {steps}; after_last="repeat" cuts it or holds its last'
            )
        if after_last is None and self.after_last == "cycle" and steps > own > 1:
            raise ValueError(
                f'steps: {self.name} has {own} triples and its authors begin anew after them, which ruins the spectrum; got {steps}, '
                'after_last="repeat" holds the last triple instead'
            )  # fmt: skip
        return cycled(self.coefficients, steps) if after_last == "cycle" else repeat_last(self.coefficients, steps)


def repeat_last(coefficients: Coefficients, steps: int) -> Coefficients:
    """The triples of the first `steps` steps, the last triple repeated where the list is shorter.

    Raises:
        ValueError: `coefficients` is empty or `steps` is negative.

    >>> repeat_last(((3.0, 0.0, 0.0), (2.0, 0.0, 0.0)), 3)
    ((3.0, 0.0, 0.0), (2.0, 0.0, 0.0), (2.0, 0.0, 0.0))
    """
    _require(coefficients, steps)
    return (coefficients + coefficients[-1:] * max(0, steps - len(coefficients)))[:steps]


def cycled(coefficients: Coefficients, steps: int) -> Coefficients:
    """The triples of the first `steps` steps where the list begins anew after its end. A hazard for all lists of different triples.

    Raises:
        ValueError: `coefficients` is empty or `steps` is negative.
    """
    _require(coefficients, steps)
    return tuple(coefficients[t % len(coefficients)] for t in range(steps))


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


def _require(coefficients: Coefficients, steps: int) -> None:
    if not coefficients:
        raise ValueError("coefficients: expected at least one (a, b, c) triple, got none")
    if steps < 0:
        raise ValueError(f"steps: expected 0 or more, got {steps}")


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

# Safety 1.02 on the first four, cushion 0.02.
_SPEEDRUN: Coefficients = (
    (8.156554524902461, -22.48329292557795, 15.878769915207462),
    (4.042929935166739, -2.808917465908714, 0.5000178451051316),
    (3.8916678022926607, -2.772484153217685, 0.5060648178503393),
    (3.285753657755655, -2.3681294933425376, 0.46449024233003106),
    (2.3465413258596377, -1.7097828382687081, 0.42323551169305323),
)
_YOU: Coefficients = (
    (4.0848, -6.8946, 2.9270), (3.9505, -6.3029, 2.6377), (3.7418, -5.5913, 2.3037), (2.8769, -3.1427, 1.2046), (2.8366, -3.0525, 1.2012),
)  # fmt: skip
_NVIDIA: Coefficients = (
    (8.2051, -22.9019, 16.4607), (4.0664, -2.8612, 0.5184), (3.9096, -2.8234, 0.5250), (3.2856, -2.4153, 0.4853),
    (2.2779, -1.6198, 0.3985), (1.8726, -1.2307, 0.3585), (1.8564, -1.2132, 0.3568), (1.875, -1.25, 0.375),
)  # fmt: skip
_NVIDIA_BEFORE: Coefficients = (
    (7.2086, -15.5131, 9.0178), (3.9623, -2.5813, 0.4542), (3.9466, -2.5765, 0.4544), (3.8991, -2.5671, 0.4566),
    (3.7186, -2.5308, 0.4653), (3.1390, -2.3073, 0.4733), (2.1715, -1.5246, 0.3885), (1.8648, -1.2224, 0.3577),
)  # fmt: skip
_CANS: Coefficients = (
    (8.4703, -25.1081, 18.6293), (4.1828, -3.1087, 0.5806), (3.9619, -2.9541, 0.5630), (3.2866, -2.4647, 0.5074), (2.2737, -1.6447, 0.4162),
)  # fmt: skip
_AOL_NVIDIA: Coefficients = (
    (4.0098, -7.0585, 2.4635), (3.4585, -5.5479, 2.5959), (2.7573, -3.2939, 1.4254), (2.7215, -3.0494, 1.3169),
)  # fmt: skip
_AOL_FLASH: Coefficients = (
    (4.6051, -9.6552, 5.6769), (4.7505, -6.0861, 2.1790), (2.7763, -2.3190, 0.5523), (2.4231, -2.2861, 0.8193),
)  # fmt: skip
_CUBIC5: Coefficients = (
    (3.3656576, -3.3420992, 0.0), (2.5744352, -1.4957376, 0.0), (2.5368962, -1.4312570, 0.0), (2.4418906, -1.2764040, 0.0),
    (2.2230472, -0.9630650, 0.0),
)  # fmt: skip

# Short and long side of the matrices that ROOT's authors fitted a triple for, to four decimals; all others get Jordan's.
ROOT: dict[tuple[int, int], Triple] = {
    (2048, 2048): (3.4916, -4.8224, 2.1095),
    (2048, 3072): (3.4509, -4.5790, 1.9325),
    (2048, 8192): (2.9794, -3.6674, 1.6207),
    (2048, 16384): (3.1943, -3.8221, 1.5322),
}
_ROOT_SOURCE = "arXiv 2511.20626 and huawei-noah/noah-research; 4 decimals, fitted for this shape"

FAMILIES: dict[str, Family] = {
    family.name: family
    for family in (
        Family("cubic", ((1.5, -0.5, 0.0),), "classical Newton–Schulz, order 3; exact", eps=0.0),
        Family("quintic", ((15 / 8, -10 / 8, 3 / 8),), "classical Newton–Schulz, order 5; exact", eps=0.0),
        Family("jordan", (JORDAN,), "KellerJordan/Muon; the default of torch.optim.Muon; 4 decimals"),
        Family("you", _YOU, "modded-nanogpt's history, Dion, NVIDIA's “quintic”; 4 decimals", after_last="cycle"),
        Family("polar_express_raw", POLAR_EXPRESS_RAW, "arXiv 2505.16932 before its safety factor; 16 digits"),
        # 1.01 twice: the authors' normalisation, and their safety factor on all but the last polynomial.
        Family(
            "polar_express", POLAR_EXPRESS_RAW, "arXiv 2505.16932 as published for use: safety 1.01, X0 = M/(1.01·‖M‖_F); 16 digits",
            safety=1.01, pre=1.01,
        ),
        Family(
            "polar_express_speedrun", _SPEEDRUN, "modded-nanogpt and Dion: cushion 0.02, safety 1.02 inside; 16 digits", after_last="exact",
            pre=1.02, eps=1e-6,
        ),
        Family(
            "polar_express_gram", POLAR_EXPRESS_RAW[:5], "Dao-AILab/gram-newton-schulz: safety 1.05 on all five; 16 digits",
            after_last="exact", safety=1.05, safe_last=True,
        ),
        Family("polar_express_nvidia", _NVIDIA, "NVIDIA Emerging-Optimizers since November 2025: safety 1.01 inside; 4 decimals"),
        Family(
            "polar_express_nvidia_old", _NVIDIA_BEFORE, "NVIDIA Emerging-Optimizers before November 2025; 4 decimals",
            wrong="Polar Express as NVIDIA's Emerging-Optimizers had it before November 2025",
        ),
        Family("cans", _CANS, "arXiv 2506.10935 as in NVIDIA Emerging-Optimizers: exact minimax on [1e-3, 1]; 4 decimals"),
        Family(
            "aol_nvidia", _AOL_NVIDIA, "NVIDIA Emerging-Optimizers' “aol”, which in spite of its name starts from M/‖M‖_F; 4 decimals",
            steps=4, after_last="cycle",
        ),
        Family(
            "aol_flash", _AOL_FLASH, "thib-s/flash-newton-schulz (arXiv 2512.04632) and Dion's fast function; 4 decimals", steps=4,
            after_last="exact", scaling="aol",
        ),
        Family("deepseek_v4", (JORDAN,) * 8 + ((2.0, -1.5, 0.5),) * 2, "NVIDIA Emerging-Optimizers' “deepseekv4”; 4 decimals", steps=10),
        Family("cubic5", _CUBIC5, "arXiv 2606.00371; 7 decimals; two products a step instead of three", after_last="exact"),
        *(Family(f"root_{short}x{long}", (triple,), _ROOT_SOURCE, eps=1e-7) for (short, long), triple in ROOT.items()),
    )
}  # fmt: skip


def root(rows: int, cols: int) -> Family:
    """What ROOT orthogonalises a matrix of this shape with: the family fitted for it, else Jordan's.

    >>> root(8192, 2048).name, root(64, 64).name
    ('root_2048x8192', 'jordan')
    """
    return FAMILIES.get(f"root_{min(rows, cols)}x{max(rows, cols)}", FAMILIES["jordan"])
