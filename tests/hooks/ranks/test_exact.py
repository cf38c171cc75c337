"""What several ranks record of matrices in pieces is, to the bit, what one process records of the same tensors whole."""

import numpy as np
import pytest
import torch
from torch import nn

from optiscope.analysis import open_run
from optiscope.hooks import attach

from .replay import Noted, replay

MUON = (torch.optim.Muon, {"lr": 0.02, "weight_decay": 0.1})
ADAMW = (torch.optim.AdamW, {"lr": 1e-2})
NAMES = [["up.weight", "down.weight"], ["odd.weight", "experts"]]


class Model(nn.Module):
    """Even and uneven matrices, one with fewer rows than there are ranks, and a stack of experts."""

    def __init__(self):
        super().__init__()
        self.up, self.down, self.odd = nn.Linear(16, 24, bias=False), nn.Linear(24, 17, bias=False), nn.Linear(17, 3, bias=False)
        self.experts = nn.Parameter(torch.randn(5, 3, 4) / 3)

    def forward(self, x):
        y = self.odd(torch.tanh(self.down(torch.tanh(self.up(x)))))
        return torch.einsum("bi,eij->bj", y, self.experts)


def train(rank, size, store, layout, background):
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard
    from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module

    torch.manual_seed(0)
    model = called = Model()
    tensor = {"up": ColwiseParallel(), "down": RowwiseParallel()}
    match layout:
        case "fsdp":
            fully_shard(model)
        case "hsdp":
            fully_shard(model, mesh=init_device_mesh("cpu", (2, size // 2), mesh_dim_names=("copies", "data")))
        case "tensor":
            parallelize_module(model, init_device_mesh("cpu", (size,)), tensor)
        case "both":
            mesh = init_device_mesh("cpu", (size // 2, 2), mesh_dim_names=("data", "tensor"))
            parallelize_module(model, mesh["tensor"], tensor)
            fully_shard(model, mesh=mesh["data"])
        case "ddp":
            called = nn.parallel.DistributedDataParallel(model)
    optimizers = [
        MUON[0]([model.up.weight, model.down.weight], **MUON[1]),
        ADAMW[0]([model.odd.weight, model.experts], **ADAMW[1]),
    ]
    noted = Noted(optimizers)
    with attach(optimizers, model, store, every=1, background=background, on_error="raise") as recorder:
        for step in range(3):
            torch.manual_seed(step)
            called(torch.randn(8, 16)).square().mean().backward()
            noted.step()
            for one in optimizers:
                one.zero_grad()
            if background:  # so that no record is missed
                recorder.flush()
    return (noted.start, noted.steps) if rank == 0 else None


def assert_same(store, other):
    here, there = open_run(store), open_run(other)
    assert set(here.children) == set(there.children)
    compared = 0
    for group in set(here.children) - {"scalars"}:
        one, two = here[group].to_dataset(), there[group].to_dataset()
        for name in one.variables:
            np.testing.assert_array_equal(one[name].values, two[name].values, err_msg=f"{group}/{name}")
            compared += 1
    assert compared > 50
    assert here["geometry"].attrs["ns_schedules"] == there["geometry"].attrs["ns_schedules"]


LAYOUTS = [(1, "fsdp"), (2, "fsdp"), (4, "fsdp"), (4, "hsdp"), (2, "tensor"), (4, "both"), (2, "ddp"), (4, "ddp")]


# What is exchanged does not depend on the thread that does it: a few layouts show that.
CASES = [(*one, False) for one in LAYOUTS] + [(2, "fsdp", True), (4, "both", True), (2, "ddp", True)]


@pytest.mark.parametrize(
    ("size", "layout", "background"), CASES, ids=[f"{layout}-{size}{'-background' * background}" for size, layout, background in CASES]
)
def test_pieces_are_recorded_as_one_process_records_the_whole(size, layout, background, pools, tmp_path, monkeypatch):
    start, steps = pools(size).call(train, str(tmp_path / "ranks.zarr"), layout, background)[0]
    replay(monkeypatch, NAMES, [MUON, ADAMW], start, steps, attach, tmp_path / "one.zarr")
    assert_same(tmp_path / "ranks.zarr", tmp_path / "one.zarr")
