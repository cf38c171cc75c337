"""An optimizer of an unknown class in a recorded training: what the run holds and says, and that the training is left alone."""

import logging
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.optim import AdamW
from unknown_class import DECOYS, EXACT, Keep, Make, Odd, Read, average, backward, entry, norms_of, put, rms, run, weights

from optiscope.hooks import attach
from optiscope.hooks.adapters.identification import STEPS
from optiscope.hooks.observing.watched import watch

# What is recorded


def test_what_was_found_is_recorded_from_the_conclusion_on(mlp: Make, tmp_path: Path, read: Read) -> None:
    model = mlp(dropout=0.0)
    optimizer = Odd(weights(model), *DECOYS, average("q7"))
    seen = run(optimizer, model, tmp_path / "run.zarr", lambda p: rms(optimizer.state[p]["q7"]))
    recorded = read(tmp_path / "run.zarr")
    found = recorded["update"]["momentum_rms"].values
    assert np.isnan(found[:STEPS]).all()  # no name told
    np.testing.assert_allclose(found[STEPS:], seen[STEPS:], rtol=EXACT)
    entries = np.array([p.numel() for p in weights(model)])
    np.testing.assert_allclose(norms_of(recorded)[STEPS:], np.array(seen[STEPS:]) * np.sqrt(entries), rtol=EXACT)
    assert entry(recorded)["read_by"] == ["numbers"]
    assert "first moment q7" in entry(recorded)["spectrum_of"][0]


def test_nothing_is_taken_for_a_moment_where_there_are_only_decoys(mlp: Make, tmp_path: Path, read: Read) -> None:
    model = mlp(dropout=0.0)
    seen = run(Odd(weights(model), *DECOYS), model, tmp_path / "run.zarr", lambda p: rms(p.grad))  # type: ignore[arg-type]
    recorded = read(tmp_path / "run.zarr")
    assert np.isnan(recorded["update"]["momentum_rms"].values).all()
    assert (recorded["second_moment"]["second_moment_form"].values == -1).all()
    entries = np.array([p.numel() for p in weights(model)])
    np.testing.assert_allclose(norms_of(recorded), np.array(seen) * np.sqrt(entries), rtol=EXACT)
    assert entry(recorded)["read_by"] == ["nothing"]
    assert entry(recorded)["spectrum_of"][0].startswith("gradient; no first moment was found")


def test_optimizer_without_any_state(mlp: Make, tmp_path: Path, read: Read) -> None:
    model = mlp(dropout=0.0)
    optimizer = Odd(weights(model), lr=0.01)
    before = [p.detach().clone() for p in weights(model)]
    seen = run(optimizer, model, tmp_path / "run.zarr", lambda p: rms(p.grad))  # type: ignore[arg-type]
    assert not optimizer.state  # looking did not make entries
    update = read(tmp_path / "run.zarr")["update"]
    np.testing.assert_allclose(update["grad_rms"].values, seen, rtol=EXACT)
    assert update["update_rms"].values == pytest.approx(0.01, rel=1e-5)
    assert not any(torch.equal(p, old) for p, old in zip(weights(model), before, strict=True))


def test_factors_under_odd_names_are_multiplied_out(mlp: Make, tmp_path: Path, read: Read) -> None:
    """The mean of r cᵀ/mean(r) is the mean of c, by hand."""
    model = mlp(dropout=0.0)
    halves = (average("k8", torch.square, 0.95, lambda v: v.mean(1)), average("k9", torch.square, 0.95, lambda v: v.mean(0)))
    optimizer = Odd(weights(model), *DECOYS, *halves)
    seen = run(optimizer, model, tmp_path / "run.zarr", lambda p: float(optimizer.state[p]["k9"].double().mean()))
    recorded = read(tmp_path / "run.zarr")
    second = recorded["second_moment"]
    assert {second.attrs["forms"][i] for i in second["second_moment_form"].values[STEPS:].flat} == {"row_col"}
    assert (second["second_moment_form"].values[:STEPS] == -1).all()
    np.testing.assert_allclose(second["second_moment_mean"].values[STEPS:], seen[STEPS:], rtol=1e-6)  # float32 products
    assert "second moment k8 and k9 after the step (row_col)" in entry(recorded)["spectrum_of"][0]


def test_a_name_is_used_from_the_first_record_on_and_checked_later(mlp: Make, tmp_path: Path, read: Read) -> None:
    model = mlp(dropout=0.0)
    keeps = (average("exp_avg"), average("exp_avg_sq", torch.square, 0.99), *DECOYS)
    optimizer = Odd(weights(model), *keeps)
    short = run(optimizer, model, tmp_path / "short.zarr", lambda p: rms(optimizer.state[p]["exp_avg"]), steps=2)
    update = read(tmp_path / "short.zarr")
    np.testing.assert_allclose(update["update"]["momentum_rms"].values, short, rtol=EXACT)
    assert entry(update)["read_by"] == ["names in the state"]
    assert "where the state names one" in entry(update)["spectrum_of"][0]

    model = mlp(dropout=0.0)
    optimizer = Odd(weights(model), *keeps)
    seen = run(optimizer, model, tmp_path / "run.zarr", lambda p: rms(optimizer.state[p]["exp_avg"]))
    recorded = read(tmp_path / "run.zarr")
    np.testing.assert_allclose(recorded["update"]["momentum_rms"].values, seen, rtol=EXACT)
    assert entry(recorded)["read_by"] == ["names in the state"]
    text = entry(recorded)["spectrum_of"][0]
    assert "first moment exp_avg after the step, found by names in the state (cosine 1.00" in text
    assert "second moment exp_avg_sq after the step, found by names in the state (correlation 1.00" in text


# Ways of stepping


def test_gradients_that_are_born_in_a_closure(mlp: Make, tmp_path: Path, read: Read) -> None:
    model = mlp(dropout=0.0)
    optimizer = Odd(weights(model), average("q7"), *DECOYS)
    with attach(optimizer, model, tmp_path / "run.zarr", every=STEPS + 1, on_error="raise"):
        for step in range(STEPS + 1):

            def closure(step: int = step) -> Tensor:
                optimizer.zero_grad()
                return backward(model, step)

            optimizer.step(closure)
    update = read(tmp_path / "run.zarr")["update"]
    np.testing.assert_allclose(update["momentum_rms"].values, [[rms(optimizer.state[p]["q7"]) for p in weights(model)]], rtol=EXACT)


def test_a_step_that_calls_its_base_counts_its_gradients_once(mlp: Make, tmp_path: Path, read: Read) -> None:
    class Careful(AdamW):
        def step(self, closure: Any = None) -> Any:
            return super().step(closure)

    AdamW([nn.Parameter(torch.ones(1))])  # the base's `step` runs hooks once an instance of the base was made
    model = mlp(dropout=0.0)
    optimizer = Careful(weights(model), lr=1e-3)
    seen = run(optimizer, model, tmp_path / "run.zarr", lambda p: rms(optimizer.state[p]["exp_avg"]))
    recorded = read(tmp_path / "run.zarr")
    np.testing.assert_allclose(recorded["update"]["momentum_rms"].values, seen, rtol=EXACT)
    assert entry(recorded)["read_by"] == ["names in the state"]


# The recorder


def test_nothing_is_done_for_a_class_in_the_table(mlp: Make) -> None:
    """And nothing after the conclusion, which `identified` asserts."""
    (known,) = watch([AdamW(weights(mlp()))])
    assert known.identification is None


def test_conclusion_is_written_where_the_training_is_described(mlp: Make, tmp_path: Path, read: Read) -> None:
    """Of a run that is continued, what was said of the earlier training stays; an optimizer that came later has an entry beside it."""
    model = mlp(dropout=0.0)
    run(Odd(weights(model), average("q7")), model, tmp_path / "run.zarr", lambda p: None)
    optimizer, later = Odd(weights(model), average("r9")), Odd(weights(mlp(seed=1)), average("u3"))
    with attach(optimizer, model, tmp_path / "run.zarr", every=1, on_error="raise") as recorder:
        recorder.watch(later)
        for step in range(STEPS):
            for p in (*weights(model), *later.param_groups[0]["params"]):
                p.grad = torch.randn(p.shape, generator=torch.Generator().manual_seed(step))
            optimizer.step()
            later.step()
    attrs = read(tmp_path / "run.zarr").attrs
    texts = [attrs["optimizers"][0], *attrs["continued"][0]["optimizers"]]
    assert [next(key for key in ("q7", "r9", "u3") if key in text["spectrum_of"][0]) for text in texts] == ["q7", "r9", "u3"]
    assert [text["label"] for text in texts] == ["Odd", "Odd", "Odd#2"]


class Hostile(dict):  # type: ignore[type-arg]
    """A state that cannot be looked through."""

    def items(self) -> Iterator[Any]:  # type: ignore[override]
        raise RuntimeError("no looking")


def test_a_failing_identification_is_reported_once_and_never_reaches_training(
    mlp: Make, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    def train(store: Path | None) -> list[Tensor]:
        model = mlp(dropout=0.0)
        optimizer = Odd(weights(model), put("exp_avg", lambda g, w: Hostile(a=g.clone())))
        recorder = attach(optimizer, model, store, every=100) if store else None
        for step in range(2 * STEPS):
            optimizer.zero_grad()
            backward(model, step)
            optimizer.step()
        if recorder is not None:
            recorder.close()
            assert (recorder.errors, recorder.step) == (1, 2 * STEPS)
        return list(model.parameters())

    with caplog.at_level(logging.WARNING, "optiscope"):
        recorded = train(tmp_path / "run.zarr")
    assert sum("no looking" in message for message in caplog.messages) == 1
    assert all(torch.equal(a, b) for a, b in zip(recorded, train(None), strict=True))


@pytest.mark.parametrize("closure", [True, False])
@pytest.mark.parametrize("keeps", [(), (average("q7"), average("exp_avg_sq", torch.square), *DECOYS)], ids=["no state", "state"])
def test_training_is_bitwise_the_same(keeps: tuple[Keep, ...], closure: bool, mlp: Make, tmp_path: Path) -> None:
    def train(store: Path | None) -> tuple[Any, ...]:
        model = mlp()  # with dropout, which draws from the global generator
        optimizer = Odd(weights(model), *keeps)
        recorder = attach(optimizer, model, store, every=3, on_error="raise") if store else None
        torch.manual_seed(1)
        gradients: list[Tensor] = []
        for step in range(STEPS + 4):

            def loss(step: int = step) -> Tensor:
                optimizer.zero_grad()
                return backward(model, step)

            if closure:
                optimizer.step(loss)
            else:
                loss()
                optimizer.step()
            gradients += [p.grad.clone() for p in model.parameters()]  # type: ignore[union-attr]
        if recorder is not None:
            recorder.close()
            assert recorder.overhead_seconds > 0
        state = [value for entry in optimizer.state.values() for value in entry.values() if isinstance(value, Tensor)]
        return (*model.parameters(), *gradients, *state, torch.get_rng_state())

    plain, recorded = train(None), train(tmp_path / "run.zarr")
    assert len(plain) == len(recorded)
    assert all(torch.equal(a, b) for a, b in zip(plain, recorded, strict=True))
