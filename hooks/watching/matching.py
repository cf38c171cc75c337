"""Which matrix of which parameter an iteration's output moved: the one whose step goes with it, decay aside."""

from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from math import prod
from typing import Literal, TypeAlias

import torch
from torch import Tensor

from .iterations import Chain
from .trace import sample

# A parameter as one matrix, a slice of a stack, one of several blocks of rows or columns, or those rows or columns that the step chose.
Part: TypeAlias = Literal["whole", "slice", "rows", "columns", "selected rows", "selected columns"]
# What becomes of O on its way to the weights: a factor, one for every row or column, or something else.
Factor: TypeAlias = Literal["scale", "rows", "columns", "elements"]

_AXES: dict[Factor, int | None] = {"scale": None, "rows": 1, "columns": 0}

_ALIKE = 0.3  # partial correlation of output and step at least: chance makes 0.04, AdaMuon's division leaves over 0.5
_SURE = 0.5  # of what the second best lacks of 1 that the best may lack: updates of neighbouring layers are alike, too
_CHOSEN = 0.9  # correlation of a row of an output with the row of a parameter that it moved
_NO_WORSE = 1.3  # a single factor leaves as much as one for every row, which has as many parameters as there are rows
_ROUGH = 0.1  # of a step that even rounding to bfloat16 time and again leaves
_EXPLAINED = 0.03  # of a step that may be left where only a factor follows: outputs are rounded to bfloat16
_MAX_BLOCKS = 512
_SIGNIFICANT = 6.0  # standard errors of a decay that is one


@dataclass(frozen=True)
class Piece:
    """One of `count` matrices that a parameter may be orthogonalised as. `step` is W − W′; both are samples, shape (rows, cols)."""

    parameter: int  # its `id`
    part: Part
    index: int
    shape: tuple[int, int]
    step: Tensor
    weight: Tensor
    roundoff: float
    count: int


@dataclass(frozen=True)
class Match:
    """One iterated matrix and what it moved.

    Attributes:
        chain, row: the iteration, and which matrix of its stack.
        piece: what it moved.
        transposed: whether the iteration is on the transpose.
        likeness: partial correlation of output and step, the weights held fixed.
        factor: what follows the iteration.
        scale: s of W − W′ = sO + βW, least squares.
        decay: β; 0 where it does not differ from 0.
        cautious: whether β is of those entries of W alone that have the update's sign.
        unexplained: share of ‖W − W′‖ that sO + βW leaves.
    """

    chain: Chain
    row: int
    piece: Piece
    transposed: bool
    likeness: float
    factor: Factor
    scale: float
    decay: float
    cautious: bool
    unexplained: float


def match(chains: Sequence[Chain], before: Mapping[int, Tensor], after: Mapping[int, Tensor]) -> list[Match]:
    """What the outputs of complete chains moved; parameters' weights before and after the step, by their `id`.

    An iteration whose output moves no parameter is none of the optimizer's updates, and has no match.
    """
    outputs: dict[frozenset[int], list[tuple[Chain, int, Tensor]]] = {}
    for chain in chains:
        if chain.output is not None:
            rows = [row for row in range(chain.shape[0]) if float(chain.start_norms[row]) > 0]
            outputs.setdefault(frozenset(chain.shape[1:]), []).extend((chain, row, chain.output[row]) for row in rows)
    matches: list[Match] = []
    for shape, of_shape in outputs.items():
        pieces = [piece for key, weight in before.items() for piece in _pieces(key, weight, after[key], shape)]
        matches += _assign(of_shape, pieces)
    # A square block may also be a whole: what a parameter is as a whole comes first; and blocks are all of a parameter's, or none.
    whole = {m.piece.parameter for m in matches if m.piece.part == "whole"}
    count = Counter((m.piece.parameter, m.piece.part) for m in matches)
    matches = [m for m in matches if m.piece.parameter not in whole or m.piece.part == "whole"]
    matches = [m for m in matches if m.piece.part not in ("rows", "columns") or count[m.piece.parameter, m.piece.part] == m.piece.count]
    taken = {m.piece.parameter for m in matches}
    left = {key: weight for key, weight in before.items() if key not in taken}
    matched = {(id(m.chain), m.row) for m in matches}
    for chain in (chain for chain in chains if chain.output is not None and left):
        for row in range(chain.shape[0]):
            if (id(chain), row) not in matched and float(chain.start_norms[row]) > 0:
                found = selected(chain, row, left, after)
                matches += [found] if found is not None else []
    return matches


def selected(chain: Chain, row: int, before: Mapping[int, Tensor], after: Mapping[int, Tensor]) -> Match | None:
    """The parameter of which an output moved some rows or columns alone, whichever they are and in whatever order."""
    output = chain.whole_output(row)
    for key, weight in before.items():
        if weight.ndim != 2 or not weight.is_floating_point():
            continue
        for part, turn in (("selected rows", False), ("selected columns", True)):
            w, w_after = (t.detach().float().mT if turn else t.detach().float() for t in (weight, after[key]))
            for transposed in (False, True):
                o = output.mT if transposed else output
                if o.shape[1] != w.shape[1] or o.shape[0] >= w.shape[0]:
                    continue
                step = w - w_after
                step = step - w * ((step * w).sum(1, keepdim=True) / w.square().sum(1, keepdim=True).clamp_min(1e-30))
                likeness = torch.nn.functional.normalize(o.float(), dim=1) @ torch.nn.functional.normalize(step, dim=1).mT
                best, which = likeness.abs().max(dim=1)
                if float(best.median()) < _CHOSEN or len(set(which.tolist())) < len(which):
                    continue
                shape = (int(o.shape[0]), int(o.shape[1]))
                piece = Piece(key, part, 0, shape, sample(step[which])[0], sample(w[which])[0], torch.finfo(weight.dtype).eps / 2, 1)  # type: ignore[arg-type]
                return _measured(chain, row, sample(o.contiguous())[0], piece, transposed, float(best.median()))
    return None


def _pieces(key: int, before: Tensor, after: Tensor, shape: frozenset[int]) -> Iterator[Piece]:
    """What of a parameter has an iteration's shape: all of it, the slices of a stack, or its blocks of rows or columns."""
    before, after = before.detach(), after.detach()
    if before.ndim < 2 or not before.is_floating_point() or before.shape != after.shape or not before.numel():
        return
    roundoff = torch.finfo(before.dtype).eps / 2
    wide = torch.float64 if before.dtype == torch.float64 else torch.float32
    step, weight = before.to(wide) - after.to(wide), before.to(wide)
    if not bool(step.isfinite().all()) or not bool(step.any()):
        return
    for part, cut in _cuts(tuple(before.shape), shape):
        steps, weights = cut(step), cut(weight)
        size = (int(steps.shape[-2]), int(steps.shape[-1]))
        for i, (one, own) in enumerate(zip(sample(steps), sample(weights), strict=True)):
            yield Piece(key, part, i, size, one, own, roundoff, prod(steps.shape[:-2]))


def _cuts(size: tuple[int, ...], shape: frozenset[int]) -> Iterator[tuple[Part, Callable[[Tensor], Tensor]]]:
    """Ways of seeing a tensor of a size as matrices of a shape, whichever of its sides is which."""
    rows, cols = size[0], prod(size[1:])
    if {rows, cols} == shape:
        yield "whole", lambda tensor: tensor.reshape(rows, cols)
        return
    if len(size) > 2 and set(size[-2:]) == shape and prod(size[:-2]) <= _MAX_BLOCKS:
        yield "slice", lambda tensor: tensor
        return
    for is_rows, long, side in ((True, rows, cols), (False, cols, rows)):
        short = next(iter(shape - {side}), side)
        if side in shape and long > short and not long % short and long // short <= _MAX_BLOCKS:
            if is_rows:
                yield "rows", partial(_in_rows, count=long // short, cols=cols)
            else:
                yield "columns", partial(_in_columns, count=long // short, rows=rows)


def _in_rows(tensor: Tensor, count: int, cols: int) -> Tensor:
    return tensor.reshape(count, -1, cols)


def _in_columns(tensor: Tensor, count: int, rows: int) -> Tensor:
    return tensor.reshape(rows, count, -1).movedim(1, 0)


def _assign(outputs: Sequence[tuple[Chain, int, Tensor]], pieces: Sequence[Piece]) -> Iterator[Match]:
    """Every output to the piece that it goes with best, the surest first; each once."""
    if not pieces:
        return
    likeness = torch.full((len(outputs), len(pieces)), -1.0, dtype=torch.float64)
    turned = torch.zeros_like(likeness, dtype=torch.bool)
    for transposed in (False, True):
        of_kind = [j for j, piece in enumerate(pieces) if piece.shape == _shape(outputs[0][0], transposed)]
        if not of_kind:
            continue
        o = torch.stack([(one.mT if transposed else one).double().flatten() for _, _, one in outputs]).cpu()
        d, w = (torch.stack([getattr(pieces[j], name).double().flatten() for j in of_kind]).cpu() for name in ("step", "weight"))
        found = _partial_correlations(o, d, w).abs()
        better = found > likeness[:, of_kind]
        likeness[:, of_kind] = torch.where(better, found, likeness[:, of_kind])
        turned[:, of_kind] = torch.where(better, torch.tensor(transposed), turned[:, of_kind])
    free = likeness.clone()
    while True:
        best = int(free.argmax())
        i, j = divmod(best, len(pieces))
        if float(free[i, j]) < _ALIKE:
            return
        value = float(free[i, j])
        others = likeness[i].clone()
        others[j] = -1.0
        free[i, :] = free[:, j] = -1.0
        if 1 - value <= _SURE * (1 - float(others.max())):
            chain, row, output = outputs[i]
            transposed = bool(turned[i, j])
            yield _measured(chain, row, output.mT if transposed else output, pieces[j], transposed, value)


def _shape(chain: Chain, transposed: bool) -> tuple[int, int]:
    _, rows, cols = chain.shape
    return (cols, rows) if transposed else (rows, cols)


def _partial_correlations(o: Tensor, d: Tensor, w: Tensor) -> Tensor:
    """Of every row of o with every row of d, the same row of w held fixed; shape (len(o), len(d))."""
    ww = w.square().sum(1).clamp_min(1e-300)
    dw, ow = (d * w).sum(1), o @ w.mT
    dd = (d.square().sum(1) - dw.square() / ww).clamp_min(0)
    oo = (o.square().sum(1)[:, None] - ow.square() / ww).clamp_min(0)
    return torch.nan_to_num((o @ d.mT - ow * (dw / ww)) / (oo * dd).sqrt().clamp_min(1e-300))


def _measured(chain: Chain, row: int, output: Tensor, piece: Piece, transposed: bool, likeness: float) -> Match:
    o, d, w = (t.double() for t in (output.to(piece.step.device), piece.step, piece.weight))
    noise = piece.roundoff * float(w.norm()) / float(d.norm())  # of reading the step from rounded weights
    fits: list[tuple[float, Factor, bool, float, float]] = []
    for cautious in (False, True):
        decaying = w * (w * d > 0) if cautious else w
        for of_kind, axis in _AXES.items():
            scale, decay, left = _scale_and_decay(o, d, decaying, axis)
            fits.append((left, of_kind, cautious and decay != 0, scale, decay))
    # The simplest that leaves hardly more than the best does.
    least = min(left for left, *_ in fits)
    left, factor, cautious, scale, decay = min(
        (fit for fit in fits if fit[0] <= max(_NO_WORSE * least, noise)), key=lambda fit: (fit[1] != "scale", fit[2], fit[0])
    )
    if left > (_ROUGH if factor == "scale" else _EXPLAINED) + 2 * noise:
        factor = "elements"
        left, _, cautious, scale, decay = fits[0]
    return Match(chain, row, piece, transposed, likeness, factor, scale, decay, cautious, left)


def _scale_and_decay(o: Tensor, d: Tensor, w: Tensor, axis: int | None) -> tuple[float, float, float]:
    """Least squares of d = s·o + β·w, with one s, or one for every row (axis 1) or column (axis 0); RMS of s, β, and the share of ‖d‖ that is left.

    β is 0 where it does not differ from that by its standard error.
    """
    over = (0, 1) if axis is None else (axis,)
    oo = o.square().sum(over, keepdim=True).clamp_min(1e-300)

    def factors(of: Tensor) -> Tensor:
        return (o * of).sum(over, keepdim=True) / oo

    # What is left of w once it is fitted by the o alone carries β; so both are found together.
    apart, rest = w - factors(w) * o, d - factors(d) * o
    weight = float(apart.square().sum())
    decay = float((apart * rest).sum()) / weight if weight else 0.0
    left = rest - decay * apart
    if weight and abs(decay) <= _SIGNIFICANT * float(left.norm()) / (d.numel() ** 0.5 * weight**0.5):
        decay, left = 0.0, rest
    found = factors(d - decay * w)
    return float(found.square().mean().sqrt() * found.flatten()[0].sign()), decay, float(left.norm() / d.norm())
