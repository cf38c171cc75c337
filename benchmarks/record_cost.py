"""What one full record costs, by part, over a pass of `torch.linalg.svdvals` over the same matrices: what one would write by hand.

    OMP_NUM_THREADS=1 python benchmarks/record_cost.py
    OMP_NUM_THREADS=1 python benchmarks/record_cost.py --model demo

Two trainings with Muon on the hidden matrices and AdamW on the rest: a Llama of 26 M parameters (width 512, 8 layers) and the demo. Every
step (or every `--apart`th) is recorded in the default groups, and after it stands a pass of svdvals in float32 over the matrices whose spectra the record holds, so
that both alternate. Two passes: over each matrix as it is, and turned tall off the clock, which is quicker for wide ones. The whole is what the
recorder's own clock says of that step in CPU time (`time.process_time`, all threads), writing included; every part is the CPU time within its
functions, less that of the parts that they call; what is left over is the recorder's own. Medians over the recorded steps, ratios within each.
Last, the quantiles of a large second moment against `torch.quantile`, likewise.
"""

import argparse
import functools
import tempfile
import time
from collections import defaultdict
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from machine import machine
from torch import Tensor

from optiscope.diagnostics.catalogue import LEVELS
from optiscope.diagnostics.quantities import moments, observation, problem
from optiscope.diagnostics.quantities.log_bins import log_quantiles
from optiscope.diagnostics.spectra.spectrum import GRAM_CONDITION_LIMIT
from optiscope.examples.byte_llama import ByteLlama, Config, batches, language_reference, optimizers_of
from optiscope.hooks import attach
from optiscope.hooks.observing import optimizer_state, snapshot, watched
from optiscope.hooks.recording import record, under_way

MODELS = {
    "26M": Config(d=512, layers=8, heads=8, kv_heads=8, inner=1408, batch=8),
    "demo": Config(),
}

# Readings → the functions whose time it is, each where it is called from.
PARTS: dict[str, Sequence[tuple[Any, str]]] = {
    "copies before the step": [(watched.Watched, "take_snapshots"), (snapshot.Snapshot, "see_gradient")],
    "changes from outside": [(watched.Watched, "note_weights"), (watched.Watched, "changed_since")],
    "reading the state": [(snapshot.Snapshot, "read"), (record.Readings, "measure")],
    "writing": [(under_way, "write")],
    "update sizes": [(record, "measure_update")],
    "spectrum": [(problem, "spectrum")],
    "residual curves, sketch": [(problem, "residual_curves"), (problem, "sketch")],
    "achieved residual": [(observation, "achieved_residual")],
    "alignment": [(observation, "alignment")],
    "dispersion": [(observation, "row_dispersion")],
    "replayed Newton-Schulz": [(problem.Problem, "replayed")],
    "rest of the geometry": [(record, "measure_geometry")],
    "quantiles": [(moments, "log_quantiles")],
    "rank 1": [(moments, "rank1")],
    "blocks of Adam-mini": [(moments, "within_blocks")],
    "rest of the second moment": [(record, "measure_second_moment"), (optimizer_state.OptimizerState, "of")],
}


class Clock:
    """CPU seconds of every part since the last :meth:`read`."""

    def __init__(self, parts: dict[str, Sequence[tuple[Any, str]]]) -> None:
        self.seconds: defaultdict[str, float] = defaultdict(float)
        self._under_way: list[float] = []  # of the parts within which the present one was called: what they called has taken
        for part, functions in parts.items():
            for owner, name in functions:
                setattr(owner, name, self._timed(part, getattr(owner, name)))

    def _timed(self, part: str, function: Callable[..., Any]) -> Callable[..., Any]:
        @functools.wraps(function)
        def timed(*args: Any, **kwargs: Any) -> Any:
            self._under_way.append(0.0)
            begun = time.process_time()
            try:
                return function(*args, **kwargs)
            finally:
                spent = time.process_time() - begun
                self.seconds[part] += spent - self._under_way.pop()
                if self._under_way:
                    self._under_way[-1] += spent

        return timed

    def read(self) -> dict[str, float]:
        seconds, self.seconds = self.seconds, defaultdict(float)
        return seconds


def cpu_seconds(call: Callable[[], object]) -> float:
    begun = time.process_time()
    call()
    return time.process_time() - begun


def svdvals_pass(matrices: Sequence[Tensor]) -> float:
    return cpu_seconds(lambda: [torch.linalg.svdvals(matrix) for matrix in matrices])


def report(name: str, warm: int, apart: int, repeats: int, clock: Clock, inputs: list[Tensor]) -> None:
    """The table of one training; `inputs` is filled with the matrices of each record as it is made."""
    config = MODELS[name]
    torch.manual_seed(config.seed)
    generator = torch.Generator().manual_seed(config.seed)
    text, _ = language_reference()
    model = ByteLlama(config)
    optimizers = optimizers_of(model)

    def step() -> None:
        model(*batches(text, config, generator)).backward()
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad()

    for _ in range(warm):
        step()
    rows: list[dict[str, float]] = []
    with (
        tempfile.TemporaryDirectory() as folder,
        attach(optimizers, model, Path(folder) / "run.zarr", every=apart, first_step=warm) as recorder,
    ):
        for _ in range(2 + repeats):  # the first two make the arrays and fill the caches
            inputs.clear()
            clock.read()
            before = recorder.overhead_cpu_seconds
            for _ in range(apart):
                step()
            whole = recorder.overhead_cpu_seconds - before
            tall = [m if m.shape[0] >= m.shape[1] else m.T.contiguous() for m in inputs]
            passes = {"svdvals": svdvals_pass(inputs), "svdvals, turned tall": svdvals_pass(tall)}
            parts = clock.read()
            rows.append({**parts, "the recorder's own": whole - sum(parts.values()), "whole": whole, **passes})
    rows = rows[2:]
    parameters = sum(p.numel() for p in model.parameters()) / 1e6
    print(f"\n{name}: {parameters:.1f} M parameters, {len(inputs)} spectra, after {warm} steps, {repeats} records, {apart} step(s) apart")
    print(f"{'':28} {'ms CPU':>9} {'/svdvals':>9} {'/tall':>9}")
    for part in rows[0]:
        values = np.array([[row[part] * 1e3, row[part] / row["svdvals"], row[part] / row["svdvals, turned tall"]] for row in rows])
        print("{:28} {:9.2f} {:9.3f} {:9.3f}".format(part, *np.median(values, axis=0)), flush=True)
    beyond = np.mean([np.linalg.cond(matrix.double().numpy()) > GRAM_CONDITION_LIMIT for matrix in inputs])
    print(f"κ above {GRAM_CONDITION_LIMIT:.0e}, where a float64 SVD is taken: {beyond:.0%} of the spectra of the last record")
    double = svdvals_pass([matrix.double() for matrix in tall])  # what it takes to have κ as right
    print(
        "{:28} {:9.2f}: whole/this {:.3f}".format(
            "svdvals in float64, tall", double * 1e3, np.median([row["whole"] for row in rows]) / double
        )
    )


def kept(inputs: list[Tensor], function: Callable[..., Any]) -> Callable[..., Any]:
    """`function` of an observation, whose NS input is kept."""

    @functools.wraps(function)
    def keeping(seen: observation.Observation) -> Any:
        assert seen.problem is not None
        inputs.append(torch.from_numpy(np.array(seen.problem.matrix, dtype=np.float32)))
        return function(seen)

    return keeping


def quantiles(repeats: int) -> None:
    """The quantiles of 16 M numbers, the most that torch.quantile takes, spread as a second moment is."""
    values = torch.randn(1 << 24, generator=torch.Generator().manual_seed(0)).mul_(3).exp_().mul_(1e-8)
    levels = torch.tensor(LEVELS, dtype=torch.float32)
    array = values.numpy()
    times = np.array([
        [cpu_seconds(lambda: log_quantiles(array, LEVELS)), cpu_seconds(lambda: torch.quantile(values, levels))] for _ in range(repeats)
    ])  # fmt: skip
    ours, theirs = np.median(times, axis=0)
    print(f"\n{len(LEVELS)} quantiles of {len(array) / 1e6:.1f} M numbers: {ours * 1e3:.0f} ms CPU, torch.quantile {theirs * 1e3:.0f} ms, "
          f"ratio {np.median(times[:, 1] / times[:, 0]):.0f}")  # fmt: skip


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", choices=[*MODELS, "all"], default="all")
    parser.add_argument("--warm", type=int, nargs="+", default=[0, 20], help="steps before the recorded ones")
    parser.add_argument("--apart", type=int, default=1, help="steps from record to record; rare ones find caches cold")
    parser.add_argument("--repeats", type=int, default=7, help="records whose median is taken")
    arguments = parser.parse_args()
    print(machine())
    inputs: list[Tensor] = []
    clock = Clock(PARTS)
    record.measure_geometry = kept(inputs, record.measure_geometry)
    for name in MODELS if arguments.model == "all" else [arguments.model]:
        for warm in arguments.warm:
            report(name, warm, arguments.apart, arguments.repeats, clock, inputs)
    quantiles(3)
