"""Optimizers with one mistake each, trained with the recorder attached: their run names the mistake, and that of their right twin none.

Once read by an adapter that says what the optimizer is meant to do, and once as classes nobody registered, which are watched.
"""

import importlib.util
from pathlib import Path

import pytest
import torch
from torch import nn

import optiscope.hooks.adapters.table as table
from optiscope.analysis import check, open_run
from optiscope.hooks import attach, register_adapter

_spec = importlib.util.spec_from_file_location("broken", Path(__file__).with_name("broken.py"))
broken = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(broken)

HIDDEN = ("0.weight", "2.weight", "4.weight")


def trained(store, make, *, steps=40, loss_scale=1.0, dtype=torch.float32):
    """A network of which `make` gets the matrices 48×24, 32×48 and 128×32, the rest AdamW at the same learning rate; its run."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(24, 48), nn.Tanh(), nn.Linear(48, 32), nn.Tanh(), nn.Linear(32, 128), nn.Tanh(), nn.Linear(128, 16))
    model = model.to(dtype)
    hidden = [model[i].weight for i in (0, 2, 4)]
    rest = [p for p in model.parameters() if all(p is not h for h in hidden)]
    # Its own ε is no mistake here, however small the gradients are.
    optimizers = [make(hidden), torch.optim.AdamW(rest, lr=0.01, eps=1e-20)]
    truth = torch.randn(24, 16, dtype=dtype)
    with attach(optimizers, model, store, every=1, on_error="raise"):
        for _ in range(steps):
            x = torch.randn(64, 24, dtype=dtype)
            loss = loss_scale * (model(x) - torch.sin(x @ truth)).square().mean()
            model.zero_grad()
            loss.backward()
            for optimizer in optimizers:
                optimizer.step()
    return open_run(store)


@pytest.fixture(scope="module")
def findings(tmp_path_factory):
    """What fails a check, by rule, of a training by a class with some settings; each is run once."""
    known = {}

    def findings(make, settings, *, adapter=None, **training):
        key = (make, *settings.items(), id(adapter), *training.items())
        if key not in known:
            with pytest.MonkeyPatch.context() as patch:
                patch.setattr(table, "_registered", {})
                if adapter is not None:
                    register_adapter(broken.OwnMuon, adapter)
                run = trained(tmp_path_factory.mktemp("broken") / "run.zarr", lambda params: make(params, **settings), **training)
            known[key] = {f.rule: f for f in check(run) if f.severity != "info"}
        return known[key]

    return findings


RIGHT = {
    "Moonlight's Muon": (broken.OwnMuon, {}, broken.MUON, {}),
    "Polar Express": (broken.OwnMuon, {"ns_coefficients": broken.POLAR_EXPRESS}, broken.MUON, {}),
    "small gradients, smaller eps": (broken.OwnMuon, {"ns_eps": 1e-15}, broken.MUON, {"loss_scale": 1e-9}),
    "AdaMuon": (broken.OwnAdaMuon, {}, broken.ADAMUON, {}),
}
# Mistake: class, settings, what its author means it to do, training; rule and part of the sentence, read and not read.
MISTAKES = {
    "factor 0.2 missing": (
        (broken.FactorlessMuon, {}, broken.MUON, {}),
        ("rms_off_target", "outside what their residual explains, as by a missing factor 0.2."),
        ("factor_missing", "Muon scaled by √max(rows, cols) without the factor 0.2"),
    ),
    "norm under eps": (
        (broken.OwnMuon, {}, broken.MUON, {"loss_scale": 1e-9}),
        ("norm_near_eps", "is below it in 100% of the records: these updates are not orthogonalised"),
        ("update_follows_momentum", "updates grow and shrink with the momentum"),
    ),
    "norm partly under eps": (
        (broken.OwnMuon, {"ns_eps": 10.0}, broken.MUON, {"loss_scale": 0.1}),
        ("norm_near_eps", "is below it in 100% of the records"),
        ("update_follows_momentum", "updates grow and shrink with the momentum"),
    ),
    "zero steps": (
        (broken.OwnMuon, {"ns_steps": 0}, broken.MUON, {}),
        ("no_ns_steps", "3 matrices not orthogonalised: zero Newton–Schulz steps"),
        ("only_normalised", "exactly the Frobenius norm of M/‖M‖_F times 0.2·√max(rows, cols)"),
    ),
    "iteration that does not run": (
        (broken.IdleMuon, {}, broken.MUON, {}),
        ("not_orthogonalised", "not orthogonalised although the optimizer's settings say so"),
        ("only_normalised", "it is normalised, not orthogonalised"),
    ),
    "update of the wrong sign": (
        (broken.ReversedMuon, {}, broken.MUON, {}),
        ("not_aligned", "point elsewhere than their momentum orthogonalised: cosine -"),
        None,  # nothing says which way it should go
    ),
    "wrong Polar Express": (
        (broken.OwnMuon, {"ns_coefficients": broken.WRONG_POLAR_EXPRESS}, broken.MUON, {}),
        ("ns_band", "This is Polar Express as NVIDIA's Emerging-Optimizers had it before November 2025."),
        ("ns_band", "This is Polar Express as NVIDIA's Emerging-Optimizers had it before November 2025."),
    ),
    "size not aligned": (
        (broken.UnalignedAdaMuon, {}, broken.ADAMUON, {"steps": 80}),
        ("rms_off_target", "as by √max(rows, cols) applied twice, or to updates that are normalised already."),
        ("scaled_twice", "grows as 0.2·√max(rows, cols), where 0.2 is meant for every shape"),
    ),
    "momentum overwritten": (
        (broken.OverwritingMuon, {}, broken.MUON, {}),
        ("momentum_overwritten", "The momentum of 3 matrices has norm 1 after every step"),
        ("momentum_overwritten", "The momentum of 3 matrices has norm 1 after every step"),
    ),
}


@pytest.mark.parametrize("read", [True, False], ids=["read", "unread"])
@pytest.mark.parametrize("mistake", MISTAKES)
def test_a_mistake_is_named(findings, mistake, read):
    (make, settings, adapter, training), when_read, when_not = MISTAKES[mistake]
    found = findings(make, settings, adapter=adapter if read else None, **training)
    if (said := when_read if read else when_not) is None:
        assert found == {}
    else:
        rule, part = said
        assert part in found[rule].sentence
        assert found[rule].matrices == HIDDEN
        assert all(isinstance(value, float) for value in found[rule].as_dict()["numbers"].values())


@pytest.mark.parametrize("mistake", ["norm under eps", "norm partly under eps", "zero steps"])
def test_what_follows_from_a_mistake_is_no_other_one(findings, mistake):
    """Updates that are too small because they are not orthogonalised want no other scaling, and no second cause."""
    (make, settings, adapter, training), (rule, _), _ = MISTAKES[mistake]
    assert set(findings(make, settings, adapter=adapter, **training)) == {rule}


@pytest.mark.parametrize("read", [True, False], ids=["read", "unread"])
@pytest.mark.parametrize("name", RIGHT)
def test_what_is_right_is_not_blamed(findings, name, read):
    make, settings, adapter, training = RIGHT[name]
    assert findings(make, settings, adapter=adapter if read else None, **training) == {}


@pytest.mark.parametrize("nesterov", [False, True])
def test_torch_overwrites_the_momentum_of_bfloat16_parameters_without_nesterov(findings, nesterov):
    settings = {"lr": 0.01, "nesterov": nesterov, "adjust_lr_fn": "match_rms_adamw", "weight_decay": 0.0}
    found = findings(torch.optim.Muon, settings, dtype=torch.bfloat16)
    assert ("momentum_overwritten" in found) is not nesterov
