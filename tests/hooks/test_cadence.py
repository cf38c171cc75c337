"""How often records are made when the recorder chooses: the share of time that the user allows is kept, and used."""

from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from torch import nn
from torch.optim import Optimizer

import optiscope.hooks.journal as journal_module
import optiscope.hooks.stopwatch as stopwatch_module
from optiscope.hooks import attach
from optiscope.hooks.cadence import PATIENCE, Cadence
from optiscope.hooks.watched import Watched

Read = Callable[[str | Path], Any]


PACES = {  # seconds of each step
    "steady": lambda step: 0.1,
    "slow start": lambda step: 60 if step == 1 else 0.1,  # as when the first step compiles
    "ever slower": lambda step: 0.001 if step < 100 else 1.0,
    "ever faster": lambda step: 1.0 if step < 100 else 0.01,
}
COSTS = {  # seconds of a record
    "even": lambda step: 0.05,
    "uneven": lambda step: 0.05 if step % 2 else 0.2,
    "cheap": lambda step: 1e-6,
}


@pytest.mark.parametrize("overhead", [0.01, 0.1, 1.0])
@pytest.mark.parametrize("cost", COSTS)
@pytest.mark.parametrize("pace", PACES)
def test_share_of_time_is_kept(pace: str, cost: str, overhead: float) -> None:
    """A training by numbers alone. After every record but the first, which has to be made to know its cost, the time spent
    is within the share of the time elapsed, but for what the record cost more than the one before it."""
    cadence = Cadence(None, overhead)
    cadence.start(0)
    elapsed = spent = last = 0.0
    records = []
    for step in range(1, 10_001):
        elapsed += PACES[pace](step)
        if step >= cadence.due and cadence.affords(step, spent, elapsed):
            this = COSTS[cost](step)
            elapsed, spent = elapsed + this, spent + this
            cadence.recorded(step, this, spent, elapsed)
            if records:
                assert spent <= overhead * elapsed + max(0.0, this - last)
            records.append(step)
            last = this
    assert records[0] == 1
    # And the share is used: in the end at least half of it, or every step is recorded.
    assert spent > 0.5 * overhead * elapsed or records[-100:] == list(range(9_901, 10_001))


def test_governor_on_a_fake_clock(
    two: tuple[nn.Module, Optimizer, Optimizer], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, read: Read
) -> None:
    """Every step takes 10 ms and every snapshot 1 ms, by a clock that nothing else moves."""
    now = [0.0]
    clock = SimpleNamespace(perf_counter=lambda: now[0], process_time=lambda: 0.0, thread_time=lambda: 0.0)
    monkeypatch.setattr(journal_module, "time", clock)
    monkeypatch.setattr(stopwatch_module, "time", clock)
    taken = Watched.take_snapshots

    def snapshots(self: Watched, *args: Any) -> None:
        now[0] += 0.001
        taken(self, *args)

    monkeypatch.setattr(Watched, "take_snapshots", snapshots)
    model, d, g = two
    with attach([d, g], model, tmp_path / "run.zarr", overhead=0.05, on_error="raise") as recorder:
        for _ in range(400):
            now[0] += 0.010
            d.step()
            g.step()
    steps = read(tmp_path / "run.zarr")["update"]["step"].values
    assert recorder.overhead_seconds == pytest.approx(0.002 * len(steps), rel=1e-9)
    assert 0.045 < recorder.overhead_seconds / now[0] <= 0.05
    # At 5 %, 2 ms are paid for by 40 ms: the record itself and 3.8 steps.
    assert set(np.diff(steps[10:])) == {3, 4}


def test_patience_ends_before_the_next_record() -> None:
    assert [Cadence(every, 0.01).patience for every in (1, 2, 5, 1000, None)] == [0, 1, 4, PATIENCE, PATIENCE]
