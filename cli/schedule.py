"""`diag schedule`: Newton–Schulz steps and coefficients per operator."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from .app import JsonOption, command
from .run import RunArgument, print_table, say

if TYPE_CHECKING:
    from ..diagnostics.schedule import Schedule


@command
def schedule(
    run: RunArgument,
    output: Annotated[Path, typer.Option("-o", "--output", help="Where to write the schedule.")] = Path("schedule.json"),
    budget: Annotated[int, typer.Option(help="Steps per matrix of the uniform baseline whose FLOPs may be spent (3 to 8).")] = 5,
    rule: Annotated[str, typer.Option(help="mean, mean-uncapped, minimax or uniform.")] = "mean",
    family: Annotated[str, typer.Option(help="matched (one design per step count), jordan or polar_express.")] = "matched",
    window: Annotated[
        str | None,
        typer.Option(
            help="Steps to average over, FIRST:LAST; by default 1 % of the run after warm-up, at least 8 records.", show_default=False
        ),
    ] = None,
    as_json: JsonOption = False,
) -> None:
    """Derive Newton–Schulz steps and coefficients per operator."""
    from ..analysis import derive_schedule, open_run

    found = derive_schedule(open_run(run), budget=budget, rule=rule, family=family, window=parse_window(window))
    found.save(output)
    if as_json:
        print(found.to_json(), end="")
        return
    print_schedule(found, output)


def print_schedule(found: "Schedule", path: Path) -> None:
    """The schedule as a table, and what it gains."""
    rows = [
        (
            operator,
            len(entry.matrices),
            entry.steps,
            f"{entry.baseline_residual:.3f}",
            f"{entry.predicted_residual:.3f}",
            f"{entry.cost / found.budget['cost']:.0%}",
            f"{found.provenance['below_bfloat16_floor'][operator]:.0%}",
        )
        for operator, entry in found.operators.items()
    ]
    uniform = f"{found.budget['mean_steps']} steps"
    print_table(
        ("operator", "matrices", "NS steps", f"residual at {found.budget['mean_steps']}", "residual", "FLOPs", "σ under bf16"), rows
    )
    objective, provenance = found.objective, found.provenance
    say(
        "predicted mean residual",
        f"{objective['in_force_mean_residual']:.3f} with what was in force, {objective['baseline_mean_residual']:.3f} with {uniform} of "
        f"{provenance['family']} coefficients for all, {objective['mean_residual']:.3f} with this schedule; worst operator "
        f"{objective['baseline_max_residual']:.3f} and {objective['max_residual']:.3f}; FLOPs {found.budget['cost'] / found.budget['limit']:.1%} of the budget",
    )
    say(
        "σ under bf16",
        "share of singular values below bfloat16's rounding noise, which Muon iterates in; steps spent on them orthogonalise noise",
    )
    say("observed", f"{provenance['snapshots']} records, steps {provenance['window'][0]} to {provenance['window'][1]}")
    say("schedule", f"{path}. A residual measures geometry; whether the loss gains by it, a training must tell.")


def parse_window(text: str | None) -> slice | None:
    """FIRST:LAST as a slice of steps, both included."""
    if text is None:
        return None
    first, colon, last = text.partition(":")
    if not colon or not all(part == "" or part.isdecimal() for part in (first, last)):
        raise ValueError(f"--window: expected FIRST:LAST in optimizer steps, for example 20:100, got {text!r}")
    return slice(int(first) if first else None, int(last) if last else None)
