"""The model and the optimizers of train_parts.py: Muon for hidden matrices, AdamW for all else."""

import torch
from torch import nn


class Layer(nn.Module):
    def __init__(self, width):
        super().__init__()
        self.q_proj, self.k_proj, self.v_proj, self.o_proj = (nn.Linear(width, width, bias=False) for _ in range(4))
        self.gate_proj, self.up_proj = nn.Linear(width, 2 * width, bias=False), nn.Linear(width, 2 * width, bias=False)
        self.down_proj = nn.Linear(2 * width, width, bias=False)
        self.norm = nn.RMSNorm(width)

    def forward(self, x):
        y = self.norm(x)
        x = x + self.o_proj(nn.functional.scaled_dot_product_attention(self.q_proj(y), self.k_proj(y), self.v_proj(y), is_causal=True))
        y = self.norm(x)
        return x + self.down_proj(nn.functional.silu(self.gate_proj(y)) * self.up_proj(y))


class Model(nn.Module):
    def __init__(self):
        super().__init__()
        self.embed_tokens = nn.Embedding(32, 16)
        self.layers = nn.Sequential(*(Layer(16) for _ in range(2)))
        self.lm_head = nn.Linear(16, 32, bias=False)

    def forward(self, x):
        return self.lm_head(self.layers(self.embed_tokens(x)))


def make_optimizers(model):
    hidden = [p for p in model.layers.parameters() if p.ndim == 2]
    rest = [p for p in model.parameters() if all(p is not h for h in hidden)]
    return [torch.optim.AdamW(rest, lr=3e-3), torch.optim.Muon(hidden, lr=0.02)]
