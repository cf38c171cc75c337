"""What is wrong between ranks is named: copies that part, gradients that are not averaged, pieces that are orthogonalised one by one."""

import pytest
import torch
from torch import nn

from optiscope.analysis import check, open_run
from optiscope.diagnostics.newton_schulz.families import FAMILIES
from optiscope.diagnostics.newton_schulz.matrix_iteration import orthogonalised
from optiscope.hooks import attach

TOLD = {"copies_parted", "own_gradients", "orthogonalised_by_shard"}


class OwnMuon(torch.optim.Optimizer):
    """A Muon that is in no table, on the piece of a matrix that its rank holds."""

    def __init__(self, params, lr=0.02, weight_decay=0.1):
        super().__init__(params, {"lr": lr, "weight_decay": weight_decay})

    @torch.no_grad()
    def step(self):
        for group in self.param_groups:
            for p in group["params"]:
                buffer = self.state[p].setdefault("momentum_buffer", torch.zeros_like(p))
                buffer.mul_(0.95).add_(p.grad)
                piece, mixed = p.to_local(), (p.grad + 0.95 * buffer).to_local()
                piece.mul_(1 - group["lr"] * group["weight_decay"])
                piece.add_(
                    torch.from_numpy(orthogonalised(mixed.numpy(), FAMILIES["polar_express"].coefficients[:5], 1e-7)), alpha=-group["lr"]
                )


class OwnAverage(torch.optim.Optimizer):
    """One that averages gradients within its step."""

    def __init__(self, params, lr=0.02):
        super().__init__(params, {"lr": lr})

    @torch.no_grad()
    def step(self):
        for group in self.param_groups:
            for p in group["params"]:
                torch.distributed.all_reduce(p.grad)
                p.add_(p.grad, alpha=-group["lr"])


class Model(nn.Module):
    def __init__(self):
        super().__init__()
        self.up, self.down = nn.Linear(24, 40, bias=False), nn.Linear(40, 24, bias=False)

    def forward(self, x):
        return self.down(torch.tanh(self.up(x)))


def train(rank, size, store, case):
    from torch.distributed.fsdp import fully_shard

    torch.manual_seed(0)
    model = called = Model()
    if "shard" in case or "whole" in case:
        fully_shard(model)
    elif case not in ("not averaged", "averaged within"):
        called = nn.parallel.DistributedDataParallel(model)
    kind = {"by shard": OwnMuon, "averaged within": OwnAverage, "whole": torch.optim.Muon}.get(case, torch.optim.AdamW)
    optimizer = kind(model.parameters(), lr=0.02)
    with attach(optimizer, model, store, every=1, on_error="raise"):
        for step in range(4):
            torch.manual_seed(100 * step + rank)
            if case == "drift" and step == 2 and rank == 1:
                with torch.no_grad():
                    model.down.weight[0, 0] += 1e-3
            called(torch.randn(8, 24)).square().mean().backward()
            optimizer.step()
            optimizer.zero_grad()


@pytest.fixture
def findings(pools, tmp_path):
    def of(case):
        pools(2).call(train, str(tmp_path / "run.zarr"), case)
        return {one.rule: one for one in check(open_run(tmp_path / "run.zarr")) if one.rule in TOLD}

    return of


@pytest.mark.parametrize("case", ["ddp", "whole", "adamw in shards"])
def test_nothing_is_said_of_what_is_right(case, findings):
    assert findings(case) == {}


def test_a_copy_that_one_rank_changed(findings):
    (found,) = findings("drift").values()
    assert (found.rule, found.severity, found.numbers["step"], found.matrices) == ("copies_parted", "error", 3, ("down.weight",))
    assert "ranks 0 and 1 hold different weights" in found.sentence
    assert "Their gradients are the same" in found.sentence


def test_gradients_that_are_never_averaged(findings):
    (found,) = findings("not averaged").values()
    assert (found.rule, found.severity, found.numbers["step"], found.numbers["matrices"]) == ("copies_parted", "error", 1, 2)
    assert "they are not averaged over the ranks" in found.sentence


def test_gradients_that_the_optimizer_averages(findings):
    (found,) = findings("averaged within").values()
    assert (found.rule, found.severity, found.numbers["matrices"]) == ("own_gradients", "info", 2)


def test_pieces_that_are_orthogonalised_one_by_one(findings):
    (found,) = findings("by shard").values()
    assert (found.rule, found.severity) == ("orthogonalised_by_shard", "warning")
    assert set(found.matrices) == {"up.weight", "down.weight"}
    assert found.numbers["pieces"] > 0.95 > found.numbers["whole"]
