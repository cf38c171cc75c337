"""What a run costs that was restarted from a checkpoint very often: the root's document and a commit, by how many lineages were left.

    OMP_NUM_THREADS=1 python benchmarks/many_forks.py

Three groups of 48 arrays of 4 matrices. Each training goes on for 12 records, of which the next one, restarted, leaves the last 4. A commit is a
flush of one record; CPU time is `time.process_time`, of 20 commits the median.
"""

import argparse
import tempfile
import time
from pathlib import Path

import numpy as np

from optiscope.analysis import open_run
from optiscope.diagnostics.store.forking import fork
from optiscope.diagnostics.store.writer import Writer

MATRICES, ARRAYS, NEW, LEFT = 4, 48, 12, 4


def begin(path: Path) -> Writer:
    writer = Writer(path, {"optimizers": []})
    names = np.array([f"m{i}" for i in range(MATRICES)], dtype=np.dtypes.StringDType())
    for group in ("geometry", "update", "second_moment"):
        writer.create_group(group, {"name": names}, {})
        for i in range(ARRAYS):
            writer.create_array(group, f"a{i}", (MATRICES,), ("matrix",), "float32", {"long_name": "one of many quantities", "units": "1"})
    return writer


def record(writer: Writer, value: float) -> None:
    step = writer.last_step + 1
    for group in ("geometry", "update", "second_moment"):
        writer.append(group, step, {f"a{i}": np.full(MATRICES, value, np.float32) for i in range(ARRAYS)})


def commits(writer: Writer, value: float) -> float:
    """Milliseconds of CPU."""
    times = []
    for _ in range(20):
        record(writer, value)
        begun = time.process_time()
        writer.flush()
        times.append(time.process_time() - begun)
    return float(np.median(times)) * 1e3


def read(path: Path, lineage: int | None) -> str:
    begun = time.process_time()
    try:
        steps = open_run(path, lineage)["update"].sizes["step"]
    except ValueError as error:
        return str(error)[-60:]
    return f"{steps} records, {time.process_time() - begun:.2f} s"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--forks", type=int, default=300)
    parser.add_argument("--every", type=int, default=50, help="a row after so many forks")
    given = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "run.zarr"
        writer = begin(path)
        print(f"{'forks':>5} {'root, kB':>9} {'a commit, ms of CPU':>20} {'a fork, ms':>11}   newest, and lineage 0, as opened")
        for number in range(given.forks + 1):
            forking = 0.0
            if number:
                begun = time.process_time()
                fork(writer, writer.last_step - LEFT)
                forking = time.process_time() - begun
            for _ in range(NEW):
                record(writer, number)
            writer.flush()
            if number % given.every == 0:
                took = commits(writer, number)
                size = (path / "zarr.json").stat().st_size / 1e3
                print(
                    f"{number:>5} {size:9.1f} {took:20.1f} {forking * 1e3:11.0f}   {read(path, None)}; {read(path, 0 if number else None)}",
                    flush=True,
                )


if __name__ == "__main__":
    main()
