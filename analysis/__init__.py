"""What a run means: opening it, the studies, the schedule, the findings.

A study is a module with `study(run) -> xarray.Dataset`, `plot(dataset) -> matplotlib Figure` and `summary(dataset) -> str`.
Names are imported when first used, so that opening a run does not wait for the plotting libraries.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from . import compare
    from .findings import Finding, check
    from .run import open_run
    from .scheduling import derive_schedule
    from .studies import (
        allocation_regret,
        block_geometry,
        efficiency_table,
        gradient_correction,
        gradient_spectrum,
        hdiag_quality,
        hessian_blocks,
        kappa_by_layer,
        kappa_by_operator,
        kappa_vs_residual,
        lr_statistic_ablation,
        ns_band,
        precision_split,
        precond_effect,
        residual_curves,
        rms_alignment,
        rotation,
        second_moment,
        shallow_vs_deep,
        sharpness,
        soap_basis,
        sophia_clip,
        spikes,
        stacking,
        trust_ratio,
        update_dispersion,
        v_blocks,
        v_rank1,
        weight_decay,
    )

# A study registers under its theme, in the order in which a report shows them.
THEMES: dict[str, tuple[str, ...]] = {
    "geometry": (
        "kappa_vs_residual", "kappa_by_operator", "kappa_by_layer", "shallow_vs_deep", "residual_curves", "precision_split", "allocation_regret", "ns_band",
        "gradient_spectrum", "block_geometry", "stacking",
    ),
    "update sizes": ("rms_alignment", "update_dispersion", "rotation", "gradient_correction", "weight_decay", "trust_ratio"),
    "second moment": ("second_moment", "v_rank1", "v_blocks", "lr_statistic_ablation", "soap_basis", "sophia_clip"),
    "curvature": ("sharpness", "hdiag_quality", "hessian_blocks", "precond_effect"),
    "comparison": ("efficiency_table", "spikes"),
}  # fmt: skip
STUDIES = tuple(name for names in THEMES.values() for name in names)

# No name here is also a module's: importing that module would bind it in place of the function.
_HOME = {"open_run": "run", "derive_schedule": "scheduling", "check": "findings", "Finding": "findings"}

__all__ = [
    "STUDIES", "THEMES", "Finding", "allocation_regret", "block_geometry", "check", "compare", "derive_schedule",
    "efficiency_table", "gradient_correction", "gradient_spectrum", "hdiag_quality", "hessian_blocks", "kappa_by_layer",
    "kappa_by_operator", "kappa_vs_residual", "lr_statistic_ablation", "ns_band", "open_run", "precision_split", "precond_effect",
    "residual_curves", "rms_alignment", "rotation", "second_moment", "shallow_vs_deep", "sharpness", "soap_basis", "sophia_clip",
    "spikes", "stacking", "trust_ratio", "update_dispersion", "v_blocks", "v_rank1", "weight_decay",
]  # fmt: skip


def __getattr__(name: str) -> Any:
    if name in _HOME:
        value = getattr(import_module(f".{_HOME[name]}", __name__), name)
    elif name in __all__:
        value = import_module(f".studies.{name}" if name in STUDIES else f".{name}", __name__)
    else:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    globals()[name] = value
    return value
