"""Pieces on their way: from every rank to the owners of their parameters, and put together there."""

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from ..observing.piece_snapshot import Key, PieceSnapshot
from ..observing.placement import local
from .peers import Peers
from .plan import Layout, Part, Plan, Share


def layout_of(pieces: Mapping[str, PieceSnapshot], whole: Mapping[str, bool]) -> Layout:
    """What this rank holds: its pieces, and of the parameters that are whole whether there is state."""
    found = {
        name: Share(
            False,
            bool(snapshot.reading.state),
            tuple(Part(key, p.tensor.dtype, p.shape, p.box) for key, p in sorted(snapshot.pieces.items(), key=lambda of: repr(of[0]))),
        )
        for name, snapshot in pieces.items()
    }
    return found | {name: Share(True, has_state) for name, has_state in whole.items()}


def put_together(
    plan: Plan, names: Sequence[str], pieces: Mapping[str, PieceSnapshot], peers: Peers, timeout: float | None = None
) -> dict[str, dict[Key, Tensor]]:
    """One round: the arrays, whole and on the CPU, of those of these parameters that this rank owns.

    Args:
        pieces: what is here, by the parameter's name.

    Raises:
        RuntimeError: as in :meth:`Peers.exchange`.
    """
    me, ranks = peers.rank, range(peers.size)
    parts = [_joined([(part, pieces[name]) for name in names if plan.owner[name] == to for part in plan.sent(me, name)]) for to in ranks]
    received = peers.exchange(parts, [plan.sent_bytes(rank, names, me) for rank in ranks], timeout)
    own = [name for name in names if plan.owner[name] == me]
    arrays = {name: plan.arrays(name) for name in own}
    found = {name: {key: torch.empty(part.shape, dtype=part.dtype) for key, part in arrays[name].items()} for name in own}
    for rank in ranks:
        at = 0
        for name in own:
            for part in plan.sent(rank, name):
                if part.key in arrays[name]:
                    numbers = received[rank][at : at + part.box.size * part.dtype.itemsize].view(part.dtype)
                    found[name][part.key][part.box.slices] = numbers.view(part.box.shape)
                at += part.bytes
    return found


def _joined(parts: Sequence[tuple[Part, PieceSnapshot]]) -> Tensor:
    """Their numbers one after the other, as bytes."""
    joined = torch.zeros(sum(part.bytes for part, _ in parts), dtype=torch.uint8)
    at = 0
    for part, snapshot in parts:
        numbers = local(snapshot.pieces[part.key].tensor).reshape(-1)
        joined[at : at + part.box.size * part.dtype.itemsize].view(part.dtype).copy_(numbers)
        at += part.bytes
    return joined
