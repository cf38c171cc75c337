"""What a script under `diag run` logs: given to the recorder of the present training, and kept until there is a first one."""

import logging
from collections.abc import Mapping
from functools import partial
from typing import Any

from ..log_anywhere import keep_no_more
from ..recorder import Recorder
from ..recording.scalars import stored_name

log = logging.getLogger("optiscope")

# Names that are taken over from other libraries; some scripts make a new one at every call.
MOST = 256


class ScriptScalars:
    """Takes the numbers of `optiscope.hooks.log` and of the logging libraries that a script uses anyway.

    Numbers of before the first recorder are kept, of each name the last one, and recorded as of before its first step. Between two trainings, and while
    what trains is not recorded, those of libraries are dropped.
    """

    def __init__(self) -> None:
        self._recorder: Recorder | None = None
        self._waits = True  # for the first recorder
        self._logged: dict[str, Any] = {}
        self._taken_over: dict[str, float] = {}
        self._names: dict[str, bool] = {}  # of what libraries logged: whether it is recorded
        self._told = False

    def log(self, scalars: Mapping[str, Any]) -> None:
        """Keep what the script gives to `log`, which finds recorders by itself as soon as there is one."""
        if self._waits:
            self._logged.update(scalars)

    def take_over(self, numbers: Mapping[str, float]) -> None:
        """Record numbers that the script gave to a library. Names that the store cannot hold (`step` for one) are left out."""
        session = self._recorder.session if self._recorder is not None else None
        if session is not None and session.is_open:
            if chosen := {name: number for name, number in numbers.items() if self._is_taken(name)}:
                # Not counted as calls of a training's loop: one step's numbers come in as many calls as there are names.
                session.in_turn(partial(session.log, counted=False), chosen)
        elif self._waits:
            self._taken_over.update(numbers)

    def begin(self, recorder: Recorder) -> None:
        """From now on this recorder takes the numbers; if it is the first one, those that were kept too."""
        self._recorder = recorder
        if self._waits:
            self._waits = False
            keep_no_more()
            self.take_over(self._taken_over)
            if self._logged:
                recorder.log(**self._logged)
            self._logged, self._taken_over = {}, {}

    def let_go(self) -> None:
        """The recorder is closed."""
        self._recorder = None

    def _is_taken(self, name: str) -> bool:
        if name not in self._names:
            if len(self._names) >= MOST:
                if not self._told:
                    self._told = True
                    log.warning("optiscope: the script logs numbers under more than %d names; further names are not recorded", MOST)
                return False
            self._names[name] = _can_be_stored(name)
        return self._names[name]


def _can_be_stored(name: str) -> bool:
    try:
        stored_name(name)
    except ValueError:
        return False
    return True
