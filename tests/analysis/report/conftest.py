"""Pages made of built runs, read by a parser and by a browser."""

import shutil
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest

NAMES = ("layers.0.attn.q_proj.weight", "layers.0.mlp.up_proj.weight", "layers.1.attn.q_proj.weight", "layers.1.mlp.up_proj.weight")


@pytest.fixture(scope="session")
def run(build_run):
    """Four matrices of Muon with condition numbers 10, 100, 1000 and 20, one of AdamW, a loss, and a second moment."""
    kappas = dict(zip(NAMES, (10.0, 100.0, 1000.0, 20.0), strict=True))
    matrices = {name: {"sigma": np.geomspace(kappa, 1, 8), "floor": kappa == 1000} for name, kappa in kappas.items()}
    matrices["head.weight"] = {"sigma": np.geomspace(5.0, 1, 8), "optimizer": "AdamW"}
    scalars = {"loss": [3.0, 2.5, 2.0], "validation_loss": [np.nan, 2.75, np.nan]}
    moment = {"second_moment_mean": [[np.nan] * 4 + [v] for v in (1e-3, 2e-3, 4e-3)]}
    optimizer = {
        "label": "Muon",
        "class": "torch.optim.Muon",
        "read_by": ["table"],
        "spectrum_of": ["exact NS input"],
        "groups": [{"lr": 0.02}],
    }
    return build_run(matrices, scalars=scalars, groups={"second_moment": moment}, attrs={"optimizers": [optimizer], "errors": 2})


@pytest.fixture(scope="session")
def write(tmp_path_factory):
    """`write({name: run})`: the path of the page."""
    from optiscope.analysis.report.page import write_report

    def write(runs):
        path = tmp_path_factory.mktemp("page") / "report.html"
        write_report(runs, path)
        return path

    return write


@pytest.fixture(scope="session")
def page(run, write):
    """The page of `run`, for those who only read it."""
    return write({"run.zarr": run})


class Element:
    """A start tag, its attributes, the tags around it, and the text directly and deeper in it."""

    def __init__(self, tag, attributes, around):
        self.tag, self.attributes, self.around, self.text = tag, attributes, around, ""

    def within(self, tag, **attributes):
        return any(e.tag == tag and attributes.items() <= e.attributes.items() for e in self.around)


class Reader(HTMLParser):
    VOID = frozenset({"meta", "img", "input", "br", "link", "hr"})

    def __init__(self):
        super().__init__()
        self.elements, self.open = [], []

    def handle_starttag(self, tag, attrs):
        element = Element(tag, dict(attrs), tuple(self.open))
        self.elements.append(element)
        if tag not in self.VOID:
            self.open.append(element)

    def handle_endtag(self, tag):
        assert self.open, f"</{tag}> closes nothing"
        assert self.open.pop().tag == tag

    def handle_data(self, data):
        for element in self.open:
            element.text += data


@pytest.fixture(scope="session")
def parse():
    """`parse(path)`: the elements of a page in its order; its tags must be balanced."""

    def parse(path):
        reader = Reader()
        reader.feed(Path(path).read_text(encoding="utf-8"))
        reader.close()
        assert reader.open == []
        return reader.elements

    return parse


@pytest.fixture(scope="session")
def browser():
    """A headless browser of the system."""
    executable = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
    if executable is None:
        pytest.skip("no browser is installed (apt-get install chromium)")
    from playwright.sync_api import sync_playwright

    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=executable, args=["--no-sandbox"])
        yield browser
        browser.close()


@pytest.fixture
def visit(browser):
    """`visit(path, **context)`: the page, opened from disk; at the end it must have asked for nothing and complained of nothing."""
    contexts, wrong = [], []

    def visit(path, **settings):
        context = browser.new_context(**{"viewport": {"width": 1280, "height": 900}, **settings})
        contexts.append(context)
        context.add_init_script("window.alert = (text) => { throw new Error(`alert ${text}`); }")
        tab = context.new_page()
        address = Path(path).resolve().as_uri()
        # Whatever is in the page itself has an address of its own (data:, blob:), which asks nobody.
        tab.on("request", lambda r: r.url.split("#")[0] == address or r.url.startswith(("data:", "blob:")) or wrong.append(r.url))
        tab.on("console", lambda message: message.type in ("error", "warning") and wrong.append(message.text))
        tab.on("pageerror", lambda error: wrong.append(str(error)))
        tab.goto(address)
        # Plots are drawn a little after the document is there.
        tab.wait_for_function("[...document.querySelectorAll('.plot')].every((plot) => plot.childElementCount > 0)")
        return tab

    yield visit
    for context in contexts:
        context.close()
    assert wrong == []
