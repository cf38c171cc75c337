"""Every recorded quantity: its group, dimensions, unit and definition. The one place that names them.

The writer creates arrays from this table, the reader and the studies use its names, and its texts become each array's
attributes in the store.
"""

from dataclasses import dataclass

from .spectrum_sketch import POINTS
from .update_size import READABLE_NOISE

SCHEMA = 1  # of the store; raised when a reader of the old one would misread a run
NS_STEPS = 10  # residuals are predicted after 0, 1, …, NS_STEPS steps

# Sizes of the dimensions beyond (step, matrix).
EXTRA_DIMENSIONS = {"quantile": POINTS, "ns_step": NS_STEPS + 1}


@dataclass(frozen=True)
class Quantity:
    """One array of the store, of shape (step, matrix) or (step, matrix, `extra`)."""

    name: str
    group: str
    units: str
    long_name: str
    definition: str
    extra: str | None = None
    dtype: str = "float32"

    @property
    def missing(self) -> float | bool:
        """What stands where nothing was recorded."""
        return {"bool": False, "int16": -1}.get(self.dtype, float("nan"))


_GRAM = "‖I − OOᵀ‖_F/√r on the short side, r = min(rows, cols)"
_OWN = "the optimizer's own coefficients (attribute ns_schedules of this group, chosen by the variable ns_schedule; started from diag(d)·M where its scaling is aol)"

QUANTITIES: tuple[Quantity, ...] = (
    Quantity(
        "sigma_quantile", "geometry", "1", "normalised singular values of the NS input",
        "x = σ/‖M‖_F in ascending order at the levels quantile_level, both extremes included", extra="quantile",
    ),
    Quantity("fro_norm", "geometry", "gradient units", "Frobenius norm of the NS input", "‖M‖_F", dtype="float64"),
    Quantity(
        "condition_number", "geometry", "1", "condition number of the NS input",
        "κ = σ_1/σ_r; a lower bound where condition_is_floor", dtype="float64",
    ),
    Quantity(
        "condition_is_floor", "geometry", "1", "condition number is a lower bound",
        "true where σ_r lies under the rounding noise of the NS input's storage format", dtype="bool",
    ),
    Quantity("stable_rank", "geometry", "1", "stable rank of the NS input", "‖M‖_F²/σ_1²"),
    Quantity("below_floor", "geometry", "1", "singular values under the rounding noise", "count of σ/‖M‖_F < 0.425·u·(1/√rows + 1/√cols), u the unit roundoff"),
    Quantity("ns_schedule", "geometry", "1", "NS schedule in force", "index into the attribute ns_schedules of this group; −1: the optimizer does not orthogonalise", dtype="int16"),
    Quantity("ns_residual", "geometry", "1", "predicted NS residual (Gram)", f"{_GRAM}, after ns_step steps of {_OWN}, from the full spectrum in float64", extra="ns_step"),
    Quantity("ns_residual_polar", "geometry", "1", "predicted NS residual (polar)", f"‖O − UVᵀ‖_F/√r after ns_step steps of {_OWN}, from the full spectrum in float64", extra="ns_step"),
    Quantity("ns_residual_achieved", "geometry", "1", "achieved NS residual (Gram)", f"{_GRAM}, of the O read back from the applied update; missing where update_noise > {READABLE_NOISE}"),
    Quantity("alignment", "geometry", "1", "alignment of update and NS input", f"⟨M, O⟩/‖M‖_*, O read back from the applied update; missing where update_noise > {READABLE_NOISE}"),
    Quantity("update_rms", "update", "parameter units", "RMS of the applied update", "RMS(W_t − W_{t+1}), learning rate and weight decay included", dtype="float64"),
    Quantity("update_norm", "update", "parameter units", "Frobenius norm of the applied update", "‖W_t − W_{t+1}‖_F, learning rate and weight decay included", dtype="float64"),
    Quantity("update_rms_per_lr", "update", "1", "RMS of the update per learning rate", "RMS(W_t(1 − ηλ) − W_{t+1})/η, decoupled decay taken out; coupled decay cannot be", dtype="float64"),
    Quantity(
        "update_rms_target", "update", "1", "target of the update RMS per learning rate",
        "what update_rms_per_lr would be if O were the exact polar factor, under the optimizer's own scaling; missing without orthogonalisation",
        dtype="float64",
    ),
    Quantity(
        "update_rms_intended", "update", "1", "RMS of the intended update per learning rate",
        "what update_rms_per_lr would be if weights were not rounded, from the optimizer's own state; missing with weights of float32 and wider, "
        "where update_rms_per_lr tells it, and where the optimizer's formula is not known", dtype="float64",
    ),
    Quantity("update_noise", "update", "1", "rounding noise of the update as read back", "0.425·u·‖W_t‖_F/‖W_t − W_{t+1}‖_F, u the unit roundoff of the weights"),
    Quantity("weight_rms", "update", "parameter units", "RMS of the weights", "RMS(W_t), before the step", dtype="float64"),
    Quantity("grad_rms", "update", "gradient units", "RMS of the gradient", "RMS(G_t) as the optimizer sees it: after accumulation and clipping", dtype="float64"),
    Quantity("momentum_rms", "update", "gradient units", "RMS of the momentum buffer", "RMS of the optimizer's first-moment state after the step, no bias correction", dtype="float64"),
    Quantity("update_to_weight", "update", "1", "update-to-weight ratio", "‖W_t − W_{t+1}‖_F/‖W_t‖_F", dtype="float64"),
    Quantity("lr", "update", "1", "learning rate", "η that scales the update, before any per-shape adjustment; for optimizers that find their own (Adafactor, Prodigy) the one found", dtype="float64"),
    Quantity("weight_decay", "update", "1", "weight decay", "of the parameter group", dtype="float64"),
    Quantity(
        "changed_outside", "update", "1", "weights changed between the optimizer's steps",
        "1 where the norms of the weights before this step differ from those the step before left (a clip, a swap with an average, a load), else 0; "
        "−1 where that was not seen", dtype="int16",
    ),
    Quantity(
        "second_moment_mean", "second_moment", "gradient units²", "mean of the second moment",
        "mean of the second moment as the optimizer keeps it (decoded, in the form second_moment_form), no bias correction", dtype="float64",
    ),
    Quantity(
        "second_moment_form", "second_moment", "1", "form of the second moment",
        "index into the attribute forms of this group; −1: the optimizer keeps none, or it is not known where", dtype="int16",
    ),
)  # fmt: skip

GROUPS = ("geometry", "update", "second_moment")

# What an optimizer keeps as its second moment v.
SECOND_MOMENT_FORMS = (
    "full",  # of every coordinate
    "row_col",  # factors over rows and columns (Adafactor), multiplied out
    "row",  # one number per row
    "block",  # one number per block of coordinates (Adam-mini)
    "scalar",  # one number
    "quantised",  # 8 or 4 bits, decoded
    "rotated",  # of every coordinate in a rotated basis (SOAP)
    "projected",  # in a low-rank projection (GaLore)
    "of_orthogonalised",  # of the orthogonalised update (AdaMuon, NorMuon)
    "hessian",  # an estimate of the Hessian's diagonal (Sophia)
    "frozen",  # fixed since the warm-up (1-bit Adam)
    "preconditioner",  # Kronecker factors (Shampoo)
)


def in_group(group: str) -> tuple[Quantity, ...]:
    """The quantities of one group, in the table's order."""
    return tuple(quantity for quantity in QUANTITIES if quantity.group == group)
