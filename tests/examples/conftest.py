"""Independent references that several of these tests share."""

import pytest
import torch
from contract import transcriptions_references


@pytest.fixture
def through_svd():
    """Newton–Schulz by its definition on singular values: U·p_T(…p_1(σ/‖M‖_F))·Vᵀ in float64, no iteration on matrices."""

    return transcriptions_references.through_svd


@pytest.fixture
def gaussian():
    """A random matrix of its own seed."""

    def drawn(shape, seed, dtype=torch.float64):
        return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)

    return drawn
