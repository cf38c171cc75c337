"""What it costs to know the residual of an orthogonalised matrix: eight probes against the Gram matrix, beside the Newton–Schulz call itself.

    OMP_NUM_THREADS=1 python benchmarks/probed_residual.py

Gaussian matrices after five Jordan steps. CPU times are the least of three; `ns` is `torch.optim.Muon`'s own call in bfloat16. The error is the relative
standard deviation of the estimate over 30 seeds.
"""

import time
from collections.abc import Callable

import numpy as np
import torch
from machine import machine
from torch.optim import _muon as torch_muon

from optiscope.diagnostics import JORDAN, achieved_residual
from optiscope.diagnostics.newton_schulz.spectral_map import probed_residual

SHAPES = ((512, 512), (1024, 1024), (1024, 3072))


def seconds(call: Callable[[], object]) -> float:
    """Least CPU time of three calls."""
    times = []
    for _ in range(3):
        start = time.process_time()
        call()
        times.append(time.process_time() - start)
    return min(times)


def main() -> None:
    print(machine())
    print(f"{'shape':>13} {'ns ms':>8} {'exact ms':>9} {'of ns':>6} {'probes ms':>10} {'of ns':>6} {'error':>7}")
    for rows, cols in SHAPES:
        momentum = torch.from_numpy(np.random.default_rng(0).standard_normal((rows, cols)).astype(np.float32))

        def orthogonalise(momentum: torch.Tensor = momentum) -> torch.Tensor:
            return torch_muon._zeropower_via_newtonschulz(momentum, JORDAN, 5, 1e-7)

        output = orthogonalise().float().numpy()
        exact = achieved_residual(output)
        ns, whole, probed = (
            seconds(orthogonalise),
            seconds(lambda o=output: achieved_residual(o)),
            seconds(lambda o=output: probed_residual(o)),
        )
        error = np.std([probed_residual(output, seed=seed).residual / exact for seed in range(30)])
        print(
            f"{rows:>6}×{cols:<6} {1e3 * ns:8.0f} {1e3 * whole:9.1f} {whole / ns:6.3f} {1e3 * probed:10.2f} {probed / ns:6.3f} {error:7.2%}"
        )


if __name__ == "__main__":
    main()
