"""Whatever happens to one rank, the training goes on on all: no record mixes steps, what was committed stays, and each rank says once what happened."""

import logging
import os
import signal
import time

import numpy as np
import pytest
import torch
from torch import nn

from optiscope.analysis import open_run
from optiscope.hooks import attach

from .pool import Log, Pool

TIMEOUT, STEPS, AT = 3.0, 8, 5


def train(rank, size, store, fault, layout, background=False, **options):
    """AdamW, whose step has no collectives: a rank that skips one holds up nobody but the recorder."""
    from torch.distributed.fsdp import fully_shard

    log, logger = Log(), logging.getLogger("optiscope")
    logger.addHandler(log)
    torch.manual_seed(0)
    model = called = nn.ModuleDict({"up": nn.Linear(8, 12, bias=False), "down": nn.Linear(12, 8, bias=False)})
    if layout == "fsdp":
        for one in model.values():
            fully_shard(one)
    else:
        called = nn.ModuleDict({name: nn.parallel.DistributedDataParallel(one) for name, one in model.items()})
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    recorder, longest, before = None, 0.0, []
    if not (fault == "absent" and rank == size - 1):
        options = {"every": 1, "background": background, "rank_timeout": TIMEOUT, **options}
        recorder = attach(optimizer, model, f"{store}-{rank}" if fault == "stores" else store, **options)
    for step in range(1, STEPS + 1):
        torch.manual_seed(step)
        called["down"](torch.tanh(called["up"](torch.randn(16, 8)))).square().mean().backward()
        begun = time.perf_counter()
        if step == AT and rank == size - 1:
            _do(fault, recorder, optimizer)
        if step == AT and rank == 0 and fault == "killed first":
            os.kill(os.getpid(), signal.SIGKILL)
        if not (fault == "skips" and step == AT and rank == size - 1):
            optimizer.step()
        longest = max(longest, time.perf_counter() - begun)
        optimizer.zero_grad()
        before.append([p.full_tensor() if hasattr(p, "full_tensor") else p for p in model.parameters()])
    if recorder is not None:
        recorder.close()
    logger.removeHandler(log)
    weights = [[float(p.detach().double().norm()) for p in of_step] for of_step in before]
    return {"said": log.said, "longest": longest, "weights": weights, "missed": 0 if recorder is None else recorder.missed}


def _do(fault, recorder, optimizer):
    match fault:
        case "closes":
            recorder.close()
        case "killed":
            os.kill(os.getpid(), signal.SIGKILL)
        case "killed inside":  # between what the ranks exchange and what they deliver
            recorder.session.under_way._ranks.deliver = lambda *_: os.kill(os.getpid(), signal.SIGKILL)


def steps_of(store):
    run = open_run(store)
    for group in ("geometry", "update", "second_moment"):
        assert run[group]["step"].values.tolist() == run["update"]["step"].values.tolist()
    return run["update"]["step"].values.tolist()


@pytest.mark.parametrize("background", [False, True], ids=["foreground", "background"])
@pytest.mark.parametrize("fault", ["closes", "skips"])
def test_a_rank_that_leaves_or_falls_behind_ends_the_recording_alone(fault, background, pools, tmp_path):
    answers = pools(2).call(train, str(tmp_path / "run.zarr"), fault, "fsdp", background)
    assert all(answer["longest"] < TIMEOUT + 20 for answer in answers)
    said = [[text for text in answer["said"] if "recording ends" in text] for answer in answers]
    assert len(said[0]) == 1
    assert len(said[1]) == (fault == "skips")
    assert "another rank was waited for" in said[0][0]
    found = steps_of(tmp_path / "run.zarr")
    assert set(found) <= set(range(1, AT))
    if not background:
        assert found == list(range(1, AT))
    # Every record is of the weights that all ranks had after its step.
    run, truth = open_run(tmp_path / "run.zarr"), answers[0]["weights"]
    size = np.sqrt(run["update"]["rows"].values * run["update"]["cols"].values)
    for i, step in enumerate(found[1:], 1):
        np.testing.assert_allclose(run["update"]["weight_rms"].values[i] * size, truth[step - 2], rtol=1e-5)


@pytest.mark.parametrize(("layout", "records"), [("ddp", STEPS), ("fsdp", 0)])
def test_a_rank_that_never_attaches_is_named_and_not_waited_for_again(layout, records, pools, tmp_path):
    first, last = pools(2).call(train, str(tmp_path / "run.zarr"), "absent", layout)
    assert last["said"] == []
    (said,) = first["said"]
    assert f"rank 1 did not attach within {TIMEOUT:g} s" in said
    assert len(steps_of(tmp_path / "run.zarr") if records else []) == records
    assert (tmp_path / "run.zarr").exists() == bool(records)


def test_ranks_find_each_other_again_after_one_was_missing(pools, tmp_path):
    pools(2).call(train, str(tmp_path / "alone.zarr"), "absent", "ddp")
    first, last = pools(2).call(train, str(tmp_path / "run.zarr"), "none", "fsdp")
    assert first["said"] == last["said"] == []
    assert steps_of(tmp_path / "run.zarr") == list(range(1, STEPS + 1))


def test_stores_of_other_ranks_are_not_used(pools, tmp_path):
    pools(2).call(train, str(tmp_path / "run.zarr"), "stores", "fsdp")
    assert [path.name for path in tmp_path.iterdir()] == ["run.zarr-0"]


def refused(rank, size, store, case):
    torch.manual_seed(rank if case == "weights" else 0)
    model = nn.ModuleDict({"up": nn.Linear(8, 12 if case != "shapes" else 12 + rank, bias=False)})
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    try:
        attach(optimizer, model, store, every=1 + rank if case == "every" else 1, rank_timeout=TIMEOUT).close()
    except ValueError as error:
        return str(error)
    return ""


@pytest.mark.parametrize(
    ("case", "words"),
    [
        ("weights", "ranks 0 and 1 hold different weights under the name up.weight"),
        (
            "shapes",
            "ranks 0 and 1 hold different things under the name up.weight: a tensor of shape 12×8 of AdamW, and a tensor of shape 13×8 of AdamW",
        ),
        ("every", "every: expected the same on every rank, got 1 on rank 0 and 2 on rank 1"),
        ("file", "run.zarr"),
    ],
)
def test_what_does_not_fit_together_is_refused_on_every_rank(case, words, pools, tmp_path):
    if case == "file":
        (tmp_path / "run.zarr").mkdir()
        (tmp_path / "run.zarr" / "precious").write_text("")
    answers = pools(2).call(refused, str(tmp_path / "run.zarr"), case)
    assert all(words in answer and "\n" not in answer for answer in answers)


@pytest.mark.parametrize("fault", ["killed", "killed inside", "killed first"])
def test_a_rank_that_is_killed(fault, tmp_path):
    """The training's own collectives fail then: what is left of it may end as it will, with what was committed whole."""
    pool = Pool(2)
    try:
        with pytest.raises((AssertionError, EOFError)):
            pool.call(train, str(tmp_path / "run.zarr"), fault, "fsdp")
    finally:
        pool.close()
    found = steps_of(tmp_path / "run.zarr")
    assert found == list(range(1, 1 + len(found)))
    assert 1 <= len(found) < AT + (fault == "killed")


def sharded_late(rank, size, store):
    from torch.distributed.fsdp import fully_shard

    log, logger = Log(), logging.getLogger("optiscope")
    logger.addHandler(log)
    torch.manual_seed(0)
    model = nn.ModuleDict({"up": nn.Linear(8, 12, bias=False)})
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    with attach(optimizer, model, store, every=1, rank_timeout=TIMEOUT):
        fully_shard(model["up"])
        for _ in range(2):
            model["up"](torch.randn(4, 8)).square().mean().backward()
            optimizer.step()
    logger.removeHandler(log)
    return log.said


def test_an_optimizer_that_was_made_before_fully_shard_is_told(pools, tmp_path):
    for said in pools(2).call(sharded_late, str(tmp_path / "run.zarr")):
        assert sum("AdamW steps 1 parameter that the model no longer holds (the first: up.weight)" in text for text in said) == 1
