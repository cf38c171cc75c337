"""A training that goes on with another number of ranks goes on in the same run, in the same rows; from an earlier checkpoint it makes a lineage."""

import numpy as np
import torch
import torch.distributed.checkpoint as checkpoint
from torch import nn
from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict

from optiscope.analysis import open_run
from optiscope.hooks import attach


def train(rank, size, store, load, save, steps):
    from torch.distributed.fsdp import fully_shard

    torch.manual_seed(0)
    model = nn.ModuleDict({"up": nn.Linear(8, 13, bias=False), "down": nn.Linear(13, 8, bias=False)})
    for one in model.values():
        fully_shard(one)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    if load is not None:
        weights, state = get_state_dict(model, optimizer)
        checkpoint.load({"model": weights, "optimizer": state}, checkpoint_id=load)
        set_state_dict(model, optimizer, model_state_dict=weights, optim_state_dict=state)
    with attach(optimizer, model, store, every=1, on_error="raise") as recorder:
        first = recorder.first_step
        for step in range(first, first + steps):
            torch.manual_seed(step)
            model["down"](torch.tanh(model["up"](torch.randn(4, 8)))).square().mean().backward()
            optimizer.step()
            optimizer.zero_grad()
    weights, state = get_state_dict(model, optimizer)
    checkpoint.save({"model": weights, "optimizer": state}, checkpoint_id=save)
    return first, [float(p.full_tensor().double().square().mean().sqrt()) for p in model.parameters()]


def test_two_ranks_then_four_then_one(pools, tmp_path):
    store, at = str(tmp_path / "run.zarr"), [str(tmp_path / f"checkpoint{i}") for i in range(4)]
    first, weights = pools(2).call(train, store, None, at[0], 3)[0]
    assert first == 0
    assert pools(4).call(train, store, at[0], at[1], 2)[0][0] == 3
    assert pools(1).call(train, store, at[1], at[2], 2)[0][0] == 5
    run = open_run(store)
    assert run["update"]["step"].values.tolist() == list(range(1, 8))
    assert run["update"]["name"].values.tolist() == ["up.weight", "down.weight"]
    assert [entry["ranks"]["world_size"] for entry in (run.attrs, *run.attrs["continued"])] == [2, 4, 1]
    for name in ("weight_rms", "update_rms", "momentum_rms"):
        assert np.isfinite(run["update"][name].values).all()
    # What four ranks began with is what two had ended with.
    np.testing.assert_allclose(run["update"]["weight_rms"].values[3], weights, rtol=1e-6)

    assert pools(4).call(train, store, at[0], at[3], 1)[0][0] == 3
    assert open_run(store)["update"]["step"].values.tolist() == [1, 2, 3, 4]
    assert open_run(store, lineage=0)["update"]["step"].values.tolist() == list(range(1, 8))
