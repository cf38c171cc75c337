"""What else a training could be watched with, and what it costs: the table that the README quotes.

    OMP_NUM_THREADS=1 python benchmarks/alternatives.py
    python benchmarks/alternatives.py --size 25m                      # a Llama of 25 M parameters
    python benchmarks/alternatives.py --size 100m --device cuda       # wall time there, the device's work included

Each tool watches a training of its own, all from one seed and in one process: every 10th step is recorded. Blocks of 10 steps, in each of
which one is recorded, alternate with blocks of a training that nothing watches, in random order within rounds. Told are medians over the
rounds: of the block's CPU time beyond that of the unwatched block, in steps of the latter ("one record costs"), and as a share of its
training. Starting and closing a tool is off the clock; bytes are all that lies in its folder after closing, over the records.

Graph breaks are those that `torch._dynamo.explain` counts in the model's forward pass with the tool in place, beyond those without it.
What is recorded differs, and so does what can be learnt from it; the table says what that is. A tool that is not installed is left out by
name: `pip install tensorboard wandb weightwatcher torch-module-monitor`.
"""

import argparse
import gc
import importlib
import io
import json
import logging
import os
import platform
import tempfile
import time
import warnings
from collections.abc import Callable
from contextlib import redirect_stdout
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import numpy as np
import torch
from machine import machine
from torch import Tensor

from optiscope.examples.byte_llama import SHORT, ByteLlama, Config, batches, language_reference, optimizers_of
from optiscope.hooks import attach

EVERY = 10
SIZES = {
    "short": SHORT,  # to see whether all of it runs
    "demo": Config(),
    "25m": Config(d=512, layers=8, heads=8, kv_heads=4, inner=1408, sequence=128, batch=8),
    "100m": Config(d=768, layers=16, heads=12, kv_heads=4, inner=2048, sequence=512, batch=16),
}


class Training:
    """The training loop of `examples/byte_llama.py`; `before(step)` is called ahead of the forward pass, `ready(step)` with gradients, `after(step)` after the optimizers' step."""

    def __init__(self, config: Config, device: str) -> None:
        torch.manual_seed(config.seed)
        self.config, self.device, self.steps = config, device, 0
        self.generator = torch.Generator().manual_seed(config.seed)
        self.text, _ = language_reference()
        self.model = ByteLlama(config).to(device)
        self.optimizers = optimizers_of(self.model)
        self.before = self.ready = self.after = lambda step: None

    def batch(self) -> list[Tensor]:
        return [t.to(self.device) for t in batches(self.text, self.config, self.generator)]

    def run(self, steps: int) -> None:
        for _ in range(steps):
            self.steps += 1
            self.before(self.steps)
            self.model(*self.batch()).backward()
            self.ready(self.steps)
            for optimizer in self.optimizers:
                optimizer.step()
            self.after(self.steps)
            for optimizer in self.optimizers:
                optimizer.zero_grad()


def due(step: int) -> bool:
    """Whether a step is recorded: in the middle of a block, so that threads that spin after it spin in the block that caused it."""
    return step % EVERY == EVERY // 2


# A tool starts watching a training, writes into a folder, and gives what ends it.
Close = Callable[[], Any]


def optiscope(training: Training, folder: Path, background: bool = False) -> Close:
    recorder = attach(training.optimizers, training.model, folder / "run.zarr", every=EVERY, first_step=EVERY // 2, background=background)
    return recorder.close


def optiscope_background(training: Training, folder: Path) -> Close:
    return optiscope(training, folder, background=True)


def svdvals(training: Training, folder: Path) -> Close:
    number = 0

    def ready(step: int) -> None:
        nonlocal number
        if due(step):
            found = {n: torch.linalg.svdvals(p.grad).cpu().numpy() for n, p in training.model.named_parameters() if p.ndim == 2}
            np.savez(folder / f"{number}.npz", **found)
            number += 1

    training.ready = ready
    return lambda: None


def tensorboard(training: Training, folder: Path) -> Close:
    from torch.utils.tensorboard import SummaryWriter

    writer = SummaryWriter(str(folder))

    def ready(step: int) -> None:
        if due(step):
            for name, parameter in training.model.named_parameters():
                writer.add_histogram(name, parameter, step)
                writer.add_histogram(f"{name}.grad", parameter.grad, step)

    training.ready = ready
    return writer.close


def wandb(training: Training, folder: Path) -> Close:
    import wandb as library

    settings = library.Settings(silent=True, console="off", x_disable_stats=True, x_disable_machine_info=True)
    run = library.init(mode="offline", dir=str(folder), project="alternatives", settings=settings)
    run.watch(training.model, log="all", log_freq=EVERY)

    def after(step: int) -> None:
        if step % EVERY == 0:
            run.log({"step": step})

    training.after = after
    return run.finish


def weightwatcher(training: Training, folder: Path) -> Close:
    import weightwatcher as library

    logging.getLogger("weightwatcher").setLevel(logging.ERROR)
    watcher = library.WeightWatcher(model=training.model)

    def after(step: int) -> None:
        if due(step):
            with redirect_stdout(io.StringIO()):
                watcher.analyze().to_csv(folder / f"{step}.csv")

    training.after = after
    return lambda: None


def torch_module_monitor(training: Training, folder: Path) -> Close:
    from torch_module_monitor import ModuleMonitor

    logging.getLogger("ModuleMonitor").setLevel(logging.WARNING)
    monitor = ModuleMonitor(monitor_step_fn=due)
    monitor.set_module(training.model)
    for add in (monitor.add_activation_metric, monitor.add_parameter_metric, monitor.add_gradient_metric):
        add("mean", lambda x: x.mean())
        add("rms", lambda x: x.square().mean().sqrt())
    lines = (folder / "metrics.jsonl").open("w")

    def ready(step: int) -> None:
        monitor.monitor_parameters()
        monitor.monitor_gradients()

    def after(step: int) -> None:
        monitor.end_step()
        if due(step):
            lines.write(json.dumps({name: float(value) for name, value in monitor.get_step_metrics().items()}) + "\n")

    training.before, training.ready, training.after = monitor.begin_step, ready, after
    return lines.close


# Name in the table: what starts it, the package it needs, what it records.
TOOLS: dict[str, tuple[Callable[[Training, Path], Close], str, str]] = {
    "optiscope": (optiscope, "optiscope", "spectra, residuals, update sizes, second moments"),
    "optiscope, background": (optiscope_background, "optiscope", "the same"),
    "torch.linalg.svdvals": (svdvals, "torch", "singular values of gradients"),
    "TensorBoard histograms": (tensorboard, "tensorboard", "histograms of weights and gradients"),
    "wandb.watch, offline": (wandb, "wandb", "histograms of weights and gradients"),
    "WeightWatcher": (weightwatcher, "weightwatcher", "spectral fits of weights"),
    "torch-module-monitor": (torch_module_monitor, "torch-module-monitor", "mean and RMS of activations, weights, gradients"),
}


def clock(device: str) -> float:
    """CPU time of this process; on an accelerator wall time, its work done."""
    if device == "cpu":
        return time.process_time()
    torch.accelerator.synchronize()
    return time.perf_counter()


def graph_breaks(training: Training) -> int:
    torch._dynamo.reset()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        found = torch._dynamo.explain(training.model)(*training.batch())
    return int(found.graph_break_count)


def size(folder: Path) -> int:
    return sum(file.stat().st_size for file in folder.rglob("*") if file.is_file() and not file.is_symlink())


def measured(name: str, config: Config, device: str, rounds: int, folder: Path) -> str:
    """One row of the table."""
    start, package, what = TOOLS[name]
    plain, watched = Training(config, device), Training(config, device)
    close = start(watched, folder)
    for training in (plain, watched):
        training.run(EVERY)  # the first steps are slower than the pace
    order, seconds = np.random.default_rng(0), np.zeros((rounds, 2))
    for row in seconds:
        for kind in order.permutation(2):
            begun = clock(device)
            (plain, watched)[kind].run(EVERY)
            row[kind] = clock(device) - begun
    breaks = graph_breaks(watched) - graph_breaks(plain)
    records = watched.steps // EVERY
    close()
    step = np.median(seconds[:, 0]) / EVERY
    extra = (seconds[:, 1] - seconds[:, 0]) / step
    low, median, high = np.quantile(np.median(np.random.default_rng(1).choice(extra, (4000, rounds)), axis=1), [0.025, 0.5, 0.975])
    return (
        f"{name + ' ' + version(package):<32}{median:8.2f} [{low:6.2f}, {high:6.2f}]{median * step * 1e3:10.1f}{median / EVERY:10.1%}"
        f"{size(folder) / records / 1e3:11.1f}{breaks:8}   {what}"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", choices=SIZES, default="demo")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--only", nargs="+", choices=TOOLS, default=list(TOOLS), metavar="TOOL")
    options = parser.parse_args()
    os.environ.setdefault("WANDB_MODE", "offline")
    if options.device == "cpu":
        torch.set_num_threads(1)
    config = SIZES[options.size]
    parameters = sum(p.numel() for p in Training(config, "cpu").model.parameters())
    where = platform.processor() if options.device == "cpu" else torch.cuda.get_device_name()
    print(
        f"{machine()}\n{options.device} ({where}), {parameters / 1e6:.1f} M parameters, every {EVERY}th step recorded, {options.rounds} rounds; load {os.getloadavg()[0]:.1f}"
    )
    unit = "CPU" if options.device == "cpu" else "wall"
    print(f"\n{'':<32}{'one record costs, steps':>25}{unit + ' ms':>10}{'share':>10}{'kB/record':>11}{'breaks':>8}   what it records")
    for name in options.only:
        try:
            importlib.import_module(
                {"torch-module-monitor": "torch_module_monitor", "optiscope": "optiscope.hooks"}.get(TOOLS[name][1], TOOLS[name][1])
            )
            version(TOOLS[name][1])
        except (ImportError, PackageNotFoundError):
            print(f"{name:<32} not installed", flush=True)
            continue
        # wandb may still write when its folder goes.
        with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as folder:
            print(measured(name, config, options.device, options.rounds, Path(folder)), flush=True)
        gc.collect()


if __name__ == "__main__":
    main()
