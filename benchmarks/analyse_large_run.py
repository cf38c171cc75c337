"""What reading a large run takes: `diag analyze`, `diag report` and `diag check` of 2,000 records of 200 matrices.

    python benchmarks/analyse_large_run.py
    python benchmarks/analyse_large_run.py --profile     # each study's wall time and CPU time, in this process, one after the other

The run is written by the recorder's own writer, into its own layout: the default groups (geometry, update, second_moment) of 28 layers
of 7 matrices that are orthogonalised by Jordan's 5 steps and keep a second moment of every coordinate besides (AdaMuon), and of 4 tables
under AdamW, with the loss logged at each record. Its numbers are made: first-order autoregressive noise around a level per matrix,
log-linear spectra with scatter, ranks of 256 to 1,024, residuals from these spectra.

A command is run as a user would, in a process of its own with the threads that the libraries choose, after one run that is thrown away
(the first after an installation compiles). Wall time, CPU time of all processes, and peak memory: the proportional set size (PSS) of the
process and its children, summed, sampled every 200 ms, in which pages that processes share count once.
"""

import argparse
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch
from machine import machine
from numpy.typing import NDArray
from torch import nn

from optiscope.diagnostics.catalogue import LEVELS, in_group
from optiscope.diagnostics.newton_schulz import ns_map
from optiscope.diagnostics.ns_families import JORDAN
from optiscope.diagnostics.operators import classify, layer_index
from optiscope.diagnostics.spectrum_sketch import sketch_indices
from optiscope.hooks.layout import Layout
from optiscope.hooks.matrices import Matrix
from optiscope.hooks.provenance import describe_software
from optiscope.hooks.writer import Writer

GROUPS = ("geometry", "update", "second_moment")
SHAPES = {
    "self_attn.q_proj": (1024, 1024), "self_attn.k_proj": (256, 1024), "self_attn.v_proj": (256, 1024), "self_attn.o_proj": (1024, 1024),
    "mlp.gate_proj": (2816, 1024), "mlp.up_proj": (2816, 1024), "mlp.down_proj": (1024, 2816),
}  # fmt: skip
TABLES = {"model.embed_tokens.weight": (32768, 1024), "model.embed_positions.weight": (2048, 1024), "lm_head.weight": (32768, 1024),
          "model.output_layer.weight": (4096, 1024)}  # fmt: skip
EVERY = 10  # optimizer steps between records
LR, DECAY = 0.02, 0.1

Floats = NDArray[np.float64]


def model(layers: int) -> list[Matrix]:
    """The run's matrices; their one parameter stands for all, as nothing is read from it."""
    parameter = nn.Parameter(torch.zeros(1, 1))
    shapes = {f"model.layers.{i}.{name}.weight": shape for i in range(layers) for name, shape in SHAPES.items()} | TABLES
    return [
        Matrix(parameter, "AdamW" if name in TABLES else "AdaMuon", name, classify(name), layer_index(name), *shape, name not in TABLES)
        for name, shape in shapes.items()
    ]


def noise(shape: tuple[int, ...], generator: np.random.Generator, memory: float = 0.95) -> Floats:
    """First-order autoregressive noise along the first axis, of variance 1."""
    found = generator.standard_normal(shape)
    for t in range(1, len(found)):
        found[t] = memory * found[t - 1] + (1 - memory**2) ** 0.5 * found[t]
    return found


def spectra(records: int, rank: int, generator: np.random.Generator) -> tuple[Floats, NDArray[np.int64]]:
    """Stored singular values of one matrix, shape (records, 64), and how many of the spectrum each stands for."""
    at = sketch_indices(rank)
    decades = generator.uniform(1, 3) + 0.2 * noise((records, 1), generator)
    logs = (
        -decades * (1 - at / (rank - 1)) + np.sort(0.03 * generator.standard_normal(len(at))) + 0.01 * noise((records, len(at)), generator)
    )
    counts = np.diff(at, append=rank)
    x = np.sort(10**logs, axis=1)
    return x / np.sqrt((counts * x**2).sum(axis=1, keepdims=True)), counts


def geometry(matrices: list[Matrix], records: int, generator: np.random.Generator) -> dict[str, NDArray[np.float32]]:
    """The group's quantities, shape (records, matrices, …)."""
    found = {q.name: np.full((records, len(matrices), *((64,) if q.extra == "quantile" else (11,) if q.extra else ())), np.nan, np.float32)
             for q in in_group("geometry")}  # fmt: skip
    for j, matrix in enumerate(matrices):
        x, counts = spectra(records, min(matrix.rows, matrix.cols), generator)
        found["sigma_quantile"][:, j] = x
        found["condition_number"][:, j] = x[:, -1] / x[:, 0]
        found["stable_rank"][:, j] = 1 / x[:, -1] ** 2
        for k in range(11):
            o = ns_map(x, (JORDAN,) * k)
            found["ns_residual"][:, j, k] = np.sqrt((counts * (1 - o**2) ** 2).sum(axis=1) / counts.sum())
            found["ns_residual_polar"][:, j, k] = np.sqrt((counts * (1 - o) ** 2).sum(axis=1) / counts.sum())
        floor = 0.425 * 2**-8 * (matrix.rows**-0.5 + matrix.cols**-0.5)
        found["recoverable_share"][:, j] = (counts * (x >= floor)).sum(axis=1) / counts.sum()
    level = lambda low, high, spread: generator.uniform(low, high, len(matrices)) + spread * noise((records, len(matrices)), generator)  # noqa: E731
    return found | {
        "fro_norm": np.exp(level(-1, 1, 0.1)), "condition_is_floor": np.zeros((records, len(matrices)), bool), "below_floor": np.zeros((records, len(matrices))),
        "ns_schedule": np.zeros((records, len(matrices)), np.int16), "ns_residual_achieved": found["ns_residual"][..., 5] + level(0, 0.01, 0.003),
        "alignment": level(0.8, 0.9, 0.01), "row_dispersion": level(0.1, 0.4, 0.02), "column_dispersion": level(0.1, 0.4, 0.02),
    }  # fmt: skip


def update(matrices: list[Matrix], records: int, generator: np.random.Generator) -> dict[str, Floats]:
    """The group's quantities, shape (records, matrices)."""

    def level(middle: float, spread: float = 0.05) -> Floats:
        return middle * np.exp(0.3 * generator.standard_normal(len(matrices)) + spread * noise((records, len(matrices)), generator))

    numbers = np.array([m.rows * m.cols for m in matrices]) ** 0.5
    orthogonalised = np.array([m.geometry for m in matrices])
    lr = LR * np.minimum(1, np.minimum(np.arange(1, records + 1) / (0.05 * records), np.linspace(2, 0.01, records)))[:, None] + 0 * numbers
    size, weight = 0.2 * (1 + 0.03 * noise((records, len(matrices)), generator)), level(0.02)
    rms = size * lr
    return {
        "update_rms": rms, "update_norm": rms * numbers, "update_rms_per_lr": size, "update_rms_target": np.where(orthogonalised, 0.2, np.nan) + 0 * lr,
        "update_noise": level(1e-5), "weight_rms": weight, "grad_rms": level(1e-3), "momentum_rms": level(3e-4), "update_to_weight": rms / weight,
        "lr": lr, "weight_decay": np.full_like(lr, DECAY), "changed_outside": np.zeros_like(lr),
    }  # fmt: skip


def second_moment(matrices: list[Matrix], records: int, generator: np.random.Generator) -> dict[str, Floats]:
    """The group's quantities, shape (records, matrices, …): v log-normal of spread τ within blocks, kept of every coordinate."""
    cells = (records, len(matrices))
    tau = 1.2 + 0.2 * generator.standard_normal(len(matrices)) + 0.05 * noise(cells, generator)
    middle = 1e-6 * np.exp(generator.standard_normal(len(matrices)) + 0.1 * noise(cells, generator))
    normal = np.quantile(generator.standard_normal(100_000), LEVELS)
    query = np.array([m.operator in ("attn_q", "attn_k") for m in matrices])
    return {
        "second_moment_mean": middle, "second_moment_form": np.zeros(cells), "second_moment_quantile": middle[..., None] * np.exp(tau[..., None] * normal),
        "second_moment_eps": np.full(cells, 1e-8), "eps_share": np.exp(-8 + 0.2 * noise(cells, generator)), "near_eps_share": np.exp(-5 + 0.2 * noise(cells, generator)),
        "snr_quantile": 0.2 * np.exp(0.8 * normal) * np.exp(0.1 * noise((*cells, 1), generator)), "rank1_information": 0.06 * tau,
        "rank1_log_error": 0.2 * tau, "rank1_log_error_max": tau, "block_partition": np.where(query, 0, 1) + np.zeros(cells), "block_dispersion": tau,
        "block_variance_ratio": 0.05 * tau, "block_cv2": np.exp(tau**2) - 1, "block_step_ratio": np.exp(0.375 * tau**2),
        "block_cosine": np.exp(-(tau[..., None] ** 2) / 8) * np.array([1, 0.9, 0.9, 1]), "decay_spread": np.zeros(cells),
    }  # fmt: skip


def write_run(path: Path, records: int, layers: int) -> None:
    """The run at `path`."""
    matrices, generator = model(layers), np.random.default_rng(0)
    hidden = {"lr": LR, "betas": [0.95, 0.95], "momentum": 0.95, "eps": 1e-8, "weight_decay": DECAY, "ns_steps": 5}
    tables = {"lr": LR, "betas": [0.9, 0.95], "eps": 1e-8, "weight_decay": DECAY}
    optimizers = [
        {"label": label, "class": label, "wrapped_by": [], "read_by": ["table"], "spectrum_of": ["momentum"], "groups": [settings]}
        for label, settings in (("AdaMuon", hidden), ("AdamW", tables))
    ]
    writer = Writer(path, {**describe_software(), "optimizers": optimizers})
    layout = Layout(writer, GROUPS)
    layout.include(matrices)
    writer.attributes["geometry"]["ns_schedules"] = [{"coefficients": [list(JORDAN)] * 5, "eps": 1e-7, "scaling": "frobenius"}]
    made = {
        "geometry": geometry([m for m in matrices if m.geometry], records, generator),
        "update": update(matrices, records, generator),
        "second_moment": second_moment(matrices, records, generator),
    }
    steps = np.arange(1, records + 1) * EVERY
    loss = 2.5 + 8 * np.exp(-steps / (0.1 * steps[-1])) + 0.05 * noise((records,), generator, 0.8)
    scalars = {"loss": loss, "elapsed_seconds": 0.3 * steps, "overhead_seconds": 0.005 * steps, "overhead_cpu_seconds": 0.008 * steps}
    for name in scalars:
        writer.create_array("scalars", name, (), (), "float64", {"long_name": name, "units": "1", "definition": name})
    for t, step in enumerate(steps):
        full = [
            writer.append(group, int(step), {name: values[t] for name, values in quantities.items()}) for group, quantities in made.items()
        ]
        writer.append("scalars", int(step), {name: values[t] for name, values in scalars.items()})
        if any(full):
            writer.flush()
    writer.flush()


def measured(command: list[str]) -> str:
    """Wall time, CPU time and peak memory of a command, and how it ended."""
    environment = {name: value for name, value in os.environ.items() if not name.endswith("_NUM_THREADS")}
    before, wall = os.times(), time.perf_counter()
    process = subprocess.Popen(command, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE)
    peak = 0.0
    while process.poll() is None:
        peak = max(peak, sum(proportional_set(pid) for pid in family(process.pid)))
        time.sleep(0.2)
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
    """Time of each study in this process: its dataset, its picture, its tables."""
    began = time.perf_counter()
    from optiscope.analysis import STUDIES, open_run
    from optiscope.analysis.report_folder import analyse_study, finish_report

    tree = open_run(run)
    print(f"{'imports':<24}{time.perf_counter() - began:6.2f} s wall")
    said = {}
    for name in [*STUDIES, "findings"]:
        wall, cpu = time.perf_counter(), time.process_time()
        if name == "findings":
            finish_report(tree, folder, said)
        else:
            said[name] = analyse_study(tree, name, folder, required=False)
        skipped = "   " + said[name]["summary"][:60] if said.get(name, {}).get("skipped") else ""
        print(f"{name:<24}{time.perf_counter() - wall:6.2f} s wall {time.process_time() - cpu:6.2f} s CPU{skipped}", flush=True)


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
            write_run(run, options.records, options.layers)
        if options.profile:
            return profile(run, Path(temporary) / "profiled")
        size = sum(file.stat().st_size for file in run.rglob("*") if file.is_file()) / 1e6
        print(machine())
        print(
            f"{options.records} records of {7 * options.layers + len(TABLES)} matrices, {size:.0f} MB on disk; load {os.getloadavg()[0]:.1f} before the first command"
        )
        print(f"{'command':<10}{'wall':>9} {'CPU':>9} {'peak':>11}")
        diag = str(Path(sys.executable).with_name("diag"))
        measured([diag, "info", str(run)])  # compiles, and reads the files into the system's cache
        for command in (
            ["analyze", "-o", str(Path(temporary) / "analysis")],
            ["report", "-o", str(Path(temporary) / "report.html")],
            ["check"],
        ):
            for _ in range(2):
                print(f"{command[0]:<10}{measured([diag, command[0], str(run), *command[1:]])}; load {os.getloadavg()[0]:.1f}", flush=True)


if __name__ == "__main__":
    main()
