"""Cases for the Muon family and the Scion of pytorch_optimizer."""

from collections.abc import Callable
from typing import Any

from torch import Tensor, nn
from torch.optim import AdamW

from contract.cases_muon import SCALED_IN_BFLOAT16, or_adam
from contract.harness import Call, Case, Floats, hidden, intercepted, is_hidden, others, plain_step, relative_error
from contract.transcriptions_muon import adago, adamuon, muon, normuon, summed_by_backward

_LIBRARY = "pytorch_optimizer"
_MODULE = "pytorch_optimizer.optimizer"
# Looked up in the base class for a list of matrices, in the class's own module for one after the other.
_GRAM = f"{_MODULE}.muon.base.zero_power_via_gram_newton_schulz"
_SCION = f"{_MODULE}.scion.zero_power_via_newton_schulz_5"


def po_muon(name: str, **settings: Any) -> Callable[[nn.Module], Any]:
    """One of pytorch_optimizer's, with a group for the hidden matrices and one that runs AdamW."""

    def build(model: nn.Module) -> Any:
        import pytorch_optimizer

        groups = [{"params": hidden(model), "use_muon": True}, {"params": others(model), "use_muon": False}]
        return getattr(pytorch_optimizer, name)(groups, lr=0.02, adamw_lr=1e-3, **{"weight_decay": 0.1, **settings})

    return build


class Iteration:
    """An iteration that is looked up under a name, and the outputs it has given: transcriptions of what follows start from them."""

    def __init__(self, name: str) -> None:
        self.name = name
        self._calls: list[Call] = []

    def step(self, optimizer: Any, model: nn.Module, loss: Callable[[], Tensor]) -> None:
        with intercepted(self.name) as calls:
            plain_step(optimizer, model, loss)
        self._calls += calls

    def output(self, m: Floats) -> Floats:
        """What came out where `m` went in, to float32 rounding; matrices may have gone in together and transposed."""
        for call in self._calls:
            flat = [(x.double().numpy(), o.double().numpy()) for x, o in zip(batch(call.given), batch(call.output), strict=True)]
            for given, output in flat:
                for x, o in ((given, output), (given.T, output.T)):
                    if x.shape == m.shape and relative_error(x, m) < 1e-5:
                        return o
        raise AssertionError("the iteration was not given this matrix")


def batch(tensor: Tensor) -> Tensor:
    """One matrix as a batch of one."""
    return tensor if tensor.ndim == 3 else tensor.unsqueeze(0)


def po_scion(name: str, **settings: Any) -> Callable[[nn.Module], Any]:
    """pytorch_optimizer's Scion, AdamW for the rest."""

    def build(model: nn.Module) -> Any:
        import pytorch_optimizer

        return [getattr(pytorch_optimizer, name)(hidden(model), lr=0.01, **settings), AdamW(others(model), lr=1e-3)]

    return build


def keeping_the_gradient(optimizer: Any, model: nn.Module, loss: Callable[[], Tensor]) -> None:
    """SCIONLight's p.grad goes on into the next backward."""
    scion, adamw = optimizer
    loss().backward()
    scion.step()
    adamw.step()
    adamw.zero_grad()


_stacked = Iteration(f"{_MODULE}.muon.base.zero_power_via_newton_schulz_5")
_adamuon = Iteration(f"{_MODULE}.muon.adamuon.zero_power_via_newton_schulz_5")
_normuon = Iteration(f"{_MODULE}.muon.normuon.zero_power_via_newton_schulz_5")

CASES = [
    Case(
        "Muon (pytorch_optimizer)",
        _LIBRARY,
        po_muon("Muon"),
        or_adam(muon, beta2=0.95, eps=1e-10),
        newton_schulz=_stacked.name,
    ),
    Case(
        "Muon (pytorch_optimizer), Polar Express",
        _LIBRARY,
        po_muon("Muon", ns_coeffs="polar_express", ns_steps=6, use_adjusted_lr=True, nesterov=False, foreach=False),
        or_adam(muon, beta2=0.95, eps=1e-10),
        newton_schulz=_stacked.name,
    ),
    Case(
        "Muon (pytorch_optimizer), Gram Newton–Schulz",
        _LIBRARY,
        po_muon("Muon", ns_method="gram_newton_schulz", ns_coeffs=[(3.4445, -4.7750, 2.0315), (2.0, -1.5, 0.5)], use_adjusted_lr=True),
        or_adam(muon, beta2=0.95, eps=1e-10),
        newton_schulz=_GRAM,
        note="Iterates on the Gram matrix in float16, which comes to the same polynomial.",
    ),
    Case(
        "Muon (pytorch_optimizer), coupled decay",
        _LIBRARY,
        po_muon("Muon", weight_decouple=False),
        or_adam(lambda: muon(coupled=0.1), beta2=0.95, eps=1e-10),
        newton_schulz=_stacked.name,
    ),
    Case(
        "MuonClip",
        _LIBRARY,
        po_muon("MuonClip"),
        or_adam(lambda: muon(averaged=False), beta2=0.95, eps=1e-10),
        newton_schulz=_stacked.name,
        note="The momentum is a sum; QK-Clip, where its logits are given, is taken out of the update.",
    ),
    Case(
        "AdaMuon",
        _LIBRARY,
        po_muon("AdaMuon"),
        or_adam(lambda: adamuon(_adamuon.output), eps=1e-10),
        step=_adamuon.step,
        newton_schulz=_adamuon.name,
        replay=False,
        update_bound=0.01,  # 0.0072 seen
        note="No sign is taken before the iteration, as in the paper's first version; O is divided while it is bfloat16.",
    ),
    Case(
        "AdaMuon, foreach",
        _LIBRARY,
        po_muon("AdaMuon", foreach=True, use_adjusted_lr=False),
        or_adam(lambda: adamuon(_stacked.output, adjusted=False), eps=1e-10),
        step=_stacked.step,
        newton_schulz=_stacked.name,
        replay=False,
        update_bound=0.01,
        note="With Keller Jordan's scale in the place of the RMS 0.2.",
    ),
    Case(
        "NorMuon",
        _LIBRARY,
        po_muon("NorMuon"),
        or_adam(lambda: normuon(_stacked.output, match_rms=False), beta2=0.95, eps=1e-10),
        step=_stacked.step,
        newton_schulz=_stacked.name,
        replay=False,
        note="One second moment per row, of the orthogonalised update.",
    ),
    Case(
        "NorMuon, RMS 0.2",
        _LIBRARY,
        po_muon("NorMuon", update_scale="match_rms", foreach=False),
        or_adam(lambda: normuon(_normuon.output, match_rms=True), beta2=0.95, eps=1e-10),
        step=_normuon.step,
        newton_schulz=_normuon.name,
        replay=False,
    ),
    Case(
        "AdaGO",
        _LIBRARY,
        po_muon("AdaGO"),
        or_adam(adago, beta2=0.95, eps=1e-10),
        newton_schulz=_stacked.name,
        note="The second moment sums squared norms of the gradient; the scale of O is a step size of the optimizer's own.",
    ),
    Case(
        "Scion",
        _LIBRARY,
        po_scion("SCION", scale=3.0, weight_decay=0.1),
        lambda name, shape: muon(0.9),
        only=is_hidden,
        newton_schulz=_SCION,
        update_bound=2 * SCALED_IN_BFLOAT16,
    ),
    Case(
        "Scion, constrained",
        _LIBRARY,
        po_scion("SCION", constraint=True, norm_type=2, norm_kwargs={"max_scale": True, "num_steps": 4}, foreach=False),
        lambda name, shape: muon(0.9),
        only=is_hidden,
        newton_schulz=_SCION,
        update_bound=2 * SCALED_IN_BFLOAT16,
        note="The weights shrink towards the centre of the ball: λ is 1.",
    ),
    Case(
        "SCIONLight",
        _LIBRARY,
        po_scion("SCIONLight", weight_decay=0.1),
        lambda name, shape: summed_by_backward,
        step=keeping_the_gradient,
        only=is_hidden,
        newton_schulz=_SCION,
        update_bound=2 * SCALED_IN_BFLOAT16,
        note="p.grad is the momentum, before the step, and is recorded as the gradient, too.",
    ),
]
