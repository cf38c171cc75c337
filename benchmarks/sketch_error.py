"""What 64 stored singular values lose: the residual computed from them against that of the full spectrum.

    python benchmarks/sketch_error.py
    python benchmarks/sketch_error.py --save spectra        # keeps the full spectra
    python benchmarks/sketch_error.py --spectra spectra     # reads them: one OPERATOR.npy of shape (snapshots, rank) each

Trains the demo model and captures the NS input of its 28 Muon matrices before every 10th step. Each spectrum x = σ/‖M‖_F
goes through `sketch`, 12 bits of mantissa as in the store, and `unsketch`; the Gram residual after k steps of a family is computed from
both. Printed is |sketched − full|/full over single snapshots (and the 99th percentile of |sketched − full|), and of the mean
over all snapshots of an operator, which is what schedules are derived from. Spectra of up to 64 values are stored whole, and
only rounded. Under a residual of 1e-12, which is float64's own rounding, errors are relative to 1e-12.
"""

import argparse
import itertools
import tempfile
from pathlib import Path
from typing import Any
from unittest.mock import patch

import numpy as np
from machine import machine
from numpy.typing import NDArray
from torch import Tensor
from torch.optim import _muon

from optiscope.diagnostics import FAMILIES, Coefficients, classify, gram_residual, matched_coefficients, ns_map, repeat_last
from optiscope.diagnostics.spectra import spectrum
from optiscope.diagnostics.spectra.spectrum_sketch import POINTS, rounded, sketch, unsketch
from optiscope.examples.byte_llama import ByteLlama, Config, train

Floats = NDArray[np.float64]
STEPS = range(3, 9)
SMALLEST_RESIDUAL = 1e-12


def trained_spectra(every: int) -> dict[str, Floats]:
    """Normalised spectra of the demo model's NS inputs by operator, each of shape (snapshots, rank), descending."""
    config = Config()
    shapes = [(name, p.shape) for name, p in ByteLlama(config).layers.named_parameters() if p.ndim == 2]
    found: dict[str, list[Floats]] = {}
    iterate, taken = _muon._zeropower_via_newtonschulz, itertools.count()

    def capture(ns_input: Tensor, *settings: Any) -> Tensor:
        step, matrix = divmod(next(taken), len(shapes))
        if (step + 1) % every == 0:
            name, shape = shapes[matrix]
            if ns_input.shape != shape:
                raise RuntimeError(f"expected {name} of shape {tuple(shape)}, got {tuple(ns_input.shape)}")
            found.setdefault(classify(name), []).append(spectrum(ns_input.numpy()).normalised)
        return iterate(ns_input, *settings)

    with tempfile.TemporaryDirectory() as folder, patch.object(_muon, "_zeropower_via_newtonschulz", capture):
        train(Path(folder) / "run.zarr", config, lambda step, loss: None)
    return {operator: np.stack(spectra) for operator, spectra in found.items()}


def coefficients_of(family: str, steps: int) -> Coefficients:
    """The first `steps` steps of a published family, or the schedule designed for as many."""
    return matched_coefficients(steps) if family == "matched" else repeat_last(FAMILIES[family].coefficients, steps)


def relative_error(value: Floats, exact: Floats) -> Floats:
    return np.abs(value - exact) / np.maximum(exact, SMALLEST_RESIDUAL)


def print_errors(spectra: dict[str, Floats]) -> None:
    """One row per family and number of steps, over operators of one kind of rank."""
    stored = {operator: np.stack([rounded(sketch(x)) for x in full]).astype(np.float32) for operator, full in spectra.items()}
    restored = {operator: unsketch(values, spectra[operator].shape[1]) for operator, values in stored.items()}
    print("                             relative error of one snapshot      absolute   relative, of an operator's mean")
    print("family        steps residual   median     95 %     99 %      max      99 %     median      max")
    for family in ("cubic", "jordan", "polar_express", "matched"):
        for steps in STEPS:
            schedule = coefficients_of(family, steps)
            pairs = {o: (gram_residual(ns_map(spectra[o], schedule)), gram_residual(ns_map(restored[o], schedule))) for o in spectra}
            full, sketched = (np.concatenate(side) for side in zip(*pairs.values(), strict=True))
            single = relative_error(sketched, full)
            mean = np.array([relative_error(s.mean(), f.mean()) for f, s in pairs.values()])
            absolute = np.quantile(np.abs(sketched - full), 0.99)
            quantiles = " ".join(f"{value:8.1e}" for value in np.quantile(single, [0.5, 0.95, 0.99, 1]))
            print(f"{family:14}{steps:5} {np.median(full):8.1e} {quantiles}  {absolute:8.1e}   {np.median(mean):8.1e} {mean.max():8.1e}")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--every", type=int, default=10, help="capture every N-th step")
    parser.add_argument("--save", type=Path, help="folder to keep the full spectra in")
    parser.add_argument("--spectra", type=Path, help="folder to read full spectra from, instead of training")
    arguments = parser.parse_args()
    print(machine())
    if arguments.spectra is not None:
        by_operator = {file.stem: np.load(file) for file in sorted(arguments.spectra.glob("*.npy"))}
    else:
        by_operator = trained_spectra(arguments.every)
    if arguments.save is not None:
        arguments.save.mkdir(parents=True, exist_ok=True)
        for name, values in by_operator.items():
            np.save(arguments.save / f"{name}.npy", values)
    for exact in (False, True):
        chosen = {name: values for name, values in by_operator.items() if (values.shape[1] <= POINTS) is exact}
        if chosen:
            ranks = sorted({values.shape[1] for values in chosen.values()})
            print(f"\nrank {', '.join(map(str, ranks))}: {sum(map(len, chosen.values()))} snapshots of {', '.join(chosen)}")
            print_errors(chosen)
