"""What each group of quantities adds to a record: CPU time and bytes on disk, on the demo model (30 matrices).

    OMP_NUM_THREADS=1 python benchmarks/group_costs.py

The recorder's own CPU clock over 8 recorded steps from step 20 on. Groups on request are measured beside the default ones, and what
they add is the difference, the median over three repetitions in turn. Bytes are those of whole chunks of 64 records.
"""

import tempfile
from pathlib import Path

import numpy as np
from machine import machine
from recorder_overhead import Training, chunk_sizes

from optiscope.diagnostics.catalogue import DEFAULT_GROUPS, ON_REQUEST
from optiscope.hooks import attach

RECORDS, REPETITIONS = 8, 3


def milliseconds(training: Training, measure: tuple[str, ...]) -> float:
    """CPU time of one record."""
    with tempfile.TemporaryDirectory() as folder:
        recorder = attach(training.optimizers, training.model, Path(folder) / "run.zarr", every=1, measure=measure)
        training.run(2, recorder)
        begun = recorder.overhead_cpu_seconds
        training.run(RECORDS, recorder)
        spent = recorder.overhead_cpu_seconds - begun
        recorder.close()
    return 1e3 * spent / RECORDS


def kilobytes(training: Training, groups: tuple[str, ...]) -> dict[str, float]:
    """Compressed bytes of one record by group, from a whole chunk of 64."""
    with tempfile.TemporaryDirectory() as folder:
        store = Path(folder) / "run.zarr"
        recorder = attach(training.optimizers, training.model, store, every=1, measure=groups)
        training.run(64, recorder)
        recorder.close()
        return {group: sum(chunk_sizes(store / group)) / 1e3 / 64 for group in groups}


def main() -> None:
    print(machine())
    training = Training()
    training.run(20)
    sets = {"default": DEFAULT_GROUPS, **{group: (*DEFAULT_GROUPS, group) for group in ON_REQUEST}}
    cost = np.array([[milliseconds(training, measure) for measure in sets.values()] for _ in range(REPETITIONS)])
    extra = np.median(cost - cost[:, :1], axis=0)
    default = float(np.median(cost[:, 0]))
    size = kilobytes(training, (*DEFAULT_GROUPS, *ON_REQUEST))
    print(f"{', '.join(DEFAULT_GROUPS)}: {default:.0f} ms, {sum(size[g] for g in DEFAULT_GROUPS):.1f} kB a record")
    for group, more in zip(ON_REQUEST, extra[1:], strict=True):
        print(f"{group:18s} +{more:5.1f} ms ({more / default:+.0%})  +{size[group]:.1f} kB")


if __name__ == "__main__":
    main()
