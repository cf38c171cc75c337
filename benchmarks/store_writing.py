"""What writing a run costs: CPU time, bytes written and kept, files, and how long one matrix's history takes to read.

    OMP_NUM_THREADS=1 python benchmarks/store_writing.py

1. Spectra of 200 matrices at 64 points (an array of 51 kB a record), 1,024 records: whole chunks as a recorder writes them, and with a
   flush of the chunk that is not full every 16 records, as slow trainings have it. Amplification: bytes written over bytes kept.
2. One array of 10,000 records × 560 matrices × 64 points: the history of one matrix before and after compaction, by Zarr.
3. A flush of the demo's run (804 k parameters, 28 Muon matrices), every record a commit.
4. The close of a training of two 32 × 32 matrices after so many records, most of which is compacting many small chunks; and opening it again
   for writing, which lays them out anew.

`--parts 4` does the last alone.

The spectra are power laws whose values wander from record to record, each with a scatter of its own of 1 %, rounded as recorded ones are. CPU time
is `time.process_time`.
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
from recorder_overhead import Training
from torch import nn

import optiscope.hooks.recording.journal
from optiscope.diagnostics.spectra.spectrum_sketch import rounded
from optiscope.diagnostics.store.writer import Writer
from optiscope.hooks import attach

POINTS = 64


class Spectra:
    """Normalised singular values in ascending order, a record at a time, shape (matrices, 64)."""

    def __init__(self, matrices: int) -> None:
        self._rng = np.random.default_rng(0)
        self._power = self._rng.uniform(0.5, 2.5, (matrices, 1))
        self._place = np.log(np.linspace(0.01, 1, POINTS))
        self._scatter = 0.01 * self._rng.standard_normal((97, matrices, POINTS))
        self._count = 0

    def record(self) -> NDArray[np.float32]:
        self._power *= np.exp(0.005 * self._rng.standard_normal(self._power.shape))
        self._count += 1
        logs = self._power * self._place + np.roll(self._scatter[self._count % 97], self._count // 97, axis=1)
        x = np.sort(np.exp(logs), axis=1)
        return rounded(x / np.sqrt((x * x).sum(1, keepdims=True))).astype(np.float32)


def new_run(path: Path, matrices: int) -> Writer:
    writer = Writer(path, {})
    writer.create_group("geometry", {"name": np.array([f"m{i}" for i in range(matrices)], dtype=np.dtypes.StringDType())}, {})
    writer.create_array("geometry", "sigma_quantile", (matrices, POINTS), ("matrix", "quantile"), "float32", {})
    writer.flush()
    return writer


def chunk_files(path: Path) -> list[Path]:
    return [file for file in (path / "geometry" / "sigma_quantile").rglob("*") if file.is_file() and file.name != "zarr.json"]


def steady(records: int, flush_every: int | None) -> str:
    """One row of the first table."""
    spectra = Spectra(200)
    made = [spectra.record() for _ in range(records)]
    with tempfile.TemporaryDirectory() as folder:
        writer = new_run(Path(folder) / "run.zarr", 200)
        before, begun = writer.bytes_written, time.process_time()
        for step, values in enumerate(made, 1):
            if writer.append("geometry", step, {"sigma_quantile": values}) or (flush_every and step % flush_every == 0):
                writer.flush()
        writer.close()
        cpu = (time.process_time() - begun) / records * 1e3
        written = writer.bytes_written - before
        files = chunk_files(writer.path)
        kept = sum(file.stat().st_size for file in writer.path.rglob("*") if file.is_file())
        stored = sum(file.stat().st_size for file in files)
        per_value, files_per_thousand = stored / (records * 200 * POINTS), len(files) / records * 1e3
    return f"{flush_every or 'chunk':>11} {cpu:16.3f} {per_value:12.2f} {written / kept:13.3f} {files_per_thousand:18.1f}"


def history(records: int, matrices: int) -> None:
    spectra = Spectra(matrices)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "run.zarr"
        writer = new_run(path, matrices)
        writing = 0.0
        for step in range(1, records + 1):
            values = spectra.record()
            begun = time.process_time()
            if writer.append("geometry", step, {"sigma_quantile": values}):
                writer.flush()
            writing += time.process_time() - begun
        writer.close()
        print(f"{'':>11} {'files':>6} {'MB':>7} {'history s, wall':>16} {'CPU':>6}   made in s of CPU")
        seen = told(path, "written", writing)
        begun = time.process_time()
        writer.lay_out_for_reading()
        np.testing.assert_array_equal(told(path, "compacted", time.process_time() - begun), seen)
        begun = time.process_time()
        Writer(path, {})
        told(path, "expanded", time.process_time() - begun)


def told(path: Path, name: str, seconds: float) -> NDArray[np.float32]:
    """A row of the second table; of three readings the median."""
    files, times = chunk_files(path), []
    for matrix in (100, 300, 500):
        wall, cpu = time.perf_counter(), time.process_time()
        values = np.asarray(zarr.open_array(path / "geometry" / "sigma_quantile", mode="r")[:, matrix])
        times.append((time.perf_counter() - wall, time.process_time() - cpu))
    wall, cpu = np.median(times, axis=0)
    print(
        f"{name:>11} {len(files):6} {sum(f.stat().st_size for f in files) / 1e6:7.0f} {wall:16.3f} {cpu:6.3f}   {seconds:.1f}", flush=True
    )
    return values


def demo_flush(records: int) -> None:
    training = Training()
    optiscope.hooks.recording.journal.FLUSH_SECONDS = 1e9
    with tempfile.TemporaryDirectory() as folder:
        begun = time.process_time()
        recorder = attach(training.optimizers, training.model, Path(folder) / "run.zarr", every=1)
        attaching, times = time.process_time() - begun, []
        for _ in range(records):
            training.run(1, recorder)
            begun = time.thread_time()
            recorder.flush()
            times.append((time.thread_time() - begun) * 1e3)
        recorder.close()
    low, median, high = np.quantile(times, [0.0, 0.5, 0.9])
    print(
        f"a flush: {median:.1f} ms of CPU, median of {records} ({low:.1f} the least, {high:.1f} nine in ten); attaching: {attaching * 1e3:.0f} ms"
    )


def ended(records: int) -> str:
    """A row of the last table."""
    model = nn.Sequential(nn.Linear(32, 32, bias=False), nn.Linear(32, 32, bias=False))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    for p in model.parameters():
        p.grad = torch.randn_like(p)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "run.zarr"
        recorder = attach(optimizer, model, path, every=1)
        for _ in range(records):
            optimizer.step()
        files = sum(file.is_file() for file in path.rglob("*"))
        wall, cpu = time.perf_counter(), time.process_time()
        recorder.close()
        wall, cpu = time.perf_counter() - wall, time.process_time() - cpu
        kept = [file.stat().st_size for file in path.rglob("*") if file.is_file()]
        begun = time.process_time()
        Writer(path, {})
        again = time.process_time() - begun
    return f"{records:>8} {files:>6} {len(kept):>4} {sum(kept) / 1e6:6.1f}   {cpu:13.2f} {wall:6.2f}   {again:20.2f}"


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--records", type=int, default=10_000, help="of the second part")
    parser.add_argument("--matrices", type=int, default=560, help="of the second part, more than 500")
    parser.add_argument("--parts", type=int, nargs="+", default=[1, 2, 3, 4])
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    print(machine())
    if 1 in arguments.parts:
        print("\n1. An array of 51 kB a record, 1,024 records")
        print("flush every ms CPU/record  bytes/value amplification files/1000 records")
        for flush_every in (None, 16):
            print(steady(1024, flush_every), flush=True)
    if 2 in arguments.parts:
        print(f"\n2. {arguments.records} records × {arguments.matrices} matrices × {POINTS} points")
        history(arguments.records, arguments.matrices)
    if 3 in arguments.parts:
        print("\n3. The demo's run")
        demo_flush(40)
    if 4 in arguments.parts:
        print("\n4. The close of two 32 × 32 matrices")
        print(f"{'records':>8} {'files':>6} {'to':>4} {'MB':>6}   {'close, s CPU':>13} {'wall':>6}   {'opened again, s CPU':>20}")
        for records in (2_500, 5_000, 10_000):
            print(ended(records), flush=True)
