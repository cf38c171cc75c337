"""Every recorded quantity: its group, dimensions, unit and definition. The one place that names them.

The writer creates arrays from this table, the reader and the studies use its names, and its texts become each array's
attributes in the store.
"""

from dataclasses import dataclass

from .spectra.spectrum_sketch import POINTS

SCHEMA = 2  # of the store; raised when a reader of the old one would misread a run
NS_STEPS = 10  # residuals are predicted after 0, 1, …, NS_STEPS steps
# Residual and alignment read back from weights are reported up to this rounding noise; it shifts ε̃ by at most about 2 %.
READABLE_NOISE = 0.01

# Levels of the quantiles over a matrix's elements: logarithmic into both tails, where ε and clipping act.
LEVELS = (0.0, 1e-4, 1e-3, 0.01, 0.05, 0.1, 0.25, 0.5, 0.75, 0.9, 0.95, 0.99, 0.999, 0.9999, 1.0)
SIDES = ("left", "right")  # of a matrix: its rows, its columns
BLOCK_STATISTICS = ("mean", "max", "min", "norm")  # of v in a block, from which the block's one learning rate could be made
MAP_SIDE = 16  # a map of a matrix has at most 16×16 tiles
PROBES = 64  # single probes that are kept; quantiles over elements are told from so many on
EXACT_BLOCKS = 8  # blocks of a matrix of which an exact Hessian is taken, at most

# Dimensions beyond (step, matrix): size, and the coordinate along them where there is one for all matrices.
EXTRA_DIMENSIONS = {
    "quantile": POINTS,
    "ns_step": NS_STEPS + 1,
    "level": len(LEVELS),
    "side": len(SIDES),
    "statistic": len(BLOCK_STATISTICS),
    "tile": MAP_SIDE * MAP_SIDE,
    "probe": PROBES,
    "block": EXACT_BLOCKS,
}
EXTRA_COORDINATES: dict[str, tuple[float, ...] | tuple[str, ...]] = {"level": LEVELS, "side": SIDES, "statistic": BLOCK_STATISTICS}


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
    Quantity(
        "recoverable_share", "geometry", "1", "share of singular values that bfloat16 carries",
        "share of σ/‖M‖_F ≥ 0.425·2⁻⁸·(1/√rows + 1/√cols), the rounding noise of a bfloat16 iteration's input",
    ),
    Quantity("ns_residual_achieved", "geometry", "1", "achieved NS residual (Gram)", f"{_GRAM}, of the O read back from the applied update; missing where update_noise > {READABLE_NOISE}"),
    Quantity("alignment", "geometry", "1", "alignment of update and NS input", f"⟨M, O⟩/‖M‖_*, O read back from the applied update; missing where update_noise > {READABLE_NOISE}"),
    Quantity(
        "row_dispersion", "geometry", "1", "dispersion of O's row norms",
        "standard deviation over mean of ‖O_i·‖², O the orthogonalised update before any normalisation: read back from the applied update, or where that "
        "does not tell it (more than a scale follows, or update_noise is too large) the optimizer's iteration run once more in float32; missing where O is not known",
    ),
    Quantity(
        "column_dispersion", "geometry", "1", "dispersion of O's column norms",
        "standard deviation over mean of ‖O_·j‖², O the orthogonalised update before any normalisation: read back from the applied update, or where that "
        "does not tell it (more than a scale follows, or update_noise is too large) the optimizer's iteration run once more in float32; missing where O is not known",
    ),
    Quantity(
        "rotation_drift", "geometry", "1", "drift of the rotation",
        "1 − Σ_i (R_tᵀR_{t−1})_ii²/r, R the r×r rotation of the shorter side that the optimizer keeps (ARO), the identity before its first step: "
        "0 where it stays, towards 1 where all axes turn; missing without one",
    ),
    Quantity(
        "rotation_gain", "geometry", "1", "gain of the rotation",
        "⟨M, R f(RᵀM)⟩/⟨M, f(M)⟩ with the optimizer's own f, f(M) scaled to the same Frobenius norm: above 1 where the rotated rule follows M better; missing without one",
    ),
    Quantity("update_rms", "update", "parameter units", "RMS of the applied update", "RMS(W_t − W_{t+1}), learning rate and weight decay included, weight_factor taken out", dtype="float64"),
    Quantity("update_norm", "update", "parameter units", "Frobenius norm of the applied update", "‖W_t − W_{t+1}‖_F, learning rate and weight decay included, weight_factor taken out", dtype="float64"),
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
        "trust_ratio", "update", "1", "trust ratio in force",
        "the factor by which the optimizer scales this matrix's step (LAMB: φ(‖W‖)/‖U + λW‖; LARS: coefficient·‖W‖/(‖G‖ + λ‖W‖)); missing for optimizers without one",
        dtype="float64",
    ),
    Quantity(
        "weight_factor", "update", "1", "least factor on weights after the update",
        "the least factor by which the optimizer's step multiplied rows or columns of the weights once the update was in them (QK-Clip, a norm that is kept; "
        "weight decay is none): updates and O are read from the weights before that; 1 where by none, missing where that is not known", dtype="float64",
    ),
    Quantity(
        "correction_variance_ratio", "update", "1", "variance of the corrected gradient over that of the gradient",
        "Var(C)/Var(G) over the matrix's elements, C the variance-reduced gradient that the optimizer averages (MARS), after its clipping; missing without one",
    ),
    Quantity("correction_cosine", "update", "1", "cosine of corrected and plain gradient", "⟨C, G⟩/(‖C‖_F‖G‖_F), C as in correction_variance_ratio; missing without one"),
    Quantity(
        "second_moment_mean", "second_moment", "gradient units²", "mean of the second moment",
        "mean of the second moment as the optimizer keeps it (decoded, in the form second_moment_form), no bias correction", dtype="float64",
    ),
    Quantity(
        "second_moment_form", "second_moment", "1", "form of the second moment",
        "index into the attribute forms of this group; −1: the optimizer keeps none, or it is not known where", dtype="int16",
    ),
    Quantity(
        "second_moment_quantile", "second_moment", "gradient units²", "quantiles of the second moment",
        "of v̂ over the numbers that the form has, at the levels `level`: v̂ = v/(1 − β₂ᵗ) where the optimizer corrects its bias, else v; factored v multiplied out, "
        "h of Sophia with its sign; right to the width of a bin, 2⁻⁴ of the value, extremes to 2⁻¹³, zeros exact; missing where the correction is not known, and of Kronecker factors",
        extra="level",
    ),
    Quantity("second_moment_eps", "second_moment", "gradient units", "ε of the optimizer", "the denominator of the update at v = 0, in units of √v̂: ε of √v̂ + ε and of max(√v̂, ε), √ε of √(v̂ + ε); missing where there is none, or it is within v", dtype="float64"),
    Quantity("eps_share", "second_moment", "1", "share of coordinates under ε", "share of √v̂ < second_moment_eps among the numbers that the form has, counted exactly; at equality Adam's step is half of what it would be. Small v of 8 or 4 bits decode as 0; missing for an estimate of the Hessian"),
    Quantity("near_eps_share", "second_moment", "1", "share of coordinates near ε", "share of √v̂ < 1000·second_moment_eps, where Adam's ε takes more than 0.1 % off the step"),
    Quantity(
        "snr_quantile", "second_moment", "1", "quantiles of the signal-to-noise ratio",
        "of |m̂|/√v̂ over the matrix's elements at the levels `level`, both bias-corrected where the optimizer corrects them, in the basis that v is kept in (SOAP, GaLore); "
        "right to the width of a bin, 2⁻⁴ of the value; missing where v is shared by coordinates, or the momentum is no average of gradients",
        extra="level",
    ),
    Quantity(
        "rank1_information", "second_moment", "nat", "mutual information of rows and columns of v",
        "of v/Σv read as a joint distribution: Σ v/Σv·ln(v/v̂₁), v̂₁ = row sums × column sums/Σv (Adafactor). 0: v is its rank-1 form; at most ln min(rows, cols). Missing where v is not of every coordinate in the parameter's basis: a factored one has rank 1 by construction",
    ),
    Quantity("rank1_log_error", "second_moment", "decade", "error of the rank-1 second moment", "RMS of log10(v/v̂₁) over elements with v > 0"),
    Quantity("rank1_log_error_max", "second_moment", "decade", "largest error of the rank-1 second moment", "max |log10(v/v̂₁)| over elements with v > 0"),
    Quantity(
        "block_partition", "second_moment", "1", "blocks of the Adam-mini partition",
        "index into the attribute partitions of this group: what the block_ quantities are blocks of; queries and keys are cut into rows where their heads are not known; −1 where v is not of every coordinate", dtype="int16",
    ),
    Quantity("block_dispersion", "second_moment", "nat", "dispersion of v within blocks", "τ = √(mean over blocks of Var(ln v)), elements with v > 0; 0: one learning rate for a block loses nothing"),
    Quantity("block_variance_ratio", "second_moment", "1", "variance of v between over within blocks", "Var over blocks of mean ln v, over the mean within-block variance of ln v; missing where there is one block"),
    Quantity("block_cv2", "second_moment", "1", "squared coefficient of variation of v within blocks", "mean over blocks of Var(v)/mean(v)²"),
    Quantity("block_step_ratio", "second_moment", "1", "step of single coordinates over step of their block", "mean over elements of √(mean_b v/v); e^{3τ²/8} for log-normal v"),
    Quantity(
        "block_cosine", "second_moment", "1", "cosine of Adam's update and one with a learning rate per block",
        "of m/√v and m/√s_b, s_b the block's `statistic` of v (mean: Adam-mini; norm: ‖v‖₂); e^{−τ²/8} for the mean, log-normal v and m∼N(0, v)", extra="statistic",
    ),
    Quantity(
        "decay_spread", "second_moment", "decade", "spread of the effective weight decay",
        "log10 of the 95 % over the 5 % quantile of the rate ηλ/(√v̂ + ε) at which coupled decay (Adam with L2) shrinks a coordinate; 0 for decoupled decay, missing without decay, "
        "and where decay is added to the update (LAMB); right to 0.03",
    ),
    Quantity("sophia_win_rate", "second_moment", "1", "Sophia's win rate", "share of coordinates whose update |m|/max(γh, ε), as the optimizer writes it, stays under the clip at 1; missing for optimizers without Hessian estimate and clip"),
    Quantity("sophia_nonpositive_share", "second_moment", "1", "share of coordinates with h ≤ 0", "of the Hessian-diagonal estimate h that the optimizer keeps; such coordinates take sign steps"),
    Quantity("factor_condition", "second_moment", "1", "condition number of a Kronecker factor", "λ_max/λ_min of the symmetric factor on that `side` (Shampoo's L and R), λ_min at least 1e-12·λ_max; missing where a matrix is cut into blocks with factors of their own", extra="side", dtype="float64"),
    Quantity("factor_effective_rank", "second_moment", "1", "effective rank of a Kronecker factor", "tr(L)/λ_max on that `side`", extra="side"),
    Quantity("factor_exponent", "second_moment", "1", "exponent of the Kronecker factors", "p of LᵖGRᵖ as the optimizer applies it: −1/4 (Shampoo), −1/2 (idealised); missing where the eigenbasis is used instead (SOAP), where terms of several exponents are added (CASPR), and where it is not known"),
    Quantity("eigenbasis_off_diagonal", "second_moment", "1", "energy off the diagonal in the kept eigenbasis", "1 − Σ_i (QᵀLQ)_ii²/‖QᵀLQ‖_F² on that `side`, Q the basis that the optimizer keeps: 0 where it is up to date; missing without one", extra="side"),
    Quantity("eigenbasis_information", "second_moment", "nat", "mutual information of v in the eigenbasis", "rank1_information of the second moment kept in the rotated basis (SOAP): 0 means that the Kronecker factors alone suffice (Shampoo)"),
    Quantity("second_moment_map", "second_moment_map", "decade", "map of the second moment", "mean of log10 v (no bias correction) over elements with v > 0 in tiles of the matrix, min(16, rows) × min(16, cols) of them, row by row, the rest missing; only where v is of every coordinate or factored", extra="tile"),
    Quantity("rank1_map", "second_moment_map", "decade", "map of the rank-1 second moment", "mean of log10 v̂₁ over the tiles of second_moment_map, rows and columns of zeros left out", extra="tile"),
    Quantity(
        "gradient_sigma_quantile", "gradient", "1", "normalised singular values of the gradient",
        "σ(G)/‖G‖_F in ascending order at the levels quantile_level, both extremes included", extra="quantile",
    ),
    Quantity("gradient_fro_norm", "gradient", "gradient units", "Frobenius norm of the gradient", "‖G_t‖_F as the optimizer sees it", dtype="float64"),
    Quantity("gradient_condition_number", "gradient", "1", "condition number of the gradient", "σ_1/σ_r; a lower bound where gradient_condition_is_floor", dtype="float64"),
    Quantity("gradient_condition_is_floor", "gradient", "1", "condition number of the gradient is a lower bound", "true where σ_r lies under the rounding noise of the gradient's storage format", dtype="bool"),
    Quantity("gradient_stable_rank", "gradient", "1", "stable rank of the gradient", "‖G‖_F²/σ_1²"),
    Quantity("gradient_cosine", "gradient", "1", "cosine of gradient and NS input", "⟨G, M⟩/(‖G‖_F‖M‖_F), M the matrix that the group geometry describes"),
    Quantity(
        "block_sigma_quantile", "blocks", "1", "normalised singular values of a block",
        "of the block's rows (columns, where the matrix is kept as inputs × outputs) of the matrix that the group geometry describes, in ascending order at the levels quantile_level", extra="quantile",
    ),
    Quantity("block_fro_norm", "blocks", "gradient units", "Frobenius norm of a block", "of the block's rows of the matrix that the group geometry describes", dtype="float64"),
    Quantity("block_condition_number", "blocks", "1", "condition number of a block", "σ_1/σ_r of the block; a lower bound where block_condition_is_floor", dtype="float64"),
    Quantity("block_condition_is_floor", "blocks", "1", "condition number of a block is a lower bound", "true where σ_r lies under the rounding noise of the storage format", dtype="bool"),
    Quantity("block_stable_rank", "blocks", "1", "stable rank of a block", "‖B‖_F²/σ_1² of the block B"),
    Quantity("block_update_rms_per_lr", "blocks", "1", "RMS of a block's update per learning rate", "as update_rms_per_lr, over the block", dtype="float64"),
    Quantity(
        "subspace_overlap", "stacking", "1", "overlap of leading singular subspaces",
        "‖U_1ᵀU_2‖_F²/q, U_k the q leading singular vectors on that `side` of the pair's matrices, q the larger of their stable ranks rounded up", extra="side",
    ),
    Quantity("subspace_overlap_null", "stacking", "1", "overlap of random subspaces", "q/n, what subspace_overlap is on average for random subspaces, n the vectors' length", extra="side"),
    Quantity("gram_distance", "stacking", "1", "distance of Gram matrices", "‖A_1 − A_2‖_F/2, A_k = G_kG_kᵀ/tr on the left `side`, G_kᵀG_k/tr on the right: 0 where stacking equals the layers' own orthogonalisation", extra="side"),
    Quantity("stack_condition_number", "stacking", "1", "condition number of the stacked pair", "κ of [M_1 M_2] (left `side`, shared left vectors: TEON's mode 1) and of M_1 over M_2 (right), over all their singular values: more than a part has "
        "where the shorter sides are put together, and some of them small where the parts agree", extra="side", dtype="float64"),
    Quantity("stack_condition_gain", "stacking", "decade", "conditioning gained by stacking", "log10 of the larger κ of the pair's matrices over κ of the stack", extra="side"),
    Quantity(
        "ns_residual_bfloat16", "precision", "1", "NS residual of the bfloat16 iteration (Gram)",
        f"{_GRAM}, after ns_step steps of the optimizer's own coefficients run in bfloat16: products summed in float32, aX + BX rounded once, as in torch.optim.Muon", extra="ns_step",
    ),
    Quantity(
        "ns_residual_polar_bfloat16", "precision", "1", "NS residual of the bfloat16 iteration (polar)",
        "‖O − UVᵀ‖_F/√r of that iteration's output against the exact polar factor of the NS input", extra="ns_step",
    ),
    Quantity(
        "hessian_mean", "curvature", "gradient units/parameter unit", "mean of the Hessian's diagonal",
        "mean over the matrix's elements of Hutchinson's u⊙Hu, H the Hessian of the loss that curvature was called with", dtype="float64",
    ),
    Quantity(
        "hessian_mean_error", "curvature", "gradient units/parameter unit", "standard error of the Hessian's mean diagonal",
        "from the spread between probes; under 8 probes no less than the bound that one probe gives", dtype="float64",
    ),
    Quantity("hessian_trace", "curvature", "gradient units/parameter unit", "trace of the Hessian's block of the matrix", "hessian_mean times the number of elements", dtype="float64"),
    Quantity("hessian_trace_error", "curvature", "gradient units/parameter unit", "standard error of the trace", "hessian_mean_error times the number of elements", dtype="float64"),
    Quantity("hessian_rms", "curvature", "gradient units/parameter unit", "RMS of the Hessian's diagonal", "over the matrix's elements, the probes' noise taken out; missing under 2 probes", dtype="float64"),
    Quantity("hessian_element_deviation", "curvature", "gradient units/parameter unit", "standard deviation of one probe at an element", "√(mean over elements of the variance between probes); missing under 2 probes", dtype="float64"),
    Quantity("hessian_quantile", "curvature", "gradient units/parameter unit", "quantiles of the Hessian's diagonal", f"over the matrix's elements at the levels `level`, of the mean of all probes; missing under {PROBES} probes, where noise widens them", extra="level"),
    Quantity("hessian_negative_share", "curvature", "1", "share of negative elements of the Hessian's diagonal", f"of the mean of all probes; missing under {PROBES} probes"),
    Quantity("hessian_probe_mean", "curvature", "gradient units/parameter unit", "mean of the Hessian's diagonal by single probes", f"hessian_mean of every probe alone, the first {PROBES} of them", extra="probe"),
    Quantity("hessian_probes", "curvature", "1", "probes of the Hessian", "number of vectors u", dtype="int16"),
    Quantity("hessian_method", "curvature", "1", "how Hessian-vector products were made", "index into the attribute methods of this group", dtype="int16"),
    Quantity("hessian_distribution", "curvature", "1", "distribution of the probes", "index into the attribute distributions of this group", dtype="int16"),
    Quantity(
        "gauss_newton_mean", "curvature", "gradient units/parameter unit", "mean of the Gauss–Newton diagonal",
        "mean over the matrix's elements of B·ĝ⊙ĝ, ĝ the gradient of the mean cross-entropy of B labels drawn from the model (Gauss–Newton–Bartlett)", dtype="float64",
    ),
    Quantity("gauss_newton_mean_error", "curvature", "gradient units/parameter unit", "standard error of the mean Gauss–Newton diagonal", "as hessian_mean_error, between draws of the labels", dtype="float64"),
    Quantity("gauss_newton_quantile", "curvature", "gradient units/parameter unit", "quantiles of the Gauss–Newton diagonal", f"over the matrix's elements at the levels `level`, of the mean of all draws; missing under {PROBES} draws", extra="level"),
    Quantity("gauss_newton_draw_mean", "curvature", "gradient units/parameter unit", "mean of the Gauss–Newton diagonal by single draws", f"gauss_newton_mean of every draw alone, the first {PROBES} of them", extra="probe"),
    Quantity("gauss_newton_draws", "curvature", "1", "draws of all labels", "number of gradients ĝ", dtype="int16"),
    Quantity("gauss_newton_labels", "curvature", "1", "labels of one draw", "B, the number of independent labels: tokens, not sequences", dtype="float64"),
    Quantity(
        "hessian_in_block_share", "curvature", "1", "share of the Hessian inside Adam-mini's blocks",
        "Σ_b ‖H_bb‖_F²/Σ_b ‖H_jb‖_F² over sampled blocks b of the matrix j, from probes that are zero outside b",
    ),
    Quantity("hessian_in_block_error", "curvature", "1", "standard error of the share inside blocks", "of the ratio of sums over the sampled blocks; missing under 2 of them"),
    Quantity("hessian_in_block_null", "curvature", "1", "share inside blocks if all entries were alike", "Σ_b d_b²/d², d_b the elements of block b, d those of the matrix"),
    Quantity("hessian_partition", "curvature", "1", "blocks that the share is inside of", "index into the attribute partitions of this group", dtype="int16"),
    Quantity(
        "preconditioning_ratio", "curvature", "1", "condition number under Adam over that of the Hessian",
        "r = κ(D·H_b)/κ(H_b), H_b the exact Hessian of a row of the matrix, D = diag(1/|H_b x|), median over Gaussian x: above 1 where Adam hurts; missing where either κ exceeds what the weights' format carries",
        extra="block",
    ),
    Quantity("preconditioning_dominance", "curvature", "1", "diagonal dominance of the Hessian", "τ = Σ_i |H_ii|/Σ_ij |H_ij| of H_b; 1: diagonal", extra="block"),
    Quantity("preconditioning_condition", "curvature", "1", "condition number of the Hessian of a block", "κ(H_b) = max|λ|/min|λ|; missing as in preconditioning_ratio", extra="block"),
    Quantity("preconditioning_size", "curvature", "1", "coordinates of a block with an exact Hessian", "d, the row's length", dtype="float64"),
    Quantity("hessian_map", "curvature", "decade", "map of the exact Hessian", "log10 of the mean |H_ij| over tiles of the exact Hessian of consecutive rows, 16×16 of them at most, row by row, the rest missing", extra="tile"),
    Quantity("exact_mean", "curvature", "gradient units/parameter unit", "exact mean of the Hessian's diagonal on sampled rows", "over the coordinates of which an exact Hessian was taken", dtype="float64"),
    Quantity("exact_hutchinson_mean", "curvature", "gradient units/parameter unit", "Hutchinson's mean on the rows with an exact Hessian", "as hessian_mean, over the coordinates of exact_mean", dtype="float64"),
    Quantity("exact_hutchinson_error", "curvature", "gradient units/parameter unit", "standard error of exact_hutchinson_mean", "as hessian_mean_error", dtype="float64"),
    Quantity("exact_gauss_newton_mean", "curvature", "gradient units/parameter unit", "Gauss–Newton mean on the rows with an exact Hessian", "as gauss_newton_mean, over the coordinates of exact_mean", dtype="float64"),
    Quantity("exact_gauss_newton_error", "curvature", "gradient units/parameter unit", "standard error of exact_gauss_newton_mean", "as gauss_newton_mean_error", dtype="float64"),
)  # fmt: skip

# Distributions, which are recorded with 12 bits of mantissa (see :mod:`.spectra.spectrum_sketch`).
ROUNDED = frozenset(q.name for q in QUANTITIES if q.extra in ("quantile", "level", "tile") and q.dtype == "float32")

DEFAULT_GROUPS = ("geometry", "update", "second_moment")
# Recorded when asked for: each costs about as much as the geometry, the map in storage.
ON_REQUEST = ("second_moment_map", "gradient", "blocks", "stacking", "precision")
MEASURES = DEFAULT_GROUPS + ON_REQUEST  # what `attach(measure=…)` takes
GROUPS = (*MEASURES, "curvature")  # curvature is there once `recorder.curvature` was called

# How a Hessian-vector product is made, and what the probes are drawn from.
HESSIAN_METHODS = ("double_backward", "central_difference")
DISTRIBUTIONS = ("rademacher", "gaussian")
PROBE_SEED = 0x0C  # the probes of step t come from a generator of their own, seeded with this plus t

# Blocks of coordinates that Adam-mini gives one learning rate (arXiv 2406.16793).
PARTITIONS = (
    "head",  # a head's rows: query and key projections
    "row",  # an output neuron: value and output projections, MLPs
    "token",  # a row of an embedding or of the head
    "whole",  # the whole matrix
)

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
