"""What several ranks tell of each other: copies that have parted, gradients that were never averaged, matrices that are orthogonalised in pieces."""

from collections.abc import Iterator
from typing import Any

import xarray as xr

from ...diagnostics.finding import Finding


def copies_parted(run: xr.DataTree) -> Iterator[Finding]:
    """Copies of weights or optimizer state that differ between ranks, or gradients of copies."""
    told = list(run.attrs.get("parted", ()))
    of: dict[str, dict[str, dict[str, Any]]] = {}
    for entry in told:
        of.setdefault(entry["name"], {})[entry["what"]] = entry
    gone = {name: what for name, what in of.items() if what.keys() & {"weights", "state"}}
    if gone:
        first = min((min(entry["step"] for entry in what.values()), name) for name, what in gone.items())
        step, name = first
        ranks = _ranks(next(iter(gone[name].values()))["ranks"])
        never_averaged = all(what.get("gradient", {"step": step + 1})["step"] <= step for what in gone.values())
        why = (
            "Their gradients differ too: they are not averaged over the ranks."
            if never_averaged
            else "Their gradients are the same: something changed them on one rank alone."
        )
        advice = (
            "Train through DistributedDataParallel (not the module within it), or average the gradients before every step."
            if never_averaged
            else "Look for what is done on one rank alone (a load, a clip, a skipped step), and load one checkpoint on all ranks."
        )
        yield Finding(
            "copies_parted", "error",
            f"Copies have parted: {ranks} hold different {_things(gone[name])} of {name} from step {step} on, as of {len(gone)} "
            f"{'matrix' if len(gone) == 1 else 'matrices'}. {why}",
            advice, matrices=tuple(gone), numbers={"matrices": len(gone), "step": step},
        )  # fmt: skip
    own = {name: what["gradient"] for name, what in of.items() if what.keys() == {"gradient"}}
    if own:
        yield Finding(
            "own_gradients", "info",
            f"Before a step the gradients of {len(own)} {'matrix' if len(own) == 1 else 'matrices'} (the first: {next(iter(own))}) differ between ranks, and the "
            "weights after it do not: the optimizer averages them itself. What this run holds of these gradients is of one rank's batch.",
            "Read gradient quantities of this run as those of one rank.", matrices=tuple(own), numbers={"matrices": len(own)},
        )  # fmt: skip


def orthogonalised_by_shard(run: xr.DataTree) -> Iterator[Finding]:
    """Optimizers whose updates are those of an iteration on each rank's piece."""
    by_optimizer: dict[str, list[dict[str, Any]]] = {}
    for entry in run.attrs.get("by_shard", ()):
        by_optimizer.setdefault(entry["optimizer"], []).append(entry)
    for optimizer, entries in by_optimizer.items():
        first = entries[0]
        yield Finding(
            "orthogonalised_by_shard", "warning",
            f"{optimizer} orthogonalises the piece of a matrix that each rank holds by itself, not the matrix: the update of {first['name']} has a cosine of "
            f"{first['pieces']:.2f} with the orthogonalised pieces and of {first['whole']:.2f} with the orthogonalised matrix "
            f"({len(entries)} {'matrix' if len(entries) == 1 else 'matrices'} seen).",
            "If that is not meant, gather the momentum before the iteration, as torch.optim.Muon does with DTensors; the update then no longer depends on "
            "the number of ranks.",
            matrices=tuple(entry["name"] for entry in entries), numbers={"matrices": len(entries), "pieces": first["pieces"], "whole": first["whole"]},
        )  # fmt: skip


def _ranks(ranks: list[int]) -> str:
    return f"ranks {', '.join(map(str, ranks[:-1]))} and {ranks[-1]}"


def _things(what: dict[str, Any]) -> str:
    return " and ".join(name for name in ("weights", "state") if name in what)


RULES = (copies_parted, orthogonalised_by_shard)
