"""Numbers that tell copies of one tensor apart, to the bit: what replicas on several ranks are compared by."""

from collections.abc import Callable, Iterable, Iterator
from typing import TypeAlias

import torch
from torch import Tensor

from ...diagnostics.pieces import Box
from ..adapters import parameter_state
from ..adapters.names import tensors_in
from .matrix import Matrix
from .piece_snapshot import PieceSnapshot
from .placement import is_cut, local
from .watched import Watched

# By the parameter's name, what of it ("weights", "gradient", "state"), and which part where it lies in pieces.
Fingerprints: TypeAlias = dict[tuple[str, str, Box | None], int]

_INTEGERS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
_WHAT = {"after": "weights", "gradient": "gradient", "state": "state"}  # keys of pieces


def fingerprint(tensor: Tensor) -> int:
    """64 bits that change with any single bit of what of the tensor is here: the sum of its numbers, read as integers."""
    here = local(tensor.detach()).contiguous().view(-1)
    return int(here.view(_INTEGERS.get(here.element_size(), torch.uint8)).sum(dtype=torch.int64))


def of_gradients(watched: Watched, has_copies: Callable[[str], bool]) -> Fingerprints:
    """Before a step, of parameters that are whole here."""
    return {
        (m.parameter_name, "gradient", None): fingerprint(m.parameter.grad)
        for m in _whole(watched.matrices, has_copies)
        if m.parameter.grad is not None and m.parameter.grad.layout is torch.strided
    }


def of_results(watched: Watched, has_copies: Callable[[str], bool]) -> Fingerprints:
    """After it, of weights and, where there is some, state."""
    found: Fingerprints = {}
    for m in _whole(watched.matrices, has_copies):
        found[m.parameter_name, "weights", None] = fingerprint(m.parameter)
        state = [tensor for tensor in tensors_in(parameter_state(watched.optimizer, m.parameter)).values() if tensor.numel() > 1]
        if state and all(tensor.layout is torch.strided for tensor in state):
            found[m.parameter_name, "state", None] = _wrapped(sum(map(fingerprint, state)))
    return found


def of_pieces(name: str, snapshot: PieceSnapshot) -> Fingerprints:
    """Of what is here of a parameter in pieces."""
    found: Fingerprints = {}
    for key, piece in snapshot.pieces.items():
        if key[0] in _WHAT and piece.box.size:
            at = name, _WHAT[key[0]], piece.box
            found[at] = _wrapped(found.get(at, 0) + fingerprint(piece.tensor))
    return found


def _whole(matrices: Iterable[Matrix], has_copies: Callable[[str], bool]) -> Iterator[Matrix]:
    seen: set[int] = set()
    for m in matrices:
        if not m.members and not is_cut(m.parameter) and id(m.parameter) not in seen and has_copies(m.parameter_name):
            seen.add(id(m.parameter))
            yield m


def _wrapped(number: int) -> int:
    return (number + 2**63) % 2**64 - 2**63
