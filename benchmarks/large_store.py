"""A large run without its training: 10,000 records of 560 matrices at 64 quantiles, as an 80-layer model of 7 operators leaves it.

    python benchmarks/large_store.py large.zarr
    python benchmarks/large_store.py small.zarr --records 2000 --layers 28

It is written by the recorder's own writer into its own layout, whole chunks at a time, and closed, which compacts it: the default groups (geometry, update,
second_moment) of layers of 7 matrices that are orthogonalised by Jordan's 5 steps and keep a second moment of every coordinate besides
(AdaMuon), of 4 tables under AdamW, and the scalars. Its numbers are made. All of them drift: first-order autoregressive noise around a
level per matrix and a trend over the training. Spectra are log-linear with scatter, the residuals are those of the spectra, ranks are 256
to 1,024. What these optimizers have not (a trust ratio, Kronecker factors, …) is missing, as it would be.
"""

import argparse
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch
from machine import machine
from numpy.typing import NDArray
from torch import nn

from optiscope.diagnostics.catalogue import LEVELS, NS_STEPS, ROUNDED
from optiscope.diagnostics.newton_schulz.families import JORDAN
from optiscope.diagnostics.newton_schulz.spectral_map import ns_map
from optiscope.diagnostics.operators import classify, layer_index
from optiscope.diagnostics.spectra.spectrum_sketch import POINTS, rounded, sketch_indices, sketch_levels
from optiscope.diagnostics.store.writer import CHUNK_STEPS, Writer
from optiscope.hooks.observing.matrix import Matrix
from optiscope.hooks.recording.layout import Layout
from optiscope.hooks.recording.provenance import describe_software

GROUPS = ("geometry", "update", "second_moment")
SHAPES = {
    "self_attn.q_proj": (1024, 1024), "self_attn.k_proj": (256, 1024), "self_attn.v_proj": (256, 1024), "self_attn.o_proj": (1024, 1024),
    "mlp.gate_proj": (2816, 1024), "mlp.up_proj": (2816, 1024), "mlp.down_proj": (1024, 2816),
}  # fmt: skip
TABLES = {"model.embed_tokens.weight": (32768, 1024), "model.embed_positions.weight": (2048, 1024), "lm_head.weight": (32768, 1024),
          "model.output_layer.weight": (4096, 1024)}  # fmt: skip
EVERY = 10  # optimizer steps between records
LR, DECAY = 0.02, 0.1

Floats = NDArray[np.floating]


def model(layers: int) -> list[Matrix]:
    """The run's matrices; their one parameter stands for all, as nothing is read from it."""
    parameter = nn.Parameter(torch.zeros(1, 1))
    shapes = {f"model.layers.{i}.{name}.weight": shape for i in range(layers) for name, shape in SHAPES.items()} | TABLES
    return [
        Matrix(parameter, "AdamW" if name in TABLES else "AdaMuon", name, classify(name), layer_index(name), *shape, name not in TABLES)
        for name, shape in shapes.items()
    ]


class Drift:
    """Standard normal numbers that go on from one block of records to the next, by name."""

    def __init__(self) -> None:
        self._generator = np.random.default_rng(0)
        self._last: dict[str, Floats] = {}

    def level(self, name: str, *shape: int) -> Floats:
        """The same numbers at every call."""
        if name not in self._last:
            self._last[name] = self._generator.standard_normal(shape, np.float32)
        return self._last[name]

    def along(self, records: int, name: str, *shape: int, memory: float = 0.95) -> Floats:
        """First-order autoregressive noise, shape (records, …)."""
        last, found = self.level(name, *shape), self._generator.standard_normal((records, *shape), np.float32)
        found *= np.float32((1 - memory**2) ** 0.5)
        for noise in found:
            noise += np.float32(memory) * last
            last = noise
        self._last[name] = last.copy()
        return found


def geometry(matrices: list[Matrix], progress: Floats, drift: Drift) -> dict[str, NDArray]:
    """The group's quantities, shape (records, matrices, …)."""
    ranks, cells = [min(m.rows, m.cols) for m in matrices], (len(progress), len(matrices))
    levels, counts = (
        np.stack(rows).astype(np.float32)
        for rows in zip(*((sketch_levels(r), np.diff(sketch_indices(r), append=r)) for r in ranks), strict=True)
    )
    decades = 2 + 0.5 * drift.level("decades", len(matrices)) + 0.2 * drift.along(*cells[:1], "conditioning", *cells[1:])
    decades += 0.5 * progress[:, None]
    x = 0.03 * drift.level("shape", len(matrices), POINTS) + 0.01 * drift.along(len(progress), "scatter", len(matrices), POINTS)
    x = np.sort(10 ** (x - np.maximum(decades, 0.3)[..., None] * (1 - levels)), axis=-1)
    x /= np.sqrt((counts * x**2).sum(-1, keepdims=True))
    weights, o = counts / counts.sum(-1, keepdims=True), x
    residuals, polar = [], []
    for _ in range(NS_STEPS + 1):
        residuals.append(np.sqrt((weights * (1 - o**2) ** 2).sum(-1)))
        polar.append(np.sqrt((weights * (1 - o) ** 2).sum(-1)))
        o = ns_map(o, (JORDAN,)).astype(np.float32)
    floor = np.array([0.425 * 2**-8 * (m.rows**-0.5 + m.cols**-0.5) for m in matrices])[:, None]

    def around(middle: float, between: float, within: float, name: str) -> Floats:
        return middle + between * drift.level(f"{name} level", len(matrices)) + within * drift.along(len(progress), name, len(matrices))

    return {
        "sigma_quantile": x, "condition_number": x[..., -1] / x[..., 0], "stable_rank": 1 / x[..., -1] ** 2,
        "ns_residual": np.stack(residuals, -1), "ns_residual_polar": np.stack(polar, -1), "recoverable_share": (weights * (x >= floor)).sum(-1),
        "fro_norm": np.exp(around(-progress[:, None], 0.5, 0.1, "norm")), "condition_is_floor": np.zeros(cells, bool), "below_floor": np.zeros(cells),
        "ns_schedule": np.zeros(cells, np.int16), "ns_residual_achieved": residuals[5] + np.abs(around(0, 0.005, 0.003, "achieved")),
        "alignment": np.clip(around(0.85, 0.03, 0.01, "alignment"), 0, 1), "row_dispersion": np.abs(around(0.25, 0.08, 0.02, "rows")),
        "column_dispersion": np.abs(around(0.25, 0.08, 0.02, "columns")),
    }  # fmt: skip


def update(matrices: list[Matrix], progress: Floats, drift: Drift) -> dict[str, NDArray]:
    """The group's quantities, shape (records, matrices)."""
    cells = (len(progress), len(matrices))

    def size(middle: float, name: str) -> Floats:
        return middle * np.exp(0.3 * drift.level(f"{name} level", len(matrices)) + 0.05 * drift.along(len(progress), name, len(matrices)))

    numbers = np.array([m.rows * m.cols for m in matrices]) ** 0.5
    lr = np.broadcast_to(LR * np.minimum(1, np.minimum(progress / 0.05, 2.01 - 2 * progress))[:, None], cells)
    per_lr, weight = 0.2 * (1 + 0.03 * drift.along(*cells[:1], "size", *cells[1:])), size(0.02, "weight") * (1 + progress[:, None])
    rms = per_lr * lr
    return {
        "update_rms": rms, "update_norm": rms * numbers, "update_rms_per_lr": per_lr, "update_to_weight": rms / weight,
        "update_rms_target": np.broadcast_to(np.where([m.geometry for m in matrices], 0.2, np.nan), cells),
        "update_noise": size(1e-5, "noise"), "weight_rms": weight, "grad_rms": size(1e-3, "gradient"), "momentum_rms": size(3e-4, "momentum"),
        "lr": lr, "weight_decay": np.full(cells, DECAY), "changed_outside": np.zeros(cells, np.int16),
    }  # fmt: skip


def second_moment(matrices: list[Matrix], progress: Floats, drift: Drift) -> dict[str, NDArray]:
    """The group's quantities, shape (records, matrices, …): v log-normal of spread τ within blocks, kept of every coordinate."""
    cells = (len(progress), len(matrices))

    def along(name: str) -> Floats:
        return drift.along(len(progress), name, len(matrices))

    tau = np.abs(1.2 + 0.2 * drift.level("τ level", len(matrices)) + 0.05 * along("τ"))
    middle = 1e-6 * np.exp(drift.level("v level", len(matrices)) + 0.1 * along("v") - 2 * progress[:, None])
    normal = np.quantile(np.random.default_rng(1).standard_normal(100_000), LEVELS).astype(np.float32)
    query = np.array([m.operator in ("attn_q", "attn_k") for m in matrices])
    return {
        "second_moment_mean": middle, "second_moment_form": np.zeros(cells, np.int16),
        "second_moment_quantile": middle[..., None] * np.exp(tau[..., None] * normal), "second_moment_eps": np.full(cells, 1e-8),
        "eps_share": np.exp(-8 + 0.2 * along("ε")), "near_eps_share": np.exp(-5 + 0.2 * along("near ε")),
        "snr_quantile": 0.2 * np.exp(0.8 * normal + 0.1 * along("noise")[..., None]), "rank1_information": 0.06 * tau, "rank1_log_error": 0.2 * tau,
        "rank1_log_error_max": tau, "block_partition": np.broadcast_to(np.where(query, 0, 1), cells), "block_dispersion": tau,
        "block_variance_ratio": 0.05 * tau, "block_cv2": np.exp(tau**2) - 1, "block_step_ratio": np.exp(0.375 * tau**2),
        "block_cosine": np.exp(-(tau[..., None] ** 2) / 8) * np.array([1, 0.9, 0.9, 1], np.float32), "decay_spread": np.zeros(cells),
    }  # fmt: skip


def blocks(records: int) -> Iterator[NDArray[np.int64]]:
    """The steps of the records, as many at a time as a chunk holds."""
    for start in range(0, records, CHUNK_STEPS):
        yield EVERY * np.arange(start + 1, min(start + CHUNK_STEPS, records) + 1)


def write_run(path: Path, records: int, layers: int) -> None:
    """The run at `path`."""
    matrices, drift = model(layers), Drift()
    orthogonalised = [m for m in matrices if m.geometry]
    hidden = {"lr": LR, "betas": [0.95, 0.95], "momentum": 0.95, "eps": 1e-8, "weight_decay": DECAY, "ns_steps": 5}
    tables = {"lr": LR, "betas": [0.9, 0.95], "eps": 1e-8, "weight_decay": DECAY}
    optimizers = [
        {"label": label, "class": label, "wrapped_by": [], "read_by": ["table"], "spectrum_of": ["momentum"], "groups": [settings]}
        for label, settings in (("AdaMuon", hidden), ("AdamW", tables))
    ]
    writer = Writer(path, {**describe_software(), "optimizers": optimizers})
    Layout(writer, GROUPS).include(matrices)
    writer.attributes["geometry"]["ns_schedules"] = [{"coefficients": [list(JORDAN)] * 5, "eps": 1e-7, "scaling": "frobenius"}]
    for name in ("loss", "elapsed_seconds", "overhead_seconds", "overhead_cpu_seconds"):
        writer.create_array("scalars", name, (), (), "float64", {"long_name": name, "units": "1", "definition": name})
    for steps in blocks(records):
        progress = (steps / (EVERY * records)).astype(np.float32)
        made = {
            "geometry": geometry(orthogonalised, progress, drift),
            "update": update(matrices, progress, drift),
            "second_moment": second_moment(matrices, progress, drift),
            "scalars": {
                "loss": 2.5 + 8 * np.exp(-10 * progress) + 0.05 * drift.along(len(steps), "loss", memory=0.8),
                "elapsed_seconds": 0.3 * steps, "overhead_seconds": 0.002 * steps, "overhead_cpu_seconds": 0.003 * steps,
            },
        }  # fmt: skip
        for t, step in enumerate(steps):
            for group, quantities in made.items():
                writer.append(group, int(step), {n: rounded(v[t]) if n in ROUNDED else v[t] for n, v in quantities.items()})
        writer.flush()
    writer.lay_out_for_reading()
    writer.close()


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", type=Path, help="where to write it")
    parser.add_argument("--records", type=int, default=10_000)
    parser.add_argument("--layers", type=int, default=80)
    options = parser.parse_args()
    print(machine())
    wall, cpu = time.perf_counter(), time.process_time()
    write_run(options.run, options.records, options.layers)
    files = [file.stat().st_size for file in options.run.rglob("*") if file.is_file()]
    print(
        f"{options.records} records of {7 * options.layers + len(TABLES)} matrices: {sum(files) / 1e6:.0f} MB in {len(files)} files, "
        f"written in {time.perf_counter() - wall:.0f} s, {time.process_time() - cpu:.0f} s of CPU"
    )
