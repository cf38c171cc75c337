"""Cases for the optimizers of `torch.optim`."""

from torch.optim import ASGD, SGD, Adadelta, Adafactor, Adagrad, Adam, Adamax, AdamW, NAdam, RAdam, RMSprop, Rprop

from contract.harness import Case
from contract.transcriptions import adam, sgd
from contract.transcriptions_elementwise import adadelta, adafactor, adagrad, adamax, gradient_only, nadam, radam, rmsprop

CASES = [
    Case("SGD", "torch", lambda m: SGD(m.parameters(), lr=0.1, weight_decay=0.01), lambda name, shape: sgd(decay=0.01)),
    Case("SGD with momentum", "torch", lambda m: SGD(m.parameters(), lr=0.1, momentum=0.9), lambda name, shape: sgd(momentum=0.9)),
    Case(
        "SGD with Nesterov momentum",
        "torch",
        lambda m: SGD(m.parameters(), lr=0.1, momentum=0.9, nesterov=True, weight_decay=0.01),
        lambda name, shape: sgd(momentum=0.9, nesterov=True, decay=0.01),
    ),
    Case(
        "AdaGrad",
        "torch",
        lambda m: Adagrad(m.parameters(), lr=0.01, weight_decay=0.1, lr_decay=0.05),
        lambda name, shape: adagrad(coupled=0.1),
        note="The second moment is a sum.",
    ),
    Case("RMSProp", "torch", lambda m: RMSprop(m.parameters(), lr=1e-3, weight_decay=0.1), lambda name, shape: rmsprop(coupled=0.1)),
    Case(
        "RMSProp with momentum",
        "torch",
        lambda m: RMSprop(m.parameters(), lr=1e-3, momentum=0.9),
        lambda name, shape: rmsprop(momentum=0.9),
        note="The momentum sums gradients after their division by √v.",
    ),
    Case(
        "RMSProp, centred",
        "torch",
        lambda m: RMSprop(m.parameters(), lr=1e-3, centered=True),
        lambda name, shape: rmsprop(centered=True),
        note="The second moment is uncentred; the update divides by the root of it less the squared first one.",
    ),
    Case(
        "AdaDelta",
        "torch",
        lambda m: Adadelta(m.parameters(), lr=1.0),
        lambda name, shape: adadelta(),
        note="acc_delta, the average of squared updates, is not recorded.",
    ),
    Case("Adam", "torch", lambda m: Adam(m.parameters(), lr=1e-3, weight_decay=0.1), lambda name, shape: adam(coupled=0.1)),
    Case(
        "AMSGrad",
        "torch",
        lambda m: AdamW(m.parameters(), lr=1e-3, weight_decay=0.1, betas=(0.9, 0.5), amsgrad=True),
        lambda name, shape: adam(beta2=0.5, amsgrad=True),
        note="The second moment is the running maximum, which the update divides by.",
    ),
    Case("AdamW", "torch", lambda m: AdamW(m.parameters(), lr=1e-3, foreach=False), lambda name, shape: adam()),
    Case("AdamW, foreach", "torch", lambda m: AdamW(m.parameters(), lr=1e-3, weight_decay=0.1, foreach=True), lambda name, shape: adam()),
    Case("AdamW, fused", "torch", lambda m: AdamW(m.parameters(), lr=1e-3, weight_decay=0.1, fused=True), lambda name, shape: adam()),
    Case(
        "Adamax",
        "torch",
        lambda m: Adamax(m.parameters(), lr=1e-3, weight_decay=0.1),
        lambda name, shape: adamax(coupled=0.1),
        note="Square of the infinity norm exp_inf, in the place of a second moment.",
    ),
    Case(
        "NAdam",
        "torch",
        lambda m: NAdam(m.parameters(), lr=1e-3, weight_decay=0.1, decoupled_weight_decay=True),
        lambda name, shape: nadam(),
    ),
    Case(
        "RAdam",
        "torch",
        # β₂ of 0.9, so that rectification begins within the test's steps; η is large enough for the plain steps before it to be read back.
        lambda m: RAdam(m.parameters(), lr=0.1, betas=(0.9, 0.9), weight_decay=0.1, decoupled_weight_decay=True),
        lambda name, shape: radam(beta2=0.9),
    ),
    Case(
        "Adafactor (torch)",
        "torch",
        lambda m: Adafactor(m.parameters(), lr=0.02, weight_decay=0.1),
        lambda name, shape: adafactor(lambda t: 1 - t**-0.8, eps=0.0, floor=2.0**-46),
        note="η is the step size that it finds itself, in proportion to RMS(W); it keeps no first moment.",
    ),
    Case(
        "ASGD",
        "torch",
        lambda m: ASGD(m.parameters(), lr=0.1, lambd=0.01),
        lambda name, shape: gradient_only,
        note="η is the step size in force, the decay is lambd; the averaged weights are not recorded.",
    ),
    Case(
        "Rprop",
        "torch",
        lambda m: Rprop(m.parameters(), lr=1e-3),
        note="Every coordinate has its own step size: there is no η to divide by, and no moment.",
    ),
]
