"""Curvature where several ranks record: of copies rank 0's, of matrices in pieces none, and one sentence."""

import logging

import numpy as np
import torch
from torch import nn

from optiscope.analysis import open_run
from optiscope.hooks import attach

from .pool import Log


def train(rank, size, store, layout):
    from torch.distributed.fsdp import fully_shard

    log, logger = Log(), logging.getLogger("optiscope")
    logger.addHandler(log)
    torch.manual_seed(0)
    model = nn.Linear(6, 4, bias=False)
    called = fully_shard(model) if layout == "fsdp" else nn.parallel.DistributedDataParallel(model)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    x = torch.randn(16, 6)
    with attach(optimizer, model, store, every=1, on_error="raise") as recorder:
        for _ in range(2):
            called(x).square().mean().backward()
            optimizer.step()
            optimizer.zero_grad()
            recorder.curvature(lambda: model(x).square().mean(), exact=24)
    logger.removeHandler(log)
    return log.said, x


def test_of_copies_rank_0_records_its_own(pools, tmp_path):
    (said, x), _ = pools(2).call(train, str(tmp_path / "run.zarr"), "ddp")
    assert said == []
    curvature = open_run(tmp_path / "run.zarr")["curvature"]
    assert curvature["step"].values.tolist() == [1, 2]
    # The Hessian of mean (Wx)_i squared: (2/4) E[x x^T] for every row; its diagonal's mean.
    expected = 2 / 4 * float((x.double() ** 2).mean())
    np.testing.assert_allclose(curvature["exact_mean"].values, expected, rtol=1e-5)


def test_of_pieces_nothing_is_recorded_and_one_sentence_said(pools, tmp_path):
    answers = pools(2).call(train, str(tmp_path / "run.zarr"), "fsdp")
    assert [sum("curvature of matrices that lie in pieces" in text for text in said) for said, _ in answers] == [1, 1]
    run = open_run(tmp_path / "run.zarr")
    assert "curvature" not in run.children
    assert run["update"]["step"].values.tolist() == [1, 2]
