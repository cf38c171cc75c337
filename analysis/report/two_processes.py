"""The studies of a large run in two processes side by side, in little more than half the time of one."""

import multiprocessing
import os
import signal
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from pathlib import Path
from typing import Any

import xarray as xr

from .. import THEMES
from ..evenly_sampled import evenly_sampled
from ..run import open_run
from .folder import analyse_study, found_in

# Matrices times records from which on a second process, whose imports and reading take 2 s, pays.
LARGE = 100_000
FINDINGS = "findings"

# What a process does with a run: a study's name, or `FINDINGS`, and what comes of it.
Done = tuple[str, Any]


def pays(run: xr.DataTree) -> bool:
    """Whether the run is large, and there are two processors for it."""
    processors = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    sizes = [run[group].sizes.get("step", 0) * run[group].sizes.get("matrix", 0) for group in run.children]
    return processors > 1 and max(sizes, default=0) >= LARGE


def analysed(run: xr.DataTree, path: Path, folder: Path, names: Sequence[str]) -> Iterator[Done]:
    """`report_folder.analyse_study` of each name, and `FINDINGS`, in whatever order they are done; what is written is that of one process.

    This process takes the studies of geometry, and the second one, which opens the run at `path` anew, all others, so that neither reads
    everything; the first to be done goes on with what the other has not begun. The second is begun afresh, not forked: the libraries
    have threads by now. What raises there raises here, with its traceback; should that process be killed, this one makes what is missing.
    """
    here = [name for name in names if name in THEMES["geometry"]]
    there = [name for name in names if name not in here]
    studied = evenly_sampled(run)

    def make(task: str) -> Any:
        return found_in(run) if task == FINDINGS else analyse_study(studied, task, folder, required=False)

    with ProcessPoolExecutor(1, multiprocessing.get_context("spawn"), _open, (path, run.attrs.get("lineage"))) as second:
        try:
            given = {name: second.submit(_analyse, name, folder) for name in there}
            for task in (FINDINGS, *here):  # the findings, which take most memory for themselves, before anything is kept
                yield task, make(task)
            for task in reversed(there):
                if given[task].cancel():
                    yield task, make(task)
            for task in there:
                if not given[task].cancelled():
                    try:
                        yield task, given[task].result()
                    except BrokenProcessPool:
                        yield task, make(task)
        finally:
            second.shutdown(cancel_futures=True)


_studied: xr.DataTree  # of the second process


def _open(path: Path, lineage: int | None) -> None:
    global _studied
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the first process tells this one
    _studied = evenly_sampled(open_run(path, lineage))


def _analyse(task: str, folder: Path) -> Any:
    return analyse_study(_studied, task, folder, required=False)
