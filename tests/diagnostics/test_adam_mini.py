"""Adam-mini's blocks, and what one learning rate for each of them would lose."""

import numpy as np
import pytest

from optiscope.diagnostics.adam_mini import row_blocks
from optiscope.diagnostics.catalogue import PARTITIONS
from optiscope.diagnostics.operators import OPERATORS


@pytest.mark.parametrize("operator", OPERATORS)
@pytest.mark.parametrize("heads", [(0, 0), (4, 2), (4, 4), (7, 7)])
def test_every_row_has_a_block_and_blocks_are_counted_in_order(operator, heads):
    name, blocks = row_blocks(operator, 64, 16, heads)
    assert name in PARTITIONS
    assert blocks.shape == (64,)
    assert blocks[0] == 0
    assert set(np.diff(blocks)) <= {0, 1}


@pytest.mark.parametrize(
    ("operator", "name", "sizes"),
    [
        ("attn_q", "head", [16] * 4),
        ("attn_k", "head", [32] * 2),
        ("attn_v", "row", [1] * 64),
        ("attn_o", "row", [1] * 64),
        ("mlp_up", "row", [1] * 64),
        ("conv", "row", [1] * 64),
        ("other", "row", [1] * 64),
        ("embed", "token", [1] * 64),
        ("head", "token", [1] * 64),
        ("norm", "whole", [64]),
        ("attn_qkv", "head", [8] * 6 + [1] * 16),  # (4 + 2·2) heads of 8 rows
    ],
)
def test_blocks_are_those_of_the_paper(operator, name, sizes):
    found, blocks = row_blocks(operator, 64, 16, (4, 2))
    assert found == name
    assert np.bincount(blocks).tolist() == sizes


def test_a_head_of_a_square_projection_has_d_squared_over_h_numbers():
    _, blocks = row_blocks("attn_q", 768, 768, (12, 12))
    assert set(np.bincount(blocks) * 768) == {768**2 // 12}


def test_heads_that_are_not_known_or_do_not_divide_fall_back_to_rows():
    for heads in ((0, 0), (5, 5)):
        name, blocks = row_blocks("attn_q", 64, 16, heads)
        assert (name, blocks.tolist()) == ("row", list(range(64)))
