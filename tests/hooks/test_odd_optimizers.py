"""Optimizers, wrappers and runs of an odd kind: each once broke a recording, or could have reached a training."""

import gc
import logging
import threading
import weakref
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import xarray as xr
from torch import Tensor, nn
from torch.optim import SGD, AdamW, Optimizer

from optiscope.analysis import open_run
from optiscope.diagnostics.catalogue import PARTITIONS
from optiscope.diagnostics.store.writer import Writer
from optiscope.hooks import attach
from optiscope.hooks.adapters import Adapter, entry
from optiscope.hooks.adapters.table import _registered
from optiscope.hooks.observing.layers import hookable_layers

Make = Callable[..., nn.Sequential]
Read = Callable[[str | Path], xr.DataTree]


def backward(model: nn.Module, seed: int = 0) -> None:
    model.zero_grad()
    model(torch.randn(16, 8, generator=torch.Generator().manual_seed(seed))).square().mean().backward()


def loss_of(model: nn.Module) -> Tensor:
    loss: Tensor = model(torch.ones(2, 8)).square().mean()
    return loss


def steps(run: xr.DataTree) -> list[int]:
    found: list[int] = run["update"]["step"].values.tolist()
    return found


# Wrappers


class HandsThrough:
    """As Fabric's wrapper: every attribute is the inner optimizer's, its dict of hooks included."""

    def __init__(self, inner: Optimizer) -> None:
        self.optimizer = inner

    def __getattr__(self, name: str) -> Any:
        return getattr(self.optimizer, name)

    def step(self) -> None:
        self.optimizer.step()


def test_wrapper_that_hands_hooks_through_counts_every_step_once(mlp: Make, tmp_path: Path, read: Read) -> None:
    model = mlp(dropout=0.0)
    wrapper: Any = HandsThrough(SGD(model.parameters(), lr=0.1))
    with attach(wrapper, model, tmp_path / "run.zarr", every=1, on_error="raise") as recorder:
        for t in range(3):
            backward(model, t)
            wrapper.step()
    assert recorder.step == 3
    assert steps(read(tmp_path / "run.zarr")) == [1, 2, 3]


def test_wrappers_that_lead_nowhere(mlp: Make) -> None:
    class Fails(SGD):
        @property
        def optimizer(self) -> Any:
            raise RuntimeError("not yet")

    fails = Fails(mlp().parameters(), lr=0.1)
    assert hookable_layers(fails) == [fails]
    circle: Any = type("Circle", (), {"param_groups": []})()
    circle.optimizer = circle
    assert hookable_layers(circle) == []


# Optimizers


class TensorState(Optimizer):
    """Its state of a parameter is the momentum itself, no mapping."""

    def __init__(self, params: Any) -> None:
        super().__init__(params, {"lr": 0.1})

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:
        for p in self.param_groups[0]["params"]:
            self.state[p] = p.grad.clone()
            p.add_(p.grad, alpha=-0.1)


@pytest.mark.parametrize("found_inf", [False, "no", {"cpu": 0}], ids=str)
def test_found_inf_of_another_kind_does_not_reach_the_training(found_inf: Any, mlp: Make, tmp_path: Path, read: Read) -> None:
    model = mlp(dropout=0.0)
    optimizer = TensorState(model.parameters())
    optimizer.found_inf = found_inf  # type: ignore[attr-defined]
    with attach(optimizer, model, tmp_path / "run.zarr", every=1, on_error="raise"):
        backward(model)
        optimizer.step()
    assert steps(read(tmp_path / "run.zarr")) == [1]


def test_state_that_is_no_mapping(mlp: Make, tmp_path: Path, read: Read) -> None:
    model = mlp(dropout=0.0)
    optimizer = TensorState(model.parameters())
    with attach(optimizer, model, tmp_path / "run.zarr", every=1, on_error="raise"):
        for t in range(3):
            backward(model, t)
            optimizer.step()
    assert (read(tmp_path / "run.zarr")["update"]["update_rms"].values > 0).all()


def test_momentum_kept_flat_is_cut_into_the_slices_of_a_stack(tmp_path: Path, read: Read, monkeypatch: pytest.MonkeyPatch) -> None:
    class Flat(Optimizer):
        def __init__(self, params: Any) -> None:
            super().__init__(params, {"lr": 0.1})

        @torch.no_grad()
        def step(self, closure: Any = None) -> None:
            for p in self.param_groups[0]["params"]:
                self.state[p]["flat"] = p.grad.flatten().clone()
                p.add_(p.grad, alpha=-0.1)

    name = f"{Flat.__module__}.{Flat.__qualname__}"
    monkeypatch.setitem(_registered, name, Adapter("flat", momentum=entry("flat")))
    experts = nn.Parameter(torch.zeros(3, 4, 5))
    experts.grad = torch.randn(3, 4, 5, generator=torch.Generator().manual_seed(0))
    optimizer = Flat([experts])
    with attach(optimizer, None, tmp_path / "run.zarr", every=1, on_error="raise"):
        optimizer.step()
    run = read(tmp_path / "run.zarr")
    expected = [g.double().square().mean().sqrt().item() for g in experts.grad]
    assert run["update"]["momentum_rms"].values[0] == pytest.approx(expected, rel=1e-12)
    assert run["geometry"]["condition_number"].values[0] == pytest.approx([np.linalg.cond(g.double()) for g in experts.grad], rel=1e-6)


def test_settings_that_json_cannot_hold(mlp: Make, tmp_path: Path, read: Read) -> None:
    model = mlp(dropout=0.0)
    optimizer = SGD(model.parameters(), lr=0.1)
    optimizer.param_groups[0].update({3: "three", "limit": torch.tensor(float("inf"))})  # type: ignore[dict-item]
    with attach(optimizer, model, tmp_path / "run.zarr", every=1, on_error="raise"):
        pass
    settings = read(tmp_path / "run.zarr").attrs["optimizers"][0]["groups"][0]
    assert (settings["3"], settings["limit"]) == ("three", "inf")


# Weights


def test_nan_weights_have_not_been_changed_from_outside(mlp: Make, tmp_path: Path, read: Read, caplog: pytest.LogCaptureFixture) -> None:
    model = mlp(dropout=0.0)
    optimizer = SGD(model.parameters(), lr=0.1)
    with torch.no_grad():
        model[3].weight[0, 0] = float("nan")
    with attach(optimizer, model, tmp_path / "run.zarr", every=1):
        for t in range(3):
            backward(model, t)
            optimizer.step()
    assert (read(tmp_path / "run.zarr")["update"]["changed_outside"].values[1:] == 0).all()
    assert not caplog.records


def test_float64_weights_are_watched_for_changes(mlp: Make, tmp_path: Path, read: Read) -> None:
    model = mlp(dropout=0.0, dtype=torch.float64)
    optimizer = SGD(model.parameters(), lr=0.1)
    with attach(optimizer, model, tmp_path / "run.zarr", every=1, on_error="raise"):
        for t in range(2):
            if t:
                with torch.no_grad():
                    model[0].weight[0, 0] += 1e-12
            model.zero_grad()
            model(torch.randn(16, 8, generator=torch.Generator().manual_seed(t)).double()).square().mean().backward()
            optimizer.step()
    assert read(tmp_path / "run.zarr")["update"]["changed_outside"].values[1].tolist() == [1, 0, 0]


def test_steps_that_were_not_watched_in_between_are_no_change(
    two: tuple[nn.Module, Optimizer, Optimizer], tmp_path: Path, read: Read, caplog: pytest.LogCaptureFixture
) -> None:
    """Two optimizers that take turns: of one that has stepped since its weights were noted nothing is known."""
    model, a, b = two
    with attach([a, b], model, tmp_path / "run.zarr", every=10, on_error="raise"):
        for optimizer, count in ((b, 20), (a, 25), (b, 1), (a, 5), (b, 10)):
            for _ in range(count):
                optimizer.step()
    assert not caplog.records
    assert 1 not in read(tmp_path / "run.zarr")["update"]["changed_outside"].values


# Names and rows


def test_names_that_differ_only_by_what_a_wrapper_would_add(tmp_path: Path, read: Read) -> None:
    class Twin(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = nn.Parameter(torch.ones(3, 3))
            self.module = nn.Linear(3, 3, bias=False)

    model = Twin()
    for p in model.parameters():
        p.grad = torch.ones_like(p)
    optimizer = SGD(model.parameters(), lr=0.1)
    with attach(optimizer, model, tmp_path / "run.zarr", every=1, on_error="raise"):
        optimizer.step()
    update = read(tmp_path / "run.zarr")["update"]
    assert update["name"].values.tolist() == ["weight", "module.weight"]
    assert np.isfinite(update["update_rms"].values).all()


def test_parameter_that_takes_the_number_of_another(tmp_path: Path, read: Read) -> None:
    parameters = [nn.Parameter(torch.full((3, 3), float(i + 1))) for i in range(3)]
    for p in parameters:
        p.grad = torch.ones_like(p)
    optimizer = SGD(parameters[:2], lr=0.0)
    with attach(optimizer, None, tmp_path / "run.zarr", every=1, on_error="raise"):
        optimizer.step()
        optimizer.param_groups[0]["params"][:] = parameters[1:]
        optimizer.step()
    update = read(tmp_path / "run.zarr")["update"]
    assert update["name"].values.tolist() == ["SGD.group0.param0", "SGD.group0.param1", "SGD.group0.param1#2"]
    np.testing.assert_array_equal(update["weight_rms"].values, [[1, 2, np.nan], [np.nan, 2, 3]])


def test_parameter_that_moves_to_another_optimizer_is_recorded_there(mlp: Make, tmp_path: Path, read: Read) -> None:
    model = mlp(dropout=0.0)
    adamw, sgd = AdamW([model[0].weight, model[3].weight]), SGD([model[6].weight], lr=0.1)
    with attach([adamw, sgd], model, tmp_path / "run.zarr", every=1, on_error="raise"):
        for t in range(2):
            if t:
                adamw.param_groups[0]["params"][:] = [model[0].weight]
                sgd.add_param_group({"params": [model[3].weight]})
            backward(model, t)
            adamw.step()
            sgd.step()
    update = read(tmp_path / "run.zarr")["update"]
    found = {
        (str(n), str(o)): np.isfinite(v).tolist()
        for n, o, v in zip(*(update[k].values for k in ("name", "optimizer")), update["update_rms"].values.T, strict=True)
    }
    assert found == {
        ("0.weight", "AdamW"): [True, True],
        ("3.weight", "AdamW"): [True, False],
        ("6.weight", "SGD"): [True, True],
        ("3.weight", "SGD"): [False, True],
    }


def test_replaced_parameters_are_not_kept(tmp_path: Path) -> None:
    optimizer = SGD([nn.Parameter(torch.ones(4, 4))], lr=0.1)
    gone: list[weakref.ref[Tensor]] = []
    with attach(optimizer, None, tmp_path / "run.zarr", every=1, on_error="raise"):
        for _ in range(5):
            p = nn.Parameter(torch.ones(4, 4))
            p.grad = torch.ones(4, 4)
            gone.append(weakref.ref(p))
            optimizer.param_groups[0]["params"][:] = [p]
            optimizer.state.clear()
            optimizer.step()
        del p
        gc.collect()
        assert [reference() is None for reference in gone] == [True] * 4 + [False]


# Runs


def test_continued_run_grows_as_often_as_it_likes(mlp: Make, tmp_path: Path) -> None:
    model = mlp(dropout=0.0)
    weights = [model[i].weight for i in (0, 3, 6)]
    for start in (0, 1):
        optimizer = SGD([weights[0]], lr=0.1)
        with attach(optimizer, model, tmp_path / "run.zarr", every=1, on_error="raise"):
            for p in (None, *weights[1:]):
                if p is not None and start:
                    optimizer.add_param_group({"params": [p]})
                backward(model)
                optimizer.step()
    update = open_run(tmp_path / "run.zarr")["update"]
    assert update["name"].values.tolist() == ["0.weight", "3.weight", "6.weight"]
    assert np.isfinite(update["update_rms"].values).sum(axis=1).tolist() == [1, 1, 1, 1, 2, 3]


def test_run_that_lacks_a_group_a_variable_and_an_attribute_is_continued_with_them(mlp: Make, tmp_path: Path, read: Read) -> None:
    """As one of an earlier version."""
    model = mlp(dropout=0.0)
    optimizer = SGD(model.parameters(), lr=0.1)
    with attach(optimizer, model, tmp_path / "run.zarr", every=1, measure=["update", "second_moment"]):
        backward(model)
        optimizer.step()
    old = Writer(tmp_path / "run.zarr", {})
    del old._groups["update"].arrays["changed_outside"]  # the next commit does not know it
    del old.attributes["second_moment"]["partitions"]
    old.attributes["second_moment"]["forms"] = ["full"]  # what indices of its records are into
    old.flush()
    with attach(optimizer, model, tmp_path / "run.zarr", every=1, on_error="raise"):
        for t in (1, 2):
            backward(model, t)
            optimizer.step()
    run = read(tmp_path / "run.zarr")
    assert run["update"]["changed_outside"].values.tolist() == [[-1] * 3, [-1] * 3, [0] * 3]
    assert run["geometry"]["step"].values.tolist() == [2, 3]
    assert run["second_moment"].attrs["partitions"] == list(PARTITIONS)
    assert run["second_moment"].attrs["forms"] == ["full"]


def test_recorder_that_was_taken_over_touches_nothing_and_says_so_once(mlp: Make, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    model = mlp(dropout=0.0)
    optimizer = SGD([model[0].weight], lr=0.1)
    old = attach(optimizer, model, tmp_path / "run.zarr", every=1)
    backward(model)
    optimizer.step()
    old.flush()
    other = Writer(tmp_path / "run.zarr", {})  # as another process would
    other.flush()
    optimizer.add_param_group({"params": [model[3].weight]})
    optimizer.step()
    old.flush()
    other.flush()
    assert open_run(tmp_path / "run.zarr")["update"].sizes["matrix"] == 1
    before = len(caplog.records)
    for _ in range(5):
        old.log(loss=1.0)
    assert len(caplog.records) == before
    assert sum("written by another recorder" in record.getMessage() for record in caplog.records) <= 2


def test_refused_store_is_left_as_it_is(mlp: Make, tmp_path: Path) -> None:
    model = mlp(dropout=0.0)
    with attach(SGD([model[0].weight], lr=0.1), model, tmp_path / "run.zarr", every=1) as recorder:
        backward(model)
        recorder.session.watched[0].optimizer.step()
    before = (tmp_path / "run.zarr" / "zarr.json").read_bytes()
    with pytest.raises(ValueError, match="holds a run of other matrices"):
        attach(SGD([model[3].weight], lr=0.1), model, tmp_path / "run.zarr", first_step=0)
    assert (tmp_path / "run.zarr" / "zarr.json").read_bytes() == before


def test_closed_recorder_stays_closed_and_holds_no_weights(mlp: Make, tmp_path: Path) -> None:
    model = mlp(dropout=0.0)
    optimizer = SGD(model.parameters(), lr=0.1)
    recorder = attach(optimizer, model, tmp_path / "run.zarr", every=1)
    backward(model)

    class Stop(Exception):
        pass

    def closure() -> float:
        raise Stop

    with pytest.raises(Stop):
        optimizer.step(closure)
    assert recorder.session.watched[0].snapshots  # copies that the step left behind
    recorder.close()
    assert open_run(tmp_path / "run.zarr")["update"].sizes["step"] == 0  # nor is a record of that step made
    other = AdamW(mlp().parameters())
    recorder.watch(other)
    assert not other._optimizer_step_pre_hooks
    assert logging.getLogger("optiscope").level == logging.NOTSET


@pytest.mark.parametrize("background", [False, True], ids=["foreground", "background"])
@pytest.mark.parametrize("end", ["close", "taken over"])
def test_one_that_has_ended_lets_go_of_the_training(end: str, background: bool, mlp: Make, tmp_path: Path) -> None:
    """It may be kept for its counters: neither the model nor a parameter, an optimizer, or a thread is kept with it."""
    model = mlp(dropout=0.0)
    optimizer = AdamW(model.parameters(), lr=0.1)
    recorder = attach(optimizer, model, tmp_path / "run.zarr", every=1, measure=["update", "blocks"], background=background)
    for t in range(3):
        backward(model, t)
        optimizer.step()
    recorder.curvature(partial(loss_of, model))
    if end == "close":
        recorder.close()
    else:
        Writer(tmp_path / "run.zarr", {}).flush()
        recorder.flush()
    things = [weakref.ref(model), weakref.ref(optimizer), *map(weakref.ref, model.parameters())]
    del model, optimizer
    gc.collect()
    assert [found() for found in things] == [None] * len(things)
    assert recorder.step == 3
    assert not any(thread.name == "optiscope" for thread in threading.enumerate())
