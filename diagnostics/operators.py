"""From a parameter's name to its operator type and layer: one ordered table of patterns.

Types: attn_q attn_k attn_v attn_o attn_qkv, latent attention's attn_q_a attn_q_b attn_kv_a attn_kv_b, attn_gate, mlp_gate mlp_up mlp_gate_up mlp_down mlp_fc mlp_proj,
router, a state-space mixer's ssm_in ssm_x ssm_dt ssm_a ssm_out, embed head conv norm other. A low-rank adapter has its host's type and its own part:
attn_q.adapter_a.
"""

import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import TypeAlias

# User patterns: regular expression → operator, tried before the table; or a function of the name, None to fall through.
OperatorRule: TypeAlias = Mapping[str, str] | Callable[[str], str | None]

OPERATORS = (
    "attn_q", "attn_k", "attn_v", "attn_o", "attn_qkv", "attn_q_a", "attn_q_b", "attn_kv_a", "attn_kv_b", "attn_gate",
    "mlp_gate", "mlp_up", "mlp_gate_up", "mlp_down", "mlp_fc", "mlp_proj", "router",
    "ssm_in", "ssm_x", "ssm_dt", "ssm_a", "ssm_out",
    "embed", "head", "conv", "norm", "other",
)  # fmt: skip

# First match wins, searched in the lower-cased name without a trailing "weight". Order matters where spellings overlap:
# norms before the blocks that hold them, an output projection before the bare "proj" it contains.
_TABLE: tuple[tuple[str, str], ...] = (
    (r"norm(\d+|_(\d|f|pre|post|before|after))?(\.(bias|scale|gamma|beta))?$|(^|[._])(ln|bn)(\d+|_[0-9a-z]+)?(\.bias)?$", "norm"),
    # Tables of relative positions and of segments, which no token looks up.
    (r"position_bias_mlp\.\d+$|relative_(attention|position)_bias(_table)?(\.relative_position_bias_table)?$|seg_embed$|(r_[rsw]_)bias$", "other"),
    (r"(^|\.)((tok|token|word|pos|position|token_type)_)?(embed|emb|embeddings?)$|(^|\.)(embed_(tokens|positions|in)|wte|wpe|shared|value_embeds\.\d+)$", "embed"),
    # RWKV: its time mixing closes with `output`; in its channel mixing key and value are the two sides of an MLP, receptance its gate.
    (r"(feed_forward|ffn|channel_mix(er)?)\.key$", "mlp_up"),
    (r"(feed_forward|ffn|channel_mix(er)?)\.value$", "mlp_down"),
    (r"(feed_forward|ffn|channel_mix(er)?)\.receptance$", "mlp_gate"),
    (r"(attention|att|attn|time_mix(er)?)\.receptance$", "attn_q"),
    (r"(attention|att|attn|time_mix(er)?)\.output$", "attn_o"),
    # The router of a mixture of experts, and the gate of an expert that all share, look like gates and are none.
    (r"(^|\.)(mlp|ffn|feed_forward|moe|block_sparse_moe|router|mixer)\.gate$|(^|[._])router(\.(gate|layer|classifier|weights?))?$|shared_expert_gate$", "router"),
    (r"(^|\.)((lm_|mlm_)?head(\.(dense|decoder|fc))?|embed_out|output(_layer)?|proj_out|classifier|unembed|score)$|predictions\.(decoder|dense|transform\.dense)$", "head"),
    (r"(^|\.)(visual|text)_projection$", "head"),
    (r"(mixer|mamba(_decoder)?|ssm|mamba_mixer|linear_attn)\.in_proj(_[a-z]+)?$", "ssm_in"),
    (r"(mixer|mamba(_decoder)?|ssm|mamba_mixer|linear_attn)\.out_proj$", "ssm_out"),
    (r"(mixer|mamba|ssm|mamba_mixer)\.x_proj$", "ssm_x"),
    (r"(mixer|mamba|ssm|mamba_mixer)\.dt_proj$", "ssm_dt"),
    (r"(^|\.)a_log$", "ssm_a"),
    # RG-LRU's block: two branches in, one out.
    (r"temporal_block\.linear_[xy]$", "ssm_in"),
    (r"temporal_block\.linear_out$", "ssm_out"),
    # Latent attention (DeepSeek): queries, and keys and values together, go through a narrow middle.
    (r"(^|\.)(q_a_proj|wq_a|q_down_proj|q_proj_down)$", "attn_q_a"),
    (r"(^|\.)(q_b_proj|wq_b|q_up_proj|q_proj_up)$", "attn_q_b"),
    (r"(^|\.)(kv_a_proj(_with_mqa)?|wkv_a|kv_down_proj|kv_proj_down)$", "attn_kv_a"),
    (r"(^|\.)(kv_b_proj|wkv_b|kv_up_proj|kv_proj_up)$", "attn_kv_b"),
    # Fused projections: GPT-2 and nanoGPT c_attn, NeoX query_key_value, torch.nn.MultiheadAttention in_proj_weight, ViT and others qkv.
    (r"(^|\.)(c_attn|query_key_value|in_proj|c_qkv|w_pack)$|(^|[._])w?qkv(_proj)?$|(attn|attention)\.attn$", "attn_qkv"),
    (r"(^|\.)(q_proj|wq|to_q|c_q|query(_proj)?|q|q_lin)$", "attn_q"),
    (r"(^|\.)(k_proj|wk|to_k|c_k|key(_proj)?|k|k_lin)$", "attn_k"),
    (r"(^|\.)(v_proj|wv|to_v|c_v|value(_proj)?|v|v_lin)$", "attn_v"),
    (r"(^|\.)(gate_up_proj|gate_up|w13|w12|up_gate_proj|gate_and_up_proj)$|mlp\.wi$", "mlp_gate_up"),  # ModernBERT's Wi is both
    # T5's DenseReluDense.wo and ModernBERT's mlp.Wo close an MLP; elsewhere wo closes attention.
    (r"(^|\.)(down_proj|w2|down|w_down)$|(densereludense|mlp|ffn|feed_forward)\.wo$", "mlp_down"),
    # BERT's attention.output.dense and NeoX's attention.dense; GPT-2's attn.c_proj.
    (r"(attn|attention)\.(output_gate|gate_proj|g_proj|gate)$", "attn_gate"),
    (r"(^|\.)(o_proj|wo|to_out(\.0)?|out_proj|o|out_lin)$|(attn|attention)\.(c_proj|proj|linear_proj|dense|output\.dense)$", "attn_o"),
    (r"(^|\.)(gate_proj|w1|wi_0|gate|w_gate)$", "mlp_gate"),
    (r"(^|\.)(up_proj|w3|wi_1|up|w_up)$", "mlp_up"),
    (r"(^|\.)(c_fc|fc1|wi|dense_h_to_4h|fc_in|lin1|linear_?1|linear_fc1|ffn|fc|fc_1)$|intermediate(\.dense|_dense)$|ff\.layer_1$|mlp\.0$", "mlp_fc"),
    (r"(^|\.)(fc2|dense_4h_to_h|fc_out|lin2|linear_?2|linear_fc2|ffn_output|output_dense|fc_2)$|output\.dense$|ff\.layer_2$|mlp\.([23]|proj|c_proj)$", "mlp_proj"),
    (r"(^|[._])(conv|convolution)(_?[0-9a-z]*)$|(^|\.)(dwconv|pwconv[12]|patch_embeddings?)$|patch_embed(dings|ding|s)?\.proj(ection)?$", "conv"),
    (r"(^|\.)(downsampling_layer|downsample)\.(\d+|reduction)$|(^|\.)shortcut\.\d+$|sequence_reduction$|\.conv\.parametrizations\.", "conv"),
    (r"\.layer\.\d+\.attention\.\d+$|(^|[._])se\.(fc|conv)", "conv"),  # squeeze and excitation
)  # fmt: skip
_COMPILED = tuple((re.compile(pattern), operator) for pattern, operator in _TABLE)

# The factors of a low-rank adapter, named after the layer that they adapt: q_proj.lora_A.default, in Zamba2 q_proj_adapter_list.3.0.
_ADAPTER = re.compile(r"[._](?:lora_(?:embedding_)?|adapter_list\.\d+\.)(?P<side>[ab01])(?:\.[a-z0-9_]+)?$")
# Wrappers put these in front of or inside names: DistributedDataParallel, torch.compile, FSDP, activation checkpointing.
_WRAPPERS = re.compile(r"(^|(?<=\.))(module|_orig_mod|_fsdp_wrapped_module|_checkpoint_wrapped_module)\.")
_LAYER = re.compile(r"(?:^|\.)(?:[a-z_]*(?:layers?|blocks?|stages?)|h|encoder|decoder|attentions|ffns)[._]?(\d{1,9})(?=\.)")

# Experts in a list, each with matrices of its own, and experts in one tensor, whose slices are numbered.
_EXPERT = re.compile(r"(?:^|\.)(?:[a-z]*(?<!shared)_)?experts?[._]?(?P<expert>\d{1,9})(?=\.|$)")
_SLICE_OF_EXPERTS = re.compile(r"(?:^|\.)(?:[a-z]*(?<!shared)_)?experts?\.(?:.*\.)?[^.]*\[(?P<expert>\d{1,9})\]$")
# Blocks within stages: Swin's layers.1.blocks.0, ConvNeXt's stages.1.layers.0 (or .blocks.0), torchvision's layer1.0.
_STAGE = re.compile(r"(?:^|(?<=\.))(?:stages?[._]?|layers[._]?|layer(?=\d))(?P<stage>\d{1,9})(?=\.)")
_BLOCK = re.compile(
    r"(?:^|(?<=\.))(?:(?:stages?|layers)[._]?(?=\d+\.(?:blocks?|layers?)[._]?\d)|layer(?=\d+\.\d))"
    r"(?P<stage>\d{1,9})\.(?:blocks?[._]?|layers?[._]?)?(?P<block>\d{1,9})(?=\.)"
)


def clean_name(name: str) -> str:
    """The name as the bare model spells it, without what wrappers add: `module.`, `_orig_mod.` and the like.

    >>> clean_name("module._orig_mod.layers.3.attn.q.weight")
    'layers.3.attn.q.weight'
    """
    return _WRAPPERS.sub("", name)


def classify(name: str, rule: OperatorRule | None = None) -> str:
    """Operator type of a parameter by its name; `other` where nothing matches.

    Args:
        name: dotted parameter name, as from `model.named_parameters()`.
        rule: a mapping from regular expressions to operators, or a function of the name; it wins over the table.

    >>> classify("model.layers.3.self_attn.v_proj.weight"), classify("transformer.h.0.mlp.c_proj.weight")
    ('attn_v', 'mlp_proj')
    >>> classify("tower.mixer", {r"mixer$": "attn_o"})
    'attn_o'
    """
    if callable(rule):
        if (chosen := rule(name)) is not None:
            return chosen
    elif rule is not None:
        for pattern, operator in rule.items():
            if re.search(pattern, name):
                return operator
    # torch.nn.MultiheadAttention spells in_proj_weight what every other module spells in_proj.weight.
    stem = (
        clean_name(name).lower().removesuffix("weight").rstrip("._").removesuffix(".base_layer")
    )  # peft's name for the layer that it adapts
    adapter = _ADAPTER.search(stem)
    if adapter is None:
        return _of_table(stem)
    return f"{_of_table(stem[: adapter.start()])}.adapter_{'a' if adapter['side'] in ('a', '0') else 'b'}"


def _of_table(stem: str) -> str:
    return next((operator for pattern, operator in _COMPILED if pattern.search(stem)), "other")


def layer_index(name: str) -> int:
    """Index of the layer a parameter belongs to, −1 where the name holds none; the outermost where layers are nested.

    In a ConvNet that is the stage, which grows with depth where the block's index starts again.

    >>> layer_index("model.layers.17.mlp.up_proj.weight"), layer_index("lm_head.weight")
    (17, -1)
    """
    found = _LAYER.search(clean_name(name))
    return int(found.group(1)) if found else -1


def layer_indices(names: Iterable[str]) -> dict[str, int]:
    """Index of the layer of every name of a model, as :func:`layer_index`; where stages hold blocks, these are counted on from stage to stage.

    What a stage holds beside its blocks belongs to its first one.

    >>> layer_indices(["layer1.0.conv1.weight", "layer1.1.conv1.weight", "layer2.0.conv1.weight", "fc.weight"])
    {'layer1.0.conv1.weight': 0, 'layer1.1.conv1.weight': 1, 'layer2.0.conv1.weight': 2, 'fc.weight': -1}
    """
    names = list(names)
    blocks = {name: found for name in names if (found := _BLOCK.search(clean_name(name)))}
    order: dict[str, list[tuple[int, int]]] = {}
    for name, found in blocks.items():
        order.setdefault(clean_name(name)[: found.start()], []).append((int(found["stage"]), int(found["block"])))
    counted = {prefix: {key: i for i, key in enumerate(sorted(set(keys)))} for prefix, keys in order.items()}
    indices: dict[str, int] = {}
    for name in names:
        clean = clean_name(name)
        if (found := blocks.get(name)) is not None:
            indices[name] = counted[clean[: found.start()]][int(found["stage"]), int(found["block"])]
        elif (stage := _STAGE.search(clean)) is not None and (of_model := counted.get(clean[: stage.start()])):
            indices[name] = next((i for (number, _), i in of_model.items() if number == int(stage["stage"])), layer_index(name))
        else:
            indices[name] = layer_index(name)
    return indices


def expert_index(name: str) -> int:
    """Index of the expert of a mixture that a matrix belongs to, −1 where the name tells none: shared experts have none.

    Of experts that lie in one tensor the slice is the expert.

    >>> expert_index("layers.3.mlp.experts.17.down_proj.weight"), expert_index("layers.3.mlp.experts.down_proj[17]")
    (17, 17)
    >>> expert_index("layers.3.mlp.shared_experts.0.down_proj.weight"), expert_index("layers.3.mlp.down_proj.weight")
    (-1, -1)
    """
    found = _EXPERT.search(clean_name(name)) or _SLICE_OF_EXPERTS.search(name)
    return int(found["expert"]) if found else -1


def without_layer(name: str) -> str:
    """The name without the index of its layer, the same in all layers.

    >>> without_layer("model.layers.17.mlp.up_proj.weight"), without_layer("lm_head.weight")
    ('model.layers.*.mlp.up_proj.weight', 'lm_head.weight')
    """
    name = clean_name(name)
    if (block := _BLOCK.search(name)) is not None:
        name = f"{name[: block.start('block')]}*{name[block.end('block') :]}"
    found = _LAYER.search(name)
    return f"{name[: found.start(1)]}*{name[found.end(1) :]}" if found else name


def ordered(operators: Sequence[str]) -> list[str]:
    """The distinct operators among `operators` in the table's order, the user's own ones after it by name."""
    present = set(operators)
    return [name for name in OPERATORS if name in present] + sorted(present.difference(OPERATORS))
