"""The Hessian's diagonal by Hutchinson's probes (Hutchinson 1990; for networks: AdaHessian, arXiv 2006.00719; Sophia, arXiv 2305.14342).

ĥ = u⊙Hu with independent entries of mean 0 and variance 1 in u: E ĥ_i = Σ_j H_ij E[u_i u_j] = H_ii, unbiased for any H. One
probe has the variance Σ_j H_ij² + H_ii² at element i for Gaussian entries, and Σ_{j≠i} H_ij² for ±1 (Rademacher), which on a diagonal
Hessian is exact at once. One vector u runs over all recorded matrices, so that a probe of all costs as much as one of one;
what a matrix shares with the others adds to its noise, not to its bias.
"""

from collections.abc import Sequence

from torch import nn

from ...diagnostics.quantities.probe_error import hutchinson_variance_bound
from ..observing.tensor_sizes import tensor_mean, tensor_rms
from .diagonal import Diagonal, Region
from .hessian_products import Products
from .probes import Probes


def hutchinson(
    products: Products, parameters: Sequence[nn.Parameter], regions: Sequence[Region], count: int, distribution: str, probes: Probes
) -> dict[Region, Diagonal]:
    """Estimate the diagonal on every region with `count` probes."""
    found = {region: Diagonal() for region in regions}
    index = {id(p): i for i, p in enumerate(parameters)}
    for _ in range(count):
        u = [probes.like(p, distribution) for p in parameters]
        hu = products.of(range(len(parameters)), u)
        for region, diagonal in found.items():
            i = index[id(region.matrix.parameter)]
            product = region.of(hu[i])
            estimate = region.of(u[i]) * product
            bound = hutchinson_variance_bound(tensor_mean(estimate), tensor_rms(product) ** 2, product.numel(), distribution)
            diagonal.add(estimate, bound, keep=count > 1)
    return found
