"""Guarding update sizes while a training runs: telling when they leave their tolerance, and on request correcting a wrong scale."""

import logging
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from math import inf, isfinite, log
from typing import Any

import numpy as np
from torch import Tensor

from ...diagnostics.newton_schulz.recorded_spectra import ns_schedules_of
from ...diagnostics.quantities.update_alignment import SLACK, UNDER_LIFTED, Size, update_sizes
from ..adapters import number
from ..recorder import Recorder
from ..recording.record import Record
from .learning_rate_factors import LearningRateFactors
from .live_checks import check_in_step, check_single_process, session_of, watching

logger = logging.getLogger("optiscope")

MAX_PER_CHANGE = 2.0  # a learning rate's factor is at most doubled or halved from one record to the next
MAX_EVENTS = 256  # kept in the run
# Between the factors that the matrices of a group ask for; one factor would put the others out of tolerance.
DIFFERENT = 1.5
_A, _EXPECTED = Size._fields.index("a"), Size._fields.index("expected")


@dataclass
class _Group:
    """What is known of a parameter group: whether it has left its tolerance, and for how many records that has not been so."""

    left: bool = False
    against: int = 0
    told: set[str] = field(default_factory=set)
    change: tuple[float, float] | None = None  # a before the last change of its factor, and by what that was changed
    without_effect: int = 0
    given_up: bool = False


class RmsAlignment:
    """Warns when updates of orthogonalised matrices leave the size they are meant to have; on request brings them back.

    At every record, a = RMS(U)/target of every matrix, U = (W_t(1 − ηλ) − W_{t+1})/η (AdaMuon Eq. 9–10; Moonlight, arXiv 2502.16982),
    and medians over each parameter group. ΔW = −η·s·O gives a² = mean_i o_i², so that a lies in the output band of the coefficients
    in force, lowered by directions that they leave under-lifted. A group that is outside its tolerance for `patience` records in a
    row gets one line in the log, one more when it returns; every change is an entry of the run's attribute `alignment_events`
    (`diag info`). The cause is told from the Gram residual ε̃ of the steps in force: |a² − 1| ≤ ε̃ is the iteration's doing (directions
    under-lifted: a matter of steps), anything else a wrong scale. Optimizers that do not orthogonalise have no target; of these it is silent.

    With `rescale`, a wrong scale is corrected: the group's learning rate is multiplied during the optimizer's step by a factor, changed by at
    most 2 per record. Before and after the step `group["lr"]` is yours, to the bit, so that any scheduler, a checkpoint and logged
    learning rates are as without; records are per your learning rate, too, and show a return to the target. Decoupled weight
    decay is divided by the factor, so that η·λ stays. What the iteration explains is not corrected, nor a group that also holds
    parameters that are not orthogonalised or whose matrices would need factors that differ by over 1.5. A factor that twice shows no
    effect is taken back. `close` takes all factors out. Until a first factor, and always
    without `rescale`, training is bitwise what it would be.

    Args:
        recorder: as from `attach`, with "update" and "geometry" in its `measure`.
        optimizer: one that it watches.
        rescale: correct a wrong scale.
        tolerance: (low, high) of a; by default the output band of each matrix's coefficients, 2 % wider. Usual for spectra without very small
            values: Jordan (0.82, 1), You (0.97, 1.03), Polar Express and CANS (0.95, 1.05), AdaMuon (1 − 1e-6, 1 + 1e-6); rounding of the weights is allowed for.
        target: RMS of an update per learning rate; by default what each optimizer's own scaling means. 0.2 is AdamW's usual one.
        patience: records in a row after which a group has left, or returned.

    Raises:
        ValueError: an argument out of range, a recorder that is closed or records too little, an optimizer that it does not watch
            or, to rescale, without a learning rate in its groups.

    Example:
        >>> import tempfile, torch
        >>> from optiscope.hooks import RmsAlignment, attach
        >>> model = torch.nn.Linear(4, 4)
        >>> optimizer = torch.optim.Muon([model.weight], lr=0.1, adjust_lr_fn="match_rms_adamw")
        >>> recorder = attach(optimizer, model, tempfile.mkdtemp() + "/run.zarr", every=1)
        >>> alignment = RmsAlignment(recorder, optimizer, rescale=True)
        >>> model(torch.ones(2, 4)).sum().backward()
        >>> _ = optimizer.step()
        >>> alignment.factors  # nothing to correct
        {}
        >>> recorder.close()
    """

    def __init__(
        self, recorder: Recorder, optimizer: Any, *, rescale: bool = False, tolerance: tuple[float, float] | None = None,
        target: float | None = None, patience: int = 5,
    ) -> None:  # fmt: skip
        if tolerance is not None and not (len(tolerance) == 2 and 0 <= tolerance[0] < tolerance[1] < inf):
            raise ValueError(f"tolerance: expected (low, high) with 0 ≤ low < high, such as (0.8, 1.2), got {tolerance!r}")
        if target is not None and not 0 < target < inf:
            raise ValueError(
                f"target: expected an RMS per learning rate above 0, such as 0.2, or None for the optimizer's own, got {target!r}"
            )
        if patience < 1 or patience != int(patience):
            raise ValueError(f"patience: expected a number of records of at least 1, got {patience!r}")
        session = session_of(recorder)
        self._watched = watching(session, optimizer)
        if missing := [group for group in ("update", "geometry") if group not in session.groups]:
            raise ValueError(
                f"recorder: alignment is read from update and geometry, and {' and '.join(missing)} is not recorded; attach with measure=('geometry', 'update')"
            )
        if rescale and not any(isfinite(number(group.get("lr"))) for group in self._watched.optimizer.param_groups):
            raise ValueError(
                f"rescale: {self._watched.label} has no learning rate `lr` in its parameter groups that could be multiplied; leave rescale=False"
            )
        if rescale:
            check_single_process("leave rescale=False, and correct the optimizer")
            check_in_step(session, "rescale")
        self._session = session
        self._tolerance, self._target, self._patience = tolerance, target, int(patience)
        self._named = {m.name: m.parameter for m in self._watched.matrices if not m.members}
        self._groups: dict[Tensor, _Group] = {}  # by first parameter: a group may be split or moved
        self._handle = session.on_record(self._follow)
        self._factors = LearningRateFactors(self._watched, session.guard) if rescale else None

    @property
    def factors(self) -> dict[str, float]:
        """By what the learning rate of each matrix is multiplied; those that are not multiplied are left out."""
        of = {} if self._factors is None else self._factors.of
        return {name: of[p] for name, p in self._named.items() if p in of}

    def close(self) -> None:
        """Follow no more records, and let the optimizer step with your learning rates again. Closing twice is harmless."""
        self._handle.remove()
        if self._factors is not None:
            self._factors.remove()

    def state_dict(self) -> dict[str, Any]:
        """The factors, in plain containers, to be saved beside the optimizer's state."""
        return {"factors": self.factors}

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        """Put saved factors into force, in the place of those that are.

        Raises:
            ValueError: what was loaded is no such state, is of other matrices, or this guard was made without `rescale`. Nothing has been changed then.
        """
        factors = state_dict.get("factors")
        if not isinstance(factors, Mapping) or not all(0 < number(factor) < inf for factor in factors.values()):
            raise ValueError(
                f"state_dict: expected what state_dict gave, factors above 0 of learning rates by matrix, got {factors!r}; load it as it was"
            )
        if unknown := sorted(factors.keys() - self._named.keys()):
            raise ValueError(
                f"state_dict: {_some(unknown)} are no matrices of {self._watched.label}; load it beside the model and optimizer it was saved with"
            )
        if self._factors is not None:
            self._factors.of = {self._named[name]: float(factor) for name, factor in factors.items()}
        elif factors:
            raise ValueError("state_dict: holds factors of learning rates, and this guard only warns; make it with rescale=True")

    def _follow(self, record: Record) -> None:
        own_of = [m for m in self._watched.matrices if not m.members]
        self._named |= {m.name: m.parameter for m in own_of}
        matrices = [m for m in own_of if all(m in record.row_of[group] for group in ("update", "geometry"))]
        if not matrices:
            return
        update, geometry = (
            {name: rows[[record.row_of[group][m] for m in matrices]] for name, rows in record.rows[group].items()}
            for group in ("update", "geometry")
        )
        ranks = np.array([min(m.rows, m.cols) for m in matrices])
        sizes = update_sizes(update, geometry, ns_schedules_of(record.ns_schedules), ranks, self._target, self._tolerance)
        known = np.flatnonzero(np.isfinite(sizes[:, :-1]).all(axis=1))
        news: dict[str, list[str]] = {}
        for index, group in enumerate(self._watched.optimizer.param_groups):
            parameters = {id(p) for p in group["params"]}
            own = [i for i in known if id(matrices[i].parameter) in parameters]
            if not own:
                continue
            state, size = self._groups.setdefault(group["params"][0], _Group()), Size(*map(float, np.median(sizes[own], axis=0)))
            who = f"{self._watched.label} group {index} ({_some([matrices[i].name for i in own])})"
            factors = sizes[own, _EXPECTED] / sizes[own, _A]
            reason = _why_not(record, group, float(factors.min()), float(factors.max()))
            if self._factors is not None and self._factors.by_itself:
                reason = "the optimizer changes it within its step"
            for event, text in self._judge(group, state, size, reason):
                self._note(record, index, event, size, self._factor(group), len(own))
                if event not in state.told:
                    state.told.add(event)
                    news.setdefault(event, []).append(f"{who}: {text}")
        for texts in news.values():
            further = f" The same holds for {len(texts) - 1} more of its groups." if len(texts) > 1 else ""
            logger.warning("optiscope: step %d, %s.%s", record.step, texts[0], further)

    def _judge(self, group: dict[str, Any], state: _Group, size: Size, reason: str | None) -> Iterator[tuple[str, str]]:
        """What is new about a group, each with the sentence that tells of it; `reason` is one why its learning rate cannot be corrected."""
        inside, explained = size.low <= size.a <= size.high, size.least <= size.a <= size.most
        state.against = state.against + 1 if inside == state.left else 0
        if inside:
            state.change = None
        if state.against == self._patience:
            state.left, state.against = not state.left, 0
            if state.left:
                yield ("iteration", self._of_iteration(size)) if explained else ("wrong scale", self._wrong_scale(size))
            else:
                yield (
                    "returned",
                    f"updates are back in tolerance, at {size.a:.3g} times their target, learning rate times {self._factor(group):.3g}",
                )
        # Once begun, a correction goes on to what the spectrum predicts; the residual alone would explain more.
        wrong = not inside and (not explained or state.change is not None)
        if self._factors is not None and state.left and wrong and not state.given_up:
            yield from self._correct(self._factors, group, state, size, reason)

    def _correct(
        self, factors: LearningRateFactors, group: dict[str, Any], state: _Group, size: Size, reason: str | None
    ) -> Iterator[tuple[str, str]]:
        if reason is not None:
            if "not rescaled" not in state.told:
                yield "not rescaled", f"the learning rate is left alone, since {reason}"
            return
        if state.change is not None:
            before, by = state.change
            moved = log(size.a / before)
            state.without_effect = state.without_effect + 1 if abs(moved) < abs(moved - log(by)) else 0
            if state.without_effect == 2:
                state.given_up = True
                factors.set(group, 1.0)
                yield (
                    "given up",
                    "the factor of the learning rate shows no effect and is taken back; the optimizer seems not to read its learning rate from the group",
                )
                return
        by = min(max(size.expected / size.a, 1 / MAX_PER_CHANGE), MAX_PER_CHANGE)
        if abs(log(by)) > log(1 + SLACK):  # else what a factor can do is done
            state.change = size.a, by
            factors.set(group, factors.of_group(group) * by)
            yield (
                "rescaled",
                f"the learning rate is multiplied by {by:.3g} from the next step on, and after further records by up to {MAX_PER_CHANGE:g} again "
                "until updates have their size; group['lr'], schedulers and η·λ of decoupled weight decay stay as they are",
            )

    def _factor(self, group: dict[str, Any]) -> float:
        return 1.0 if self._factors is None else self._factors.of_group(group)

    def _departure(self, size: Size) -> str:
        return f"updates are {size.a:.3g} times their target RMS in {self._patience} records in a row (tolerance {size.low:.3g} to {size.high:.3g})"

    def _wrong_scale(self, size: Size) -> str:
        way_out = " or let a factor of the learning rate make up for it with RmsAlignment(…, rescale=True)" if self._factors is None else ""
        return (
            f"{self._departure(size)}, and the residual of the Newton–Schulz steps explains {size.least:.3g} to {size.most:.3g} only. A scale is missing "
            f"or applied twice (0.2, √max(rows, cols), √(rows/cols)); correct it in the optimizer{way_out}"
        )

    def _of_iteration(self, size: Size) -> str:
        share = f" (singular values left under {UNDER_LIFTED:g} take {-size.under_lifted:.2g} from a²)" if size.under_lifted < -0.01 else ""
        return (
            f"{self._departure(size)}, which the residual of the Newton–Schulz steps explains{share}: a matter of steps and coefficients, and of "
            "directions that gradients lack, not of a scale; the learning rate is left alone"
        )

    def _note(self, record: Record, index: int, event: str, size: Size, factor: float, matrices: int) -> None:
        entry = {
            "step": record.step, "optimizer": self._watched.label, "group": index, "matrices": matrices, "event": event, "alignment": size.a,
            "tolerance": [size.low, size.high], "under_lifted": size.under_lifted if isfinite(size.under_lifted) else None, "factor": factor,
        }  # fmt: skip
        self._session.tell("alignment_events", [entry], MAX_EVENTS)


def _why_not(record: Record, group: dict[str, Any], least: float, most: float) -> str | None:
    """Why a group's learning rate cannot be multiplied, its matrices asking for factors between `least` and `most`."""
    if most > DIFFERENT * least:
        return f"its matrices would need factors from {least:.2g} to {most:.2g}; give those of a shape a group of their own"
    if not isfinite(number(group.get("lr"))):
        return "the group has none under `lr`"
    rows = record.rows["update"]
    moves_otherwise = np.asarray(np.isfinite(rows["update_rms_per_lr"]) & np.isnan(rows["update_rms_target"]))
    of: dict[int, list[int]] = {}
    for m, row in record.row_of["update"].items():
        of.setdefault(id(m.parameter), []).append(row)
    # Of a matrix without a gradient nothing is known, nor need it be.
    if any(p.requires_grad and (id(p) not in of or moves_otherwise[of[id(p)]].any()) for p in group["params"]):
        return "it is also that of parameters which are not orthogonalised; give those a group of their own"
    return None


def _some(names: Sequence[str]) -> str:
    return ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")
