"""What reading a large run takes: `diag analyze`, `report`, `check`, `schedule` and `info` of the runs that `large_store.py` makes.

    python benchmarks/analyse_large_run.py                                  # 2,000 records of 200 matrices
    python benchmarks/analyse_large_run.py --records 10000 --layers 80      # of 564 matrices: 3 minutes and 3 GB to write
    python benchmarks/analyse_large_run.py --run large.zarr --profile       # each study's time and memory, in this process, one after the other

A command is run as a user would, in a process of its own with the threads that the libraries choose, after one run that is thrown away
(the first after an installation compiles). Wall time, CPU time of all processes, and peak memory: the proportional set size (PSS) of the
process and its children, summed, sampled every 100 ms, in which pages that processes share count once.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path


def measured(command: list[str]) -> str:
    """Wall time, CPU time and peak memory of a command, and how it ended."""
    environment = {name: value for name, value in os.environ.items() if not name.endswith("_NUM_THREADS")}
    before, wall = os.times(), time.perf_counter()
    process = subprocess.Popen(command, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE)
    peak = 0.0
    while process.poll() is None:
        peak = max(peak, sum(proportional_set(pid) for pid in family(process.pid)))
        time.sleep(0.1)
    wall, after = time.perf_counter() - wall, os.times()
    cpu = after.children_user + after.children_system - before.children_user - before.children_system
    errors = process.stderr.read().decode() if process.stderr else ""
    return f"{wall:7.1f} s {cpu:7.1f} s {peak:8.0f} MB   exit code {process.returncode}{': ' + errors[-300:] if errors else ''}"


def family(pid: int) -> Iterator[int]:
    """A process and all that descend from it."""
    yield pid
    try:
        children = [int(child) for task in Path(f"/proc/{pid}/task").iterdir() for child in (task / "children").read_text().split()]
    except OSError:
        return  # it has ended
    for child in children:
        yield from family(child)


def proportional_set(pid: int) -> float:
    """PSS of a process in MB (10⁶ bytes); 0 once it has ended."""
    try:
        lines = Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines()
    except OSError:
        return 0.0
    return next((int(line.split()[1]) * 1024 / 1e6 for line in lines if line.startswith("Pss:")), 0.0)


def profile(run: Path, folder: Path) -> None:
    """Time of each study in this process (its dataset, its picture, its tables), and the memory that is in use after it and was at most."""
    began = time.perf_counter()
    from optiscope.analysis import STUDIES, open_run
    from optiscope.analysis.evenly_sampled import evenly_sampled
    from optiscope.analysis.report.folder import analyse_study, finish_report

    tree = open_run(run)
    studied = evenly_sampled(tree)
    print(f"{'imports':<24}{time.perf_counter() - began:6.2f} s wall")
    said = {}
    for name in [*STUDIES, "findings"]:
        Path("/proc/self/clear_refs").write_text("5")  # the peak starts anew
        wall, cpu = time.perf_counter(), time.process_time()
        if name == "findings":
            finish_report(tree, folder, said)
        else:
            said[name] = analyse_study(studied, name, folder, required=False)
        skipped = "   " + said[name]["summary"][:60] if said.get(name, {}).get("skipped") else ""
        status = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
        memory, peak = (int(status[key].split()[0]) / 1e3 for key in ("VmRSS", "VmHWM"))
        print(
            f"{name:<24}{time.perf_counter() - wall:6.2f} s wall {time.process_time() - cpu:6.2f} s CPU{memory:8.0f} MB, at most{peak:6.0f} MB{skipped}",
            flush=True,
        )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--records", type=int, default=2000)
    parser.add_argument("--layers", type=int, default=28)
    parser.add_argument("--run", type=Path, help="where to keep the run, or find the one that an earlier call kept")
    parser.add_argument("--profile", action="store_true", help="time each study in this process")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as temporary:
        run = options.run or Path(temporary) / "large.zarr"
        if not run.exists():
            writer = str(Path(__file__).with_name("large_store.py"))
            subprocess.run([sys.executable, writer, str(run), f"--records={options.records}", f"--layers={options.layers}"], check=True)
        if options.profile:
            return profile(run, Path(temporary) / "profiled")
        from machine import machine  # imports torch, which a profile is not to hold

        size = sum(file.stat().st_size for file in run.rglob("*") if file.is_file()) / 1e6
        records, matrices = json.loads((run / "update" / "lr" / "zarr.json").read_text())["shape"]
        print(machine())
        print(f"{records} records of {matrices} matrices, {size:.0f} MB on disk; load {os.getloadavg()[0]:.1f} before the first command")
        print(f"{'command':<10}{'wall':>9} {'CPU':>9} {'peak':>11}")
        diag = str(Path(sys.executable).with_name("diag"))
        measured([diag, "info", str(run)])  # compiles, and reads the files into the system's cache
        for command in (
            ["analyze", "-o", str(Path(temporary) / "analysis")],
            ["report", "-o", str(Path(temporary) / "report.html")],
            ["check"],
            ["schedule", "-o", str(Path(temporary) / "schedule.json")],
            ["info"],
        ):
            for _ in range(2):
                print(f"{command[0]:<10}{measured([diag, command[0], str(run), *command[1:]])}; load {os.getloadavg()[0]:.1f}", flush=True)


if __name__ == "__main__":
    main()
