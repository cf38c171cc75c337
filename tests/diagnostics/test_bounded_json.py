"""JSON from a stranger: each bound, and what was wrong as data."""

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from optiscope.diagnostics.store.bounded_json import MAX_BYTES, MAX_CONTAINERS, JsonError, Problem, parse_bounded, read_bounded

values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(), inner, max_size=4),
    max_leaves=12,
)


@given(values)
def test_what_json_writes_is_read_back(value):
    assert parse_bounded(json.dumps(value).encode()) == value


REFUSED = {
    "empty": (b" \n\t", Problem.EMPTY),
    "no JSON": (b"[1, 2", Problem.NO_JSON),
    "Python": (b"[(1, 2)]", Problem.NO_JSON),
    "Latin-1": ('["é"]'.encode("latin-1"), Problem.NO_JSON),
    "half a surrogate pair": (rb'["\ud800"]', Problem.NO_JSON),
    "deeper than Python goes": (b"[" * 100_000, Problem.TOO_DEEP),
    "33 deep": (b"[" * 33 + b"]" * 33, Problem.TOO_DEEP),
    "many lists": (b"[" + b"[]," * MAX_CONTAINERS + b"[]]", Problem.TOO_MANY),
    "long": (b" " * (MAX_BYTES + 1), Problem.TOO_LONG),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_is_not_read_says_why_as_data_and_in_a_sentence(name):
    content, problem = REFUSED[name]
    with pytest.raises(JsonError, match=r"^expected .*, got (more|something else|an empty file)$") as refused:
        parse_bounded(content)
    assert refused.value.problem is problem
    assert str(refused.value) == problem.value


def test_32_deep_is_read():
    assert parse_bounded(b"[" * 32 + b"]" * 32) == json.loads("[" * 32 + "]" * 32)


def test_a_file_is_read_up_to_its_bound(tmp_path):
    path = tmp_path / "some.json"
    path.write_bytes(b"12345")
    assert read_bounded(path, 5) == b"12345"
    with pytest.raises(ValueError, match=r"some\.json: expected at most 4 bytes, got more$"):
        read_bounded(path, 4)
