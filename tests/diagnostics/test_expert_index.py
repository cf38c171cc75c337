"""Which expert of a mixture a matrix belongs to, by the names that are in use."""

import pytest

from optiscope.diagnostics.operators import expert_index

NAMES = {
    "model.layers.3.mlp.experts.17.down_proj.weight": 17,  # Qwen3-MoE, DeepSeek, OLMoE
    "model.layers.3.block_sparse_moe.experts.5.w1.weight": 5,  # Mixtral
    "encoder.block.1.layer.1.mlp.experts.expert_63.wi.weight": 63,  # Switch Transformers
    "decoder.layers.0.mlp.local_experts.2.linear_fc1.weight": 2,  # Megatron
    "layers.2.moe.experts.w1[4]": 4,  # torchtitan
    "model.layers.0.mlp.experts.gate_up_proj[11]": 11,
    "module._orig_mod.layers.0.ffn.experts.3.w2.weight": 3,
    "model.layers.3.mlp.shared_experts.down_proj.weight": -1,
    "model.layers.3.mlp.shared_expert.0.down_proj.weight": -1,
    "model.layers.3.mlp.shared_expert_gate.weight": -1,
    "model.layers.3.mlp.gate.weight": -1,
    "layers.2.moe.w1[4]": -1,  # a stack of which nothing says that it is one of experts
    "layers.12.self_attn.q_proj.weight": -1,
}


@pytest.mark.parametrize(("name", "expert"), NAMES.items())
def test_expert_index(name, expert):
    assert expert_index(name) == expert
