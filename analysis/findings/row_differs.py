"""Classes in the adapter table of which a watched step did something else than their row says."""

from collections.abc import Iterator

import xarray as xr

from ...diagnostics.finding import Finding


def row_differs(run: xr.DataTree) -> Iterator[Finding]:
    """Per optimizer: steps, coefficients or input of the iteration are not those that its spectra and residuals were recorded by."""
    for entry in run.attrs.get("optimizers", ()):
        for differs in (found.get("differs_from_row") for found in entry.get("watched", ())):
            if differs:
                yield Finding(
                    "row_differs", "warning",
                    f"{entry.get('label')} is in the adapter table, but a watched step differs from its row: {'; '.join(differs)}. Spectra and residuals in this run "
                    "are as the row reads them.",
                    "Compare the class with the published one, or say how it is read with register_adapter (docs/adapters.md).",
                    numbers={"differences": len(differs)},
                )  # fmt: skip


RULES = (row_differs,)
