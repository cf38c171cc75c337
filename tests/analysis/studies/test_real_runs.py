"""Every study, the findings, the page and the description on runs that the recorder itself wrote, complete, sparse and empty."""

import re

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from optiscope import analysis
from optiscope.analysis.describe import describe
from optiscope.analysis.report.page import write_report
from optiscope.diagnostics.catalogue import DEFAULT_GROUPS, MEASURES
from optiscope.hooks import attach


class Attention(nn.Module):
    def __init__(self, width):
        super().__init__()
        self.num_heads = 2
        for name in ("q_proj", "k_proj", "v_proj", "o_proj"):
            setattr(self, name, nn.Linear(width, width, bias=False))

    def forward(self, x):
        q, k, v = (getattr(self, name)(x).unflatten(-1, (self.num_heads, -1)).transpose(1, 2) for name in ("q_proj", "k_proj", "v_proj"))
        mixed = torch.softmax(q @ k.mT / q.shape[-1] ** 0.5, -1) @ v  # written out, as it is differentiated twice
        return self.o_proj(mixed.transpose(1, 2).flatten(-2))


class Block(nn.Module):
    def __init__(self, width):
        super().__init__()
        self.attn, self.norm = Attention(width), nn.LayerNorm(width)
        self.up_proj, self.down_proj = nn.Linear(width, 2 * width, bias=False), nn.Linear(2 * width, width, bias=False)

    def forward(self, x):
        x = x + self.attn(self.norm(x))
        return x + self.down_proj(torch.tanh(self.up_proj(self.norm(x))))


class Transformer(nn.Module):
    def __init__(self, layers=3, width=8, tokens=12):
        super().__init__()
        self.embed = nn.Embedding(tokens, width)
        self.layers = nn.ModuleList(Block(width) for _ in range(layers))
        self.lm_head = nn.Linear(width, tokens, bias=False)

    def forward(self, x):
        x = self.embed(x)
        for layer in self.layers:
            x = layer(x)
        return self.lm_head(x)


def train(store, model, optimizers, steps, measure, data, loss_of, curvature=False):
    """`steps` recorded steps, a loss of each, and curvature at the last."""
    with attach(optimizers, model, store, every=1, measure=measure, on_error="raise") as recorder:
        for step in range(steps):
            for optimizer in optimizers:
                optimizer.zero_grad()
            loss = loss_of(data)
            loss.backward()
            for optimizer in optimizers:
                optimizer.step()
            recorder.log(loss=loss)
            if curvature and step == steps - 1:
                # What is dear, of three matrices alone; of what both calls measure the later one's values stay.
                recorder.curvature(lambda: loss_of(data), block_probes=1, exact=16, only=r"q_proj")
                recorder.curvature(lambda: loss_of(data), logits_fn=lambda: model(data), probes=4, draws=2)
    return analysis.open_run(store)


def transformer(store, steps, measure, curvature=False):
    torch.manual_seed(0)
    model = Transformer()
    hidden = [p for p in model.layers.parameters() if p.ndim == 2]
    rest = [p for name, p in model.named_parameters() if p.ndim != 2 or not name.startswith("layers")]
    optimizers = [torch.optim.Muon(hidden, lr=0.02, weight_decay=0.1), torch.optim.AdamW(rest, lr=1e-2, weight_decay=0.1)]
    data = torch.randint(12, (8, 9))
    return train(
        store, model, optimizers, steps, measure, data, lambda x: F.cross_entropy(model(x)[:, :-1].transpose(1, 2), x[:, 1:]), curvature
    )


def everything(store):
    return transformer(store, 4, MEASURES, curvature=True)


def one_record(store):
    return transformer(store, 1, DEFAULT_GROUPS)


def scalars_only(store):
    """A training that ended before its first recorded step: it has logged, and every other group is empty."""
    torch.manual_seed(0)
    model = nn.Linear(4, 4)
    with attach(torch.optim.Muon([model.weight]), model, store, every=1, on_error="raise") as recorder:
        recorder.log(loss=torch.tensor(1.5))
    return analysis.open_run(store)


def one_matrix(store):
    torch.manual_seed(0)
    model = nn.Linear(6, 5)
    data = torch.randn(16, 6)
    return train(store, model, [torch.optim.SGD(model.parameters(), lr=0.1)], 8, DEFAULT_GROUPS, data, lambda x: model(x).square().mean())


# Studies of what Muon and AdamW have not: ARO's rotation, MARS' correction, SOAP's factors, Sophia's clipping.
OTHER_OPTIMIZERS = {"rotation", "gradient_correction", "soap_basis", "sophia_clip"}
ALWAYS_ON_MATRICES = {"kappa_by_operator", "rms_alignment"}
# Studies that must give an answer; the others may refuse with a reason.
RUNS = {
    "everything": (everything, set(analysis.STUDIES) - OTHER_OPTIMIZERS),
    "one record": (
        one_record,
        {*ALWAYS_ON_MATRICES, "kappa_vs_residual", "kappa_by_layer", "shallow_vs_deep", "residual_curves", "ns_band"},
    ),
    "scalars only": (scalars_only, set()),
    "one matrix": (one_matrix, {*ALWAYS_ON_MATRICES, "efficiency_table"}),
}
# A refusal says how to record what it needs, which optimizer has it, or what the names of matrices must tell.
REASON = re.compile(r"^run: .*(measure=\(|recorder\.curvature|no optimizer|matrices' names|matrix's name|layer index)", re.S)


@pytest.fixture(scope="module", params=RUNS)
def case(request, tmp_path_factory):
    record, answering = RUNS[request.param]
    return request.param, record(tmp_path_factory.mktemp("real") / "run.zarr"), answering


@pytest.mark.parametrize("name", analysis.STUDIES)
def test_a_study_gives_a_sentence_and_a_figure_or_says_what_it_needs(case, name):
    _, run, answering = case
    study = getattr(analysis, name)
    refusal = None
    try:
        dataset = study.study(run)
    except ValueError as error:
        refusal = str(error)
    if refusal is not None:
        assert name not in answering, refusal
        assert REASON.match(refusal), refusal
        return
    study.plot(dataset).draw_without_rendering()
    text = study.summary(dataset)
    assert text.endswith(".")
    assert "\n" not in text
    assert not re.search(r"\b(nan|inf)\b", text, re.I), text


def test_findings_page_and_description(case, tmp_path):
    kind, run, _ = case
    described = describe(run)
    if kind == "scalars only":
        assert described["operators"] == []
        assert described["last_scalars"] == {"loss": 1.5}
        for ask in (analysis.check, lambda run: write_report({"run.zarr": run}, tmp_path / "report.html")):
            with pytest.raises(ValueError, match=r"^run: no records yet; record at least one step$"):
                ask(run)
        return
    assert {d["operator"] for d in described["operators"]} >= ({"other"} if kind == "one matrix" else {"attn_q", "mlp_up", "embed", "head"})
    assert all(finding.sentence for finding in analysis.check(run))
    page = write_report({"run.zarr": run}, tmp_path / "report.html")
    assert (tmp_path / "report.html").stat().st_size == page["size"]


def test_vectors_alone_are_refused_with_a_sentence(tmp_path):
    model = nn.LayerNorm(4)
    with pytest.raises(
        ValueError,
        match=r"^optimizers: AdamW hold no weight matrix \(a dense floating-point parameter with two or more dimensions\) to record",
    ):
        attach(torch.optim.AdamW(model.parameters()), model, tmp_path / "run.zarr")
    assert not (tmp_path / "run.zarr").exists()
