"""The application: its commands, and how errors are told."""

import functools
import sys
import traceback
from collections.abc import Callable
from typing import Annotated, Any, ParamSpec

import typer
from typer.core import TyperGroup

P = ParamSpec("P")

# As a newcomer meets them; help lists them so, whatever the order in which they are registered.
ORDER = ("demo", "run", "info", "check", "report", "analyze", "schedule", "what-if", "compare", "ns", "verify")


class InOrder(TyperGroup):
    """Commands in the order above, any other after them."""

    def list_commands(self, ctx: Any) -> list[str]:
        names = super().list_commands(ctx)
        return sorted(names, key=lambda name: ORDER.index(name) if name in ORDER else len(ORDER))


app = typer.Typer(
    name="diag",
    cls=InOrder,
    help="See what an optimizer really did in a recorded run, and derive Newton–Schulz schedules from it.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,  # plain help: importing what draws the panels takes as long as all else
    context_settings={"max_content_width": 120},
)

CLEAN, FINDINGS, FAILED = 0, 1, 2  # exit codes

JsonOption = Annotated[bool, typer.Option("--json", help="Print the result as JSON on standard output.")]

_debug = False


@app.callback()
def options(debug: Annotated[bool, typer.Option("--debug", help="Show the traceback of an error.")] = False) -> None:
    """Options before the command."""
    global _debug
    _debug = debug


def command(function: Callable[P, None], **settings: Any) -> Callable[P, None]:
    """Register a command, with settings of Typer's; its errors are told by :func:`reporting_errors`."""
    reporting = reporting_errors(function)
    app.command(function.__name__.replace("_", "-"), **settings)(reporting)
    return reporting


def reporting_errors(function: Callable[P, None]) -> Callable[P, None]:
    """The same function, of which an error becomes one sentence on standard error and exit code 2."""

    @functools.wraps(function)
    def reporting(*args: P.args, **kwargs: P.kwargs) -> None:
        try:
            function(*args, **kwargs)
        except (typer.Exit, KeyboardInterrupt, BrokenPipeError):
            raise
        except Exception as error:
            from ..diagnostics.escape import escaped, shortened  # loads NumPy, which no help needs

            if _debug:
                print(*map(escaped, traceback.format_exc().splitlines()), sep="\n", file=sys.stderr)
            text = str(error)
            if not isinstance(error, (ValueError, TypeError, OSError, RuntimeError)):
                # Not one of ours: a damaged run, or a mistake in this program.
                text = f"unexpected {type(error).__name__}: {text}; the run may be damaged (diag --debug shows where)"
            print(f"diag: {shortened(escaped(' '.join(text.split())), 1_000)}", file=sys.stderr)
            raise typer.Exit(FAILED) from None

    return reporting
