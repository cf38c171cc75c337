"""What watching one step costs beside the step itself: CPU time and memory, of a Muon that is in no table.

    OMP_NUM_THREADS=1 python benchmarks/watching.py

Per model: a step of the optimizer, a plain step of the copy's size (the copy made and stepped without looking), and a whole watch (the copy stepped twice,
operations looked at, iterations fitted, matrices matched, inputs copied). Memory is the peak over what the process held before, of a process of its own for
each, in units of what the parameters take. A watch is made of recorded steps alone, and no more once a formula of the state has given the inputs of three.
"""

import argparse
import subprocess
import sys
import time
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any

import torch
from machine import machine
from torch import Tensor, nn
from torch.optim import Optimizer

from optiscope.hooks.watching.twin import Twin
from optiscope.hooks.watching.watched_step import watch_step

MODELS = {
    "24 of 256 x 256": (24, 256, 256),
    "24 of 512 x 512": (24, 512, 512),
    "12 of 1024 x 1024": (12, 1024, 1024),
    "6 of 2048 x 768": (6, 2048, 768),
}


class OwnMuon(Optimizer):
    """Moonlight's rule in bfloat16, one matrix after the other."""

    def __init__(self, params: Any) -> None:
        super().__init__(params, {"lr": 0.02, "momentum": 0.95})

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]
        for group in self.param_groups:
            for p in group["params"]:
                momentum: Tensor = self.state[p].setdefault("momentum_buffer", torch.zeros_like(p))
                momentum.mul_(group["momentum"]).add_(p.grad)
                x = p.grad.add(momentum, alpha=group["momentum"]).bfloat16()
                x = x.T if len(x) > len(x.T) else x
                x = x / (x.norm() + 1e-7)
                for _ in range(5):
                    gram = x @ x.T
                    x = 3.4445 * x + (-4.7750 * gram + 2.0315 * gram @ gram) @ x
                p.add_(x.T if p.shape != x.shape else x, alpha=-group["lr"] * 0.2 * max(p.shape) ** 0.5)


def made(count: int, rows: int, cols: int) -> tuple[list[nn.Parameter], OwnMuon]:
    torch.manual_seed(0)
    parameters = [nn.Parameter(0.02 * torch.randn(rows, cols)) for _ in range(count)]
    for p in parameters:
        p.grad = torch.randn_like(p)
    optimizer = OwnMuon(parameters)
    optimizer.step()
    return parameters, optimizer


def cpu(work: Any) -> float:
    began = time.process_time()
    work()
    return time.process_time() - began


def copied(optimizer: OwnMuon, parameters: list[nn.Parameter]) -> None:
    Twin(optimizer, optimizer.param_groups[0], parameters).step()


def peak(what: str, model: str) -> None:
    """Print the peak of resident memory that one of the three adds, in units of the parameters."""
    count, rows, cols = MODELS[model]
    parameters, optimizer = made(count, rows, cols)
    Path("/proc/self/clear_refs").write_text("5")  # the peak so far is forgotten
    before = resident("VmRSS")
    {
        "step": optimizer.step,
        "copy": lambda: copied(optimizer, parameters),
        "watch": lambda: watch_step(optimizer, optimizer.param_groups[0], parameters),
    }[what]()
    print((resident("VmHWM") - before) / (4 * count * rows * cols))


def resident(key: str) -> int:
    """Bytes, of what Linux tells of a process."""
    (line,) = (line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(key))
    return int(line.split()[1]) * 1024


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--peak", nargs=2, metavar=("WHAT", "MODEL"))
    given = parser.parse_args()
    if given.peak:
        peak(*given.peak)
        return
    print(machine())
    print(
        f"{'model':>20} {'step s':>8} {'copy':>6} {'watch':>6} of a step   {'memory: step':>13} {'copy':>6} {'watch':>6} of the parameters"
    )
    for model, (count, rows, cols) in MODELS.items():
        parameters, optimizer = made(count, rows, cols)
        group = optimizer.param_groups[0]
        works = (optimizer.step, partial(copied, optimizer, parameters), partial(watch_step, optimizer, group, parameters))
        step, copy, watch = (median(cpu(work) for _ in range(3)) for work in works)
        memory = [
            float(subprocess.run([sys.executable, __file__, "--peak", what, model], check=True, capture_output=True, text=True).stdout)
            for what in ("step", "copy", "watch")
        ]
        print(
            f"{model:>20} {step:8.3f} {copy / step:6.2f} {watch / step:6.2f}             {memory[0]:13.2f} {memory[1]:6.2f} {memory[2]:6.2f}"
        )


if __name__ == "__main__":
    main()
