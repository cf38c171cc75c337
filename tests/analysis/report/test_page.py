"""What stands on a page, and that it stands there for readers, parsers and machines alike."""

import base64
import hashlib
import io
import re
from itertools import pairwise
from urllib.parse import unquote

import numpy as np
import pandas as pd
import pytest

from optiscope.analysis import STUDIES, THEMES, check, compare
from optiscope.analysis.report.answer import ask
from optiscope.analysis.report.page import HERE, write_report


@pytest.fixture(scope="module")
def elements(page, parse):
    return parse(page)


def of(elements, tag, **attributes):
    return [e for e in elements if e.tag == tag and attributes.items() <= e.attributes.items()]


def test_it_opens_with_the_verdict_and_what_matters_most(elements):
    (verdict,) = (e for e in of(elements, "p") if "verdict" in e.attributes.get("class", ""))
    assert verdict.within("header")
    assert " ".join(verdict.text.split()).startswith("1 warning, ")
    assert "First of all: Measuring failed 2 times" in verdict.text


def test_every_finding_is_told_whole(run, elements):
    items = [e.text for e in of(elements, "li") if e.within("ol", **{"class": "findings"}) and not e.within("ul")]
    findings = check(run)
    assert len(items) == len(findings)
    for item, finding in zip(items, findings, strict=True):
        for part in (finding.severity, finding.rule, finding.sentence, finding.advice, *finding.matrices):
            assert part in item


def allowed(run, name):
    try:
        return ask(run, name)
    except ValueError as error:
        return str(error)


def test_every_study_is_there_with_its_texts_or_absent_with_its_reason(run, elements):
    said = {name: allowed(run, name) for name in STUDIES}
    present = {name: answer for name, answer in said.items() if not isinstance(answer, str)}
    articles = of(elements, "article")
    assert [e.attributes["id"] for e in articles] == list(present)
    images = of(elements, "img")
    for article, image, answer in zip(articles, images, present.values(), strict=True):
        assert all(text in article.text for text in (answer.question, answer.reading, answer.summary))
        assert image.attributes["alt"] == f"{answer.question} {answer.summary}"
        assert article in image.around


def test_what_a_run_does_not_allow_is_told_with_its_reason(build_run, write, parse):
    run = build_run({"bias": {"sigma": np.array([1.0]), "optimizer": "AdamW"}})
    reasons = {name: said for name in STUDIES if isinstance(said := allowed(run, name), str)}
    assert {"residual_curves", "kappa_by_layer"} <= set(reasons)
    elements = parse(write({"run.zarr": run}))
    told = {tag: [e.text for e in of(elements, tag) if e.within("dl", **{"class": "absent"})] for tag in ("dt", "dd")}
    assert dict(zip(told["dt"], told["dd"], strict=True)) == {name: reason.removeprefix("run: ") for name, reason in reasons.items()}


def test_studies_stand_under_their_theme(elements):
    heading = {e.attributes["id"]: e.text.lower() for e in of(elements, "h2")}
    for article in of(elements, "article"):
        section = next(e for e in article.around if e.tag == "section")
        assert article.attributes["id"] in THEMES[heading[section.attributes["aria-labelledby"]]]


def test_identity_is_told(elements):
    (identity,) = of(elements, "dl", **{"class": "identity"})
    for text in (
        "2026-01-01 00:00:00 UTC",
        "torch.optim.Muon, read by table",
        "exact NS input",
        "lr 0.02",
        "geometry: 3 records, steps 10 to 30",
        "loss 2",
    ):
        assert text in identity.text


def test_the_table_of_matrices_holds_what_was_recorded_last(run, elements):
    rows = [e for e in of(elements, "tr") if e.within("table", id="matrix-table")]
    header = [e.text.strip() for e in of(elements, "th", scope="col") if rows[0] in e.around]
    cells = [[e for e in elements if e.tag in ("th", "td") and row in e.around] for row in rows[1:]]
    shown = {row[0].text: dict(zip(header, row, strict=True)) for row in cells}
    assert list(shown) == run["update"]["name"].values.tolist()
    # The condition numbers that the run was built with.
    expected = dict(zip(shown, (10, 100, 1000, 20, 5), strict=True))
    for name, kappa in expected.items():
        assert float(shown[name]["κ"].attributes["data-v"]) == pytest.approx(kappa, rel=1e-12)
    assert shown["layers.1.attn.q_proj.weight"]["κ"].text == "≥ 1000"
    assert shown["head.weight"]["mean of v"].text == "0.004"
    assert shown["head.weight"]["residual ε̃"].text == "–"
    assert shown["layers.0.mlp.up_proj.weight"]["shape"].text == "8×8"


def test_a_downloaded_table_holds_the_studys_numbers(run, elements):
    links = {e.attributes["download"]: e.attributes["href"] for e in of(elements, "a") if "download" in e.attributes}
    table = pd.read_csv(io.StringIO(unquote(links["kappa_by_operator.operator.csv"].partition(",")[2])))
    dataset = ask(run, "kappa_by_operator").dataset
    assert table["operator"].tolist() == dataset["operator"].values.tolist()
    np.testing.assert_allclose(table["null"], dataset["null"].values, rtol=1e-5)


def test_landmarks_headings_and_references(elements):
    assert [e.attributes["lang"] for e in of(elements, "html")] == ["en"]
    assert [len(of(elements, tag)) for tag in ("header", "nav", "main", "footer", "h1", "title")] == [1] * 6
    levels = [int(e.tag[1]) for e in elements if re.fullmatch("h[1-6]", e.tag)]
    assert all(after <= before + 1 for before, after in pairwise(levels))
    ids = [e.attributes["id"] for e in elements if "id" in e.attributes]
    assert len(set(ids)) == len(ids)
    internal = [e.attributes["href"][1:] for e in of(elements, "a") if e.attributes["href"].startswith("#")]
    assert {*internal, *(e.attributes["aria-labelledby"] for e in elements if "aria-labelledby" in e.attributes)} <= set(ids)
    sections = {e.attributes["id"] for e in elements if e.tag in ("section", "article")}
    assert sections == {e.attributes["href"][1:] for e in of(elements, "a") if e.within("nav")}


def test_it_loads_nothing_and_runs_only_its_own_scripts(elements):
    for element in elements:
        for name in ("src", "href", "srcset", "action", "data", "poster"):
            assert element.attributes.get(name, "#").startswith(("#", "data:"))
        assert not any(name.startswith("on") for name in element.attributes)
    (policy,) = of(elements, "meta", **{"http-equiv": "Content-Security-Policy"})
    rules = dict(rule.strip().split(" ", 1) for rule in policy.attributes["content"].split(";"))
    assert rules["default-src"] == "'none'"
    digests = {
        base64.b64encode(hashlib.sha256(e.text.encode()).digest()).decode() for e in of(elements, "script") if "type" not in e.attributes
    }
    assert len(digests) == 2
    assert rules["script-src"].split() == sorted(rules["script-src"].split(), key=rules["script-src"].index)
    assert {f"'sha256-{digest}'" for digest in digests} == set(rules["script-src"].split())


def test_the_same_run_gives_the_same_bytes(run, page, write):
    # The page that was made first lies behind, so that whatever counts on would have counted on.
    assert write({"run.zarr": run}).read_bytes() == page.read_bytes()


def test_what_was_written_is_told(run, tmp_path):
    seen = []
    written = write_report({"run.zarr": run}, tmp_path / "r.html", lambda names: seen.extend(names) or names)
    assert seen == list(STUDIES)
    assert written["size"] == (tmp_path / "r.html").stat().st_size
    assert sum(written["findings"].values()) == len(check(run))


def test_several_runs_are_shown_beside_each_other(run, build_run, write, parse):
    other = build_run({"head.weight": {"sigma": np.array([3.0, 1.0]), "optimizer": "AdamW"}}, scalars={"loss": [4.0, 3.0, 1.0]})
    elements = parse(write({"a.zarr": run, "b.zarr": other}))
    assert len([e for e in of(elements, "p") if "verdict" in e.attributes.get("class", "")]) == 2
    assert len(of(elements, "dl", **{"class": "identity"})) == 2
    assert len(of(elements, "script", type="application/json")) == 1
    assert {"a.zarr", "b.zarr"} <= {e.text for e in of(elements, "h3")}


def test_a_comparison_comes_before_everything_else(run, write, parse):
    runs = {"a.zarr": run, "b.zarr": run.copy()}
    elements = parse(write(runs))
    assert next(e.attributes["id"] for e in elements if e.tag == "section") == "comparison"
    (article,) = of(elements, "article")
    assert compare.QUESTION in article.text
    assert compare.summary(compare.study(runs)) in article.text


def test_a_run_with_little_in_it_has_a_page(build_run, write, parse):
    """No loss, no spectrum, no layer: what cannot be shown is not there, and nothing else is missing."""
    elements = parse(write({"run.zarr": build_run({"bias": {"sigma": None, "optimizer": "AdamW"}}, steps=(1,))}))
    assert of(elements, "script", type="application/json") == []
    assert len(of(elements, "script")) == 1
    assert of(elements, "section", id="absent")


def test_a_run_without_records_has_none(build_run, tmp_path):
    import xarray as xr

    with pytest.raises(ValueError, match="no records yet"):
        write_report({"run.zarr": xr.DataTree(xr.Dataset(attrs={"optiscope_schema": 1}))}, tmp_path / "r.html")
    assert list(tmp_path.iterdir()) == []


def test_what_a_page_is_made_of_is_packaged():
    import tomllib

    project = tomllib.loads((HERE.parents[1] / "pyproject.toml").read_text(encoding="utf-8"))
    patterns = project["tool"]["setuptools"]["package-data"]["optiscope.analysis.report"]
    packaged = {path.name for pattern in patterns for path in HERE.glob(pattern)}
    assert packaged == {path.name for path in HERE.iterdir() if path.is_file() and path.suffix != ".py"}
