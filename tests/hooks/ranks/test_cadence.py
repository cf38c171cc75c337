"""When ranks record: at the steps that rank 0 names, all of them or none."""

import threading

import torch
from torch import nn

from optiscope.analysis import open_run
from optiscope.hooks import attach


def train(rank, size, store, steps, slow, options):
    from torch.distributed.fsdp import fully_shard

    torch.manual_seed(0)
    model = nn.Linear(24, 32, bias=False)
    fully_shard(model)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    begun = []
    with attach(optimizer, model, store, on_error="raise", **options) as recorder:
        under_way = recorder.session.under_way
        recorder.on_record(lambda record: begun.append(record.step))
        if slow and rank == 1:
            # Something else that the worker of one rank is busy with.
            gate = threading.Event()
            recorder.session.journal.worker.submit(lambda: gate.wait(60))
        for step in range(1, steps + 1):
            model(torch.randn(4, 24)).square().mean().backward()
            optimizer.step()
            optimizer.zero_grad()
            if slow and rank == 1 and step == steps:
                gate.set()
        recorder.flush()
        assert under_way.record is None
        missed = recorder.missed
    return begun, missed, recorder.session.cadence.due


def test_the_share_of_time_is_kept_by_rank_0s_clock_and_records_are_the_same_everywhere(pools, tmp_path):
    answers = pools(2).call(train, str(tmp_path / "run.zarr"), 120, False, {"overhead": 0.05})
    steps = open_run(tmp_path / "run.zarr")["update"]["step"].values.tolist()
    assert steps[0] == 1
    assert [begun for begun, _, _ in answers] == [steps, steps]
    assert answers[0][2] == answers[1][2] > 120 - 1


def test_a_rank_that_is_still_measuring_has_all_leave_records_out(pools, tmp_path):
    answers = pools(2).call(train, str(tmp_path / "run.zarr"), 6, True, {"every": 1, "background": True})
    steps = open_run(tmp_path / "run.zarr")["update"]["step"].values.tolist()
    assert [begun for begun, _, _ in answers] == [steps, steps]
    assert steps == [1]
    assert [missed for _, missed, _ in answers] == [5, 5]
