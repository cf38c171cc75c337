"""A small GPT on bytes, in the usual public form: settings as globals, overridden by --key=value, and one file that does all."""

import math
import pydoc_data.topics
import sys
from ast import literal_eval

# -----------------------------------------------------------------------------
out_steps = 6
eval_interval = 3
batch_size = 4
block_size = 16
gradient_accumulation_steps = 2
n_layer = 2
n_head = 2
n_embd = 16
dropout = 0.1
learning_rate = 1e-3
warmup_iters = 2
weight_decay = 0.1
beta2 = 0.95
grad_clip = 1.0
seed = 1337
compile = False
# -----------------------------------------------------------------------------
config_keys = [k for k, v in globals().items() if not k.startswith("_") and isinstance(v, (int, float, bool, str))]
for arg in sys.argv[1:]:
    key, value = arg.removeprefix("--").split("=")
    if key not in config_keys:
        raise ValueError(f"Unknown config key: {key}")
    exec(f"{key} = {literal_eval(value)!r}")
    print(f"Overriding: {key} = {value}")

import torch  # noqa: E402
from torch import nn  # noqa: E402
from torch.nn import functional as F  # noqa: E402


class CausalSelfAttention(nn.Module):
    def __init__(self):
        super().__init__()
        self.c_attn = nn.Linear(n_embd, 3 * n_embd, bias=False)
        self.c_proj = nn.Linear(n_embd, n_embd, bias=False)

    def forward(self, x):
        b, t, c = x.shape
        q, k, v = (part.view(b, t, n_head, c // n_head).transpose(1, 2) for part in self.c_attn(x).split(n_embd, dim=2))
        y = F.scaled_dot_product_attention(q, k, v, dropout_p=dropout if self.training else 0.0, is_causal=True)
        return self.c_proj(y.transpose(1, 2).reshape(b, t, c))


class MLP(nn.Module):
    def __init__(self):
        super().__init__()
        self.c_fc = nn.Linear(n_embd, 4 * n_embd)
        self.c_proj = nn.Linear(4 * n_embd, n_embd)
        self.dropout = nn.Dropout(dropout)

    def forward(self, x):
        return self.dropout(self.c_proj(F.gelu(self.c_fc(x))))


class Block(nn.Module):
    def __init__(self):
        super().__init__()
        self.ln_1, self.attn = nn.LayerNorm(n_embd), CausalSelfAttention()
        self.ln_2, self.mlp = nn.LayerNorm(n_embd), MLP()

    def forward(self, x):
        x = x + self.attn(self.ln_1(x))
        return x + self.mlp(self.ln_2(x))


class GPT(nn.Module):
    def __init__(self):
        super().__init__()
        wte, wpe = nn.Embedding(256, n_embd), nn.Embedding(block_size, n_embd)
        h = nn.ModuleList([Block() for _ in range(n_layer)])
        self.transformer = nn.ModuleDict({"wte": wte, "wpe": wpe, "h": h, "ln_f": nn.LayerNorm(n_embd)})
        self.lm_head = nn.Linear(n_embd, 256, bias=False)
        self.transformer.wte.weight = self.lm_head.weight  # weight tying

    def forward(self, idx, targets):
        x = self.transformer.wte(idx) + self.transformer.wpe(torch.arange(idx.shape[1]))
        for block in self.transformer.h:
            x = block(x)
        return F.cross_entropy(self.lm_head(self.transformer.ln_f(x)).flatten(0, 1), targets.flatten())

    def configure_optimizers(self):
        params = list(self.parameters())
        groups = [
            {"params": [p for p in params if p.dim() >= 2], "weight_decay": weight_decay},
            {"params": [p for p in params if p.dim() < 2], "weight_decay": 0.0},
        ]
        return torch.optim.AdamW(groups, lr=learning_rate, betas=(0.9, beta2))


torch.manual_seed(seed)
data = torch.tensor(list("\n".join(pydoc_data.topics.topics.values()).encode()), dtype=torch.uint8)


def get_batch():
    ix = torch.randint(len(data) - block_size, (batch_size,))
    x = torch.stack([data[i : i + block_size] for i in ix]).long()
    y = torch.stack([data[i + 1 : i + 1 + block_size] for i in ix]).long()
    return x, y


@torch.no_grad()
def estimate_loss():
    model.eval()
    loss = torch.stack([model(*get_batch()) for _ in range(2)]).mean()
    model.train()
    return loss.item()


model = GPT()
optimizer = model.configure_optimizers()
if compile:
    model = torch.compile(model, backend="eager")
for iter_num in range(out_steps):
    warm = min(1.0, (iter_num + 1) / warmup_iters)
    for param_group in optimizer.param_groups:
        param_group["lr"] = learning_rate * warm * 0.5 * (1 + math.cos(math.pi * iter_num / out_steps))
    if iter_num % eval_interval == 0:
        print(f"step {iter_num}: val loss {estimate_loss().hex()}")
    for _ in range(gradient_accumulation_steps):
        loss = model(*get_batch()) / gradient_accumulation_steps
        loss.backward()
    norm = torch.nn.utils.clip_grad_norm_(model.parameters(), grad_clip)
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    print(f"iter {iter_num}: loss {loss.item().hex()}, norm {norm.item().hex()}")
print("rng", torch.rand(1).item().hex())
