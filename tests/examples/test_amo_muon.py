"""AMO: Muon to the bit while all schedules are equal, each group's own schedule once they are not."""

import numpy as np
import pytest
import torch
import xarray as xr
from contract.harness import Expected
from torch import nn

from optiscope.diagnostics.schedules.schedule_file import OperatorSchedule, Schedule
from optiscope.examples.optimizers.amo_muon import AMOMuon
from optiscope.examples.optimizers.newton_schulz import JORDAN
from optiscope.examples.optimizers.turbo_muon import TurboMuon
from optiscope.hooks import apply_schedule, attach

# Three steps of Polar Express made for three (ℓ = 1e-2), the last of which does not escape when it repeats.
SHORT = [(7.9103, -22.0788, 15.8691), (3.6125, -2.6503, 0.5114), (2.6879, -1.9989, 0.4550)]
LR, DECAY, MU = 0.02, 0.1, 0.9


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize(
    "settings", [{}, {"ns_steps": 3, "nesterov": True, "momentum": 0.8, "weight_decay": 0.3}], ids=["defaults", "others"]
)
def test_with_one_schedule_it_is_muon_to_the_bit(dtype, settings, gaussian):
    shapes = [(6, 6), (4, 9), (9, 4)]
    ours, theirs = ([nn.Parameter(gaussian(shape, i, dtype)) for i, shape in enumerate(shapes)] for _ in range(2))
    one = AMOMuon([{"params": [p], "operator": str(i)} for i, p in enumerate(ours)], lr=LR, **settings)
    other = torch.optim.Muon(theirs, lr=LR, adjust_lr_fn="match_rms_adamw", **settings)
    for seed in range(10, 18):
        for i, (a, b) in enumerate(zip(ours, theirs, strict=True)):
            a.grad, b.grad = gaussian(shapes[i], seed + 100 * i, dtype), gaussian(shapes[i], seed + 100 * i, dtype)
        one.step()
        other.step()
        assert all(torch.equal(a, b) for a, b in zip(ours, theirs, strict=True))


def transcription(shape, triples, through_svd, nesterov=True):
    """b ← μb + (1 − μ)g; U = 0.2√max(m, n)·NS((1 − μ)g + μb); `triples` are looked up anew at every step."""
    b = np.zeros(shape)

    def step(g, w):
        nonlocal b
        b = MU * b + (1 - MU) * g
        return Expected(b, None, 0.2 * np.sqrt(max(shape)) * through_svd((1 - MU) * g + MU * b if nesterov else b, triples))

    return step


@pytest.mark.parametrize("nesterov", [True, False])
def test_every_group_obeys_its_own_schedule_from_the_step_it_is_written(nesterov, gaussian, through_svd):
    shapes, in_force = [(5, 5), (3, 7), (7, 3)], [[JORDAN] * 5, [*SHORT, SHORT[-1]], [JORDAN] * 3]
    parameters = [nn.Parameter(gaussian(shape, i)) for i, shape in enumerate(shapes)]
    groups = [
        {"params": [parameters[0]], "operator": "attn_q"},
        {"params": [parameters[1]], "operator": "mlp_up", "ns_steps": 4, "ns_coefficients": SHORT},
        {"params": [parameters[2]], "operator": "mlp_down", "ns_steps": 3},
    ]
    optimizer = AMOMuon(groups, lr=LR, momentum=MU, nesterov=nesterov, weight_decay=DECAY, ns_dtype=torch.float64)
    references = [transcription(s, t, through_svd, nesterov) for s, t in zip(shapes, in_force, strict=True)]
    for seed in range(20, 28):
        if seed == 24:  # committed in the middle of the training
            optimizer.param_groups[0].update(ns_steps=3, ns_coefficients=SHORT)
            in_force[0][:] = SHORT
        before = [p.detach().numpy().copy() for p in parameters]
        for i, p in enumerate(parameters):
            p.grad = gaussian(shapes[i], seed + 100 * i)
        optimizer.step()
        for p, w, reference in zip(parameters, before, references, strict=True):
            update = reference(p.grad.numpy(), w).update
            np.testing.assert_allclose(p.detach(), w * (1 - LR * DECAY) - LR * update, atol=1e-13)  # seen: 2e-15


def test_a_run_holds_every_groups_schedule(tmp_path, gaussian, through_svd):
    """What is predicted and achieved under each group's schedule, against SVDs in float64."""
    shape, in_force = (6, 9), ([JORDAN] * 5, SHORT)
    parameters = [nn.Parameter(0.01 * gaussian(shape, i, torch.float32)) for i in range(2)]
    groups = [{"params": parameters[:1]}, {"params": parameters[1:], "ns_steps": 3, "ns_coefficients": SHORT}]
    optimizer = AMOMuon(groups, lr=LR, momentum=MU, weight_decay=DECAY, ns_dtype=torch.float64)
    with attach(optimizer, None, tmp_path / "run.zarr", every=1, on_error="raise"):
        for i, p in enumerate(parameters):
            p.grad = gaussian(shape, 30 + i, torch.float32)
        optimizer.step()
    with xr.open_datatree(tmp_path / "run.zarr", engine="zarr") as run:
        geometry = run["geometry"].load()
    schedules = geometry.attrs["ns_schedules"]
    assert len(schedules) == 2
    for i, (p, triples) in enumerate(zip(parameters, in_force, strict=True)):
        assert schedules[int(geometry["ns_schedule"][0, i])] == {"coefficients": [list(triple) for triple in triples], "eps": 1e-7}
        # The first momentum is a multiple of the gradient.
        o = through_svd(p.grad, triples)
        residual = np.linalg.norm(np.eye(6) - o @ o.T) / np.sqrt(6)
        assert float(geometry["ns_residual"][0, i, len(triples)]) == pytest.approx(residual, rel=1e-5)
        assert float(geometry["ns_residual_achieved"][0, i]) == pytest.approx(residual, rel=1e-4)


class Model(nn.Module):
    """Two operators by their names."""

    def __init__(self, gaussian):
        super().__init__()
        self.q_proj, self.down_proj = nn.Linear(5, 5, bias=False), nn.Linear(7, 3, bias=False)
        for i, p in enumerate(self.parameters()):
            p.data = gaussian(p.shape, i)


SCHEDULE = Schedule(
    {"attn_q": OperatorSchedule(tuple(SHORT), (), 0.1, 0.2, 1), "mlp_down": OperatorSchedule((JORDAN,) * 4, (), 0.1, 0.2, 1)}
)


def test_a_schedule_is_committed_during_the_training(gaussian, through_svd):
    """Uniform steps first, then what `apply_schedule` writes: the groups are split, momenta go on, each operator has its own."""
    model = Model(gaussian)
    optimizer = AMOMuon(model.parameters(), lr=LR, momentum=MU, weight_decay=DECAY, ns_dtype=torch.float64)
    in_force = [[JORDAN] * 5, [JORDAN] * 5]
    references = [transcription(tuple(p.shape), t, through_svd) for p, t in zip(model.parameters(), in_force, strict=True)]
    for seed in range(40, 46):
        if seed == 43:
            assert apply_schedule(optimizer, SCHEDULE, model) == {"attn_q": 1, "mlp_down": 1}
            assert [group["operator"] for group in optimizer.param_groups] == ["attn_q", "mlp_down"]
            in_force[0][:], in_force[1][:] = SHORT, [JORDAN] * 4
        before = [p.detach().numpy().copy() for p in model.parameters()]
        for i, p in enumerate(model.parameters()):
            p.grad = gaussian(p.shape, seed + 100 * i)
        optimizer.step()
        for p, w, reference in zip(model.parameters(), before, references, strict=True):
            update = reference(p.grad.numpy(), w).update
            np.testing.assert_allclose(p.detach(), w * (1 - LR * DECAY) - LR * update, atol=1e-13)


def test_a_schedule_for_another_scaling_is_refused(gaussian):
    """A schedule's coefficients act on σ/‖M‖_F, Turbo-Muon's on the singular values of diag(d)·M."""
    model = Model(gaussian)
    with pytest.raises(TypeError, match="a schedule acts through `ns_steps`"):
        apply_schedule(TurboMuon(model.parameters()), SCHEDULE, model)
