"""The training of every rank is to the bit what it is without a recorder, and none of its groups carries a collective of the recorder's."""

import hashlib
import random

import numpy as np
import pytest
import torch
import torch.distributed as dist
from torch import nn

from optiscope.hooks import attach


def digest(tensors):
    found = hashlib.sha256()
    for tensor in tensors:
        tensor = tensor.to_local() if hasattr(tensor, "to_local") else tensor
        found.update(tensor.detach().contiguous().view(-1).view(torch.uint8).numpy().tobytes())
    return found.hexdigest()


def train(rank, size, store, layout, recorded, background):
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard
    from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module

    default = dist.group.WORLD
    torch.manual_seed(3)
    np.random.seed(3)  # noqa: NPY002, the global state is what is not to be drawn from
    random.seed(3)
    model = called = nn.ModuleDict({"up": nn.Linear(12, 20, bias=False), "down": nn.Linear(20, 11, bias=False)})
    if layout == "fsdp":
        for one in model.values():
            fully_shard(one)
    elif layout == "tensor":
        parallelize_module(model, init_device_mesh("cpu", (size,)), {"up": ColwiseParallel(), "down": RowwiseParallel()})
    else:
        called = nn.ModuleDict({name: nn.parallel.DistributedDataParallel(one) for name, one in model.items()})
    optimizers = [torch.optim.Muon([model.up.weight], lr=0.02), torch.optim.AdamW([model.down.weight], lr=1e-2)]
    before = default._get_sequence_number_for_group()
    recorder = attach(optimizers, model, store, every=1, background=background, on_error="raise") if recorded else None
    for _ in range(4):
        x = torch.randn(8, 12) if layout != "tensor" else torch.ones(8, 12) * random.random()
        called["down"](torch.tanh(called["up"](x))).square().mean().backward()
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad()
    group = dist.new_group(list(range(size)))
    if recorder is not None:
        recorder.close()
    state = [value for one in optimizers for p in one.state for value in one.state[p].values() if isinstance(value, torch.Tensor)]
    return {
        "weights": digest(model.parameters()),
        "state": digest(state),
        "torch": digest([torch.get_rng_state()]),
        "numpy": hashlib.sha256(np.random.get_state()[1].tobytes()).hexdigest(),  # noqa: NPY002
        "random": random.random(),
        "collectives": default._get_sequence_number_for_group() - before,
        "grad": torch.is_grad_enabled(),
        "hooks": [len(one._optimizer_step_pre_hooks) for one in optimizers],
        "threads": torch.get_num_threads(),
        "groups": dist.get_world_size(group),
    }


@pytest.mark.parametrize("background", [False, True], ids=["foreground", "background"])
@pytest.mark.parametrize("layout", ["fsdp", "tensor", "ddp"])
def test_every_rank_trains_as_without(layout, background, pools, tmp_path):
    plain = pools(2).call(train, str(tmp_path / "run.zarr"), layout, False, background)
    assert pools(2).call(train, str(tmp_path / "run.zarr"), layout, True, background) == plain
    assert (tmp_path / "run.zarr" / "zarr.json").exists()
