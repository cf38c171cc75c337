"""What the experiments' commands share: their options, and keeping a result beside its figure."""

import argparse
import json
import math
import os
import platform
import sys
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from matplotlib.figure import Figure

Result = dict[str, Any]


@dataclass(frozen=True)
class Experiment:
    """A name; what trains and measures, given the parsed options; what draws a result; and what tells it, in Markdown."""

    name: str
    measure: Callable[[argparse.Namespace], Result]
    plot: Callable[[Result], Figure]
    tell: Callable[[Result], str]


def options(description: str) -> argparse.ArgumentParser:
    """The options that every experiment has."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "-o", "--output", type=Path, default=Path("experiments"), help="folder of the runs, the result and the figure; what lies there is not done again"
    )  # fmt: skip
    parser.add_argument("--short", action="store_true", help="tiny models, a few steps, two seeds: that it works, in half a minute")
    parser.add_argument("--from", dest="kept", type=Path, help="a kept result: draw and tell it again, train nothing")
    return parser


def run(experiment: Experiment, arguments: argparse.Namespace) -> Result:
    """Measure, or read what was kept; write `NAME.json` and `NAME.png` into the output folder, and print what it tells."""
    folder = arguments.output
    folder.mkdir(parents=True, exist_ok=True)
    if arguments.kept is None:
        result = rounded({"measured_with": measured_with(), **experiment.measure(arguments)})
        (folder / f"{experiment.name}.json").write_text(json.dumps(result, separators=(",", ":")) + "\n", encoding="utf-8")
    else:
        result = json.loads(arguments.kept.read_text(encoding="utf-8"))
    experiment.plot(result).savefig(folder / f"{experiment.name}.png")
    print(experiment.tell(result))
    return result


def measured_with() -> dict[str, Any]:
    """Command line, versions and machine."""
    name = getattr(sys.modules["__main__"].__spec__, "name", None)
    return {
        "command": " ".join([f"python -m {name}" if name else sys.argv[0], *sys.argv[1:]]),
        "versions": {
            "python": platform.python_version(),
            **{name: version(name) for name in ("optiscope", "torch", "numpy", "scipy", "xarray")},
        },
        "machine": f"{os.cpu_count()} CPUs ({platform.machine()}), {torch.get_num_threads()} torch threads",
    }


def table(header: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """A Markdown table.

    >>> print(table(["a", "b"], [["1", "2"]]))
    | a | b |
    |---|---|
    | 1 | 2 |
    """
    return "\n".join(["| " + " | ".join(header) + " |", "|" + "---|" * len(header), *("| " + " | ".join(row) + " |" for row in rows)])


def rounded(value: Any) -> Any:
    """Numbers to six digits, NaN to None, as strict JSON has it.

    >>> rounded({"a": (1 / 3, float("nan")), "b": 7})
    {'a': [0.333333, None], 'b': 7}
    """
    if isinstance(value, dict):
        return {str(key): rounded(one) for key, one in value.items()}
    if isinstance(value, (list, tuple)):
        return [rounded(one) for one in value]
    if isinstance(value, float):
        return float(f"{value:.6g}") if math.isfinite(value) else None
    return value
