"""The same search for everyone: each condition's learning rate is the best of one grid, on one seed that is not reported."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from optiscope.examples.experiments.training import Plan, Treatment, once


def tuned(folder: Path, plan: Plan, condition: str, treatment: Treatment, grid: Sequence[float]) -> tuple[float, dict[float, float]]:
    """The learning rate of the least final validation loss on the first architecture, and those losses by learning rate (none for a grid of one)."""
    if len(grid) == 1:
        return grid[0], {}
    found = {
        lr: once(folder, f"{plan.first}-{condition}-lr{lr:g}-seed{plan.tuning_seed}", plan, plan.first, treatment, lr, plan.tuning_seed)
        for lr in grid
    }
    losses = {lr: one["validation"][-1][1] for lr, one in found.items()}
    return min(losses, key=losses.__getitem__), losses


def trained(folder: Path, plan: Plan, model: str, condition: str, treatment: Treatment, lr: float) -> list[dict[str, Any]]:
    """The trainings of all seeds, each with `store`, where its run is."""
    result = []
    for seed in plan.seeds:
        name = f"{model}-{condition}-lr{lr:g}-seed{seed}"
        result.append({**once(folder, name, plan, model, treatment, lr, seed), "seed": seed, "store": folder / f"{name}.zarr"})
    return result
