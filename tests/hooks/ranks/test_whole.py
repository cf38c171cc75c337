"""Matrices that are whole on ranks: measured where their state is, or dealt out; each as one process records it.

All ranks get the same batch, so that averaged gradients are to the bit those of one process, and so is the training.
"""

import numpy as np
import pytest
import torch
from torch import nn

from optiscope.analysis import open_run
from optiscope.hooks import attach

GROUPS = ("geometry", "update", "second_moment", "gradient", "blocks", "stacking")


class Model(nn.Module):
    def __init__(self):
        super().__init__()
        self.layers = nn.ModuleList(
            nn.ModuleDict({"qkv_proj": nn.Linear(12, 36, bias=False), "o_proj": nn.Linear(36, 12, bias=False)}) for _ in range(3)
        )
        self.head = nn.Linear(12, 5)
        self.num_heads = 2

    def forward(self, x):
        for layer in self.layers:
            x = x + layer["o_proj"](torch.tanh(layer["qkv_proj"](x)))
        return self.head(x)


def made(case, model):
    match case:
        case "zero":
            from torch.distributed.optim import ZeroRedundancyOptimizer

            return ZeroRedundancyOptimizer(model.parameters(), torch.optim.AdamW, lr=1e-2)
        case "keller":
            from muon import MuonWithAuxAdam

            return MuonWithAuxAdam(keller(model))
        case "one keller":
            from muon import SingleDeviceMuonWithAuxAdam

            return SingleDeviceMuonWithAuxAdam(keller(model))
        case _:
            return torch.optim.AdamW(model.parameters(), lr=1e-2)


def keller(model):
    """Matrices of one shape by Muon: gloo gathers no others together."""
    square = [layer["qkv_proj"].weight for layer in model.layers]
    rest = [p for p in model.parameters() if all(p is not q for q in square)]
    return [{"params": square, "use_muon": True, "lr": 0.02}, {"params": rest, "use_muon": False, "lr": 1e-3}]


def train(rank, size, store, case, ranks="auto"):
    torch.manual_seed(0)
    model = called = Model()
    if size > 1:
        called = nn.parallel.DistributedDataParallel(model)
    optimizer = made(case, model)
    with attach(optimizer, model, store, every=1, measure=GROUPS, heads=2, ranks=ranks, on_error="raise"):
        for step in range(4):
            torch.manual_seed(step)
            called(torch.randn(8, 12)).square().mean().backward()
            optimizer.step()
            optimizer.zero_grad()


def assert_same(store, other, *, but=()):
    here, there = open_run(store), open_run(other)
    assert set(here.children) == set(there.children)
    for group in set(here.children) - {"scalars", *but}:
        one, two = here[group].to_dataset(), there[group].to_dataset()
        order = [two["name"].values.tolist().index(name) for name in one["name"].values.tolist()]
        two = two.isel(matrix=order)
        for name in set(one.variables) - {"optimizer"}:
            np.testing.assert_array_equal(one[name].values, two[name].values, err_msg=f"{group}/{name}")
    return here


@pytest.mark.parametrize(
    ("case", "ranks", "single"),
    [("adamw", "auto", "adamw"), ("adamw", "share", "adamw"), ("zero", "auto", "adamw"), ("keller", "auto", "one keller")],
    ids=["ddp", "shared", "zero", "keller"],
)
def test_whole_matrices_are_recorded_as_by_one_process(case, ranks, single, pools, tmp_path):
    pools(2).call(train, str(tmp_path / "ranks.zarr"), case, ranks)
    train(0, 1, str(tmp_path / "one.zarr"), single)
    # Of a pair of layers whose state lies on two ranks nobody has both.
    run = assert_same(tmp_path / "ranks.zarr", tmp_path / "one.zarr", but=("stacking",) if case == "keller" else ())
    measured = run.attrs["ranks"]["measured"]
    assert sum(measured) == 7
    assert (min(measured) > 0) == (case != "adamw" or ranks == "share")
    assert run.attrs["ranks"]["bytes_moved"] == 0
    assert "parted" not in run.attrs
