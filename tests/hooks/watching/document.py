"""The part of the coverage document that is of watched optimizers: one row for every stand-in of the table of `cases`."""

from collections import Counter
from collections.abc import Mapping
from inspect import getdoc
from math import inf

from contract.document import HEADING

from watching.cases import STAND_INS, StandIn
from watching.measuring import STEPS, Measured

_HEAD = f"""{HEADING}

Each is a stand-in with the state layout and the arithmetic of a published file, under a class that the table does not hold. It was trained for
{STEPS} recorded steps, with and without a recorder, the same to the bit; what was found is compared with what the stand-in noted itself.

- **steps**: of the iteration, as found; **coefficients**: *exact*, or their largest relative error.
- **NS input**: what the iteration is given, in terms of gradient and state, and of how many matrices that was found; *exact*: bitwise what the
  iteration was given, on every step. *By a formula*: three watched steps settled it, and no copy of a step is made any more; *watched*: every
  recorded step is.
- **then**: what follows the iteration on its way to the weights, and the weight decay that was seen; where more than a factor follows, decay is not told apart.
  *Then the weights*: multiplied once the update was in them (a clip, a norm that is kept), and the update recorded without that.
- **unexplained**: the most that a polynomial step leaves of an iterate, relative (its rounding to bfloat16); **copy**: the relative difference of the
  watched copy's step from the optimizer's own.

| system | class | read by | steps | coefficients | NS input | then | unexplained | copy | note |
|---|---|---|---|---|---|---|---|---|---|
"""
_LADDER = (0.003, 0.01, 0.03, 0.1)  # what was measured is a matter of rounding: the next of these is not


def written_out(results: Mapping[str, Measured]) -> str:
    """The whole part."""
    return _HEAD + "".join(f"| {' | '.join(_row(name, STAND_INS[name], result))} |\n" for name, result in results.items())


def _row(name: str, standin: StandIn, result: Measured) -> list[str]:
    ways = dict.fromkeys(way for way in result.entry["read_by"] if way.startswith("watching")) or dict.fromkeys(result.entry["read_by"])
    inputs: Counter[str] = sum((Counter(one["inputs"]) for one in result.watched), Counter())
    exact = "exact" if all(result.inputs_right) else "**not equal**"
    by_rule = "by a formula" if all(one["by_rule"] for one in result.watched) else "watched"
    follows = dict.fromkeys(
        _THEN[kind["then"]] + (_DECAY[kind["decay"]] if kind["then"] != "elements" else "") for kind in result.iterations
    )
    multiplied = sum(one.get("weights_multiplied", {}).get("matrices", 0) for one in result.watched)
    moved = sum(kind["count"] for kind in result.iterations)
    return [
        name,
        f"`{type(result.optimizer).__name__}`",
        "; ".join(ways),
        ", ".join(sorted({str(len(kind["coefficients"])) for kind in result.iterations})),
        _bounded(result.coefficients_error(standin.triples), "exact"),
        "; ".join(f"{text}: {count}" for text, count in inputs.most_common()) + f"; {exact}, {by_rule}",
        "; ".join([*follows, *([f"then the weights of {multiplied} of {moved} matrices, by factors"] if multiplied else [])]),
        _bounded(max(one["unexplained"] for one in result.watched), "0"),
        _bounded(max(inf if one["difference"] is None else one["difference"] for one in result.watched), "the same"),
        (getdoc(type(result.optimizer)) or "").partition("\n")[0],
    ]


_THEN = {"scale": "a factor", "rows": "a factor for every row", "columns": "a factor for every column", "elements": "more than a factor"}
_DECAY = {"decoupled": ", decoupled decay", "cautious": ", cautious decay", "none seen": ""}


def _bounded(value: float, none: str) -> str:
    return none if value == 0 else next((f"within {bound:.1%}".replace(".0%", "%") for bound in _LADDER if value <= bound), "**off**")
