"""What a record of several ranks costs, against every rank's `full_tensor()` and measuring everywhere: `python benchmarks/ranks.py` writes results/ranks.json.

Per number of ranks: seconds of a record (the slowest rank), of `full_tensor()` of the same weights (before and after a step), gradients and momenta and measuring all of them on
every rank, bytes that a record moved and that its plan says, exchanges a record, and with `ranks="share"` under DDP the CPU seconds of the busiest rank beside those of one process.
"""

import json
import os
import statistics
import tempfile
import time
from pathlib import Path

import torch
import torch.distributed as dist
import torch.multiprocessing
from torch import nn
from torch.distributed.fsdp import fully_shard

from optiscope.hooks import attach
from optiscope.hooks.observing.matrices import Names, find_matrices
from optiscope.hooks.observing.watched import watch

WIDTHS = [512, 768, 1024, 512, 768, 1024, 640, 896]
RECORDS = 4


def build():
    torch.manual_seed(0)
    return nn.ModuleList(nn.Linear(width, 384, bias=False) for width in WIDTHS)


def step(model, optimizer, number):
    torch.manual_seed(number)
    sum(layer(torch.randn(4, layer.in_features)).square().mean() for layer in model).backward()
    optimizer.step()
    optimizer.zero_grad(set_to_none=False)


def measured(recorder, model, optimizer):
    """Seconds of wall and CPU of every record after the first."""
    taken = []
    for number in range(RECORDS):
        wall, cpu = recorder.overhead_seconds, recorder.overhead_cpu_seconds
        step(model, optimizer, number)
        taken.append((recorder.overhead_seconds - wall, recorder.overhead_cpu_seconds - cpu))
    return taken[1:]


def run(rank, size, folder, kind, answers):
    torch.set_num_threads(1)
    os.environ.update(RANK=str(rank), WORLD_SIZE=str(size))
    dist.init_process_group("gloo", init_method=f"file://{folder}/meeting-{kind}-{size}", rank=rank, world_size=size)
    model = build()
    called = model
    if kind == "pieces":
        for layer in model:
            fully_shard(layer)
    else:
        called = nn.ModuleList(nn.parallel.DistributedDataParallel(layer) for layer in model)
        for one, layer in zip(called, model, strict=True):
            one.in_features = layer.in_features
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01, momentum=0.9)
    found = {}
    with attach(optimizer, model, f"{folder}/{kind}-{size}.zarr", every=1, ranks="share", rank_timeout=60) as recorder:
        records = measured(recorder, called, optimizer)
        found["record_seconds"] = statistics.median(wall for wall, _ in records)
        found["record_cpu_seconds"] = statistics.median(cpu for _, cpu in records)
        if size > 1 and kind == "pieces":
            ranks = recorder.session.ranks
            before = ranks._making.bytes_sent, ranks._making.exchanges
            step(called, optimizer, RECORDS)
            sent = ranks._making.bytes_sent - before[0]
            total = [torch.zeros(1, dtype=torch.int64) for _ in range(size)]
            dist.all_gather(total, torch.tensor([sent]))
            found |= {
                "bytes": int(sum(total)),
                "bytes_planned": ranks.describe()["bytes_moved"],
                "exchanges": ranks._making.exchanges - before[1],
            }
    if kind == "pieces":
        found["everywhere_seconds"] = statistics.median(
            everywhere(model, optimizer, f"{folder}/w{size}-{rank}.zarr", n) for n in range(RECORDS)
        )
    answers.put((rank, found))
    dist.barrier()
    dist.destroy_process_group()


def everywhere(model, optimizer, store, number):
    """Seconds of gathering all on every rank, and measuring all there: four arrays of each matrix, then a record of one process."""
    whole = build()
    own = torch.optim.SGD(whole.parameters(), lr=0.01, momentum=0.9)
    step(whole, own, 0)
    begun = time.perf_counter()
    for p in model.parameters():
        for tensor in (p, p, p.grad, optimizer.state[p]["momentum_buffer"]):
            tensor.full_tensor()
    gathered = time.perf_counter() - begun
    with attach(own, whole, f"{store}.{number}", every=1, ranks="alone") as recorder:
        step(whole, own, 1)
        wall = recorder.overhead_seconds
        step(whole, own, 2)
        return gathered + recorder.overhead_seconds - wall


def main():
    context = torch.multiprocessing.get_context("spawn")
    results = {
        "cores": os.cpu_count(),
        "widths": WIDTHS,
        "matrices": len(find_matrices(watch([torch.optim.SGD(build().parameters())]), Names(None, None))),
    }
    for size in (1, 2, 4):
        for kind in ("pieces", "copies"):
            with tempfile.TemporaryDirectory() as folder:
                answers = context.SimpleQueue()
                torch.multiprocessing.spawn(run, (size, folder, kind, answers), nprocs=size)
                found = [answers.get()[1] for _ in range(size)]
            results[f"{kind}, {size} ranks"] = {key: round(max(one[key] for one in found), 4) for key in found[0]}
    Path(__file__).with_name("results").mkdir(exist_ok=True)
    Path(__file__).with_name("results").joinpath("ranks.json").write_text(json.dumps(results, indent=1) + "\n")
    print(json.dumps(results, indent=1))


if __name__ == "__main__":
    main()
