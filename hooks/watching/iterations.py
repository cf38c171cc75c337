"""Newton–Schulz iterations in a step: chains of X that are multiplied by their own transposes, each a polynomial of the one before."""

from bisect import bisect
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass, field
from itertools import islice, product
from math import nan
from typing import TypeAlias

import torch
from torch import Tensor

from .trace import SIDE, Seen, Trace, sample, take

Triple: TypeAlias = tuple[float, float, float]

_SIDE = 96  # rows and columns of the samples that coefficients are fitted to
# Of an iterate that a polynomial of the one before may leave unexplained: bfloat16 leaves 0.01 to 0.03, float32 whose products are of TF32 0.002.
# A gradient with a preconditioner that is nearly 1 is within a few hundredths of one.
_LINKED, _LINKED_FINE = 0.08, 0.01
_COMPLETE = 0.02  # share of the smaller coefficient in the larger, of a step that is one: parts of it (aX, bAX) are none
# Standard errors, and relative distance, within which a coefficient is a number that was handed in: rounding to bfloat16 is no independent noise.
_ERRORS, _NEAR, _NEAR_COARSE = 10.0, 2e-3, 2e-2
_AS_GOOD, _ROUNDING = 1.2, 4e-7  # of the least that any triple leaves, what handed numbers may leave; and what float32 does, of ‖y‖
_MOST_HANDED = 8  # numbers of which all triples are tried
_SCALED = 1e-2  # of an iterate that is the one before times a number, what rounding to bfloat16 leaves at most
_LOOKED_AT = 48  # matrices of an iterate's shape that are looked at for its output
_LEAST_RANK = 5  # any odd function of fewer singular values than a polynomial has coefficients is one


@dataclass
class Chain:
    """One iteration, on one matrix or a stack of them.

    Attributes:
        shape: of X₀ as it is iterated on, (B, r, q), short side first.
        dtype: its format.
        start: sample of X₀.
        start_norms: ‖X₀‖_F of every matrix, shape (B,).
        last: the last iterate that was multiplied by its transpose.
        steps: triple of every step and what it leaves unexplained, relative; the last one once it is found.
        output_at: number of the operation that made the output.
        output: sample of the output, as X is sampled; None before it is found.
    """

    shape: tuple[int, int, int]
    dtype: torch.dtype
    start: Tensor
    start_norms: Tensor
    last: Tensor
    steps: list[tuple[Triple, float]] = field(default_factory=list)
    products: list[int] = field(default_factory=list)  # numbers of all such operations
    made_after: int | None = None  # operations from such a product to the next iterate, in the last step but one
    output_at: int | None = None
    output: Tensor | None = None
    _columns: Tensor | None = None

    @property
    def began(self) -> int:
        """Number of the operation that multiplied X₀ by its transpose."""
        return self.products[0]

    @property
    def ended(self) -> int:
        """Number of the last such operation."""
        return self.products[-1]

    @property
    def triples(self) -> list[Triple]:
        return [triple for triple, _ in self.steps]

    @property
    def unexplained(self) -> float:
        """The most that a step leaves unexplained."""
        return max((left for _, left in self.steps), default=0.0)

    def columns(self) -> Tensor:
        """Samples of X, (XXᵀ)X and (XXᵀ)²X of the last iterate, shape (B, rows, cols, 3)."""
        if self._columns is None:
            self._columns = sampled_powers(self.last, SIDE)
        return self._columns

    def whole_output(self, row: int) -> Tensor:
        """O of one matrix, made from the last iterate by the last step, shape (r, q)."""
        a, b, c = self.triples[-1]
        x, x3, x5 = powers(self.last[row])
        return a * x + b * x3 + c * x5


def powers(x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """X, (XXᵀ)X and (XXᵀ)²X, in float32 (float64 of a float64 X)."""
    x = x if x.dtype == torch.float64 else x.float()
    gram = x @ x.mT
    x3 = gram @ x
    return x, x3, gram @ x3


def sampled_powers(x: Tensor, side: int) -> Tensor:
    """The same on a grid of rows and columns alone, shape (B, rows, cols, 3), at the price of a few products with so many vectors."""
    x = x if x.dtype == torch.float64 else x.float()
    rows, columns = take(x, -2, side), take(x, -1, side)
    of_rows = rows @ x.mT  # rows of XXᵀ
    x3 = of_rows @ columns
    x5 = of_rows @ (x @ (x.mT @ columns))
    return torch.stack([take(columns, -2, side), x3, x5], -1)


def fit(
    columns: Tensor, y: Tensor, handed: Collection[float] = (), dtype: torch.dtype = torch.float64, before: Triple | None = None
) -> tuple[Triple, float]:
    """Least squares of (a, b, c), and the share of ‖y‖ that they leave; two columns are (a, b) alone. All matrices of a stack have one triple.

    Of a matrix with small singular values alone c is hardly told, of one whose are all about 1 only a + b + c, and bfloat16 tells nothing to better
    than a hundredth: where numbers that the step's operations were `handed` fit as well, they are the triple; as well as others, that of the
    step `before`. `dtype` is the format of the iteration.
    """
    m, v = columns.reshape(-1, columns.shape[-1]).double(), y.reshape(-1).double()
    size = float(v.norm())
    if not 0 < size < float("inf"):
        return (nan, nan, nan), 1.0
    r = torch.linalg.qr(torch.cat([m, v[:, None]], 1), mode="r").R
    if not bool(r.isfinite().all()):
        return (nan, nan, nan), 1.0
    m, v = r[:, :-1], r[:, -1]  # the same least squares in as many rows as there are columns
    scale = m.norm(dim=0).clamp_min(1e-300)
    known = (torch.linalg.pinv(m / scale) @ v / scale).tolist()
    if handed and len(known) == 3:
        least = float((m @ torch.tensor(known, dtype=m.dtype, device=m.device) - v).norm())
        most = _AS_GOOD * least + max(torch.finfo(dtype).eps, _ROUNDING) * size
        known = _of_handed(m, v, handed, most, before) or _one_by_one(m, v, columns[..., 0].numel(), handed, dtype)
    a, b, c = (*known, 0.0, 0.0)[:3]
    solution = torch.tensor(known, dtype=m.dtype, device=m.device)
    return (a, b, c), float((m @ solution - v).norm()) / size


def _of_handed(m: Tensor, v: Tensor, handed: Collection[float], most: float, before: Triple | None) -> list[float] | None:
    """The triple of handed numbers, of either sign and c perhaps 0, that leaves least; None where the least is too much.

    Of those that leave as little, the one of the step before, or one of the signs that all published have.
    """
    if len(handed) > _MOST_HANDED:
        return None
    either = [sign * value for value in handed for sign in (1, -1) if value]
    triples = list(product(either, either, [*either, 0.0]))
    if before is not None and before not in triples and {abs(value) for value in before if value} <= {abs(value) for value in handed}:
        triples.append(before)
    if not triples:
        return None
    left = (torch.tensor(triples, dtype=m.dtype, device=m.device) @ m.mT - v).norm(dim=1)
    least = float(left.min())
    if least > most:
        return None
    as_good = [triples[i] for i in (left <= min(most, _AS_GOOD * least + _ROUNDING * float(v.norm()))).nonzero().flatten().tolist()]
    usual = [triple for triple in as_good if triple[0] > 0 > triple[1] and triple[2] >= 0]
    if before is not None and before in as_good:
        return list(before)
    # A number that was handed in once is one coefficient.
    best = min(
        usual or as_good, key=lambda triple: (triple.count(0.0) + len({*map(abs, triple)} - {0.0}) < 3, float(left[triples.index(triple)]))
    )
    return list(best)


def _one_by_one(m: Tensor, v: Tensor, count: int, handed: Collection[float], dtype: torch.dtype) -> list[float]:
    """The same where a number has been made of others: each coefficient within its error of a handed number is that. `a` is told best, and first."""
    near_enough = _NEAR if torch.finfo(dtype).eps < 1e-5 else _NEAR_COARSE
    v = v.clone()
    known: list[float] = []
    while (left := m.shape[1] - len(known)) > 0:
        rest = m[:, len(known) :]
        scale = rest.norm(dim=0).clamp_min(1e-300)
        inverse = torch.linalg.pinv(rest / scale)
        found = inverse @ v / scale
        error = float((rest @ found - v).norm()) / count**0.5 * float(inverse[0].norm()) / float(scale[0])
        estimate = float(found[0])
        near = min(handed, key=lambda value: min(abs(value - estimate), abs(-value - estimate)))
        near = -near if abs(-near - estimate) < abs(near - estimate) else near
        known.append(near if abs(near - estimate) <= max(_ERRORS * error, near_enough * abs(near)) else estimate)
        v -= m[:, -left] * known[-1]
    return known


class Iterations:
    """Finds chains while a step goes on."""

    def __init__(self, trace: Trace) -> None:
        """`trace` grows with the operations."""
        self.chains: list[Chain] = []
        self._trace = trace

    def see(self, number: int, x: Tensor) -> None:
        """Take an X that is multiplied by its transpose for the next iterate of a chain, else for the first of one."""
        shape = (x.shape[:-2].numel(), int(x.shape[-2]), int(x.shape[-1]))
        if shape[1] < _LEAST_RANK:
            return
        x = x.detach().reshape(shape)
        taken = sample(x)
        if not bool(taken.isfinite().all()):
            return
        for chain in reversed(self.chains):
            if chain.shape != shape or chain.dtype != x.dtype:
                continue
            if not chain.steps and _scaled(chain.start, taken) and not _multiplied(chain, number, self._trace):
                self.chains = [one for one in self.chains if one is not chain]  # a product for the norm that X is divided by, and no step
                break
            if fit(chain.columns(), taken)[1] < _linked(chain):
                handed, before = _handed(self._trace, chain.ended, number), chain.triples[-1] if chain.steps else None
                chain.steps.append(fit(sampled_powers(chain.last, _SIDE), sample(x, _SIDE), handed, x.dtype, before))
                chain.made_after = self._made_after(chain, taken)
                chain.products.append(number)
                chain.last, chain._columns = x.clone(), None
                return
        norms = torch.linalg.matrix_norm(x.float())
        if bool((norms > 0).any()):
            self.chains.append(Chain(shape, x.dtype, taken, norms, x.clone(), products=[number]))

    def _made_after(self, chain: Chain, taken: Tensor) -> int | None:
        """How many operations after the product an iterate was made."""
        return next(
            (
                at - chain.ended
                for one in _after(chain, self._trace)
                for at, seen_as in _as_iterated(one, chain)
                if torch.equal(seen_as, taken)
            ),
            None,
        )


def _linked(chain: Chain) -> float:
    return _LINKED if torch.finfo(chain.dtype).eps > 1e-5 else _LINKED_FINE


def _scaled(x: Tensor, y: Tensor) -> bool:
    """Whether every matrix of a stack is the other's times a number of its own."""
    a, b = (one.flatten(1).double() for one in (x, y))
    size = a.norm(dim=1) * b.norm(dim=1)
    return bool(((a * b).sum(1).abs() >= (1 - _SCALED**2 / 2) * size).all())


def _multiplied(chain: Chain, end: int, trace: Trace) -> bool:
    """Whether matrices were multiplied to one of X's shape since its last product: the first step on small singular values alone is nearly aX."""
    shape = {*chain.shape[1:]}
    return any({*made[-2:]} == shape for number, made in trace.products if chain.ended < number < end)


def _handed(trace: Trace, first: int, end: int) -> set[float]:
    """The numbers that operations were handed."""
    return {value for number in range(first, end) for value in trace.scalars[number]}


def _after(chain: Chain, trace: Trace) -> Iterator[Seen]:
    """What was made after the last product."""
    return islice(trace.seen, bisect(trace.seen, chain.ended, key=lambda one: one.at[0]), None)


def find_output(chain: Chain, trace: Trace) -> None:
    """Add the last step of a chain: what was made after it as the iterates were, else the first whole polynomial of its last iterate.

    A step that is added up from its parts passes through bAX and aX + bAX, polynomials of less; where all singular values are about 1, no
    part can be told from the whole.
    """
    taken = list(islice((seen_as for seen in _after(chain, trace) for seen_as in _as_iterated(seen, chain)), _LOOKED_AT))
    expected = None if chain.made_after is None else chain.ended + chain.made_after
    found = next((seen_as for seen_as in taken if seen_as[0] == expected and fit(chain.columns(), seen_as[1])[1] <= _linked(chain)), None)
    found = found or _whole(chain, taken, trace)
    if found is not None:
        chain.output_at, chain.output = found
        handed = _handed(trace, chain.ended, found[0] + 1)
        chain.steps.append(fit(chain.columns(), found[1], handed, chain.dtype, chain.triples[-1] if chain.steps else None))


def _whole(chain: Chain, taken: Sequence[tuple[int, Tensor]], trace: Trace) -> tuple[int, Tensor] | None:
    """The last whose triple is of handed numbers, before factors that follow change it; else the first whole polynomial."""
    shorter = whole = of_handed = None
    for at, output in taken:
        (a, b, c), left = fit(chain.columns(), output)
        if left > _linked(chain) or min(abs(a), abs(b)) < _COMPLETE * max(abs(a), abs(b), abs(c)):
            continue
        handed = _handed(trace, chain.ended, at + 1)
        if {*map(abs, fit(chain.columns(), output, handed, chain.dtype)[0])} <= {0.0, *map(abs, handed)}:
            of_handed = (at, output)
        if whole is None and abs(c) > _COMPLETE * abs(b) and fit(chain.columns()[..., :2], output)[1] > 2 * left:
            whole = (at, output)
        shorter = shorter or (at, output)
    return of_handed or whole or shorter


def _as_iterated(seen: Seen, chain: Chain) -> Iterator[tuple[int, Tensor]]:
    """A sample in the orientation of the chain's, where the shapes allow it, and the number of its operation."""
    count, rows, cols = chain.shape
    if seen.sample.shape[0] == count and seen.shape[-2:] == (rows, cols):
        yield seen.at[0], seen.sample
    elif seen.sample.shape[0] == count and seen.shape[-2:] == (cols, rows):
        yield seen.at[0], seen.sample.mT
