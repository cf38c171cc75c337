"""Runs that go back, of rows that tell their step and their session; also the program that is killed while it makes them go back.

As a program it imports the writer alone, without torch, and forks a worker for every run that it is told of.
"""

import json
import os
import sys
from pathlib import Path
from typing import Any

import numpy as np

from optiscope.diagnostics.store.forking import fork
from optiscope.diagnostics.store.writer import Writer

MATRICES = 3


def begin(path: Path, last: int = 150) -> Writer:
    """A run of steps 1 to `last`, all of session 0, of two groups and scalars, the last row of each not at the end of a chunk."""
    writer = Writer(path, {"optimizers": [], "note": "begun"})
    for group in ("update", "curvature"):
        writer.create_group(
            group, {"name": np.array(["a", "b", "c"], dtype=np.dtypes.StringDType()), "rows": np.arange(MATRICES)}, {"of": group}
        )
        writer.create_array(group, "size", (MATRICES,), ("matrix",), "float64", {"units": "1"})
        writer.create_array(group, "curve", (MATRICES, 5), ("matrix", "ns_step"), "float32", {})
        writer.create_array(group, "choice", (MATRICES,), ("matrix",), "int16", {}, missing=-1)
    writer.create_group("scalars", {}, {})
    writer.create_array("scalars", "loss", (), (), "float64", {})
    record(writer, range(1, last + 1), 0)
    return writer


def record(writer: Writer, steps: Any, session: int) -> None:
    """Records whose values tell their step and session; curvature every 10th step, and a scalar every 7th."""
    for step in steps:
        value = step + 1000 * session
        row = {
            "size": value + np.arange(MATRICES) / 7,
            "curve": np.full((MATRICES, 5), value, "float32"),
            "choice": np.full(MATRICES, value, "int16"),
        }
        full = writer.append("update", step, row)
        if step % 10 == 0:
            writer.append("curvature", step, row)
        if step % 7 == 0:
            writer.append("scalars", step, {"loss": value / 3})
        if full:
            writer.flush()
    writer.flush()


def serve() -> None:
    """Fork a worker for every line `run, after, session` on stdin, which forks the run and records behind that."""
    for line in sys.stdin:
        path, after, session = json.loads(line)
        worker = os.fork()
        if worker == 0:
            status = 1
            try:
                writer = Writer(Path(path), {})
                print(os.getpid(), flush=True)
                fork(writer, after)
                print("forked", flush=True)
                record(writer, range(after + 1, after + 40), session)
                status = 0
            finally:
                os._exit(status)
        _, status = os.waitpid(worker, 0)
        print("ended", os.waitstatus_to_exitcode(status), flush=True)


if __name__ == "__main__":
    serve()
