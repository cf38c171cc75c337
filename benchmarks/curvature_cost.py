"""What `recorder.curvature` costs, in units of one forward and backward pass on the same batch.

    OMP_NUM_THREADS=1 python benchmarks/curvature_cost.py

The model of the short demo (16 matrices, 125 k parameters) on 4 sequences of 64 bytes; CPU time (`time.process_time`), the least of the
repetitions, so that a busy machine does not count. Costs are those of a call, its record included.
"""

import argparse
import tempfile
import time
from collections.abc import Callable
from dataclasses import replace

import torch
from machine import machine
from torch.nn.attention import SDPBackend, sdpa_kernel

from optiscope.examples.byte_llama import SHORT, ByteLlama, batches, language_reference
from optiscope.hooks import attach


def seconds(call: Callable[[], object], repeats: int) -> float:
    times = []
    for _ in range(repeats):
        begun = time.process_time()
        call()
        times.append(time.process_time() - begun)
    return min(times)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=5)
    repeats = parser.parse_args().repeats
    print(machine())
    torch.manual_seed(0)
    model = ByteLlama(SHORT)
    x, y = batches(language_reference()[0], replace(SHORT, batch=4), torch.Generator().manual_seed(0))
    parameters = list(model.parameters())

    def loss() -> torch.Tensor:
        with sdpa_kernel(SDPBackend.MATH):
            return model(x, y)

    step = seconds(lambda: torch.autograd.grad(loss(), parameters), 4 * repeats)
    print(f"forward and backward: {1e3 * step:.1f} ms CPU\n{'call':<58} {'ms CPU':>8} {'passes':>7}")
    optimizer = torch.optim.AdamW(parameters)
    with attach(optimizer, model, tempfile.mkdtemp() + "/run.zarr", on_error="raise") as recorder:
        recorder.curvature(loss)  # the first call makes the group
        for options in (
            {"probes": 1}, {"probes": 8}, {"probes": 1, "method": "central_difference"}, {"probes": 8, "method": "central_difference"},
            {"probes": 1, "block_probes": 2}, {"probes": 1, "exact": 128, "only": "layers.1.mlp.up_proj"},
        ):  # fmt: skip
            spent = seconds(lambda options=options: recorder.curvature(loss, **options), repeats)
            print(f"loss_fn, {', '.join(f'{k}={v!r}' for k, v in options.items()):<48} {1e3 * spent:9.0f} {spent / step:7.1f}", flush=True)
        for draws in (1, 8):
            spent = seconds(lambda draws=draws: recorder.curvature(logits_fn=lambda: model.logits(x), draws=draws), repeats)
            print(f"logits_fn, {f'draws={draws}':<46} {1e3 * spent:9.0f} {spent / step:7.1f}", flush=True)
