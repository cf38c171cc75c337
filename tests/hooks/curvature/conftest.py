"""A tiny transformer in float64 whose Hessian is taken whole, by torch.func."""

import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn


class TinyTransformer(nn.Module):
    """One layer of attention and MLP of width 4 over 6 tokens, logits over 6 classes: 148 weights in 7 matrices, dropout if asked for."""

    def __init__(self, dropout: float = 0.0) -> None:
        super().__init__()
        self.embed = nn.Embedding(6, 4)
        self.q_proj, self.k_proj, self.v_proj = (nn.Linear(4, 4, bias=False) for _ in range(3))
        self.up_proj, self.down_proj = nn.Linear(4, 6), nn.Linear(6, 4)
        self.drop = nn.Dropout(dropout)
        self.lm_head = nn.Linear(4, 6, bias=False)

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.embed(tokens)
        scores = (self.q_proj(x) @ self.k_proj(x).mT / 2).masked_fill(
            torch.ones(tokens.shape[1], tokens.shape[1]).triu(1).bool(), -torch.inf
        )
        x = x + scores.softmax(-1) @ self.v_proj(x)
        x = x + self.drop(self.down_proj(F.silu(self.up_proj(x))))
        return self.lm_head(x)


class Case:
    """A model, a batch, its loss and logits, and exact references over the weights of its matrices."""

    def __init__(self, dropout: float = 0.0, dtype: torch.dtype = torch.float64) -> None:
        torch.manual_seed(0)
        self.model = TinyTransformer(dropout).to(dtype)
        with torch.no_grad():
            for p in self.model.parameters():
                p.mul_(1.5)
        self.tokens, self.targets = torch.randint(6, (2, 3, 5))
        self.names = [name for name, p in self.model.named_parameters() if p.ndim == 2]

    def loss(self) -> Tensor:
        return F.cross_entropy(self.model(self.tokens).flatten(0, 1), self.targets.flatten())

    def logits(self) -> Tensor:
        out: Tensor = self.model(self.tokens)
        return out

    def hessian(self) -> dict[tuple[str, str], Tensor]:
        """H_jk as matrices over the flattened weights of j and k, by forward over reverse differentiation."""
        fixed = {name: p.detach() for name, p in self.model.named_parameters()}

        def loss(chosen: dict[str, Tensor]) -> Tensor:
            logits = torch.func.functional_call(self.model, {**fixed, **chosen}, (self.tokens,))
            return F.cross_entropy(logits.flatten(0, 1), self.targets.flatten())

        chosen = {name: fixed[name] for name in self.names}
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", DeprecationWarning)  # torch's own, of torch.jit, at the first forward derivative
            blocks: Any = torch.func.hessian(loss)(chosen)
        return {(j, k): blocks[j][k].reshape(fixed[j].numel(), fixed[k].numel()) for j in self.names for k in self.names}

    def gauss_newton(self) -> dict[str, Tensor]:
        """Diagonal of the mean over tokens of Jᵀ(diag p − ppᵀ)J, class by class."""
        logits = self.logits().flatten(0, 1)
        p = logits.softmax(-1).detach()
        found = {name: torch.zeros_like(w) for name, w in self.model.named_parameters() if name in self.names}
        weights = [dict(self.model.named_parameters())[name] for name in self.names]
        for b in range(len(logits)):
            rows = [torch.autograd.grad(logits[b, c], weights, retain_graph=True, allow_unused=True) for c in range(6)]
            for name, *jacobian in zip(self.names, *rows, strict=True):
                if jacobian[0] is None:
                    continue
                mean = sum(p[b, c] * jacobian[c] for c in range(6))
                found[name] += sum(p[b, c] * (jacobian[c] - mean) ** 2 for c in range(6)) / len(logits)
        return found


@pytest.fixture
def case() -> Callable[..., Case]:
    return Case
