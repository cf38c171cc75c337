"""`diag demo`: the whole path on a real training."""

import shutil
from pathlib import Path
from typing import Annotated

import typer

from .analyze import analyse_into, print_analysis
from .app import JsonOption, command
from .console import console, print_json, say, sibling
from .schedule import print_schedule


@command
def demo(
    output: Annotated[Path, typer.Option("-o", "--output", help="Where to record the run.")] = Path("demo.zarr"),
    short: Annotated[bool, typer.Option("--short", help="A model of 125 k parameters: a few seconds instead of a minute or two.")] = False,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace a run that is already there.")] = False,
    as_json: JsonOption = False,
) -> None:
    """Train a small Llama on real text, recorded, and analyse it.

    Findings, figures and tables of every study, and a Newton–Schulz schedule derived from it; all of it is written beside the run.
    """
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

    from ..analysis import derive_schedule, open_run
    from ..examples.byte_llama import SHORT, Config, train

    if output.exists():
        open_run(output)  # refuses to go on where something else than a run would be replaced
        if not overwrite:
            raise ValueError(f"--output: {output} already holds a run; add --overwrite, or choose another path")
        shutil.rmtree(output)
    config = SHORT if short else Config()
    columns = (
        TextColumn("training"),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn("loss {task.fields[loss]:.2f} nats/byte"),
        TimeElapsedColumn(),
    )
    terminal = console(stderr=True)
    with Progress(*columns, console=terminal, transient=True, disable=not terminal.is_terminal) as progress:
        task = progress.add_task("training", total=config.steps, loss=float("nan"))
        before, after = train(output, config, lambda step, loss: progress.update(task, completed=step, loss=loss))

    run = open_run(output)
    analysis = analyse_into(run, sibling(output, "-analysis"))
    schedule = derive_schedule(run)
    schedule_path = sibling(output, "-schedule.json")
    schedule.save(schedule_path)
    if as_json:
        print_json({"run": output, "validation_loss": [before, after], "analysis": analysis, "schedule": schedule_path})
        return
    say("trained", f"{config.steps} steps, validation loss {before:.2f} → {after:.2f} nats per byte, recorded in {output}")
    print_analysis(analysis)
    print_schedule(schedule, schedule_path)
    say("next", f"diag info {output}, diag check {output}, diag analyze {output}")
