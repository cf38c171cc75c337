"""What the names in an optimizer's state are taken to mean, and which tensors can be read as they are."""

from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from optiscope.hooks.adapters import Reading
from optiscope.hooks.adapters.names import (
    Source,
    forms_of,
    in_shape,
    is_encoding,
    key_of,
    momentum_reader,
    named_momenta,
    named_second_moments,
    read_second_moment,
    second_moment_reader,
    spelled,
    tensors_in,
)

SHAPE = (6, 4)


def full() -> Tensor:
    return torch.arange(1.0, 25.0).reshape(SHAPE)


def reading(state: dict[Any, Any]) -> Reading:
    p = nn.Parameter(torch.zeros(SHAPE))
    return Reading(None, p, p.detach().clone(), {}, state)


def test_tensors_in_nested_containers_have_paths() -> None:
    a, b, c, d = (torch.tensor(float(i)) for i in range(4))
    state = {"exp_avg": a, 0: {"deep": [b, "no tensor", (c,)]}, "block_0": {"filtered_grad": d}, "step": 3}
    assert {spelled(path): float(tensor) for path, tensor in tensors_in(state).items()} == {
        "exp_avg": 0,
        "0.deep.0": 1,
        "block_0.filtered_grad": 3,
    }


@pytest.mark.parametrize(
    ("path", "key"),
    [
        (("exp_avg",), "exp_avg"),
        ((0, "update_by_adam_exp_avg_sq_0"), "update_by_adam_exp_avg_sq"),
        (("momentum_buffer", 0.99), "momentum_buffer"),
        (("GG", 1), "gg"),
        (("exp_avg::quantized",), "exp_avg"),
        ((3,), ""),
    ],
)
def test_key_is_the_last_word_without_number_or_format(path: tuple[Any, ...], key: str) -> None:
    assert key_of(path) == key


# Every spelling was met in a library: torch, pytorch_optimizer, heavyball, Distributed Shampoo, microsoft/dion, adam-mini, sophia-opt.
@pytest.mark.parametrize(
    "key",
    ["exp_avg", "momentum_buffer", "momentum", "moment1", "moment1_buffer", "m", "mu", "mom", "moments", "filtered_grad", "exp_avg_grad",
     "grad_avg", "avg_grad", "mov_avg_grad", "pos_momentum", "update_by_nadam_exp_avg_0", "nesterov_ema_momentum_2"],
)  # fmt: skip
def test_names_of_first_moments(key: str) -> None:
    assert named_momenta({(key,): full()}) == [(key,)]


@pytest.mark.parametrize(
    "key",
    ["exp_avg_sq", "exp_avg_slow", "exp_avg_diff", "exp_avg_lr", "z", "p0", "s", "slow_params", "slow_buffer", "last_grad", "previous_grad", "prev",
     "second_momentum", "second_momentum_buffer", "hessian_moment", "Q", "step", "mu_product", "max_exp_avg_sq", "update", "old_p"],
)  # fmt: skip
def test_names_of_no_first_moment(key: str) -> None:
    assert named_momenta({(key,): full()}) == []


def test_whole_names_come_before_endings() -> None:
    assert named_momenta({("neg_exp_avg",): full(), ("exp_avg",): full()}) == [("exp_avg",), ("neg_exp_avg",)]


@pytest.mark.parametrize(
    ("key", "shape", "form"),
    [
        ("exp_avg_sq", SHAPE, "full"),
        ("exp_avg_var", SHAPE, "full"),
        ("exp_inf", SHAPE, "full"),
        ("square_avg", SHAPE, "full"),
        ("sum", SHAPE, "full"),
        ("v", (24,), "full"),
        ("scale_by_soap_exp_avg_sq_2", (1, 6, 4), "full"),
        ("hessian", SHAPE, "hessian"),
        ("exp_hessian_diag_sq", SHAPE, "hessian"),
        ("exp_avg_sq", (6, 1), "row"),
        ("nu", (6,), "row"),
        ("nu", (1, 4), "block"),
        ("vmean", (3, 1), "block"),
        ("vmean", (), "scalar"),
        ("v_mean", (1,), "scalar"),
        ("exp_avg_sq", (6, 2), None),
        ("exp_avg_sq::scales", (6,), None),
        ("exp_avg", SHAPE, None),
    ],
)
def test_names_of_second_moments(key: str, shape: tuple[int, ...], form: str | None) -> None:
    found = named_second_moments({(key,): torch.ones(shape)}, SHAPE)
    assert found == ([] if form is None else [Source(((key,),), form)])


def test_maximum_of_amsgrad_comes_first() -> None:
    tensors: dict[tuple[Any, ...], Tensor] = {("exp_avg_sq",): full(), ("max_exp_avg_sq",): full()}
    assert named_second_moments(tensors, SHAPE)[0].paths == (("max_exp_avg_sq",),)


@pytest.mark.parametrize(
    ("rows", "columns", "row_shape", "column_shape"),
    [("exp_avg_sq_row", "exp_avg_sq_col", (6,), (4,)), ("row_var", "col_var", (6, 1), (1, 4))],
)
def test_factors_are_multiplied_out(rows: str, columns: str, row_shape: tuple[int, ...], column_shape: tuple[int, ...]) -> None:
    """Of a matrix of rank one the factors lose nothing: V = u vᵀ comes back from its means."""
    u, v = np.linspace(1, 2, 6), np.linspace(3, 5, 4)
    whole = torch.tensor(np.outer(u, v))
    tensors: dict[tuple[Any, ...], Tensor] = {
        ("exp_avg",): full(),
        (rows,): whole.mean(1).reshape(row_shape),
        (columns,): whole.mean(0).reshape(column_shape),
    }
    (source,) = named_second_moments(tensors, SHAPE)
    assert (source.paths, source.form) == (((rows,), (columns,)), "row_col")
    read = read_second_moment(source, tensors, SHAPE)
    assert read is not None
    torch.testing.assert_close(read.values, whole, rtol=1e-14, atol=0)


def test_only_plain_tensors_of_the_shape_are_read() -> None:
    class Encoded(Tensor):
        """Looks like a tensor of the shape, as 8-bit states do."""

    assert in_shape(full(), SHAPE) is not None
    assert torch.equal(in_shape(full().reshape(1, 6, 4), SHAPE), full())  # type: ignore[arg-type]
    assert torch.equal(in_shape(full().flatten(), SHAPE), full())  # type: ignore[arg-type]
    assert in_shape(full().bfloat16(), SHAPE) is not None
    encoded = full().as_subclass(Encoded)
    for other in (None, full().mT, full()[:3], full().to(torch.uint8), full().to(torch.complex64), full().to_sparse(), encoded):
        assert in_shape(other, SHAPE) is None
    assert forms_of(encoded, SHAPE) == ()
    assert is_encoding((0, "exp_avg_sq::scales"))
    assert not is_encoding((0, "scale_by_soap_exp_avg_sq_2"))


def test_one_dimension_of_a_square_may_be_rows_or_columns() -> None:
    assert forms_of(torch.ones(5), (5, 5)) == ("row", "block")
    assert forms_of(torch.ones(5, 1), (5, 5)) == ("row",)
    assert forms_of(torch.ones(1, 5), (5, 5)) == ("block",)


def test_readers_look_into_every_state_anew() -> None:
    momentum, second = momentum_reader(), second_moment_reader()
    nested = reading({0: {"a_exp_avg_1": full(), "a_exp_avg_sq_1": full()}})
    assert torch.equal(momentum(nested), full())  # type: ignore[arg-type]
    read = second(nested)
    assert read is not None
    assert (read.form, float(read.values.mean())) == ("full", 12.5)
    for empty in ({}, {"step": torch.tensor(1.0)}, {"exp_avg": torch.ones(6, 2)}):
        assert momentum(reading(empty)) is None
        assert second(reading(empty)) is None


def test_a_signed_tensor_is_no_second_moment() -> None:
    assert second_moment_reader()(reading({"v": full() - 12})) is None
    read = second_moment_reader()(reading({"hessian": full() - 12}))  # an estimate of a Hessian may well be negative
    assert read is not None
    assert read.form == "hessian"


def test_chosen_paths_come_first_and_rejected_names_last() -> None:
    state = {"exp_avg": full(), "q": 2 * full()}
    assert torch.equal(momentum_reader([("q",)])(reading(state)), 2 * full())  # type: ignore[arg-type]
    assert torch.equal(momentum_reader([("absent",)])(reading(state)), full())  # type: ignore[arg-type]
    assert momentum_reader((), {("exp_avg",)})(reading(state)) is None
