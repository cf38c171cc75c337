"""The callback for the transformers Trainer, in trainings by the real one: a small Llama of its own, on the demo's text."""

import gc
import logging
import subprocess
import sys
import weakref
from collections.abc import Callable, Iterator
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from optiscope.examples.byte_llama import language_reference

transformers = pytest.importorskip("transformers")
accelerate = pytest.importorskip("accelerate")

from optiscope.hooks.huggingface import OptiscopeCallback  # noqa: E402

Read = Callable[[str | Path], Any]

SEQUENCE = 16
MATRICES = {
    "model.layers.0.self_attn.q_proj": "attn_q",
    "model.layers.0.self_attn.k_proj": "attn_k",
    "model.layers.0.self_attn.v_proj": "attn_v",
    "model.layers.0.self_attn.o_proj": "attn_o",
    "model.layers.0.mlp.gate_proj": "mlp_gate",
    "model.layers.0.mlp.up_proj": "mlp_up",
    "model.layers.0.mlp.down_proj": "mlp_down",
    "model.embed_tokens": "embed",
    "lm_head": "head",
}


@pytest.fixture(autouse=True)
def _accelerate_as_it_was() -> Iterator[None]:
    """Accelerate keeps its settings, of gradient accumulation among others, for the whole process."""
    yield
    accelerate.state.AcceleratorState._reset_state(reset_partial_state=True)
    accelerate.state.GradientState._reset_state()


@cache
def text() -> tuple[list[dict[str, Tensor]], list[dict[str, Tensor]]]:
    """400 training and 8 validation sequences."""
    parts = zip(language_reference(), (400, 8), strict=True)
    training, validation = (data[: count * SEQUENCE].view(count, SEQUENCE) for data, count in parts)
    return [{"input_ids": w, "labels": w} for w in training], [{"input_ids": w, "labels": w} for w in validation]


class Told(transformers.TrainerCallback):
    """What the trainer tells every callback: the numbers it logs, with their steps. Stops the training by an exception at a step."""

    def __init__(self, fail_at: int | None = None, error: BaseException | None = None) -> None:
        self.logs: list[tuple[int, dict[str, float]]] = []
        self.steps = self.micro_steps = 0
        self.fail_at, self.error = fail_at, error or RuntimeError("out of memory")

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **kwargs: Any) -> None:
        self.logs.append((state.global_step, dict(logs)))

    def on_substep_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.micro_steps += 1

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.steps += 1
        if state.global_step == self.fail_at:
            raise self.error


def trainer(folder: Path, *callbacks: Any, **settings: Any) -> Any:
    config = transformers.LlamaConfig(
        vocab_size=256, hidden_size=32, intermediate_size=48, num_hidden_layers=1, num_attention_heads=2, num_key_value_heads=1,
        max_position_embeddings=SEQUENCE, bos_token_id=None, eos_token_id=None, attention_dropout=0.1,
    )  # fmt: skip
    torch.manual_seed(0)
    model = transformers.LlamaForCausalLM(config)
    training, validation = text()
    arguments = {
        "output_dir": str(folder), "use_cpu": True, "report_to": [], "disable_tqdm": True, "per_device_train_batch_size": 4, "seed": 1,
        "gradient_accumulation_steps": 2, "max_steps": 6, "logging_steps": 1, "learning_rate": 3e-3, "save_strategy": "no",
        "dataloader_pin_memory": False, **settings,
    }  # fmt: skip
    return transformers.Trainer(
        model=model, args=transformers.TrainingArguments(**arguments), train_dataset=training,
        eval_dataset=validation, callbacks=list(callbacks),
    )  # fmt: skip


class StopAt(transformers.TrainerCallback):
    """Ends the training after a step, as early stopping does."""

    def __init__(self, step: int) -> None:
        self.step = step

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        control.should_training_stop = state.global_step == self.step


def fingerprint(trained: Any) -> list[bytes]:
    """Every bit that a training leaves: weights, moments, random numbers."""
    weights = [p.detach().numpy().tobytes() for p in trained.model.parameters()]
    optimizer = trained.optimizer.optimizer
    moments = [v.numpy().tobytes() for p in trained.model.parameters() for v in optimizer.state[p].values()]
    return [*weights, *moments, torch.get_rng_state().numpy().tobytes()]


def steps_in(run: Any, group: str = "update") -> list[int]:
    return run[group]["step"].values.tolist()


def hooks_on(trained: Any) -> int:
    optimizer = trained.optimizer.optimizer
    return len(optimizer._optimizer_step_pre_hooks) + len(optimizer._optimizer_step_post_hooks)


def test_a_training_is_recorded_and_stays_the_same_to_the_bit(tmp_path: Path, read: Read) -> None:
    evaluating = {"eval_strategy": "steps", "eval_steps": 2}
    plain = trainer(tmp_path / "plain", **evaluating)
    plain.train()
    told = Told()
    callback = OptiscopeCallback(tmp_path / "run.zarr", every=1, about={"seed": 1}, on_error="raise")
    watched = trainer(tmp_path / "watched", callback, told, **evaluating)
    watched.train()
    assert fingerprint(watched) == fingerprint(plain)
    assert hooks_on(watched) == 0

    run = read(tmp_path / "run.zarr")
    assert run.attrs["about"] == {"seed": 1}
    # Accumulation: 12 batches, 6 steps.
    assert (told.steps, told.micro_steps) == (6, 6)
    assert steps_in(run) == [1, 2, 3, 4, 5, 6]
    update = run["update"].ds
    assert dict(zip(update["name"].values.tolist(), update["operator"].values.tolist(), strict=True)) == {
        f"{name}.weight": operator for name, operator in MATRICES.items()
    }
    assert {"loss", "grad_norm", "learning_rate", "eval_loss", "train_loss"} <= {name for _, logs in told.logs for name in logs}
    for step, logs in told.logs:
        for name, value in logs.items():
            assert run["scalars"][name].sel(step=step).item() == value
    assert np.isnan(run["scalars"]["eval_loss"].sel(step=[1, 3, 5])).all()
    # The learning rate that the recorder reads in the optimizer is the one that the trainer logs.
    logged = [logs["learning_rate"] for _, logs in told.logs if "learning_rate" in logs]
    assert (update["lr"].values == np.array(logged, dtype=update["lr"].dtype)[:, None]).all()


class Disturbing(transformers.TrainerCallback):
    def on_step_end(self, *args: Any, **kwargs: Any) -> None:
        torch.rand(1)


def test_the_fingerprint_sees_a_callback_that_draws_a_random_number(tmp_path: Path) -> None:
    plain, disturbed = trainer(tmp_path, max_steps=2), trainer(tmp_path, Disturbing(), max_steps=2)
    plain.train()
    before = fingerprint(plain)
    disturbed.train()
    assert fingerprint(disturbed)[:-1] != before[:-1]


def test_resuming_from_a_checkpoint_continues_the_run(tmp_path: Path, read: Read) -> None:
    saving = {"save_strategy": "steps", "save_steps": 3}
    store = tmp_path / "run.zarr"
    plain = trainer(tmp_path / "plain", **saving)
    plain.train()
    first = trainer(tmp_path / "watched", OptiscopeCallback(store, every=1), StopAt(3), **saving)
    first.train()
    assert steps_in(read(store)) == [1, 2, 3]
    again = trainer(tmp_path / "watched", OptiscopeCallback(store, every=1, on_error="raise"), **saving)
    again.train(resume_from_checkpoint=True)
    run = read(store)
    assert steps_in(run) == [1, 2, 3, 4, 5, 6]
    assert np.isfinite(run["scalars"]["loss"]).all()
    assert fingerprint(again) == fingerprint(plain)


def test_resuming_before_later_records_keeps_them_as_a_lineage(tmp_path: Path, read: Read, caplog: pytest.LogCaptureFixture) -> None:
    saving = {"save_strategy": "steps", "save_steps": 3}
    store = tmp_path / "run.zarr"
    crashed = OptiscopeCallback(store, every=1)
    with pytest.raises(RuntimeError, match="out of memory"):
        trainer(tmp_path / "out", crashed, Told(fail_at=5), **saving).train()
    crashed.close()
    caplog.clear()
    trainer(tmp_path / "out", OptiscopeCallback(store, every=1), **saving).train(resume_from_checkpoint=True)
    run, left = read(store), read(store / "lineages" / "0")
    assert (steps_in(run), steps_in(left)) == ([1, 2, 3, 4, 5, 6], [4, 5])
    assert left.attrs["after"] == 3
    assert "this training goes on from step 3: the later ones are kept as lineage 0" in caplog.text
    assert not (tmp_path / "run-2.zarr").exists()


def test_early_stopping(tmp_path: Path, read: Read) -> None:
    # With a learning rate of nothing, the loss of the validation text never becomes better.
    stopping = {
        "eval_strategy": "steps", "eval_steps": 1, "save_strategy": "steps", "save_steps": 1, "load_best_model_at_end": True,
        "metric_for_best_model": "eval_loss", "learning_rate": 0.0, "max_steps": 20,
    }  # fmt: skip
    callback = OptiscopeCallback(tmp_path / "run.zarr", every=1, on_error="raise")
    watched = trainer(tmp_path, transformers.EarlyStoppingCallback(early_stopping_patience=2), callback, **stopping)
    watched.train()
    assert watched.state.global_step == 3
    assert steps_in(read(tmp_path / "run.zarr")) == [1, 2, 3]
    assert hooks_on(watched) == 0


@pytest.mark.parametrize("error", [RuntimeError("out of memory"), KeyboardInterrupt()], ids=lambda error: type(error).__name__)
def test_an_exception_and_training_again(error: BaseException, tmp_path: Path, read: Read) -> None:
    store = tmp_path / "run.zarr"
    callback = OptiscopeCallback(store, every=1, on_error="raise")
    told = Told(fail_at=4, error=error)
    failing = trainer(tmp_path, callback, told, save_strategy="steps", save_steps=3)
    with pytest.raises(type(error)):
        failing.train()
    assert steps_in(read(store)) == [1, 2, 3]  # committed with the checkpoint, the trainer having told nobody of its end
    callback.close()
    assert steps_in(read(store)) == [1, 2, 3, 4]
    assert hooks_on(failing) == 0
    told.fail_at = None
    failing.train()
    assert steps_in(read(store)) == list(range(1, 11))
    assert hooks_on(failing) == 0


def test_training_again_ends_what_an_exception_left_open(tmp_path: Path, read: Read) -> None:
    store, told = tmp_path / "run.zarr", Told(fail_at=2)
    failing = trainer(tmp_path, OptiscopeCallback(store, every=1, on_error="raise"), told, max_steps=3)
    with pytest.raises(RuntimeError, match="out of memory"):
        failing.train()
    told.fail_at = None
    failing.train()
    assert steps_in(read(store)) == [1, 2, 3, 4, 5]
    assert hooks_on(failing) == 0


def test_a_trainer_thrown_away_after_an_exception_is_freed_and_its_records_committed(tmp_path: Path, read: Read) -> None:
    store = tmp_path / "run.zarr"
    failing = trainer(tmp_path, OptiscopeCallback(store, every=1), Told(fail_at=2))
    model = weakref.ref(failing.model)
    try:
        failing.train()
    except RuntimeError:
        del failing
    accelerate.state.GradientState._reset_state()  # holds the data loader
    gc.collect()
    assert model() is None
    assert steps_in(read(store)) == [1, 2]


def test_an_evaluation_after_the_training_is_logged_at_its_last_step(tmp_path: Path, read: Read) -> None:
    watched = trainer(tmp_path, OptiscopeCallback(tmp_path / "run.zarr", every=4, on_error="raise"))
    watched.evaluate()  # before the training there is no run yet
    watched.train()
    loss = watched.evaluate()["eval_loss"]
    scalars = read(tmp_path / "run.zarr")["scalars"]
    assert scalars["eval_loss"].sel(step=6).item() == loss
    assert np.isnan(scalars["eval_loss"].sel(step=slice(0, 5))).all()


def test_other_processes_than_the_main_one_record_nothing(tmp_path: Path) -> None:
    callback, model = OptiscopeCallback(tmp_path / "run.zarr"), nn.Linear(2, 2)
    state = transformers.TrainerState(is_world_process_zero=False)
    optimizer = torch.optim.AdamW(model.parameters())
    callback.on_train_begin(None, state, None, model=model, optimizer=optimizer)
    callback.on_log(None, state, None, logs={"loss": 1.0})
    callback.on_save(None, state, None)
    callback.on_train_end(None, state, None)
    assert not (tmp_path / "run.zarr").exists()
    assert not optimizer._optimizer_step_pre_hooks


def test_trouble_does_not_reach_the_training(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    (tmp_path / "file").write_text("precious")
    plain = trainer(tmp_path)
    plain.train()
    before = fingerprint(plain)
    watched = trainer(tmp_path, OptiscopeCallback(tmp_path / "file" / "run.zarr"))
    with caplog.at_level(logging.WARNING, "optiscope"):
        watched.train()
    assert fingerprint(watched) == before
    assert [record.message.split(" (")[0] for record in caplog.records if record.name == "optiscope"] == [
        "optiscope: this training is not recorded"
    ]
    assert (tmp_path / "file").read_text() == "precious"
    with pytest.raises(OSError, match="file"):
        trainer(tmp_path, OptiscopeCallback(tmp_path / "file" / "run.zarr", on_error="raise")).train()


def test_bad_arguments_are_refused_before_the_training() -> None:
    with pytest.raises(ValueError, match=r"^every: expected a number of steps of at least 1"):
        OptiscopeCallback("run.zarr", every=0)
    with pytest.raises(ValueError, match=r"^overhead: expected a share"):
        OptiscopeCallback("run.zarr", overhead=2)
    with pytest.raises(TypeError, match=r"^about: expected a text, a number or a truth value"):
        OptiscopeCallback("run.zarr", about={"data": None})


def test_a_missing_library_is_named_with_its_installation() -> None:
    code = """import sys, optiscope.hooks
assert not {"transformers", "accelerate"} & set(sys.modules)
sys.modules["transformers"] = None  # as if it were not installed
try:
    import optiscope.hooks.huggingface
except ImportError as error:
    print(error)"""
    printed = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert printed == 'optiscope.hooks.huggingface needs transformers: pip install "optiscope[hf]"\n'
