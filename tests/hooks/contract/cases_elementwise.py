"""Cases for the adaptive optimizers of pytorch_optimizer and Transformers that work coordinate by coordinate."""

import warnings
from collections.abc import Callable
from typing import Any

from torch import Tensor, nn
from torch.optim import AdamW

from contract.harness import Case, Floats, float64, is_hidden
from contract.transcriptions import adam
from contract.transcriptions_elementwise import adabelief, adabound, adafactor, lion, lookahead, mars, rms, sophia, yogi
from contract.transcriptions_layerwise import adam_mini, lamb, lars, novograd

LIBRARY = "pytorch_optimizer"


def po(name: str, **settings: Any) -> Callable[[nn.Module], Any]:
    """A maker of one of the library's optimizers for all parameters."""

    def build(model: nn.Module) -> Any:
        import pytorch_optimizer

        return getattr(pytorch_optimizer, name)(model.parameters(), **settings)

    return build


def _sam(model: nn.Module) -> Any:
    from pytorch_optimizer import SAM

    return SAM(model.parameters(), AdamW, rho=0.05, lr=1e-3, weight_decay=0.1)


def _step_twice(optimizer: Any, model: nn.Module, loss: Callable[[], Tensor]) -> None:
    loss().backward()
    optimizer.first_step(zero_grad=True)
    loss().backward()
    optimizer.second_step(zero_grad=True)


def _step_with_closure(optimizer: Any, model: nn.Module, loss: Callable[[], Tensor]) -> None:
    def closure() -> Tensor:
        value = loss()
        value.backward()
        return value

    closure()
    optimizer.step(closure)
    optimizer.zero_grad()


def _lookahead(model: nn.Module) -> Any:
    from pytorch_optimizer import Lookahead

    return Lookahead(AdamW(model.parameters(), lr=1e-3, weight_decay=0.0), k=3, alpha=0.5)


def _adam_mini(model: nn.Module) -> Any:
    from pytorch_optimizer import AdamMini

    return AdamMini(model, lr=1e-3, weight_decay=0.1, num_embeds=32, num_heads=4)


def _blocks_of_adam_mini(name: str, shape: tuple[int, ...]) -> int | None:
    """Every coordinate in embedding and head, every head of 8 rows in q and k, else the whole matrix."""
    if "embed" in name or "lm_head" in name:
        return None
    return shape[0] // 8 if "q_proj" in name or "k_proj" in name else 0


class Sophia:
    """SophiaH, whose one Hutchinson draw is kept to be looked at."""

    def __init__(self) -> None:
        self._names: dict[str, Tensor] = {}
        self._optimizer: Any = None

    def build(self, model: nn.Module) -> Any:
        from pytorch_optimizer import SophiaH

        self._names = dict(model.named_parameters())
        self._optimizer = SophiaH(model.parameters(), lr=0.01, weight_decay=0.1)
        return self._optimizer

    def draw(self, name: str) -> Floats:
        return float64(self._optimizer.state[self._names[name]]["hessian"])

    @staticmethod
    def step(optimizer: Any, model: nn.Module, loss: Callable[[], Tensor]) -> None:
        with warnings.catch_warnings():
            # torch warns of the reference cycle that a graph of gradients makes; zero_grad breaks it.
            warnings.filterwarnings("ignore", "Using backward\\(\\) with create_graph=True", UserWarning)
            loss().backward(create_graph=True)
        optimizer.step()
        optimizer.zero_grad()


_sophia = Sophia()


def _transformers_adafactor(**settings: Any) -> Callable[[nn.Module], Any]:
    def build(model: nn.Module) -> Any:
        from transformers.optimization import Adafactor

        return Adafactor(model.parameters(), **settings)

    return build


def _rising(t: int) -> float:
    return 1 - t**-0.8


def _capped(t: int) -> float:
    return min(0.999, _rising(t))


def _relative_rate(t: int, w: Floats) -> float:
    return max(1e-3, rms(w)) * min(1e-2, t**-0.5)


CASES = [
    Case("Yogi", LIBRARY, po("Yogi", lr=0.01, weight_decay=0.1), lambda name, shape: yogi()),
    Case(
        "AdaBelief",
        LIBRARY,
        po("AdaBelief", lr=1e-3, weight_decay=0.1),
        lambda name, shape: adabelief(),
        note="The second moment is of g − m.",
    ),
    Case("AdaBound", LIBRARY, po("AdaBound", lr=1e-3, weight_decay=0.1), lambda name, shape: adabound(1e-3)),
    Case(
        "Adafactor (Transformers)",
        "transformers",
        _transformers_adafactor(weight_decay=0.1),
        lambda name, shape: adafactor(_rising),
        note="relative_step: lr is None in the group; η is the step size that it finds itself.",
    ),
    Case(
        "Adafactor (Transformers), with momentum",
        "transformers",
        _transformers_adafactor(lr=1e-3, relative_step=False, scale_parameter=False, beta1=0.9, weight_decay=0.1),
        lambda name, shape: adafactor(_rising, lambda t, w: 1e-3, beta1=0.9),
        note="The momentum averages updates, learning rate included.",
    ),
    Case(
        "AdaFactor (pytorch_optimizer)",
        LIBRARY,
        po("AdaFactor", weight_decay=0.1),
        lambda name, shape: adafactor(_capped, _relative_rate, beta1=0.9),
        momentum_bound=0.01,  # 0.0033 seen: six roundings of up to 2⁻⁹
        update_bound=0.01,
        note="The momentum averages updates, learning rate included, and is kept in bfloat16.",
    ),
    Case(
        "Lookahead",
        LIBRARY,
        _lookahead,
        lambda name, shape: lookahead(adam(), 1e-3, every=3),
        note="Moments are the inner optimizer's; the update includes the interpolation.",
    ),
    Case("LARS", LIBRARY, po("LARS", lr=0.5, weight_decay=0.1, trust_coefficient=0.1), lambda name, shape: lars(0.1, decay=0.1)),
    Case(
        "LARS with Nesterov momentum",
        LIBRARY,
        po("LARS", lr=0.5, trust_coefficient=0.1, nesterov=True),
        lambda name, shape: lars(0.1, nesterov=True),
    ),
    Case("LAMB", LIBRARY, po("Lamb", lr=1e-3, weight_decay=0.1, weight_decouple=False), lambda name, shape: lamb(1e-3, coupled=0.1)),
    Case("LAMB, decoupled decay", LIBRARY, po("Lamb", lr=1e-3, weight_decay=0.1), lambda name, shape: lamb(1e-3, decay=0.1)),
    Case(
        "NovoGrad",
        LIBRARY,
        po("NovoGrad", lr=0.01, weight_decay=0.1),
        lambda name, shape: novograd(coupled=0.1),
        note="The second moment is of the gradient's norm.",
    ),
    Case(
        "SAM",
        LIBRARY,
        _sam,
        lambda name, shape: adam(),
        step=_step_twice,
        note="Two calls, first_step and second_step; the gradient is the one at W + e.",
    ),
    Case("SAM, closure", LIBRARY, _sam, lambda name, shape: adam(), step=_step_with_closure, note="The gradient is the one at W + e."),
    Case("Lion", LIBRARY, po("Lion", lr=1e-3, weight_decay=0.1), lambda name, shape: lion()),
    Case(
        "Lion, fixed decay",
        LIBRARY,
        po("Lion", lr=1e-3, weight_decay=1e-3, fixed_decay=True),
        lambda name, shape: lion(),
        note="W loses the share λ itself; the recorded λ is relative to η.",
    ),
    Case(
        "Sophia-H",
        LIBRARY,
        _sophia.build,
        lambda name, shape: sophia(lambda: _sophia.draw(name)),
        step=Sophia.step,
        note="Needs backward(create_graph=True); draws of the Hessian are taken from the optimizer.",
    ),
    Case(
        "MARS-AdamW",
        LIBRARY,
        po("MARS", lr=1e-3, weight_decay=0.1),
        lambda name, shape: mars(),
        note="Moments are of the corrected and clipped gradient.",
    ),
    Case("MARS-Lion", LIBRARY, po("MARS", lr=1e-3, mars_type="lion", weight_decay=0.1), lambda name, shape: mars(of="lion")),
    Case(
        "MARS-Shampoo",
        LIBRARY,
        po("MARS", lr=1e-3, mars_type="shampoo", weight_decay=0.1),
        lambda name, shape: mars(of="shampoo"),
        newton_schulz="pytorch_optimizer.optimizer.mars.zero_power_via_newton_schulz_5",
        only=is_hidden,
        update_bound=2e-3,  # O is scaled while it is bfloat16: half of its last place is 2⁻⁹
        note="Orthogonalises its momentum as Muon does.",
    ),
    Case(
        "Adam-mini (pytorch_optimizer)",
        LIBRARY,
        _adam_mini,
        lambda name, shape: adam_mini(_blocks_of_adam_mini(name, shape)),
        note="One second moment per head of q and k, per matrix elsewhere, per coordinate in embedding and head.",
    ),
]
