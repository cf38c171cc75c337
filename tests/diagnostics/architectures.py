"""How much of every architecture's matrices is named, measured on models without weights; printed as docs/names.md by `make names`.

Models of transformers are built on `meta` from their default configurations, with fewer layers where that changes no name. Those of other libraries are
lists of names and sizes, written out from their public code.
"""

import os
import re
import sys
import warnings
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from optiscope.diagnostics.operators import classify, layer_indices

DOCUMENT = Path(__file__).parents[2] / "docs" / "names.md"
# Of 99 tried, these need more than their default configuration (nemotron, dbrx) or a file (xlstm's kernels) and are left out.
TRANSFORMERS = [
    "llama",
    "mistral",
    "mixtral",
    "qwen2",
    "qwen3",
    "qwen2_moe",
    "qwen3_moe",
    "gemma",
    "gemma2",
    "gemma3_text",
    "phi",
    "phi3",
    "gpt2",
    "gpt_neo",
    "gpt_neox",
    "gptj",
    "gpt_oss",
    "opt",
    "bloom",
    "falcon",
    "mpt",
    "olmo",
    "olmo2",
    "olmoe",
    "cohere",
    "starcoder2",
    "stablelm",
    "persimmon",
    "codegen",
    "glm",
    "glm4",
    "deepseek_v2",
    "deepseek_v3",
    "llama4_text",
    "minimax",
    "jamba",
    "mamba",
    "mamba2",
    "falcon_mamba",
    "rwkv",
    "recurrent_gemma",
    "bert",
    "roberta",
    "electra",
    "albert",
    "distilbert",
    "deberta",
    "deberta-v2",
    "xlnet",
    "xlm",
    "mpnet",
    "t5",
    "mt5",
    "bart",
    "mbart",
    "pegasus",
    "marian",
    "whisper",
    "wav2vec2",
    "hubert",
    "clip",
    "clip_text_model",
    "siglip",
    "vit",
    "deit",
    "beit",
    "swin",
    "swinv2",
    "convnext",
    "convnextv2",
    "resnet",
    "regnet",
    "dinov2",
    "mobilenet_v2",
    "segformer",
    "modernbert",
    "granite",
    "granitemoe",
    "helium",
    "smollm3",
    "ernie4_5",
    "exaone4",
    "zamba2",
    "bamba",
    "lfm2",
]
_OWN_LAYERS = {"jamba", "zamba2", "bamba", "recurrent_gemma", "lfm2", "swin"}  # whose kinds of layers go by their number

SPELLED = {
    "torchvision ResNet": [
        "conv1.weight", "layer1.0.conv1.weight", "layer1.0.conv2.weight", "layer1.1.conv1.weight", "layer2.0.conv1.weight", "layer2.0.downsample.0.weight",
        "layer2.1.conv2.weight", "layer3.0.conv3.weight", "layer4.1.conv1.weight", "fc.weight",
    ],
    "torchvision ViT": [
        "conv_proj.weight", "encoder.layers.encoder_layer_0.self_attention.in_proj_weight", "encoder.layers.encoder_layer_0.self_attention.out_proj.weight",
        "encoder.layers.encoder_layer_1.mlp.0.weight", "encoder.layers.encoder_layer_1.mlp.3.weight", "heads.head.weight",
    ],
    "timm ViT": [
        "patch_embed.proj.weight", "blocks.0.attn.qkv.weight", "blocks.0.attn.proj.weight", "blocks.1.mlp.fc1.weight", "blocks.1.mlp.fc2.weight", "head.weight",
    ],
    "timm ConvNeXt": [
        "stem.0.weight", "stages.0.blocks.0.conv_dw.weight", "stages.0.blocks.0.mlp.fc1.weight", "stages.0.blocks.1.mlp.fc2.weight",
        "stages.1.downsample.1.weight", "stages.1.blocks.0.conv_dw.weight", "stages.1.blocks.1.mlp.fc1.weight", "head.fc.weight",
    ],
    "timm Swin": [
        "patch_embed.proj.weight", "layers.0.blocks.0.attn.qkv.weight", "layers.0.blocks.1.mlp.fc1.weight", "layers.1.downsample.reduction.weight",
        "layers.1.blocks.0.attn.proj.weight", "layers.1.blocks.1.mlp.fc2.weight", "head.fc.weight",
    ],
    "nanochat": [
        "transformer.wte.weight", "transformer.h.0.attn.c_q.weight", "transformer.h.0.attn.c_k.weight", "transformer.h.0.attn.c_v.weight",
        "transformer.h.0.attn.c_proj.weight", "transformer.h.1.mlp.c_fc.weight", "transformer.h.1.mlp.c_proj.weight", "value_embeds.1.weight", "lm_head.weight",
    ],
    "litgpt": [
        "transformer.wte.weight", "transformer.h.0.attn.qkv.weight", "transformer.h.0.attn.proj.weight", "transformer.h.0.mlp.fc_1.weight",
        "transformer.h.1.mlp.fc_2.weight", "transformer.h.1.mlp.proj.weight", "lm_head.weight",
    ],
    "torchtitan": [
        "tok_embeddings.weight", "layers.0.attention.wq.weight", "layers.0.attention.wk.weight", "layers.0.attention.wv.weight", "layers.0.attention.wo.weight",
        "layers.1.feed_forward.w1.weight", "layers.1.feed_forward.w2.weight", "layers.1.feed_forward.w3.weight", "layers.1.moe.router.gate.weight",
        "layers.1.moe.experts.w1", "layers.1.moe.experts.w2", "layers.1.moe.experts.w3", "layers.1.attention.wq_a.weight", "layers.1.attention.wq_b.weight",
        "layers.1.attention.wkv_a.weight", "layers.1.attention.wkv_b.weight", "output.weight",
    ],
    "state-spaces Mamba": [
        "backbone.embedding.weight", "backbone.layers.0.mixer.A_log", "backbone.layers.0.mixer.in_proj.weight", "backbone.layers.0.mixer.conv1d.weight",
        "backbone.layers.1.mixer.x_proj.weight", "backbone.layers.1.mixer.dt_proj.weight", "backbone.layers.1.mixer.out_proj.weight", "lm_head.weight",
    ],
    "RWKV": [
        "emb.weight", "blocks.0.att.receptance.weight", "blocks.0.att.key.weight", "blocks.0.att.value.weight", "blocks.0.att.output.weight",
        "blocks.1.ffn.key.weight", "blocks.1.ffn.value.weight", "blocks.1.ffn.receptance.weight", "head.weight",
    ],
    "peft on Llama": [
        "base_model.model.model.layers.0.self_attn.q_proj.base_layer.weight", "base_model.model.model.layers.0.self_attn.q_proj.lora_A.default.weight",
        "base_model.model.model.layers.0.self_attn.q_proj.lora_B.default.weight", "base_model.model.model.layers.1.mlp.down_proj.lora_A.default.weight",
    ],
}  # fmt: skip


@dataclass(frozen=True)
class Measured:
    """Of one architecture: its matrices, their types and layers by name."""

    operators: dict[str, str]
    layers: dict[str, int]

    @property
    def others(self) -> list[str]:
        """Names without a type, numbers left out."""
        return sorted({re.sub(r"\d+", "*", name) for name, operator in self.operators.items() if operator == "other"})

    @property
    def unnamed(self) -> int:
        """How many have none."""
        return Counter(self.operators.values())["other"]


def measured(names: list[str]) -> Measured:
    return Measured({name: classify(name) for name in names}, layer_indices(names))


def of_transformers() -> Iterator[tuple[str, Measured]]:
    """Matrices alone: of two and more sides longer than 1, and no bias of several experts or heads."""
    os.environ["HF_HUB_OFFLINE"] = "1"
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        import torch
        from transformers import CONFIG_MAPPING, AutoModel, AutoModelForCausalLM
        from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

        for name in TRANSFORMERS:
            config = CONFIG_MAPPING[name]()
            for key in ("num_hidden_layers", "n_layer", "num_layers", "n_layers"):
                given = getattr(config, key, None)
                if isinstance(given, int) and given > 4 and name not in _OWN_LAYERS and "layer_types" not in config.to_dict():
                    setattr(config, key, 4)
            with torch.device("meta"):
                model = (AutoModelForCausalLM if name in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES else AutoModel).from_config(config)
            matrices = [key for key, p in model.named_parameters() if sum(size > 1 for size in p.shape) >= 2]
            yield name, measured([key for key in matrices if not re.search(r"(^|[._])bias$", key)])


def all_architectures() -> dict[str, Measured]:
    """All that are measured, in their order."""
    return {**dict(of_transformers()), **{name: measured(names) for name, names in SPELLED.items()}}


def written_out(architectures: dict[str, Measured]) -> str:
    """The whole document."""
    matrices, unnamed = (sum(values) for values in zip(*((len(m.operators), m.unnamed) for m in architectures.values()), strict=True))
    rows = "".join(
        f"| {name} | {len(m.operators)} | {', '.join(sorted({*m.operators.values()} - {'other'}))} | {max(m.layers.values()) + 1} | {m.unnamed} | "
        f"{', '.join(f'`{other}`' for other in m.others)} |\n"
        for name, m in architectures.items()
    )
    return f"""# Names

Which operator types the matrices of an architecture get by their names, and how many layers are found (`make names` writes this table; a test fails when it
is stale). Models of transformers were built without weights from their default configurations, most with four layers; what stands after `peft` and the like
is a list of their spellings. Matrices have two and more sides that are longer than 1.

{1 - unnamed / matrices:.1%} of {matrices:,} matrices in {len(architectures)} architectures have a type; the others are `other` and listed.
`attn_q.adapter_a` is the first factor of a low-rank adapter of an `attn_q`. Give names of your own with `operators=` (README).

| architecture | matrices | types | layers | other | which |
|---|---|---|---|---|---|
{rows}"""


if __name__ == "__main__":
    sys.stdout.write(str(DOCUMENT.write_text(written_out(all_architectures()), encoding="utf-8")))
