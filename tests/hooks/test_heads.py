"""Attention heads: told by the user, found on modules and configurations, and written into the run."""

from types import SimpleNamespace

import pytest
import torch
import xarray as xr
from torch import nn

from optiscope.examples.byte_llama import SHORT, ByteLlama
from optiscope.hooks import attach
from optiscope.hooks.observing.heads import find_heads
from optiscope.hooks.observing.matrices import coordinates
from optiscope.hooks.recording import layout


class Attention(nn.Module):
    def __init__(self, **attributes):
        super().__init__()
        self.q_proj, self.k_proj = nn.Linear(16, 16, bias=False), nn.Linear(16, 8, bias=False)
        self.__dict__.update(attributes)


class Around(nn.Module):
    def __init__(self, attention, **attributes):
        super().__init__()
        self.attn, self.mlp = attention, nn.Linear(16, 16)
        self.__dict__.update(attributes)


def of_queries(model):
    return find_heads(model)[id(next(p for n, p in model.named_parameters() if "q_proj" in n))]


@pytest.mark.parametrize(
    ("model", "heads"),
    [
        (Around(Attention(heads=4, kv_heads=2)), (4, 2)),
        (Around(Attention(num_heads=4)), (4, 4)),
        (Around(Attention(n_head=4, n_kv_heads=1)), (4, 1)),
        (Around(Attention(), config=SimpleNamespace(num_attention_heads=8, num_key_value_heads=4)), (8, 4)),
        (Around(Attention(), config={"n_heads": 8, "n_kv_heads": 2}), (8, 2)),
        (Around(Attention(), config=SimpleNamespace(n_head=8)), (8, 8)),
        # The nearest one that says it.
        (Around(Attention(num_heads=2), config=SimpleNamespace(num_attention_heads=8)), (2, 2)),
        (Around(Attention(config=SimpleNamespace(num_heads=2)), heads=8), (2, 2)),
        # What is no number of heads.
        (Around(Attention(heads=nn.ModuleList(), num_heads=True, n_head=0)), (0, 0)),
        (Around(Attention(heads=4, kv_heads=3)), (0, 0)),
    ],
)
def test_heads_are_found_on_the_nearest_module_that_tells_them(model, heads):
    assert of_queries(model) == heads


def test_a_property_that_fails_is_no_number():
    class Odd(Attention):
        @property
        def num_heads(self):
            raise RuntimeError

    assert of_queries(Around(Odd(), n_head=4)) == (4, 4)


def test_torch_and_transformers_spell_them_so():
    from transformers import LlamaConfig, LlamaForCausalLM

    found = find_heads(nn.MultiheadAttention(16, 4))
    assert set(found.values()) == {(4, 4)}
    config = LlamaConfig(
        hidden_size=32, num_attention_heads=4, num_key_value_heads=2, num_hidden_layers=1, intermediate_size=48, vocab_size=24
    )
    model = LlamaForCausalLM(config)
    assert find_heads(model)[id(model.model.layers[0].self_attn.k_proj.weight)] == (4, 2)


def recorded(model, tmp_path, **settings):
    with attach(torch.optim.SGD(model.parameters(), lr=0.1), model, tmp_path / "run.zarr", every=1, on_error="raise", **settings):
        pass
    with xr.open_datatree(tmp_path / "run.zarr", engine="zarr") as tree:
        update = tree["update"]
        return dict(
            zip(update["name"].values, zip(*(update[k].values.tolist() for k in ("query_heads", "kv_heads")), strict=True), strict=True)
        )


def test_the_run_tells_the_heads_of_projections_of_attention(tmp_path):
    heads = recorded(ByteLlama(SHORT), tmp_path)
    assert {h for n, h in heads.items() if "q_proj" in n or "o_proj" in n} == {(4, 2)}
    assert {h for n, h in heads.items() if "_proj" not in n} == {(0, 0)}


def test_what_the_user_gives_takes_precedence(tmp_path):
    assert recorded(Around(Attention(heads=8)), tmp_path, heads=(4, 2))["attn.q_proj.weight"] == (4, 2)
    assert recorded(Around(Attention(heads=8)), tmp_path / "one", heads=4)["attn.q_proj.weight"] == (4, 4)


@pytest.mark.parametrize("heads", [0, -4, True, (4, 0), (4, 3), (4, 2, 1), (4.0, 2.0)])
def test_bad_heads_are_refused(heads, tmp_path):
    with pytest.raises(ValueError, match=r"^heads: expected a positive number, or \(query heads, key/value heads\)"):
        recorded(Around(Attention()), tmp_path, heads=heads)


def test_heads_of_another_type_are_refused(tmp_path):
    with pytest.raises(TypeError, match=r"^heads: expected a positive number.*got 'four'"):
        recorded(Around(Attention()), tmp_path, heads="four")


def test_a_run_that_does_not_tell_heads_is_continued_and_grows(tmp_path, monkeypatch):
    """As versions before heads left it."""
    model = Around(Attention(heads=4))
    with monkeypatch.context() as before:
        before.setattr(layout, "coordinates", lambda matrices: {k: v for k, v in coordinates(matrices).items() if "heads" not in k})
        with attach(torch.optim.SGD(model.attn.parameters(), lr=0.1), model, tmp_path / "run.zarr", every=1, on_error="raise"):
            pass
    with attach(torch.optim.SGD(model.parameters(), lr=0.1), model, tmp_path / "run.zarr", every=1, on_error="raise"):
        pass
    with xr.open_datatree(tmp_path / "run.zarr", engine="zarr") as tree:
        assert tree["update"]["name"].values.tolist() == ["attn.q_proj.weight", "attn.k_proj.weight", "mlp.weight"]
        assert "query_heads" not in tree["update"].coords
