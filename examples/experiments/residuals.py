"""What a recorded training left unorthogonalised, record by record: as its schedule predicts, as was achieved, and as equal steps would have left."""

from pathlib import Path
from typing import Any

import numpy as np

from optiscope.analysis import open_run
from optiscope.analysis.run import ns_schedules, operators_of, orthogonalised, residuals_of_records
from optiscope.diagnostics.newton_schulz.families import Coefficients


def residuals(store: Path, baseline: Coefficients, *, exact: bool = False) -> dict[str, Any]:
    """Mean Gram residual ε̃ over all matrices, and over each operator's, at every record of the run at `store`.

    Args:
        store: of a run.
        baseline: the coefficients that the same spectra are taken through for comparison.
        exact: exact polar factors were taken, whose residual is zero; what the run holds of its schedule was not in force.

    Returns:
        `step`; `predicted` in float64 from the recorded spectra under the coefficients in force; `achieved`, of the O read back from
        the applied update (bfloat16 arithmetic and all); `baseline`, of the same spectra under the baseline; `operators`, and
        `predicted_by` and `baseline_by` (step, operator).
    """
    geometry = orthogonalised(open_run(store))
    operators, label = operators_of(geometry), geometry["operator"].values
    # From the stored spectra like the baseline's, not from the recorded curves: what is the same schedule is then the same number.
    index, predicted = geometry["ns_schedule"].values, np.zeros(geometry["ns_schedule"].shape)
    if not exact:
        of_schedule = residuals_of_records(geometry, [schedule.coefficients for schedule in ns_schedules(geometry)])
        predicted = np.take_along_axis(of_schedule, np.maximum(index, 0)[None], axis=0)[0]
        predicted[index < 0] = np.nan
    uniform = residuals_of_records(geometry, [baseline])[0]

    def by_operator(values: np.ndarray) -> list[list[float]]:
        return np.stack([np.nanmean(values[:, label == o], axis=1) for o in operators], axis=1).tolist()

    return {
        "step": geometry["step"].values.tolist(),
        "predicted": np.nanmean(predicted, axis=1).tolist(),
        "achieved": np.nanmean(geometry["ns_residual_achieved"].values.astype(np.float64), axis=1).tolist(),
        "baseline": np.nanmean(uniform, axis=1).tolist(),
        "operators": operators,
        "predicted_by": by_operator(predicted),
        "baseline_by": by_operator(uniform),
    }
