"""Pictures that a page carries inside itself: small, the same every time, and drawn whatever their labels hold."""

import xml.etree.ElementTree as ElementTree
from urllib.parse import unquote

import matplotlib as mpl
import numpy as np
import xarray as xr

from optiscope.analysis.figures import axes
from optiscope.analysis.report.drawable import LONGEST, drawable
from optiscope.analysis.report.pictures import HEAVY, svg_uri

SVG = "{http://www.w3.org/2000/svg}"


def read(uri):
    kind, _, text = uri.partition(",")
    assert kind == "data:image/svg+xml"
    # Nothing that HTML reads, and nothing that would end the address.
    assert not set("<>\"'&#\n") & set(text)
    return ElementTree.fromstring(unquote(text))


def scatter(points):
    figure, (ax,) = axes()
    x = np.linspace(0, 1, points)
    ax.scatter(x, np.sin(40 * x), s=4)
    ax.plot(x[:2], x[:2], label="κ, σ, ‖·‖")
    ax.legend()
    return figure


def test_a_picture_is_a_picture():
    root = read(svg_uri(scatter(50), "a"))
    assert root.tag == f"{SVG}svg"
    assert root.get("viewBox")
    assert len(list(root.iter(f"{SVG}use"))) > 50
    assert {element.tag.removeprefix(SVG) for element in root.iter()} <= {"svg", "defs", "style", "g", "path", "use", "clipPath", "rect"}


def test_a_dense_picture_is_drawn_in_pixels_and_stays_small():
    light, dense = svg_uri(scatter(50), "a"), svg_uri(scatter(20_000), "a")
    assert not list(read(light).iter(f"{SVG}image"))
    assert list(read(dense).iter(f"{SVG}image"))
    # As paths it would take some 60 bytes for each of the 20,000 points.
    assert len(dense) < HEAVY
    # Axes and texts are not drawn in pixels.
    assert len(list(read(dense).iter(f"{SVG}use"))) > 20


def test_coordinates_are_rounded_to_what_the_eye_can_see():
    """Every number of a path lies within half a hundredth of a point of where Matplotlib put it."""
    figure, (ax,) = axes()
    ax.plot([0, 1, 2], [0.123456, 0.7, 0.3], color="#123456")
    fine = ElementTree.fromstring(_plain(figure))
    line = next(p for p in read(svg_uri(figure, "a")).iter(f"{SVG}path") if "#123456" in (p.get("style") or ""))
    reference = next(p for p in fine.iter(f"{SVG}path") if "#123456" in (p.get("style") or ""))
    found, expected = (np.array([float(n) for n in p.get("d").split() if n not in "MLz"]) for p in (line, reference))
    assert np.abs(found - expected).max() <= 0.005 + 1e-9


def _plain(figure):
    import io

    buffer = io.StringIO()
    figure.savefig(buffer, format="svg")
    return buffer.getvalue()


def test_the_same_figure_gives_the_same_picture_and_nothing_global_changes():
    before = dict(mpl.rcParams)
    assert svg_uri(scatter(50), "a") == svg_uri(scatter(50), "a")
    assert dict(mpl.rcParams) == before


def test_labels_that_cannot_be_drawn_are_made_such_that_can():
    labels = ["attn_q", "a\n\u202eb", "$\\frac{$", "x" * 500, "x" * 501]
    dataset = xr.Dataset({"kind": ("operator", labels)}, coords={"operator": labels, "step": [1, 2]})
    shown = drawable(dataset)["operator"].values.tolist()
    assert shown[:3] == ["attn_q", "a\\n\\u202eb", "\\$\\frac{\\$"]
    assert len(set(shown)) == len(shown)
    assert max(map(len, shown)) <= LONGEST + len(" (2)")
    assert drawable(dataset)["kind"].values.tolist() == shown
    assert dataset["operator"].values.tolist() == labels
    figure, (ax,) = axes()
    ax.set_yticks(range(len(shown)), shown)
    read(svg_uri(figure, "a"))


def test_a_text_in_a_script_that_the_font_lacks_is_no_reason_to_complain():
    figure, (ax,) = axes()
    ax.set_title("語 😀")
    read(svg_uri(figure, "a"))  # warnings are errors here
