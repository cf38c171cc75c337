"""Runs as chance or a stranger might make them, used within bounds of memory and time.

`python tests/analysis/fuzzing.py --rounds 20000` is the long form of what test_hostile_runs.py does in short; `--use FOLDER …` tells of each folder
what comes of using it.
"""

import argparse
import json
import random
import resource
import shutil
import signal
import sys
import tempfile
import time
from collections import Counter
from contextlib import contextmanager
from copy import deepcopy
from pathlib import Path

import google_crc32c
import numpy as np

from optiscope.analysis import check, open_run
from optiscope.analysis.describe import describe
from optiscope.diagnostics.store.format import seal
from optiscope.diagnostics.store.verifying import verify

MEMORY = 1_200_000_000  # bytes beyond what the libraries take
SECONDS = 5  # of processor time


@contextmanager
def bounded_time():
    """What takes longer is killed by an exception that nothing catches."""

    def late(*_):
        raise SystemError("it hangs")

    signal.signal(signal.SIGPROF, late)
    signal.signal(signal.SIGALRM, late)
    signal.setitimer(signal.ITIMER_PROF, SECONDS)
    signal.setitimer(signal.ITIMER_REAL, 20 * SECONDS)  # what waits uses no processor
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_PROF, 0)
        signal.setitimer(signal.ITIMER_REAL, 0)


def used(path):
    """Open a run, read all of it, look for findings, verify it: "read", or the sentence that refuses it.

    What reading raises is a ValueError of one line. A check of numbers that make no sense may fail in other ways, which the command line tells in a
    sentence; never for want of memory or in endless recursion.
    """
    with bounded_time():
        try:
            run = open_run(path)
            for group in (*run.subtree, *(open_run(path, 0).subtree if "lineages" in run.attrs else ())):
                group.to_dataset().load()
            outcome = "read"
        except (ValueError, FileNotFoundError) as error:
            outcome = str(error)
            if "\n" in outcome or not outcome.startswith("run: "):
                raise AssertionError(f"not one sentence about the run: {outcome!r}") from error
        else:
            for use in (describe, check):
                try:
                    use(run)
                except (MemoryError, RecursionError, SystemError):
                    raise
                except Exception as error:
                    outcome = f"{use.__name__}: {type(error).__name__}"
    with bounded_time():
        try:
            damage = verify(path).damage
            if outcome.startswith("run: ") and not damage:
                raise AssertionError(f"refused, and whole by what verifying finds: {outcome}")
            if outcome == "read" and damage:
                outcome = "read, damaged"
        except ValueError as error:
            outcome = outcome if outcome.startswith("run: ") else f"verify: {error}"
    return outcome


NASTY = (
    None, True, -1, 0, 1, 2**31, 2**63, 10**400, 1e308, float("nan"), float("inf"), "", "..", "/", "x" * 300, "\ud800", "\x1b[2J", "NaN",
    "object", [], {}, [[]], [0], [-1], [10**12], {"name": "x"}, [{"name": "zlib"}], [None], {"a": {"b": [1]}},
)  # fmt: skip


def edit(rng, node):
    """Change one thing in a JSON value: something becomes something else, or goes, or is doubled."""
    places = [(node, key) for key in (node if isinstance(node, dict) else range(len(node)))]
    holder, key = rng.choice(places)
    while isinstance(holder[key], (dict, list)) and holder[key] and rng.random() < 0.85:
        holder, key = holder[key], rng.choice(list(holder[key]) if isinstance(holder[key], dict) else range(len(holder[key])))
    action = rng.randrange(4)
    if action == 0:
        del holder[key]
    elif action == 1 and isinstance(holder, dict):
        holder[rng.choice(["..", "x", "geometry", "shape", "a/b", "step", "\\"])] = deepcopy(holder[key])
    elif action == 2 and isinstance(holder, list):
        holder.insert(key, deepcopy(holder[key]))
    else:
        holder[key] = deepcopy(rng.choice(NASTY))


def garble(rng, content):
    """Flip bits, cut, stretch or mix bytes."""
    content = bytearray(content or b"\0")
    action = rng.randrange(5)
    if action <= 1:
        for _ in range(rng.choice([1, 1, 2, 8])):
            content[rng.randrange(min(len(content), rng.choice([16, 64, 10**9])))] ^= 1 << rng.randrange(8)
    elif action == 2:
        del content[rng.randrange(len(content)) :]
    elif action == 3:
        content += rng.randbytes(rng.choice([1, 100, 10_000]))
    else:
        start = rng.randrange(len(content))
        content[start : start + 8] = rng.choice([b"\xff" * 8, bytes(8), rng.randbytes(8)])
    return bytes(content)


def reseal(document):
    """The document's own checksum, as a stranger can make it."""
    attributes = document.get("attributes")
    if isinstance(attributes, dict) and "checksum" in attributes:
        attributes["checksum"] = seal(document)


def mutate(rng, run, first):
    """Change one file of a run, and how to change it back; the root's metadata as JSON only while it is whole."""
    root = run / "zarr.json"
    files = [path for path in sorted(run.rglob("*")) if path.is_file() and ".damaged" not in path.parts and path.name[0] != "."]
    file = root if first and rng.random() < 0.5 else rng.choice(files)
    before = file.read_bytes()
    if file == root and first and rng.random() < 0.8:
        document = json.loads(before)
        for _ in range(rng.choice([1, 1, 3])):
            edit(rng, document)
        reseal(document)
        file.write_text(json.dumps(document))
    elif rng.random() < 0.1:
        file.unlink()
    else:
        content = garble(rng, before)
        if file.name != "zarr.json" and rng.random() < 0.6:
            content = content[:-4] + google_crc32c.value(content[:-4]).to_bytes(4, "little")
        file.write_bytes(content)
    return file, before


def fuzz(source, rounds, seed):
    """Use so many changed copies of a run; what came of them, counted, and the longest time that one took."""
    rng, outcomes, longest = random.Random(seed), Counter(), 0.0
    with tempfile.TemporaryDirectory() as folder, np.errstate(all="ignore"):
        run = Path(folder) / "run.zarr"
        shutil.copytree(source, run)
        for number in range(rounds):
            changes = [mutate(rng, run, first=i == 0) for i in range(rng.choice([1, 1, 1, 4]))]
            begun = time.process_time()
            try:
                outcome = used(run)
            except BaseException:
                kept = Path(tempfile.mkdtemp()) / "run.zarr"
                shutil.copytree(run, kept)
                print(f"round {number} of seed {seed}: kept in {kept}", file=sys.stderr)
                raise
            longest = max(longest, time.process_time() - begun)
            outcomes["refused" if outcome.startswith("run: ") else outcome.split(" ")[0] if outcome.startswith("verify") else outcome] += 1
            for file, before in reversed(changes):
                file.parent.mkdir(parents=True, exist_ok=True)
                file.write_bytes(before)
    return dict(outcomes), longest


def limit_memory():
    """Let this process take no more than it has, and `MEMORY`."""
    pages = int(Path("/proc/self/statm").read_text().split()[0])
    limit = pages * resource.getpagesize() + MEMORY
    resource.setrlimit(resource.RLIMIT_AS, (limit, limit))


def main():
    import warnings

    warnings.simplefilter("ignore", RuntimeWarning)  # of numbers that make no sense
    parser = argparse.ArgumentParser()
    parser.add_argument("--run", type=Path, help="a run to change copies of")
    parser.add_argument("--rounds", type=int, default=20_000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--use", type=Path, nargs="*")
    given = parser.parse_args()
    # What is imported when first used is not what a run makes us take.
    for run in [given.run] if given.run else given.use[:1]:
        used(run)
    limit_memory()
    for path in given.use or ():
        begun = time.process_time()
        outcome = used(path)
        print(json.dumps({"outcome": outcome, "seconds": time.process_time() - begun}), flush=True)
    if given.run:
        outcomes, longest = fuzz(given.run, given.rounds, given.seed)
        print(json.dumps({"outcomes": outcomes, "longest": longest}))


if __name__ == "__main__":
    main()
