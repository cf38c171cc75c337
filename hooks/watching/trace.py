"""What the operations of one step make, as a dispatch mode sees them: samples of every matrix, and every X that is multiplied by its transpose."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

SIDE = 24  # rows and columns of a sample at most
_STACKED = 4096  # matrices of a stack that is sampled: a kernel of a convolution is flattened before it is a matrix

# Products, and where their two factors stand among the arguments: every overload, `out=` too.
_PRODUCTS = {torch.ops.aten.mm: (0, 1), torch.ops.aten.bmm: (0, 1), torch.ops.aten.addmm: (1, 2), torch.ops.aten.baddbmm: (1, 2)}

# Operations whose numbers are coefficients: not exponents, orders of a norm or an eps.
_SCALED_BY = frozenset({"mul", "div", "add", "sub", "rsub", "addmm", "baddbmm"})
_FRESH = (torch.ops.aten.lift_fresh.default, torch.ops.aten.lift.default)


class WouldTouch(RuntimeError):
    """An operation of the copy's step would change something that is not the copy's."""


@dataclass(frozen=True)
class Seen:
    """One matrix, or a stack of them, that an operation made.

    Attributes:
        at: number of the operation, −1 for what was there before the step; and which of its outputs.
        shape: of the tensor.
        dtype: its format.
        sample: as :func:`sample` takes it.
    """

    at: tuple[int, int]
    shape: tuple[int, ...]
    dtype: torch.dtype
    sample: Tensor


@dataclass
class Trace:
    """All that was seen of a step.

    Attributes:
        seen: in the order of the operations.
        captured: copies of what was asked for by its `Seen.at`.
        scalars: the numbers that each operation was handed as factors.
        products: numbers of the operations that multiplied matrices, and the shape of what each made.
    """

    seen: list[Seen] = field(default_factory=list)
    scalars: list[tuple[float, ...]] = field(default_factory=list)
    products: list[tuple[int, torch.Size]] = field(default_factory=list)
    captured: dict[tuple[int, int], Tensor] = field(default_factory=dict)

    @property
    def operations(self) -> int:
        """How many there were."""
        return len(self.scalars)


@lru_cache(256)
def _grid(size: int, side: int, device: torch.device) -> Tensor:
    """Indices of a sample along one axis."""
    return torch.tensor([i * (size - 1) // (side - 1) for i in range(side)], device=device)


def take(tensor: Tensor, axis: int, side: int = SIDE) -> Tensor:
    """As many slices along an axis, at places that depend on its length alone; all of a short one."""
    size = tensor.shape[axis]
    return tensor if size <= side else tensor.index_select(axis, _grid(size, side, tensor.device))


def sample(tensor: Tensor, side: int = SIDE) -> Tensor:
    """Entries on a grid of rows and columns, shape (B, rows, cols), float32 and no view. The sample of a transpose is the transpose of the sample."""
    taken = take(take(tensor.detach(), -2, side), -1, side)
    taken = taken.reshape(-1, *taken.shape[-2:])
    return taken.float() if taken.data_ptr() != tensor.data_ptr() or taken.dtype != torch.float32 else taken.clone()


class Tracing(TorchDispatchMode):  # type: ignore[no-untyped-call]  # torch leaves it untyped
    """Sees every operation; refuses those that would write into what is neither the copy's nor made within.

    Args:
        own: tensors that may be written into.
        capture: which results to copy whole, nothing else being noted; none: all are seen.

    Attributes:
        tell_gram: is told (number of the operation, X, short side first) for every product X·Xᵀ.
        around_write: is told what an operation is about to write into; what it returns is called after it with the operation's name.
    """

    tell_gram: Callable[[int, Tensor], None]
    around_write: Callable[[Sequence[Tensor]], Callable[[str], None]] | None = None

    def __init__(self, own: Sequence[Tensor], capture: frozenset[tuple[int, int]] = frozenset()) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.trace = Trace()
        # Storages. One that is freed within may give its place to another that is made within; the original's lie where they lie.
        self._own = {storage_of(tensor) for tensor in own}
        self._capture = capture

    def see(self, at: tuple[int, int], tensor: Tensor) -> None:
        """Note a matrix; or copy it, if that was asked for."""
        if self._capture:
            if at in self._capture:
                self.trace.captured[at] = tensor.detach().clone()
            return
        is_matrix = tensor.ndim >= 2 and tensor.is_floating_point() and tensor.layout is torch.strided and min(tensor.shape[-2:]) > 1
        if is_matrix and tensor.shape[:-2].numel() <= _STACKED:
            self.trace.seen.append(Seen(at, tuple(tensor.shape), tensor.dtype, sample(tensor)))

    def __torch_dispatch__(self, op: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None) -> Any:
        kwargs = kwargs or {}
        if op.namespace in ("c10d", "_c10d_functional") and torch.distributed.get_world_size() > 1:
            raise WouldTouch(f"{op} would make the other processes wait for one that they do not know of")
        written = list(_written(op, args, kwargs))
        for tensor in written:
            if storage_of(tensor) not in self._own:
                raise WouldTouch(f"{op} would write into a tensor that is not the copy's")
        number, leaves = self.trace.operations, tree_leaves((args, kwargs))
        name = op.overloadpacket.__name__.strip("_").removeprefix("foreach_")
        self.trace.scalars.append(tuple(_numbers(leaves)) if name in _SCALED_BY else ())
        factors = _PRODUCTS.get(op.overloadpacket)
        if factors is not None and not self._capture and (x := _twice(*(args[i] for i in factors))) is not None:
            self.tell_gram(number, x)
        tell = self.around_write(written) if written and self.around_write is not None else None
        result = op(*args, **kwargs)
        if tell is not None:
            tell(name)
        made = [leaf for leaf in tree_leaves(result) if isinstance(leaf, Tensor)]
        if factors is not None and made:
            self.trace.products.append((number, made[0].shape))
        # A view is made of what it is a view of; `torch.tensor` hands in what nobody else has.
        given = set() if op in _FRESH else {storage_of(leaf) for leaf in leaves if isinstance(leaf, Tensor)}
        self._own |= {storage_of(tensor) for tensor in made} - given
        if not made:  # foreach operations in place return nothing
            made = written
        for slot, tensor in enumerate(made):
            self.see((number, slot), tensor)
        return result


def _numbers(leaves: Sequence[Any]) -> Iterator[float]:
    """Numbers among arguments: floats, and tensors of one, as compiled code takes what may change; on some devices rounded to the other's format."""
    formats = {leaf.dtype for leaf in leaves if isinstance(leaf, Tensor) and leaf.ndim and leaf.is_floating_point()}
    for leaf in leaves:
        if type(leaf) is float:
            yield leaf
        elif isinstance(leaf, Tensor) and not leaf.ndim and leaf.is_floating_point():
            yield from {float(leaf), *(float(leaf.to(dtype)) for dtype in formats)}


def storage_of(tensor: Tensor) -> int:
    """What tells the memory of a tensor and all its views from that of others."""
    return int(tensor.untyped_storage()._cdata)


def _written(op: Any, args: Sequence[Any], kwargs: dict[str, Any]) -> Iterator[Tensor]:
    """The arguments that the operation writes into."""
    for i, argument in enumerate(op._schema.arguments):
        if argument.alias_info is not None and argument.alias_info.is_write:
            given = args[i] if i < len(args) else kwargs.get(argument.name)
            yield from (leaf for leaf in tree_leaves(given) if isinstance(leaf, Tensor))


def _twice(x: Tensor, y: Tensor) -> Tensor | None:
    """X, its short side first, where the product is X·Xᵀ: one memory seen both ways, or two of equal values; else None."""
    if x.shape[:-2] != y.shape[:-2] or (x.shape[-1], x.shape[-2]) != (y.shape[-2], y.shape[-1]) or min(x.shape[-2:]) < 2:
        return None
    one_memory = x.untyped_storage()._cdata == y.untyped_storage()._cdata and x.storage_offset() == y.storage_offset()
    if one_memory:
        if x.stride() == y.stride():
            return None  # A·A of a symmetric A
    elif not (torch.equal(sample(x), sample(y).mT) and torch.equal(x, y.mT)):
        return None
    return x if x.shape[-2] <= x.shape[-1] else y
