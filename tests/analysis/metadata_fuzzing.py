"""Runs whose metadata hold arbitrary JSON at arbitrary places: opened, read, described, checked, verified and repaired within bounds.

`python tests/analysis/metadata_fuzzing.py --run RUN --examples 5000` is the long form of what test_hostile_runs.py does in short.
"""

import argparse
import json
import shutil
import tempfile
import warnings
from collections import Counter
from copy import deepcopy
from pathlib import Path

import numpy as np
from fuzzing import NASTY, bounded_time, limit_memory, reseal, used
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from optiscope.diagnostics.store.repairing import repair
from optiscope.diagnostics.store.verifying import verify

_NAMES = (
    "attributes",
    "shape",
    "step",
    "geometry",
    "name",
    "chunks",
    "damaged",
    "decisions",
    "lineages",
    "scalars",
    "continued",
    "about",
    "ns_schedules",
)
_SCALARS = (
    st.sampled_from([value for value in NASTY if not isinstance(value, (dict, list))]) | st.integers() | st.floats() | st.text(max_size=20)
    | st.integers(10, 4000).map(lambda digits: 10**digits) | st.integers(10, 100_000).map(lambda length: "x" * length)
)  # fmt: skip
_KEYS = st.sampled_from(_NAMES) | st.text(max_size=10)
VALUES = st.recursive(_SCALARS, lambda inner: st.lists(inner, max_size=4) | st.dictionaries(_KEYS, inner, max_size=4), max_leaves=8)


@st.composite
def changed(draw, documents):
    """Some of a run's documents, by file, after one to three of their values were replaced, wrapped, taken out or joined by others; whether the root is sealed again."""
    root, others = documents["zarr.json"], sorted(documents)
    new = {}
    for _ in range(draw(st.integers(1, 3))):
        file = "zarr.json" if draw(st.integers(0, 3)) else draw(st.sampled_from(others))
        node = new.setdefault(file, deepcopy(documents[file]))
        while True:
            key = draw(st.sampled_from(list(node) if isinstance(node, dict) else range(len(node))))
            inside = node[key]
            if not isinstance(inside, (dict, list)) or not inside or not draw(st.integers(0, 5)):
                break
            node = inside
        match draw(st.sampled_from(["replace", "replace", "wrap", "delete", "add", "as elsewhere"])):
            case "replace":
                node[key] = draw(VALUES)
            case "wrap":
                node[key] = draw(st.sampled_from([[node[key]], {"name": node[key]}, [node[key]] * 2]))
            case "delete":
                del node[key]
                if not node and node is new[file]:
                    break
            case "add" if isinstance(node, dict):
                node[draw(_KEYS)] = draw(VALUES)
            case "add":
                node.insert(key, draw(VALUES))
            case _:
                node[key] = deepcopy(draw(st.sampled_from(list(root["attributes"].values()))))
    return new, draw(st.integers(0, 9)) > 0


def files_of(folder):
    return {path.relative_to(folder).as_posix() for path in folder.rglob("*")}


def fuzz(source, examples):
    """Use and repair so many runs; what came of them, counted."""
    documents = {path.relative_to(source).as_posix(): json.loads(path.read_text()) for path in sorted(source.rglob("zarr.json"))}
    outcomes = Counter()
    with tempfile.TemporaryDirectory() as folder:
        outside = Path(folder)
        run = outside / "run.zarr"
        shutil.copytree(source, run)
        whole = files_of(outside)

        @settings(max_examples=examples, derandomize=True, database=None, deadline=None, suppress_health_check=list(HealthCheck))
        @given(changed(documents))
        def attempt(given):
            new, sealed = given
            try:
                for file, document in new.items():
                    if file == "zarr.json" and sealed:
                        reseal(document)
                    (run / file).write_text(json.dumps(document))
                outcome = used(run)
                assert files_of(outside) == whole
                # What numbers make of a check is no matter here: there is no damage in them.
                assert not outcome.startswith(("describe", "check")) or "ValueError" in outcome, outcome
                outcomes["refused" if outcome.startswith("run: ") else "verify" if outcome.startswith("verify") else outcome] += 1
                if outcome not in ("read", "check: ValueError"):
                    repaired(run, outcomes)
                    assert {file for file in files_of(outside) if not file.startswith("run.zarr/")} == {"run.zarr"}
                    shutil.rmtree(run)
                    shutil.copytree(source, run)
            finally:
                for file in new:
                    (run / file).write_text(json.dumps(documents[file]))

        attempt()
    return dict(outcomes)


def repaired(run, outcomes):
    """Repair a run: afterwards it is whole, or a sentence says why not."""
    with bounded_time():
        try:
            repair(run)
            assert not verify(run).damage
            outcomes["whole after repair"] += 1
        except ValueError as error:
            if "\n" in str(error):
                raise AssertionError(f"not one sentence: {error!r}") from error
            outcomes["not repaired"] += 1


def main():
    warnings.simplefilter("ignore", RuntimeWarning)  # of numbers that make no sense
    parser = argparse.ArgumentParser()
    parser.add_argument("--run", type=Path)
    parser.add_argument("--examples", type=int, default=5000)
    given = parser.parse_args()
    used(given.run)
    limit_memory()
    with np.errstate(all="ignore"):
        print(json.dumps(fuzz(given.run, given.examples)))


if __name__ == "__main__":
    main()
