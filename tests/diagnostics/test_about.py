"""What a user states about a run: plain values pass as they are, everything else is refused in a sentence."""

import json
from collections import UserDict

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from optiscope.diagnostics.about import checked, parsed

NAMES = st.text(min_size=1, max_size=100).filter(str.strip)
VALUES = st.one_of(
    st.text(max_size=1000), st.booleans(), st.integers(-(2**63) + 1, 2**63 - 1), st.floats(allow_nan=False, allow_infinity=False)
)


@given(st.dictionaries(NAMES, VALUES, max_size=64))
def test_plain_values_survive_json(about):
    assert json.loads(json.dumps(checked(about), allow_nan=False)) == about


def test_numbers_of_numpy_become_plain():
    found = checked(UserDict({"seed": np.int64(3), "lr": np.float32(0.5)}))
    assert found == {"seed": 3, "lr": 0.5}
    assert [type(value) for value in found.values()] == [int, float]


def test_nothing_stated():
    assert checked(None) == {}
    assert checked({}) == {}


@pytest.mark.parametrize(
    ("about", "kind", "text"),
    [
        (["seed"], TypeError, "about: expected a mapping such as {'seed': 0, 'tokens_per_step': 8192}, got list"),
        ({"a": [1]}, TypeError, "about: expected a text, a number or a truth value for 'a', got list"),
        ({"a": None}, TypeError, "about: expected a text, a number or a truth value for 'a', got NoneType"),
        ({"a": float("nan")}, ValueError, "about: expected a finite number of 64 bits for 'a', got nan"),
        ({"a": 2**63}, ValueError, "about: expected a finite number of 64 bits for 'a', got 9223372036854775808"),
        ({"a": "x" * 1001}, ValueError, "about: expected texts of at most 1000 characters, 'a' has 1001; give a hash or a path"),
        ({" ": 1}, ValueError, "about: expected names of 1 to 100 characters, got ' '"),
        ({1: 1}, ValueError, "about: expected names of 1 to 100 characters, got '1'"),
        ({str(i): i for i in range(65)}, ValueError, "about: expected at most 64 entries, got 65; name a file that holds the rest"),
    ],
)
def test_anything_else_is_refused(about, kind, text):
    with pytest.raises(kind) as refused:
        checked(about)
    assert str(refused.value) == text


@pytest.mark.parametrize(
    ("text", "value"),
    [("0", 0), ("-3", -3), ("1e3", 1000.0), ("0.5", 0.5), ("true", True), ("false", False), ("True", "True"), ("nan", "nan"), ("inf", "inf"), ("", "")],
)  # fmt: skip
def test_a_command_lines_values(text, value):
    found = parsed([f"x={text}"])["x"]
    assert found == value
    assert type(found) is type(value)


def test_an_entry_without_a_value_is_refused():
    with pytest.raises(ValueError, match=r"^about: expected NAME=VALUE, for example seed=0, got 'seed'$"):
        parsed(["seed"])


def test_a_value_may_hold_an_equals_sign():
    assert parsed(["data=a=b"]) == {"data": "a=b"}
