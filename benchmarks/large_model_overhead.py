"""What recording costs a GPT of 25 M parameters, 4,096 tokens a step, on one thread: shares, and how long the training thread stalls in the background.

    OMP_NUM_THREADS=1 OPENBLAS_NUM_THREADS=1 python benchmarks/large_model_overhead.py
    OMP_NUM_THREADS=1 OPENBLAS_NUM_THREADS=1 python benchmarks/large_model_overhead.py --busy   # with every core taken by other processes

A step takes tens of seconds, so no training of hundreds of steps is run: steps without a recorder and steps that are recorded are timed in one process, and
a share is the cost of a record, its part of a commit included, over that of the steps between two records. With every=None the share is the one that was
allowed, 1 %, and what follows from the cost is how many steps lie between records.
"""

import argparse
import multiprocessing
import tempfile
import time
from pathlib import Path

import numpy as np
from machine import machine
from recorder_overhead import Training

from optiscope.examples.byte_llama import Config
from optiscope.hooks import attach

LARGE = Config(d=512, layers=8, heads=8, kv_heads=8, inner=1376, sequence=512, batch=8)
COMMIT_SECONDS = 30.0


def spin() -> None:
    """Take a core."""
    while True:
        pass


def plain_steps(training: Training, steps: int) -> float:
    """Seconds of CPU of a step, the median."""
    seconds = []
    for _ in range(steps):
        begun = time.process_time()
        training.run(1)
        seconds.append(time.process_time() - begun)
    return float(np.median(seconds))


def recorded(training: Training, records: int, background: bool) -> tuple[float, float, float, float]:
    """Medians over records of the CPU seconds of one, the wall seconds that the training thread spent on it, its CPU there; and CPU of a commit."""
    with tempfile.TemporaryDirectory() as folder:
        recorder = attach(training.optimizers, training.model, Path(folder) / "run.zarr", every=1, background=background, on_error="raise")
        rows = []
        for _ in range(records):
            before = np.array([recorder.overhead_cpu_seconds, recorder.overhead_seconds, recorder.background_cpu_seconds])
            training.run(1)
            if recorder.session.journal.worker is not None:
                recorder.session.journal.worker.wait()
            rows.append(np.array([recorder.overhead_cpu_seconds, recorder.overhead_seconds, recorder.background_cpu_seconds]) - before)
        before_commit = recorder.overhead_cpu_seconds
        recorder.flush()
        commit = recorder.overhead_cpu_seconds - before_commit
        recorder.close()
    cpu, stall, behind = np.median(rows[1:], axis=0)  # the first one finds no memory to use again
    return float(cpu), float(stall), float(cpu - behind), commit


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--records", type=int, default=4, help="records in each mode")
    parser.add_argument("--busy", action="store_true", help="let other processes take every core")
    arguments = parser.parse_args()
    others = [multiprocessing.Process(target=spin, daemon=True) for _ in range(multiprocessing.cpu_count() if arguments.busy else 0)]
    print(machine())
    training = Training(LARGE)
    parameters = sum(p.numel() for p in training.model.parameters())
    print(f"{parameters / 1e6:.1f} M parameters, {LARGE.batch * LARGE.sequence} tokens a step; other processes: {len(others)}")
    training.run(1)
    step = plain_steps(training, 3)
    for process in others:
        process.start()
    cost, wall, _, commit = recorded(training, arguments.records, background=False)
    print(f"step {step:.2f} s of CPU; record {cost:.3f} s ({cost / step:.1%} of a step), commit {commit:.3f} s")
    for every in (50, 100):
        share = (cost + commit * min(1, every * step / COMMIT_SECONDS)) / (every * step)
        print(f"  every {every}th step: {share:.3%}")
    print(f"  default (1 %): a record every {int(np.ceil(cost / (0.01 * step - commit * step / COMMIT_SECONDS)))} steps")
    cost, wall, cpu, commit = recorded(training, arguments.records, background=True)
    print(
        f"background: the training thread stalls {wall * 1e3:.1f} ms a record ({cpu * 1e3:.1f} ms of its CPU), {wall / step:.3%} of a step's CPU time,"
    )
    print(f"  0.3 % of a step of {LARGE.batch * LARGE.sequence * wall / step / 0.003:.0f} tokens;")
    print(f"  CPU of both threads {cost:.3f} s a record")
    for process in others:
        process.terminate()
