"""Which matrix of a step an iteration was given: what X₀ is proportional to, in the best format it was in before it was normalised."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from .iterations import Chain
from .trace import Seen

_LOOKED_AT = 96  # matrices of X₀'s shape before the iteration that are looked at
_SAME_SIZE, _SAME_SIZE_FINE = 6e-3, 1e-5  # of norms that are one: rounding to bfloat16, and a norm taken in it; and to float32


@dataclass(frozen=True)
class Given:
    """One input.

    Attributes:
        at: which result of the step it is a part of.
        row: which matrix of that.
        transposed: whether it lies there as the transpose of X₀.
        exact: whether it was found before it was normalised; else it is X₀ itself.
    """

    at: tuple[int, int]
    row: int
    transposed: bool
    exact: bool


def given_to(chain: Chain, row: int, seen: Sequence[Seen]) -> Given | None:
    """What the iteration on one matrix of a chain was given; `seen` are all matrices that were made before it, in their order."""
    start = chain.start[row]
    size = float(start.norm())
    normalised: Given | None = None
    finest = 1.0
    best: tuple[float, Given, float] | None = None  # precision, what it is, its norm
    looked_at = 0
    for one in reversed(seen):
        if one.at[0] >= chain.began or {*one.shape[-2:]} != {*chain.shape[1:]}:
            continue
        looked_at += 1
        if looked_at > _LOOKED_AT:
            break
        for transposed in (False, True):
            if one.shape[-2:] != (chain.shape[:0:-1] if transposed else chain.shape[1:]):
                continue
            rows = _alike(one, chain, row, start.mT if transposed else start)
            if rows is None:
                continue
            norm = float(one.sample[rows].norm())
            found = Given(one.at, rows, transposed, abs(norm - size) > _same_size(one.dtype, chain.dtype) * size)
            if not found.exact and best is None:
                if torch.finfo(one.dtype).eps < finest:  # of X₀ in several formats the best
                    finest, normalised = torch.finfo(one.dtype).eps, found
                continue
            if best is None:
                best = (torch.finfo(one.dtype).eps, found, norm)
            elif abs(norm - best[2]) > _SAME_SIZE * best[2]:
                return best[1]
            elif torch.finfo(one.dtype).eps < best[0]:
                best = (torch.finfo(one.dtype).eps, found, norm)
            break
    return best[1] if best is not None else normalised


def _same_size(*formats: torch.dtype) -> float:
    return _SAME_SIZE if max(torch.finfo(dtype).eps for dtype in formats) > 1e-4 else _SAME_SIZE_FINE


def _alike(one: Seen, chain: Chain, row: int, start: Tensor) -> int | None:
    """Which matrix of a stack is proportional to X₀ of a row, within rounding of either format; of as many as the chain has the same one."""
    # Two roundings to bfloat16 leave 1.3e-6 of a cosine, three 2e-6.
    unlike = 6e-6 if max(torch.finfo(dtype).eps for dtype in (one.dtype, chain.dtype)) > 1e-4 else 1e-6
    count = one.sample.shape[0]
    candidates = [row] if count == chain.shape[0] else range(count) if count <= 64 else ()
    for i in candidates:
        other = one.sample[i]
        cosine = float((other * start).sum() / (other.norm() * start.norm()).clamp_min(1e-30))
        if abs(cosine) > 1 - unlike:
            return i
    return None
