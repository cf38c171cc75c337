"""`diag ns`: the known Newton–Schulz families, and whether a list of coefficients is one to use."""

import io
import os
import re
import sys
from math import isfinite
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from .app import CLEAN, FINDINGS, JsonOption, app, reporting_errors
from .console import print_json, print_table, say

if TYPE_CHECKING:
    from ..diagnostics.newton_schulz.facts import Validation

# `[`, `NAME = [`, `torch.tensor([`, or a number and a comma.
_WRITTEN_OUT = re.compile(r"\s*(([\w.]+\s*(:[^=]*)?=\s*)?([\w.]+\()?[\[({]|[\d.]+\s*,)")
SHARED = 12  # operators that are named where many share a list

group = typer.Typer(invoke_without_command=True, add_completion=False)
app.add_typer(group, name="ns")


def families(
    context: typer.Context,
    family: Annotated[list[str] | None, typer.Option(help="Only this family; may be given several times.", show_default=False)] = None,
    output: Annotated[
        Path | None, typer.Option("-o", "--output", help="Draw p(x) into this .png or .svg file.", show_default=False, metavar="FILE")
    ] = None,
    as_json: JsonOption = False,
) -> None:
    """Tell what known Newton–Schulz families do to singular values.

    `diag ns validate` judges a list of your own.
    """
    if context.invoked_subcommand is not None:
        return
    from ..diagnostics.newton_schulz.coefficients import matched
    from ..diagnostics.newton_schulz.families import FAMILIES
    from ..diagnostics.newton_schulz.validation import of_family

    known = {"matched": matched(5), **FAMILIES}
    if unknown := sorted(set(family or ()) - set(known)):
        raise ValueError(f"--family: {', '.join(unknown)} is none of {', '.join(known)}")
    chosen = [known[name] for name in family or known]
    if output is not None:
        _draw({one.name: one.schedule(one.steps) for one in chosen}, output)
    found = {one.name: of_family(one) for one in chosen}
    if as_json:
        about = {
            one.name: {"source": one.source, "after_last": one.after_last, "scaling": one.scaling, "eps": one.eps, "pre": one.pre}
            for one in chosen
        }
        print_json({"families": {name: {**about[name], **validation.as_dict()} for name, validation in found.items()}})
        return
    print_table(("family", "T", "slope", "low", "high", "1e-2", "1e-3", "1e-4", "bf16"), [_row(name, one) for name, one in found.items()])
    say("columns", "T steps; p′(0); smallest and largest p(x) for x = σ/‖M‖_F from 0.01 to 1; largest |1 − p| from 1e-2, 1e-3, 1e-4; "
        "largest singular value in bfloat16, over 20 matrices of 32×64")  # fmt: skip
    for one in chosen:
        say(one.name, f"{one.source}. {_PAST_END[one.after_last]}")
        for hazard in found[one.name].hazards:
            say(f"  {hazard.severity} {hazard.rule}", hazard.sentence)
    if output is not None:
        say("figure", str(output))


def validate(
    given: Annotated[
        str,
        typer.Argument(
            help="A JSON or Python file that holds a list of (a, b, c), a schedule file, or the list itself in quotes; - for standard input.",
            metavar="FILE|LIST",
        ),
    ],
    name: Annotated[
        list[str] | None,
        typer.Option(help="Only the list of this name, or this operator's; may be given several times.", show_default=False),
    ] = None,
    steps: Annotated[int | None, typer.Option(help="Steps taken; by default as many as there are triples.", show_default=False)] = None,
    after_last: Annotated[
        Literal["repeat", "cycle", "exact"] | None,
        typer.Option(help="What follows the last triple: repeat, cycle or exact.", metavar="HOW", show_default=False),
    ] = None,
    as_json: JsonOption = False,
) -> None:
    """Judge coefficients: exit code 0 clean, 1 hazards, 2 unreadable. Python code is parsed, never run."""
    from ..diagnostics.escape import escaped
    from ..diagnostics.newton_schulz.validation import validate as measure
    from ..diagnostics.schedules.coefficients_file import read_coefficients

    found: dict[str, Validation] = {}
    judged: dict[str, Validation] = {}  # operators share lists
    for one in read_coefficients(*_read(given), name or ()):
        if one.note:
            print(f"diag: {escaped(f'{one.name}: {one.note}')}", file=sys.stderr)
        chosen: Any = after_last or one.after_last
        taken = one.steps if steps is None else steps
        key = repr((one.coefficients, taken, chosen))
        try:
            found[one.name] = judged[key] = judged.get(key) or measure(one.coefficients, steps=taken, after_last=chosen)
        except ValueError as error:
            raise ValueError(f"{one.name}: {error}") from None
    failing = sum(hazard.severity != "info" for validation in found.values() for hazard in validation.hazards)
    if as_json:
        print_json({"lists": {name: validation.as_dict() for name, validation in found.items()}, "failing": failing})
    else:
        for validation in judged.values():
            _print_validation([own for own, one in found.items() if one is validation], validation)
    raise typer.Exit(FINDINGS if failing else CLEAN)


group.callback()(reporting_errors(families))
group.command("validate")(reporting_errors(validate))


_PAST_END = {
    "repeat": "Its authors hold the last triple past its end.",
    "cycle": "Its authors begin it anew past its end.",
    "exact": "Its authors take this number of steps.",
}


def _read(given: str) -> tuple[bytes, str]:
    """What is to be judged, and what errors call it."""
    from ..diagnostics.store.bounded_json import MAX_BYTES, read_bounded

    if given == "-":
        return sys.stdin.buffer.read(MAX_BYTES + 1), "standard input"
    what_to_give = "give a file, the list itself in quotes, or - for standard input"
    if os.path.isdir(given):
        raise ValueError(f"coefficients: {given} is a folder; {what_to_give}")
    if os.path.exists(given):
        try:
            return read_bounded(given), given
        except OSError as error:
            raise ValueError(f"coefficients: {given} cannot be read ({error.strerror}); {what_to_give}") from None
    # A file whose name is like that was found above.
    if "\n" in given or _WRITTEN_OUT.match(given):
        return os.fsencode(given), "list"
    raise ValueError(f"coefficients: nothing found at {given:.200}; {what_to_give}")


def _row(name: str, found: "Validation") -> tuple[str, ...]:
    numbers = (*found.band, *found.worst.values())
    return name, str(len(found.coefficients)), f"{found.slope:.5g}", *(f"{number:.3f}" for number in numbers), f"{found.bfloat16:.3g}"


def _print_validation(names: list[str], found: "Validation") -> None:
    """The facts of a list in a few lines, what every number of steps reaches, and its hazards; `names` are whose list it is."""
    from ..diagnostics.newton_schulz.verdict import told

    worst = ", ".join(f"{_number(error, '.3f')} from {lower:g}" for lower, error in found.worst.items())
    steps = len(found.coefficients)
    say(
        ", ".join(names[:SHARED]) + (f" and {len(names) - SHARED} more" if len(names) > SHARED else ""),
        f"{steps} step{'' if steps == 1 else 's'}, slope {_number(found.slope)} at 0; values from {found.lower:g} on {told(found.band)}; "
        f"largest error {worst}; largest singular value in bfloat16 {_number(found.bfloat16)}",
    )
    points = "; ".join(f"{x:.4f} ({'attracting' if abs(slope) < 1 else 'repelling'}, slope {slope:.3g})" for x, slope in found.fixed_points)
    orbit = (
        f"it ends on {' → '.join(f'{x:.4f}' for x in found.cycle)} (multiplier {found.multiplier:.3g})"
        if found.cycle
        else "it settles on no cycle"
    )
    say("last triple", f"fixed points {points or 'none'}; repeated {orbit}")
    held, again = (told(found.past_end[name]) for name in ("repeat", "cycle"))
    say("one step past the end", f"values {held} with the last triple held, and {again} where the list begins anew")
    if found.nearest:
        differing = f" but for rows {', '.join(map(str, found.nearest.differing))}" if found.nearest.differing else ""
        say("nearest known list", found.nearest.family + differing)
    print_table(
        ("after", *(f"x = {10.0**-k:g}" for k in range(1, 7))),
        [(k, *(_number(o, ".3g") for o in row)) for k, row in enumerate(found.reached)],
    )
    for hazard in found.hazards:
        say(f"{hazard.severity} {hazard.rule}", f"{hazard.sentence} {hazard.advice}")
    if not found.hazards:
        say("hazards", "none")


def _number(value: float, spec: str = ".4g") -> str:
    """A number, without decimals to speak of where it is huge; of what has left all bounds neither sign nor kind is of interest."""
    return f"{value:{spec if abs(value) < 1e4 else '.4g'}}" if isfinite(value) else "∞"


def _draw(schedules: dict[str, Any], path: Path) -> None:
    if path.suffix not in (".png", ".svg"):
        raise ValueError(f"--output: expected a file that ends in .png or .svg, got {path}")
    if not path.parent.is_dir():
        raise ValueError(f"--output: the folder {path.parent} does not exist; make it, or write elsewhere")

    from ..analysis.family_maps import plot
    from ..diagnostics.store.whole_file import write_whole

    drawn = io.BytesIO()
    plot(schedules).savefig(drawn, format=path.suffix[1:])
    write_whole(path, drawn.getvalue())
