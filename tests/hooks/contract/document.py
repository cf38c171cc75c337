"""The coverage document, printed from the contract suite's results: `make coverage`."""

import sys
from collections.abc import Mapping
from pathlib import Path

from contract.harness import EXACT, Case, Result, installed_version

DOCUMENT = Path(__file__).parents[3] / "docs" / "coverage.md"

_HEAD = """# Coverage

What Optiscope records of each optimizer, as the contract suite measured it (`make coverage` writes this table; the tests fail
when it is stale). Every row was trained twice, with and without a recorder, and was the same to the bit.

- **NS input**: *exact*: bitwise what an intercepted Newton–Schulz function was given, and, where only a scale follows the iteration, its
  output is the applied update.
- **momentum**, **second moment**: *exact*: within {exact:g} of an independent float64 transcription (float32 rounding); a percentage: the
  largest relative error accepted, for moments that the optimizer itself keeps compressed or approximate; *read*: read, but not
  compared with a transcription; —: the optimizer keeps none, or it is not read (see the note).
- **update**: *exact*: the applied update per learning rate, decoupled decay taken out, is that of the transcription, or the scaled output of the
  intercepted Newton–Schulz function, within 1e-3 (weights are float32); *read*: recorded, but not compared with a formula;
  *applied only*: there is no one learning rate to divide by.
- **read by**: how the state was found: a row of the adapter table, names in the state, or numbers.
- A *stand-in* is a small optimizer with the state layout of a library that cannot be installed on CPython 3.11 from the package
  registry: the row was tested on it, not on the library.

| system | tested on | class | read by | NS input | momentum | second moment | update | note |
|---|---|---|---|---|---|---|---|---|
"""


def written_out(results: Mapping[Case, Result]) -> str:
    """The whole document."""
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
    """Measure every case and write the document."""
    from contract.cases import CASES
    from contract.harness import run_case

    results = {}
    for case in CASES:
        print(case.system, file=sys.stderr)
        results[case] = run_case(case)
    DOCUMENT.write_text(written_out(results), encoding="utf-8")


if __name__ == "__main__":
    main()
