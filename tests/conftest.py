"""What several folders of tests share: small runs that the recorder itself writes."""

import pytest

# Matplotlib, xarray and torch are slow to import and some tests check that they were not: each test imports what it uses.

NAMES = ("layers.0.attn.q_proj", "layers.0.mlp.up_proj", "layers.1.attn.q_proj", "layers.1.mlp.up_proj")


@pytest.fixture(scope="session")
def record():
    """A function that trains a chain of square and wide matrices by Muon, and a head by AdamW, and records it at `store`."""

    def record(store, *, names=NAMES, steps=12, muon=True, operators=None, **settings):
        import torch

        from optiscope.hooks import attach

        torch.manual_seed(0)
        weights = [torch.nn.Parameter(torch.randn(6, 6 if i % 2 == 0 else 9) / 3) for i in range(len(names))]
        head = torch.nn.Parameter(torch.randn(6, 6) / 3)
        model = torch.nn.Module()
        for name, weight in zip((*names, "head"), (*weights, head), strict=True):
            owner = model
            *parents, leaf = name.split(".")
            for parent in (*parents, leaf):
                if parent not in owner._modules:
                    owner.add_module(parent, torch.nn.Module())
                owner = owner._modules[parent]
            owner.register_parameter("weight", weight)
        kind = torch.optim.Muon if muon else torch.optim.AdamW
        optimizers = [kind(weights, lr=0.02, weight_decay=0.0, **settings), torch.optim.AdamW([head], lr=1e-3, weight_decay=0.0)]
        with attach(optimizers, model, store, every=1, operators=operators, on_error="raise") as recorder:
            for _ in range(steps):
                y = torch.randn(32, 6)
                for weight in weights:
                    y = torch.tanh(y @ weight) if weight.shape[1] == 6 else torch.tanh(y @ weight @ weight.T)
                loss = (y @ head - 1).square().mean()
                for optimizer in optimizers:
                    optimizer.zero_grad()
                loss.backward()
                for optimizer in optimizers:
                    optimizer.step()
                recorder.log(loss=loss)
        return store

    return record


@pytest.fixture(scope="session")
def recorded(record, tmp_path_factory):
    """The path of a run of 12 recorded steps; not to be changed."""
    return record(tmp_path_factory.mktemp("recorded") / "run.zarr")


@pytest.fixture(scope="session")
def hostile_run(tmp_path_factory):
    """The path of a run of which every name was chosen by somebody who means harm: parameters, operators, classes, settings, scalars, what is stated."""
    import torch
    from hostile_names import HOSTILE

    from optiscope.diagnostics.escape import storable
    from optiscope.hooks import attach

    class Model(torch.nn.Module):
        def __init__(self):
            super().__init__()
            torch.manual_seed(0)
            self.weights = torch.nn.ParameterList(torch.randn(6, 6) / 3 for _ in HOSTILE)

        def named_parameters(self, *arguments, **settings):
            return zip(names, self.weights, strict=True)

    names = [f"layers.{i}.{text}" if i % 2 else text for i, text in enumerate(HOSTILE.values())]
    operators = dict(zip(map(storable, names), HOSTILE.values(), strict=True))  # a rule is asked by the name that is stored
    model = Model()
    # Muon of the first half, AdamW of the second.
    muon = type(HOSTILE["colours"] + HOSTILE["script"], (torch.optim.Muon,), {"__module__": HOSTILE["link"]})
    adam = type("[red]" + HOSTILE["formula"], (torch.optim.AdamW,), {})
    half = len(names) // 2
    optimizers = [muon(list(model.weights)[:half], lr=0.02), adam(list(model.weights)[half:], lr=1e-3)]
    optimizers[0].param_groups[0] |= {
        HOSTILE["image"]: HOSTILE["attribute"],
        "top": float("inf"),
        HOSTILE["surrogate"]: HOSTILE["surrogate"],
    }
    stated = {(text.strip() or key)[:100]: text[:1000] for key, text in HOSTILE.items()}
    path = tmp_path_factory.mktemp("hostile") / f"=[red]<img src=x onerror=alert(5)>$\\frac${HOSTILE['colours']}.zarr"
    with attach(optimizers, model, path, every=1, operators=lambda name: operators.get(name), about=stated, on_error="raise") as recorder:
        for step in range(2):
            sum(weight.square().sum() for weight in model.weights).backward()
            for optimizer in optimizers:
                optimizer.step()
                optimizer.zero_grad()
            recorder.log(loss=2.0 - step)
            for key, text in HOSTILE.items():
                if key not in ("endless", "words", "marks", "zero", "parents"):  # refused, or, with its slashes, nothing but another's name
                    recorder.log(**{text: 1.0, f"loss {text}": 2.0})
    return path
