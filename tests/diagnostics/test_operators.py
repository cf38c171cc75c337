"""Parameter names as published models spell them; what is expected of each follows from the model's own code."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from optiscope.diagnostics.operators import OPERATORS, classify, clean_name, layer_index, ordered

NAMES = {
    "llama and qwen, Hugging Face": """
        model.embed_tokens.weight                               embed     -1
        model.layers.0.self_attn.q_proj.weight                  attn_q     0
        model.layers.0.self_attn.k_proj.weight                  attn_k     0
        model.layers.0.self_attn.v_proj.weight                  attn_v     0
        model.layers.0.self_attn.o_proj.weight                  attn_o     0
        model.layers.27.mlp.gate_proj.weight                    mlp_gate  27
        model.layers.27.mlp.up_proj.weight                      mlp_up    27
        model.layers.27.mlp.down_proj.weight                    mlp_down  27
        model.layers.27.input_layernorm.weight                  norm      27
        model.layers.27.post_attention_layernorm.weight         norm      27
        model.layers.3.self_attn.q_norm.weight                  norm       3
        model.layers.3.self_attn.k_norm.weight                  norm       3
        model.norm.weight                                       norm      -1
        lm_head.weight                                          head      -1
    """,
    "llama, Meta": """
        tok_embeddings.weight                                   embed     -1
        layers.5.attention.wq.weight                            attn_q     5
        layers.5.attention.wk.weight                            attn_k     5
        layers.5.attention.wv.weight                            attn_v     5
        layers.5.attention.wo.weight                            attn_o     5
        layers.5.feed_forward.w1.weight                         mlp_gate   5
        layers.5.feed_forward.w2.weight                         mlp_down   5
        layers.5.feed_forward.w3.weight                         mlp_up     5
        layers.5.attention_norm.weight                          norm       5
        layers.5.ffn_norm.weight                                norm       5
        norm.weight                                             norm      -1
        output.weight                                           head      -1
    """,
    "gpt-2 and nanoGPT": """
        transformer.wte.weight                                  embed     -1
        transformer.wpe.weight                                  embed     -1
        transformer.h.11.ln_1.weight                            norm      11
        transformer.h.11.attn.c_attn.weight                     attn_qkv  11
        transformer.h.11.attn.c_proj.weight                     attn_o    11
        transformer.h.11.ln_2.bias                              norm      11
        transformer.h.11.mlp.c_fc.weight                        mlp_fc    11
        transformer.h.11.mlp.c_proj.weight                      mlp_proj  11
        transformer.ln_f.weight                                 norm      -1
        lm_head.weight                                          head      -1
    """,
    "nanochat": """
        transformer.h.0.attn.c_q.weight                         attn_q     0
        transformer.h.0.attn.c_k.weight                         attn_k     0
        transformer.h.0.attn.c_v.weight                         attn_v     0
        transformer.h.0.attn.c_proj.weight                      attn_o     0
    """,
    "gpt-neox": """
        gpt_neox.embed_in.weight                                embed     -1
        gpt_neox.layers.2.input_layernorm.weight                norm       2
        gpt_neox.layers.2.attention.query_key_value.weight      attn_qkv   2
        gpt_neox.layers.2.attention.dense.weight                attn_o     2
        gpt_neox.layers.2.mlp.dense_h_to_4h.weight              mlp_fc     2
        gpt_neox.layers.2.mlp.dense_4h_to_h.weight              mlp_proj   2
        gpt_neox.final_layer_norm.weight                        norm      -1
        embed_out.weight                                        head      -1
    """,
    "gpt-j and opt": """
        transformer.h.0.attn.out_proj.weight                    attn_o     0
        transformer.h.0.mlp.fc_in.weight                        mlp_fc     0
        transformer.h.0.mlp.fc_out.weight                       mlp_proj   0
        model.decoder.embed_positions.weight                    embed     -1
        model.decoder.layers.4.self_attn.out_proj.weight        attn_o     4
        model.decoder.layers.4.fc1.weight                       mlp_fc     4
        model.decoder.layers.4.fc2.weight                       mlp_proj   4
        model.decoder.layers.4.self_attn_layer_norm.weight      norm       4
    """,
    "megatron": """
        embedding.word_embeddings.weight                        embed     -1
        decoder.layers.0.self_attention.linear_qkv.weight       attn_qkv   0
        decoder.layers.0.self_attention.linear_qkv.layer_norm_weight  norm  0
        decoder.layers.0.self_attention.linear_proj.weight      attn_o     0
        decoder.layers.0.mlp.linear_fc1.weight                  mlp_fc     0
        decoder.layers.0.mlp.linear_fc2.weight                  mlp_proj   0
        output_layer.weight                                     head      -1
    """,
    "bert": """
        bert.embeddings.word_embeddings.weight                  embed     -1
        bert.embeddings.position_embeddings.weight              embed     -1
        bert.embeddings.token_type_embeddings.weight            embed     -1
        bert.embeddings.LayerNorm.weight                        norm      -1
        bert.encoder.layer.7.attention.self.query.weight        attn_q     7
        bert.encoder.layer.7.attention.self.key.weight          attn_k     7
        bert.encoder.layer.7.attention.self.value.weight        attn_v     7
        bert.encoder.layer.7.attention.output.dense.weight      attn_o     7
        bert.encoder.layer.7.attention.output.LayerNorm.weight  norm       7
        bert.encoder.layer.7.attention.output.LayerNorm.gamma   norm       7
        bert.encoder.layer.7.intermediate.dense.weight          mlp_fc     7
        bert.encoder.layer.7.output.dense.weight                mlp_proj   7
        bert.encoder.layer.7.output.LayerNorm.weight            norm       7
        bert.pooler.dense.weight                                other     -1
        cls.predictions.transform.dense.weight                  head      -1
        cls.predictions.transform.LayerNorm.weight              norm      -1
        cls.predictions.decoder.weight                          head      -1
        classifier.weight                                       head      -1
    """,
    "roberta and distilbert": """
        lm_head.dense.weight                                    head      -1
        lm_head.layer_norm.weight                               norm      -1
        distilbert.transformer.layer.1.attention.q_lin.weight   attn_q     1
        distilbert.transformer.layer.1.attention.out_lin.weight attn_o     1
        distilbert.transformer.layer.1.ffn.lin1.weight          mlp_fc     1
        distilbert.transformer.layer.1.ffn.lin2.weight          mlp_proj   1
        distilbert.transformer.layer.1.sa_layer_norm.weight     norm       1
    """,
    "modernbert": """
        model.embeddings.tok_embeddings.weight                  embed     -1
        model.layers.9.attn.Wqkv.weight                         attn_qkv   9
        model.layers.9.attn.Wo.weight                           attn_o     9
        model.layers.9.mlp.Wi.weight                            mlp_gate_up     9
        model.layers.9.mlp.Wo.weight                            mlp_down   9
    """,
    "t5": """
        shared.weight                                           embed     -1
        encoder.block.4.layer.0.SelfAttention.q.weight          attn_q     4
        encoder.block.4.layer.0.SelfAttention.k.weight          attn_k     4
        encoder.block.4.layer.0.SelfAttention.v.weight          attn_v     4
        encoder.block.4.layer.0.SelfAttention.o.weight          attn_o     4
        encoder.block.4.layer.0.layer_norm.weight               norm       4
        encoder.block.0.layer.0.SelfAttention.relative_attention_bias.weight  other  0
        decoder.block.6.layer.1.EncDecAttention.k.weight        attn_k     6
        decoder.block.6.layer.1.EncDecAttention.o.weight        attn_o     6
        decoder.block.6.layer.2.DenseReluDense.wi.weight        mlp_fc     6
        decoder.block.6.layer.2.DenseReluDense.wi_0.weight      mlp_gate   6
        decoder.block.6.layer.2.DenseReluDense.wi_1.weight      mlp_up     6
        decoder.block.6.layer.2.DenseReluDense.wo.weight        mlp_down   6
        decoder.final_layer_norm.weight                         norm      -1
    """,
    "vit, timm": """
        pos_embed                                               embed     -1
        cls_token                                               other     -1
        patch_embed.proj.weight                                 conv      -1
        blocks.10.norm1.weight                                  norm      10
        blocks.10.attn.qkv.weight                               attn_qkv  10
        blocks.10.attn.q_norm.weight                            norm      10
        blocks.10.attn.proj.weight                              attn_o    10
        blocks.10.mlp.fc1.weight                                mlp_fc    10
        blocks.10.mlp.fc2.weight                                mlp_proj  10
        norm_pre.weight                                         norm      -1
        fc_norm.weight                                          norm      -1
        head.weight                                             head      -1
    """,
    "vit, Hugging Face": """
        vit.embeddings.position_embeddings                      embed     -1
        vit.embeddings.patch_embeddings.projection.weight       conv      -1
        vit.encoder.layer.8.attention.attention.query.weight    attn_q     8
        vit.encoder.layer.8.attention.output.dense.weight       attn_o     8
        vit.encoder.layer.8.intermediate.dense.weight           mlp_fc     8
        vit.encoder.layer.8.output.dense.weight                 mlp_proj   8
        vit.encoder.layer.8.layernorm_before.weight             norm       8
        vit.layernorm.weight                                    norm      -1
    """,
    "vit, torchvision": """
        conv_proj.weight                                        conv      -1
        encoder.pos_embedding                                   embed     -1
        encoder.layers.encoder_layer_6.ln_1.weight              norm       6
        encoder.layers.encoder_layer_6.self_attention.in_proj_weight    attn_qkv  6
        encoder.layers.encoder_layer_6.self_attention.out_proj.weight   attn_o    6
        encoder.layers.encoder_layer_6.mlp.0.weight             mlp_fc     6
        encoder.layers.encoder_layer_6.mlp.3.weight             mlp_proj   6
        heads.head.weight                                       head      -1
    """,
    "clip": """
        token_embedding.weight                                  embed     -1
        visual.conv1.weight                                     conv      -1
        visual.ln_pre.weight                                    norm      -1
        transformer.resblocks.3.attn.in_proj_weight             attn_qkv   3
        transformer.resblocks.3.mlp.c_fc.weight                 mlp_fc     3
        vision_model.embeddings.patch_embedding.weight          conv      -1
        vision_model.embeddings.position_embedding.weight       embed     -1
        text_model.encoder.layers.2.self_attn.q_proj.weight     attn_q     2
    """,
    "convnext": """
        stem.1.weight                                           other     -1
        stages.0.blocks.2.conv_dw.weight                        conv       0
        stages.3.blocks.1.norm.weight                           norm       3
        stages.3.blocks.1.mlp.fc1.weight                        mlp_fc     3
        stages.3.blocks.1.mlp.fc2.weight                        mlp_proj   3
        head.norm.weight                                        norm      -1
        head.fc.weight                                          head      -1
        stages.1.2.dwconv.weight                                conv       1
        stages.1.2.pwconv1.weight                               conv       1
        stages.1.2.pwconv2.weight                               conv       1
        convnext.encoder.stages.2.layers.5.dwconv.weight        conv       2
        convnext.encoder.stages.2.layers.5.layernorm.weight     norm       2
    """,
    "resnet": """
        conv1.weight                                            conv      -1
        bn1.weight                                              norm      -1
        layer2.0.conv1.weight                                   conv       2
        layer2.0.bn1.weight                                     norm       2
    """,
    "mixture of experts": """
        model.layers.1.block_sparse_moe.gate.weight             router      1
        model.layers.1.block_sparse_moe.experts.3.w1.weight     mlp_gate   1
        model.layers.1.block_sparse_moe.experts.3.w2.weight     mlp_down   1
        model.layers.1.block_sparse_moe.experts.3.w3.weight     mlp_up     1
        model.layers.1.mlp.gate.weight                          router      1
        model.layers.1.mlp.experts.0.gate_proj.weight           mlp_gate   1
        model.layers.1.mlp.experts.0.down_proj.weight           mlp_down   1
        model.layers.1.mlp.shared_expert.up_proj.weight         mlp_up     1
        model.layers.1.mlp.shared_expert_gate.weight            router      1
        layers.1.ffn.gate.weight                                router      1
        layers.1.moe.router.gate.weight                         router      1
    """,
    "mamba": """
        backbone.embedding.weight                               embed     -1
        backbone.layers.0.mixer.in_proj.weight                  ssm_in      0
        backbone.layers.0.mixer.out_proj.weight                 ssm_out      0
        backbone.layers.0.mixer.conv1d.weight                   conv       0
        backbone.norm_f.weight                                  norm      -1
    """,
}  # fmt: skip


def table(text):
    return [(name, operator, int(layer)) for name, operator, layer in (line.split() for line in text.strip().splitlines())]


@pytest.mark.parametrize("family", NAMES)
def test_published_names_are_known(family):
    expected = {name: (operator, layer) for name, operator, layer in table(NAMES[family])}
    assert {name: (classify(name), layer_index(name)) for name in expected} == expected


def matrices(module):
    """Operator of every parameter with two dimensions, as PyTorch itself names it."""
    return {name: classify(name) for name, parameter in module.named_parameters() if parameter.ndim == 2}


def test_torch_attention_is_known():
    assert matrices(torch.nn.MultiheadAttention(4, 2)) == {"in_proj_weight": "attn_qkv", "out_proj.weight": "attn_o"}
    # Unequal widths make PyTorch keep three parameters, with an underscore where modules have a dot.
    assert matrices(torch.nn.MultiheadAttention(4, 2, kdim=3, vdim=5)) == {
        "q_proj_weight": "attn_q", "k_proj_weight": "attn_k", "v_proj_weight": "attn_v", "out_proj.weight": "attn_o",
    }  # fmt: skip


def test_torch_transformer_is_known():
    encoder = {
        "self_attn.in_proj_weight": "attn_qkv",
        "self_attn.out_proj.weight": "attn_o",
        "linear1.weight": "mlp_fc",
        "linear2.weight": "mlp_proj",
    }
    cross = {"multihead_attn.in_proj_weight": "attn_qkv", "multihead_attn.out_proj.weight": "attn_o"}
    assert matrices(torch.nn.TransformerEncoderLayer(4, 2, 8)) == encoder
    assert matrices(torch.nn.TransformerDecoderLayer(4, 2, 8)) == encoder | cross
    names = [name for name, _ in torch.nn.Transformer(4, 2, 1, 2, 8, batch_first=True).named_parameters()]
    assert {layer_index(name) for name in names} == {0, 1, -1}
    assert {name: layer_index(name) for name in names if "norm" in name and "layers" not in name} == {
        "encoder.norm.weight": -1, "encoder.norm.bias": -1, "decoder.norm.weight": -1, "decoder.norm.bias": -1,
    }  # fmt: skip


@pytest.mark.parametrize("prefix", ["module.", "_orig_mod.", "module._orig_mod.", "_orig_mod.module.", "_fsdp_wrapped_module._orig_mod."])
def test_wrappers_change_nothing(prefix):
    name = "model.layers.3.self_attn.q_proj.weight"
    for wrapped in (prefix + name, name.replace("self_attn.", f"self_attn.{prefix}"), name.replace("model.", f"model.{prefix}")):
        assert clean_name(wrapped) == name
        assert (classify(wrapped), layer_index(wrapped)) == ("attn_q", 3)


def test_a_mapping_wins_over_the_table():
    rule = {r"\.mlp\.gate\.weight$": "mlp_gate", r"experts": "expert"}
    assert classify("layers.0.mlp.gate.weight") == "router"
    assert classify("layers.0.mlp.gate.weight", rule) == "mlp_gate"
    assert classify("layers.0.mlp.experts.1.up_proj.weight", rule) == "expert"
    # What it does not name still comes from the table, and of two matches the first wins.
    assert classify("layers.0.attn.q_proj.weight", rule) == "attn_q"
    assert classify("x", {"x": "first", ".": "second"}) == "first"


def test_a_function_wins_and_none_falls_through():
    def rule(name):
        return "tower" if name.startswith("tower.") else None

    assert classify("tower.0.q_proj.weight", rule) == "tower"
    assert classify("layers.0.q_proj.weight", rule) == "attn_q"


def test_order_is_the_tables_then_the_users():
    assert ordered(["zeta", "mlp_up", "alpha", "attn_q", "mlp_up"]) == ["attn_q", "mlp_up", "alpha", "zeta"]


PIECES = st.sampled_from(
    ["layers", "h", "block", "0", "12", "attn", "mlp", "gate", "norm", "weight", "bias", "module", "", ".", "_", "٣", "\n"]
)


@given(st.text() | st.lists(PIECES).map(".".join) | st.integers(0).map("layers.{}.q".format))
def test_any_text_has_an_operator_and_a_layer(name):
    assert classify(name) in OPERATORS
    assert layer_index(name) >= -1


def test_absurd_indices_are_no_error():
    # Past 4300 digits int() refuses to convert a string.
    assert layer_index(f"layers.{'1' * 5000}.q") == -1


@pytest.mark.parametrize(
    "name", ["", "weight", "foo", "rotary.inv_freq", "layers.0.gamma", "logit_scale", "model.layers.0.self_attn.q_proj.bias"]
)
def test_unknown_names_are_other(name):
    assert classify(name) == "other"
