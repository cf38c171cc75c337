"""Types and layers of the matrices of published architectures, and the document about them."""

import re
import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent))
import architectures

from optiscope.diagnostics.operators import OPERATORS

# What a module does, whatever the architecture: the last parts of names, and the type that its authors' papers give it. Written from the models' code.
ROLES = {
    r"self_attn\.q_proj": "attn_q", r"self_attn\.o_proj": "attn_o", r"mlp\.(shared_experts?\.)?gate_proj": "mlp_gate", r"mlp\.experts\.gate_up_proj": "mlp_gate_up",
    r"mlp\.experts\.down_proj": "mlp_down", r"self_attn\.kv_a_proj_with_mqa": "attn_kv_a", r"self_attn\.q_b_proj": "attn_q_b", r"mlp\.gate": "router",
    r"attention\.self\.value(_proj)?": "attn_v", r"intermediate\.dense": "mlp_fc", r"attention\.output\.dense": "attn_o", r"(mixer|mamba)\.in_proj": "ssm_in",
    r"(mixer|mamba)\.out_proj": "ssm_out", r"(mixer|mamba)\.x_proj": "ssm_x", r"feed_forward\.key": "mlp_up", r"feed_forward\.receptance": "mlp_gate",
    r"attention\.receptance": "attn_q", r"attn\.c_attn": "attn_qkv", r"h\.\d+\.mlp\.c_proj": "mlp_proj", r"relative_position_bias_table": "other",
    r"SelfAttention\.k": "attn_k", r"DenseReluDense\.wo": "mlp_down", r"embed_tokens": "embed", r"wte": "embed", r"lm_head": "head", r"convolution": "conv",
    r"continuous_position_bias_mlp\.\d": "other", r"A_log": "ssm_a",
}  # fmt: skip


@pytest.fixture(scope="module")
def measured():
    return architectures.all_architectures()


def test_of_many_architectures_all_but_a_few_matrices_are_named(measured):
    total = sum(len(one.operators) for one in measured.values())
    assert len(measured) >= 55
    assert total > 5000
    assert sum(one.unnamed for one in measured.values()) <= 0.02 * total


def test_types_are_what_modules_do(measured):
    """Named is not enough: held against what the models' code does with a module."""
    compared = 0
    for name, one in measured.items():
        for key, operator in one.operators.items():
            stem = key.removesuffix(".weight")
            for pattern, role in ROLES.items():
                if re.search(rf"(^|\.){pattern}$", stem):
                    compared += 1
                    assert operator == role, (name, key)
    assert compared > 2000


def test_every_type_is_in_the_vocabulary(measured):
    found = {operator for one in measured.values() for operator in one.operators.values()}
    assert {re.sub(r"\.adapter_[ab]$", "", operator) for operator in found} <= set(OPERATORS)


def test_layers_are_all_that_a_model_repeats(measured):
    """Counted on without a gap in every stack of layers; as many as the model has containers."""
    for name, one in measured.items():
        if name in ("peft on Llama",):
            continue
        stacks = {}
        for key, layer in one.layers.items():
            if layer >= 0:
                # What is before the first number is the stack; encoder and decoder count each for itself.
                stacks.setdefault(re.split(r"\d", key, maxsplit=1)[0], set()).add(layer)
        for stack, layers in stacks.items():
            gaps = name in ("state-spaces Mamba",) or layers == set(range(min(layers), max(layers) + 1))
            assert gaps, (name, stack, sorted(layers))
            assert min(layers) == 0 or name in ("deepseek_v3",), (name, stack)


@pytest.mark.parametrize(
    ("names", "layers"),
    [
        (["layer1.0.conv1.weight", "layer1.1.conv1.weight", "layer2.0.conv1.weight", "layer2.0.downsample.0.weight"], [0, 1, 2, 2]),
        (
            ["stages.0.blocks.0.a.weight", "stages.0.blocks.1.a.weight", "stages.1.downsample.1.weight", "stages.1.blocks.0.a.weight"],
            [0, 1, 2, 2],
        ),
        (["encoder.layers.0.blocks.1.a.weight", "encoder.layers.0.blocks.0.a.weight", "encoder.layers.1.blocks.0.a.weight"], [1, 0, 2]),
        (["encoder.block.0.layer.1.a.weight", "encoder.block.1.layer.0.a.weight", "decoder.block.0.layer.2.a.weight"], [0, 1, 0]),
        (["layers.3.mlp.experts.5.w1.weight", "layers.4.mlp.experts.0.w1.weight"], [3, 4]),
    ],
)
def test_blocks_within_stages_count_on(names, layers):
    assert list(architectures.layer_indices(names).values()) == layers


def test_the_document_is_what_was_just_measured(measured):
    assert architectures.DOCUMENT.read_text(encoding="utf-8") == architectures.written_out(measured)
