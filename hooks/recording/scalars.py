"""The group `scalars`: what the user logs, and what recording costs, one row per step that has any."""

import numpy as np

from ...diagnostics.escape import storable
from ..guard import raised_by_signal_handler
from ..ranks.no_store import RunWriter

# The recorder's own scalars.
OWN_TEXTS = {
    "overhead_seconds": "wall time used by the recorder in the training thread",
    "overhead_cpu_seconds": "CPU time used by the recorder",
    "background_cpu_seconds": "CPU time used by the recorder in its own thread",
    "elapsed_seconds": "wall time",
}


class ScalarRow:
    """The row of the present step, not yet handed to the writer.

    Attributes:
        step: that step.
    """

    def __init__(self, writer: RunWriter, step: int) -> None:
        self._writer = writer
        self.step = step
        self._values: dict[str, float] = {}
        self._new: dict[str, None] = {}  # names that were handed over and have no array yet, in their order

    @property
    def is_begun(self) -> bool:
        """Whether there is something in the row."""
        return bool(self._values)

    def begin(self, step: int) -> None:
        """Make the row one of `step`; the row of an earlier step is handed over."""
        if step != self.step:
            self.hand_over()
            self.step = step

    def set_own(self, **values: float) -> None:
        """Set the recorder's own scalars."""
        self._values.update(values)

    def set(self, name: str, value: float) -> None:
        """Set one of the user's.

        Raises:
            ValueError: a name that the store cannot hold, or that the recorder uses itself.
        """
        self._values[stored_name(name)] = value

    def hand_over(self) -> None:
        """Give the row to the writer."""
        values = self._values
        if values:
            self._writer.append("scalars", self.step, {name: np.float64(value) for name, value in values.items()})
        self._new.update(dict.fromkeys(name for name in values if not self._writer.has("scalars", name)))
        self._values = {}  # last: an exception of a signal handler loses nothing, and the same row given twice is merged

    def make_arrays(self) -> list[Exception]:
        """Make the arrays of names that are new, and give what kept one from being made; such a name is forgotten.

        Raises:
            OSError: the store cannot be written now; it is tried again by the next call.
        """
        errors: list[Exception] = []
        for name in list(self._new):
            try:
                if not self._writer.has("scalars", name):
                    _create_array(self._writer, name)
            except OSError:
                raise
            except Exception as error:
                if raised_by_signal_handler(error):
                    raise
                errors.append(error)
            del self._new[name]
        return errors


def stored_name(name: str) -> str:
    """The name under which a logged scalar is stored: a slash of either kind, which in the store would mean a group, becomes a dot.

    Raises:
        ValueError: a name that the store cannot hold, or that the recorder uses itself.
    """
    stored = storable(name).replace("/", ".").replace("\\", ".")
    if (
        not stored.strip(".")
        or "\0" in stored
        or len(stored.encode()) > 200
        or stored in {"step", "zarr.json", *OWN_TEXTS}
        or stored.startswith("__")
    ):
        raise ValueError(f"log: {name[:50]!r} cannot be a scalar's name; use another")
    return stored


def _create_array(writer: RunWriter, name: str) -> None:
    """Add a variable of the group `scalars`: one of the recorder's own, or one the user logs."""
    if name in OWN_TEXTS:
        text = OWN_TEXTS[name]
        attributes = {"long_name": text, "units": "s", "definition": f"{text} since the recorder was attached"}
    else:
        attributes = {"long_name": name, "units": "as logged", "definition": "given to recorder.log"}
    writer.create_array("scalars", name, (), (), "float64", attributes)
