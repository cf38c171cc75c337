"""Lists in Python code, read without running it: against Python's own arithmetic, and on code as it is found in the wild."""

import ast
import time
from contextlib import suppress

import pytest
from hypothesis import given
from hypothesis import strategies as st

from optiscope.diagnostics.schedules.coefficients_file import read_coefficients
from optiscope.diagnostics.schedules.python_lists import MAX_CODE, parse_python, value_of

JORDAN = [3.4445, -4.7750, 2.0315]

numbers = st.floats(allow_nan=False, allow_infinity=False).map(repr) | st.integers(0, 10**6).map(str) | st.just("3e-1")
expressions = st.recursive(
    numbers,
    lambda inner: st.builds("({} {} {})".format, inner, st.sampled_from(["+", "-", "*", "/", "**"]), inner) | inner.map("-{}".format),
    max_leaves=6,
)


@given(expressions)
def test_arithmetic_is_that_of_python(text):
    try:
        # The reference runs it, with numbers as float from the start: powers of integers would grow without bounds.
        as_floats = ast.unparse(Floats().visit(ast.parse(text, mode="eval")))
        expected = eval(as_floats)
    except (ArithmeticError, ValueError):
        expected = None
    if isinstance(expected, complex) or expected is None:
        with pytest.raises(ValueError, match=r"^expected numbers or arithmetic on numbers, got "):
            value_of(parse_python(text))
    else:
        assert value_of(parse_python(text)) == pytest.approx(expected, rel=1e-15, nan_ok=True)


class Floats(ast.NodeTransformer):
    def visit_Constant(self, node):
        return ast.Constant(float(node.value))


def read(text, *names):
    return read_coefficients(text if isinstance(text, bytes) else text.encode(), "given", names)


ONE = {
    "tuples in a list": "[(1.5, -0.5, 0), (2, -1.5, .5)]",
    "a comma after it": "[(1.5, -0.5, 0), (2, -1.5, .5),],",
    "no outer brackets": "(1.5, -0.5, 0), (2, -1.5, .5)",
    "indented lines": "    (1.5, -0.5, 0),  # first\n    (2, -1.5, .5),\n",
    "a name": "NS = [(1.5, -0.5, 0), (2, -1.5, .5)]",
    "an indented name": "    NS = [\n        (1.5, -0.5, 0),\n        (2, -1.5, .5),\n    ]\n",
    "an annotated name": "import torch\nNS: list[tuple[float, float, float]] = [(1.5, -0.5, 0), (2, -1.5, .5)]  # ours\nlr = 0.02",
    "an attribute": "class Muon:\n    def __init__(self):\n        self.NS = [(1.5, -0.5, 0), (2, -1.5, .5)]",
    "a key": 'SETS = {"NS": [(1.5, -0.5, 0), (2, -1.5, .5)], "none": []}',
    "a default": "def f(x, lr=1, *, NS=((1.5, -0.5, 0), (2, -1.5, .5))):\n    return x",
    "a positional default": "def f(x, NS=((1.5, -0.5, 0), (2, -1.5, .5)), lr=1): pass",
    "a keyword": "opt = Muon(params, lr=1, NS=[(1.5, -0.5, 0), (2, -1.5, .5)])",
    "a loop": "for a, b, c in [(1.5, -0.5, 0), (2, -1.5, .5)]:\n    x = a * x",
    "a tensor": "NS = torch.tensor([[1.5, -0.5, 0], [2, -1.5, .5]])",
    "fractions": "NS = [(3/2, -1/2, 0/1), (1.0 + 1, -3 * .5, 2**-1)]",
    "joined": "NS = [(1.5, -0.5, 0)] + 1 * [(2, -1.5, .5)]",
    "printed signs": "[(1.5, −0.5, 0), (2, −1.5, .5)]",
    "a byte order mark": "\ufeff[(1.5, -0.5, 0), (2, -1.5, .5)]",
    "JSON's object in Python": "{'coefficients': ((1.5, -0.5, 0), (2, -1.5, .5)), 'after_last': 'repeat'}",
    "a bad escape elsewhere": "pattern = '\\d'\nNS = [(1.5, -0.5, 0), (2, -1.5, .5)]",
}  # fmt: skip


@pytest.mark.parametrize("name", ONE)
def test_a_list_is_read_as_it_is_found_in_code(name):
    (found,) = read(ONE[name])
    assert found.coefficients == [[1.5, -0.5, 0], [2, -1.5, 0.5]]
    assert (found.steps, found.after_last, found.note) == (None, "repeat", "")
    assert found.name == ("NS" if "NS" in ONE[name] else "given")


@pytest.mark.parametrize("text", ["(3.4445, -4.7750, 2.0315)", "3.4445, -4.7750, 2.0315", "[3.4445, -4.7750, 2.0315]", "X = (3.4445, -4.7750, 2.0315)",
                                  "def f(G):\n    a, b, c = (3.4445, -4.7750,  2.0315)\n    X = G.bfloat16()"])  # fmt: skip
def test_three_bare_numbers_are_one_triple(text):
    assert [one.coefficients for one in read(text)] == [[JORDAN]]


def test_nothing_is_run(tmp_path):
    made = tmp_path / "made"
    for text in (
        f"[(open({str(made)!r}, 'w').close() or 1, 2, 3)]",
        f"NS = [(1, 2, 3)]\nopen({str(made)!r}, 'w')",
        f"import os\nos.mkdir({str(made)!r})\nNS = [(1, 2, 3)]",
    ):
        with suppress(ValueError):
            read(text)
    assert not made.exists()


SEVERAL = """
SETS = {"simple": [(3.4445, -4.7750, 2.0315)], "exact": [(1.5, -0.5, 0)] * 2}
ns = [(2, -1.5, .5)]
def f(ns=((2, 3, 4),), betas=(0.9, 0.95, 0.99)):
    for a, b, c in [(1, 2, 3), (4, 5, 6)]: pass
"""


def test_of_several_lists_one_is_asked_for_by_name():
    with pytest.raises(
        ValueError, match=r"^--name: expected one or more of simple, exact, ns, line 3, ns, line 4, line 5, the lists in given; got none$"
    ):
        read(SEVERAL)
    with pytest.raises(ValueError, match=r"^--name: other is none of simple, exact, ns, line 3, ns, line 4, line 5$"):
        read(SEVERAL, "simple", "other")
    assert [(one.name, one.coefficients) for one in read(SEVERAL, "simple", "ns, line 4", "line 5")] == [
        ("simple", [JORDAN]), ("ns, line 4", [[2, 3, 4]]), ("line 5", [[1, 2, 3], [4, 5, 6]]),
    ]  # fmt: skip
    assert read(SEVERAL, "exact")[0].coefficients == [[1.5, -0.5, 0]] * 2
    many = "".join(f"a{i} = [(1, 2, 3)]\n" for i in range(100))
    with pytest.raises(ValueError, match=r"a10, a11 and 88 more, the lists in given; got none$"):
        read(many)
    with pytest.raises(ValueError, match=r"^--name: expected one or more of line 1, column 3, line 1, column 16, "):
        read("f([(1, 2, 3)], [(4, 5, 6)])")


def test_a_name_that_code_gives_another_value_is_noted():
    # As Polar Express is published: a list, and the safety factor by a comprehension after it.
    published = "coeffs = [\n  (8.28, -23.5, 17.3),\n  (4.1, -2.9, 0.5),\n]\ncoeffs = [(a / 1.01, b / 1.01**3, c / 1.01**5) for a, b, c in coeffs]\n"
    (found,) = read(published)
    assert found.coefficients == [[8.28, -23.5, 17.3], [4.1, -2.9, 0.5]]
    assert found.note == "line 5 gives coeffs another value, by code that is not run; the list judged is that in line 1"
    assert read(published.replace("coeffs = [(a", "other = [(a"))[0].note == ""


NOT_READ = {
    r"^given: expected numbers or arithmetic on numbers, got SAFETY in line 2; write its value, code is not run$": [
        "[(1.5, -0.5, 0),\n (8.28 / SAFETY, 2, 3)]", "\nNS = [(8.28 / SAFETY, -23.5 / SAFETY**3, 1)]",
    ],
    r"got OTHER in line 1; ": ["NS = [(1, 2, 3)] + OTHER"],
    r"got \[\(1, 2, 3\), \(4, 5, 6\)\]\[:1\] in line 1; ": ["NS = [(1, 2, 3), (4, 5, 6)][:1]"],
    r"got \[\(a / 2, b, c\) for a, b, c in \[\(1, 2, 3\)\]\] in line 1; ": ["NS = [(a / 2, b, c) for a, b, c in [(1, 2, 3)]]"],
    r"got 1 / 0 in line 1; ": ["[(1 / 0, 2, 3)]"],
    r"got 9\.0 \*\* 9\.0 \*\* 9\.0 in line 1; ": ["[(9.0 ** 9.0 ** 9.0, 2, 3)]"],
    r"got \(-8\) \*\* 0\.5 in line 1; ": ["[((-8) ** 0.5, 2, 3)]"],
    r"got \[\(1, 2, 3\)\] \* 1001 in line 1; ": ["[(1, 2, 3)] * 1001"],
    r"got \[\[\(1, 2, 3\)\] \* 900\] \* 900 in line 1; ": ["[[(1, 2, 3)] * 900] * 900"],
    r"got \d{60} in line 1; ": ["[(0x1" + "f" * 300 + ", 2, 3)]"],
    r"got code too long to show in line 1; ": ["[(0x1" + "f" * 300_000 + ", 2, 3)]"],
    r"^given: expected a list of \(a, b, c\) triples as JSON or Python writes it, .*; got text that holds no such list$": [
        "hello", "x = 5", "NS = [(1, 2), (3, 4)]", "# nothing\nimport os",
    ],
    r"; got neither JSON nor Python \(line 1: '\[' was never closed\)$": ["[[1, 2", "[(1.5, -0.5, 0)"],
    r"; got neither JSON nor Python \(line 2: ": ["NS = [(1, 2, 3)]\nelse:", "# Title\nSome prose it is."],
    r"; got bytes that are no text in UTF-8$": ["[(1.5, 2, 3)]".encode("utf-16"), b"\xff\xfe\x00PNG"],
    r"^given: expected JSON, or at most 400,000 characters of Python code, got something else$": ["#" * (MAX_CODE + 1)],
    r"^given: expected Python code that is nested less deep$": ["1" + "+1" * 5_000, "-" * 50_000 + "1", "not " * 9_000 + "1"],
}  # fmt: skip


@pytest.mark.parametrize(("message", "text"), [(m, t) for m, texts in NOT_READ.items() for t in texts], ids=lambda x: repr(x)[:40])
def test_what_is_not_written_out_is_told_in_one_sentence(message, text):
    with pytest.raises(ValueError, match=message) as refused:
        read(text)
    assert "\n" not in str(refused.value)
    assert len(str(refused.value)) < 400


@pytest.mark.parametrize("text", ["a = [(1, 2, 3)]\n" * 20_000, "[" + "(1,2,3)," * 40_000 + "]", "x = [(1,2,3)]" + "+[(1,2,3)]" * 300, "[" * 150 + "1," * 9_000 + "]" * 150])  # fmt: skip
def test_long_code_takes_seconds(text):
    start = time.perf_counter()
    with suppress(ValueError):
        read(text)
    assert time.perf_counter() - start < 30  # 1.5 s alone on a slow core; minutes where it grew with the square
