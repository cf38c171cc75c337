"""What the faults share: the run of the same training that nothing disturbed."""

from pathlib import Path

import pytest
import xarray as xr

from faults.training import disturbed, read, steps_in

STEPS = 12


@pytest.fixture(scope="session")
def reference(tmp_path_factory: pytest.TempPathFactory) -> xr.DataTree:
    """Twelve records of the training without a fault."""
    store: Path = tmp_path_factory.mktemp("reference") / "run.zarr"
    outcome = disturbed(lambda training: training.go(STEPS), store)
    assert (outcome.warnings, outcome.recorder.errors, outcome.recorder.dropped) == ([], 0, 0)
    run = read(store)
    assert steps_in(run) == list(range(1, STEPS + 1))
    return run
