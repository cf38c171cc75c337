"""Where a record's spectra are cheapest on a machine with an accelerator, and what a record of a model there costs.

    python benchmarks/accelerator.py

1. Per shape, wall milliseconds, medians: the Gram matrix on the device in float64; its eigenvalues there; copying it to the CPU and NumPy's
   eigenvalues there (the two that the recorder's probe chooses between); copying the whole float32 matrix, which is what remains without a
   device Gram; `torch.linalg.svdvals` on the device. Each is waited for at its end.
2. Training steps of a Llama of 100 M parameters, plain and with a record each in foreground and in background, in turn: wall milliseconds, medians.
   Of the recorder it is what the training waits for that counts; its clock stands beside. In the background not every step gets its record.

Without an accelerator it says so and ends. It has not been run on one yet.
"""

import argparse
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from machine import machine

from optiscope.examples.byte_llama import ByteLlama, Config, batches, language_reference, optimizers_of
from optiscope.hooks import attach
from optiscope.hooks.observing.accelerator import gram_matrix

SHAPES = ((128, 128), (512, 512), (768, 768), (1024, 1024), (1024, 2816), (4096, 4096))
MODEL = Config(d=1024, layers=8, heads=16, kv_heads=16, inner=2816, batch=8)


def milliseconds(call: Callable[[], object], repeats: int) -> float:
    """Wall time of one call, the device idle before and after; the median after two calls thrown away."""
    times = []
    for _ in range(repeats + 2):
        torch.cuda.synchronize()
        begun = time.perf_counter()
        call()
        torch.cuda.synchronize()
        times.append(time.perf_counter() - begun)
    return 1e3 * float(np.median(times[2:]))


def spectra(device: torch.device, repeats: int) -> None:
    print(f"\n{'shape':^13} {'Gram':>8} {'eig. there':>10} {'copied, here':>12} {'matrix copied':>13} {'svdvals there':>13}")
    for rows, cols in SHAPES:
        matrix = torch.randn(rows, cols, device=device)
        gram = gram_matrix(matrix)
        ways: list[Callable[[], object]] = [
            lambda m=matrix: gram_matrix(m),  # type: ignore[misc]
            lambda g=gram: torch.linalg.eigvalsh(g),  # type: ignore[misc]
            lambda g=gram: np.linalg.eigvalsh(g.cpu().numpy()),  # type: ignore[misc]
            lambda m=matrix: m.cpu(),  # type: ignore[misc]
            lambda m=matrix: torch.linalg.svdvals(m),  # type: ignore[misc]
        ]
        print(
            "{:>5} × {:<5} {:8.2f} {:10.2f} {:12.2f} {:13.2f} {:13.2f}".format(rows, cols, *(milliseconds(w, repeats) for w in ways)),
            flush=True,
        )


def steps(device: torch.device, repeats: int) -> None:
    torch.manual_seed(0)
    generator = torch.Generator().manual_seed(0)
    text, _ = language_reference()
    model = ByteLlama(MODEL).to(device)
    optimizers = optimizers_of(model)

    def step() -> None:
        tokens, targets = (part.to(device) for part in batches(text, MODEL, generator))
        model(tokens, targets).backward()
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad()

    print(
        f"\n{sum(p.numel() for p in model.parameters()) / 1e6:.0f} M parameters, {len(optimizers[0].param_groups[0]['params'])} spectra: ms a step, and the recorder's CPU ms a step"
    )
    kinds: dict[str, dict[str, Any] | None] = {
        "plain": None,
        "a record in the foreground": {},
        "a record in the background": {"background": True},
    }
    for name, options in kinds.items():
        if options is None:
            print(f"{name:28} {milliseconds(step, repeats):9.1f}", flush=True)
            continue
        with tempfile.TemporaryDirectory() as folder:
            recorder = attach(optimizers, model, Path(folder) / "run.zarr", every=1, **options)
            wall = milliseconds(step, repeats)
            own = recorder.overhead_cpu_seconds * 1e3
            recorder.close()
            print(f"{name:28} {wall:9.1f} {own / (repeats + 2):9.1f}", flush=True)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=9)
    arguments = parser.parse_args()
    print(machine())
    if not torch.cuda.is_available():
        sys.exit("no accelerator: torch sees no CUDA device here, so there is nothing to measure; run this on a machine with one")
    here = torch.device("cuda")
    print(torch.cuda.get_device_name(here))
    spectra(here, arguments.repeats)
    steps(here, arguments.repeats)
