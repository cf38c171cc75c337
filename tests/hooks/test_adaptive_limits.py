"""What a live schedule refuses before it begins, what it survives later, and what of it a run tells."""

import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

import accelerate
import numpy as np
import pytest
import pytorch_optimizer as po
import torch
from muons import TwoLayers, groups_of_muon, make
from test_adaptive_schedule import DIFFICULTY, Training, comparable, give_gradients, steps_in_force
from torch import nn
from torch.optim import SGD, AdamW, Muon, Optimizer
from torch.optim.lr_scheduler import LambdaLR
from typer.testing import CliRunner

from optiscope.analysis import derive_schedule, open_run
from optiscope.analysis.describe import describe
from optiscope.cli import app
from optiscope.hooks import AdaptiveSchedule, attach

# Refused, with training as it was


def recorder_of(optimizers: Any, model: nn.Module, tmp_path: Path, **options: Any) -> Any:
    return attach(optimizers, model, tmp_path / "run.zarr", **{"every": 5, **options})


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"budget": 2}, r"^budget: expected a step count of 3 to 8, got 2$"),
        ({"rule": "best"}, r"^rule: expected one of mean, .*, got 'best'$"),
        ({"family": "none"}, r"^family: expected one of .*, got 'none'$"),
        ({"window": (7, 3)}, r"^window: expected the first step before the last, got \(7, 3\)$"),
        ({"window": (0, 3)}, r"^window: expected whole numbers of steps from 1 on, got \[0, 3\]$"),
        ({"window": (4,)}, r"^window: expected the first and the last step, got \(4,\)$"),
        ({"window": (6, 9)}, r"^window: no record falls into steps 6 to 9; let it hold a multiple of the recorder's `every`$"),
        ({"window": (3, 20)}, r"^window: begins at step 3, and step 3 is taken already; let it begin later$"),
        ({"total_steps": 0}, r"^total_steps: expected whole numbers of steps from 1 on, got \[0\]$"),
        ({"refresh": (10, -1)}, r"^refresh: expected whole numbers of steps from 1 on, got \[10, -1\]$"),
    ],
    ids=lambda value: str(value)[:30],
)
def test_arguments_out_of_range(options: dict[str, Any], message: str, tmp_path: Path) -> None:
    model, optimizer = make("torch.optim.Muon")
    with recorder_of(optimizer, model, tmp_path) as recorder:
        for step in range(3):
            give_gradients(model, step)
            optimizer.step()
        before, hooks = list(optimizer.param_groups), len(optimizer._optimizer_step_post_hooks)
        with pytest.raises(ValueError, match=message):
            AdaptiveSchedule(recorder, optimizer, model, **options)
        assert optimizer.param_groups == before
        assert len(optimizer._optimizer_step_post_hooks) == hooks
        give_gradients(model, 3)
        optimizer.step()


class Unread(Optimizer):
    """Orthogonalises for all that its groups say, stands in no table, and descends along the gradient."""

    def __init__(self, params: Any) -> None:
        super().__init__(params, {"lr": 0.1, "ns_steps": 5})

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:
        for group in self.param_groups:
            for p in group["params"]:
                p.sub_(p.grad, alpha=group["lr"])


def test_recorders_and_optimizers_that_do_not_fit(tmp_path: Path) -> None:
    model, muon = make("torch.optim.Muon")
    sgd, unread = SGD(model.parameters(), lr=0.1), Unread(model.parameters())
    with pytest.raises(TypeError, match=r"^recorder: expected what `attach` returned, got NoneType$"):
        AdaptiveSchedule(None, muon, model)  # type: ignore[arg-type]
    with recorder_of([muon, sgd, unread], model, tmp_path) as recorder:
        other = Muon(TwoLayers().of_muon().values(), lr=0.02)
        with pytest.raises(ValueError, match=r"^optimizer: the recorder watches Muon, SGD, Unread and not this Muon; attach to it$"):
            AdaptiveSchedule(recorder, other, model)
        with pytest.raises(
            TypeError, match=r"^optimizer: a schedule acts through `ns_steps` in the parameter groups, and those of torch\.optim"
        ):
            AdaptiveSchedule(recorder, sgd, model)
        for apply in (True, False):
            with pytest.raises(
                TypeError, match=r"^optimizer: no Newton–Schulz iteration was seen in a step of a copy of [\w.]+\.Unread, so nothing"
            ):
                AdaptiveSchedule(recorder, unread, model, apply=apply)
        with pytest.raises(TypeError, match=r"^model: expected a torch\.nn\.Module, got str$"):
            AdaptiveSchedule(recorder, muon, "model")  # type: ignore[arg-type]
        for stranger in (TwoLayers(), model.layers[0]):
            with pytest.raises(
                ValueError, match=r"^model: none of its parameters .* \(the first: layers\.0\.q_proj\.weight\); pass the model that"
            ):
                AdaptiveSchedule(recorder, muon, stranger)
        LambdaLR(muon, lambda step: 1.0)
        with pytest.raises(ValueError, match=r"^lr_schedulers: this optimizer already has a learning-rate scheduler; pass it"):
            AdaptiveSchedule(recorder, muon, model)
        AdaptiveSchedule(recorder, muon, model, apply=False)
    with pytest.raises(ValueError, match=r"^recorder: expected one that is open, got one that is closed; attach again$"):
        AdaptiveSchedule(recorder, muon, model)
    with (
        recorder_of(muon, model, tmp_path / "update", measure=["update"]) as recorder,
        pytest.raises(
            ValueError, match=r'^recorder: a schedule is derived from the group "geometry", which it does not record; attach with it'
        ),
    ):
        AdaptiveSchedule(recorder, muon, model)


def test_one_of_several_processes_would_part_from_the_others(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.distributed, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.distributed, "get_world_size", lambda: 2)
    model, muon = make("torch.optim.Muon")
    with recorder_of(muon, model, tmp_path, ranks="alone") as recorder:
        with pytest.raises(ValueError, match=r"^recorder: one of several processes would change its optimizer alone"):
            AdaptiveSchedule(recorder, muon, model)
        AdaptiveSchedule(recorder, muon, model, apply=False)


def test_states_that_do_not_fit(tmp_path: Path) -> None:
    first = Training(tmp_path / "first.zarr", every=1, window=(2, 5)).train(0, 4)
    assert first.adaptive is not None
    early = first.adaptive.state_dict()
    late = first.train(4, 6).adaptive.state_dict()  # type: ignore[union-attr]
    with pytest.raises(ValueError, match=r"^state: is from before the commitment, and this optimizer has a schedule in force; build the"):
        first.adaptive.load_state_dict(early)
    first.close()
    other = Training(tmp_path / "other.zarr", every=1, window=(2, 6))
    assert other.adaptive is not None
    with pytest.raises(
        ValueError, match=r"^state: was saved under \{'window': \[2, 5\].* got \{'window': \[2, 6\].*; build it with the same$"
    ):
        other.adaptive.load_state_dict(early)
    with pytest.raises(ValueError, match=r"^state: expected what state_dict gave, of version 1, got version None$"):
        other.adaptive.load_state_dict({})
    other.close()

    model = nn.ModuleDict({"layers": nn.ModuleList(nn.ModuleDict({"q_proj": nn.Linear(5, 7, bias=False)}) for _ in range(2))})
    muon = Muon(model.parameters(), lr=0.02)
    with recorder_of(muon, model, tmp_path, every=1) as recorder:
        adaptive = AdaptiveSchedule(recorder, muon, model, window=(2, 5))
        groups = list(muon.param_groups)
        for state in (early, late):
            with pytest.raises(
                ValueError, match=r"^state: is of other matrices, the first of them layers\.0\.\w+\.weight; load what was saved with"
            ):
                adaptive.load_state_dict(state)
        assert muon.param_groups == groups
        assert adaptive.schedule is None


@pytest.mark.parametrize("part", ["settings", "spectra", "schedule", "decisions", "agreeing"])
@pytest.mark.parametrize("damage", ["lost", "other"])
def test_a_damaged_state_changes_nothing(part: str, damage: str, tmp_path: Path) -> None:
    first = Training(tmp_path / "first.zarr", every=1, window=(2, 5)).train(0, 6)
    assert first.adaptive is not None
    state = first.adaptive.state_dict()
    first.close()
    if damage == "lost":
        del state[part]
    elif part == "spectra":
        del state[part]["records"]
    else:
        state[part] = {"settings": {}, "schedule": "{}", "decisions": [3], "agreeing": state["agreeing"]}[part]
    fresh = Training(tmp_path / "fresh.zarr", every=1, window=(2, 5))
    assert fresh.adaptive is not None
    groups = [dict(group) for group in fresh.optimizer.param_groups]
    if (part, damage) != ("agreeing", "other"):
        with pytest.raises(ValueError, match=r"^state: "):
            fresh.adaptive.load_state_dict(state)
        assert fresh.optimizer.param_groups == groups
        assert (fresh.adaptive.schedule, fresh.adaptive.decisions) == (None, [])
    fresh.close()


def test_once_closed_nothing_is_decided(tmp_path: Path) -> None:
    live = Training(tmp_path / "run.zarr", every=1, window=(2, 5)).train(0, 3)
    assert live.adaptive is not None
    live.adaptive.close()
    live.adaptive.close()
    live.train(3, 8).close()
    assert live.decisions == []
    assert live.adaptive.schedule is None


@pytest.mark.parametrize("advice", [True, False])
def test_advice_is_not_put_into_force_by_a_checkpoint(advice: bool, tmp_path: Path) -> None:
    """Nor the other way round: the groups of the optimizer's own checkpoint are those of the one or the other."""
    first = Training(tmp_path / "first.zarr", every=1, window=(2, 5), apply=not advice).train(0, 7)
    saved = first.checkpoint()
    first.close()
    other = Training(tmp_path / "other.zarr", every=1, first_step=7, window=(2, 5), apply=advice)
    with pytest.raises(
        ValueError, match=rf"^state: was saved under .*'apply': {not advice}.* got .*'apply': {advice}.*build it with the same$"
    ):
        other.load(saved)
    assert steps_in_force(other.optimizer) == {}
    other.close()


# Survived


def messages(caplog: pytest.LogCaptureFixture) -> list[str]:
    return [record.getMessage() for record in caplog.records if record.levelno >= logging.WARNING]


def unguarded(store: Path, name: str = "torch.optim.Muon", **adaptive: Any) -> Training:
    """With a recorder that keeps errors out of the training."""
    training = Training(None, name)
    training.recorder = attach(training.optimizers, training.model, store, every=2)
    training.adaptive = AdaptiveSchedule(training.recorder, training.optimizer, training.model, **adaptive)
    return training


def no_gradients(training: Training) -> None:
    for p in training.model.parameters():
        p.grad = torch.zeros_like(p)
    training.optimizer.step()


def failing(training: Training, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("optiscope.hooks.acting.adaptive_schedule.apply_schedule", lambda *args, **options: 1 / 0)


def scheduled_later(training: Training, monkeypatch: pytest.MonkeyPatch) -> None:
    training.schedulers = [LambdaLR(training.optimizer, lambda step: 1.0)]


@pytest.mark.parametrize(
    ("happens", "said"), [(failing, "ZeroDivisionError"), (scheduled_later, "lr_schedulers: this optimizer already has")]
)
def test_what_fails_is_told_once_and_training_goes_on(
    happens: Callable[..., None], said: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    plain = Training(None).train(0, 14)
    live = unguarded(tmp_path / "run.zarr", window=(4, 8), refresh=(10, 12))
    happens(live, monkeypatch)
    live.train(0, 14).close()
    if live.schedulers:
        for group in live.optimizer.param_groups:
            del group["initial_lr"]
    assert live.fingerprint() == plain.fingerprint()
    [message] = messages(caplog)
    assert said in message
    assert "Training goes on with the Newton–Schulz steps that are in force" in message
    assert live.decisions == [("keep", 8)]
    [told] = open_run(tmp_path / "run.zarr").attrs["decisions"]
    assert said in told["why"]


def test_a_scheduler_built_later_can_be_passed_later(tmp_path: Path) -> None:
    live = unguarded(tmp_path / "run.zarr", window=(4, 8))
    scheduled_later(live, None)  # type: ignore[arg-type]
    assert live.adaptive is not None
    live.adaptive.lr_schedulers += live.schedulers
    live.train(0, 12).close()
    assert live.decisions == [("commit", 8)]
    assert len(live.schedulers[0].base_lrs) == len(live.optimizer.param_groups) == 4


def test_a_window_without_a_spectrum(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    live = unguarded(tmp_path / "run.zarr", window=(4, 8))
    for _ in range(12):
        no_gradients(live)
    live.close()
    message, silent = messages(caplog)
    assert "no step of AdamW was seen" in silent  # which never steps here
    assert "no spectrum was recorded in the window of steps 4 to 8. Training goes on" in message
    assert steps_in_force(live.optimizer) == {}
    assert live.decisions == [("keep", 8)]


def test_a_resumed_training_whose_state_was_not_loaded(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    live = Training(tmp_path / "run.zarr", first_step=6, window=(4, 8)).train(6, 12).close()
    [message] = messages(caplog)
    assert "steps 4 to 8 began before this recording, which goes on from step 6, and load_state_dict was not called" in message
    assert live.decisions == [("keep", 8)]
    assert steps_in_force(live.optimizer) == {}


def test_nothing_is_committed_as_the_recorder_closes(tmp_path: Path) -> None:
    """Its last record waits for an optimizer that does not step; the training goes on unrecorded and unchanged."""
    model = TwoLayers()
    first, *others = model.of_muon().values()
    muon, adamw = Muon(others, lr=0.02), AdamW([first])
    with attach([muon, adamw], model, tmp_path / "run.zarr", every=2, on_error="raise") as recorder:
        adaptive = AdaptiveSchedule(recorder, muon, model, window=(2, 4))
        for step in range(5):
            give_gradients(model, step)
            muon.step()
            if step < 3:
                adamw.step()
    assert len(adaptive.state_dict()["spectra"]["records"]) == 2
    assert adaptive.schedule is None
    assert len(muon.param_groups) == 1


# Wrappers


@pytest.fixture
def _accelerate_as_it_was() -> Any:
    """Its state is that of the process."""
    yield
    accelerate.state.AcceleratorState._reset_state(reset_partial_state=True)
    accelerate.state.GradientState._reset_state()


@pytest.mark.usefixtures("_accelerate_as_it_was")
@pytest.mark.parametrize("kind", ["Accelerate", "Lookahead"])
def test_within_a_wrapper(kind: str, tmp_path: Path) -> None:
    model, optimizer = make("torch.optim.Muon")
    wrapper: Any = accelerate.Accelerator(cpu=True).prepare(optimizer) if kind == "Accelerate" else po.Lookahead(optimizer, k=2)
    with attach(wrapper, model, tmp_path / "run.zarr", every=2, on_error="raise") as recorder:
        adaptive = AdaptiveSchedule(recorder, wrapper, model, window=(4, 8))
        for step in range(12):
            give_gradients(model, step)
            wrapper.step()
    assert adaptive.schedule is not None
    assert comparable(adaptive.schedule) == comparable(derive_schedule(open_run(tmp_path / "run.zarr"), window=slice(4, 8)))
    inner = optimizer if kind == "Accelerate" else wrapper.optimizer
    assert steps_in_force(inner) == {operator: entry.steps for operator, entry in adaptive.schedule.operators.items()}


# Depth


class Deep(nn.Module):
    """Six layers of two operators; of one, late layers are much harder than early ones."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.layers = nn.ModuleList(
            nn.ModuleDict({"q_proj": nn.Linear(12, 12, bias=False), "up_proj": nn.Linear(12, 24, bias=False)}) for _ in range(6)
        )

    def give_gradients(self, step: int) -> None:
        for i, (name, p) in enumerate(self.named_parameters()):
            kappa = 4.0 if "up" in name else 3.0 if i < 6 else 2000.0
            u, _, vt = np.linalg.svd(np.random.default_rng(i).standard_normal(p.shape), full_matrices=False)
            trembling = np.exp(0.1 * np.random.default_rng([step, i]).standard_normal(12))
            p.grad = torch.from_numpy((u * (np.geomspace(1, 1 / kappa, 12) * trembling)) @ vt).float()


@pytest.mark.parametrize("split", ["auto", "never"])
def test_halves_of_an_operator_get_groups_of_their_own(split: str, tmp_path: Path) -> None:
    model = Deep()
    muon = Muon(model.parameters(), lr=0.02)
    with attach(muon, model, tmp_path / "run.zarr", every=1, on_error="raise") as recorder:
        adaptive = AdaptiveSchedule(recorder, muon, model, window=(2, 5), split=split)
        for step in range(6):
            model.give_gradients(step)
            muon.step()
    schedule = adaptive.schedule
    assert schedule is not None
    assert comparable(schedule) == comparable(derive_schedule(open_run(tmp_path / "run.zarr"), window=slice(2, 5), split=split))
    halves = {"attn_q:0-2", "attn_q:3-5"} if split == "auto" else {"attn_q"}
    assert halves <= set(schedule.operators)
    names = {id(p): name for name, p in model.named_parameters()}
    in_force = {names[id(p)]: group["ns_steps"] for group in muon.param_groups for p in group["params"]}
    assert in_force == {name: entry.steps for entry in schedule.operators.values() for name in entry.matrices}
    assert [entry["gain_interval"] for entry in adaptive.decisions] == [schedule.objective["choice"]["relative_gain_interval"]]
    assert adaptive.decisions[0]["gain_interval"] is not None


# What a run tells


def test_decisions_are_told_and_kept_when_the_run_is_continued(tmp_path: Path) -> None:
    store = tmp_path / "run.zarr"
    live = Training(store, every=1, window=(2, 5), refresh=(8,)).train(0, 9).close()
    assert live.adaptive is not None
    with attach(live.optimizers, live.model, store, every=1):
        live.train(9, 11)
    assert describe(open_run(store))["decisions"] == live.adaptive.decisions
    assert live.decisions == [("commit", 5), ("keep", 8)]
    result = CliRunner().invoke(app, ["info", str(store)], env={"COLUMNS": "250"})
    assert result.exit_code == 0
    steps = ", ".join(f"{operator} {entry.steps}" for operator, entry in live.committed.operators.items())
    lines = result.stdout.splitlines()
    gain = live.committed.objective["choice"]["relative_gain"]
    assert f"step 5: schedule of Muon, commit: {steps} (end of the window: {gain:.1%} gain over 5 steps for all)" in lines
    assert f"step 8: schedule of Muon, keep: {steps} (due at step 8)" in lines


def test_gradients_deserve_different_steps() -> None:
    """What the tests rest on: operators of the difficulty that was built, in every matrix."""
    model = TwoLayers()
    give_gradients(model, 0)
    for name, p in model.of_muon().items():
        assert p.grad is not None
        s = np.linalg.svd(p.grad.double().numpy(), compute_uv=False)
        built = DIFFICULTY[{"q": "attn_q", "v": "attn_v", "u": "mlp_up", "m": "other"}[name.split(".")[2][0]]]
        assert 0.4 < s[0] / s[-1] / built < 2.5  # e^{±4·0.2} is what the trembling does at most
    assert len(list(groups_of_muon(make("torch.optim.Muon")[1]))) == 1
