"""Rows for bitsandbytes and torchao, which keep the moments of large parameters in 8 or 4 bits.

A number is its code's value × the scale of its block. Smaller parameters keep float32 moments under the same keys. An update cannot be
computed from decoded moments: small second moments are decoded as 0.
"""

from collections.abc import Callable
from typing import Any, TypeAlias

import torch
from torch import Tensor

from .adapter import NOT_ORTHOGONAL, Adapter, Reading, SecondMoment, corrected, group_setting
from .table import Row

_MOMENT = f"first moment after the step, decoded where it is quantised; {NOT_ORTHOGONAL}"
_DECAY = group_setting("weight_decay")

# A moment and whether it was decoded.
Decoder: TypeAlias = Callable[[Reading], tuple[Tensor | None, bool]]


def _bitsandbytes(which: int) -> Decoder:
    """Codes, scales and the codes' values lie side by side in the state."""

    def decode(reading: Reading) -> tuple[Tensor | None, bool]:
        state = reading.state
        values: Tensor | None = state.get(f"state{which}")
        if values is None or values.dtype != torch.uint8:
            return values, False
        from bitsandbytes import functional

        scales, levels = state[f"absmax{which}"], state[f"qmap{which}"]
        decoded: Tensor = functional.dequantize_blockwise(values, absmax=scales, code=levels, blocksize=256)  # the library's, fixed
        return decoded, True

    return decode


def _torchao(*keys: str) -> Decoder:
    """Tensors that know how to decode themselves, under the first of `keys` that is there."""

    def decode(reading: Reading) -> tuple[Tensor | None, bool]:
        values: Any = next((reading.state[key] for key in keys if key in reading.state), None)
        return (values.dequantize(), True) if hasattr(values, "codes") else (values, False)

    return decode


def _adam(first: Decoder, second: Decoder, *, decoupled: bool = True) -> Adapter:
    def second_moment(reading: Reading) -> SecondMoment | None:
        values, quantised = second(reading)
        return None if values is None else SecondMoment(values, "quantised" if quantised else "full")

    return Adapter(
        _MOMENT,
        momentum=lambda reading: first(reading)[0],
        second_moment=second_moment,
        averages=corrected(),
        decoupled_decay=_DECAY if decoupled else lambda reading: 0.0,
    )


_BITSANDBYTES_ADAM = _adam(_bitsandbytes(1), _bitsandbytes(2))  # its Adam decays as its AdamW does
_BITSANDBYTES_LION = Adapter(
    f"{_MOMENT}; the sign is taken of another average of it and the gradient",
    momentum=lambda reading: _bitsandbytes(1)(reading)[0],
    decoupled_decay=_DECAY,
)
_TORCHAO = _torchao("exp_avg"), _torchao("max_exp_avg_sq", "exp_avg_sq")  # AMSGrad's, where there is one, is what it divides by


def _with_variants(name: str) -> list[str]:
    """The names of one of bitsandbytes' optimizers in 8 and 32 bits, and of the same with paged state."""
    return [f"{paged}{name}{bits}" for paged in ("", "Paged") for bits in ("", "8bit", "32bit")]


ROWS: dict[str, Row] = {
    **{f"bitsandbytes.optim.adam.{name}": _BITSANDBYTES_ADAM for name in _with_variants("Adam")},
    **{f"bitsandbytes.optim.adamw.{name}": _BITSANDBYTES_ADAM for name in _with_variants("AdamW")},
    **{f"bitsandbytes.optim.lion.{name}": _BITSANDBYTES_LION for name in _with_variants("Lion")},
    **{f"torchao.optim.adam.AdamW{bits}": _adam(*_TORCHAO) for bits in ("8bit", "4bit", "Fp8")},
    **{f"torchao.optim.adam.Adam{bits}": _adam(*_TORCHAO, decoupled=False) for bits in ("8bit", "4bit", "Fp8")},
}
