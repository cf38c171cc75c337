"""Observe, then commit: a schedule derived from the first records of a training and put into force while it goes on (AMO)."""

import logging
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np
from torch import nn

from ...diagnostics.newton_schulz.recorded_spectra import RecordedSpectra
from ...diagnostics.schedules.deriving import check_choices, schedule_from_spectra
from ...diagnostics.schedules.observation_window import SNAPSHOTS, observation_window
from ...diagnostics.schedules.refreshing import EARLY, next_schedule, retained_gain
from ...diagnostics.schedules.schedule_file import Schedule
from ..guard import KeptOut
from ..recorder import Recorder
from ..recording.record import Record
from .applying import apply_schedule, check_takes_a_schedule, layers_of
from .decisions import Decision, Kind, decision
from .group_splitting import schedulers_of
from .live_checks import (
    check_geometry,
    check_in_step,
    check_model,
    check_single_process,
    checked_window,
    known_to_orthogonalise,
    session_of,
    watching,
    whole_steps,
)
from .observed_spectra import Key, ObservedSpectra
from .unlisted_class import shown_by_now, shown_when_built

log = logging.getLogger("optiscope")

# Shares of a training's steps at which its schedule is looked at again.
REFRESH_SHARES = (0.01, 0.03, 0.10, 0.30)
STATE_VERSION = 1
INSTEAD = "use apply=False, and apply what it commits on every process with apply_schedule"


class AdaptiveSchedule:
    """Derive a Newton–Schulz schedule from the recorder's own records of a window of steps, and put it into force after it.

    Nothing is measured twice and nothing is drawn: until the commitment (with `apply=False` for ever) the training is, to the bit, what it would
    be without. The schedule that is committed is the one that `derive_schedule(open_run(store), window=slice(first, last))` finds
    in the finished run; it comes into force by :func:`apply_schedule`, between two steps. Later on it is looked at again at every
    refresh: another one takes its place only if two in a row find that it takes 2 % off the mean residual, moves by one step per
    operator at most and costs no more than the budget. Where retained gain falls below half at a record, the next refresh comes early.

    Every decision is in `decisions` and, under the same name, among the attributes of the run, where `diag info` shows it. No error leaves
    it during training: a schedule that cannot be derived or put into force is told of once, and what is in force stays.

    Args:
        recorder: as from :func:`attach`, open, recording the group "geometry".
        optimizer: one that the recorder watches, or a wrapper around it, that takes a schedule; what is said of that in
            :func:`apply_schedule` holds here. Its own matrices share its budget; of another Muon make another AdaptiveSchedule.
        model: where parameter names come from: that which was attached.
        window: first and last step to observe. None: from the end of warm-up (20 steps, and the learning rate no longer rising from
            record to record) on, 8 records and 1 % of the steps: of `total_steps`, else of those taken so far.
        total_steps: steps of the training, where they are known.
        budget, rule, family, recoverable, split, keep_uniform: as in `derive_schedule`.
        refresh: steps at which to look again, each at the first record from it on. None: 1, 3, 10 and 30 % of `total_steps`, and none where
            they are not known.
        apply: False: decisions are made and logged, and nothing is touched.
        lr_schedulers: learning-rate schedulers built on the optimizer, whose per-group lists are extended when groups are split. Append
            those built later to the attribute of that name.

    Attributes:
        schedule: what was committed, or advised; None before.
        decisions: see `hooks.decisions`.
        lr_schedulers: see above.

    Raises:
        TypeError: no recorder, no module, or an optimizer that takes no schedule or orthogonalises nothing, as its row in the adapter table says, or a
            step of a copy with made-up gradients; where no copy can be stepped yet, the first recorded steps tell, and what they refuse ends it as an error does.
        ValueError: a recorder that is closed, lacks the geometry or does not watch the optimizer; a model of other parameters; a
            choice that is not on offer; a window or refresh that no record can fall into; a learning-rate scheduler that was not passed; several processes;
            to apply, a recorder in the background, whose records come when they are measured, so that the training would depend on chance.

    Example:
        >>> import tempfile, torch
        >>> from optiscope.hooks import AdaptiveSchedule, attach
        >>> model = torch.nn.ModuleDict({"q_proj": torch.nn.Linear(8, 8), "up_proj": torch.nn.Linear(8, 32)})
        >>> muon = torch.optim.Muon([p for p in model.parameters() if p.ndim == 2], lr=0.02)
        >>> with attach(muon, model, tempfile.mkdtemp() + "/run.zarr", every=1) as recorder:
        ...     adaptive = AdaptiveSchedule(recorder, muon, model, window=(2, 4), apply=False)
        ...     for step in range(5):
        ...         x = torch.randn(64, 8, generator=torch.Generator().manual_seed(step))
        ...         model["up_proj"](model["q_proj"](x).tanh()).square().mean().backward()
        ...         muon.step()
        >>> [(d["kind"], d["step"], d["window"], list(d["steps"])) for d in adaptive.decisions]
        [('advise', 4, [2, 4], ['attn_q', 'mlp_up'])]
    """

    def __init__(
        self,
        recorder: Recorder,
        optimizer: Any,
        model: nn.Module,
        *,
        window: Sequence[int] | None = None,
        total_steps: int | None = None,
        budget: int = 5,
        rule: str = "mean",
        family: str = "matched",
        recoverable: bool = False,
        split: str = "auto",
        keep_uniform: bool = True,
        refresh: Iterable[int] | None = None,
        apply: bool = True,
        lr_schedulers: Iterable[Any] = (),
    ) -> None:
        self.lr_schedulers = list(lr_schedulers)
        session = session_of(recorder)
        watched = watching(session, optimizer)
        check_geometry(session)
        if apply:
            check_in_step(session, "apply")
            layers = layers_of(optimizer)
            if watched.in_table:
                check_takes_a_schedule(layers[-1])
            schedulers_of((optimizer, *layers), self.lr_schedulers)
            check_single_process(INSTEAD)
        self._shown = known_to_orthogonalise(watched) or shown_when_built(watched, apply=apply)
        check_model(watched, model)
        check_choices(budget, rule, family, split)
        self._total_steps = whole_steps("total_steps", [total_steps])[0] if total_steps is not None else None
        self._window = None if window is None else checked_window(session, window)
        shares = [max(1, round(share * self._total_steps)) for share in REFRESH_SHARES] if self._total_steps is not None else []
        self._refresh_at = sorted(set(shares if refresh is None else whole_steps("refresh", refresh)))

        self.schedule: Schedule | None = None
        self.decisions: list[Decision] = []
        self._session, self._optimizer, self._model, self._apply = session, optimizer, model, apply
        self._watched, self._label = watched, watched.label
        self._choices: dict[str, Any] = {
            "budget": budget, "rule": rule, "family": family, "recoverable": recoverable, "split": split, "keep_uniform": keep_uniform,
        }  # fmt: skip
        self._spectra = ObservedSpectra([watched.label])
        # Of a window that began before this recording, the beginning has to come from a checkpoint.
        self._awaits_state = self._window is not None and self._window[0] <= session.first_step
        self._over = False  # nothing more will be decided
        self._window_records = 0  # of the window that was committed on, and as many of every look since
        self._unseen = 0  # records since the last look
        self._early_looks = 0  # since a schedule last came into force
        self._agreeing: Mapping[str, int] | None = None
        self._handle = session.on_record(self._heard)

    def close(self) -> None:
        """Hear of no more records, so that nothing more is decided by itself; what is in force stays. Closing twice is harmless."""
        self._handle.remove()

    def refresh_now(self) -> None:
        """Look at the schedule again, over as many records, the last ones, as it was committed on.

        For a moment that `refresh` could not foresee, such as a new phase of the learning rate, or a switch of the data once so many records of
        the new data are made. Before a commitment, without a record since the last look, and once the recorder is closed, it does nothing.
        """
        if self.schedule is not None and not self._over and self._unseen and self._session.is_open:
            step = self._session.step
            with self._session.guard(), self._session.on_request(), self._kept_out(step):
                self._refresh(step, "asked for")

    def state_dict(self) -> dict[str, Any]:
        """What was observed and decided, as plain containers and tensors; to be saved with every checkpoint."""
        return {
            "version": STATE_VERSION,
            "settings": self._settings(),
            "spectra": self._spectra.state_dict(),
            "schedule": None if self.schedule is None else self.schedule.to_json(),
            "refresh_at": list(self._refresh_at),
            "window_records": self._window_records,
            "unseen": self._unseen,
            "early_looks": self._early_looks,
            "agreeing": None if self._agreeing is None else dict(self._agreeing),
            "over": self._over,
            "decisions": [dict(entry) for entry in self.decisions],
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from a checkpoint: what was observed is there again, and a schedule that was in force is put into force.

        Call it before the optimizer loads its own state, whose groups are those of the schedule, and before the learning-rate schedulers
        load theirs: build everything as in the beginning, then load this, the optimizer, its schedulers, in that order.

        Raises:
            ValueError: what was loaded is no such state, is of other settings or matrices, or from before a commitment that this optimizer
                has behind it; and whatever :func:`apply_schedule` raises. Nothing has been changed then.
        """
        if state.get("version") != STATE_VERSION:
            raise ValueError(f"state: expected what state_dict gave, of version {STATE_VERSION}, got version {state.get('version')!r}")
        try:
            settings, spectra = state["settings"], ObservedSpectra.of_state([self._label], state["spectra"])
            schedule = None if state["schedule"] is None else Schedule.from_json(state["schedule"], "state")
            decisions = [dict(entry) for entry in state["decisions"]]
            rest = {name: state[name] for name in ("refresh_at", "window_records", "unseen", "early_looks", "agreeing", "over")}
        except (KeyError, TypeError, AttributeError, IndexError) as error:
            raise ValueError(f"state: it is damaged ({error!r}); load what state_dict gave, as it was") from None
        if settings != self._settings():
            raise ValueError(f"state: was saved under {settings}, got {self._settings()}; build it with the same")
        own = {Key.of(m) for m in self._session.layout.row_of["geometry"] if m.optimizer == self._label}
        if spectra.matrices and own.isdisjoint(spectra.matrices):
            raise ValueError(
                f"state: is of other matrices, the first of them {min(spectra.matrices).name}; load what was saved with this model"
            )
        if schedule is None and self.schedule is not None and self._apply:
            raise ValueError("state: is from before the commitment, and this optimizer has a schedule in force; build the optimizer anew")
        if schedule is not None:
            self._put_into_force(schedule)
        self.schedule, self._spectra, self.decisions, self._awaits_state = schedule, spectra, decisions, False
        self._refresh_at, self._agreeing = list(rest["refresh_at"]), rest["agreeing"]
        self._window_records, self._unseen, self._over = rest["window_records"], rest["unseen"], rest["over"]
        self._early_looks = rest["early_looks"]
        self._session.tell("decisions", self.decisions)

    def _settings(self) -> dict[str, Any]:
        return {"window": None if self._window is None else list(self._window), "apply": self._apply, **self._choices}

    # At every record.

    def _heard(self, record: Record) -> None:
        if not self._over and "geometry" in record.rows:
            with self._kept_out(record.step):
                self._take(record)

    def _take(self, record: Record) -> None:
        if self._awaits_state:
            assert self._window is not None
            self._end(
                f"the window of steps {self._window[0]} to {self._window[1]} began before this recording, which goes on from step "
                f"{self._session.first_step}, and load_state_dict was not called",
                record.step,
            )
            return
        self._shown = self._shown or shown_by_now(self._watched, apply=self._apply)
        self._spectra.add(record)
        self._unseen += 1
        if not self._session.is_open:
            return  # the last record, made as the recorder closes: what follows is not its training
        if self.schedule is None:
            self._observe(record.step)
        else:
            self._look_after(record.step)

    def _observe(self, step: int) -> None:
        window = self._window or self._window_by_now(step)
        if window is None:
            return
        self._spectra.forget(before=window[0])
        if step < window[1] and self._session.cadence.expected <= window[1]:
            return
        observed = self._spectra.window(*window)
        if not observed.seen.any():
            self._end(f"no spectrum was recorded in the window of steps {window[0]} to {window[1]}", step)
        else:
            self._commit(observed, step)

    def _window_by_now(self, step: int) -> tuple[int, int] | None:
        """The window, once that can be known: as many records as it takes, and a learning rate that no longer rises."""
        steps, rates = (np.array(values) for values in zip(*self._spectra.rates, strict=True))
        window = observation_window(steps, self._total_steps or step, steps, rates)
        self._spectra.forget(before=window[0])  # the learning rate may still come to rise, but never a beginning go back
        rises = len(rates) > 1 and rates[-1] > rates[-2]
        return None if rises or (steps >= window[0]).sum() < SNAPSHOTS else window

    def _commit(self, observed: RecordedSpectra, step: int) -> None:
        run = {"run": str(self._session.store), "run_created": self._session.created}
        schedule = schedule_from_spectra(observed, **self._choices, provenance=run)
        self._put_into_force(schedule)
        self.schedule = schedule
        self._window_records, self._unseen = len(observed.step), 0
        self._refresh_at = [at for at in self._refresh_at if at > step]
        self._spectra.rates.clear()
        gain = f"gain over {self._choices['budget']} steps for all"
        if schedule.objective["kept_uniform"]:
            why = f"end of the window: the interval of the {gain} includes zero, so that they stay equal"
        else:
            why = f"end of the window: {schedule.objective['choice']['relative_gain']:.1%} {gain}"
        self._decide("commit" if self._apply else "advise", step, why, window=observed.step[[0, -1]], schedule=schedule)

    def _look_after(self, step: int) -> None:
        self._spectra.rates.clear()
        del self._spectra.records[: -self._window_records]
        due = [at for at in self._refresh_at if at <= step]
        if due:
            self._refresh_at = self._refresh_at[len(due) :]
            self._refresh(step, f"due at step {due[-1]}")
        elif self._unseen >= self._early_after():
            # What the last look rested on is past: another one rests on records of its own.
            assert self.schedule is not None
            now, _, _ = retained_gain(self._spectra.window(step, step), self.schedule)
            if now < EARLY:
                self._early_looks += 1
                self._refresh(step, f"early: {now:.0%} of the gain is retained")

    def _early_after(self) -> int:
        """Records since the last look from which on one may come early: twice as many each time, or what never retains much would be told of for ever.

        Not after the first, whose records may be from both sides of a switch of the data, nor where a look agreed, so that two in a row are near.
        """
        agreed = self._agreeing is not None and self._agreeing["agreeing"] > 0
        return self._window_records * (1 if agreed else 2 ** max(self._early_looks - 1, 0))

    def _refresh(self, step: int, why: str) -> None:
        assert self.schedule is not None
        observed = self._spectra.window(self._spectra.records[0].step, step)
        retained, gain, _ = retained_gain(observed, self.schedule)
        found = next_schedule(self.schedule, observed, self._agreeing)
        if found.adopted:
            self._put_into_force(found.schedule)
            self._early_looks = 0
        self.schedule, self._agreeing, self._unseen = found.schedule, found.state, 0
        kind: Kind = "keep" if not found.adopted else "refresh" if self._apply else "advise"
        self._decide(
            kind, step, why, window=observed.step[[0, -1]], schedule=self.schedule, retained=retained, gain=gain,
            improvement=found.improvement,
        )  # fmt: skip

    def _put_into_force(self, schedule: Schedule) -> None:
        if self._apply:
            check_single_process(INSTEAD)
            apply_schedule(
                self._optimizer, schedule, self._model, lr_schedulers=self.lr_schedulers, operators=self._session.operators
            )  # fmt: skip

    def _decide(self, kind: Kind, step: int, why: str, **rest: Any) -> None:
        entry = decision(kind, step, why, optimizer=self._label, **rest)
        self.decisions.append(entry)
        self._session.tell("decisions", [entry])
        steps = "" if entry["steps"] is None else ": " + ", ".join(f"{operator} {k}" for operator, k in entry["steps"].items())
        log.info("optiscope: step %d, schedule of %s, %s%s (%s)", step, self._label, kind, steps, why)

    def _end(self, why: str, step: int) -> None:
        self._over = True
        self._decide("keep", step, why, schedule=self.schedule)
        log.warning(
            "optiscope: the schedule of %s: %s. Training goes on with the Newton–Schulz steps that are in force; nothing more is tried.",
            self._label, why,
        )  # fmt: skip

    def _kept_out(self, step: int) -> KeptOut:
        """Keeps what a block raises out of the training, and ends with it."""

        def end(error: Exception) -> None:
            self._end(f"it could not be derived or put into force at step {step} ({type(error).__name__}: {error})", step)

        return KeptOut(end, raising=self._session.raises)
