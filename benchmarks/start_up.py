"""How long commands take before they do anything: `diag --help`, and `diag info` of a small run; plain Python and importing NumPy beside them.

    python benchmarks/start_up.py

Each is run as a user would, in a process of its own, in turn with the others, after one run that is thrown away (the first after an
installation compiles). Median and least of wall time, and of CPU time of the process, in seconds; an editable installation adds 0.02.
"""

import argparse
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from large_store import write_run
from machine import machine


def measured(command: list[str]) -> tuple[float, float]:
    """Wall and CPU time."""
    before, wall = os.times(), time.perf_counter()
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
    after = os.times()
    return time.perf_counter() - wall, after.children_user + after.children_system - before.children_user - before.children_system


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--times", type=int, default=15)
    times = parser.parse_args().times
    diag = str(Path(sys.executable).with_name("diag"))
    with tempfile.TemporaryDirectory() as folder:
        run = Path(folder) / "run.zarr"
        write_run(run, records=100, layers=4)
        commands = {
            "python -c pass": [sys.executable, "-c", "pass"],
            "import numpy": [sys.executable, "-c", "import numpy"],
            "import xarray": [sys.executable, "-c", "import xarray"],
            "diag --help": [diag, "--help"],
            "diag info": [diag, "info", str(run)],
        }
        for command in commands.values():
            measured(command)
        taken: dict[str, list[tuple[float, float]]] = {name: [] for name in commands}
        for _ in range(times):
            for name, command in commands.items():
                taken[name].append(measured(command))
    print(machine())
    print(f"{times} times each; load {os.getloadavg()[0]:.1f}")
    print(f"{'':<16}{'wall':>8}{'least':>8}{'CPU':>8}{'least':>8}")
    for name, pairs in taken.items():
        wall, cpu = zip(*pairs, strict=True)
        print(f"{name:<16}{statistics.median(wall):8.2f}{min(wall):8.2f}{statistics.median(cpu):8.2f}{min(cpu):8.2f}")


if __name__ == "__main__":
    main()
