"""How fast and how right `diagnostics.spectrum` is, against the call one would write by hand, `torch.linalg.svdvals`.

    OMP_NUM_THREADS=1 python benchmarks/spectrum_speed.py
    python benchmarks/spectrum_speed.py

float32 matrices: Gaussian ones (as a young momentum's bulk), ones with a geometric spectrum of κ = 1e5, and ones of κ = 1e7,
where `spectrum` leaves its Gram matrix for a float64 SVD; these stand apart. `spectrum` gets the matrix as it is, `svdvals`
a contiguous copy turned tall, made off the clock (it is slower on wide ones). Both run in turn; medians over the
repetitions after a first one that is thrown away, of the times and of the ratio within each repetition, in CPU time
(`time.process_time`, all threads) and in wall time. Before each call stands a pause: the threads of a BLAS spin for up to
a tenth of a second after its last call, and would be counted to whoever comes next. The errors are those of κ, relative to
the float64 SVD of the same float32 matrix.
"""

import argparse
import time
from collections.abc import Callable

import numpy as np
import torch
from machine import machine
from numpy.typing import NDArray
from torch import Tensor

from optiscope.diagnostics.spectra import spectrum

SHAPES = ((768, 768), (3072, 768), (768, 3072), (1024, 1024), (1024, 2048), (1024, 3072))
PAUSE = 0.15  # seconds


def gaussian(rows: int, cols: int, generator: np.random.Generator) -> NDArray[np.float32]:
    return generator.standard_normal((rows, cols), dtype=np.float32)


def geometric(rows: int, cols: int, kappa: float, generator: np.random.Generator) -> NDArray[np.float32]:
    """σ_i = κ^{−(i−1)/(r−1)} between random orthonormal singular vectors, rounded to float32."""
    rank = min(rows, cols)
    u, v = (np.linalg.qr(generator.standard_normal((size, rank)))[0] for size in (rows, cols))
    return np.asarray(u * np.geomspace(1, 1 / kappa, rank) @ v.T, dtype=np.float32)


def seconds(call: Callable[[], object]) -> tuple[float, float]:
    """CPU and wall time of one call, begun when no thread spins any more."""
    time.sleep(PAUSE)
    cpu, wall = time.process_time(), time.perf_counter()
    call()
    return time.process_time() - cpu, time.perf_counter() - wall


def row(matrix: NDArray[np.float32], repeats: int) -> str:
    """One row of a table."""
    tall = torch.from_numpy(np.ascontiguousarray(matrix if matrix.shape[0] >= matrix.shape[1] else matrix.T))
    times = np.array([[seconds(lambda: spectrum(matrix)), seconds(lambda: torch.linalg.svdvals(tall))] for _ in range(repeats + 1)])
    ours, theirs = np.median(times[1:, :, 0], axis=0) * 1e3
    cpu_ratio, wall_ratio = np.median(times[1:, 0] / times[1:, 1], axis=0)
    sigma = np.linalg.svd(matrix.astype(np.float64), compute_uv=False)
    exact = sigma[0] / sigma[-1]
    errors = [abs(kappa / exact - 1) for kappa in (spectrum(matrix).condition_number, condition_number(torch.linalg.svdvals(tall)))]
    return (
        f"{matrix.shape[0]:>6} × {matrix.shape[1]:<6} {ours:8.0f} {theirs:8.0f} {cpu_ratio:9.2f} {wall_ratio:10.2f}"
        f" {exact:10.2e} {errors[0]:10.1e} {errors[1]:10.1e}"
    )


def condition_number(sigma: Tensor) -> float:
    return float(sigma[0].double() / sigma[-1].double())


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=15)
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    generator = np.random.default_rng(arguments.seed)
    print(machine())
    kinds: dict[str, Callable[[int, int], NDArray[np.float32]]] = {
        "Gaussian": lambda m, n: gaussian(m, n, generator),
        "geometric spectrum, κ = 1e5": lambda m, n: geometric(m, n, 1e5, generator),
        "geometric spectrum, κ = 1e7: the float64 SVD route": lambda m, n: geometric(m, n, 1e7, generator),
    }
    for kind, make in kinds.items():
        print(f"\n{kind}\n{'shape':^15} spectrum  svdvals CPU ratio wall ratio          κ  κ error   (svdvals)")
        print(f"{'':15} {'ms CPU':>8} {'ms CPU':>8}")
        for m, n in SHAPES:
            print(row(make(m, n), arguments.repeats), flush=True)
