"""One process that repeats what several did: the independent reference of what they record.

Every rank's training notes, by `full_tensor()`, what each parameter, its gradient and its optimizer's state were as a whole around every step. One
process then records an optimizer of the same class whose steps put exactly these tensors in place.
"""

import torch
from torch.optim import Optimizer


def whole(tensor):
    """A copy of all of it, on every rank, by the training's own means."""
    if hasattr(tensor, "full_tensor"):
        tensor = tensor.full_tensor()
    return tensor.detach().clone()


def whole_state(optimizer, parameter):
    state = optimizer.state.get(parameter, {})
    return {key: whole(value) if isinstance(value, torch.Tensor) else value for key, value in state.items()}


class Noted:
    """What a training notes of some optimizers."""

    def __init__(self, optimizers):
        self.optimizers = optimizers
        self.steps = []
        self.start = [[whole(p) for p in parameters(one)] for one in optimizers]

    def step(self):
        """Take a step of all, and note it."""
        noted = []
        for one in self.optimizers:
            gradients = [None if p.grad is None else whole(p.grad) for p in parameters(one)]
            one.step()
            noted.append((gradients, [whole(p) for p in parameters(one)], [whole_state(one, p) for p in parameters(one)]))
        self.steps.append(noted)


def parameters(optimizer):
    return [p for group in optimizer.param_groups for p in group["params"]]


def replay(monkeypatch, names, kinds, start, steps, attach, store, **options):
    """Record at `store` optimizers that repeat what was noted.

    Args:
        names: of the parameters, by optimizer.
        kinds: classes and settings of the optimizers: (class, settings).
    """
    made, model = [], torch.nn.Module()
    under_way = {}

    def step(self, closure=None):
        _, after, states = under_way[id(self)]
        with torch.no_grad():
            for p, weight, state in zip(parameters(self), after, states, strict=True):
                p.copy_(weight)
                self.state[p] = {key: value.clone() if isinstance(value, torch.Tensor) else value for key, value in state.items()}

    for (kind, settings), own, weights in zip(kinds, names, start, strict=True):
        monkeypatch.setattr(kind, "step", Optimizer.profile_hook_step(step))
        params = []
        for name, weight in zip(own, weights, strict=True):
            *path, leaf = name.split(".")
            owner = model
            for part in path:
                if part not in owner._modules:
                    owner.add_module(part, torch.nn.Module())
                owner = owner._modules[part]
            params.append(torch.nn.Parameter(weight.clone()))
            owner.register_parameter(leaf, params[-1])
        made.append(kind(params, **settings))
    with attach(made, model, store, every=1, on_error="raise", **options):
        for noted in steps:
            for one, of_one in zip(made, noted, strict=True):
                under_way[id(one)] = of_one
                for p, gradient in zip(parameters(one), of_one[0], strict=True):
                    p.grad = gradient
                one.step()
