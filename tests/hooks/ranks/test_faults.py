"""Ranks that come out of step, fail or leave: training goes on, and every record is of one step of the training and right."""

import contextlib
import os
import signal
import time

import numpy as np
import pytest
import torch
import torch.distributed as dist
from torch import nn

from optiscope.analysis import open_run
from optiscope.hooks import attach

from .pool import Log, Pool
from .replay import whole

STEPS = 9


class Model(nn.Module):
    def __init__(self):
        super().__init__()
        self.up, self.down = nn.Linear(8, 12, bias=False), nn.Linear(12, 6, bias=False)

    def forward(self, x):
        return self.down(torch.tanh(self.up(x)))


def build(seed=0, cut=True):
    from torch.distributed.fsdp import fully_shard

    torch.manual_seed(seed)
    model = Model()
    if cut:
        fully_shard(model)
    # Neither step has collectives, so that nothing but the recorder keeps the ranks in step.
    return model, [torch.optim.AdamW([model.up.weight], lr=1e-2), torch.optim.SGD([model.down.weight], lr=0.1)]


def train(model, optimizers, rank, fault, recorder, steps=STEPS):
    """Per iteration the norms of what it has done to both matrices, as a whole; rank 1 does what is not right in the fourth."""
    fails = []
    if fault == "exception within the step" and rank == 1:

        def fail(*_):
            if fails:
                raise KeyError(fails.pop())

        optimizers[0].register_step_pre_hook(fail)
    noted = []
    for step in range(steps):
        torch.manual_seed(step)
        model(torch.randn(8, 8)).square().mean().backward()
        before = [whole(p) for p in model.parameters()]
        here = rank == 1 and step == 3
        if here and fault == "close":
            recorder.close()
        if here and fault == "exception within the step":
            fails.append("of the training's own")
        for i, one in enumerate(optimizers):
            if not (here and (fault == "skip" or (fault == "skip the first optimizer" and i == 0))):
                with contextlib.suppress(KeyError):
                    one.step()
            one.zero_grad()
        noted.append([float((b.double() - whole(p).double()).norm()) for b, p in zip(before, model.parameters(), strict=True)])
    return noted


def out_of_step(rank, size, store, fault, background, every):
    model, optimizers = build()
    with Log() as warnings:
        recorder = attach(optimizers, model, store, every=every, background=background, rank_timeout=6.0)
        noted = train(model, optimizers, rank, fault, recorder)
        recorder.close()
    return noted, warnings.said


FAULTS = [
    ("skip", False, 2),
    ("skip", True, 2),
    # The record of the fourth step waits for an optimizer at rank 1, up to three steps, while rank 0 has all it needs.
    ("skip the first optimizer", False, 4),
    ("skip the first optimizer", True, 4),
    ("exception within the step", True, 4),
    ("close", False, 2),
    ("close", True, 2),
]


@pytest.mark.parametrize(("fault", "background", "every"), FAULTS)
def test_no_record_is_of_two_steps(fault, background, every, pools, tmp_path):
    answers = pools(2).call(out_of_step, str(tmp_path / "run.zarr"), fault, background, every)
    noted = answers[0][0]
    assert len(noted) == STEPS
    for _, texts in answers:
        assert sum("recording ends" in text for text in texts) <= 1
    assert any("recording ends on rank 0" in text for text in answers[0][1])
    if every > STEPS // 3:  # the first record is the one that came to grief
        with contextlib.suppress(FileNotFoundError, KeyError, ValueError):
            assert not len(open_run(tmp_path / "run.zarr")["update"]["step"])
        return
    update = open_run(tmp_path / "run.zarr")["update"].to_dataset()
    assert len(update["step"])
    for step, norms in zip(update["step"].values, update["update_norm"].values, strict=True):
        assert step < 4
        np.testing.assert_allclose(norms, noted[step - 1], rtol=1e-6)  # float32 weights, differences in float64


def measured_badly(rank, size, store, background):
    from optiscope.hooks.recording import record

    right = record.measure_update
    calls = []

    def wrong(seen):
        calls.append(1)
        if len(calls) == 2:
            raise ArithmeticError("planted")
        return right(seen)

    model, optimizers = build()
    if rank == 1:
        record.measure_update = wrong
    try:
        with Log() as warnings, attach(optimizers, model, store, every=1, background=background, rank_timeout=30.0) as recorder:
            noted = []
            for _ in range(3):
                noted += train(model, optimizers, rank, None, recorder, 1)
                recorder.flush()
        return noted, warnings.said, recorder.errors
    finally:
        record.measure_update = right


@pytest.mark.parametrize("background", [False, True])
def test_a_measurement_that_fails_on_one_rank_is_missing_and_nothing_else(background, pools, tmp_path):
    (noted, told, errors), (_, told_1, errors_1) = pools(2).call(measured_badly, str(tmp_path / "run.zarr"), background)
    assert (errors, errors_1) == (1, 1)
    assert told == []
    assert len(told_1) == 1
    assert "planted" in told_1[0]
    norms = open_run(tmp_path / "run.zarr")["update"]["update_norm"].values
    assert np.isnan(norms).sum() == np.isnan(norms[1]).sum() == 1
    np.testing.assert_allclose(norms[~np.isnan(norms)], np.array(noted)[~np.isnan(norms)], rtol=1e-6)


def broken_within(rank, size, store):
    """Rank 1 cannot do its part of the second record, after the pieces have been exchanged."""
    from optiscope.hooks.ranks.ranks import Ranks

    right = Ranks.deliver

    def wrong(self, step, measured):
        if rank == 1 and step == 2:
            raise MemoryError("planted")
        return right(self, step, measured)

    Ranks.deliver = wrong
    model, optimizers = build()
    try:
        with Log() as warnings, attach(optimizers, model, store, every=1, rank_timeout=30.0) as recorder:
            noted = train(model, optimizers, rank, None, recorder, 4)
        return noted, warnings.said
    finally:
        Ranks.deliver = right


def test_a_rank_that_cannot_go_on_with_a_record_keeps_nobody_waiting(pools, tmp_path):
    answers = pools(2).call(broken_within, str(tmp_path / "run.zarr"))
    for _, texts in answers:
        assert sum("recording ends" in text for text in texts) == 1
    update = open_run(tmp_path / "run.zarr")["update"].to_dataset()
    assert update["step"].values.tolist() == [1]
    np.testing.assert_allclose(update["update_norm"].values[0], answers[0][0][0], rtol=1e-6)


def joining(rank, size, store, fault):
    model, optimizers = build(seed=rank if fault == "weights" else 0, cut=fault not in ("weights", "alone, whole"))
    options = {"every": 1, "rank_timeout": 30.0}
    if fault == "every":
        options["every"] = 1 + rank
    if fault == "ranks":
        options["ranks"] = ("auto", "share")[rank]
    if fault == "heads":
        options |= {"heads": 1 + rank, "measure": ("update", "blocks")}
    if fault == "store":
        store = f"{store}-{rank}"
    if fault == "late" and rank == 1:
        time.sleep(1)
    if fault.startswith("alone"):
        options["rank_timeout"] = 0.5
    with Log() as warnings:
        if fault.startswith("alone") and rank == 1:
            dist.barrier()  # until rank 0 has given up
        try:
            recorder = attach(optimizers, model, store, **options)
        except ValueError as error:
            return str(error), warnings.said
        if fault.startswith("alone") and rank == 0:
            dist.barrier()
        with recorder:
            train(model, optimizers, rank, None, recorder, 2)
    return None, warnings.said


@pytest.mark.parametrize(
    ("fault", "words"),
    [
        ("every", "every: expected the same on every rank, got 1 on rank 0 and 2 on rank 1"),
        ("ranks", "ranks: expected the same on every rank, got 'auto' on rank 0 and 'share' on rank 1"),
        ("heads", "heads: expected the same on every rank"),
        ("store", "store: expected the same on every rank"),
        ("weights", "model: ranks 0 and 1 hold different weights under the name up.weight"),
    ],
)
def test_ranks_that_do_not_fit_together_are_all_refused(fault, words, pools, tmp_path):
    for refused, _ in pools(2).call(joining, str(tmp_path / "run.zarr"), fault):
        assert refused is not None
        assert refused.startswith(words)


def test_a_rank_that_attaches_late_is_waited_for(pools, tmp_path):
    assert pools(2).call(joining, str(tmp_path / "run.zarr"), "late") == [(None, [])] * 2
    assert open_run(tmp_path / "run.zarr")["update"]["step"].values.tolist() == [1, 2]


@pytest.mark.parametrize("fault", ["alone", "alone, whole"])
def test_a_rank_that_attaches_too_late_records_nothing_and_the_next_recording_is_of_all(fault, pools, tmp_path):
    (_, told), (_, late) = pools(2).call(joining, str(tmp_path / "run.zarr"), fault)
    assert [text for text in told if "rank 1 did not attach within 0.5 s" in text] == told
    assert len(told) == len(late) == 1
    assert "nothing is recorded here" in late[0]
    if fault == "alone, whole":
        assert open_run(tmp_path / "run.zarr")["update"]["step"].values.tolist() == [1, 2]
    else:
        assert "nothing is recorded here" in told[0]
        assert not (tmp_path / "run.zarr").exists()
    assert pools(2).call(joining, str(tmp_path / "again.zarr"), "late") == [(None, [])] * 2
    assert open_run(tmp_path / "again.zarr")["update"]["step"].values.tolist() == [1, 2]


def killed(rank, size, store, victim):
    """The victim is killed in the midst of the third record; the others' training ends when its own collectives miss it."""
    from optiscope.hooks.ranks.ranks import Ranks

    right = Ranks.deliver

    def deliver(self, step, measured):
        if rank == victim and step == 3:
            os.kill(os.getpid(), signal.SIGKILL)
        return right(self, step, measured)

    Ranks.deliver = deliver
    model, optimizers = build()
    recorder = attach(optimizers, model, store, every=1, rank_timeout=30.0)
    noted = train(model, optimizers, rank, None, recorder, 2)
    recorder.flush()
    with Log() as warnings, contextlib.suppress(RuntimeError):
        train(model, optimizers, rank, None, recorder, 2)
    recorder.close()
    return noted, warnings.said


@pytest.mark.parametrize("victim", [0, 1])
def test_a_rank_that_is_killed_within_a_record_leaves_whole_ones(victim, tmp_path):
    pool = Pool(2)
    try:
        noted, texts = pool.call(killed, str(tmp_path / "run.zarr"), victim, answer_of=1 - victim)
    finally:
        pool.close()
    assert sum("recording ends" in text for text in texts) == 1
    update = open_run(tmp_path / "run.zarr")["update"].to_dataset()
    assert update["step"].values.tolist() == [1, 2]
    np.testing.assert_allclose(update["update_norm"].values, noted, rtol=1e-6)


def sharded_late(rank, size, store):
    from torch.distributed.fsdp import fully_shard

    torch.manual_seed(0)
    model = nn.ModuleDict({"up": nn.Linear(8, 12, bias=False)})
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    with Log() as log, attach(optimizer, model, store, every=1):
        fully_shard(model["up"])
        for _ in range(2):
            model["up"](torch.randn(4, 8)).square().mean().backward()
            optimizer.step()
    return log.said


def test_an_optimizer_that_was_made_before_fully_shard_is_told(pools, tmp_path):
    for said in pools(2).call(sharded_late, str(tmp_path / "run.zarr")):
        assert sum("AdamW steps 1 parameter that the model no longer holds (the first: up.weight)" in text for text in said) == 1
