"""The schedule file: what is written is read back, and what is not a schedule is refused in one sentence."""

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from optiscope.diagnostics.newton_schulz.families import JORDAN
from optiscope.diagnostics.newton_schulz.polar_express import matched_coefficients
from optiscope.diagnostics.schedules.schedule_file import FORMAT, VERSION, OperatorSchedule, Schedule

finite = st.floats(allow_nan=False, allow_infinity=False)
entries = st.builds(
    OperatorSchedule,
    coefficients=st.lists(st.tuples(finite, finite, finite), max_size=9).map(tuple),
    matrices=st.lists(st.text(), max_size=4).map(tuple),
    predicted_residual=finite,
    baseline_residual=finite,
    cost=st.integers(0, 10**20),
    baseline_interval=st.none() | st.tuples(finite, finite),
    shapes=st.lists(st.tuples(st.integers(1, 10**6), st.integers(1, 10**6)), max_size=3).map(tuple),
)
facts = st.dictionaries(st.text(), st.one_of(finite, st.integers(), st.text(), st.none(), st.booleans()), max_size=4)
schedules = st.builds(Schedule, operators=st.dictionaries(st.text(), entries, max_size=4), budget=facts, objective=facts, provenance=facts)

EXAMPLE = Schedule(
    {
        "attn_q": OperatorSchedule((JORDAN,) * 3, ("layers.0.q.weight", "layers.1.q.weight"), 0.3, 0.34, 1200),
        "mlp_up": OperatorSchedule(matched_coefficients(6), ("layers.0.up.weight",), 0.1, 0.2, 7200, shapes=((64, 16),)),
    },
    budget={"kind": "flops", "mean_steps": 5, "limit": 10**12, "cost": 8400},
    objective={"mean_residual": 0.2, "rule": "capped"},
    provenance={"run": "run.zarr"},
)


@given(schedules)
def test_a_schedule_is_read_back_bit_for_bit(tmp_path_factory, schedule):
    path = tmp_path_factory.getbasetemp() / "schedule.json"
    schedule.save(path)
    back = Schedule.load(path)
    assert back == schedule
    assert list(back.operators) == list(schedule.operators)


def test_the_file_is_plain_json_that_names_itself(tmp_path):
    path = tmp_path / "schedule.json"
    EXAMPLE.save(str(path))
    document = json.loads(path.read_text(encoding="utf-8"))
    assert (document["format"], document["version"]) == ("optiscope-schedule", 1)
    assert document["operators"]["attn_q"]["steps"] == 3
    assert document["operators"]["attn_q"]["coefficients"] == [[3.4445, -4.775, 2.0315]] * 3
    assert document["budget"]["limit"] == 10**12
    assert path.read_text(encoding="utf-8").endswith("}\n")
    assert Schedule.load(path) == Schedule.load(str(path)) == EXAMPLE


def test_an_operator_is_found_by_its_matrices():
    assert EXAMPLE.operator_of("layers.1.q.weight") == "attn_q"
    assert EXAMPLE.operator_of("layers.0.up.weight") == "mlp_up"
    assert EXAMPLE.operator_of("layers.9.q.weight") is None
    assert (EXAMPLE.operators["attn_q"].steps, EXAMPLE.operators["mlp_up"].steps) == (3, 6)


def test_a_missing_file_is_a_missing_file(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"nothing\.json"):
        Schedule.load(tmp_path / "nothing.json")


FOREIGN = {
    "empty": b"",
    "not JSON": b"steps: 5",
    "not text": bytes(range(256)),
    "a list": b"[1, 2]",
    "a number": b"3",
    "JSON of something else": b'{"lr": 0.1}',
    "a format of something else": b'{"format": "zarr", "version": 1}',
    "no version": json.dumps({"format": FORMAT}).encode(),
    "a version that is no number": json.dumps({"format": FORMAT, "version": "two"}).encode(),
    "a version without end": json.dumps({"format": FORMAT, "version": float("inf")}).encode(),
    "half a file": EXAMPLE.to_json().encode()[:400],
}


@pytest.mark.parametrize("kind", FOREIGN)
def test_a_foreign_file_is_refused(tmp_path, kind):
    path = tmp_path / "schedule.json"
    path.write_bytes(FOREIGN[kind])
    with pytest.raises(ValueError, match=r"schedule\.json: expected a schedule file written by `diag schedule`, got something else$"):
        Schedule.load(path)


def test_a_newer_version_asks_for_an_upgrade(tmp_path):
    path = tmp_path / "schedule.json"
    # Whatever else a newer version holds need not make sense to this one.
    path.write_text(json.dumps({"format": FORMAT, "version": VERSION + 1, "layers": []}))
    with pytest.raises(
        ValueError, match=rf"schedule\.json: schedule version {VERSION + 1} is newer than .* reads \({VERSION}\); upgrade optiscope$"
    ):
        Schedule.load(path)


def spoilt(change):
    document = json.loads(EXAMPLE.to_json())
    change(document)
    return json.dumps(document)


MALFORMED = {
    "no operators": lambda d: d.pop("operators"),
    "operators as a list": lambda d: d.update(operators=[]),
    "an entry that is a number": lambda d: d["operators"].update(attn_q=3),
    "no coefficients": lambda d: d["operators"]["attn_q"].pop("coefficients"),
    "pairs for triples": lambda d: d["operators"]["attn_q"].update(coefficients=[[1, 2]] * 3),
    "words for numbers": lambda d: d["operators"]["attn_q"].update(coefficients=[["a", "b", "c"]] * 3),
    "coefficients that are not finite": lambda d: d["operators"]["attn_q"].update(coefficients=[[1, float("nan"), 0]] * 3),
    "steps that contradict the coefficients": lambda d: d["operators"]["attn_q"].update(steps=5),
    "one name for a list of names": lambda d: d["operators"]["attn_q"].update(matrices="layers.0.q.weight"),
    "numbers for names": lambda d: d["operators"]["attn_q"].update(matrices=[1, 2]),
    "an interval of one end": lambda d: d["operators"]["attn_q"].update(baseline_interval=[0.1]),
    "a cost without end": lambda d: d["operators"]["attn_q"].update(cost=float("inf")),
    "a shape of three sizes": lambda d: d["operators"]["attn_q"].update(shapes=[[1, 2, 3]]),
    "a shape of no size": lambda d: d["operators"]["attn_q"].update(shapes=[[0, 2]]),
    "a shape for a list of shapes": lambda d: d["operators"]["attn_q"].update(shapes=[64, 16]),
    "a budget that is a number": lambda d: d.update(budget=3),
}  # fmt: skip


@pytest.mark.parametrize("kind", MALFORMED)
def test_a_malformed_schedule_is_refused(tmp_path, kind):
    path = tmp_path / "schedule.json"
    path.write_text(spoilt(MALFORMED[kind]))
    with pytest.raises(ValueError, match=r"^[^\n]*schedule\.json: the schedule is malformed \(.*\); derive it again with `diag schedule`$"):
        Schedule.load(path)


def test_the_contradiction_is_told(tmp_path):
    path = tmp_path / "schedule.json"
    path.write_text(spoilt(MALFORMED["steps that contradict the coefficients"]))
    with pytest.raises(ValueError, match="5 steps but 3 coefficient triples"):
        Schedule.load(path)


def test_a_file_from_before_intervals_is_read(tmp_path):
    path = tmp_path / "schedule.json"
    path.write_text(spoilt(lambda document: document["operators"]["attn_q"].pop("baseline_interval")))
    assert Schedule.load(path) == EXAMPLE


def test_a_file_from_before_shapes_is_read_without_them(tmp_path):
    path = tmp_path / "schedule.json"
    path.write_text(spoilt(lambda document: [entry.pop("shapes") for entry in document["operators"].values()]))
    back = Schedule.load(path)
    assert back.operators["mlp_up"].shapes == ()
    assert back.operators["mlp_up"].coefficients == EXAMPLE.operators["mlp_up"].coefficients


@pytest.mark.parametrize("part", ["budget", "objective", "provenance"])
def test_a_part_left_out_is_empty(tmp_path, part):
    path = tmp_path / "schedule.json"
    path.write_text(spoilt(lambda document: document.pop(part)))
    assert getattr(Schedule.load(path), part) == {}
