"""What is known of Muon and its relatives in closed form, seen through what is recorded of them."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from importlib import import_module
from math import sqrt
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import xarray as xr
from torch import Tensor, nn

from contract.cases_muon import not_compiled
from contract.harness import Floats, intercepted, plain_step, relative_error
from contract.one_matrix import Model, random, second_moment
from contract.transcriptions_muon import JORDAN, Triple, orthogonalised
from optiscope.hooks import attach

DEEPSEEK = [JORDAN] * 8 + [(2.0, -1.5, 0.5)] * 2  # ends within 0.001 of 1 from 1e-4 on
YOU = [
    (4.0848, -6.8946, 2.9270),
    (3.9505, -6.3029, 2.6377),
    (3.7418, -5.5913, 2.3037),
    (2.8769, -3.1427, 1.2046),
    (2.8366, -3.0525, 1.2012),
]


def with_spectrum(rows: int, cols: int, condition: float = 5.0) -> tuple[Tensor, Floats]:
    """A matrix with random singular vectors and singular values from 1 to `condition`, evenly on a log scale, and x = σ/‖M‖_F."""
    r = min(rows, cols)
    sigma = torch.logspace(0, np.log10(condition), r, dtype=torch.float64)
    u, v = (torch.linalg.qr(random(n, r, seed=n).double()).Q for n in (rows, cols))
    return ((u * sigma) @ v.T).float(), (sigma / sigma.norm()).numpy()


@dataclass
class Seen:
    """A run of one matrix, and what its optimizer's iteration was given and gave in the last step."""

    update: xr.Dataset
    geometry: xr.Dataset
    second: xr.Dataset
    given: Floats
    output: Floats
    optimizer: Any
    parameter: nn.Parameter


Build = Callable[[Sequence[nn.Parameter]], Any]


def run(build: Build, iteration: str, weight: Tensor, gradients: Sequence[Tensor], store: Path) -> Seen:
    """Train one matrix on gradients that are given."""
    model = Model(weight)
    optimizer = build([model.matrix])

    with intercepted(iteration) as calls, attach(optimizer, model, store, every=1, on_error="raise"):
        for gradient in gradients:

            def loss(gradient: Tensor = gradient) -> Tensor:
                return (model.matrix * gradient.to(weight.dtype)).sum()  # whose gradient it is

            (not_compiled if "heavyball" in iteration else plain_step)(optimizer, model, loss)
    rows = weight.shape[0]
    given, output = (float64_as(tensor, rows) for tensor in (calls[-1].given, calls[-1].output))
    with xr.open_datatree(store, engine="zarr") as tree:
        groups = [tree[name].load().to_dataset() for name in ("update", "geometry", "second_moment")]
    return Seen(*groups, given, output, optimizer, model.matrix)


def float64_as(tensor: Tensor, rows: int) -> Floats:
    array: Floats = tensor.squeeze().double().numpy()
    return array if array.shape[0] == rows else array.T


def torch_muon(**settings: Any) -> Build:
    return lambda parameters: torch.optim.Muon(parameters, lr=0.02, **{"weight_decay": 0.0, **settings})


def po(name: str, **settings: Any) -> Build:
    """One of pytorch_optimizer's Muons."""

    def build(parameters: Sequence[nn.Parameter]) -> Any:
        import pytorch_optimizer

        return getattr(pytorch_optimizer, name)([{"params": list(parameters), "use_muon": True}], lr=0.02, **settings)

    return build


def po_with_a_preset_later(parameters: Sequence[nn.Parameter]) -> Any:
    optimizer = po("Muon", ns_steps=3)(parameters)
    optimizer.param_groups[0].update(ns_coeffs="quintic", ns_steps=5)
    return optimizer


def made(package: str, name: str, **settings: Any) -> Build:
    return lambda parameters: getattr(import_module(package), name)(parameters, **settings)


TORCH = "torch.optim._muon._zeropower_via_newtonschulz"
STACKED = "pytorch_optimizer.optimizer.muon.base.zero_power_via_newton_schulz_5"
GRAM = "pytorch_optimizer.optimizer.muon.base.zero_power_via_gram_newton_schulz"
MODULE = "pytorch_optimizer.optimizer.muon.{}.zero_power_via_newton_schulz_5"
SCION = "pytorch_optimizer.optimizer.scion.zero_power_via_newton_schulz_5"
PER_STEP: list[Triple] = [(4.0, -6.0, 2.5), (3.0, -4.0, 1.7)]

# Every kind of row, the function that its class runs, and the triples that it runs.
ROWS: dict[str, tuple[Build, str, Sequence[Triple]]] = {
    "torch": (torch_muon(), TORCH, [JORDAN] * 5),
    "torch, own triple": (torch_muon(ns_coefficients=(2.0, -1.5, 0.5), ns_steps=3), TORCH, [(2.0, -1.5, 0.5)] * 3),
    "Keller Jordan": (made("muon", "SingleDeviceMuon"), "muon.zeropower_via_newtonschulz5", [JORDAN] * 5),
    "po Muon": (po("Muon"), STACKED, [JORDAN] * 5),
    "po Muon, preset": (po("Muon", ns_coeffs="quintic"), STACKED, YOU),
    "po Muon, preset later": (po_with_a_preset_later, STACKED, YOU),
    "po Muon, list": (po("Muon", ns_coeffs=PER_STEP, ns_steps=4), STACKED, [*PER_STEP, PER_STEP[-1], PER_STEP[-1]]),
    "po Muon, Gram": (po("Muon", ns_method="gram_newton_schulz", ns_steps=6), GRAM, [JORDAN] * 6),
    "MuonClip": (po("MuonClip"), STACKED, [JORDAN] * 5),
    "AdaMuon": (po("AdaMuon", ns_steps=3), MODULE.format("adamuon"), [JORDAN] * 3),
    "NorMuon": (po("NorMuon"), STACKED, [JORDAN] * 5),
    "AdaGO": (po("AdaGO", foreach=False), MODULE.format("adago"), [JORDAN] * 5),
    "Scion": (made("pytorch_optimizer", "SCION", lr=0.02), SCION, [JORDAN] * 5),
    "Scion, steps": (made("pytorch_optimizer", "SCION", lr=0.02, norm_type=2, norm_kwargs={"num_steps": 3}), SCION, [JORDAN] * 3),
    "heavyball": (made("heavyball", "Muon", lr=0.02), "heavyball.utils.zeropower_via_newtonschulz5", YOU),
}


@pytest.mark.parametrize("name", ROWS)
def test_the_recorded_schedule_is_the_one_that_ran(name: str, tmp_path: Path) -> None:
    """A float64 iteration with the run's coefficients gives what the library's own gave, but for its bfloat16.

    0.3 to 1.6 % seen, heavyball's random rounding 2.2 %, Keller Jordan's order of operations 3.0 %. Another list is farther.
    """
    build, iteration, triples = ROWS[name]
    gradient, _ = with_spectrum(24, 40)
    seen = run(build, iteration, random(24, 40), [gradient], tmp_path / "run.zarr")
    (schedule,) = seen.geometry.attrs["ns_schedules"]
    assert schedule == {"coefficients": [list(triple) for triple in triples], "eps": 1e-7}
    assert relative_error(seen.output, orthogonalised(seen.given, triples)) < 0.04
    assert relative_error(seen.output, orthogonalised(seen.given, list(triples)[:-1])) > 0.07  # 7.7 % seen at the least


@pytest.mark.parametrize("shape", [(24, 40), (40, 24), (32, 32)])
@pytest.mark.parametrize("adjust", ["original", "match_rms_adamw"])
def test_rms_of_torch_muons_update_is_its_scale_times_that_of_the_singular_values(
    adjust: str, shape: tuple[int, int], tmp_path: Path
) -> None:
    """RMS(ΔW)/lr is a/√fan_in under "original" and 0.2a under "match_rms_adamw", a = √mean o², o = p(x) of a known spectrum."""
    gradient, x = with_spectrum(*shape)
    o = np.diag(orthogonalised(np.diag(x)))
    a = sqrt(np.mean(o**2))
    seen = run(torch_muon(adjust_lr_fn=adjust, weight_decay=0.3), TORCH, random(*shape), [gradient] * 3, tmp_path / "run.zarr")
    exact = 1 / sqrt(shape[1]) if adjust == "original" else 0.2
    np.testing.assert_allclose(seen.update["update_rms_target"], exact, rtol=1e-12)
    np.testing.assert_allclose(seen.update["update_rms_per_lr"], exact * a, rtol=0.01)  # 0.2 % seen


@pytest.mark.parametrize("shape", [(24, 40), (40, 24)])
def test_adamuons_update_has_the_rms_0_2_in_every_step(shape: tuple[int, int], tmp_path: Path) -> None:
    """Whatever the iteration gives: Ô is divided by its own norm. That norm is bfloat16, like Ô: 2⁻⁸ relative to each other."""
    gradients = [random(*shape, seed=t) for t in range(4)]
    seen = run(po("AdaMuon", ns_steps=3), MODULE.format("adamuon"), random(*shape), gradients, tmp_path / "run.zarr")
    np.testing.assert_allclose(seen.update["update_rms_target"], 0.2, rtol=1e-12)
    np.testing.assert_allclose(seen.update["update_rms_per_lr"], 0.2, rtol=2**-7)


def test_adamuons_first_update_is_the_sign_of_o(tmp_path: Path) -> None:
    """V̂ = O² after one step, so that Ô = sign(O)."""
    weight = torch.zeros(24, 40)
    seen = run(po("AdaMuon"), MODULE.format("adamuon"), weight, [random(24, 40)], tmp_path / "run.zarr")
    np.testing.assert_allclose(seen.parameter.detach().numpy(), -0.02 * 0.2 * np.sign(seen.output), rtol=2**-7)
    np.testing.assert_allclose(seen.second["second_moment_mean"], 0.05 * np.mean(seen.output**2), rtol=1e-5)


def test_normuon_leaves_a_wide_polar_factor_alone_and_evens_out_a_tall_ones_rows(tmp_path: Path) -> None:
    """Rows of an exact polar factor with m ≤ n have norm 1: their spread is that of the iteration's error. A tall one's squared
    norms spread by √(2(m − n)/(n(m + 2))) for Gaussian matrices (the spread of a Beta distribution)."""
    spreads = {}
    for shape in ((32, 96), (512, 64)):
        build = po("NorMuon", ns_coeffs=DEEPSEEK, ns_steps=10)
        seen = run(build, STACKED, random(*shape), [random(*shape, seed=1)], tmp_path / f"{shape[0]}.zarr")
        v = second_moment(seen.optimizer, seen.parameter).values.numpy()
        assert v.shape == (shape[0], 1)
        spreads[shape] = float(v.std() / v.mean())
        np.testing.assert_allclose(seen.second["second_moment_mean"], 0.05 * np.mean(seen.output**2), rtol=1e-5)
        # The norm is restored: the update has the RMS of √max(1, m/n)·O.
        scale = sqrt(max(1, shape[0] / shape[1]))
        np.testing.assert_allclose(seen.update["update_rms_per_lr"], scale * np.sqrt(np.mean(seen.output**2)), rtol=1e-4)
        np.testing.assert_allclose(seen.update["update_rms_target"], 1 / sqrt(shape[1]), rtol=1e-12)
    assert spreads[32, 96] < 0.01
    # A standard deviation from 512 numbers has the relative error 1/√1024 = 3 %; 15 % leaves room for their tail.
    assert spreads[512, 64] == pytest.approx(sqrt(2 * (512 - 64) / (64 * 514)), rel=0.15)


def test_normuon_can_bring_its_update_to_the_rms_0_2(tmp_path: Path) -> None:
    build = po("NorMuon", update_scale="match_rms")
    seen = run(build, STACKED, random(40, 24), [random(40, 24, seed=t) for t in range(3)], tmp_path / "run.zarr")
    np.testing.assert_allclose(seen.update["update_rms_target"], 0.2, rtol=1e-12)
    np.testing.assert_allclose(seen.update["update_rms_per_lr"], 0.2, rtol=1e-4)


@pytest.mark.parametrize("name", ["torch", "Keller Jordan", "po Muon", "po Muon, Gram", "MuonClip", "Scion, steps"])
def test_intended_update_of_bfloat16_weights_is_what_the_iteration_gave(name: str, tmp_path: Path) -> None:
    """RMS(s·O) with the intercepted O, s = √max(1, m/n), or MuonClip's 0.2√max(m, n). The applied one has the weights' rounding."""
    build, iteration, _ = ROWS[name]
    gradients = [random(40, 24, seed=t) for t in range(3)]
    seen = run(build, iteration, random(40, 24).bfloat16(), gradients, tmp_path / "run.zarr")
    scale = 0.2 * sqrt(40) if name == "MuonClip" else sqrt(40 / 24)
    intended = float(seen.update["update_rms_intended"][-1, 0])
    assert intended == pytest.approx(scale * np.sqrt(np.mean(seen.output**2)), rel=1e-6)
    assert float(seen.update["update_rms_per_lr"][-1, 0]) != pytest.approx(intended, rel=1e-2)


def test_torchs_muon_overwrites_a_bfloat16_momentum_and_is_read_before_it_does(tmp_path: Path) -> None:
    """Without Nesterov mixing: 0.158 in the place of 0.1 where all is 1. The trap first, then what is recorded in spite of it."""
    build = torch_muon(nesterov=False, momentum=0.9)
    seen = run(build, TORCH, torch.zeros(8, 5).bfloat16(), [torch.ones(8, 5)], tmp_path / "run.zarr")
    buffer = seen.optimizer.state[seen.parameter]["momentum_buffer"]
    assert float(buffer[0, 0]) == pytest.approx(1 / sqrt(40), rel=2**-8)
    np.testing.assert_allclose(seen.geometry["fro_norm"], 0.1 * sqrt(40), rtol=2**-8)


@pytest.mark.parametrize("name", ["Muon", "NorMuon", "MuonClip", "AdaMuon"])
def test_a_maximised_objective_turns_the_ns_input_round(name: str, tmp_path: Path) -> None:
    """The input has the opposite sign of the gradient's sum, and so is M against it; with the wrong one −1 would stand here."""
    iteration = MODULE.format("adamuon") if name == "AdaMuon" else STACKED
    seen = run(po(name, maximize=True), iteration, random(24, 40), [with_spectrum(24, 40)[0]] * 2, tmp_path / "run.zarr")
    assert float(np.vdot(seen.given, with_spectrum(24, 40)[0].numpy())) < 0
    np.testing.assert_allclose(seen.geometry["fro_norm"][-1], np.linalg.norm(seen.given), rtol=1e-6)
    if name in ("Muon", "MuonClip"):
        assert (seen.geometry["alignment"] > 0.7).all()


@pytest.mark.parametrize("settings", [{"mars": True}, {"gradient_clipping": lambda updates: [u * 0.5 for u in updates]}])
def test_no_ns_input_is_made_up_where_something_stands_before_the_momentum(settings: dict[str, Any], tmp_path: Path) -> None:
    """heavyball's corrections and clipping change the gradient that the momentum sees; the momentum itself is still read."""
    build = made("heavyball", "Muon", lr=0.02, **settings)
    gradients = [random(24, 40, seed=t) for t in range(2)]
    seen = run(build, "heavyball.utils.zeropower_via_newtonschulz5", random(24, 40), gradients, tmp_path / "run.zarr")
    assert seen.geometry["fro_norm"].isnull().all()
    assert seen.update["momentum_rms"].notnull().all()
