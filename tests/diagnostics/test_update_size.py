"""Sizes of updates: closed forms, and the rounding noise of weights as it really is."""

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from optiscope.diagnostics.quantities.update_size import ADAMW_RMS, reading_noise, rms, sizes, update_without_decay


def test_rms_by_hand():
    assert rms(np.array([[3.0, 4.0]])) == pytest.approx(np.sqrt(12.5))
    assert rms(np.full((5, 7), -2.0)) == 2
    assert rms(np.zeros((3, 3))) == 0
    assert np.isnan(rms(np.empty((0, 3))))


@given(st.integers(1, 20), st.integers(1, 20), st.integers(0, 1000))
def test_rms_is_the_frobenius_norm_per_entry(rows, cols, seed):
    array = np.random.default_rng(seed).standard_normal((rows, cols))
    assert rms(array) == pytest.approx(np.linalg.norm(array) / np.sqrt(rows * cols), rel=1e-14)
    assert rms(array.T) == pytest.approx(rms(array), rel=1e-14)


@pytest.mark.parametrize("scale", [1e-30, 1e30])
def test_rms_sums_in_float64(scale):
    array = np.full((4, 5), scale, dtype=np.float32)
    # The trap: the square of a float32 is 0 or infinite here.
    with np.errstate(over="ignore", under="ignore"):
        assert np.sqrt(np.mean(array * array)) in (0, np.inf)
    assert rms(array) == pytest.approx(scale, rel=1e-7)


def test_rms_of_half_precision_does_not_overflow():
    assert rms(np.full((300, 300), 300, dtype=np.float16)) == 300


@given(st.floats(1e-5, 1), st.floats(0, 1), st.integers(0, 1000))
def test_decay_and_learning_rate_are_taken_out(lr, decay, seed):
    rng = np.random.default_rng(seed)
    before, update = rng.standard_normal((3, 4)), rng.standard_normal((3, 4))
    after = before - lr * decay * before - lr * update
    # Rounding of W at 1e-16, divided by η.
    assert update_without_decay(before, after, lr, decay) == pytest.approx(update, abs=1e-14 / lr)


def test_a_step_of_decay_alone_is_no_update():
    before = np.random.default_rng(0).standard_normal((3, 4))
    assert update_without_decay(before, before * (1 - 0.1 * 0.25), 0.1, 0.25) == pytest.approx(0, abs=1e-15)


@pytest.mark.parametrize("decay", [0.0, 0.1])
@pytest.mark.parametrize("kind", [np.float16, np.float32, np.float64])
def test_sizes_are_those_of_whole_arrays_in_float64(kind, decay):
    rng = np.random.default_rng(0)
    before = rng.standard_normal((300, 170)).astype(kind)  # four panels, the last one cut short
    after = (before - 0.01 * rng.standard_normal(before.shape)).astype(kind)
    found = sizes(before, after, 0.02, decay)
    w, moved = before.astype(np.float64), before.astype(np.float64) - after.astype(np.float64)
    update = (moved - 0.02 * decay * w) / 0.02
    for value, array in ((found.weight, w), (found.applied, moved), (found.update, update)):
        assert value == pytest.approx(np.linalg.norm(array) / np.sqrt(array.size), rel=1e-13)
        assert rms(array) == pytest.approx(value, rel=1e-13)
    assert update_without_decay(before, after, 0.02, decay) == pytest.approx(update, rel=1e-12, abs=1e-14)
    halved = update_without_decay(before, after, 0.02, decay, divided_by=2.0, dtype=np.float32)
    assert halved.dtype == np.float32
    assert halved == pytest.approx(update / 2, rel=1e-7, abs=1e-12)


def test_no_learning_rate_gives_nan():
    assert np.isnan(sizes(np.ones((2, 3)), np.ones((2, 3)), 0.0, 0.1).update)
    assert np.isnan(update_without_decay(np.ones((2, 3)), np.ones((2, 3)), 0.0, 0.1)).all()


def test_adamw_moves_by_about_a_fifth_of_its_learning_rate():
    # What AdaMuon and Moonlight align to: the RMS of m̂/√v̂ of white noise at (0.9, 0.999) is √((1 − 0.9)/(1 + 0.9)) = .2294.
    weight = torch.nn.Parameter(torch.zeros(200, 200))
    optimizer = torch.optim.AdamW([weight], lr=1e-3, weight_decay=0.0)
    generator = torch.Generator().manual_seed(0)
    for _ in range(200):
        weight.grad = torch.randn(200, 200, generator=generator)
        before = weight.detach().double().numpy()
        optimizer.step()
    found = rms(update_without_decay(before, weight.detach().double().numpy(), 1e-3, 0.0))
    assert found == pytest.approx(0.2294, abs=0.01)
    assert found == pytest.approx(ADAMW_RMS, rel=0.2)


@pytest.mark.parametrize(("dtype", "unit_roundoff", "update"), [(torch.bfloat16, 2.0**-8, 0.1), (torch.float32, 2.0**-24, 1e-4)])
def test_reading_noise_is_the_error_of_the_difference(dtype, unit_roundoff, update):
    generator = torch.Generator().manual_seed(0)
    before = torch.randn(300, 300, generator=generator).to(dtype).double().numpy()
    intended = update * torch.randn(300, 300, generator=generator, dtype=torch.float64).numpy()
    stored = torch.from_numpy(before - intended).to(dtype).double().numpy()
    noise = rms((before - stored) - intended) / rms(intended)
    # Measured: 1.00 (bfloat16), 0.997 (float32) of the prediction.
    assert reading_noise(rms(before), rms(intended), unit_roundoff) == pytest.approx(noise, rel=0.03)


def test_no_movement_is_all_noise():
    assert reading_noise(1.0, 0.0, 2.0**-24) == np.inf
    assert reading_noise(0.0, 0.0, 2.0**-24) == np.inf
