"""Minimax Newton–Schulz coefficients for any interval: the Polar Express recipe, and the matched schedule of each length.

Source: Amsel, Persson, Musco, Gower, "The Polar Express" (arXiv 2505.16932), Algorithm 1 and §4.
"""

from functools import cache
from math import sqrt

import numpy as np

from .families import Coefficients, Triple, fold_normalisation

# The cushion that reproduces the published list to 1e-8 (the authors' repository rounds it to 0.02).
CUSHION = 0.02407327424182761

# Design bounds ℓ per number of steps: they minimised the mean residual over spectra spanning three decades of difficulty.
MATCHED_LOWER_BOUND = {3: 1e-2, 4: 3e-3, 5: 1e-3, 6: 3e-4, 7: 1e-4, 8: 3e-5}
MATCHED_SAFETY = 1.01


def polar_express(lower: float, steps: int, *, cushion: float = CUSHION, safety: float = 1.0) -> Coefficients:
    """Quintics whose composition maps [lower, 1] as close to 1 as any composition of that length and degree can.

    Greedy: each p_t is the minimax odd quintic on [ℓ_t, u_t], then ℓ_{t+1} = p_t(ℓ_t), u_{t+1} = 2 − ℓ_{t+1}.
    Where ℓ_t < cushion·u_t, p_t is built on [cushion·u_t, u_t] and rescaled by 2/(p(ℓ_t) + p(u_t)), which centres its band.
    `safety` divides the argument of every polynomial but the last, and the interval follows what that polynomial
    really does: rounding that pushes a singular value past u_t is then not amplified.

    Args:
        lower: smallest normalised singular value the schedule is designed for, 0 < lower < 1.
        steps: number of polynomials, at least 1.
        cushion: 0 ≤ cushion < 1; 0 gives the plain minimax composition.
        safety: at least 1.

    Raises:
        ValueError: an argument outside its range.
    """
    if not 0 < lower < 1:
        raise ValueError(f"lower: expected a number between 0 and 1, got {lower}")
    if steps < 1:
        raise ValueError(f"steps: expected at least 1, got {steps}")
    if not 0 <= cushion < 1:
        raise ValueError(f"cushion: expected a number from 0 to below 1, got {cushion}")
    if not safety >= 1:
        raise ValueError(f"safety: expected at least 1, got {safety}")
    low, high = lower, 1.0
    triples: list[Triple] = []
    for t in range(steps):
        a, b, c = minimax_quintic(max(low, cushion * high), high)
        if low < cushion * high:
            centre = 2 / (_value((a, b, c), low) + _value((a, b, c), high))
            a, b, c = a * centre, b * centre, c * centre
        if t < steps - 1:
            a, b, c = a / safety, b / safety**3, c / safety**5
        triples.append((a, b, c))
        low = _value((a, b, c), low)
        high = 2 - low
    return tuple(triples)


def minimax_quintic(low: float, high: float) -> Triple:
    """The odd quintic closest to 1 on [low, high], by Remez exchange on its four alternation points (low, z₁, z₂, high).

    Each exchange solves a·z + b·z³ + c·z⁵ ± E = 1 and moves z₁, z₂ to the extrema z² = (−3b ± √(9b²−20ac))/(10c).
    """
    if low / high > 1 - 2e-5:
        # The system is singular to rounding there, and its limit is the classical quintic at scale `high`, in error by 3e-14
        # at most. (The authors switch at 5e-6; between the two the root below was seen to be that of a negative number.)
        return 15 / 8 / high, -10 / 8 / high**3, 3 / 8 / high**5
    inner = (0.75 * low + 0.25 * high, 0.25 * low + 0.75 * high)
    previous = float("inf")
    a = b = c = 0.0
    for _ in range(100):
        points = np.array([low, *inner, high])
        system = np.stack([points, points**3, points**5, [1.0, -1.0, 1.0, -1.0]], axis=1)
        a, b, c, error = (float(value) for value in np.linalg.solve(system, np.ones(4)))
        if abs(error - previous) < 1e-15:
            break
        previous = error
        root = sqrt(9 * b * b - 20 * a * c)
        inner = (sqrt((-3 * b - root) / (10 * c)), sqrt((-3 * b + root) / (10 * c)))
    return a, b, c


@cache
def matched_coefficients(steps: int) -> Coefficients:
    """The schedule designed for exactly `steps` steps, acting on x = σ/‖M‖_F.

    A prefix of a longer design is a poor short schedule (its band at 3 of 5 steps is [0.19, 1.87]), so that a varying
    step count needs one design per count. Division by 1.01·‖M‖_F, part of the design, is folded into the first triple.

    Raises:
        ValueError: no design is kept for that many steps (3 to 8 are).
    """
    if steps not in MATCHED_LOWER_BOUND:
        raise ValueError(f"steps: matched schedules exist for {min(MATCHED_LOWER_BOUND)} to {max(MATCHED_LOWER_BOUND)}, got {steps}")
    design = polar_express(MATCHED_LOWER_BOUND[steps], steps, safety=MATCHED_SAFETY)
    return fold_normalisation(design, MATCHED_SAFETY)


def _value(triple: Triple, x: float) -> float:
    a, b, c = triple
    return x * (a + x * x * (b + x * x * c))
