"""Adam-mini's blocks of a matrix (Zhang et al., arXiv 2406.16793): the coordinates that could share one learning rate."""

import numpy as np
from numpy.typing import NDArray

# (query heads, key and value heads) of an attention layer; zeros where they are not known.
Heads = tuple[int, int]
UNKNOWN_HEADS: Heads = (0, 0)


def row_blocks(operator: str, rows: int, cols: int, heads: Heads = UNKNOWN_HEADS) -> tuple[str, NDArray[np.int64]]:
    """Name of the partition, one of `catalogue.PARTITIONS`, and the block of every row, counted from 0 and ascending.

    A block is whole rows, the weights of one output: every head of the query and key projections ("head"), every token of
    embedding and head ("token"), every output neuron of all else ("row"); norms are one block ("whole"). Of a fused
    projection, taken as the rows [Q; K; V], the heads of Q and K and the rows of V are blocks, and it counts as "head".
    Queries and keys whose heads are not known, or do not divide the rows, fall back to "row", whose blocks lie within those of
    heads: what is lost within them is a lower bound to what is lost within heads.

    A matrix kept as (inputs, outputs) is cut along its inputs.

    >>> row_blocks("attn_q", 4, 8, (2, 1))
    ('head', array([0, 0, 1, 1]))
    >>> row_blocks("attn_qkv", 8, 4, (2, 1))  # Q has two heads of two rows, K one, V two rows
    ('head', array([0, 0, 1, 1, 2, 2, 3, 4]))
    """
    each = np.arange(rows)
    query, shared = heads
    if operator == "norm":
        return "whole", np.zeros_like(each)
    if operator in ("embed", "head"):
        return "token", each
    of_heads = {"attn_q": query, "attn_k": shared, "attn_qkv": query + 2 * shared}.get(operator, 0)
    if of_heads <= 0 or rows % of_heads:
        return "row", each
    width = rows // of_heads
    if operator != "attn_qkv":
        return "head", each // width
    of_values = shared * width
    return "head", np.concatenate([each[:-of_values] // width, query + shared + np.arange(of_values)])
