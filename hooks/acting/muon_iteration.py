"""torch.optim.Muon's Newton–Schulz iteration with coefficients per step, in the place of torch's own function."""

from typing import Any

import torch
from torch import Tensor
from torch.optim import _muon as torch_muon

_torch_newton_schulz = torch_muon._zeropower_via_newtonschulz


def newton_schulz_per_step(grad: Tensor, ns_coefficients: Any, ns_steps: int, eps: float) -> Tensor:
    """torch.optim.Muon's iteration (bfloat16, X₀ = M/max(‖M‖_F, eps)) with a triple per step; the last one repeats.

    A single triple goes to torch's own function. With the same triple at every step both give the same bits.
    """
    if not isinstance(ns_coefficients[0], (list, tuple)):
        return _torch_newton_schulz(grad, ns_coefficients, ns_steps, eps)
    tall = grad.size(0) > grad.size(1)
    x = grad.bfloat16()
    x = x.T if tall else x
    # Not in place as in torch: with a bfloat16 gradient that would overwrite the momentum buffer.
    x = x / x.norm().clamp(min=eps)
    for step in range(ns_steps):
        a, b, c = ns_coefficients[min(step, len(ns_coefficients) - 1)]
        gram = x @ x.T
        x = torch.addmm(x, torch.addmm(gram, gram, gram, beta=b, alpha=c), x, beta=a)
    return x.T if tall else x


def replace_torch_newton_schulz() -> None:
    """Let torch.optim.Muon run :func:`newton_schulz_per_step`, for the rest of the process.

    Raises:
        RuntimeError: this version of torch does not run the function that would be replaced.
    """
    if "_zeropower_via_newtonschulz" not in torch_muon._single_tensor_muon.__code__.co_names:
        raise RuntimeError(f"torch {torch.__version__}: its Muon takes no coefficients per step here; use torch 2.9 to 2.13")
    torch_muon._zeropower_via_newtonschulz = newton_schulz_per_step
