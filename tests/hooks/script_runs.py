"""What tests of `diag run`'s recording share: training without a model's forward pass, and what of it was recorded."""

import torch


def train(*optimizers, steps=2):
    for _ in range(steps):
        for optimizer in optimizers:
            for group in optimizer.param_groups:
                for p in group["params"]:
                    p.grad = torch.linspace(-1, 2, p.numel()).view_as(p).sin()
            optimizer.step()


def recorded(tree):
    """(name, optimizer) of the matrices, and the steps at which each has an update."""
    update = tree["update"].to_dataset().set_coords(["name", "optimizer"])
    there = update["update_rms"].notnull().values
    pairs = zip(update["name"].values.tolist(), update["optimizer"].values.tolist(), strict=True)
    return {pair: update["step"].values[there[:, i]].tolist() for i, pair in enumerate(pairs)}
