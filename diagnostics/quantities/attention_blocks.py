"""Which rows of an attention projection are queries, keys and values, and which belong to which head.

An optimizer sees a fused projection as one matrix, and a head as some rows among others. Here they are told apart by shape, heads and
name; where those leave it open there are no blocks, rather than wrong ones.
"""

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from .adam_mini import UNKNOWN_HEADS, Heads

# NeoX, BLOOM and Falcon keep query, key and value of a head (or of a group of heads that share key and value) together. ChatGLM, which
# has the same name for [Q; K; V], is not told apart.
INTERLEAVED = "query_key_value"


@dataclass(frozen=True, eq=False)
class Block:
    """Some outputs of a projection.

    Attributes:
        label: "q", "k", "v", "q head 0", …; "head 0", … of a projection that is not fused.
        operator: attn_q, attn_k or attn_v.
        axis: that of the outputs: 0, or 1 where the matrix is kept as (inputs, outputs).
        outputs: their indices, ascending.
    """

    label: str
    operator: str
    axis: int
    outputs: NDArray[np.int64]


def attention_blocks(name: str, operator: str, rows: int, cols: int, heads: Heads = UNKNOWN_HEADS) -> list[Block]:
    """The blocks of a projection of shape (rows, cols); none where it is no projection to queries, keys or values, or not known how it is cut.

    Fused, [Q; K; V]: rows are (h + 2·kv)·d for h query and kv key/value heads of width d, thirds where no heads are known and rows = 3·cols.
    Kept as (inputs, outputs), as GPT-2's Conv1D does, where cols = 3·rows: the same of columns. Named `query_key_value`: for each of
    kv groups its h/kv queries, then key and value, which takes known heads. A projection of queries, keys or values alone: its heads.

    >>> [(b.label, b.outputs.tolist()) for b in attention_blocks("c_attn.weight", "attn_qkv", 6, 2)]
    [('q', [0, 1]), ('k', [2, 3]), ('v', [4, 5])]
    >>> [(b.label, b.outputs.tolist()) for b in attention_blocks("k_proj.weight", "attn_k", 4, 8, (4, 2))]
    [('head 0', [0, 1]), ('head 1', [2, 3])]
    """
    query, shared = heads
    if operator in ("attn_q", "attn_k", "attn_v"):
        return _heads_of("head", operator, 0, np.arange(rows), query if operator == "attn_q" else shared)
    if operator != "attn_qkv":
        return []
    axis, outputs, inputs = (1, cols, rows) if cols == 3 * rows else (0, rows, cols)
    interleaved = INTERLEAVED in name
    if query == 0 or outputs % (query + 2 * shared):
        if interleaved or outputs != 3 * inputs:
            return []
        query, shared = 1, 1
    width = outputs // (query + 2 * shared)
    # One row per head, in the order they are kept.
    each = np.arange(outputs).reshape(-1, width)
    if interleaved:
        group = each.reshape(shared, query // shared + 2, width)
        parts = group[:, :-2].reshape(-1, width), group[:, -2], group[:, -1]
    else:
        parts = each[:query], each[query:-shared], each[-shared:]
    blocks: list[Block] = []
    for letter, part in zip("qkv", parts, strict=True):
        operator = f"attn_{letter}"
        blocks += [Block(letter, operator, axis, part.ravel()), *_heads_of(f"{letter} head", operator, axis, part.ravel(), len(part))]
    return blocks


def _heads_of(label: str, operator: str, axis: int, outputs: NDArray[np.int64], heads: int) -> list[Block]:
    """One block per head; none where there is one head, which is the whole, or heads do not divide the outputs."""
    if heads < 2 or len(outputs) % heads:
        return []
    return [Block(f"{label} {i}", operator, axis, own) for i, own in enumerate(outputs.reshape(heads, -1))]
