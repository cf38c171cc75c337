"""Groups of quantities that are recorded when asked for: which rows they have, what stands in them, and that training is the same."""

import itertools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import xarray as xr
from contract.cases import CASES
from contract.harness import Case, as_list, plain_step, same, tensors_in
from torch import Tensor, nn
from torch.optim import SGD, AdamW, Muon

from optiscope.diagnostics.catalogue import DEFAULT_GROUPS, MEASURES, ON_REQUEST, in_group
from optiscope.examples.optimizers.aro import ARO, BASES
from optiscope.examples.optimizers.mars_m import MARSM
from optiscope.examples.optimizers.teon import TEON
from optiscope.hooks import attach
from optiscope.hooks.observing.composites import compose

Read = Callable[[str | Path], xr.DataTree]
NEW = ("gradient", "blocks", "stacking", "precision")


class Layer(nn.Module):
    """A fused projection, one that is not, and a matrix that is no projection."""

    def __init__(self) -> None:
        super().__init__()
        self.c_attn, self.q_proj, self.up_proj = nn.Linear(8, 24, bias=False), nn.Linear(8, 8, bias=False), nn.Linear(8, 12, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.c_attn(x).chunk(3, -1)
        return torch.tanh(self.q_proj(q * k + v) + self.up_proj(x)[..., :8])


class Tower(nn.Module):
    def __init__(self, layers: int = 2, seed: int = 0) -> None:
        super().__init__()
        torch.manual_seed(seed)
        self.n_head = 4
        self.layers = nn.ModuleList(Layer() for _ in range(layers))

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = layer(x)
        return x

    def backward(self, step: int) -> None:
        self.zero_grad()
        self(torch.randn(16, 8, generator=torch.Generator().manual_seed(step))).square().mean().backward()


def train(model: Tower, optimizer: Any, store: Path, steps: int = 2, **options: Any) -> None:
    with attach(optimizer, model, store, every=1, on_error="raise", **options):
        for step in range(steps):
            model.backward(step)
            optimizer.step()


def names(run: xr.DataTree, group: str) -> list[str]:
    return run[group]["name"].values.tolist()


def test_nothing_of_them_unless_asked_for(tmp_path: Path, read: Read) -> None:
    model = Tower()
    train(model, Muon(model.parameters()), tmp_path / "run.zarr")
    assert set(read(tmp_path / "run.zarr").children) <= {*DEFAULT_GROUPS, "scalars"}


def test_their_rows(tmp_path: Path, read: Read) -> None:
    model = Tower(3)
    train(model, Muon(model.parameters()), tmp_path / "run.zarr", measure=(*DEFAULT_GROUPS, *NEW))
    run = read(tmp_path / "run.zarr")
    whole = [f"layers.{i}.{name}.weight" for i in range(3) for name in ("c_attn", "q_proj", "up_proj")]
    assert names(run, "geometry") == names(run, "gradient") == names(run, "precision") == whole
    heads = [f"[{part}{head}]" for part in "qkv" for head in ("", *(f" head {i}" for i in range(4)))]
    expected = [f"layers.{i}.c_attn.weight{h}" for i in range(3) for h in heads] + [
        f"layers.{i}.q_proj.weight[head {h}]" for i in range(3) for h in range(4)
    ]
    blocks = run["blocks"]
    assert sorted(names(run, "blocks")) == sorted(expected)
    by_name = {name: i for i, name in enumerate(names(run, "blocks"))}
    one = by_name["layers.1.c_attn.weight[k head 2]"]
    assert [blocks[key].values[one] for key in ("of", "operator", "layer", "rows", "cols")] == ["layers.1.c_attn.weight", "attn_k", 1, 2, 8]
    assert names(run, "stacking") == [
        f"layers.{i}.{name}.weight|layers.{i + 1}.{name}.weight" for name in ("c_attn", "q_proj", "up_proj") for i in range(2)
    ]
    assert run["stacking"]["cols"].values.tolist() == [8] * 6
    for group in NEW:
        for quantity in in_group(group):
            values = run[group][quantity.name]
            assert np.isfinite(values.values).all(), quantity.name


def test_what_stands_in_them(tmp_path: Path, read: Read) -> None:
    """SGD with momentum, whose buffer after two steps is g₁ + 0.9·g₀, against SVDs of the test's own copies."""
    model = Tower()
    gradients: list[dict[str, np.ndarray]] = []
    optimizer = SGD(model.parameters(), lr=0.1, momentum=0.9)
    with attach(optimizer, model, tmp_path / "run.zarr", every=1, measure=MEASURES, on_error="raise"):
        for step in range(2):
            model.backward(step)
            gradients.append({name: p.grad.double().numpy() for name, p in model.named_parameters() if p.grad is not None})
            optimizer.step()
    run = read(tmp_path / "run.zarr").isel(step=-1)
    for i, name in enumerate(names(run, "gradient")):
        g, m = gradients[1][name], gradients[1][name] + 0.9 * gradients[0][name]
        assert run["gradient"]["gradient_fro_norm"].values[i] == pytest.approx(np.linalg.norm(g), rel=1e-6)
        # Most gradients here are nearly singular: κ only where float32 carries it.
        if not run["gradient"]["gradient_condition_is_floor"].values[i]:
            assert run["gradient"]["gradient_condition_number"].values[i] == pytest.approx(np.linalg.cond(g), rel=1e-3)
        assert run["gradient"]["gradient_cosine"].values[i] == pytest.approx(
            (g * m).sum() / np.linalg.norm(g) / np.linalg.norm(m), rel=1e-6
        )
    for i, (name, of) in enumerate(zip(names(run, "blocks"), run["blocks"]["of"].values, strict=True)):
        label = name.removeprefix(str(of))[1:-1]
        rows = np.arange(24 if "c_attn" in name else 8).reshape(-1, 8)["qkv".find(label[0]) if label[0] in "qkv" else 0]
        rows = rows.reshape(4, 2)[int(label[-1])] if "head" in label else rows
        momentum = (gradients[1][str(of)] + 0.9 * gradients[0][str(of)])[rows]
        assert run["blocks"]["block_fro_norm"].values[i] == pytest.approx(np.linalg.norm(momentum), rel=1e-6)
        # The update per learning rate is the buffer; read back from float32 weights.
        rms = np.sqrt((momentum**2).mean())
        assert run["blocks"]["block_update_rms_per_lr"].values[i] == pytest.approx(rms, rel=1e-3, abs=1e-7)
    assert np.isnan(run["precision"]["ns_residual_bfloat16"].values).all()  # nothing is orthogonalised


def test_a_transposed_fused_projection_is_cut_by_columns(tmp_path: Path, read: Read) -> None:
    """As transformers' GPT-2 keeps it (Conv1D)."""
    model = nn.ModuleDict({"c_attn": nn.Linear(12, 4, bias=False)})
    optimizer = SGD(model.parameters(), lr=1.0)
    gradient = torch.randn(4, 12, generator=torch.Generator().manual_seed(0))
    with attach(optimizer, model, tmp_path / "run.zarr", every=1, measure=["blocks"], on_error="raise"):
        model["c_attn"].weight.grad = gradient
        optimizer.step()
    blocks = read(tmp_path / "run.zarr")["blocks"]
    assert [(str(n), int(r), int(c)) for n, r, c in zip(blocks["name"].values, blocks["rows"].values, blocks["cols"].values, strict=True)] == [
        (f"c_attn.weight[{part}]", 4, 4) for part in "qkv"
    ]  # fmt: skip
    np.testing.assert_allclose(blocks["block_fro_norm"].values[0], gradient.view(4, 3, 4).transpose(0, 1).flatten(1).norm(dim=1), rtol=1e-6)


def test_layers_that_come_later_get_blocks_and_pairs(tmp_path: Path, read: Read) -> None:
    model = Tower(3)
    optimizer = AdamW(model.layers[:2].parameters())
    with attach(optimizer, model, tmp_path / "run.zarr", every=1, measure=MEASURES, on_error="raise"):
        for step in range(4):
            if step == 2:
                optimizer.add_param_group({"params": list(model.layers[2].parameters())})
            model.backward(step)
            optimizer.step()
    run = read(tmp_path / "run.zarr")
    always = compose_names(Tower(3))
    for group in ("blocks", "stacking"):
        assert sorted(names(run, group)) == sorted(always[group])
        values = run[group]["block_fro_norm" if group == "blocks" else "stack_condition_number"].values
        late = np.array(["layers.2" in name for name in names(run, group)])
        assert late.any()
        assert np.isnan(values[:2, late]).all()
        assert np.isfinite(values[2:]).all()
        assert np.isfinite(values[:, ~late]).all()


def compose_names(model: Tower) -> dict[str, list[str]]:
    """Names of blocks and pairs of a model that was there from the beginning."""
    parts = [f"{part}{head}" for part in "qkv" for head in ("", *(f" head {i}" for i in range(4)))]
    layers = range(len(model.layers))
    fused = [f"layers.{i}.c_attn.weight[{part}]" for i in layers for part in parts]
    heads = [f"layers.{i}.q_proj.weight[head {h}]" for i in layers for h in range(4)]
    pairs = [f"layers.{i}.{n}.weight|layers.{j}.{n}.weight" for n in ("c_attn", "q_proj", "up_proj") for i, j in itertools.pairwise(layers)]
    return {"blocks": fused + heads, "stacking": pairs}


def test_a_pair_ends_with_one_of_its_layers(tmp_path: Path, read: Read) -> None:
    model = Tower(3)
    optimizer = SGD(model.parameters(), lr=0.1)
    with attach(optimizer, model, tmp_path / "run.zarr", every=1, measure=MEASURES, on_error="raise"):
        model.backward(0)
        optimizer.step()
        optimizer.param_groups[0]["params"] = [*model.layers[0].parameters(), *model.layers[1].parameters()]
        optimizer.add_param_group({"params": [nn.Parameter(torch.ones(2, 2))]})
        model.backward(1)
        optimizer.step()
    values = read(tmp_path / "run.zarr")["stacking"]["stack_condition_number"].values
    assert np.isfinite(values[0]).all()
    assert np.isfinite(values[1, :, 0]).tolist() == [True, False] * 3


def test_a_continued_run_finds_its_blocks_and_pairs(tmp_path: Path, read: Read) -> None:
    model = Tower()
    for _ in range(2):
        train(model, SGD(model.parameters(), lr=0.1), tmp_path / "run.zarr", measure=MEASURES)
    run = read(tmp_path / "run.zarr")
    assert {group: len(names(run, group)) for group in ("blocks", "stacking")} == {"blocks": 38, "stacking": 3}
    assert run["stacking"].sizes["step"] == 4


def test_heads_that_are_told(tmp_path: Path, read: Read) -> None:
    model = Tower(1)
    del model.n_head
    train(model, SGD(model.parameters(), lr=0.1), tmp_path / "told.zarr", measure=["blocks"], heads=2)
    assert len(names(read(tmp_path / "told.zarr"), "blocks")) == 3 * 3 + 2
    train(model, SGD(model.parameters(), lr=0.1), tmp_path / "none.zarr", measure=["blocks"])
    assert names(read(tmp_path / "none.zarr"), "blocks") == [f"layers.0.c_attn.weight[{part}]" for part in "qkv"]


def test_stacks_of_teon_are_problems_and_its_layers_pairs(tmp_path: Path, read: Read) -> None:
    model = Tower()
    pairs = list(zip(*(layer.parameters() for layer in model.layers), strict=True))
    train(model, TEON([{"params": list(pair)} for pair in pairs]), tmp_path / "run.zarr", measure=MEASURES)
    run = read(tmp_path / "run.zarr")
    joined = [f"layers.0.{name}.weight|layers.1.{name}.weight" for name in ("c_attn", "q_proj", "up_proj")]
    for group in ("geometry", "gradient", "precision", "stacking"):
        assert names(run, group) == joined
        assert np.isfinite(next(iter(run[group].data_vars.values())).values).all()
    assert run["precision"]["cols"].values.tolist() == [16] * 3
    # The stack's κ is what the pair says of stacking on the left; both to float64, of the same momenta.
    np.testing.assert_allclose(
        run["stacking"]["stack_condition_number"].values[..., 0], run["geometry"]["condition_number"].values, rtol=1e-4
    )
    assert (run["geometry"]["row_dispersion"].values >= 0).all()


def test_nothing_is_composed_that_was_not_asked_for() -> None:
    assert compose([], [], DEFAULT_GROUPS) == []


def test_nothing_to_record_of_what_was_asked_for(tmp_path: Path) -> None:
    model = nn.Linear(4, 4)
    with pytest.raises(ValueError, match=r"^optimizers: SGD hold no weight matrix .* to record stacking of, so nothing can be recorded$"):
        attach(SGD(model.parameters(), lr=0.1), model, tmp_path / "run.zarr", measure=["stacking"])


# What single optimizers do beside.


def test_a_corrected_gradient_without_correction_is_the_gradient(tmp_path: Path, read: Read) -> None:
    """Reference G: MARS-M with γ = 0 is Muon with an averaged momentum, where ‖g‖ ≤ 1."""
    for gamma in (0.0, 0.025):
        model = Tower()
        store = tmp_path / f"{gamma}.zarr"
        gradients = []
        optimizer = MARSM(model.parameters(), gamma=gamma)
        with attach(optimizer, model, store, every=1, on_error="raise"):
            for step in range(3):
                model.backward(step)
                gradients.append({n: p.grad.double().numpy() for n, p in model.named_parameters() if p.grad is not None})
                optimizer.step()
        update = read(store)["update"]
        for i, name in enumerate(names(read(store), "update")):
            last = 0 * gradients[0][name]
            for t, of in enumerate(gradients):
                c = of[name] + gamma * 0.95 / 0.05 * (of[name] - last)
                c, last = c / max(1, np.linalg.norm(c)), of[name]
                assert update["correction_variance_ratio"].values[t, i] == pytest.approx(c.var() / last.var(), rel=1e-5)
                cosine = (c * last).sum() / np.linalg.norm(c) / np.linalg.norm(last)
                assert update["correction_cosine"].values[t, i] == pytest.approx(cosine, rel=1e-5)
        if gamma == 0:
            assert max(np.linalg.norm(g) for of in gradients for g in of.values()) < 1
            assert update["correction_variance_ratio"].values == pytest.approx(1, rel=1e-6)
            assert update["correction_cosine"].values == pytest.approx(1, rel=1e-6)


@pytest.mark.parametrize("base", BASES)
def test_the_rotation_of_aro(base: str, tmp_path: Path, read: Read) -> None:
    """Against R and M as copied from the optimizer's state around every step."""
    model = Tower(1)
    optimizer = ARO(model.parameters(), base=base)
    before = {name: np.eye(min(p.shape)) for name, p in model.named_parameters()}
    expected = []
    with attach(optimizer, model, tmp_path / "run.zarr", every=1, on_error="raise"):
        for step in range(3):
            model.backward(step)
            optimizer.step()
            row = []
            for name, p in model.named_parameters():
                state = optimizer.state[p]
                r, m = state["rotation"].double().numpy(), state["momentum_buffer"].double().numpy()
                m = m if m.shape[0] <= m.shape[1] else m.T
                f = np.sign if base == "sign" else lambda x: x / np.linalg.norm(x, axis=1, keepdims=True)
                plain, rotated = f(m), r @ f(r.T @ m)
                gain = (m * rotated).sum() / (m * plain).sum() * np.linalg.norm(plain) / np.linalg.norm(rotated)
                row.append((1 - np.mean(np.diag(r.T @ before[name]) ** 2), gain))
                before[name] = r
            expected.append(row)
    geometry = read(tmp_path / "run.zarr")["geometry"]
    found = np.stack([geometry["rotation_drift"].values, geometry["rotation_gain"].values], -1)
    # Signs of numbers that are zero but for rounding differ in float32: single columns of the plain and the rotated direction.
    np.testing.assert_allclose(found, expected, rtol=1e-5 if base == "row" else 0.05, atol=1e-6)
    assert (found[..., 1] > 0).all()


def test_dispersion_of_what_normuon_evens_out(tmp_path: Path, read: Read) -> None:
    """Its rows are divided after the iteration, which is undone: the leverage of a tall matrix, and what is left undone of a wide one."""
    import pytorch_optimizer as po

    model = nn.ModuleDict({"tall": nn.Linear(16, 64, bias=False), "wide": nn.Linear(64, 16, bias=False)})
    optimizer = po.NorMuon([{"params": list(model.parameters()), "use_muon": True}])
    gradients = {name: torch.randn(p.shape, generator=torch.Generator().manual_seed(p.shape[0])) for name, p in model.named_parameters()}
    with attach(optimizer, model, tmp_path / "run.zarr", every=1, on_error="raise"):
        for name, p in model.named_parameters():
            p.grad = gradients[name].clone()
        optimizer.step()
    geometry = read(tmp_path / "run.zarr")["geometry"]
    for i, name in enumerate(geometry["name"].values):
        x = gradients[str(name)].double().numpy()  # the first input is a multiple of it
        x = x / np.linalg.norm(x)
        x = x if name == "wide.weight" else x.T
        for a, b, c in optimizer.param_groups[0]["ns_coeffs"][:1] * optimizer.param_groups[0]["ns_steps"]:
            gram = x @ x.T
            x = a * x + (b * gram + c * gram @ gram) @ x
        x = x if name == "wide.weight" else x.T
        for axis, key in ((1, "row_dispersion"), (0, "column_dispersion")):
            squared = (x**2).sum(axis)
            # Of O as it was made, read back: bfloat16 moves its spread by up to 2.5 % from that in float64.
            assert geometry[key].values[0, i] == pytest.approx(squared.std() / squared.mean(), rel=0.05)


# Neutrality.

# Compressed and rotated state, gradients that are thrown away or written into, closures, stacks, trust ratios, corrections.
FEW = (
    "SGD", "AdamW", "LARS", "LAMB", "MARS-AdamW", "MARS-Shampoo", "MARS-M", "MARS-M (official)", "NorMuon", "TEON", "ARO", "Turbo-Muon (AOL)", "SAM, closure",
    "AdaMuon v2 and v3 (sign)", "SOAP (pytorch_optimizer)", "Muon (torch), bfloat16 weights, no Nesterov momentum", "Muon (heavyball)", "SCIONLight",
    "AdamW 8-bit (bitsandbytes)", "Lookahead",
)  # fmt: skip


def contract_cases() -> dict[str, Case]:
    return {case.system: case for case in CASES}


def trace_of(case: Case, store: Path | None) -> list[Tensor]:
    """Weights, gradients, state and random state of a short training."""
    torch.manual_seed(0)
    model = case.model()
    built = case.build(model)
    data = torch.randint(24, (3, 8, 13), generator=torch.Generator().manual_seed(1))
    recorder = attach(built, model, store, every=1, measure=MEASURES, on_error="raise") if store else None
    trace: list[Tensor] = []
    for batch in data:

        def loss(batch: Tensor = batch) -> Tensor:
            return nn.functional.cross_entropy(model(batch[:, :-1]).flatten(0, 1), batch[:, 1:].flatten())

        (case.step or plain_step)(built, model, loss)
        trace += [p.detach().clone() for p in model.parameters()]
        trace += [p.grad.clone() for p in model.parameters() if p.grad is not None]
        trace.append(torch.get_rng_state())
    if recorder:
        recorder.close()
        assert recorder.errors == 0
    return trace + [tensor for one in as_list(built) for tensor in tensors_in(getattr(one, "state", {}))]


@pytest.mark.parametrize("system", FEW)
def test_bitwise_neutral_with_every_group(system: str, tmp_path: Path) -> None:
    case = contract_cases()[system]
    plain, recorded = trace_of(case, None), trace_of(case, tmp_path / "run.zarr")
    assert len(plain) == len(recorded)
    assert all(map(same, plain, recorded))


def test_every_group_is_one_that_attach_knows() -> None:
    assert set(NEW) < set(ON_REQUEST)


def test_no_measurement_sorts_a_large_tensor(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Quantiles are counted, not sorted: whatever orders more numbers than a matrix has rows or columns fails here."""

    def refusing(function: Callable[..., Any]) -> Callable[..., Any]:
        def unless_large(values: Any, *args: Any, **kwargs: Any) -> Any:
            assert np.size(values) < 96 * 160, function
            return function(values, *args, **kwargs)

        return unless_large

    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(160, 96), nn.Tanh(), nn.Linear(96, 160))
    optimizers = [Muon([model[0].weight], lr=0.01), AdamW([model[2].weight], lr=0.01)]
    for name in ("sort", "argsort", "partition", "argpartition", "quantile", "percentile", "median", "unique"):
        monkeypatch.setattr(np, name, refusing(getattr(np, name)))
    for name in ("sort", "argsort", "quantile", "nanquantile", "median", "kthvalue", "topk", "unique"):
        monkeypatch.setattr(torch, name, refusing(getattr(torch, name)))
    with pytest.raises(AssertionError):
        np.quantile(np.ones((96, 160)), 0.5)
    with attach(optimizers, model, tmp_path / "run.zarr", every=1, measure=MEASURES, on_error="raise"):
        for _ in range(2):
            model(torch.randn(8, 160)).square().mean().backward()
            for optimizer in optimizers:
                optimizer.step()
