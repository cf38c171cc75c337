"""What is found in the state of a class that is not in the table is what its optimizers really keep.

The optimizers are the test's own, so what they keep is known.
"""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from unknown_class import DECOYS, EXACT, Keep, Make, Odd, Read, average, entry, identified, put, readings, rms, slow, weights

from optiscope.hooks import attach
from optiscope.hooks.adapters import Reading
from optiscope.hooks.adapters.identification import STEPS, Identification

# The first moment


@pytest.mark.parametrize("first", [True, False], ids=["before the decoys", "after them"])
@pytest.mark.parametrize(
    ("beta", "keep"),
    [
        (0.9, torch.clone),
        (0.7, torch.clone),
        (0.99, torch.clone),
        (0.9, torch.neg),
        (0.9, lambda m: 1e-20 * m),  # its squares are no float32
        (0.95, lambda m: m.bfloat16()),
        (0.95, lambda m: m.flatten()),
        (0.95, lambda m: {"deep": [m.unsqueeze(0)]}),
    ],
    ids=["0.9", "0.7", "0.99", "negative", "tiny", "bfloat16", "flat", "nested"],
)
def test_momentum_under_an_odd_name_is_found_among_decoys(beta: float, keep: Any, first: bool, mlp: Make) -> None:
    model = mlp(dropout=0.0)
    keeps = (average("q7", beta=beta, keep=keep), *DECOYS)
    optimizer = Odd(weights(model), *(keeps if first else keeps[::-1]))
    adapter = identified(optimizer, model)
    for reading in readings(optimizer, model):
        kept = reading.state["q7"]
        kept = kept["deep"][0] if isinstance(kept, dict) else kept
        found = adapter.momentum(reading)
        assert found is not None
        assert (found.shape, found.dtype) == (reading.parameter.shape, kept.dtype)
        assert torch.equal(found.flatten(), kept.flatten())
    assert adapter.read_by == "numbers"
    assert "first moment q7" in adapter.spectrum_of
    assert "not in the adapter table" in adapter.spectrum_of


def test_momentum_of_weights_that_begin_at_zero(tmp_path: Path, read: Read) -> None:
    """As LoRA's second factor: the weights are then themselves along a sum of gradients, and a slow copy is along the weights."""
    p = nn.Parameter(torch.zeros(16, 12))

    def descend(state: dict[str, Any], gradient: Tensor, weight: Tensor) -> None:
        weight.sub_(0.1 * state["q7"])

    optimizer = Odd([p], slow, average("q7"), descend, lr=0.0)
    generator = torch.Generator().manual_seed(0)
    direction = torch.randn(p.shape, generator=generator)
    with attach(optimizer, None, tmp_path / "run.zarr", every=STEPS, on_error="raise"):
        for _ in range(STEPS):
            p.grad = direction + torch.randn(p.shape, generator=generator)
            optimizer.step()
    cosine = torch.nn.functional.cosine_similarity(p.detach().flatten(), optimizer.state[p]["q7"].flatten(), dim=0)
    assert cosine < -0.9  # the trap: by this alone the momentum would be a copy of the weights
    assert "first moment q7" in entry(read(tmp_path / "run.zarr"))["spectrum_of"][0]


# The second moment


@pytest.mark.parametrize(
    ("keep", "form"),
    [
        (torch.clone, "full"),
        (torch.sqrt, "full"),
        (lambda v: 1e-25 * v, "full"),  # its squares are no float32
        (lambda v: v.mean(1), "row"),
        (lambda v: v.mean(1, keepdim=True), "row"),
        (lambda v: v.mean(0), "block"),
        (lambda v: 7 * v.sum(0, keepdim=True), "block"),
    ],
    ids=["full", "root", "tiny", "rows", "rows, kept as a column", "columns", "columns, kept as a row"],
)
def test_second_moment_under_an_odd_name_is_found_in_its_form(keep: Any, form: str, mlp: Make) -> None:
    model = mlp(dropout=0.0)
    optimizer = Odd(weights(model), *DECOYS, average("k8", torch.square, 0.95, keep))
    adapter = identified(optimizer, model)
    for reading in readings(optimizer, model):
        found = adapter.second_moment(reading)
        assert found is not None
        assert found.form == form
        assert torch.equal(found.values, reading.state["k8"])
    assert adapter.read_by == "numbers"
    assert "second moment k8" in adapter.spectrum_of


# Names that mislead, and those that do not


def rotated(m: Tensor) -> Tensor:
    """In a basis of its own, as SOAP keeps it."""
    q, _ = torch.linalg.qr(torch.randn(len(m), len(m), generator=torch.Generator().manual_seed(0)))
    return q @ m


@pytest.mark.parametrize(
    ("misleading", "why"),
    [
        (average("momentum", keep=rotated), "does not follow the gradients"),
        (put("momentum", lambda g, w: w.detach().clone()), "does not follow the gradients (cosine 0.00"),
        (put("momentum", lambda g, w: torch.zeros_like(g)), "does not follow the gradients (cosine 0.00"),
        (average("momentum", keep=lambda m: m[:2]), "is not kept in the parameter's shape and format"),
        (average("momentum", keep=lambda m: (m * 1e6).char()), "is not kept in the parameter's shape and format"),
    ],
    ids=["rotated", "weights", "zeros", "projected", "quantised"],
)
@pytest.mark.parametrize("another", [True, False], ids=["beside another", "alone"])
def test_a_name_that_the_numbers_contradict(misleading: Keep, why: str, another: bool, mlp: Make) -> None:
    model = mlp(dropout=0.0)
    optimizer = Odd(weights(model), misleading, *([average("q7")] if another else []))
    adapter = identified(optimizer, model)
    for reading in readings(optimizer, model):
        found = adapter.momentum(reading)
        assert (found is not None) is another
        assert found is None or torch.equal(found, reading.state["q7"])
    assert adapter.read_by == ("numbers" if another else "nothing")
    assert f"momentum is named like a first moment but {why}" in adapter.spectrum_of


def test_moments_found_in_different_ways_are_told_apart(mlp: Make) -> None:
    model = mlp(dropout=0.0)
    adapter = identified(Odd(weights(model), average("momentum_buffer"), average("k8", torch.square)), model)
    assert adapter.read_by == "names in the state (first moment), numbers (second moment)"


def test_a_momentum_that_remembers_gradients_from_before_is_kept(mlp: Make, tmp_path: Path, read: Read) -> None:
    """After a thousand steps of noise the momentum has little to do with the next eight gradients, and yet is one."""
    model = mlp(dropout=0.0)
    optimizer = Odd(weights(model), average("momentum", beta=0.999))
    generator = torch.Generator().manual_seed(0)

    def noise() -> None:
        for p in weights(model):
            p.grad = torch.randn(p.shape, generator=generator)
        optimizer.step()

    for _ in range(1000):
        noise()
    with attach(optimizer, model, tmp_path / "run.zarr", every=1, on_error="raise"):
        for _ in range(STEPS + 1):
            noise()
    recorded = read(tmp_path / "run.zarr")
    assert entry(recorded)["read_by"] == ["names in the state"]
    np.testing.assert_allclose(
        recorded["update"]["momentum_rms"].values[-1], [rms(optimizer.state[p]["momentum"]) for p in weights(model)], rtol=EXACT
    )


def test_an_average_of_gradients_divided_by_their_size_is_one(mlp: Make) -> None:
    """ADOPT's first steps: divided coordinate by coordinate, entries follow the divisor and only signs the gradients."""

    def divided(g: Tensor) -> Tensor:
        return g * torch.randn(g.shape, generator=torch.Generator().manual_seed(0)).mul(4).exp()

    model = mlp(dropout=0.0)
    optimizer = Odd(weights(model), average("plain"), average("exp_avg", divided))
    adapter = identified(optimizer, model)
    for p in weights(model):
        pair = (optimizer.state[p][key].flatten() for key in ("plain", "exp_avg"))
        assert abs(torch.nn.functional.cosine_similarity(*pair, dim=0)) < 0.35  # the trap: an average of one is none of the other
    assert "first moment exp_avg after the step, found by names" in adapter.spectrum_of


def test_one_matrix_that_looks_right_by_chance_does_not_decide() -> None:
    parameters = [nn.Parameter(torch.ones(9, 8 + i)) for i in range(3)]

    def mostly_rotated(state: dict[str, Any], gradient: Tensor, weight: Tensor) -> None:
        average("momentum", keep=torch.clone if weight is parameters[1] else rotated)(state, gradient, weight)

    optimizer, generator, adapter = Odd(parameters, mostly_rotated), torch.Generator().manual_seed(0), None
    identification = Identification(optimizer)
    for _ in range(STEPS):
        for p in parameters:
            p.grad = torch.randn(p.shape, generator=generator)
        identification.see_gradients()
        optimizer.step()
        adapter = identification.after_step()
    assert adapter is not None
    assert adapter.read_by == "nothing"


# Ways of stepping


def test_groups_of_two_kinds() -> None:
    """As Muon with an Adam of its own: every group is probed, even beside one of many small matrices, and read where it keeps its moment."""
    many = [nn.Parameter(torch.ones(9, 8)) for _ in range(6)]
    one = nn.Parameter(torch.ones(12, 12))

    def by_kind(state: dict[str, Any], gradient: Tensor, weight: Tensor) -> None:
        average("q7" if weight is one else "r9")(state, gradient, weight)

    optimizer = Odd([{"params": many}, {"params": [one]}], by_kind, *DECOYS)
    identification, generator = Identification(optimizer), torch.Generator().manual_seed(0)
    for _ in range(STEPS):
        for p in (*many, one):
            p.grad = torch.randn(p.shape, generator=generator)
        identification.see_gradients()
        optimizer.step()
        adapter = identification.after_step()
    assert adapter is not None
    for p, key in (*((p, "r9") for p in many), (one, "q7")):
        found = adapter.momentum(Reading(optimizer, p, p.detach(), {}, optimizer.state[p]))
        assert found is not None
        assert torch.equal(found, optimizer.state[p][key])


def test_an_optimizer_that_throws_its_gradients_away(mlp: Make) -> None:
    def spoil(state: dict[str, Any], gradient: Tensor, weight: Tensor) -> None:
        gradient.zero_()

    model = mlp(dropout=0.0)
    assert "first moment q7" in identified(Odd(weights(model), average("q7"), spoil), model).spectrum_of


def test_gradients_with_infinities_are_left_out() -> None:
    """A GradScaler hands a fused optimizer a scaled gradient, with infinities at a step that it is told to skip."""
    p = nn.Parameter(torch.randn(9, 8, generator=torch.Generator().manual_seed(0)))
    optimizer = Odd([p], average("q7"))
    identification, generator, concluded = Identification(optimizer), torch.Generator().manual_seed(1), None
    for step in range(STEPS + 2):
        gradient = torch.randn(9, 8, generator=generator)
        skipped = step in (0, 4)
        scale = 64.0 ** (step % 3)
        optimizer.grad_scale = torch.tensor(scale)  # type: ignore[attr-defined]
        p.grad = gradient.fill_(float("inf")) if skipped else scale * gradient
        identification.see_gradients()
        if not skipped:
            p.grad = gradient
            optimizer.step()
        assert concluded is None
        concluded = identification.after_step()
    assert concluded is not None
    assert "first moment q7" in concluded.spectrum_of
    assert concluded.read_by == "numbers"
