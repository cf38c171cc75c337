"""Where a schedule meets wrappers, ranks and stacks, and what is said where it cannot be put into force."""

import copy
import logging
from collections.abc import Callable
from typing import Any

import accelerate
import pytest
import pytorch_optimizer as po
import torch
from muons import (
    EQUAL,
    UNEQUAL,
    TwoLayers,
    groups_of_muon,
    make,
    newton_schulz,
    of_pytorch_optimizer,
    operator_of,
    schedule_of,
    train,
)  # fmt: skip
from pytorch_optimizer.optimizer.utils import matrix as po_matrix
from torch import nn
from torch.optim import SGD, AdamW, Muon
from torch.optim.lr_scheduler import CosineAnnealingLR

from optiscope.diagnostics import JORDAN
from optiscope.examples.optimizers.teon import TEON
from optiscope.hooks import apply_schedule

# Wrappers


@pytest.fixture
def _accelerate_as_it_was() -> Any:
    """Its state is that of the process."""
    yield
    accelerate.state.AcceleratorState._reset_state(reset_partial_state=True)
    accelerate.state.GradientState._reset_state()


def wrapped(kind: str, name: str) -> tuple[TwoLayers, Any, Any]:
    """A model, the wrapped optimizer, and the wrapper."""
    model, optimizer = make(name)
    if kind == "Accelerate":
        return model, optimizer, accelerate.Accelerator(cpu=True).prepare(optimizer)
    if kind == "Lookahead":
        return model, optimizer, po.Lookahead(optimizer, k=2)
    assert name == "torch.optim.Muon"
    wrapper = po.SAM(list(model.of_muon().values()), Muon, lr=0.02)
    return model, wrapper.base_optimizer, wrapper


WRAPPED = [
    ("Accelerate", "torch.optim.Muon"), ("Accelerate", "po.Muon foreach=True"), ("Lookahead", "torch.optim.Muon"),
    ("Lookahead", "po.NorMuon foreach=False"), ("SAM", "torch.optim.Muon"),
]  # fmt: skip


@pytest.mark.usefixtures("_accelerate_as_it_was")
@pytest.mark.parametrize(("kind", "name"), WRAPPED)
def test_within_a_wrapper(kind: str, name: str) -> None:
    """The innermost optimizer gets the schedule, also back after the wrapper has loaded a checkpoint; training is as by hand."""
    results = []
    for through_wrapper in (True, False):
        model, optimizer, wrapper = wrapped(kind, name)
        apply_schedule(wrapper if through_wrapper else optimizer, UNEQUAL, model)
        assert [group["ns_steps"] for group in groups_of_muon(optimizer)] == [3, 6, 4, 5]
        step(kind, model, wrapper, 0, 3)
        if through_wrapper:
            loaded = copy.deepcopy(wrapper.state_dict())
            for group in loaded.get("base_optimizer", loaded)["param_groups"]:
                group.update(ns_steps=9 if "ns_steps" in group else 0)
            wrapper.load_state_dict(loaded)
            inner = wrapper.base_optimizer if kind == "SAM" else wrapper.optimizer
            assert inner.param_groups is wrapper.param_groups
            assert [group["ns_steps"] for group in inner.param_groups if group.get("operator")] == [3, 6, 4]
            for group in groups_of_muon(inner):
                if group.get("operator", "") is None:
                    group["ns_steps"] = 5  # of no operator: what the checkpoint brought stays
        step(kind, model, wrapper, 3, 5)
        results.append(model.as_bytes())
    assert results[0] == results[1]


def step(kind: str, model: TwoLayers, wrapper: Any, first: int, last: int) -> None:
    for seed in range(first, last):
        model.give_gradients(seed)
        if kind == "SAM":
            wrapper.first_step()
            model.give_gradients(seed + 100)
            wrapper.second_step()
        else:
            wrapper.step()


@pytest.mark.usefixtures("_accelerate_as_it_was")
def test_scheduler_of_accelerate() -> None:
    """It wraps torch's, whose lists are extended."""
    from accelerate.scheduler import AcceleratedScheduler

    model, optimizer, wrapper = wrapped("Accelerate", "torch.optim.Muon")
    inner = CosineAnnealingLR(optimizer, T_max=5)
    with pytest.raises(ValueError, match=r"^lr_schedulers: this optimizer already has a learning-rate scheduler; pass it"):
        apply_schedule(wrapper, UNEQUAL, model)
    apply_schedule(wrapper, UNEQUAL, model, lr_schedulers=[AcceleratedScheduler(inner, wrapper)])
    assert len(inner.base_lrs) == len(optimizer.param_groups) == 4


@pytest.fixture
def process_group() -> Any:
    torch.distributed.init_process_group("gloo", store=torch.distributed.HashStore(), rank=0, world_size=1)
    yield
    torch.distributed.destroy_process_group()


@pytest.mark.filterwarnings("ignore:`torch.jit:DeprecationWarning")  # of torch's own optimizers for TorchScript, on import
@pytest.mark.usefixtures("process_group")
def test_wrapper_with_groups_of_its_own_is_refused() -> None:
    """ZeRO copies its groups' settings over those of the optimizer within at every step: the schedule would be gone."""
    from torch.distributed.optim import ZeroRedundancyOptimizer

    model = TwoLayers()
    zero = ZeroRedundancyOptimizer(list(model.of_muon().values()), Muon, lr=0.02)
    inner = zero.optim
    inner.param_groups[0]["ns_steps"] = 9
    train(model, zero, 0, 1)
    assert inner.param_groups[0]["ns_steps"] == 5  # the trap
    with pytest.raises(TypeError, match=r"ZeroRedundancyOptimizer keeps parameter groups of its own beside those of .*Muon; apply"):
        apply_schedule(zero, UNEQUAL, model)
    assert len(inner.param_groups) == 1


# Matrices that belong together


@pytest.mark.usefixtures("process_group")
def test_ranks_that_own_momenta_by_place() -> None:
    """pytorch_optimizer's DistributedMuon: fine before the first step, and on one rank; later a split would change the owners."""
    model = TwoLayers()
    optimizer = of_pytorch_optimizer(po.DistributedMuon)(model)
    train(model, optimizer, 0, 1)
    optimizer.world_size = 2
    with pytest.raises(ValueError, match=r"DistributedMuon own momenta by place in a parameter group.*before the first step$"):
        apply_schedule(optimizer, UNEQUAL, model)
    optimizer.world_size = 1
    assert apply_schedule(optimizer, UNEQUAL, model) == {"attn_q": 2, "attn_v": 2, "mlp_up": 2}
    train(model, optimizer, 1, 2)


def test_stacks_of_matrices_are_not_torn() -> None:
    model = TwoLayers()
    by_operator: dict[str, list[nn.Parameter]] = {}
    for name, p in model.of_muon().items():
        by_operator.setdefault(operator_of(name), []).append(p)
    mixed = TEON([by_operator["attn_q"][0], by_operator["other"][0]], stack=2)
    with pytest.raises(ValueError, match=r"^schedule: a stack of matrices .* holds the operators attn_q, other; "):
        apply_schedule(mixed, EQUAL, model)
    assert len(mixed.param_groups) == 1

    trained = []
    for scheduled in (False, True):
        model = TwoLayers()
        parameters = [p for operator in by_operator for n, p in model.of_muon().items() if operator_of(n) == operator]
        optimizer = TEON(parameters, stack=2)
        if scheduled:
            apply_schedule(optimizer, EQUAL, model)
            assert len(optimizer.param_groups) == 4
        train(model, optimizer, 0, 3)
        trained.append(model.as_bytes())
    assert trained[0] == trained[1]


# What it says


def test_steps_without_coefficients_are_said_once(caplog: pytest.LogCaptureFixture) -> None:
    model, optimizer = make("steps only")
    with caplog.at_level(logging.WARNING, logger="optiscope"):
        apply_schedule(optimizer, UNEQUAL, model)
        optimizer.load_state_dict(optimizer.state_dict())
    assert [record.message for record in caplog.records] == [
        "optiscope: muons.StepsOnlyMuon takes a number of Newton–Schulz steps per group and no coefficients: the schedule's steps are in force "
        "with the optimizer's own coefficients, for which the residuals that the schedule predicts do not hold."
    ]
    assert [group["ns_steps"] for group in optimizer.param_groups] == [3, 6, 4, 5]
    assert not any("ns_coefficients" in group or "ns_coeffs" in group for group in optimizer.param_groups)


def test_one_triple_of_an_unknown_class_takes_no_list(caplog: pytest.LogCaptureFixture) -> None:
    model, optimizer = make("steps only")
    optimizer.param_groups[0]["ns_coefficients"] = JORDAN
    apply_schedule(optimizer, UNEQUAL, model)
    assert {group["ns_coefficients"] for group in optimizer.param_groups} == {JORDAN}
    assert "no coefficients" in caplog.text


@pytest.mark.parametrize("name", ["po.Muon foreach=True", "timm", "torch.optim.Muon"])
def test_nothing_is_said_where_the_schedule_holds(name: str, caplog: pytest.LogCaptureFixture) -> None:
    model, optimizer = make(name)
    apply_schedule(optimizer, UNEQUAL, model)
    assert not caplog.records


def test_gram_form_that_overflows(caplog: pytest.LogCaptureFixture) -> None:
    """Eight steps of the Gram form in float16 on condition number 1000: NaN as it is by default, finite as the warning advises."""
    model = TwoLayers()
    optimizer = of_pytorch_optimizer(po.Muon, ns_method="gram_newton_schulz")(model)
    apply_schedule(optimizer, schedule_of(attn_q=(JORDAN,) * 8, attn_v=(JORDAN,) * 5), model)
    [message] = [record.message for record in caplog.records]
    assert message.endswith(
        "Muon: 8 steps of the Gram form in float16 that starts anew after (2,): it can overflow to NaN; "
        "set ns_reset_steps to (2, 4, 6), or ns_method to 'newton_schulz'."
    )
    u, _, vt = torch.linalg.svd(torch.randn(64, 128, generator=torch.Generator().manual_seed(0)), full_matrices=False)
    m = u * torch.logspace(0, -3, 64) @ vt
    gram_form = po_matrix.zero_power_via_gram_newton_schulz
    assert not gram_form(m, num_steps=8, weights=JORDAN).isfinite().all()
    o, exact = gram_form(m, num_steps=8, weights=JORDAN, reset_steps=(2, 4, 6)).double(), newton_schulz(m, (JORDAN,) * 8)
    assert (o - exact).norm() < 0.05 * exact.norm()  # seen: 0.014


def of_library(module: str) -> type:
    return type("Muon", (SGD,), {"__module__": module})


def heavyball_muon(parameters: Any) -> Any:
    import heavyball

    return heavyball.Muon(parameters)


def single_device_muon(parameters: Any) -> Any:
    from muon import SingleDeviceMuon

    return SingleDeviceMuon(parameters)


@pytest.mark.parametrize(
    ("build", "name", "advice"),
    [
        (AdamW, "torch.optim.adamw.AdamW", "use torch.optim.Muon, or another Muon that reads its steps there"),
        (SGD, "torch.optim.sgd.SGD", "use torch.optim.Muon, or another Muon that reads its steps there"),
        (heavyball_muon, "heavyball.Muon", "heavyball runs five hard-coded Newton–Schulz steps; use torch.optim.Muon"),
        (single_device_muon, "muon.SingleDeviceMuon", "its number of steps is the default argument of a function; use torch.optim.Muon"),
        (po.SCION, "pytorch_optimizer.optimizer.scion.SCION", r"it takes steps from `norm_kwargs`; .*'num_steps': …} \(LMONorm.AUTO ignores them\)"),
        (of_library("dion.muon"), "dion.muon.Muon", "dion takes one Newton–Schulz function per optimizer; build an optimizer per operator.*"),
        (of_library("emerging_optimizers.muon"), "emerging_optimizers.muon.Muon", "its steps are fixed when it is built; build .* num_ns_steps"),
    ],
)  # fmt: skip
def test_optimizers_that_take_no_schedule(build: Callable[[Any], Any], name: str, advice: str) -> None:
    model = TwoLayers()
    message = rf"^optimizer: a schedule acts through `ns_steps` in the parameter groups, and those of {name} hold none: {advice}$"
    with pytest.raises(TypeError, match=message):
        apply_schedule(build(list(model.of_muon().values())), UNEQUAL, model)


def test_scion_by_hand() -> None:
    """The way that its refusal points to: `num_steps` counts with SPECTRAL, and AUTO ignores it."""
    from pytorch_optimizer.optimizer.scion import LMONorm

    def after_one_step(norm_type: int, steps: int) -> list[bytes]:
        model = TwoLayers()
        optimizer = po.SCION(list(model.of_muon().values()), norm_type=norm_type, norm_kwargs={"num_steps": steps})
        train(model, optimizer, 0, 1)
        return model.as_bytes()

    assert after_one_step(LMONorm.SPECTRAL, 2) != after_one_step(LMONorm.SPECTRAL, 5)
    assert after_one_step(LMONorm.AUTO, 2) == after_one_step(LMONorm.AUTO, 5)


def test_something_that_is_no_optimizer() -> None:
    with pytest.raises(TypeError, match=r"^optimizer: expected a torch\.optim\.Optimizer, got list$"):
        apply_schedule([], UNEQUAL, TwoLayers())
