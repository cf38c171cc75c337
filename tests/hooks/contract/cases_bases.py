"""Cases for the optimizers of pytorch_optimizer that work in a basis of their own: Shampoo, SOAP, GaLore, APOLLO."""

from collections.abc import Callable
from typing import Any

from torch import Tensor, nn

from contract.harness import Case, Floats, float64, hidden, is_hidden, others
from contract.transcriptions_bases import apollo, galore, scalable_shampoo, shampoo, soap

LIBRARY = "pytorch_optimizer"


class Remembered:
    """The optimizer that a case made last, to take from it what chance has drawn."""

    def __init__(self, name: str, in_a_group_of_their_own: dict[str, Any] | None = None, **settings: Any) -> None:
        """With settings for the hidden matrices' own group, where they have one."""
        self._name, self._of_hidden, self._settings = name, in_a_group_of_their_own, settings
        self._names: dict[str, Tensor] = {}
        self._optimizer: Any = None

    def build(self, model: nn.Module) -> Any:
        import pytorch_optimizer

        of_hidden = self._of_hidden
        groups: Any = model.parameters() if of_hidden is None else [{"params": hidden(model), **of_hidden}, {"params": others(model)}]
        self._names = dict(model.named_parameters())
        self._optimizer = getattr(pytorch_optimizer, self._name)(groups, **self._settings)
        return self._optimizer

    def bases(self, name: str) -> Callable[[], list[Floats]]:
        return lambda: [float64(q) for q in self._optimizer.state[self._names[name]]["Q"]]

    def projection(self, name: str) -> Callable[[], Floats]:
        return lambda: float64(self._optimizer.state[self._names[name]]["projector"].ortho_matrix)


def projected(rank: int) -> dict[str, Any]:
    """A group's settings for a projection that is not renewed within the test's steps."""
    return {"rank": rank, "update_proj_gap": 100, "scale": 0.5, "projection_type": "std"}


_soap = Remembered("SOAP", lr=3e-3, weight_decay=0.1)
_apollo = Remembered("APOLLO", projected(8), lr=0.01, weight_decay=0.1)

CASES = [
    Case(
        "Shampoo (pytorch_optimizer)",
        LIBRARY,
        Remembered("Shampoo", lr=0.01, weight_decay=0.1).build,
        lambda name, shape: shampoo(coupled=0.1),
        note="Its momentum_buffer is the last preconditioned update, no average: not recorded as a momentum.",
    ),
    Case(
        "ScalableShampoo",
        LIBRARY,
        Remembered(
            "ScalableShampoo",
            lr=0.01,
            weight_decay=0.1,
            start_preconditioning_step=1,
            preconditioning_compute_steps=1,
            use_svd=True,
            block_size=12,
            matrix_eps=1e-9,
        ).build,
        lambda name, shape: scalable_shampoo(12, eps=1e-9, coupled=0.1),
        note="The momentum sums preconditioned gradients; the second moment is put together from blocks.",
    ),
    Case(
        "SOAP (pytorch_optimizer)",
        LIBRARY,
        _soap.build,
        lambda name, shape: soap(_soap.bases(name), 3e-3, decay=0.1),
        warmup=1,
        update_bound=0.01,  # 0.0025 seen: where gradients are rounding noise, so is the direction that they are scaled up to
        note="The first moment is kept in the parameter's own basis, the second rotated; the first step does not move the weights.",
    ),
    Case(
        "GaLore (pytorch_optimizer)",
        LIBRARY,
        Remembered("GaLore", projected(8), lr=0.01, weight_decay=0.1).build,
        lambda name, shape: galore(8 if is_hidden(name) else None, 0.01, 0.5 if is_hidden(name) else 1.0, decay=0.1),
        note="The first moment is lifted from its low-rank projection; the second is kept in the projection.",
    ),
    Case(
        "APOLLO (pytorch_optimizer)",
        LIBRARY,
        _apollo.build,
        lambda name, shape: apollo(_apollo.projection(name), 0.01, 0.5, decay=0.1),
        only=is_hidden,
        note="The first moment is lifted from a random projection: of its size, but no direction of the update.",
    ),
]
