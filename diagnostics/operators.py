"""From a parameter's name to its operator type and layer: one ordered table of patterns.

Types: attn_q attn_k attn_v attn_o attn_qkv mlp_gate mlp_up mlp_down mlp_fc mlp_proj embed head conv norm other.
"""

import re
from collections.abc import Callable, Mapping, Sequence
from typing import TypeAlias

# User patterns: regular expression → operator, tried before the table; or a function of the name, None to fall through.
OperatorRule: TypeAlias = Mapping[str, str] | Callable[[str], str | None]

OPERATORS = (
    "attn_q", "attn_k", "attn_v", "attn_o", "attn_qkv",
    "mlp_gate", "mlp_up", "mlp_down", "mlp_fc", "mlp_proj",
    "embed", "head", "conv", "norm", "other",
)  # fmt: skip

# First match wins, searched in the lower-cased name without a trailing "weight". Order matters where spellings overlap:
# norms before the blocks that hold them, an output projection before the bare "proj" it contains.
_TABLE: tuple[tuple[str, str], ...] = (
    (r"norm(\d+|_(\d|f|pre|post|before|after))?(\.(bias|scale|gamma|beta))?$|(^|[._])(ln|bn)(\d+|_[0-9a-z]+)?(\.bias)?$", "norm"),
    (r"(^|\.)((tok|token|word|pos|position|token_type)_)?(embed|emb|embeddings?)$|(^|\.)(embed_(tokens|positions|in)|wte|wpe|shared)$", "embed"),
    (r"(^|\.)(lm_head(\.dense|\.decoder)?|embed_out|output(_layer)?|head(\.fc)?|classifier|unembed)$|predictions\.(decoder|transform\.dense)$", "head"),
    # Look like projections and gates and are none: the router of a mixture of experts, the projections of a state-space mixer.
    (r"(^|\.)(mlp|ffn|feed_forward|moe|block_sparse_moe|router)\.gate$|(^|\.)(mixer|mamba|ssm)\.(in|out)_proj$", "other"),
    # Fused projections: GPT-2 and nanoGPT c_attn, NeoX query_key_value, torch.nn.MultiheadAttention in_proj_weight, ViT and others qkv.
    (r"(^|\.)(c_attn|query_key_value|in_proj)$|(^|[._])w?qkv(_proj)?$", "attn_qkv"),
    (r"(^|\.)(q_proj|wq|to_q|c_q|query|q|q_lin)$", "attn_q"),
    (r"(^|\.)(k_proj|wk|to_k|c_k|key|k|k_lin)$", "attn_k"),
    (r"(^|\.)(v_proj|wv|to_v|c_v|value|v|v_lin)$", "attn_v"),
    # T5's DenseReluDense.wo and ModernBERT's mlp.Wo close an MLP; elsewhere wo closes attention.
    (r"(^|\.)(down_proj|w2|down|w_down)$|(densereludense|mlp|ffn|feed_forward)\.wo$", "mlp_down"),
    # BERT's attention.output.dense and NeoX's attention.dense; GPT-2's attn.c_proj.
    (r"(^|\.)(o_proj|wo|to_out(\.0)?|out_proj|o|out_lin)$|(attn|attention)\.(c_proj|proj|linear_proj|dense|output\.dense)$", "attn_o"),
    (r"(^|\.)(gate_proj|w1|wi_0|gate|w_gate)$", "mlp_gate"),
    (r"(^|\.)(up_proj|w3|wi_1|up|w_up)$", "mlp_up"),
    (r"(^|\.)(c_fc|fc1|wi|dense_h_to_4h|fc_in|lin1|linear_?1|linear_fc1)$|intermediate\.dense$|mlp\.0$", "mlp_fc"),
    (r"(^|\.)(fc2|dense_4h_to_h|fc_out|lin2|linear_?2|linear_fc2)$|output\.dense$|mlp\.([23]|proj|c_proj)$", "mlp_proj"),
    (r"(^|[._])conv(_?[0-9a-z]*)$|(^|\.)(dwconv|pwconv[12]|patch_embedding)$|patch_embed(dings|ding)?\.proj(ection)?$", "conv"),
)  # fmt: skip
_COMPILED = tuple((re.compile(pattern), operator) for pattern, operator in _TABLE)

# Wrappers put these in front of or inside names: DistributedDataParallel, torch.compile, FSDP, activation checkpointing.
_WRAPPERS = re.compile(r"(^|(?<=\.))(module|_orig_mod|_fsdp_wrapped_module|_checkpoint_wrapped_module)\.")
_LAYER = re.compile(r"(?:^|\.)(?:[a-z_]*(?:layers?|blocks?|stages?)|h|encoder|decoder)[._]?(\d{1,9})(?=\.)")


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
    stem = clean_name(name).lower().removesuffix("weight").rstrip("._")
    return next((operator for pattern, operator in _COMPILED if pattern.search(stem)), "other")


def layer_index(name: str) -> int:
    """Index of the layer a parameter belongs to, −1 where the name holds none; the outermost where layers are nested.

    In a ConvNet that is the stage, which grows with depth where the block's index starts again.

    >>> layer_index("model.layers.17.mlp.up_proj.weight"), layer_index("lm_head.weight")
    (17, -1)
    """
    found = _LAYER.search(clean_name(name))
    return int(found.group(1)) if found else -1


def without_layer(name: str) -> str:
    """The name without the index of its layer, the same in all layers.

    >>> without_layer("model.layers.17.mlp.up_proj.weight"), without_layer("lm_head.weight")
    ('model.layers.*.mlp.up_proj.weight', 'lm_head.weight')
    """
    name = clean_name(name)
    found = _LAYER.search(name)
    return f"{name[: found.start(1)]}*{name[found.end(1) :]}" if found else name


def ordered(operators: Sequence[str]) -> list[str]:
    """The distinct operators among `operators` in the table's order, the user's own ones after it by name."""
    present = set(operators)
    return [name for name in OPERATORS if name in present] + sorted(present.difference(OPERATORS))
