"""What an accelerator is read with, on CPU tensors: the functions are the same. On an accelerator nothing of it has been tested."""

import numpy as np
import pytest
import torch

from optiscope.diagnostics.spectra.spectrum import spectrum
from optiscope.hooks.observing.accelerator import SideStream, eigenvalues_there, gram_matrix, gram_of, to_host

CPU = torch.device("cpu")


def built(rows: int, cols: int, kappa: float) -> torch.Tensor:
    """A float32 matrix with log-uniform singular values and random singular vectors."""
    rng = np.random.default_rng(0)
    rank = min(rows, cols)
    u, v = (np.linalg.qr(rng.standard_normal((size, rank)))[0] for size in (rows, cols))
    return torch.from_numpy(((u * np.geomspace(1, 1 / kappa, rank)) @ v.T).astype(np.float32))


@pytest.mark.parametrize("shape", [(48, 48), (48, 130), (130, 48)])
@pytest.mark.parametrize("kappa", [10.0, 1e5, 1e7])
@pytest.mark.parametrize("there", [True, False], ids=["eigenvalues", "matrix"])
def test_a_spectrum_from_a_gram_matrix_made_elsewhere_is_that_of_the_svd(shape: tuple[int, int], kappa: float, there: bool) -> None:
    matrix = built(*shape, kappa)
    gram = gram_matrix(matrix)
    assert gram.shape == (48, 48)
    assert gram.dtype == torch.float64
    found = spectrum(matrix.numpy(), gram=to_host(torch.linalg.eigvalsh(gram) if there else gram))
    sigma = np.linalg.svd(matrix.double().numpy(), compute_uv=False)
    # Measured: 2e-15, 6e-7 and, by the SVD that such a matrix falls back on, 2e-10.
    assert found.condition_number == pytest.approx(sigma[0] / sigma[-1], rel=2e-5)
    assert found.fro_norm == pytest.approx(np.linalg.norm(sigma), rel=1e-13)
    assert found.sigma == pytest.approx(sigma, abs=1e-9)
    assert not found.condition_is_floor


def test_half_precision_is_widened_before_it_is_multiplied() -> None:
    matrix = built(32, 48, 100.0).bfloat16()
    # The trap: the product in the matrix's own format.
    exact = matrix.double() @ matrix.double().T
    assert ((matrix @ matrix.T).double() - exact).abs().max() > 1e-4
    assert torch.equal(gram_matrix(matrix), exact)
    array = to_host(matrix)
    assert array.dtype == np.float32
    assert (torch.from_numpy(array) == matrix.float()).all()


def test_on_the_cpu_nothing_is_made_elsewhere_and_nothing_copied() -> None:
    matrix = built(8, 8, 10.0)
    assert gram_of(matrix) is None
    assert np.shares_memory(to_host(matrix), matrix.numpy())
    with SideStream(CPU).stream():
        assert eigenvalues_there(CPU, 16) in (True, False)
    with pytest.raises(KeyError), SideStream(CPU).stream():
        raise KeyError
