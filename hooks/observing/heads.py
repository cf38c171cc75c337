"""How many attention heads a parameter's rows belong to, as the model tells it."""

from collections.abc import Iterator, Mapping
from typing import Any

from torch import nn

from ...diagnostics.options import is_count
from ...diagnostics.quantities.adam_mini import UNKNOWN_HEADS, Heads
from ..guard import KeptOut

# Spellings in configurations (Transformers, nanoGPT, Llama's params.json) and on attention modules (torch, timm, x-transformers).
_QUERY = ("num_attention_heads", "num_heads", "n_heads", "n_head", "heads", "nhead")
_SHARED = ("num_key_value_heads", "num_kv_heads", "n_kv_heads", "n_kv_head", "n_head_kv", "kv_heads")

_ATTENTION = frozenset({"attn_q", "attn_k", "attn_v", "attn_o", "attn_qkv"})


def find_heads(model: nn.Module | None) -> dict[int, Heads]:
    """Heads by `id` of the parameter, as the module that holds it says, or the nearest around that one that does.

    A module says it by an attribute of its own or by its `config`; where only the query heads are told, all have as many.
    """
    if model is None:
        return {}
    found: dict[int, Heads] = {}
    told: dict[str, Heads] = {}
    for path, module in model.named_modules():  # from the outside in, so that what is around has been asked
        told[path] = _told_by(module) or (told[path.rpartition(".")[0]] if path else UNKNOWN_HEADS)
        found.update({id(p): told[path] for p in module.parameters(recurse=False)})
    return found


def heads_of(operator: str, heads: Heads) -> Heads:
    """The heads where the operator is one of attention, else none."""
    return heads if operator in _ATTENTION else UNKNOWN_HEADS


def _told_by(module: nn.Module) -> Heads | None:
    for place in (module, getattr(module, "config", None)):
        query = next(_counts(place, _QUERY), None)
        if query is not None:
            shared = next(_counts(place, _SHARED), query)
            return (query, shared) if query % shared == 0 else None
    return None


def _counts(place: Any, names: tuple[str, ...]) -> Iterator[int]:
    for name in names:
        value = None
        with KeptOut():  # a property of somebody's module
            value = place.get(name) if isinstance(place, Mapping) else getattr(place, name, None)
        if is_count(value):
            yield int(value)
