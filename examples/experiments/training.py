"""One training of an experiment: a small Llama on real text, recorded, and what came out of it kept beside the run."""

import hashlib
import json
import shutil
import sys
import time
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
import xarray as xr
from torch import Tensor, nn
from torch.optim import Optimizer

from optiscope.analysis import open_run
from optiscope.diagnostics.schedules.schedule_file import Schedule
from optiscope.examples.byte_llama import SHORT, ByteLlama, Config, batches, language_reference, validation_loss
from optiscope.hooks import apply_schedule, attach

BURN_IN = 20  # steps in which the momentum forgets its zero start


@dataclass(frozen=True)
class Plan:
    """What all trainings of an experiment share.

    Attributes:
        models: sizes by name of the architecture; the first is the one learning rates are chosen on.
        seeds: of the reported trainings; a seed sets the initial weights and the order of the data.
        tuning_seed: of the trainings that choose the learning rate, not reported.
        observe: steps before a schedule is committed; the window goes from `burn_in` to it.
        early, later: a record every so many steps until then, and after.
        validate: a validation loss every so many steps.
        rest_lr: AdamW's learning rate, of everything but the hidden matrices.
        text: a file to train on; None: the Python language reference.
    """

    models: Mapping[str, Config]
    seeds: tuple[int, ...] = (0, 1, 2, 3, 4)
    tuning_seed: int = 100
    burn_in: int = BURN_IN
    observe: int = 60
    early: int = 5
    later: int = 20
    validate: int = 50
    rest_lr: float = 3e-3
    device: str = "cpu"
    text: Path | None = None

    @property
    def window(self) -> slice:
        """Steps that a schedule is derived from, both ends included."""
        return slice(self.burn_in, self.observe)

    @property
    def first(self) -> str:
        """Name of the architecture that learning rates are chosen on."""
        return next(iter(self.models))

    def of_first(self) -> "Plan":
        """The same on the first architecture alone."""
        return replace(self, models={self.first: self.models[self.first]})


# In the demo's model q and o are the square matrices; in the other one k and v are, as in Qwen3-0.6B: what only follows shape goes with them.
DEMO = Config(batch=8, steps=200)
FULL = Plan({"demo": DEMO, "square-kv": replace(DEMO, heads=8, kv_heads=4, head_width=32)})
_TINY = replace(SHORT, d=32, inner=88, sequence=32, batch=4, steps=24)
QUICK = Plan(
    {"demo": _TINY, "square-kv": replace(_TINY, heads=8, kv_heads=4, head_width=8)},
    seeds=(0, 1), burn_in=8, observe=16, early=4, later=4, validate=24,
)  # fmt: skip
# 101 million parameters, for an accelerator.
LARGE = Config(d=768, layers=16, heads=12, kv_heads=4, inner=2048, sequence=1024, batch=32, steps=3000)
LARGE_PLAN = Plan({"100m": LARGE}, burn_in=100, observe=300, early=25, later=250, validate=500, rest_lr=1e-3, device="cuda")


@dataclass(frozen=True)
class Treatment:
    """What is done to the hidden matrices.

    Attributes:
        optimizer: makes their optimizer from them and a learning rate.
        begin: the schedule in force from the first step; None: the optimizer's own settings.
        commit: the schedule from the window's end on, of the recorded run, the window and the seed; None: no change.
        around: a context for the whole training.
    """

    optimizer: Callable[[list[nn.Parameter], float], Optimizer]
    begin: Callable[[nn.Module], Schedule] | None = None
    commit: Callable[[xr.DataTree, slice, int], Schedule] | None = None
    around: Callable[[], AbstractContextManager[None]] = field(default=nullcontext)


def hidden_matrices(model: ByteLlama) -> dict[str, nn.Parameter]:
    """The matrices of the layers, by name."""
    return {f"layers.{name}": p for name, p in model.layers.named_parameters() if p.ndim == 2}


def texts(path: Path | None) -> tuple[Tensor, Tensor]:
    """Training and validation bytes, the last 5 % of the text."""
    if path is None:
        return language_reference()
    data = torch.frombuffer(bytearray(path.read_bytes()), dtype=torch.uint8).long()
    split = int(0.95 * len(data))
    return data[:split], data[split:]


def once(folder: Path, name: str, plan: Plan, model: str, treatment: Treatment, lr: float, seed: int) -> dict[str, Any]:
    """The training `name` of a plan, from `folder` where it has been done before.

    Its run is kept in `folder/name.zarr`, its losses in `folder/name.json`.

    Returns:
        `loss` (per step, nats per byte), `validation` ([step, loss], …), `committed` (steps per operator, None without a commit), `flops` of
        the orthogonalisation of one step at the end (None without a schedule), `seconds`, and the settings.

    Raises:
        ValueError: a training of other settings lies there.
    """
    config = replace(plan.models[model], seed=seed)
    settings = {
        "model": model,
        "lr": lr,
        "config": asdict(config),
        "observe": plan.observe,
        "burn_in": plan.burn_in,
        "rest_lr": plan.rest_lr,
    }
    kept = folder / f"{name}.json"
    if kept.exists():
        found: dict[str, Any] = json.loads(kept.read_text(encoding="utf-8"))
        if {key: found.get(key) for key in settings} != settings:
            raise ValueError(f"output: {kept} is of a training with other settings; choose another folder")
        return found
    folder.mkdir(parents=True, exist_ok=True)
    store = folder / f"{name}.zarr"
    shutil.rmtree(store, ignore_errors=True)  # of a training that was interrupted
    start = time.perf_counter()
    with treatment.around():
        found = settings | _train(store, plan, config, treatment, lr)
    found["seconds"] = time.perf_counter() - start
    part = kept.with_suffix(".part")
    part.write_text(json.dumps(found), encoding="utf-8")
    part.replace(kept)
    print(f"{name}: validation loss {found['validation'][-1][1]:.4f}, {found['seconds']:.0f} s", file=sys.stderr, flush=True)
    return found


def _train(store: Path, plan: Plan, config: Config, treatment: Treatment, lr: float) -> dict[str, Any]:
    torch.manual_seed(config.seed)
    generator = torch.Generator().manual_seed(config.seed)
    training, validation = texts(plan.text)
    model = ByteLlama(config).to(plan.device)
    hidden = hidden_matrices(model)
    matrices = treatment.optimizer(list(hidden.values()), lr)
    rest = torch.optim.AdamW([p for p in model.parameters() if not any(p is h for h in hidden.values())], lr=plan.rest_lr, weight_decay=0.0)
    schedule = None if treatment.begin is None else treatment.begin(model)
    if schedule is not None:
        apply_schedule(matrices, schedule, model)
    about = {
        "data": f"{plan.text or 'Python language reference'} {hashlib.sha256(bytes(training.tolist())).hexdigest()[:12]}",
        "tokens_per_step": config.batch * config.sequence,
        "seed": config.seed,
        "budget": f"{config.steps} steps",
    }
    losses: list[float] = []
    validated: list[tuple[int, float]] = []
    committed = None
    precision = torch.autocast(torch.device(plan.device).type, torch.bfloat16, enabled=plan.device != "cpu")
    phases = [(plan.observe, plan.early), (config.steps, plan.later)]
    for last, every in phases[1:] if treatment.commit is None and plan.early == plan.later else phases:
        with attach([matrices, rest], model, store, every=every, measure=("geometry", "update"), about=about) as recorder:
            while len(losses) < last:
                with precision:
                    loss = model(*(part.to(plan.device) for part in batches(training, config, generator)))
                loss.backward()
                for optimizer in (matrices, rest):
                    optimizer.step()
                    optimizer.zero_grad()
                losses.append(loss.item())
                recorder.log(loss=losses[-1])
                if len(losses) % plan.validate == 0 or len(losses) == config.steps:
                    with precision:
                        validated.append((len(losses), validation_loss(model, validation.to(plan.device), config)))
                    recorder.log(validation_loss=validated[-1][1])
        if treatment.commit is not None and committed is None:
            schedule = treatment.commit(open_run(store), plan.window, config.seed)
            apply_schedule(matrices, schedule, model)
            committed = {operator: entry.steps for operator, entry in schedule.operators.items()}
    return {
        "loss": losses,
        "validation": validated,
        "committed": committed,
        "flops": None if schedule is None else sum(entry.cost for entry in schedule.operators.values()),
    }
