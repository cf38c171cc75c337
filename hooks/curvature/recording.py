"""`Recorder.curvature`: what is asked for, estimated on a loss and written into the group `curvature` at the current step."""

import logging
import os
import re
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, Literal

from numpy.typing import NDArray

from ...diagnostics.catalogue import DISTRIBUTIONS, HESSIAN_METHODS, PROBE_SEED
from ..observing.capturing import capturing
from ..observing.matrices import Matrix
from .estimation import Estimation
from .group import CurvatureGroup
from .hessian_products import CentralDifference, DoubleBackward, Loss
from .probes import Probes
from .undisturbed import undisturbed

if TYPE_CHECKING:
    from ..recorder import Recorder

log = logging.getLogger("optiscope")

_MAX_COUNT = 32767  # what the store's count of probes holds


def curvature(
    recorder: "Recorder",
    loss_fn: Callable[[], Any] | None = None,
    /,
    *,
    logits_fn: Callable[[], Any] | None = None,
    probes: int = 1,
    draws: int = 1,
    distribution: Literal["rademacher", "gaussian"] = "rademacher",
    method: Literal["auto", "double_backward", "central_difference"] = "auto",
    block_probes: int = 0,
    exact: int = 0,
    only: str | None = None,
) -> None:
    """Estimate the Hessian of a loss and record it at the current step, whenever you like: between steps, at any cadence.

    What is estimated is of the matrices that are recorded and can be trained; a parameter that is frozen stays missing, one
    that the loss does not use has zeros. Training is bitwise what it would be without the call: weights, gradients, buffers,
    modes and the state of all global random generators are put back; probes come from a generator of the recorder's own. An error
    gives a warning and missing values.

    Args:
        loss_fn: takes nothing and returns the mean loss of the model on a batch of your choice, as a tensor with its graph. Get the batch
            outside of it, so that training's data go on as they would; it may be called several times. Each call begins
            with the same random numbers, so that dropout is the same in all. In a distributed run let it call the bare
            model: a wrapper would wait for the other processes.
        logits_fn: takes nothing and returns the model's logits, shape (…, classes), of all predictions that the loss is a mean of
            (no padding). With it the Gauss–Newton diagonal is estimated, with or without a `loss_fn`.
        probes: random vectors for the Hessian's diagonal. One costs about 3 training steps, each further one 2. A mean and its error
            are there from the first on, quantiles over elements from 64 on.
        draws: of all labels, for the Gauss–Newton diagonal; each costs a backward pass.
        distribution: of the vectors; "rademacher" has less noise.
        method: "double_backward" is exact; "central_difference" needs no second backward pass, which some kernels lack (attention on
            the CPU); "auto": the first where it works.
        block_probes: further vectors per matrix for the share of its Hessian inside Adam-mini's blocks; each costs about 2 steps
            per matrix.
        exact: take exact Hessians of consecutive rows of every matrix with together up to this many coordinates (256 for a look;
            0: none), from which follow a map and what Adam's diagonal does to the conditioning. Each coordinate costs up to
            2 steps, less on a small batch.
        only: a regular expression: of the recorded matrices those in whose name it is found.

    Several calls at one step are merged: of a quantity that two of them measure, the later one's values stay.
    """
    if not recorder._handles or os.getpid() != recorder._process:
        log.warning("optiscope: curvature was called on a recorder that is closed; nothing was recorded")
        return
    if capturing():
        return
    recorder._under_way.wait(recorder.step)
    for watched in recorder._watched:
        recorder._take_off_skipped(watched)
    if recorder._under_way.record is None:  # the rows of one that is being filled are as many as its matrices
        recorder._include_new_parameters()
    own = [m for watched in recorder._watched for m in watched.matrices]
    measured: dict[str, NDArray[Any]] = {}
    group = recorder._curvature
    with recorder._journal.asked_for():
        try:
            _check_functions(loss_fn, logits_fn)
            _check_numbers(probes=(probes, 1), draws=(draws, 1), block_probes=(block_probes, 0), exact=(exact, 0))
            _check_choice("distribution", distribution, DISTRIBUTIONS)
            _check_choice("method", method, ("auto", *HESSIAN_METHODS))
            matrices = [m for m in own if _can_be_measured(m) and (only is None or re.search(only, m.name))]
            if not matrices:
                raise ValueError(f"only: expected a pattern that some recorded matrix that can be trained has in its name, got {only!r}")
            estimation = Estimation(matrices, Probes(PROBE_SEED + recorder.step), distribution)
            with undisturbed(recorder._names.model, estimation.parameters) as state:
                if loss_fn is not None:
                    _hessian(estimation, Loss(loss_fn, state), method, group, probes, block_probes, exact)
                if logits_fn is not None:
                    estimation.gauss_newton(logits_fn, state, draws)
            measured = group.rows(own, estimation.found)
        finally:
            # Of a call that failed a record stays too, in which everything is missing.
            group.include(own)
            recorder._journal.append({"curvature": measured}, recorder.step)
            recorder._journal.log_own_time(recorder.step)


def _hessian(estimation: Estimation, loss: Loss, asked: str, group: CurvatureGroup, *counts: int) -> None:
    """By the method that was asked for; "auto": by double backward, where that fails by differences, and by these from then on."""
    if asked == "double_backward" or (asked == "auto" and group.has_second_backward):
        value = loss()  # what is wrong with the loss itself is no reason to try another method
        try:
            return estimation.hessian(DoubleBackward(value, estimation.parameters), *counts)
        except RuntimeError as error:  # NotImplementedError and OutOfMemoryError are of its kind
            if asked != "auto":
                raise
            reason = str(error).splitlines()[0]
        del value  # and its graph
    estimation.hessian(CentralDifference(loss, estimation.parameters), *counts)
    if asked == "auto" and group.has_second_backward:
        group.has_second_backward = False
        log.warning(
            "optiscope: this model has no second backward pass (%s); curvature comes from central differences of gradients instead. Attention has "
            "one under torch.nn.attention.sdpa_kernel(SDPBackend.MATH).", reason,
        )  # fmt: skip


def _can_be_measured(matrix: Matrix) -> bool:
    """Not frozen, of the shape it had when recording began, and a parameter's own matrix."""
    return matrix.parameter.requires_grad and not matrix.members and matrix.fits(matrix.parameter)


def _check_functions(loss_fn: Any, logits_fn: Any) -> None:
    if loss_fn is None and logits_fn is None:
        raise ValueError("loss_fn: expected a function of no arguments that returns the mean loss, or a logits_fn; got neither")
    for name, function in (("loss_fn", loss_fn), ("logits_fn", logits_fn)):
        if function is not None and not callable(function):
            raise TypeError(f"{name}: expected a function of no arguments, got {type(function).__name__}; write {name}=lambda: …")


def _check_numbers(**given: tuple[Any, int]) -> None:
    for name, (value, least) in given.items():
        if not isinstance(value, int) or value < least or value > _MAX_COUNT:
            raise ValueError(f"{name}: expected a whole number from {least} to {_MAX_COUNT}, got {value!r}")


def _check_choice(name: str, value: str, choices: tuple[str, ...]) -> None:
    if value not in choices:
        raise ValueError(f"{name}: expected one of {', '.join(choices)}; got {value!r}")
