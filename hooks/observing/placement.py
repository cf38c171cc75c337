"""Where a tensor lies among the ranks: what of it is here, and which part of the whole that is."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, cast

from torch import Tensor

from ...diagnostics.pieces import Box, cut_like


@dataclass(frozen=True)
class Piece:
    """A part of an array that is here.

    Attributes:
        tensor: its numbers.
        shape: of the whole.
        box: which part it is; other ranks may hold the same.
    """

    tensor: Tensor
    shape: tuple[int, ...]
    box: Box

    def of(self, tensor: Tensor) -> "Piece":
        """The same part of another tensor, or of a copy."""
        return replace(self, tensor=tensor)


def is_cut(tensor: Tensor) -> bool:
    """Whether it is a DTensor: one whose numbers lie in pieces, or several times, on the ranks of a mesh."""
    return hasattr(tensor, "full_tensor")


def local(tensor: Tensor) -> Tensor:
    """What of it is here: itself, where it is whole."""
    found: Tensor = cast(Any, tensor).to_local() if is_cut(tensor) else tensor
    return found


def piece_of(tensor: Tensor) -> Piece:
    """The piece of a DTensor, from its placements alone: no other rank is asked.

    Raises:
        ValueError: its numbers are still to be summed over ranks.
    """
    # Within: torch.distributed.tensor takes a second to import, and whoever has a DTensor has imported it.
    from torch.distributed.tensor._utils import compute_local_shape_and_global_offset

    dtensor: Any = tensor
    mesh, placements = dtensor.device_mesh, dtensor.placements
    if any(placement.is_partial() for placement in placements):
        raise ValueError(f"a tensor of placements {placements} is a summand of the whole, no piece")
    if mesh.get_coordinate() is None:  # a mesh that this rank is not in
        return Piece(local(tensor), tuple(tensor.shape), Box((0,) * tensor.ndim, (0,) * tensor.ndim))
    shape, offset = compute_local_shape_and_global_offset(tensor.shape, mesh, placements)
    return Piece(local(tensor), tuple(tensor.shape), Box(tuple(offset), tuple(shape)))


def beside(tensor: Tensor, parameter: Piece) -> Piece | None:
    """The piece that a tensor of the optimizer's state is, beside the parameter's; None where it has another form than the parameter, or a part of it."""
    if is_cut(tensor):
        return piece_of(tensor)
    found = cut_like(tuple(tensor.shape), parameter.shape, parameter.box)
    return None if found is None else Piece(tensor, found[0], found[1])


def placements_in_words(tensor: Any) -> Sequence[str]:
    """Its placements along the dimensions of its mesh, such as "data: Shard(dim=0)"."""
    names = tensor.device_mesh.mesh_dim_names or range(len(tensor.placements))
    return [f"{name}: {placement!r}" for name, placement in zip(names, tensor.placements, strict=True)]
