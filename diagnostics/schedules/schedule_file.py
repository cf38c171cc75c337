"""The schedule file: Newton–Schulz steps and coefficients per operator, with where they come from."""

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from math import isfinite
from pathlib import Path
from typing import Any

from ..escape import json_text
from ..newton_schulz.families import Coefficients
from ..store.bounded_json import parse_bounded, read_bounded
from ..store.whole_file import write_whole
from .depth_halves import entry_for

FORMAT = "optiscope-schedule"
VERSION = 1


@dataclass(frozen=True)
class OperatorSchedule:
    """What one operator type gets.

    Attributes:
        coefficients: the (a, b, c) of every step, acting on σ/‖M‖_F; their number is the number of steps.
        matrices: names of the parameters the operator stands for.
        predicted_residual: mean Gram residual over those matrices and the window, under these coefficients.
        baseline_residual: the same under the uniform schedule of the same budget.
        cost: FLOPs of all its matrices for all its steps.
        baseline_interval: 95 % of `baseline_residual` over layers; None under 3 layers, and in files of an earlier version.
        shapes: (rows, columns) of those matrices, each shape once; empty where they are not known, as in files of an earlier version.
    """

    coefficients: Coefficients
    matrices: tuple[str, ...]
    predicted_residual: float
    baseline_residual: float
    cost: int
    baseline_interval: tuple[float, float] | None = None
    shapes: tuple[tuple[int, int], ...] = ()

    @property
    def steps(self) -> int:
        """Number of Newton–Schulz steps."""
        return len(self.coefficients)


@dataclass(frozen=True)
class Schedule:
    """Steps and coefficients per operator, and their provenance.

    Attributes:
        operators: operator type → what it gets.
        budget: what was allowed and what is used: `kind`, `mean_steps`, `limit`, `cost`.
        objective: predicted `mean_residual` and `max_residual`, their `baseline_…` values under the uniform schedule,
            `in_force_mean_residual` of what the run itself used, the `rule`, and the `lower_bound` on the mean that certifies it; whether they
            are over the `recoverable` singular values alone; whether equal steps were `kept_uniform` because what they gain is uncertain; and
            the rule's `choice` (:func:`.evidence.predicted_gain`).
        provenance: run, window of steps, number of snapshots, coefficient family, the variances that decided about `depth`, software
            version, time.
    """

    operators: Mapping[str, OperatorSchedule]
    budget: Mapping[str, Any] = field(default_factory=dict)
    objective: Mapping[str, Any] = field(default_factory=dict)
    provenance: Mapping[str, Any] = field(default_factory=dict)

    def operator_of(self, name: str, classified: str | None = None) -> str | None:
        """The operator whose matrices include the parameter `name`, else that of its type and layer; None where the schedule does not know it."""
        listed = next((operator for operator, entry in self.operators.items() if name in entry.matrices), None)
        return entry_for(self.operators, classified, name) if listed is None and classified is not None else listed

    def to_json(self) -> str:
        """The file's text: UTF-8 JSON, numbers in full precision."""
        operators = {name: {"steps": entry.steps, **asdict(entry)} for name, entry in self.operators.items()}
        document = {
            "format": FORMAT, "version": VERSION, "provenance": dict(self.provenance),
            "budget": dict(self.budget), "objective": dict(self.objective), "operators": operators,
        }  # fmt: skip
        return json_text(document) + "\n"

    def save(self, path: str | Path) -> None:
        """Write the schedule as JSON."""
        write_whole(path, self.to_json())

    @classmethod
    def load(cls, path: str | Path) -> "Schedule":
        """Read a schedule file.

        Raises:
            FileNotFoundError: no such file.
            ValueError: not a schedule file, a newer version of it, or one that contradicts itself.
        """
        return cls.from_json(read_bounded(path), str(path))

    @classmethod
    def from_json(cls, text: str | bytes, source: str = "schedule") -> "Schedule":
        """Read the text of a schedule file; `source` is what errors, those of :meth:`load`, call it."""
        try:
            document = parse_bounded(text.encode() if isinstance(text, str) else text)
            if document["format"] != FORMAT:
                raise KeyError("format")
            version = int(document["version"])
        except (ValueError, KeyError, TypeError, OverflowError):
            raise ValueError(f"{source}: expected a schedule file written by `diag schedule`, got something else") from None
        if version > VERSION:
            raise ValueError(f"{source}: schedule version {version} is newer than this software reads ({VERSION}); upgrade optiscope")
        try:
            operators = {name: _operator(entry) for name, entry in document["operators"].items()}
            budget, objective, provenance = (dict(document.get(part, {})) for part in ("budget", "objective", "provenance"))
        except (KeyError, IndexError, TypeError, ValueError, AttributeError, OverflowError) as error:
            raise ValueError(f"{source}: the schedule is malformed ({error!r}); derive it again with `diag schedule`") from None
        return cls(operators, budget, objective, provenance)


def _operator(entry: Mapping[str, Any]) -> OperatorSchedule:
    coefficients = tuple((float(a), float(b), float(c)) for a, b, c in entry["coefficients"])
    if len(coefficients) != entry["steps"]:
        raise ValueError(f"{entry['steps']} steps but {len(coefficients)} coefficient triples")
    if not all(isfinite(value) for triple in coefficients for value in triple):
        raise ValueError("coefficients that are not finite numbers")
    if not isinstance(entry["matrices"], list) or not all(isinstance(name, str) for name in entry["matrices"]):
        raise TypeError("matrices that are not a list of names")
    low_high = entry.get("baseline_interval")
    shapes = tuple((int(rows), int(cols)) for rows, cols in entry.get("shapes", ()))
    if any(size < 1 for shape in shapes for size in shape):
        raise ValueError("shapes that are no sizes of a matrix")
    return OperatorSchedule(
        coefficients, tuple(entry["matrices"]), float(entry["predicted_residual"]),
        float(entry["baseline_residual"]), int(entry["cost"]), None if low_high is None else (float(low_high[0]), float(low_high[1])), shapes,
    )  # fmt: skip
