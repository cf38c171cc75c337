"""Newton–Schulz iterations in a step: chains of X that are multiplied by their own transposes, each a polynomial of the one before."""

from collections.abc import Collection, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from itertools import islice
from typing import TypeAlias

import torch
from torch import Tensor

from .trace import SIDE, Seen, sample, take

Triple: TypeAlias = tuple[float, float, float]

_SIDE = 96  # rows and columns of the samples that coefficients are fitted to
_LINKED = 0.08  # of an iterate that a polynomial of the one before may leave unexplained: bfloat16 leaves 0.01 to 0.03
_COMPLETE = 0.02  # share of the smaller coefficient in the larger, of a step that is one: parts of it (aX, bAX) are none
# Errors, and relative distance, within which a coefficient is a number that was handed in, and the least of such numbers.
_ERRORS, _NEAR, _NEAR_COARSE, _LEAST = 2.0, 2e-3, 2e-2, 1e-3
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


def fit(columns: Tensor, y: Tensor, handed: Collection[float] = (), dtype: torch.dtype = torch.float64) -> tuple[Triple, float]:
    """Least squares of (a, b, c), and the share of ‖y‖ that they leave; two columns are (a, b) alone. All matrices of a stack have one triple.

    Of a matrix with small singular values alone c is hardly told, and bfloat16 tells nothing to better than a hundredth: a coefficient within its
    error of a number that the step's operations were handed is that number. `a` is told best, and first. `dtype` is the format of the iteration.
    """
    near_enough = _NEAR if torch.finfo(dtype).eps < 1e-5 else _NEAR_COARSE
    m, v = columns.reshape(-1, columns.shape[-1]).double(), y.reshape(-1).double()
    size = float(v.norm().clamp_min(1e-300))
    r = torch.linalg.qr(torch.cat([m, v[:, None]], 1), mode="r").R
    m, v = r[:, :-1], r[:, -1].clone()  # the same least squares in as many rows as there are columns
    known: list[float] = []
    while (left := m.shape[1] - len(known)) > 0:
        rest = m[:, len(known) :]
        scale = rest.norm(dim=0).clamp_min(1e-300)
        inverse = torch.linalg.pinv(rest / scale)
        found = inverse @ v / scale
        unexplained = float((rest @ found - v).norm())
        if not handed:
            known += found.tolist()
            break
        error = unexplained * float(inverse[0].norm()) / float(scale[0])  # at worst: rounding is no independent noise
        known.append(_settled(float(found[0]), error, [value for value in handed if abs(value) not in map(abs, known)], near_enough))
        v -= m[:, -left] * known[-1]
    a, b, c = (*known, 0.0)[:3]
    solution = torch.tensor(known, dtype=r.dtype, device=r.device)
    return (a, b, c), float((r[:, :-1] @ solution - r[:, -1]).norm()) / size


def _settled(estimate: float, error: float, handed: Iterable[float], near_enough: float) -> float:
    """The estimate, or what was handed in that it may be: the nearest, as it was handed or else negated; the first, where nothing is told of it."""
    values = [value for value in handed if abs(value) > _LEAST]
    if error > abs(estimate) / _ERRORS:
        return next((value for value in values if abs(value - estimate) <= _ERRORS * error), 0.0 if error > abs(estimate) else estimate)
    for signed in (values, [-value for value in values]):
        near = [value for value in signed if abs(value - estimate) <= max(_ERRORS * error, near_enough * abs(value))]
        if near:
            return min(near, key=lambda value: abs(value - estimate))
    return estimate


class Iterations:
    """Finds chains while a step goes on."""

    def __init__(self, scalars: Sequence[Sequence[float]]) -> None:
        """`scalars` grows with the operations: the numbers that each was handed."""
        self.chains: list[Chain] = []
        self.scalars = scalars

    def _fine_fit(self, chain: Chain, x: Tensor, number: int) -> tuple[Triple, float]:
        handed = dict.fromkeys(value for at in range(chain.ended, number) for value in self.scalars[at])
        return fit(sampled_powers(chain.last, _SIDE), sample(x, _SIDE), handed, x.dtype)

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
            if chain.shape == shape and chain.dtype == x.dtype and fit(chain.columns(), taken)[1] < _LINKED:
                chain.steps.append(self._fine_fit(chain, x, number))
                chain.products.append(number)
                chain.last, chain._columns = x.clone(), None
                return
        norms = torch.linalg.matrix_norm(x.float())
        if bool((norms > 0).any()):
            self.chains.append(Chain(shape, x.dtype, taken, norms, x.clone(), products=[number]))


def find_output(chain: Chain, later: Iterable[Seen], scalars: Sequence[Sequence[float]]) -> None:
    """Add the last step of a chain: the first whole polynomial of its last iterate among what was made after it.

    A step that is added up from its parts passes through aX + bAX, a polynomial of less: taken only where no longer one follows.
    """
    shorter: tuple[int, Tensor] | None = None
    taken = (seen_as for seen in later for seen_as in _as_iterated(seen, chain))
    for at, of_output in islice(taken, _LOOKED_AT):
        (a, b, c), left = fit(chain.columns(), of_output)
        if left > _LINKED or min(abs(a), abs(b)) < _COMPLETE * max(abs(a), abs(b)):
            continue
        if abs(c) > _COMPLETE * abs(b) and fit(chain.columns()[..., :2], of_output)[1] > 2 * left:
            shorter = (at, of_output)
            break
        shorter = shorter or (at, of_output)
    if shorter is not None:
        at, output = shorter
        handed = dict.fromkeys(value for number in range(chain.ended, at + 1) for value in scalars[number])
        chain.steps.append(fit(chain.columns(), output, handed, chain.dtype))
        chain.output_at, chain.output = at, output


def _as_iterated(seen: Seen, chain: Chain) -> Iterator[tuple[int, Tensor]]:
    """A sample in the orientation of the chain's, where the shapes allow it, and the number of its operation."""
    count, rows, cols = chain.shape
    if seen.sample.shape[0] == count and seen.shape[-2:] == (rows, cols):
        yield seen.at[0], seen.sample
    elif seen.sample.shape[0] == count and seen.shape[-2:] == (cols, rows):
        yield seen.at[0], seen.sample.mT
