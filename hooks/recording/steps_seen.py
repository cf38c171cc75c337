"""Whether the optimizers that are watched still step: one that was replaced, or whose model was rebuilt, ends a recording without an error."""

import logging
from collections.abc import Sequence

from torch import nn

from ...diagnostics.escape import storable
from ..observing.watched import Watched

log = logging.getLogger("optiscope")

# So many calls of `log`, or steps of the others, and so many times as many as there ever were between two steps.
FEW, TIMES = 100, 10
# Of calls of `log` at the end, when no step can come any more.
FEW_AT_THE_END, TIMES_AT_THE_END = 20, 3

ADVICE = (
    "If it was replaced, or the model rebuilt, give the new one to recorder.watch(…), or close this recorder and attach again; what you log is "
    "recorded all the same."
)


class StepsSeen:
    """Counts calls of `log` between steps, and says once of each optimizer that it seems not to step any more."""

    def __init__(self) -> None:
        self._step = -1  # of the last call
        self._calls = self._most = 0  # since it changed, and between any two changes
        self._told: set[Watched] = set()
        self._compared = False  # parameters and the model's

    def logged(self, step: int, watched: Sequence[Watched]) -> None:
        """Note a call of `log`; say so where there were many without a step."""
        if step != self._step:
            self._step, self._calls, self._most = step, 0, max(self._most, self._calls)
        self._calls += 1
        self._look_at_calls(step, watched, FEW + TIMES * self._most)
        self.look(step, watched)

    def look(self, step: int, watched: Sequence[Watched]) -> None:
        """Say of an optimizer that has not stepped while others went on that it has not."""
        paused = [one for one in watched if step - one.silent_since > FEW + TIMES * one.longest_pause]
        if len(paused) < len(watched) and (silent := self._new(paused)):
            log.warning(
                "optiscope: no step of %s was seen since step %d, while others went on to step %d. %s",
                silent,
                paused[0].silent_since,
                step,
                ADVICE,
            )

    def compare(self, model: nn.Module | None, watched: Sequence[Watched]) -> None:
        """Say once of parameters that an optimizer steps and the model does not hold, though it holds others of their names."""
        if model is None or self._compared:
            return
        self._compared = True
        held = {storable(name): id(p) for name, p in model.named_parameters()}
        for one in watched:
            stale = [
                m.parameter_name for m in one.matrices if not m.members and held.get(m.parameter_name, id(m.parameter)) != id(m.parameter)
            ]
            if stale:
                log.warning(
                    "optiscope: %s steps %d parameter%s that the model no longer holds (the first: %s): after the optimizer was made they were replaced, as "
                    "fully_shard or a layer made anew does. Make the optimizer after that, and attach then; what is recorded is of the old ones.",
                    one.label, len(set(stale)), "s" if len(set(stale)) > 1 else "", stale[0],
                )  # fmt: skip

    def end(self, step: int, watched: Sequence[Watched]) -> None:
        """Look for the last time."""
        if silent := self._new([one for one in watched if not one.seen]):
            log.warning(
                "optiscope: no step of %s was seen; attach to the very objects whose step() is called (steps replayed from a CUDA graph call none)",
                silent,
            )
        if any(one.seen for one in watched):
            self._look_at_calls(step, watched, FEW_AT_THE_END + TIMES_AT_THE_END * self._most)
            self.look(step, watched)

    def _look_at_calls(self, step: int, watched: Sequence[Watched], most: int) -> None:
        if step == self._step and self._calls > most and (silent := self._new(watched)):
            log.warning(
                "optiscope: log was called %d times since step %d, and no step of %s was seen. %s", self._calls, step, silent, ADVICE
            )

    def _new(self, watched: Sequence[Watched]) -> str:
        """Labels of those of whom nothing was said yet."""
        new = [one for one in watched if one not in self._told]
        self._told.update(new)
        return ", ".join(one.label for one in new)
