"""Cases for optimizers with quantised or projected state, for those of small packages, and heavyball's SOAP."""

from collections.abc import Callable
from functools import partial
from importlib import import_module
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import AdamW

from contract.cases_muon import not_compiled
from contract.harness import Case, Floats, Model, Transcription, float64, hidden, is_hidden, others, plain_step
from contract.transcriptions import adam
from contract.transcriptions_bases import galore
from contract.transcriptions_compressed import as_column, debiased_soap, moments_of, prodigy, schedule_free, sophia_g
from contract.transcriptions_elementwise import lion
from contract.transcriptions_layerwise import adam_mini

# Moments of less than 4096 numbers are not quantised: of this model, those of q, o, up and down are.
LARGE: Callable[[], nn.Module] = partial(Model, 64, 96)


def _from(package: str, name: str, **settings: Any) -> Callable[[nn.Module], Any]:
    """A maker of one optimizer for all parameters."""

    def build(model: nn.Module) -> Any:
        return getattr(import_module(package), name)(model.parameters(), **settings)

    return build


def _not_compiled_by_torch(optimizer: Any, model: nn.Module, loss: Callable[[], Tensor]) -> None:
    """torchao compiles its step for every shape, tens of seconds of a C++ compiler."""
    with torch.compiler.set_stance("force_eager"):
        plain_step(optimizer, model, loss)


def _adam(**settings: float) -> Callable[[str, tuple[int, ...]], Transcription]:
    return lambda name, shape: adam(**settings)


def _moments_of_adam(name: str, shape: tuple[int, ...]) -> Transcription:
    """The update is of moments that have been quantised and back, small second moments to zero."""
    return moments_of(adam())


class Witness:
    """What an optimizer's state was after every step, noted by a hook of the test's own, for what no formula gives."""

    def __init__(self, build: Callable[[nn.Module], Any], note: Callable[[Any, dict[str, Tensor]], Any]) -> None:
        self._build, self._note = build, note
        self._noted: list[Any] = []

    def build(self, model: nn.Module) -> Any:
        built = self._build(model)
        optimizer = built[0] if isinstance(built, list) else built
        names = dict(model.named_parameters())
        self._noted = [self._note(optimizer, names)]
        optimizer.register_step_post_hook(lambda *_: self._noted.append(self._note(optimizer, names)))
        return built

    def after(self, step: int) -> Any:
        return self._noted[step]


_prodigy = Witness(_from("prodigyopt", "Prodigy", d0=1e-3, weight_decay=0.1), lambda optimizer, names: optimizer.param_groups[0]["d"])
_po_prodigy = Witness(
    _from("pytorch_optimizer", "Prodigy", d0=1e-3, weight_decay=0.1, fixed_decay=False),
    lambda optimizer, names: optimizer.param_groups[0]["d"],
)


def _schedule_free(package: str, name: str, **settings: Any) -> Callable[[nn.Module], Any]:
    def build(model: nn.Module) -> Any:
        optimizer = _from(package, name, **settings)(model)
        optimizer.train()
        return optimizer

    return build


def _sophia(optimizer: Any, model: nn.Module, loss: Callable[[], Tensor]) -> None:
    """A step, and an update of the Hessian's estimate with the gradient at hand, where a user draws labels for one of its own."""
    loss().backward()
    optimizer.step(bs=1000)
    optimizer.update_hessian()
    optimizer.zero_grad()


def _adam_mini(model: nn.Module) -> Any:
    from adam_mini import Adam_mini

    return Adam_mini(model.named_parameters(), weight_decay=0.1, dim=32, n_heads=4, verbose=False)


def _blocks_of_adam_mini(name: str, shape: tuple[int, ...]) -> int:
    """Heads of 8 rows in q and k; the whole of what it does not know by name; else every row."""
    if "q_proj" in name or "k_proj" in name:
        return shape[0] // 8
    return 0 if "up_proj" in name or "down_proj" in name else shape[0]


def _galore(model: nn.Module) -> Any:
    from galore_torch import GaLoreAdamW

    low_rank = {"rank": 8, "update_proj_gap": 100, "scale": 0.5, "proj_type": "std"}
    groups = [{"params": hidden(model), **low_rank}, {"params": others(model)}]
    # It warns that torch has an AdamW, too.
    return GaLoreAdamW(groups, lr=0.01, weight_decay=0.1, no_deprecation_warning=True)


def _heavyball_soap(model: nn.Module) -> Any:
    import heavyball

    return [heavyball.SOAP(hidden(model), lr=3e-3, weight_decay=0.1), AdamW(others(model), lr=1e-3)]


def _bases(optimizer: Any, names: dict[str, Tensor]) -> dict[str, list[Floats]]:
    held = {name: optimizer.state.get(p, {}).get(0, {}).get("scale_by_soap_Q_3") for name, p in names.items()}
    return {name: [float64(q[0]) for q in bases] for name, bases in held.items() if bases is not None}


def _transcribed_soap(name: str, shape: tuple[int, ...]) -> Transcription:
    """o_proj sees every input twice: half its basis is of rounding noise, which the division by √v scales up to a full step."""
    whole = debiased_soap(lambda t: _soap.after(t)[name])
    return moments_of(whole) if "o_proj" in name else whole


_soap = Witness(_heavyball_soap, _bases)

CASES = [
    Case(
        "AdamW 8-bit (bitsandbytes)",
        "bitsandbytes",
        _from("bitsandbytes.optim", "AdamW8bit", weight_decay=0.1),
        _moments_of_adam,
        model=LARGE,
        momentum_bound=0.03,  # 0.022 seen
        second_bound=0.02,  # 0.012 seen
        note="Quantised from 4096 numbers on; exact below.",
    ),
    Case(
        "AdamW 32-bit (bitsandbytes)",
        "bitsandbytes",
        _from("bitsandbytes.optim", "AdamW32bit", weight_decay=0.1),
        _adam(),
    ),
    Case(
        "Lion 8-bit (bitsandbytes)",
        "bitsandbytes",
        _from("bitsandbytes.optim", "Lion8bit", lr=1e-3, weight_decay=0.1),
        lambda name, shape: moments_of(lion()),
        model=LARGE,
        momentum_bound=0.03,  # 0.023 seen
        note="Quantised from 4096 numbers on; exact below.",
    ),
    *(
        Case(
            f"AdamW {bits} (torchao)",
            "torchao",
            _from("torchao.optim", f"AdamW{bits}", weight_decay=0.1),
            _moments_of_adam,
            step=_not_compiled_by_torch,
            model=LARGE,
            momentum_bound=bound,
            second_bound=bound,
            note="Quantised from 4096 numbers on; exact below.",
        )
        for bits, bound in (("8bit", 0.03), ("4bit", 0.3), ("Fp8", 0.05))  # 0.022, 0.28 and 0.047 seen
    ),
    Case(
        "Lion (lion-pytorch)",
        "lion-pytorch",
        _from("lion_pytorch", "Lion", lr=1e-3, weight_decay=0.1),
        lambda name, shape: lion(),
    ),
    Case(
        "Lion (lion-pytorch), fixed decay",
        "lion-pytorch",
        _from("lion_pytorch", "Lion", lr=1e-3, weight_decay=1e-3, decoupled_weight_decay=True),
        lambda name, shape: lion(),
        note="λ is divided by the learning rate that the optimizer was made with.",
    ),
    Case(
        "Prodigy (prodigyopt)",
        "prodigyopt",
        _prodigy.build,
        lambda name, shape: prodigy(_prodigy.after),
        note="η is d·lr; moments are of d·g.",
    ),
    Case(
        "Prodigy (pytorch_optimizer)",
        "pytorch_optimizer",
        _po_prodigy.build,
        lambda name, shape: prodigy(_po_prodigy.after),
        note="η is d·lr; moments are of d·g.",
    ),
    Case(
        "Schedule-Free AdamW",
        "schedulefree",
        _schedule_free("schedulefree", "AdamWScheduleFree", lr=0.01, weight_decay=0.1, warmup_steps=3),
        lambda name, shape: schedule_free(0.01, 3, 0.1),
        note="The weights in training are y; η is in its warm-up; the recorded λ is what y itself loses.",
    ),
    Case(
        "Schedule-Free AdamW (pytorch_optimizer)",
        "pytorch_optimizer",
        _schedule_free("pytorch_optimizer", "ScheduleFreeAdamW", lr=0.01, weight_decay=0.1, warmup_steps=3),
        lambda name, shape: schedule_free(0.01, 3, 0.1, more=1e-15**0.5),
    ),
    Case(
        "Adam-mini (adam-mini)",
        "adam-mini",
        _adam_mini,
        lambda name, shape: as_column(adam_mini(_blocks_of_adam_mini(name, shape))),
        note="One second moment per head of q and k, per row of what it knows by name, per matrix elsewhere.",
    ),
    Case(
        "Sophia-G (sophia-opt)",
        "sophia-opt",
        _from("sophia_opt", "SophiaG", lr=1e-3, rho=1.0),
        lambda name, shape: sophia_g(1.0, 1000),
        step=_sophia,
        note="The Hessian's estimate is as of the last update_hessian.",
    ),
    Case(
        "GaLore (galore-torch)",
        "galore-torch",
        _galore,
        lambda name, shape: galore(8 if is_hidden(name) else None, 0.01, 0.5 if is_hidden(name) else 1.0, decay=0.1),
        note="The first moment is lifted from its low-rank projection; the second is kept in the projection.",
    ),
    Case(
        "SOAP (heavyball)",
        "heavyball",
        _soap.build,
        _transcribed_soap,
        step=not_compiled,
        only=is_hidden,
        warmup=1,
        note="The first moment, kept bias-corrected and rotated, is turned back; the first step does not move the weights.",
    ),
]
