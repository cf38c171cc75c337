"""Readers of a run that is being written: `python tests/analysis/live_reading.py --reads 100000` is the long form of test_live_readers.py.

A process records runs in which every value is a function of its step, and commits after every few records; this one opens and reads all of it, over
and over, through `open_run` and through plain xarray, and checks that each read is a whole commit: equal steps in both groups, none missing, every value right.
"""

import argparse
import json
import subprocess
import sys
import tempfile
import time
import warnings
from itertools import count
from pathlib import Path

import numpy as np
import xarray as xr

from optiscope.analysis import open_run

MATRICES, RECORDS = 3, 1300  # a run is longer than a chunk of scalars


def write(folder):
    """Record one run after the other until killed."""
    from optiscope.diagnostics.store.writer import Writer

    names = np.array([f"layers.{i}.weight" for i in range(MATRICES)], np.dtypes.StringDType())
    for number in count():
        writer = Writer(folder / f"{number}.zarr", {"optimizers": []})
        sizes = np.full(MATRICES, 4)
        writer.create_group("geometry", {"name": names, "operator": names, "rows": sizes, "cols": sizes}, {})
        writer.create_group("scalars", {}, {})
        for name in ("a", "b"):
            writer.create_array("geometry", name, (MATRICES,), ("matrix",), "float64", {})
        writer.create_array("scalars", "loss", (), (), "float64", {})
        for step in range(1, RECORDS + 1):
            writer.append("geometry", step, {"a": np.full(MATRICES, step), "b": np.full(MATRICES, 2 * step)})
            writer.append("scalars", step, {"loss": step / 2})
            if step % (1 + step % 5) == 0:
                writer.flush()
        writer.flush()
        writer.lay_out_for_reading()  # files go to another place while they are read
        writer.close()
        (folder / f"{number}.done").touch()


def check(tree):
    """How many records a read shows; all of them whole."""
    geometry, scalars = (tree[name].to_dataset().load() for name in ("geometry", "scalars"))
    steps = geometry["step"].values
    np.testing.assert_array_equal(steps, np.arange(1, len(steps) + 1))
    np.testing.assert_array_equal(scalars["step"].values, steps)
    np.testing.assert_array_equal(geometry["a"].values, np.repeat(steps[:, None], MATRICES, axis=1))
    np.testing.assert_array_equal(geometry["b"].values, 2 * geometry["a"].values)
    np.testing.assert_array_equal(scalars["loss"].values, steps / 2)
    return len(steps)


def opened_again(path):
    """:func:`check` of a run that is being laid out anew, each array by a commit of its own."""
    while True:
        try:
            return check(open_run(path))
        except ValueError as error:
            if "open it again" not in str(error):
                raise


def read(reads, plain_every):
    """Read so often, every so many times through plain xarray; how many reads of each kind there were, of how many states of the run."""
    done = {"open_run": 0, "xarray": 0, "states": 0, "opened again": 0, "xarray, laid out anew meanwhile": 0, "runs": 1}
    with tempfile.TemporaryDirectory() as folder:
        writer = subprocess.Popen([sys.executable, __file__, "--write", folder])
        number, seen = 0, -1
        try:
            while done["open_run"] + done["xarray"] < reads:
                path, finished = Path(folder) / f"{number}.zarr", (Path(folder) / f"{number}.done").exists()
                plain = (done["open_run"] + done["xarray"]) % plain_every == 0
                try:
                    tree = xr.open_datatree(path, engine="zarr", consolidated=True) if plain else open_run(path)
                    if not {"geometry", "scalars"} <= set(tree.children) or "loss" not in tree["scalars"]:
                        continue  # not yet committed
                    records = check(tree)
                except AssertionError as error:
                    # Zarr takes a chunk that is not there for missing values, so that a reader of its own cannot tell when a run that it has
                    # opened before was laid out anew, once, at its end; `open_run` does.
                    gaps = any(np.isnan(tree["geometry"][name].values).any() for name in ("a", "b"))
                    if not plain or not gaps or opened_again(path) < RECORDS:
                        raise AssertionError(f"{'xarray' if plain else 'open_run'}: {error}") from error
                    done["xarray, laid out anew meanwhile"] += 1
                    continue
                except (FileNotFoundError, ValueError) as error:
                    if seen >= 0 and "open it again" not in str(error):
                        raise
                    done["opened again"] += seen >= 0
                    assert writer.poll() is None
                    time.sleep(0.01)
                    continue
                assert records >= seen
                done["states"] += records > seen
                seen = records
                done["xarray" if plain else "open_run"] += 1
                if (done["open_run"] + done["xarray"]) % 1000 == 0:
                    print(json.dumps(done), file=sys.stderr, flush=True)
                if finished:
                    assert records == RECORDS
                    number, seen, done["runs"] = number + 1, -1, done["runs"] + 1
        finally:
            writer.kill()
            writer.wait()
    return done


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("--reads", type=int, default=100_000)
    parser.add_argument("--plain-every", type=int, default=10, help="every so many reads are plain xarray's")
    parser.add_argument("--write", type=Path)
    given = parser.parse_args()
    if given.write:
        write(given.write)
    warnings.simplefilter("error")
    print(json.dumps(read(given.reads, given.plain_every)))
