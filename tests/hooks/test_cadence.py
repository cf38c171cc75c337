"""How often records are made when the recorder chooses: the share of time that the user allows is kept, and used."""

from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from torch import nn
from torch.optim import Optimizer

import optiscope.hooks.recording.journal as journal_module
import optiscope.hooks.recording.stopwatch as stopwatch_module
from optiscope.hooks import attach
from optiscope.hooks.observing.watched import Watched
from optiscope.hooks.recording.cadence import FLUSH_SECONDS, GRAIN, LOOK, PATIENCE, WINDOW, Cadence

Read = Callable[[str | Path], Any]
Floats = NDArray[np.float64]


class Trained:
    """A training by numbers alone, its steps, records, scalars and commits taking the seconds that are given, and what came of it.

    Attributes:
        step_seconds, spent: of every step, what it took aside from recording, and what was spent on recording in it.
        records: steps of the records, and what each took.
        excess: of every step, by how much a record in it took longer than the longer of the two before: what could not be foreseen.
    """

    def __init__(
        self,
        overhead: float,
        pace: Floats,
        cost: Callable[[int], float],
        *,
        log: float = 0.0,
        flush: float = 0.0,
        every_flush: float = 30.0,
    ) -> None:
        cadence = Cadence(None, overhead)
        cadence.start(0)
        steps = len(pace)
        self.step_seconds, self.spent, self.excess = pace, np.zeros(steps), np.zeros(steps)
        self.records: dict[int, float] = {}
        elapsed = spent = flushed = 0.0
        for i in range(steps):
            step = i + 1
            elapsed += pace[i]
            if step >= cadence.due and cadence.affords(step, spent, elapsed, flush):
                before = spent
                this = cost(len(self.records))
                spent, elapsed = spent + this, elapsed + this
                last = list(self.records.values())[-2:]
                self.excess[i] = max(0.0, this - max(last)) if last else this
                self.records[step] = this
                cadence.begun(step)
                cadence.recorded(step, this, spent, elapsed, flush)
                self.spent[i] += spent - before
            spent, elapsed = spent + log, elapsed + log
            self.spent[i] += log
            if flush and elapsed - flushed > FLUSH_SECONDS:
                flushed = elapsed
                spent, elapsed = spent + flush, elapsed + flush
                self.spent[i] += flush
        self.spent[-1] += flush  # the closing one
        self.overhead = overhead

    def over_windows(self, window: int = WINDOW) -> Floats:
        """Of every so many steps in a row: the seconds spent beyond the share, less what could not be foreseen."""
        spent, allowed, excess = (
            np.convolve(x, np.ones(min(window, len(x))), "valid")
            for x in (self.spent, self.overhead * (self.step_seconds + self.spent), self.excess)
        )
        return spent - allowed - excess


PACES: dict[str, Callable[[int], Floats]] = {  # seconds of each step
    "steady": lambda n: np.full(n, 0.1),
    "slow start": lambda n: np.concatenate([[60.0], np.full(n - 1, 0.1)]),  # as when the first step compiles
    "compiled twice": lambda n: np.concatenate([[60.0, 0.1, 40.0], np.full(n - 3, 0.1)]),
    "pauses": lambda n: np.where(np.arange(n) % 250 == 249, 50.0, 0.1),  # as for an evaluation
    "bursts": lambda n: np.where(np.arange(n) // 300 % 2 == 0, 0.05, 0.2),
    "ever slower": lambda n: np.linspace(0.05, 0.5, n),
    "jittery": lambda n: np.random.default_rng(0).gamma(2.0, 0.05, n),
}
COSTS: dict[str, Callable[[int], float]] = {  # seconds of a record, by its number
    "even": lambda i: 0.05,
    "first slow": lambda i: 0.05 if i else 0.3,
    "uneven": lambda i: 0.05 if i % 2 else 0.2,
    "cheap": lambda i: 1e-6,
    "rising": lambda i: 0.05 * (1 + i / 20),
    "once huge": lambda i: 3.0 if i == 5 else 0.05,
}


@pytest.mark.parametrize("cost", COSTS)
@pytest.mark.parametrize("pace", PACES)
def test_share_of_time_is_kept_over_the_run_and_any_1000_steps(pace: str, cost: str) -> None:
    trained = Trained(0.01, PACES[pace](2500), COSTS[cost], log=2e-5, flush=0.03)
    assert trained.over_windows().max() <= 1e-9
    assert trained.over_windows(2500).max() <= 1e-9
    assert next(iter(trained.records)) == 1


@pytest.mark.parametrize("cost", ["even", "first slow", "uneven", "cheap"])
@pytest.mark.parametrize("pace", ["steady", "slow start", "jittery", "ever slower"])
def test_share_is_used(pace: str, cost: str) -> None:
    """Of steps behind the beginning at least 0.45 of it, or every step is recorded: 0.49 seen for uneven records, of which the longer one is expected, else 0.75."""
    trained = Trained(0.02, PACES[pace](3000), COSTS[cost], flush=0.001)
    late = slice(1500, None)
    every_step = np.diff([step for step in trained.records if step > 1500])
    assert trained.spent[late].sum() > 0.45 * 0.02 * trained.step_seconds[late].sum() or (every_step == 1).all()


@settings(max_examples=40, deadline=None, derandomize=True)
@given(
    overhead=st.sampled_from([0.003, 0.01, 0.05, 0.3]),
    pace=st.floats(0.01, 1.0),
    slower=st.lists(st.tuples(st.integers(0, 2999), st.integers(1, 400), st.floats(1.0, 300.0)), max_size=6),
    record=st.floats(0.05, 4.0),
    costs=st.lists(st.floats(0.1, 3.0), min_size=1, max_size=12),
    log=st.sampled_from([0.0, 1e-4, 1e-3]),
    flush=st.sampled_from([0.0, 0.3, 1.0]),
)
def test_share_of_time_is_kept_whatever_comes(
    overhead: float, pace: float, slower: list[tuple[int, int, float]], record: float, costs: list[float], log: float, flush: float
) -> None:
    """Steps of at least `pace`, some of them slower (compiling, evaluating, a busy machine); records of 0.005 to 12 steps; scalars and commits.

    Where 1,000 steps do not pay for a record and its commits, the run keeps the share.
    """
    seconds = np.full(3000, pace)
    for first, count, factor in slower:
        seconds[first : first + count] *= factor
    trained = Trained(
        overhead, seconds, lambda i: record * pace * costs[i % len(costs)], log=log * pace, flush=flush * pace
    )  # fmt: skip
    largest = record * max(costs) * pace + 2 * (flush or record * max(costs)) * pace
    # Where scalars and commits alone take more than the share, there is nothing to be governed.
    earned = overhead * pace - log * pace - flush * pace / FLUSH_SECONDS * pace
    assume(earned > 0)
    if largest <= earned * (WINDOW - GRAIN):
        assert trained.over_windows().max() <= 1e-9 * pace
    assert trained.over_windows(3000).max() <= 1e-9 * pace


def test_steps_that_become_faster_are_paid_for_afterwards() -> None:
    """What cannot be foreseen: windows over the change are beyond the share by what was bought at the old pace, and no others."""
    seconds = np.where(np.arange(6000) < 2000, 1.0, 0.05)
    trained = Trained(0.01, seconds, lambda i: 0.1)
    over = trained.over_windows()
    assert over[:1000].max() <= 1e-9
    assert over[2000 + LOOK :].max() <= 1e-9
    at_the_old_pace = np.where(np.arange(6000) < 2000 + LOOK, 1.0, 0.05)
    allowed = np.convolve(0.01 * at_the_old_pace, np.ones(WINDOW), "valid")
    spent = np.convolve(trained.spent, np.ones(WINDOW), "valid")
    assert (spent - allowed)[1:].max() <= 0.01 * spent.max()
    assert trained.records.keys() & set(range(5001, 6001))


def test_time_saved_up_in_a_pause_is_not_spent_at_once() -> None:
    seconds = np.full(3000, 0.1)
    seconds[1500] = 3600.0
    trained = Trained(0.01, seconds, lambda i: 0.1)
    assert np.diff(list(trained.records)).min() >= 100  # ten records of 0.1 s are 1 % of 1,000 steps


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
    assert 0.035 < recorder.overhead_seconds / now[0] <= 0.05
    # At 5 %, 2 ms are paid for by four steps, but for the commits; in whole steps that is five.
    assert set(np.diff(steps[10:])) == {5}


def test_patience_ends_before_the_next_record() -> None:
    assert [Cadence(every, 0.01).patience for every in (1, 2, 5, 1000, None)] == [0, 1, 4, PATIENCE, PATIENCE]
