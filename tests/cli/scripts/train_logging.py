"""Trains a pair of models and logs with everything there is, before the first step too; prints what the libraries were given."""

import inspect
import pathlib
import pickle
import sys

sys.path.insert(0, str(pathlib.Path(__file__).with_name("loggers")))

import wandb  # noqa: I001 (before torch)
from mlflow import log_metric, log_metrics
from mlflow.tracking.fluent import metrics_of_the_run
from tensorboardX import SummaryWriter

import torch

from optiscope.hooks import log

torch.manual_seed(0)
G, D = torch.nn.Linear(4, 3), torch.nn.Linear(3, 4)
optimizer = torch.optim.SGD([*G.parameters(), *D.parameters()], lr=0.1)


class Writer(SummaryWriter):
    def add_scalar(self, tag, scalar_value, *args, **kwargs):
        super().add_scalar(f"mine/{tag}", scalar_value, *args, **kwargs)


try:
    wandb.log({"loss": 1})
except RuntimeError as error:
    print(error)
run, writer = wandb.init(project="any"), Writer()
try:
    run.log("words")
except TypeError as error:
    print(error)
loss = torch.ones(())
log(own=loss, early="no number")
loss.zero_()
wandb.log({"early/loss": 7.5, "step": 3})
for step in range(3):
    loss = D(G(torch.ones(2, 4))).square().mean()
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()
    log(own=step)
    wandb.log({"train": {"loss": loss.detach(), "lr": 0.1}, "image": wandb.Image(loss), "flag": "text", "step": step}, step=step)
    writer.add_scalar("x", scalar_value=loss.item(), global_step=step)
    writer.add_scalars("both", {"a": step, "b": torch.tensor([2.0])})
    writer.add_histogram("weights", [1.0, 2.0])
    print(log_metric("val/loss", step + 0.5), log_metrics(metrics={"acc": step}))
print(run.history and [{name: str(value) for name, value in entry.items() if name != "image"} for entry in run.history])
print(writer.events, metrics_of_the_run)
print(
    inspect.signature(wandb.sdk.wandb_run.Run.log),
    wandb.sdk.wandb_run.Run.log.__doc__,
    pickle.loads(pickle.dumps(log_metric)) is log_metric,
)
print([p.flatten().tolist() for p in (*G.parameters(), *D.parameters())], torch.get_rng_state().sum().item())
