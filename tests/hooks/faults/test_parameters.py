"""Gradients that are no numbers, and parameters that come, go and change: bitwise the training without a recorder, and what there is, is recorded."""

import copy
import gc
import io
import logging
import pickle
import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn
from torch.optim import AdamW, Muon

from faults.training import Training, as_bytes, disturbed, read, state_of, steps_in
from optiscope.hooks import attach

ALL = list(range(1, 13))


def present(store: Path, matrix: str) -> list[int]:
    """Steps at which any row of that name has an update."""
    update = read(store)["update"].to_dataset()
    rows = [i for i, name in enumerate(update["name"].values.tolist()) if name == matrix]
    found: list[int] = update["step"].values[np.isfinite(update["update_rms"].values[:, rows]).any(1)].tolist()
    return found


@pytest.mark.parametrize(
    ("value", "everywhere"), [(float("nan"), False), (float("inf"), False), (-float("inf"), True), (0.0, True), (1e-42, True), (3e38, True)]
)
def test_gradients_that_are_no_numbers(value: float, everywhere: bool, tmp_path: Path) -> None:
    """For three steps, in one entry or in all of them; NaN stays in the weights then, and the training is still the same."""
    store = tmp_path / "run.zarr"

    def script(training: Training) -> None:
        def spoil() -> None:
            for p in training.model.parameters():
                assert p.grad is not None
                p.grad.view(-1)[: None if everywhere else 1] = value

        training.go(4)
        training.go(3, spoil)
        training.go(5)

    outcome = disturbed(script, store)
    assert (outcome.warnings, outcome.recorder.errors) == ([], 0)
    update = read(store)["update"].to_dataset()
    assert update["step"].values.tolist() == ALL
    assert np.isfinite(update["update_rms"].values[:4]).all()
    if everywhere:
        # 3e38 squared is beyond float32, in which gradients are; 1e-42 is a denormal there.
        np.testing.assert_allclose(update["grad_rms"].values[4:7], abs(np.float32(value)), rtol=1e-6, atol=1e-45)
    if abs(value) < 1:
        assert np.isfinite(update["update_rms"].values).all()


def freeze(training: Training) -> None:
    training.model[0].weight.requires_grad_(False)


def thaw(training: Training) -> None:
    training.model[0].weight.requires_grad_(True)


def remove(training: Training) -> None:
    training.optimizers[0].param_groups[0]["params"].clear()


def put_back(training: Training) -> None:
    training.optimizers[0].param_groups[0]["params"].append(training.model[0].weight)


def replace(training: Training) -> None:
    """By a new parameter of the same shape."""
    new = nn.Parameter(training.model[0].weight.detach().flip(0))
    training.model[0].weight = new
    training.optimizers[0].param_groups[0]["params"][0] = new


def reshape(training: Training) -> None:
    """Pruning in place: four of five hidden units are kept."""
    first, last = training.model[0], training.model[3]
    for p, value in ((first.weight, first.weight[:4]), (first.bias, first.bias[:4]), (last.weight, last.weight[:, :4])):
        p.grad = None
        p.data = value.detach().clone()
    for optimizer in training.optimizers:
        optimizer.state.clear()


def load_state(training: Training) -> None:
    """A checkpoint of the optimizers, through a file, with another learning rate."""
    for optimizer in training.optimizers:
        file = io.BytesIO()
        torch.save(optimizer.state_dict(), file)
        file.seek(0)
        state = torch.load(file)
        state["param_groups"][0]["lr"] *= 0.5
        optimizer.load_state_dict(state)


def load_weights(training: Training) -> None:
    training.model.load_state_dict({key: value * 0.5 for key, value in training.model.state_dict().items()})


@pytest.mark.parametrize(
    ("change", "back", "missing"),
    [
        (freeze, thaw, [5, 6, 7, 8]),
        (remove, put_back, [5, 6, 7, 8]),
        (replace, replace, []),
        (reshape, None, []),
        (load_state, load_state, []),
    ],
)
def test_parameter_that_changes(
    change: Callable[[Training], None], back: Callable[[Training], None] | None, missing: list[int], tmp_path: Path
) -> None:
    """Before steps 5 and 9. Whatever is done, the other matrix is recorded at every step, and this one whenever it is trained."""
    store = tmp_path / "run.zarr"

    def script(training: Training) -> None:
        training.go(4)
        change(training)
        training.go(4)
        if back is not None:
            back(training)
        training.go(4)

    outcome = disturbed(script, store)
    # Whoever puts another parameter in its place has changed the weights, as the recorder sees it; nothing else is worth a word.
    assert all("changed between its steps" in warning for warning in outcome.warnings)
    assert len(outcome.warnings) <= (change is reshape)
    assert outcome.recorder.errors == 0
    assert present(store, "3.weight") == ALL
    assert present(store, "0.weight") == [step for step in ALL if step not in missing]


def test_weights_loaded_in_mid_run(tmp_path: Path) -> None:
    def script(training: Training) -> None:
        training.go(4)
        load_weights(training)
        training.go(8)

    [warning] = disturbed(script, tmp_path / "run.zarr").warnings
    assert "changed between its steps, before step 5" in warning
    assert steps_in(read(tmp_path / "run.zarr")) == ALL


def test_model_and_optimizers_are_deleted(tmp_path: Path) -> None:
    """While the recorder lives: it goes on with what still steps, closes, and holds neither."""
    store = tmp_path / "run.zarr"
    training = Training()
    recorder = training.recorder = attach(training.optimizers, training.model, store, every=1, on_error="raise")
    training.go(3)
    model = weakref.ref(training.model)
    first, last = training.model[0].weight, training.model[3].weight
    del training.model
    for _ in range(2):
        for p in (first, last):
            p.grad = torch.ones_like(p)
        for optimizer in training.optimizers:
            optimizer.step()
    gone = [weakref.ref(optimizer) for optimizer in training.optimizers]
    del training, optimizer, first, last, p
    gc.collect()
    recorder.close()
    gc.collect()
    assert steps_in(read(store)) == [1, 2, 3, 4, 5]
    del recorder
    gc.collect()
    assert not any(reference() for reference in (*gone, model))


def through_a_file(thing: Any) -> Any:
    file = io.BytesIO()
    torch.save(thing, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


@pytest.mark.parametrize(
    "copied", [copy.deepcopy, lambda thing: pickle.loads(pickle.dumps(thing)), through_a_file], ids=["deepcopy", "pickle", "file"]
)
def test_copies(copied: Callable[[Any], Any], tmp_path: Path) -> None:
    """Of model and optimizers with hooks on them, in mid-run: they train on to the same bits, unrecorded."""
    store = tmp_path / "run.zarr"

    def script(training: Training) -> None:
        training.go(4)
        twins = copied((training.model, training.optimizers))
        training.go(4)
        for optimizer in twins[1]:
            for group in optimizer.param_groups:
                for p in group["params"]:
                    p.grad = torch.ones_like(p)
            optimizer.step()
        training.seen.append(([as_bytes(p) for p in twins[0].parameters()], list(map(state_of, twins[1]))))
        training.go(4)

    outcome = disturbed(script, store)
    assert (outcome.warnings, outcome.recorder.step) == ([], 12)
    assert steps_in(read(store)) == ALL


def test_parameter_added_in_mid_run(tmp_path: Path) -> None:
    def script(training: Training) -> None:
        training.go(4)
        training.model.extra = nn.Linear(7, 3)
        training.optimizers[0].add_param_group({"params": [training.model.extra.weight]})
        training.optimizers.append(AdamW([training.model.extra.bias]))
        training.go(8)

    outcome = disturbed(script, tmp_path / "run.zarr")
    assert (outcome.warnings, outcome.recorder.errors) == ([], 0)
    assert present(tmp_path / "run.zarr", "extra.weight") == ALL[4:]


def test_a_measurement_of_everything_under_nan(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """All that is recorded on request too."""
    model = nn.Sequential(nn.Linear(6, 6), nn.Linear(6, 6))
    optimizer = Muon([p for p in model.parameters() if p.ndim == 2])
    measure = ("geometry", "update", "second_moment", "second_moment_map", "gradient", "blocks", "stacking", "precision")
    with (
        caplog.at_level(logging.WARNING, "optiscope"),
        attach(optimizer, model, tmp_path / "run.zarr", every=1, measure=measure) as recorder,
    ):
        for value in (1.0, float("nan"), float("inf"), 0.0, 1e-42):
            for p in model.parameters():
                p.grad = torch.full_like(p, value)
            optimizer.step()
    assert (recorder.errors, caplog.records) == (0, [])
    assert steps_in(read(tmp_path / "run.zarr")) == [1, 2, 3, 4, 5]
