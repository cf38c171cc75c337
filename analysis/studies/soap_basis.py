"""Do the Kronecker factors suffice, and is their eigenbasis up to date? (SOAP, arXiv 2409.11321; Shampoo, arXiv 1802.09568)

With factors L = E[GGᵀ], R = E[GᵀG], Shampoo with exponent −1/2 is Adafactor in their eigenbasis: row sums of E[G'²] are the
eigenvalues of L, column sums those of R. SOAP keeps all of V' = E[G'²] there, and gains over Shampoo by what V' has beyond rank 1.
"""

import numpy as np
import seaborn as sns
import xarray as xr
from matplotlib.figure import Figure

from ..by_operator import median_and_extremes
from ..figures import FEW, axes, finish, operator_palette
from ..run import median_by, operators_of, recorded, records

QUESTION = "Do the Kronecker factors suffice, and is their eigenbasis up to date?"
READING = (
    "Information: zero in the eigenbasis says that the two factors alone would do (Shampoo); what stands above zero is what a second "
    "moment of its own in that basis adds (SOAP). Energy off the diagonal: how far the gradients have turned away from the basis that "
    "is kept; where it rises, the basis is refreshed too rarely. Condition number and effective rank: how unequal the directions are "
    "that the factors set right, on the side of the rows (solid) and of the columns (dashed)."
)

# Variable: quantity, title, axis, logarithmic.
PANELS = {
    "information": ("eigenbasis_information", "Information that the factors do not hold", "mutual information of V' (nat)", False),
    "off_diagonal": ("eigenbasis_off_diagonal", "Energy off the diagonal of the kept basis", "share of ‖QᵀLQ‖²", False),
    "condition": ("factor_condition", "Condition number of the factors", "λ_max/λ_min", True),
    "effective_rank": ("factor_effective_rank", "Effective rank of the factors", "tr(L)/λ_max", True),
}


def study(run: xr.DataTree) -> xr.Dataset:
    """Mutual information of the second moment in the eigenbasis, and what the Kronecker factors look like, per operator over training.

    Variables, medians over the operator's matrices: `information` (step, operator), and `plain_information`, the same in the weights'
    own basis where it is known (of the run's second moments there); `off_diagonal`, `condition`, `effective_rank` (step, operator,
    side), the side "left" being that of the rows; `exponent` (operator), p of LᵖGRᵖ, missing where the eigenbasis is used instead.

    Raises:
        ValueError: no optimizer in the run keeps Kronecker factors.
    """
    reason = "no optimizer in it keeps Kronecker factors (SOAP and Shampoo do), so there is no eigenbasis to study"
    quantities = [quantity for quantity, *_ in PANELS.values()]
    kept = recorded(run, "second_moment", "factor_condition", *quantities, "factor_exponent", otherwise=reason).drop_attrs()
    operators, label = operators_of(kept), kept["operator"].values
    plain = records(run, "second_moment")["rank1_information"].load()
    result = xr.Dataset(coords={"step": kept["step"].values, "operator": operators, "side": kept["side"].values})
    for name, (quantity, *_) in PANELS.items():
        if "side" in kept[quantity].dims:
            sides = [median_by(kept[quantity].sel(side=side), label, operators) for side in kept["side"].values]
            result[name] = (("step", "operator", "side"), np.stack(sides, axis=-1))
        else:
            result[name] = (("step", "operator"), median_by(kept[quantity], label, operators))
    result["plain_information"] = (("step", "operator"), median_by(plain, plain["operator"].values, operators))
    result["exponent"] = ("operator", median_by(kept["factor_exponent"].max("step").expand_dims("step"), label, operators)[0])
    return result


def plot(dataset: xr.Dataset) -> Figure:
    """A panel per quantity that the optimizer has: lines over training, dashed on the columns' side."""
    operators = [str(o) for o in dataset["operator"].values]
    palette = operator_palette(operators)
    present = [name for name in PANELS if np.isfinite(dataset[name]).any()]
    figure, panels = axes(len(present), width=4.8)
    marker = "o" if dataset.sizes["step"] <= FEW else None
    for ax, name in zip(panels, present, strict=True):
        _, title, label, log = PANELS[name]
        table = dataset[name].to_dataframe().reset_index()
        style = {"style": "side", "style_order": ["left", "right"]} if "side" in table else {}
        sns.lineplot(
            table, x="step", y=name, hue="operator", palette=palette, hue_order=operators, ax=ax, legend=ax is panels[-1], errorbar=None,
            estimator=None, marker=marker, **style,
        )  # fmt: skip
        if name == "information":
            for o in operators:
                ax.plot(dataset["step"].values, dataset["plain_information"].sel(operator=o).values, color=palette[o], linestyle=":")
            known = bool(np.isfinite(dataset["plain_information"]).any())
            title += "; dotted: in the weights' basis" if known else ""
        if not log:
            ax.set_ylim(bottom=0)
        finish(ax, title=title, x="optimizer step", y=label, log_y=log)
    return figure


def summary(dataset: xr.Dataset) -> str:
    """The result in a sentence."""
    condition, rank = (dataset[name].median("step").max("side").to_series().dropna() for name in ("condition", "effective_rank"))
    text = f"Kronecker factors have condition numbers up to {condition.max():.2g} ({condition.idxmax()}) and effective ranks up to {rank.max():.2g}"
    information = dataset["information"].median("step")
    if np.isfinite(information).any():
        text += f"; V' in their eigenbasis holds {median_and_extremes(information.to_series(), '.2g')} nat that they do not"
    plain = float((dataset["plain_information"] - dataset["information"]).median())
    if np.isfinite(plain):
        text += f", {abs(plain):.2g} {'less' if plain > 0 else 'more'} than v in the weights' own basis (median)"
    turned = dataset["off_diagonal"].median("step").max("side").to_series().dropna()
    if len(turned):
        text += f". Off the diagonal of the kept basis lies up to {turned.max():.1%} of the energy ({turned.idxmax()})"
    return f"{text}."
