"""Which parameters with two or more dimensions are not recorded, and why."""

import re

import torch
from torch import Tensor

LEFT_OUT = {
    "complex": "what is measured here is of real numbers; keep real and imaginary parts in parameters of their own to have them recorded",
    "integer or quantised": "there is no gradient in such a format",
    "8-bit floating-point": "torch computes nothing in such a format; attach to the optimizer of the master weights",
    "sparse or packed": "what is measured here is of dense arrays",
    "stacked bias": "it holds a vector for every expert or head, and is no matrix",
}

_BIAS = re.compile(r"(^|[._])bias$")


def left_out(parameter: Tensor, name: str = "") -> str | None:
    """What keeps a parameter with two or more dimensions from being recorded, a key of `LEFT_OUT`; None where nothing does."""
    if parameter.ndim == 2 and _BIAS.search(name):
        return "stacked bias"
    if parameter.layout is not torch.strided:
        return "sparse or packed"
    if parameter.is_complex():
        return "complex"
    if not parameter.is_floating_point():
        return "integer or quantised"
    return "8-bit floating-point" if parameter.element_size() < 2 else None
