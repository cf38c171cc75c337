"""Rows for libraries that cannot be installed here: under which name they are found, and what they leave unread rather than guess."""

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from contract.standins import SOAP, DistributedShampoo, WeightDecayType
from contract.standins_muon import YOU, AdaptiveMuon, Dion, DionMuon, DionNorMuon, MarsM, NvidiaMuon, five_steps
from torch import Tensor, nn

from optiscope.hooks.adapters import Adapter, Reading, adapter_for, class_name

FULL_NAMES = {
    DistributedShampoo: "distributed_shampoo.distributed_shampoo.DistributedShampoo",
    Dion: "dion.dion.Dion",
    DionMuon: "dion.muon.Muon",
    DionNorMuon: "dion.normuon.NorMuon",
    NvidiaMuon: "emerging_optimizers.orthogonalized_optimizers.muon.Muon",
    AdaptiveMuon: "emerging_optimizers.orthogonalized_optimizers.adaptive_muon.AdaptiveMuon",
    SOAP: "soap.SOAP",
    MarsM: "optimizers.mars_m.MARS_M",
}
FORMS = {DistributedShampoo: "preconditioner", DionNorMuon: "of_orthogonalised", AdaptiveMuon: "of_orthogonalised", SOAP: "rotated"}


def gradient(shape: tuple[int, ...], seed: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def stepped(optimizer: Any, w: Tensor, **changed: Any) -> tuple[Adapter, Reading]:
    """Two steps, and what a reader is given after the second; `changed` settings of the group."""
    before = w.detach().clone()
    for seed in (1, 2):
        before.copy_(w.detach())
        w.grad = gradient(tuple(w.shape), seed)
        given = w.grad.clone()
        optimizer.step()
    group = {**optimizer.param_groups[0], **changed}
    adapter = adapter_for(optimizer, group)
    assert adapter is not None
    return adapter, Reading(optimizer, w, before, group, optimizer.state[w], given)


def weight(*shape: int) -> nn.Parameter:
    return nn.Parameter(gradient(shape or (5, 7), 0))


@pytest.mark.parametrize(("cls", "name"), FULL_NAMES.items(), ids=lambda value: value if isinstance(value, str) else "")
def test_row_is_found_by_the_librarys_own_name(cls: Any, name: str) -> None:
    w = weight()
    optimizer = cls([w])
    assert class_name(cls) == name
    adapter, reading = stepped(optimizer, w)
    assert adapter.read_by == "table"
    second = adapter.second_moment(reading)
    assert (None if second is None else second.form) == FORMS.get(cls)


# Distributed Shampoo.


@pytest.mark.parametrize(("kind", "of_lambda"), [("L2", 0.0), ("DECOUPLED", 1.0), ("CORRECTED", 0.25), ("INDEPENDENT", 25.0)])
def test_shampoos_four_kinds_of_decay(kind: str, of_lambda: float) -> None:
    """Of λ, with η 0.01 and its peak 0.04: what the weights have lost without a gradient, over η and W; nothing where it is coupled."""
    w = weight()
    optimizer = DistributedShampoo([w], lr=0.01, peak_lr=0.04, weight_decay=0.5, weight_decay_type=WeightDecayType[kind])
    adapter, reading = stepped(optimizer, w)
    assert adapter.decoupled_decay(reading) == pytest.approx(0.5 * of_lambda)
    if of_lambda:
        other = weight()
        start = other.detach().clone()
        optimizer = DistributedShampoo([other], lr=0.01, peak_lr=0.04, weight_decay=0.5, weight_decay_type=WeightDecayType[kind])
        other.grad = torch.zeros_like(other)
        optimizer.step()
        torch.testing.assert_close((start - other.detach()) / 0.01, 0.5 * of_lambda * start, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(("settings", "decay"), [({"use_decoupled_weight_decay": True}, 0.5), ({"use_decoupled_weight_decay": False}, 0.0)])
def test_shampoos_decay_in_older_versions(settings: dict[str, bool], decay: float) -> None:
    w = weight()
    adapter, reading = stepped(DistributedShampoo([w], weight_decay=0.5), w, **settings)
    reading.group = {key: value for key, value in reading.group.items() if key != "weight_decay_type"}
    assert adapter.decoupled_decay(reading) == decay


@pytest.mark.parametrize("changed", [{"iterate_averaging_config": object()}, {"weight_decay_type": SimpleNamespace(name="ANOTHER")}])
def test_shampoos_decay_is_missing_where_it_is_another(changed: dict[str, Any]) -> None:
    w = weight()
    adapter, reading = stepped(DistributedShampoo([w], weight_decay=0.5), w, **changed)
    assert adapter.decoupled_decay(reading) != adapter.decoupled_decay(reading)
    assert adapter.decoupled_decay(stepped(DistributedShampoo([w], weight_decay=0.0), w, **changed)[1]) == 0


def test_shampoos_whole_factors_say_the_same_as_packed_ones() -> None:
    read = []
    for packs in (True, False):
        w = weight(20, 17)
        adapter, reading = stepped(DistributedShampoo([w], use_symmetric_packing=packs), w)
        second = adapter.second_moment(reading)
        assert second is not None
        read.append(second.values)
    torch.testing.assert_close(*read, rtol=1e-6, atol=0)  # sums over strided and over dense numbers


@pytest.mark.parametrize("change", ["another packing", "an axis without a factor", "blocks of other ranks", "wrapped tensors"])
def test_shampoo_is_not_read_where_the_state_is_another(change: str) -> None:
    w = weight(5, 20)
    adapter, reading = stepped(DistributedShampoo([w]), w)
    assert adapter.second_moment(reading) is not None
    state = reading.state
    factors = state["block_0"]["shampoo"]
    match change:
        case "another packing":
            lower = [torch.tril_indices(n, n) for n in (5, 16)]
            upper = [torch.zeros(n, n) for n in (5, 16)]
            for square, packed in zip(upper, factors.factor_matrices, strict=True):
                square[tuple(torch.triu_indices(len(square), len(square)))] = packed
            factors.factor_matrices = tuple(square.mT[tuple(index)] for square, index in zip(upper, lower, strict=True))
        case "an axis without a factor":
            factors.factor_matrices = factors.factor_matrices[:1]
        case "blocks of other ranks":
            del state["block_1"]  # type: ignore[attr-defined]
        case "wrapped tensors":
            state["block_0"]["filtered_grad"] = SimpleNamespace(quantized_values=state["block_0"]["filtered_grad"])
            factors.factor_matrices = tuple(SimpleNamespace(quantized_values=factor) for factor in factors.factor_matrices)
    assert adapter.second_moment(reading) is None
    assert (adapter.momentum(reading) is None) == (change in ("blocks of other ranks", "wrapped tensors"))


# dion.


def test_dion_hands_its_functions_the_groups_epsilon() -> None:
    w = weight()
    adapter, reading = stepped(DionMuon([w], newton_schulz_func=five_steps), w, epsilon=3e-5)
    assert adapter.orthogonalisation is not None
    settings = adapter.orthogonalisation.settings(reading)
    assert settings is not None
    assert (list(settings.coefficients), settings.eps, settings.scaling) == (YOU, 3e-5, "frobenius")


def test_dion_tells_a_users_function_of_the_same_name() -> None:
    def polar_express(matrices: Tensor, epsilon: float) -> Tensor:
        return matrices

    w = weight()
    adapter, reading = stepped(DionMuon([w], newton_schulz_func=polar_express), w)
    assert adapter.orthogonalisation is not None
    assert adapter.orthogonalisation.settings(reading) is None


def test_dion_matrices_in_blocks_are_no_single_problem() -> None:
    w = weight()
    for settings in ({"num_heads": 5}, {"split_sizes": (2, 3)}):
        adapter, reading = stepped(DionNorMuon([w]), w, **settings)
        assert adapter.orthogonalisation is None
        assert "blocks" in adapter.spectrum_of
        assert adapter.momentum(reading) is not None
        assert adapter.second_moment(reading) is not None
    assert stepped(DionMuon([w]), w, num_heads=1)[0].orthogonalisation is not None


def test_dion_cautious_decay_is_missing() -> None:
    w = weight()
    adapter, reading = stepped(DionMuon([w]), w, cautious_wd=True)
    assert adapter.decoupled_decay(reading) != adapter.decoupled_decay(reading)


# Emerging-Optimizers.


@pytest.mark.parametrize(("method", "decay"), [("decoupled", 0.5), ("independent", 50.0), ("l2", 0.0)])
def test_nvidias_three_kinds_of_decay(method: str, decay: float) -> None:
    """λ in W(1 − ηλ), for η 0.01; and under Nesterov the NS input has coupled decay in it."""
    w = weight()
    optimizer = NvidiaMuon([w], lr=0.01, weight_decay=0.5, weight_decay_method=method, nesterov=True)
    given: list[Tensor] = []
    function = optimizer.scaled_orthogonalize_fn
    optimizer.scaled_orthogonalize_fn = lambda matrix: (given.append(matrix.clone()), function(matrix))[1]
    adapter, reading = stepped(optimizer, w)
    assert adapter.decoupled_decay(reading) == pytest.approx(decay)
    assert adapter.orthogonalisation is not None
    read = adapter.orthogonalisation.ns_input(reading)
    assert read is not None
    assert torch.equal(read, given[-1])


@pytest.mark.parametrize(("flags", "decay"), [((True, False), 0.5), ((True, True), 50.0), ((False, False), 0.0)])
def test_nvidias_older_layout(flags: tuple[bool, bool], decay: float) -> None:
    """Settings of the step in the group, those of the iteration in the closure of its function."""
    w = weight()
    optimizer = NvidiaMuon([w], lr=0.01, weight_decay=0.5)
    adapter, reading = stepped(optimizer, w, momentum_beta=0.95, use_nesterov=True, use_decoupled_wd=flags[0], use_independent_wd=flags[1])
    reading.group = {key: value for key, value in reading.group.items() if key != "momentum"}
    coefficient_type, num_ns_steps, scale_mode, extra_scale_factor = "simple", 3, "shape_scaling", 0.5

    def scaled_orthogonalize_fn(matrix: Tensor) -> Any:
        return coefficient_type, num_ns_steps, scale_mode, extra_scale_factor

    for name in ("nesterov", "weight_decay_method", "coefficient_type", "num_ns_steps", "scale_mode", "extra_scale_factor"):
        delattr(optimizer, name)
    optimizer.scaled_orthogonalize_fn = scaled_orthogonalize_fn
    ns = adapter.orthogonalisation
    assert ns is not None
    settings, read = ns.settings(reading), ns.ns_input(reading)
    assert settings is not None
    assert read is not None
    assert settings.coefficients == ((3.4445, -4.775, 2.0315),) * 3
    assert ns.output_scale(reading, 8, 2) == 1.0
    assert adapter.decoupled_decay(reading) == pytest.approx(decay)
    buffer = 0.95 * 0.05 * gradient((5, 7), 1).double() + 0.05 * gradient((5, 7), 2).double()
    mixed = 0.05 * gradient((5, 7), 2).double() + 0.95 * buffer
    if decay:  # else the gradient has the weights in it
        torch.testing.assert_close(read.double(), mixed, rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize(
    ("kind", "steps", "last"),
    [
        ("quintic", 7, YOU[1]),
        ("polar_express", 9, (1.875, -1.25, 0.375)),
        ("cans", 3, (3.9619, -2.9541, 0.563)),
        ("deepseekv4", 8, (3.4445, -4.775, 2.0315)),
        ("deepseekv4", 10, (2.0, -1.5, 0.5)),
        ("deepseekv4", 12, (2.0, -1.5, 0.5)),
        ("cubic5", 5, (2.2230472, -0.963065, 0.0)),
        ("cubic5", 7, (2.2230472, -0.963065, 0.0)),
    ],
)
def test_nvidias_lists_of_coefficients(kind: str, steps: int, last: tuple[float, float, float]) -> None:
    w = weight()
    optimizer = NvidiaMuon([w])
    adapter, reading = stepped(optimizer, w)
    optimizer.coefficient_type, optimizer.num_ns_steps = kind, steps
    assert adapter.orthogonalisation is not None
    settings = adapter.orthogonalisation.settings(reading)
    assert settings is not None
    assert (len(settings.coefficients), settings.coefficients[-1]) == (steps, last)
    optimizer.coefficient_type = "custom"
    assert adapter.orthogonalisation.settings(reading) is None


def test_nvidia_classes_that_may_cut_matrices_apart_have_no_input_to_read() -> None:
    class SplitQkv(NvidiaMuon):
        pass

    w = weight()
    adapter, reading = stepped(SplitQkv([w]), w)
    assert adapter.momentum(reading) is not None
    assert adapter.orthogonalisation is not None
    assert adapter.orthogonalisation.ns_input(reading) is None


def test_nvidias_namo_keeps_the_mean_square_of_the_gradient() -> None:
    w = weight()
    adapter, reading = stepped(AdaptiveMuon([w], moment2_method="namo"), w)
    second = adapter.second_moment(reading)
    assert second is not None
    expected = 0.95 * 0.05 * gradient((5, 7), 1).square().mean() + 0.05 * gradient((5, 7), 2).square().mean()
    assert second.form == "scalar"
    assert second.values.item() == pytest.approx(float(expected), rel=1e-5)
    assert adapter.orthogonalisation is not None
    target = adapter.orthogonalisation.target(reading, 5, 7)
    assert target != target


# MARS-M.


def test_mars_m_leaves_some_parameters_to_adamw() -> None:
    one, two = weight(), weight(4, 6)
    optimizer = MarsM([one], [two])
    one.grad, two.grad = gradient((5, 7), 1), gradient((4, 6), 2)
    optimizer.step()
    [group] = optimizer.param_groups
    adapter = adapter_for(optimizer, group)
    assert adapter is not None
    ns = adapter.orthogonalisation
    assert ns is not None
    by_muon, by_adamw = (Reading(optimizer, p, p.detach(), group, optimizer.state[p], p.grad) for p in (one, two))
    assert [ns.ns_input(reading) is None for reading in (by_muon, by_adamw)] == [False, True]
    assert [ns.settings(reading) is None for reading in (by_muon, by_adamw)] == [False, True]
    assert [adapter.second_moment(reading) is None for reading in (by_muon, by_adamw)] == [True, False]
    assert [adapter.decoupled_decay(reading) for reading in (by_muon, by_adamw)] == [0.1, 0.1]
    assert ns.output_scale(by_muon, 5, 7) == pytest.approx(0.2 * 7**0.5)
    assert ns.output_scale(by_adamw, 4, 6) != ns.output_scale(by_adamw, 4, 6)
