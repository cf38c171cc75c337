"""A study's figure as a picture that a page carries inside itself."""

import io
import re
import warnings
from urllib.parse import quote

import matplotlib as mpl
import numpy as np
from matplotlib.figure import Figure

# Over so many marks, or bytes of SVG, marks are drawn as pixels; texts and axes stay sharp.
CROWDED, HEAVY = 4_000, 160_000


def svg_uri(figure: Figure, salt: str) -> str:
    """The figure as a `data:` address of an SVG, the same for the same figure and `salt`.

    An image is a document of its own: whatever is in it can neither run nor clash with the page. The address holds no character that
    HTML would read.
    """
    if _marks(figure) > CROWDED:
        _as_pixels(figure)
    svg = _svg(figure, salt)
    if len(svg) > HEAVY:
        _as_pixels(figure)
        svg = _svg(figure, salt)
    return "data:image/svg+xml," + quote(svg, safe=" /:;=,()+")


def _marks(figure: Figure) -> int:
    """Points and corners that would be written one by one."""
    lines = [np.size(line.get_xdata()) for axes in figure.axes for line in axes.lines]
    collections = [max(np.shape(c.get_offsets())[0], len(c.get_paths())) for axes in figure.axes for c in axes.collections]
    return int(sum(lines) + sum(collections))


def _as_pixels(figure: Figure) -> None:
    for axes in figure.axes:
        for artist in (*axes.collections, *axes.lines, *axes.patches):
            artist.set_rasterized(True)


def _svg(figure: Figure, salt: str) -> str:
    buffer = io.StringIO()
    with mpl.rc_context({"svg.hashsalt": salt, "svg.fonttype": "path"}), warnings.catch_warnings():
        # A name may be written in a script that the font lacks; it shows boxes.
        warnings.filterwarnings("ignore", message="Glyph .* missing from font")
        figure.savefig(buffer, format="svg", metadata={"Date": None, "Creator": None})
    return _compact(buffer.getvalue())


def _compact(svg: str) -> str:
    """Without prologue, metadata, comments (which repeat every text) and white space, coordinates to a hundredth of a point."""
    svg = re.sub(r"<\?xml.*?\?>|<!DOCTYPE.*?>|<!--.*?-->|<metadata>.*?</metadata>", "", svg, flags=re.DOTALL)
    svg = re.sub(r"\s+", " ", re.sub(r">\s+<", "><", svg)).strip()
    return _short_numbers(svg).replace('"', "'")


def _short_numbers(svg: str) -> str:
    def rounded(number: re.Match[str]) -> str:
        return f"{float(number[0]):.2f}".rstrip("0").rstrip(".")

    def within(attribute: re.Match[str]) -> str:
        return re.sub(r"-?\d+\.\d{3,}", rounded, attribute[0])

    return re.sub(r' (?:d|x|y|x1|y1|x2|y2|points)="[^"]*"', within, svg)
