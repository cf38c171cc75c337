"""What all ranks hold together: one list of matrices by name, the same on every rank and for any number of them."""

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, fields
from typing import Any

import torch
from torch import Tensor

from ..observing.fingerprints import fingerprint
from ..observing.matrix import Matrix
from ..observing.placement import is_cut

_OF_A_PROCESS = ("parameter", "kind", "members", "block")


@dataclass(frozen=True)
class Held:
    """One matrix as one rank tells of it.

    Attributes:
        fields: of its :class:`Matrix`, without what only that process has.
        shape: of its parameter.
        cut: whether that lies in pieces.
        digest: of the weights, to the bit; 0 of a piece.
    """

    fields: dict[str, Any]
    shape: tuple[int, ...]
    cut: bool
    digest: int

    @property
    def name(self) -> str:
        """Of the matrix."""
        name: str = self.fields["name"]
        return name


def held(matrices: Iterable[Matrix]) -> list[Held]:
    """What this rank holds."""
    names = [field.name for field in fields(Matrix) if field.name not in _OF_A_PROCESS]
    digests: dict[int, int] = {}
    found = []
    for m in matrices:
        cut = is_cut(m.parameter)
        if not cut and id(m.parameter) not in digests:
            digests[id(m.parameter)] = fingerprint(m.parameter)
        of = {name: getattr(m, name) for name in names}
        found.append(Held(of, tuple(m.parameter.shape), cut, 0 if cut else digests[id(m.parameter)]))
    return found


def together(own: Sequence[Matrix], told: Mapping[int, Sequence[Held]]) -> list[Matrix]:
    """The matrices of all ranks, those of rank 0 first; where this one holds none of a parameter, with a tensor of its shape and no numbers.

    Raises:
        ValueError: two ranks call by one name what is not the same. Every rank finds the same, so that all are told.
    """
    first: dict[str, tuple[int, Held]] = {}
    for rank in sorted(told):
        if doubled := [name for name, count in Counter(one.name for one in told[rank]).items() if count > 1]:
            raise ValueError(f"model: rank {rank} holds several matrices of the name {doubled[0]}")
        for one in told[rank]:
            before, known = first.setdefault(one.name, (rank, one))
            _check_alike(before, known, rank, one)
    here = {m.name: m for m in own}
    absent: dict[tuple[int, ...], Tensor] = {}
    return [
        here[name] if name in here else Matrix(parameter=absent.setdefault(one.shape, torch.empty(one.shape, device="meta")), **one.fields)  # type: ignore[arg-type]
        for name, (_, one) in first.items()
    ]


def _check_alike(rank: int, one: Held, other_rank: int, other: Held) -> None:
    if (one.shape, one.cut, one.fields["optimizer"]) != (other.shape, other.cut, other.fields["optimizer"]):
        raise ValueError(
            f"model: ranks {rank} and {other_rank} hold different things under the name {one.name}: {_words(one)}, and {_words(other)}. Names must be those of "
            "the whole model, on every rank: give pipeline stages and local experts the names they have in it"
        )
    if one.digest != other.digest:
        raise ValueError(
            f"model: ranks {rank} and {other_rank} hold different weights under the name {one.name}, and no DTensor says that they are pieces of a whole. "
            "Where they are different matrices (stages, experts, shards of one's own), give them the names that they have in the whole model; where "
            "they are to be copies, they have parted: load the same checkpoint on every rank"
        )


def _words(one: Held) -> str:
    return f"{'a DTensor' if one.cut else 'a tensor'} of shape {'×'.join(map(str, one.shape))} of {one.fields['optimizer']}"
