"""Which outputs of a projection are whose: against tensors reshaped the way the models themselves do it."""

import numpy as np
import pytest

from optiscope.diagnostics.quantities.attention_blocks import attention_blocks

D, WIDTH = 12, 4


def marked(part, head, width=WIDTH):
    """Outputs of one head, marked by who they are."""
    return [f"{part}{head}.{i}" for i in range(width)]


def blocks_of(outputs, name="attn.qkv_proj.weight", cols=D, heads=(0, 0), transposed=False):
    """Label → the marks of its outputs."""
    shape = (cols, len(outputs)) if transposed else (len(outputs), cols)
    found = attention_blocks(name, "attn_qkv", *shape, heads)
    assert all(block.axis == int(transposed) for block in found)
    assert all(block.operator == f"attn_{block.label[0]}" for block in found)
    return {block.label: [outputs[i] for i in block.outputs] for block in found}


def of_part(outputs, part):
    return [mark for mark in outputs if mark.startswith(part)]


def check(found, outputs, query, shared):
    for part, count in (("q", query), ("k", shared), ("v", shared)):
        assert found[part] == of_part(outputs, part)
        heads = {label for label in found if label.startswith(f"{part} head")}
        assert heads == ({f"{part} head {i}" for i in range(count)} if count > 1 else set())
        for i in range(count):
            assert found.get(f"{part} head {i}", marked(part, i)) == marked(part, i)


def concatenated(query, shared):
    return [mark for part, count in (("q", query), ("k", shared), ("v", shared)) for i in range(count) for mark in marked(part, i)]


@pytest.mark.parametrize("transposed", [False, True])
def test_thirds_where_no_heads_are_known(transposed):
    outputs = concatenated(3, 3)
    found = blocks_of(outputs, transposed=transposed)
    assert found == {part: of_part(outputs, part) for part in "qkv"}


@pytest.mark.parametrize("transposed", [False, True])
def test_heads_of_thirds(transposed):
    outputs = concatenated(3, 3)
    check(blocks_of(outputs, heads=(3, 3), transposed=transposed), outputs, 3, 3)


@pytest.mark.parametrize("shared", [1, 2])
def test_heads_that_share_keys_and_values(shared):
    outputs = concatenated(4, shared)
    check(blocks_of(outputs, cols=16, heads=(4, shared)), outputs, 4, shared)


@pytest.mark.parametrize("shared", [1, 2, 4])
def test_interleaved_heads(shared):
    """NeoX and BLOOM reshape to (heads, 3, width), Falcon to (groups, heads per group + 2, width)."""
    each = 4 // shared
    outputs = [
        mark
        for group in range(shared)
        for marks in (*(marked("q", group * each + i) for i in range(each)), marked("k", group), marked("v", group))
        for mark in marks
    ]
    check(blocks_of(outputs, "attention.query_key_value.weight", 16, (4, shared)), outputs, 4, shared)
    assert blocks_of(outputs, "attention.query_key_value.weight", 16) == {}


def test_no_blocks_where_it_is_not_known_how():
    assert attention_blocks("c_attn.weight", "attn_qkv", 20, 12) == []
    assert attention_blocks("c_attn.weight", "attn_qkv", 20, 12, (3, 3)) == []
    assert attention_blocks("o_proj.weight", "attn_o", 12, 12, (3, 3)) == []
    assert attention_blocks("q_proj.weight", "attn_q", 12, 12) == []
    assert attention_blocks("q_proj.weight", "attn_q", 10, 12, (3, 3)) == []
    # Thirds still hold where the heads do not.
    assert [block.label for block in attention_blocks("c_attn.weight", "attn_qkv", 36, 12, (5, 5))] == ["q", "k", "v"]


def test_heads_of_a_projection_by_itself():
    for operator, count in (("attn_q", 4), ("attn_k", 2), ("attn_v", 2)):
        found = attention_blocks("proj.weight", operator, 8, 16, (4, 2))
        assert [block.label for block in found] == [f"head {i}" for i in range(count)]
        assert {block.operator for block in found} == {operator}
        np.testing.assert_array_equal(np.concatenate([block.outputs for block in found]), np.arange(8))
