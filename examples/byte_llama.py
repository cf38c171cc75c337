"""Train a small Llama on real text, with Optiscope attached. Copy this file and change it.

    python examples/byte_llama.py run.zarr

The text is the Python language reference that ships inside CPython; the model reads it byte by byte. Hidden matrices
are trained by Muon, the rest by AdamW. About 80 s of CPU time.
"""

import argparse
import hashlib
import pydoc_data.topics
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from optiscope.hooks import Recorder, attach

# Everything that can be recorded; without `measure` the first line is.
MEASURE = (
    "geometry", "update", "second_moment",
    "second_moment_map", "gradient", "blocks", "stacking", "precision",
)  # fmt: skip


@dataclass(frozen=True)
class Config:
    """Sizes of the model (d: width, heads) and of the training. The defaults make 803,968 parameters."""

    d: int = 128
    layers: int = 4
    heads: int = 4
    kv_heads: int = 2
    head_width: int | None = None  # None: d/heads
    inner: int = 352
    sequence: int = 128
    batch: int = 16
    steps: int = 300
    every: int = 10  # record every 10th step
    seed: int = 0


# 125 k parameters, 300 steps in a few seconds: for a quick look, and for the tests.
SHORT = Config(d=64, layers=2, heads=4, kv_heads=2, inner=176, sequence=64, batch=8)


class Attention(nn.Module):
    """Causal attention with rotary positions and fewer key/value heads than query heads."""

    def __init__(self, config: Config) -> None:
        super().__init__()
        self.heads, self.kv_heads, self.width = config.heads, config.kv_heads, config.head_width or config.d // config.heads
        self.q_proj = nn.Linear(config.d, self.heads * self.width, bias=False)
        self.k_proj = nn.Linear(config.d, self.kv_heads * self.width, bias=False)
        self.v_proj = nn.Linear(config.d, self.kv_heads * self.width, bias=False)
        self.o_proj = nn.Linear(self.heads * self.width, config.d, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        b, t, _ = x.shape
        q = rotate(self.q_proj(x).view(b, t, self.heads, self.width).transpose(1, 2))
        k = rotate(self.k_proj(x).view(b, t, self.kv_heads, self.width).transpose(1, 2))
        v = self.v_proj(x).view(b, t, self.kv_heads, self.width).transpose(1, 2)
        y = F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)
        return self.o_proj(y.transpose(1, 2).reshape(b, t, -1))


class MLP(nn.Module):
    """SwiGLU."""

    def __init__(self, config: Config) -> None:
        super().__init__()
        self.gate_proj = nn.Linear(config.d, config.inner, bias=False)
        self.up_proj = nn.Linear(config.d, config.inner, bias=False)
        self.down_proj = nn.Linear(config.inner, config.d, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x))


class Block(nn.Module):
    def __init__(self, config: Config) -> None:
        super().__init__()
        self.attn_norm, self.mlp_norm = nn.RMSNorm(config.d), nn.RMSNorm(config.d)
        self.attn, self.mlp = Attention(config), MLP(config)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attn(self.attn_norm(x))
        return x + self.mlp(self.mlp_norm(x))


class ByteLlama(nn.Module):
    """Llama over the 256 byte values; `forward` gives the mean cross-entropy in nats per byte."""

    def __init__(self, config: Config) -> None:
        super().__init__()
        self.embed_tokens = nn.Embedding(256, config.d)
        self.layers = nn.ModuleList(Block(config) for _ in range(config.layers))
        self.norm = nn.RMSNorm(config.d)
        self.lm_head = nn.Linear(config.d, 256, bias=False)

    def logits(self, tokens: Tensor) -> Tensor:
        x = self.embed_tokens(tokens)
        for layer in self.layers:
            x = layer(x)
        return self.lm_head(self.norm(x))

    def forward(self, tokens: Tensor, targets: Tensor) -> Tensor:
        return F.cross_entropy(self.logits(tokens).flatten(0, 1), targets.flatten())


def rotate(x: Tensor) -> Tensor:
    """Rotary position embedding over the last dimension; x has shape (batch, heads, time, width)."""
    half = x.shape[-1] // 2
    frequency = 10000.0 ** (-torch.arange(half, dtype=torch.float32, device=x.device) / half)
    angle = torch.arange(x.shape[-2], dtype=torch.float32, device=x.device)[:, None] * frequency
    first, second = x.chunk(2, dim=-1)
    return torch.cat((first * angle.cos() - second * angle.sin(), first * angle.sin() + second * angle.cos()), dim=-1)


def language_reference() -> tuple[Tensor, Tensor]:
    """Training and validation bytes (95 % and 5 %) of the Python language reference.

    Topics share paragraphs; each is kept once, or a third of the validation text would stand in the training text too.
    """
    paragraphs = (p for topic in pydoc_data.topics.topics.values() for p in topic.split("\n\n"))
    text = "\n\n".join(dict.fromkeys(paragraphs)).encode()
    data = torch.frombuffer(bytearray(text), dtype=torch.uint8).long()
    split = int(0.95 * len(data))
    return data[:split], data[split:]


def batches(data: Tensor, config: Config, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Random windows of `data` and the same windows one byte later, each of shape (batch, sequence)."""
    starts = torch.randint(len(data) - config.sequence - 1, (config.batch,), generator=generator)
    window = starts[:, None] + torch.arange(config.sequence + 1)
    return data[window][:, :-1], data[window][:, 1:]


def record_curvature(recorder: Recorder, model: ByteLlama, tokens: Tensor, targets: Tensor, config: Config, *, last: bool) -> None:
    """Record the Hessian's and the Gauss–Newton diagonal; at the last step also exact Hessians of two rows of three matrices, and blocks."""

    def loss() -> Tensor:
        with sdpa_kernel(SDPBackend.MATH):  # the CPU's flash attention has no second backward pass
            return model(tokens, targets)

    def logits() -> Tensor:
        return model.logits(tokens)

    if last:
        some = rf"layers\.{config.layers - 1}\.(attn\.q|mlp\.up)_proj|lm_head"
        recorder.curvature(loss, logits_fn=logits, probes=16, draws=16, exact=2 * config.d, only=some)
    recorder.curvature(loss, logits_fn=logits, probes=16, draws=16, block_probes=3 if last else 0)


@torch.no_grad()
def validation_loss(model: nn.Module, data: Tensor, config: Config) -> float:
    """Mean loss over the validation text in consecutive windows, nats per byte."""
    count = (len(data) - 1) // config.sequence
    tokens = data[: count * config.sequence].view(count, config.sequence)
    targets = data[1 : count * config.sequence + 1].view(count, config.sequence)
    losses = [model(t, y).item() * len(t) for t, y in zip(tokens.split(64), targets.split(64), strict=True)]
    return sum(losses) / count


def optimizers_of(model: ByteLlama) -> tuple[torch.optim.Muon, torch.optim.AdamW]:
    """Muon for the matrices of the layers, AdamW for all else."""
    hidden = [p for p in model.layers.parameters() if p.ndim == 2]
    rest = [p for p in model.parameters() if not any(p is h for h in hidden)]
    return torch.optim.Muon(hidden, lr=0.02, weight_decay=0.0), torch.optim.AdamW(rest, lr=3e-3, weight_decay=0.0)


def train(store: str | Path, config: Config, report: Callable[[int, float], None]) -> tuple[float, float]:
    """Train with the recorder attached and give the validation loss before and after.

    `report(step, training loss)` is called after every step.
    """
    torch.manual_seed(config.seed)
    generator = torch.Generator().manual_seed(config.seed)
    training, validation = language_reference()
    model = ByteLlama(config)
    muon, adamw = optimizers_of(model)
    before = validation_loss(model, validation, config)

    about = {  # what the recorder cannot see, for `diag compare`
        "data": f"Python language reference {hashlib.sha256(bytes(training.tolist())).hexdigest()[:12]}",
        "tokens_per_step": config.batch * config.sequence,
        "seed": config.seed,
        "budget": f"{config.steps} steps",
    }
    # A batch of its own for the curvature, so that the training's data go on as they would without.
    few = replace(config, batch=max(1, 2 * config.d // config.sequence))
    tokens, targets = batches(training, few, torch.Generator().manual_seed(config.seed + 1))
    with attach([muon, adamw], model, store, every=config.every, measure=MEASURE, about=about) as recorder:
        for step in range(1, config.steps + 1):
            loss = model(*batches(training, config, generator))
            loss.backward()
            muon.step()
            adamw.step()
            muon.zero_grad()
            adamw.zero_grad()
            recorder.log(loss=loss)
            if step % (10 * config.every) == 0 or step == config.steps:
                record_curvature(recorder, model, tokens, targets, config, last=step == config.steps)
            report(step, loss.item())
        after = validation_loss(model, validation, config)
        recorder.log(validation_loss=after)
    return before, after


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("store", help="where to write the run, e.g. run.zarr")
    parser.add_argument("--steps", type=int, default=Config.steps)
    arguments = parser.parse_args()

    def show(step: int, loss: float) -> None:
        if step % 10 == 0:
            print(f"step {step:4d}  loss {loss:.3f} nats/byte", flush=True)

    first, last = train(arguments.store, Config(steps=arguments.steps), show)
    print(f"validation loss {first:.2f} -> {last:.2f} nats/byte; recorded in {arguments.store}")
