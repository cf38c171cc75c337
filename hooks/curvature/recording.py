"""Curvature at the current step: what is asked for, estimated on a loss and written into the group `curvature`."""

import logging
import re
from collections.abc import Callable
from typing import Any, Literal

from numpy.typing import NDArray

from ...diagnostics.catalogue import DISTRIBUTIONS, HESSIAN_METHODS, PROBE_SEED
from ..observing.capturing import capturing
from ..observing.matrix import Matrix
from ..observing.placement import is_cut
from ..recording.session import Session
from .estimation import Estimation
from .group import CurvatureGroup
from .hessian_products import CentralDifference, DoubleBackward, Loss
from .probes import Probes
from .undisturbed import undisturbed

log = logging.getLogger("optiscope")

_MAX_COUNT = 32767  # what the store's count of probes holds


def record_curvature(
    session: Session,
    group: CurvatureGroup,
    loss_fn: Callable[[], Any] | None,
    *,
    logits_fn: Callable[[], Any] | None,
    probes: int,
    draws: int,
    distribution: Literal["rademacher", "gaussian"],
    method: Literal["auto", "double_backward", "central_difference"],
    block_probes: int,
    exact: int,
    only: str | None,
) -> None:
    """As :meth:`Recorder.curvature`, whose exceptions are still to be kept out of the training."""
    if not session.is_open:
        log.warning("optiscope: curvature was called on a recorder that is closed; nothing was recorded")
        return
    if capturing():
        return
    if session.ranks is not None:
        if any(is_cut(m.parameter) for m in session.matrices):
            if not group.told_of_pieces:
                log.warning(
                    "optiscope: curvature of matrices that lie in pieces on several ranks is not recorded yet; nothing was, and nothing will be"
                )
            group.told_of_pieces = True
            return
        if session.ranks.rank:
            return  # of copies the first rank's is recorded
    session.settle()
    own = session.matrices
    measured: dict[str, NDArray[Any]] = {}
    with session.on_request():
        try:
            _check_functions(loss_fn, logits_fn)
            _check_numbers(probes=(probes, 1), draws=(draws, 1), block_probes=(block_probes, 0), exact=(exact, 0))
            _check_choice("distribution", distribution, DISTRIBUTIONS)
            _check_choice("method", method, ("auto", *HESSIAN_METHODS))
            matrices = [m for m in own if _can_be_measured(m) and (only is None or re.search(only, m.name))]
            if not matrices:
                raise ValueError(f"only: expected a pattern that some recorded matrix that can be trained has in its name, got {only!r}")
            estimation = Estimation(matrices, Probes(PROBE_SEED + session.step), distribution)
            with undisturbed(session.model, estimation.parameters) as state:
                if loss_fn is not None:
                    _hessian(estimation, Loss(loss_fn, state), method, group, probes, block_probes, exact)
                if logits_fn is not None:
                    estimation.gauss_newton(logits_fn, state, draws)
            measured = group.rows(own, estimation.found)
        finally:
            # Of a call that failed a record stays too, in which everything is missing.
            group.include(own)
            session.append({"curvature": measured})


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
