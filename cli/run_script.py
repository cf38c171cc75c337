"""`diag run`: somebody's training script, unmodified and recorded."""

import json
import os
import shutil
import sys
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from .app import command

if TYPE_CHECKING:
    from ..diagnostics.about import Value

STARTUP = Path(__file__).with_name("startup")


# Options end where the script begins; what follows is the script's.
@partial(command, context_settings={"allow_interspersed_args": False})
def run(
    script: Annotated[str | None, typer.Argument(help="A Python script.", metavar="SCRIPT", show_default=False)] = None,
    arguments: Annotated[list[str] | None, typer.Argument(help="Its own arguments.", metavar="ARGS", show_default=False)] = None,
    module: Annotated[bool, typer.Option("-m", help="SCRIPT is a module's name, as in python -m.")] = False,
    output: Annotated[Path, typer.Option("-o", "--output", help="Where to record the run.")] = Path("run.zarr"),
    every: Annotated[int | None, typer.Option(help="Record every N-th step.", metavar="N", show_default=False)] = None,
    overhead: Annotated[
        float | None,
        typer.Option(
            help="Record so often that it takes at most this share of the time; 0.01 by default.", metavar="P", show_default=False
        ),
    ] = None,
    measure: Annotated[
        list[str] | None,
        typer.Option(
            help="Record this group too: second_moment_map, gradient, blocks, stacking or precision; may be given several times.",
            metavar="GROUP",
            show_default=False,
        ),
    ] = None,
    background: Annotated[bool, typer.Option("--background", help="Measure and write in a thread beside the training.")] = False,
    about: Annotated[
        list[str] | None,
        typer.Option(
            help="What you state about the run, as seed=0, data=wiki or tokens_per_step=8192; may be given several times.",
            metavar="NAME=VALUE",
            show_default=False,
        ),
    ] = None,
    overwrite: Annotated[
        bool, typer.Option("--overwrite", help="Replace a run that is already there; without this it is continued.")
    ] = False,
) -> None:
    """Run a training script as python would, and record every optimizer it makes.

    Its arguments, output, signals and exit code are its own; when it ends, one line on standard error tells what was recorded. Under
    a launcher of several processes (torchrun --no-python diag run SCRIPT) the one of rank 0 records.
    """
    if not script:
        raise ValueError("script: expected a Python script to run, for example diag run train.py, or diag run -m package.train")
    if not module and not Path(script).exists():
        raise FileNotFoundError(f"script: {script} does not exist")
    if every is not None and overhead is not None:
        raise ValueError("--every and --overhead: expected one of them, got both")
    if every is not None and every < 1:
        raise ValueError(f"--every: expected a number of steps of at least 1, got {every}")
    if overhead is not None and not 0 < overhead <= 1:
        raise ValueError(f"--overhead: expected a share of the training time above 0 and up to 1, got {overhead}")
    groups = _groups(measure) if measure else None
    stated = _stated(about) if about else {}
    if not sys.executable:
        raise RuntimeError("sys.executable: expected the path of the Python interpreter to run the script with, got none")
    environment = dict(os.environ)
    if _records():
        if output.exists():
            _make_way(output, overwrite)
        environment |= _settings(output, every, overhead, groups, stated, background)
    # In place of this process: signals, exit code and streams need nobody to pass them on.
    os.execve(sys.executable, [sys.executable, *(["-m"] if module else []), script, *(arguments or [])], environment)


def _groups(measure: list[str]) -> str:
    """Those that are recorded anyway and those asked for, with commas between."""
    from ..diagnostics.catalogue import DEFAULT_GROUPS, GROUPS, ON_REQUEST  # loads NumPy, which nothing needs without them

    if unknown := set(measure) - set(GROUPS):
        raise ValueError(f"--measure: {', '.join(sorted(unknown))} is none of {', '.join(ON_REQUEST)}")
    return ",".join(group for group in GROUPS if group in (*DEFAULT_GROUPS, *measure))


def _stated(about: list[str]) -> "dict[str, Value]":
    from ..diagnostics.about import parsed  # loads NumPy, as above

    return parsed(about)


def _records() -> bool:
    """Whether this is the process that records, of those that a launcher started."""
    return os.environ.get("RANK", os.environ.get("LOCAL_RANK", "0")) in ("", "0")


def _make_way(output: Path, overwrite: bool) -> None:
    from ..analysis import open_run

    open_run(output)  # refuses to go on where something else than a run would be replaced or continued
    if overwrite:
        shutil.rmtree(output)


def _settings(
    output: Path, every: int | None, overhead: float | None, groups: str | None, about: "dict[str, Value]", background: bool
) -> dict[str, str]:
    """The environment that `startup/sitecustomize.py` reads, and takes away again before the script sees it."""
    path = os.environ.get("PYTHONPATH")
    stated = json.dumps(about) if about else None
    wanted = {
        "STORE": output.absolute(), "EVERY": every, "OVERHEAD": overhead, "MEASURE": groups, "ABOUT": stated, "PYTHONPATH": path,
        "BACKGROUND": "1" if background else None,
    }  # fmt: skip
    settings = {f"OPTISCOPE_RUN_{name}": str(value) for name, value in wanted.items() if value is not None}
    # An empty entry would be the current folder.
    return {**settings, "PYTHONPATH": os.pathsep.join([str(STARTUP), *([path] if path else [])])}
