"""placeholder"""

from dataclasses import replace

import torch

from optiscope.examples.experiments.training import DEMO, FULL, Treatment
from optiscope.examples.optimizers.adamuon import AdaMuon

GRID = (2e-3, 4e-3, 8e-3, 16e-3)
PLAN = replace(FULL, models={"demo": DEMO}, early=10, later=10, validate=25)

# The first is what the others are measured against.
OPTIMIZERS: dict[str, Treatment] = {
    "adamw": Treatment(lambda parameters, lr: torch.optim.AdamW(parameters, lr=lr, betas=(0.9, 0.95), weight_decay=0.0)),
    "muon": Treatment(lambda parameters, lr: torch.optim.Muon(parameters, lr=lr, weight_decay=0.0, adjust_lr_fn="match_rms_adamw")),
    "adamuon-v1": Treatment(lambda parameters, lr: AdaMuon(parameters, lr=lr, weight_decay=0.0)),
    "adamuon-v2": Treatment(lambda parameters, lr: AdaMuon(parameters, lr=lr, weight_decay=0.0, sign=True)),
}
