"""The coverage document, printed from the results of the contract suite and of the watched stand-ins: `make coverage`."""

import sys
from collections.abc import Mapping
from pathlib import Path

from contract.harness import EXACT, Case, Result, installed_version

HEADING = "## Watched: classes that are in no table"  # of the part of watched classes
DOCUMENT = Path(__file__).parents[3] / "docs" / "coverage.md"

_HEAD = """# Coverage

What Optiscope records of each optimizer, as the contract suite measured it (`make coverage` writes these tables; the tests fail
when they are stale). Every row was trained twice, with and without a recorder, and was the same to the bit.

- **NS input**: *exact*: bitwise what an intercepted Newton–Schulz function was given, and, where only a scale follows the iteration, its
  output is the applied update.
- **momentum**, **second moment**: *exact*: within {exact:g} of an independent float64 transcription (float32 rounding); a percentage: the
  largest relative error accepted, for moments that the optimizer itself keeps compressed or approximate; *read*: read, but not
  compared with a transcription; —: the optimizer keeps none, or it is not read (see the note).
- **update**: *exact*: the applied update per learning rate, decoupled decay taken out, is that of the transcription, or the scaled output of the
  intercepted Newton–Schulz function, within 1e-3 (weights are float32); *read*: recorded, but not compared with a formula;
  *applied only*: there is no one learning rate to divide by.
- **read by**: how the optimizer's state and update were found, one of four ways. *table*: a row of the adapter table. *watching a step*: a copy's step showed
  the Newton–Schulz iteration ([below](#watched-classes-that-are-in-no-table)); moments are then read by names or numbers. *names in the state*: what
  classes call their moments. *numbers*: which tensor of the state follows the gradients as a moment does, over the first eight steps.
- A *stand-in* is a small optimizer with the state layout of a library that cannot be installed on CPython 3.11 from the package
  registry: the row was tested on it, not on the library.

| system | tested on | class | read by | NS input | momentum | second moment | update | note |
|---|---|---|---|---|---|---|---|---|
"""


def parts() -> tuple[str, str]:
    """The document's part of the contract suite, and that of watched classes; each is held by the tests that measure it."""
    contract, heading, watched = DOCUMENT.read_text(encoding="utf-8").partition(HEADING)
    return contract.removesuffix("\n"), heading + watched


def written_out(results: Mapping[Case, Result]) -> str:
    """The contract suite's part."""
    return _HEAD.format(exact=EXACT) + "".join(f"| {' | '.join(_row(case, result))} |\n" for case, result in results.items())


def _row(case: Case, result: Result) -> list[str]:
    version = installed_version(case.package)
    tested_on = "examples/optimizers" if case.package == "optiscope" else f"{case.package} {version.split('+')[0]}".strip()
    ns_input = "—" if result.ns_input is None else "exact" if result.ns_input else "**not equal**"
    forms = f" ({', '.join(result.forms)})" if result.forms else ""
    return [
        case.system,
        tested_on,
        f"`{result.class_name}`",
        result.read_by,
        ns_input,
        _quality(result.momentum, case.momentum_bound, "momentum_rms" in result.stored),
        _quality(result.second, case.second_bound, bool(result.forms)) + forms,
        _quality(result.replay if result.update is None else result.update, case.update_bound, True, exact=1e-3)
        if "update_rms_per_lr" in result.stored
        else "applied only",
        case.note,
    ]


def _quality(error: float | None, bound: float, was_read: bool, exact: float = EXACT) -> str:
    if error is None:
        return "read" if was_read else "—"
    return "exact" if error <= exact else f"within {bound:.0%}" if error <= bound else "**off**"


def main() -> None:
    """Measure every case and every stand-in, and write the document."""
    from watching import document
    from watching.cases import STAND_INS
    from watching.measuring import measured

    from contract.cases import CASES
    from contract.harness import run_case

    results = {}
    for case in CASES:
        print(case.system, file=sys.stderr)
        results[case] = run_case(case)
    watched = {name: measured(name) for name in STAND_INS}
    DOCUMENT.write_text(f"{written_out(results)}\n{document.written_out(watched)}", encoding="utf-8")


if __name__ == "__main__":
    main()
