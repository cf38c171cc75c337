"""Peak memory that recording adds to a training, against what it is allowed: one snapshot, and a float64 copy of the largest set of matrices of one shape.

    OMP_NUM_THREADS=1 OPENBLAS_NUM_THREADS=1 python benchmarks/recording_memory.py

Each figure is of a process of its own (VmHWM of /proc/self/status, the peak of resident memory, so on Linux only), twice: with a C library that gives
back what is freed (glibc's MALLOC_MMAP_THRESHOLD_ fixed at 256 KiB), so that a peak is of what was held at one time; and with one left as it is, which keeps
some of what was freed, in pieces that larger arrays do not fit into. The bound is held against the first. The snapshot is what is copied of one record: weights before
the step, gradients, and in the background also weights after it, Newton–Schulz inputs, momenta and second moments. A batch small in comparison keeps
activations from hiding what the recorder takes.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
from collections import Counter
from functools import cache
from pathlib import Path

import torch
from machine import machine
from torch import nn

from optiscope.hooks import attach

MODES = ("none", "foreground", "background")
GIVEN_BACK = str(1 << 18)


def peak() -> int:
    """Bytes of resident memory at its peak."""
    line = next(line for line in Path("/proc/self/status").read_text(encoding="ascii").splitlines() if line.startswith("VmHWM"))
    return int(line.split()[1]) * 1024


def train(mode: str, width: int, layers: int, steps: int, kind: str) -> int:
    """Peak of a training of square matrices, every step of which is recorded but the first two."""
    torch.manual_seed(0)
    model = nn.Sequential(*(nn.Linear(width, width, bias=False) for _ in range(layers)))
    optimizer = torch.optim.Muon(model.parameters(), lr=0.02) if kind == "Muon" else torch.optim.AdamW(model.parameters(), lr=1e-3)

    def step() -> None:
        model(torch.randn(8, width)).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()

    for _ in range(2):
        step()
    with tempfile.TemporaryDirectory() as folder:
        recorder = None
        if mode != "none":
            recorder = attach(optimizer, model, Path(folder) / "run.zarr", every=1, background=mode == "background", on_error="raise")
        for _ in range(steps):
            step()
            if recorder is not None and recorder.session.journal.worker is not None:
                recorder.session.journal.worker.wait()
        found = peak()
        if recorder is not None:
            recorder.close()
    return found


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--width", type=int, default=1024)
    parser.add_argument("--layers", type=int, default=12)
    parser.add_argument("--steps", type=int, default=3)
    parser.add_argument("--one", nargs=2, metavar=("MODE", "OPTIMIZER"), help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    sizes = (arguments.width, arguments.layers, arguments.steps)
    if arguments.one:
        mode, kind = arguments.one
        print(json.dumps(train(mode, *sizes, kind)))
        sys.exit()
    print(machine())
    matrix = arguments.width**2 * 4
    shapes = Counter([(arguments.width, arguments.width)] * arguments.layers)
    largest = 2 * matrix * max(shapes.values())
    print(
        f"{arguments.layers} matrices of {arguments.width}×{arguments.width}: {arguments.layers * matrix / 1e6:.0f} MB, in float64 {largest / 1e6:.0f} MB"
    )

    @cache
    def peak_of(mode: str, kind: str, threshold: str | None) -> int:
        environment = os.environ | ({} if threshold is None else {"MALLOC_MMAP_THRESHOLD_": threshold})
        return int(subprocess.check_output([sys.executable, __file__, *options, "--one", mode, kind], env=environment))

    def adds(mode: str, kind: str, threshold: str | None = None) -> float:
        """MB of the peak that are not there without a recorder."""
        return (peak_of(mode, kind, threshold) - peak_of("none", kind, threshold)) / 1e6

    options = ["--width", str(arguments.width), "--layers", str(arguments.layers), "--steps", str(arguments.steps)]
    for kind, copies in (("Muon", {"foreground": 3, "background": 5}), ("AdamW", {"foreground": 1, "background": 5})):
        for mode, count in copies.items():
            snapshot = count * arguments.layers * matrix
            print(
                f"{kind:>6} {mode:>10}: recording adds {adds(mode, kind, GIVEN_BACK):4.0f} MB; allowed {(snapshot + largest) / 1e6:4.0f} MB "
                f"(snapshot {snapshot / 1e6:.0f} MB); with what the C library keeps {adds(mode, kind):4.0f} MB"
            )
