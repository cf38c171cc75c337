"""Optimizers that run an iteration of which the run does not hold the input: their spectra are of something else."""

from collections.abc import Iterator

import xarray as xr

from ...diagnostics.finding import Finding

_IN_PARTS = {
    "rows": "in {} blocks of rows each", "columns": "in {} blocks of columns each",
    "selected rows": "of which each step selects some rows", "selected columns": "of which each step selects some columns",
}  # fmt: skip
_TEACH = "Teach it with register_adapter (docs/adapters.md) if you need the exact input."


def unread_iterations(run: xr.DataTree) -> Iterator[Finding]:
    """Per optimizer: an iteration on parts of matrices, which is described and not recorded; one in a class whose step could not be watched."""
    for entry in run.attrs.get("optimizers", ()):
        label = str(entry.get("label"))
        groups = entry.get("watched", ())
        in_parts = {one["part"]: one["parts"] for found in groups for one in found.get("iterations", ()) if one["part"] in _IN_PARTS}
        for part, parts in in_parts.items():
            yield Finding(
                "unread_iteration", "info",
                f"{label} orthogonalises matrices {_IN_PARTS[part].format(parts)}; their spectra in this run are of the whole momentum.",
                f"Do not derive steps from them. {_TEACH}", numbers={"parts": parts},
            )  # fmt: skip
        failed = [found["failed"] for found in groups if found.get("failed") and found.get("holds_coefficients")]
        if failed:
            yield Finding(
                "unread_iteration", "warning",
                f"{label} holds Newton–Schulz coefficients, but a step of a copy of it could not be watched ({failed[0]}): what it orthogonalises is not known, "
                "and its spectra in this run are of momentum or gradient.",
                _TEACH, numbers={"groups": len(failed)},
            )  # fmt: skip


RULES = (unread_iterations,)
