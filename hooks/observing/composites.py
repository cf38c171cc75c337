"""Rows of a run that are no parameter's own matrix: what is orthogonalised as one, blocks of a matrix, and pairs of layers.

They are made from the matrices of parameters, again whenever there are more of these: a layer that comes later gets its blocks, and its pairs with
the layers that were there.
"""

from collections.abc import Collection, Iterable, Iterator, Sequence
from dataclasses import replace
from itertools import pairwise

from ...diagnostics.operators import without_layer
from ...diagnostics.quantities.attention_blocks import attention_blocks
from .matrix import NO_GEOMETRY, Kind, Matrix
from .watched import Watched


def compose(watched: Iterable[Watched], matrices: Sequence[Matrix], groups: Collection[str]) -> list[Matrix]:
    """All that is made of `matrices`; blocks and pairs where `groups` asks for them."""
    own = [m for m in matrices if m.kind == "matrix"]
    made = list(_stacks(watched, own))
    if "blocks" in groups:
        made += _blocks(own)
    if "stacking" in groups:
        made += _pairs(own)
    return made


def _stacks(watched: Iterable[Watched], matrices: Sequence[Matrix]) -> Iterator[Matrix]:
    """The matrix [M_1 … M_K] for every list of parameters that an optimizer orthogonalises as one (TEON's mode-1 unfolding)."""
    of = {id(m.parameter): m for m in matrices}
    for one in watched:
        for group in one.optimizer.param_groups:
            for stack in one.stacks(group):
                members = tuple(of[id(p)] for p in stack if id(p) in of)
                if len(members) == len(stack):
                    yield _joined("stack", members, sum(member.cols for member in members))


def _blocks(matrices: Iterable[Matrix]) -> Iterator[Matrix]:
    """Queries, keys, values and heads of attention projections."""
    for m in matrices:
        for block in attention_blocks(m.name, m.operator, m.rows, m.cols, m.heads):
            rows, cols = (len(block.outputs), m.cols) if block.axis == 0 else (m.rows, len(block.outputs))
            yield replace(
                m, kind="block", name=f"{m.name}[{block.label}]", operator=block.operator, rows=rows, cols=cols, geometry=True,
                members=(m,), block=block,
            )  # fmt: skip


def _pairs(matrices: Iterable[Matrix]) -> Iterator[Matrix]:
    """Matrices of one shape, operator and name but for the layer, each with the next layer's that has one."""
    alike: dict[tuple[str, str, int, int], list[Matrix]] = {}
    for m in matrices:
        if m.layer >= 0 and m.operator not in NO_GEOMETRY:
            alike.setdefault((m.optimizer, without_layer(m.name), m.rows, m.cols), []).append(m)
    for layers in alike.values():
        for first, second in pairwise(sorted(layers, key=lambda m: m.layer)):
            yield _joined("pair", (first, second), first.cols)


def _joined(kind: Kind, members: tuple[Matrix, ...], cols: int) -> Matrix:
    return replace(members[0], kind=kind, name="|".join(m.name for m in members), cols=cols, geometry=True, members=members)
