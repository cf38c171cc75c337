"""The callback for Lightning, in fits by the real Trainer: the demo's model and text, made small."""

import importlib.util
import logging
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from functools import cache
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from optiscope.examples.byte_llama import ByteLlama, Config, language_reference

pl = pytest.importorskip("lightning.pytorch")

from optiscope.hooks.lightning import OptiscopeCallback  # noqa: E402

Read = Callable[[str | Path], Any]

CONFIG = Config(d=32, layers=1, heads=2, kv_heads=1, inner=48, sequence=16, batch=4)
OPERATORS = {
    "embed_tokens": "embed", "layers.0.attn.q_proj": "attn_q", "layers.0.attn.k_proj": "attn_k", "layers.0.attn.v_proj": "attn_v",
    "layers.0.attn.o_proj": "attn_o", "layers.0.mlp.gate_proj": "mlp_gate", "layers.0.mlp.up_proj": "mlp_up",
    "layers.0.mlp.down_proj": "mlp_down", "lm_head": "head",
}  # fmt: skip

pytestmark = [
    # Advice on speed: the data are a small tensor in memory, and a fit has a handful of batches.
    pytest.mark.filterwarnings("ignore:.*does not have many workers:UserWarning"),
    pytest.mark.filterwarnings("ignore:The number of training batches:UserWarning"),
    pytest.mark.filterwarnings("ignore:Checkpoint directory .* exists and is not empty:UserWarning"),
    # Not every test has validation data.
    pytest.mark.filterwarnings("ignore:You defined a `validation_step` but have no `val_dataloader`:UserWarning"),
    # Lightning's own use of torch.
    pytest.mark.filterwarnings("ignore:.*isinstance.treespec, LeafSpec.*:FutureWarning"),
]


@pytest.fixture(autouse=True)
def _interrupts_as_they_were() -> Iterator[None]:
    """Lightning, interrupted, ignores interrupts for the rest of the process."""
    before = signal.getsignal(signal.SIGINT)
    yield
    signal.signal(signal.SIGINT, before)


@cache
def loader(count: int, validation: bool = False) -> Any:
    """`count` batches of consecutive windows, in order."""
    data = language_reference()[validation][: count * CONFIG.batch * (CONFIG.sequence + 1)]
    return torch.utils.data.DataLoader(list(data.view(-1, CONFIG.sequence + 1)), batch_size=CONFIG.batch)


class Module(pl.LightningModule):
    """Keeps what it logs, and the gradients of every step before they are clipped."""

    def __init__(self, lr: float = 3e-3) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.net = ByteLlama(CONFIG)
        self.net.norm.register_forward_hook(lambda module, args, output: F.dropout(output, 0.1, training=module.training))
        self.lr = lr
        self.losses: list[float] = []
        self.validation_losses: list[list[float]] = []
        self.gradients: list[dict[str, Tensor]] = []

    def loss(self, window: Tensor) -> Tensor:
        return self.net(window[:, :-1], window[:, 1:])

    def training_step(self, batch: Tensor, index: int) -> Tensor:
        loss = self.loss(batch)
        self.losses.append(loss.item())
        self.log("loss", loss, on_step=True, on_epoch=True)
        return loss

    def on_validation_epoch_start(self) -> None:
        self.validation_losses.append([])

    def validation_step(self, batch: Tensor, index: int) -> None:
        loss = self.loss(batch)
        self.validation_losses[-1].append(loss.item())
        self.log("val/loss", loss)

    def on_before_optimizer_step(self, optimizer: Any) -> None:
        self.gradients.append({name: p.grad.clone() for name, p in self.named_parameters()})

    def configure_optimizers(self) -> Any:
        return torch.optim.AdamW(self.parameters(), lr=self.lr)


class Manual(Module):
    """Steps Muon and AdamW itself."""

    automatic_optimization = False

    def training_step(self, batch: Tensor, index: int) -> None:
        loss = super().training_step(batch, index)
        for optimizer in self.optimizers():
            optimizer.zero_grad()
        self.manual_backward(loss)
        for optimizer in self.optimizers():
            optimizer.step()

    def configure_optimizers(self) -> Any:
        hidden = [p for p in self.net.layers.parameters() if p.ndim == 2]
        rest = [p for p in self.parameters() if not any(p is h for h in hidden)]
        return torch.optim.Muon(hidden, lr=0.02), torch.optim.AdamW(rest, lr=3e-3)


def trainer(folder: Path, *callbacks: Any, library: Any = pl, **settings: Any) -> Any:
    given = {
        "max_epochs": 1, "accelerator": "cpu", "logger": False, "enable_progress_bar": False, "enable_model_summary": False,
        "enable_checkpointing": False, "log_every_n_steps": 1, **settings,
    }  # fmt: skip
    return library.Trainer(callbacks=list(callbacks), default_root_dir=folder, **given)


def fingerprint(module: nn.Module, trained: Any) -> list[bytes]:
    """Every bit that a training leaves: weights, optimizers' state, random numbers."""
    state = [v for o in trained.optimizers for p in module.parameters() if p in o.state for v in o.state[p].values()]
    return [t.detach().numpy().tobytes() for t in (*module.parameters(), *state, torch.get_rng_state())]


def steps_in(run: Any, group: str = "update") -> list[int]:
    return run[group]["step"].values.tolist()


def hooks_on(trained: Any) -> int:
    return sum(len(o._optimizer_step_pre_hooks) + len(o._optimizer_step_post_hooks) for o in trained.optimizers)


def test_a_fit_is_recorded_and_stays_the_same_to_the_bit(tmp_path: Path, read: Read) -> None:
    settings = {"accumulate_grad_batches": 2, "max_epochs": 2, "val_check_interval": 4, "gradient_clip_val": 0.5}

    def fit(*callbacks: Any) -> tuple[Module, list[bytes]]:
        module, fitting = Module(), trainer(tmp_path, *callbacks, **settings)
        fitting.fit(module, loader(8), loader(2, validation=True))
        assert hooks_on(fitting) == 0
        return module, fingerprint(module, fitting)

    module, plain = fit()
    recorded, watched = fit(OptiscopeCallback(tmp_path / "run.zarr", every=1, about={"seed": 1}, on_error="raise"))
    assert watched == plain
    assert recorded.losses == module.losses

    run = read(tmp_path / "run.zarr")
    assert run.attrs["about"] == {"seed": 1}
    # Accumulation: 2 epochs of 8 batches, 8 steps.
    assert len(module.losses) == 16
    assert steps_in(run) == list(range(1, 9))
    update = run["update"].ds
    assert dict(zip(update["name"].values.tolist(), update["operator"].values.tolist(), strict=True)) == {
        f"net.{name}.weight": operator for name, operator in OPERATORS.items()
    }
    scalars = run["scalars"].ds.sel(step=list(range(1, 9)))
    # A step has the loss of its last batch; Lightning logs in float32.
    np.testing.assert_allclose(scalars["loss_step"], module.losses[1::2], rtol=1e-6)
    epochs = np.array(module.losses).reshape(2, 8).mean(axis=1)
    np.testing.assert_allclose(scalars["loss_epoch"], [np.nan] * 3 + [epochs[0]] + [np.nan] * 3 + [epochs[1]], rtol=1e-6)
    # The first validation is the sanity check, before the training; then one every second step.
    means = [np.mean(losses) for losses in module.validation_losses[1:]]
    expected = [value for mean in means for value in (np.nan, mean)]
    np.testing.assert_allclose(scalars["val.loss"], expected, rtol=1e-6)


def test_the_gradient_is_the_one_of_the_whole_step(tmp_path: Path, read: Read) -> None:
    module, callback = Module(), OptiscopeCallback(tmp_path / "run.zarr", every=1, on_error="raise")
    trainer(tmp_path, callback, accumulate_grad_batches=2).fit(module, loader(8))
    update = read(tmp_path / "run.zarr")["update"].ds
    for i, name in enumerate(update["name"].values.tolist()):
        expected = [seen[name].double().square().mean().sqrt().item() for seen in module.gradients]
        np.testing.assert_allclose(update["grad_rms"][:, i], expected, rtol=1e-6)


def test_numbers_are_logged_no_more_often_than_the_trainer_logs(tmp_path: Path, read: Read) -> None:
    module, callback = Module(), OptiscopeCallback(tmp_path / "run.zarr", every=1, on_error="raise")
    trainer(tmp_path, callback, log_every_n_steps=3).fit(module, loader(8))
    logged = read(tmp_path / "run.zarr")["scalars"]["loss_step"]
    # The last step's is read with the numbers of the epoch.
    assert logged["step"].values[np.isfinite(logged)].tolist() == [3, 6, 8]
    np.testing.assert_allclose(logged.sel(step=[3, 6, 8]), [module.losses[i] for i in (2, 5, 7)], rtol=1e-6)


def test_resuming_from_a_checkpoint_continues_the_run(tmp_path: Path, read: Read) -> None:
    def resume(store: Path | None) -> list[bytes]:
        callbacks = [[OptiscopeCallback(store, every=1, on_error="raise")] if store else [] for _ in range(2)]
        first = trainer(tmp_path, *callbacks[0])
        first.fit(Module(), loader(3))
        first.save_checkpoint(tmp_path / "three.ckpt")
        module, second = Module(), trainer(tmp_path, *callbacks[1], max_epochs=2)
        second.fit(module, loader(3), ckpt_path=tmp_path / "three.ckpt", weights_only=False)
        assert second.global_step == 6
        return fingerprint(module, second)

    assert resume(tmp_path / "run.zarr") == resume(None)
    run = read(tmp_path / "run.zarr")
    assert steps_in(run) == [1, 2, 3, 4, 5, 6]
    assert np.isfinite(run["scalars"]["loss_step"].sel(step=slice(1, None))).all()


def test_several_optimizers_and_resuming_before_later_records(tmp_path: Path, read: Read, caplog: pytest.LogCaptureFixture) -> None:
    store = tmp_path / "run.zarr"

    def fit(steps: int, *callbacks: Any) -> tuple[list[bytes], Any]:
        module, fitting = Manual(), trainer(tmp_path, *callbacks)
        fitting.fit(module, loader(steps))
        return fingerprint(module, fitting), fitting

    assert fit(5, OptiscopeCallback(store, every=1, on_error="raise"))[0] == fit(5)[0]
    run = read(store)
    assert steps_in(run) == [1, 2, 3, 4, 5]
    assert set(run["geometry"]["optimizer"].values.tolist()) == {"Muon"}
    _, after_two = fit(2)
    after_two.save_checkpoint(tmp_path / "two.ckpt")
    assert after_two.global_step == 4  # of both optimizers together
    with caplog.at_level(logging.WARNING, "optiscope"):
        callback = OptiscopeCallback(store, every=1)
        trainer(tmp_path, callback, max_epochs=2).fit(Manual(), loader(2), ckpt_path=tmp_path / "two.ckpt", weights_only=False)
    run, left = read(store), read(store / "lineages" / "0")
    assert (steps_in(run), steps_in(left)) == ([1, 2, 3, 4], [3, 4, 5])
    assert left.attrs["after"] == 2
    assert f"{store} holds records up to step 5, and this training goes on from step 2: the later ones are kept as lineage 0" in caplog.text
    assert not (tmp_path / "run-2.zarr").exists()


def test_early_stopping(tmp_path: Path, read: Read) -> None:
    # With a learning rate of nothing, the loss of the validation text never becomes better.
    callback = OptiscopeCallback(tmp_path / "run.zarr", every=1, on_error="raise")
    fitting = trainer(tmp_path, pl.callbacks.EarlyStopping("val/loss", patience=2), callback, max_epochs=10)
    fitting.fit(Module(lr=0.0), loader(2), loader(1, validation=True))
    assert fitting.global_step == 6
    run = read(tmp_path / "run.zarr")
    assert steps_in(run) == [1, 2, 3, 4, 5, 6]
    assert np.isfinite(run["scalars"]["val.loss"].sel(step=[2, 4, 6])).all()
    assert hooks_on(fitting) == 0


class FailAt(pl.Callback):
    def __init__(self, step: int, error: BaseException) -> None:
        self.step, self.error = step, error

    def on_train_batch_end(self, trainer: Any, *args: Any) -> None:
        if trainer.global_step == self.step:
            raise self.error


@pytest.mark.parametrize(
    ("error", "raised"), [(RuntimeError("out of memory"), RuntimeError), (KeyboardInterrupt(), SystemExit)], ids=["error", "interrupt"]
)
def test_an_exception_closes_the_run(error: BaseException, raised: type[BaseException], tmp_path: Path, read: Read) -> None:
    fitting = trainer(tmp_path, OptiscopeCallback(tmp_path / "run.zarr", every=1, on_error="raise"), FailAt(3, error))
    with pytest.raises(raised):
        fitting.fit(Module(), loader(6))
    assert steps_in(read(tmp_path / "run.zarr")) == [1, 2, 3]
    assert hooks_on(fitting) == 0


def test_fitting_again_continues_the_run(tmp_path: Path, read: Read) -> None:
    callback = OptiscopeCallback(tmp_path / "run.zarr", every=2, on_error="raise")
    module, fitting = Module(), trainer(tmp_path, callback)
    fitting.fit(module, loader(3))
    fitting.fit_loop.max_epochs = 2
    fitting.fit(module, loader(3))  # its global_step goes on, from 3
    trainer(tmp_path, callback).fit(module, loader(3))  # counts from 0 again
    assert steps_in(read(tmp_path / "run.zarr")) == [2, 4, 6, 8]
    assert callback._session.recorder.step == 9


def test_a_validation_after_the_fit_is_logged_at_its_last_step(tmp_path: Path, read: Read) -> None:
    callback = OptiscopeCallback(tmp_path / "run.zarr", every=4, on_error="raise")
    module, fitting = Module(), trainer(tmp_path, callback, num_sanity_val_steps=1)
    fitting.validate(module, loader(2, validation=True), verbose=False)  # before the fit there is no run yet
    fitting.fit(module, loader(6))
    fitting.validate(module, loader(2, validation=True), verbose=False)
    [_, of_all] = module.validation_losses
    # The sanity check before another fit validates only one batch, and is no result.
    fitting.fit_loop.max_epochs = 2
    fitting.fit(module, loader(1), loader(2, validation=True))
    logged = read(tmp_path / "run.zarr")["scalars"]["val.loss"]
    assert logged["step"].values[np.isfinite(logged)].tolist() == [6, 7]
    np.testing.assert_allclose(logged.sel(step=6), np.mean(of_all), rtol=1e-6)


def test_other_processes_than_the_main_one_record_nothing(tmp_path: Path) -> None:
    callback, optimizer = OptiscopeCallback(tmp_path / "run.zarr"), torch.optim.AdamW(nn.Linear(2, 2).parameters())
    other = SimpleNamespace(is_global_zero=False, optimizers=[optimizer], global_step=0, log_every_n_steps=1, sanity_checking=False)
    callback.on_train_start(other, None)
    callback.on_train_epoch_start(other, None)
    callback.on_train_batch_end(other, None, None, None, 0)
    callback.on_validation_end(other, None)
    callback.on_save_checkpoint(other, None, {})
    callback.on_train_end(other, None)
    assert not (tmp_path / "run.zarr").exists()
    assert not optimizer._optimizer_step_pre_hooks


def test_trouble_does_not_reach_the_training(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    (tmp_path / "file").write_text("precious")

    def fit(*callbacks: Any) -> list[bytes]:
        module, fitting = Module(), trainer(tmp_path, *callbacks)
        fitting.fit(module, loader(3))
        return fingerprint(module, fitting)

    with caplog.at_level(logging.WARNING, "optiscope"):
        assert fit(OptiscopeCallback(tmp_path / "file" / "run.zarr")) == fit()
    said = [record.message.split(" (")[0] for record in caplog.records if record.name == "optiscope"]
    assert said == ["optiscope: this training is not recorded"]
    with pytest.raises(OSError, match="file"):
        fit(OptiscopeCallback(tmp_path / "file" / "run.zarr", on_error="raise"))


def test_the_older_name_of_the_library(tmp_path: Path, read: Read, monkeypatch: pytest.MonkeyPatch) -> None:
    older = pytest.importorskip("pytorch_lightning")
    spec: Any = importlib.util.find_spec("optiscope.hooks.lightning")
    module = importlib.util.module_from_spec(spec)
    with monkeypatch.context() as only_the_older:
        only_the_older.delitem(sys.modules, "lightning.pytorch")
        spec.loader.exec_module(module)
    assert not issubclass(module.OptiscopeCallback, pl.Callback)

    class Old(older.LightningModule):
        training_step, loss, configure_optimizers = Module.training_step, Module.loss, Module.configure_optimizers

        def __init__(self) -> None:
            super().__init__()
            self.net, self.lr, self.losses = ByteLlama(CONFIG), 0.01, []

    callback = module.OptiscopeCallback(tmp_path / "run.zarr", every=1, on_error="raise")
    trainer(tmp_path, callback, library=older).fit(Old(), loader(3))
    run = read(tmp_path / "run.zarr")
    assert steps_in(run) == [1, 2, 3]
    assert np.isfinite(run["scalars"]["loss_step"].sel(step=[1, 2, 3])).all()


def test_a_missing_library_is_named_with_its_installation() -> None:
    code = """import sys, optiscope.hooks
assert not {"lightning", "pytorch_lightning"} & set(sys.modules)
sys.modules.update({"lightning": None, "pytorch_lightning": None})  # as if they were not installed
try:
    import optiscope.hooks.lightning
except ImportError as error:
    print(error)"""
    printed = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert printed == 'optiscope.hooks.lightning needs lightning or pytorch_lightning: pip install "optiscope[lightning]"\n'
