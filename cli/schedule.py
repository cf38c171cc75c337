"""`diag schedule`: Newton–Schulz steps and coefficients per operator."""

from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer

from .app import JsonOption, command
from .console import LineageOption, RunArgument, WindowOption, parse_window, print_table, say

if TYPE_CHECKING:
    from ..diagnostics.schedules.schedule_file import Schedule

# The allocation's, held equal to them by a test: they load NumPy, which no help needs.
Rule = Literal["mean", "mean-uncapped", "minimax", "uniform", "kappa"]
Split = Literal["auto", "never"]


@command
def schedule(
    run: RunArgument,
    output: Annotated[
        Path | None,
        typer.Option(
            "-o",
            "--output",
            help="Where to write the schedule, by default schedule.json.",
            show_default=False,
        ),
    ] = None,
    budget: Annotated[
        int, typer.Option(help="Steps per matrix of the uniform baseline whose FLOPs may be spent, 3 to 8.", metavar="N")
    ] = 5,
    rule: Annotated[
        Rule,
        typer.Option(
            help="mean, mean-uncapped, minimax, kappa (from condition numbers alone), or uniform; docs/schedules.md says what each chooses.",
            metavar="RULE",
        ),
    ] = "mean",
    family: Annotated[
        str, typer.Option(help="matched, which has a design for each number of steps, or a family of `diag ns`.", metavar="NAME")
    ] = "matched",
    window: WindowOption = None,
    recoverable: Annotated[bool, typer.Option("--recoverable", help="Count only singular values above bfloat16's rounding noise.")] = False,
    split: Annotated[
        Split,
        typer.Option(
            help="auto (cut an operator in two by depth, where its halves differ more than operators do) or never.", metavar="SPLIT"
        ),
    ] = "auto",
    keep_uniform: Annotated[bool, typer.Option(help="Hold equal steps where the gain's 95 % interval over layers includes zero.")] = True,
    moved: Annotated[bool, typer.Option("--what-if", "--by-operator", hidden=True)] = False,
    lineage: LineageOption = None,
    as_json: JsonOption = False,
) -> None:
    """Derive Newton–Schulz steps and coefficients per operator."""
    if moved:
        raise ValueError(f"--what-if: expected as a command of its own: diag what-if {run}")
    from ..analysis import derive_schedule, open_run

    path = output or Path("schedule.json")
    found = derive_schedule(
        open_run(run, lineage), budget=budget, rule=rule, family=family, window=parse_window(window), recoverable=recoverable, split=split,
        keep_uniform=keep_uniform,
    )  # fmt: skip
    found.save(path)
    if as_json:
        print(found.to_json(), end="")
        return
    print_schedule(found, path)


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
    over = " (over all singular values)" if found.objective["recoverable"] else ""
    print_table(
        ("operator", "matrices", "NS steps", f"residual at {found.budget['mean_steps']}", "residual", "FLOPs", "σ under bf16"), rows
    )
    objective, provenance = found.objective, found.provenance
    say(
        "predicted mean residual",
        f"{objective['in_force_mean_residual']:.3f} with what was in force{over}, {objective['baseline_mean_residual']:.3f} with {uniform} of "
        f"{provenance['family']} coefficients for all, {objective['mean_residual']:.3f} with this schedule; worst operator "
        f"{objective['baseline_max_residual']:.3f} and {objective['max_residual']:.3f}; FLOPs {found.budget['cost'] / found.budget['limit']:.1%} of the budget",
    )
    for topic, text in _verdicts(found):
        say(topic, text)
    say(
        "σ under bf16",
        "share of singular values below bfloat16's rounding noise, which Muon iterates in; steps spent on them orthogonalise noise",
    )
    say(
        "observed",
        f"{provenance['snapshots']} record{'' if provenance['snapshots'] == 1 else 's'}, steps {provenance['window'][0]} to {provenance['window'][1]}",
    )
    say("schedule", f"{path}. A residual measures geometry; whether the loss gains by it, a training must tell.")


def _verdicts(found: "Schedule") -> Iterator[tuple[str, str]]:
    """How sure the gain is and what was made of that, what of it bfloat16 can keep, and whether operators are cut by depth."""
    choice, budget, layers = found.objective["choice"], found.budget["mean_steps"], found.provenance["layers"]
    interval, of = (
        choice["relative_gain_interval"],
        "largest residual of an operator" if found.objective["rule"] == "minimax" else "mean residual",
    )
    sure = (
        f"95 % over {layers} layers: {interval[0]:.1%} to {interval[1]:.1%}"
        if interval
        else f"no interval: {layers} layer{' is' if layers == 1 else 's are'} too few to draw from"
    )
    if set(choice["steps"].values()) == {budget}:
        yield "gain", f"none to be had by this rule: it chooses {budget} steps for all"
    else:
        yield "gain", f"{choice['relative_gain']:.1%} of the {of} under {budget} steps for all ({sure})"
    if found.objective["kept_uniform"]:
        steps = ", ".join(f"{operator} {k}" for operator, k in choice["steps"].items())
        yield "kept uniform", f"that may be nothing, so all keep {budget} steps; with --no-keep-uniform it would be {steps}"
    if (share := choice["recoverable_share"]) is not None:
        before, after = (choice["mean_residuals"]["recoverable"][name] for name in ("uniform", "choice"))
        yield (
            "above bf16 noise",
            f"{f'{share:.0%}' if 0 <= share <= 1 else 'all' if share > 1 else 'none'} of the mean residual's fall is of singular values that bfloat16 carries; over those alone it goes from {before:.3f} to {after:.3f}",
        )
    depth = found.provenance["depth"]
    if not (variances := depth["variances"]):
        yield "depth", "not tested: no operator has 4 layers to halve"
        return
    between = next(iter(variances.values()))["between_operators"]
    most = max(variances, key=lambda operator: variances[operator]["between_halves"])
    differ = (
        f"log κ varies by {variances[most]['between_halves']:.3f} between the halves of {most}'s layers, by {between:.3f} between operators"
    )
    cut = ", ".join(operator for operator in variances if operator not in found.operators)
    yield "depth", f"{differ}; {f'cut in two: {cut}' if cut else 'no operator is cut in two'}"
