"""`diag run`: somebody's training script, unmodified and recorded."""

import json
import os
import shutil
import sys
from functools import partial
from pathlib import Path
from typing import Annotated, Any

import typer

from .app import command
from .recording_options import Measure, Together, options_of

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
            help="Record so often that it takes at most this share of the time; by default 0.01.", metavar="P", show_default=False
        ),
    ] = None,
    measure: Annotated[
        list[Measure] | None,
        typer.Option(
            help="Record this group too: second_moment_map, gradient, blocks, stacking or precision. May be repeated.",
            metavar="GROUP",
            show_default=False,
        ),
    ] = None,
    operators: Annotated[
        list[str] | None,
        typer.Option(
            help=r"Your own names of operators: REGEX=OPERATOR, such as 'mixer\.in$=attn_qkv', or a file of such lines or of one JSON object. "
            "The first expression found in a parameter's name wins. May be repeated.",
            metavar="REGEX=OP|FILE",
            show_default=False,
        ),
    ] = None,
    heads: Annotated[
        str | None,
        typer.Option(
            help="Attention heads of all layers, or query heads and key/value heads: 32 or 32,8. By default found on the model.",
            metavar="N[,M]",
            show_default=False,
        ),
    ] = None,
    background: Annotated[bool, typer.Option("--background", help="Measure and write in a thread beside the training.")] = False,
    ranks: Annotated[
        Together | None,
        typer.Option(
            help="Of several processes: auto, all take part and rank 0 writes, copies being measured by the first that has them; share: copies are dealt out; "
            "alone: rank 0 records what it has whole, and knows of no other. By default alone.",
            metavar="HOW",
            show_default=False,
        ),
    ] = None,
    rank_timeout: Annotated[
        float | None, typer.Option(help="Seconds that a rank waits for another at most; by default 10.", metavar="S", show_default=False)
    ] = None,
    about: Annotated[
        list[str] | None,
        typer.Option(
            help="What you state about the run, as seed=0, data=wiki or tokens_per_step=8192. May be repeated.",
            metavar="NAME=VALUE",
            show_default=False,
        ),
    ] = None,
    overwrite: Annotated[
        bool, typer.Option("--overwrite", help="Replace a run that is already there; without this it is continued.")
    ] = False,
) -> None:
    """Run a training script as python would, and record it.

    Every optimizer it makes is recorded, but for those of a few steps beside others; so are the numbers that it logs with wandb, TensorBoard or MLflow. Its arguments, output, signals and exit code are its own; when it ends, one line on standard error tells what was recorded. Under
    a launcher of several processes (torchrun --no-python diag run SCRIPT) the one of rank 0 records; with --ranks auto all take part.
    """
    if not script:
        raise ValueError("script: expected a Python script to run, for example diag run train.py, or diag run -m package.train")
    if not module and not Path(script).exists():
        raise FileNotFoundError(f"script: {script} does not exist")
    options = options_of(every, overhead, measure or (), operators or (), heads, about or (), background, ranks, rank_timeout)
    if not sys.executable:
        raise RuntimeError("sys.executable: expected the path of the Python interpreter to run the script with, got none")
    environment = dict(os.environ)
    if _is_first() and output.exists():
        _make_way(output, overwrite)
    if ranks is None and os.environ.get("WORLD_SIZE", "1") != "1":
        options["ranks"] = ranks = Together.ALONE
    if _is_first() or ranks not in (None, Together.ALONE):
        environment |= _settings(output, options)
    # In place of this process: signals, exit code and streams need nobody to pass them on.
    os.execve(sys.executable, [sys.executable, *(["-m"] if module else []), script, *(arguments or [])], environment)


def _is_first() -> bool:
    """Whether this is the process that writes the run, of those that a launcher started."""
    return os.environ.get("RANK", os.environ.get("LOCAL_RANK", "0")) in ("", "0")


def _make_way(output: Path, overwrite: bool) -> None:
    from ..analysis import open_run

    open_run(output)  # refuses to go on where something else than a run would be replaced or continued
    if overwrite:
        shutil.rmtree(output)


def _settings(output: Path, options: dict[str, Any]) -> dict[str, str]:
    """The environment that `startup/sitecustomize.py` reads, and takes away again before the script sees it."""
    path = os.environ.get("PYTHONPATH")
    settings = {"OPTISCOPE_RUN_STORE": str(output.absolute()), "OPTISCOPE_RUN_OPTIONS": json.dumps(options)}
    if path is not None:
        settings["OPTISCOPE_RUN_PYTHONPATH"] = path
    # An empty entry would be the current folder.
    return {**settings, "PYTHONPATH": os.pathsep.join([str(STARTUP), *([path] if path else [])])}
