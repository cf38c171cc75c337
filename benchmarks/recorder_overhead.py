"""What recording costs a training, in CPU time: the demo model (804 k parameters, 28 Muon matrices), default settings.

    python benchmarks/recorder_overhead.py
    OMP_NUM_THREADS=1 python benchmarks/recorder_overhead.py

1. Share: the CPU time on the recorder's own clock over that of the training loop, closing the run included in both. Attaching
   happens once per run and stands apart. The clock covers the records, `log` and the flushes; not the count and comparison
   that every other step adds, nor what threads spin after a record (part 2 covers both).
2. Upper bound: blocks of steps without a recorder and with one (a record in the middle of each) in random order within rounds
   of one process. The median over rounds of the ratio of CPU times, its 95 % interval from a bootstrap over rounds, and the
   same for two blocks without a recorder: what this null pair shows is the machine, not the recorder. Attaching and closing
   are off the clock here: a run flushes twice a minute, not at every record.

CPU time is `time.process_time`: all threads, spinning included. Other work on the machine makes threads spin longer.
"""

import argparse
import tempfile
import time
from pathlib import Path

import numpy as np
import torch
import zarr
from machine import machine
from numpy.typing import NDArray

from optiscope.diagnostics.catalogue import DEFAULT_GROUPS
from optiscope.examples.byte_llama import ByteLlama, Config, batches, language_reference, optimizers_of
from optiscope.hooks import Recorder, attach


class Training:
    """The training loop of `examples/byte_llama.py`, a few steps at a time."""

    def __init__(self, config: Config | None = None) -> None:
        self.config = config or Config()
        torch.manual_seed(self.config.seed)
        self.generator = torch.Generator().manual_seed(self.config.seed)
        self.text, _ = language_reference()
        self.model = ByteLlama(self.config)
        self.optimizers = optimizers_of(self.model)

    def run(self, steps: int, recorder: Recorder | None = None) -> None:
        for _ in range(steps):
            loss = self.model(*batches(self.text, self.config, self.generator))
            loss.backward()
            for optimizer in self.optimizers:
                optimizer.step()
                optimizer.zero_grad()
            if recorder is not None:
                recorder.log(loss=loss)


def share(every: int | None, steps: int) -> str:
    """One row of the first table."""
    training = Training()
    training.run(3)  # the first steps of a process are slower than its pace
    with tempfile.TemporaryDirectory() as folder:
        store = Path(folder) / "run.zarr"
        begun = time.process_time()
        recorder = attach(training.optimizers, training.model, store, every=every)
        attached = time.process_time()
        training.run(steps, recorder)
        recording = recorder.overhead_cpu_seconds
        recorder.close()
        total = time.process_time() - attached
        records = zarr.open_array(store / "update" / "step", mode="r").shape[0]
        kilobytes = sum(size for group in DEFAULT_GROUPS for size in chunk_sizes(store / group)) / 1e3
    own = recorder.overhead_cpu_seconds
    each = f"{recording / records * 1e3:9.1f} {kilobytes / records:10.1f}" if records else f"{'-':>9} {'-':>10}"
    closing, attaching = (own - recording) * 1e3, (attached - begun) * 1e3
    return f"{every or '1 %':>9} {records:8} {total:8.1f} {own:11.3f} {own / total:8.2%} {each} {closing:9.0f} {attaching:10.0f}"


def chunk_sizes(group: Path) -> list[int]:
    """Bytes of every chunk of a group's variables along `step`."""
    return [f.stat().st_size for f in group.glob("*/c/**/*") if f.is_file() and has_steps(group / f.relative_to(group).parts[0])]


def has_steps(array: Path) -> bool:
    return "step" in (zarr.open_array(array, mode="r").metadata.dimension_names or ())  # type: ignore[union-attr]


def alternate(rounds: int, block: int) -> NDArray[np.float64]:
    """CPU seconds of the blocks of every round, shape (rounds, 3): without, with, and again without a recorder."""
    training, order, seconds = Training(), np.random.default_rng(0), np.zeros((rounds, 3))
    training.run(block)
    for row in seconds:
        for kind in order.permutation(3):
            with tempfile.TemporaryDirectory() as folder:
                store = Path(folder) / "run.zarr"
                # In the middle of the block, so that threads that spin after the record spin in the block that caused it.
                on = kind == 1
                recorder = attach(training.optimizers, training.model, store, every=block, first_step=block // 2) if on else None
                begun = time.process_time()
                training.run(block, recorder)
                row[kind] = time.process_time() - begun
                if recorder is not None:
                    recorder.close()
    return seconds


def median_interval(ratios: NDArray[np.float64]) -> NDArray[np.float64]:
    """Median and its 95 % bootstrap interval, shape (3,)."""
    draws = np.random.default_rng(1).choice(ratios, (10_000, len(ratios)))
    return np.array([np.median(ratios), *np.quantile(np.median(draws, axis=1), [0.025, 0.975])])


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=300, help="steps per row of the first table")
    parser.add_argument("--rounds", type=int, default=24, help="rounds of three blocks; 0 leaves the second part out")
    parser.add_argument("--block", type=int, default=10, help="steps per block")
    arguments = parser.parse_args()
    print(machine())

    print(f"\n1. CPU time on the recorder's clock over the training loop's, {arguments.steps} steps a row (every = 1 %: every=None)")
    print("    every  records   loop s  recorder s    share ms/record  kB/record  close ms  attach ms")
    for every in (10, 50, 100, None):
        print(share(every, arguments.steps), flush=True)

    if arguments.rounds:
        print(f"\n2. Alternating blocks of {arguments.block} steps, {arguments.rounds} rounds: ratio of CPU times, median [95 % interval]")
        without, recorded, again = alternate(arguments.rounds, arguments.block).T
        pair = median_interval(recorded / ((without + again) / 2))
        print("{:>40}  {:.3f} [{:.3f}, {:.3f}]".format("with one record / without", *pair))
        print("{:>40}  {:.3f} [{:.3f}, {:.3f}]".format("without / without", *median_interval(again / without)))
        print("{:>40}  {:+.2%} [{:+.2%}, {:+.2%}]".format("a record every 50th step thus adds", *(pair - 1) * arguments.block / 50))
