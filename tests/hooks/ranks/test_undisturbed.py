"""A training of several ranks is bitwise the same with and without a recorder, and its groups see no collective of the recorder's."""

import random

import numpy as np
import pytest
import torch
import torch.distributed as dist
from torch import nn

from optiscope.hooks import attach

from .test_exact import Model


def as_bytes(tensor):
    here = tensor.to_local() if hasattr(tensor, "to_local") else tensor
    return here.detach().contiguous().view(-1).view(torch.uint8).numpy().tobytes()


def fingerprint(model, optimizers):
    weights = {name: as_bytes(p) for name, p in model.named_parameters()}
    state = {
        (i, name, key): as_bytes(value) if isinstance(value, torch.Tensor) else value
        for i, one in enumerate(optimizers)
        for name, p in model.named_parameters()
        for key, value in one.state.get(p, {}).items()
    }
    numpy_state = np.random.get_state()  # noqa: NPY002 - the global one is what must not change
    return weights, state, torch.get_rng_state().numpy().tobytes(), (numpy_state[1].tobytes(), numpy_state[2]), random.getstate()


def issued(model):
    """Collectives so far, by group: of all ranks, and of the meshes that parameters lie on."""
    groups = [dist.distributed_c10d._get_default_group()]
    for p in model.parameters():
        mesh = getattr(p, "device_mesh", None)
        if mesh is not None:
            groups += [mesh.get_group(i) for i in range(mesh.ndim)]
    return {group.group_name: group._get_sequence_number_for_group() for group in groups}


def train(rank, size, layout, store, background, disturbs=False):
    """What the training is at its end, its collectives by group, and how its later groups are called, counted from the last one made before."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard
    from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module

    torch.manual_seed(0)
    random.seed(0)
    np.random.seed(0)  # noqa: NPY002
    model = called = Model()
    match layout:
        case "fsdp":
            fully_shard(model)
        case "tensor":
            parallelize_module(model, init_device_mesh("cpu", (size,)), {"up": ColwiseParallel(), "down": RowwiseParallel()})
        case "ddp":
            called = nn.parallel.DistributedDataParallel(model)
    optimizers = [
        torch.optim.Muon([model.up.weight, model.down.weight], lr=0.02),
        torch.optim.AdamW([model.odd.weight, model.experts], lr=1e-2),
    ]
    made = int(dist.new_group(list(range(size))).group_name)
    before = issued(model)
    recorder = None if store is None else attach(optimizers, model, store, every=1, background=background, on_error="raise")
    for _ in range(3):
        x = torch.randn(8, 16) + random.random() + float(np.random.rand())  # noqa: NPY002
        called(x).square().mean().backward()
        for one in optimizers:
            one.step()
            one.zero_grad()
        if disturbs:
            dist.barrier()
            torch.rand(1)
    names = int(dist.new_group(list(range(size))).group_name) - made
    collectives = {name: count - before[name] for name, count in issued(model).items()}
    recorded = 0
    if recorder is not None:
        recorder.close()
        recorded = recorder.step
    return fingerprint(model, optimizers), sorted(collectives.values()), names, recorded


@pytest.mark.parametrize("layout", ["fsdp", "ddp", "tensor"])
def test_a_training_is_the_same_with_a_recorder(layout, pools, tmp_path):
    pool = pools(2)
    without = pool.call(train, layout, None, False)
    assert all(sum(answer[1]) > 0 for answer in without)
    for background in (False, True):
        with_one = pool.call(train, layout, str(tmp_path / f"{background}.zarr"), background)
        assert [answer[:3] for answer in with_one] == [answer[:3] for answer in without]
        assert [answer[3] for answer in with_one] == [3, 3]
        assert (tmp_path / f"{background}.zarr").exists()


def test_what_disturbs_is_seen(pools):
    without, disturbed = pools(2).call(train, "fsdp", None, False), pools(2).call(train, "fsdp", None, False, True)
    for one, other in zip(without, disturbed, strict=True):
        assert one[0] != other[0]
        assert sum(other[1]) > sum(one[1])
