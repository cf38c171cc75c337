"""`diag ns`: the table of families, its figure, and the verdict on a list of one's own."""

import json
import time

import numpy as np
import pytest
from typer.testing import CliRunner

from optiscope.cli import app
from optiscope.diagnostics import FAMILIES, OperatorSchedule, Schedule, matched_coefficients
from optiscope.diagnostics.newton_schulz import validation
from optiscope.diagnostics.store import bounded_json

JORDAN = [3.4445, -4.7750, 2.0315]
MISPRINTED = [3.1415, 4.7750, 2.0315]


def write(folder, content):
    path = folder / "coefficients.json"
    path.write_text(content if isinstance(content, str) else json.dumps(content), encoding="utf-8")
    return path


def test_the_table_holds_every_family_with_its_published_numbers(diag):
    result = diag("ns")
    assert (result.exit_code, result.stderr) == (0, "")
    rows = {words[0]: words[1:] for line in result.stdout.splitlines() if (words := line.split())}
    # Steps, slope 3.4445⁵, band and worst errors as published.
    assert rows["jordan"][:7] == ["5", f"{3.4445**5:.5g}", "0.682", "1.134", "0.318", "0.529", "0.952"]
    assert rows["deepseek_v4"][2:7] == ["1.000", "1.001", "0.001", "0.001", "0.002"]
    assert set(FAMILIES) <= rows.keys()
    for family in FAMILIES.values():
        assert f"{family.name}: {family.source}. Its authors " in result.stdout
    assert "  error sign: Singular values above 0.8837" in result.stdout
    assert " nan" not in result.stdout


def test_the_matched_design_of_five_steps_is_in_the_table(diag):
    # The triples as printed with the recipe, four decimals; 1.01 divides the first one's argument once more.
    printed = [
        (8.2052, -22.9019, 16.4607), (4.0669, -2.8613, 0.5184), (3.9135, -2.8243, 0.5248), (3.3060, -2.4302, 0.4870), (2.3271, -1.6925, 0.4214),
    ]  # fmt: skip
    x = np.linspace(0.01, 1, 200_001) / 1.01
    for a, b, c in printed:
        x = a * x + b * x**3 + c * x**5
    words = next(line.split() for line in diag("ns", "--family", "matched").stdout.splitlines() if line.split()[:1] == ["matched"])
    assert [float(word) for word in words[3:5]] == pytest.approx([x.min(), x.max()], abs=2e-3)


def test_the_table_as_json(diag, strict_json):
    found = strict_json(diag("ns", "--json", "--family", "you", "--family", "cans").stdout)["families"]
    assert list(found) == ["you", "cans"]
    assert found["you"]["band"] == pytest.approx([0.9778, 1.0318], abs=5e-5)
    assert found["you"]["after_last"] == "cycle"
    assert [hazard["rule"] for hazard in found["cans"]["hazards"]] == ["bfloat16"]


@pytest.mark.parametrize(("ending", "begins"), [(".png", b"\x89PNG\r\n"), (".svg", b"<?xml")])
def test_the_figure(diag, tmp_path, ending, begins):
    path = tmp_path / f"families{ending}"
    result = diag("ns", "--family", "aol_nvidia", "-o", path)
    assert result.exit_code == 0
    assert path.read_bytes().startswith(begins)
    assert f"figure: {path}" in result.stdout


CLEAN = {
    "list": [JORDAN] * 5,
    "object": {"coefficients": [JORDAN], "steps": 5, "after_last": "repeat"},
    "matched": matched_coefficients(5),
}


@pytest.mark.parametrize("name", CLEAN)
def test_a_clean_list_exits_with_zero(diag, tmp_path, name, strict_json):
    path = write(tmp_path, CLEAN[name])
    result = diag("ns", "validate", path)
    assert (result.exit_code, result.stderr) == (0, "")
    assert result.stdout.startswith(f"{path}: 5 steps, slope ")
    found = strict_json(diag("ns", "validate", path, "--json").stdout)
    assert found["failing"] == 0
    assert len(found["lists"][str(path)]["coefficients"]) == 5


def test_hazards_exit_with_one(diag, tmp_path):
    result = diag("ns", "validate", write(tmp_path, [MISPRINTED] * 5))
    assert (result.exit_code, result.stderr) == (1, "")
    assert "error known_wrong: This is Jordan's triple misprinted; it is (3.4445, −4.7750, 2.0315)." in result.stdout
    assert "nan" not in result.stdout
    you = write(tmp_path, {"coefficients": FAMILIES["you"].coefficients, "after_last": "cycle"})
    assert diag("ns", "validate", you).exit_code == 0  # five steps: only a note
    result = diag("ns", "validate", you, "--steps", "6")
    assert result.exit_code == 1
    assert "error cycled: The list begins anew at step 6" in result.stdout
    assert diag("ns", "validate", you, "--steps", "6", "--after-last", "repeat").exit_code == 0


def test_standard_input():
    result = CliRunner().invoke(app, ["ns", "validate", "-"], input=json.dumps([JORDAN] * 5))
    assert result.exit_code == 0
    assert result.stdout.startswith("standard input: 5 steps")
    result = CliRunner().invoke(app, ["ns", "validate", "-"], input="")
    assert result.exit_code == 2
    assert result.stderr.startswith("diag: standard input: expected a list of (a, b, c) triples as JSON or Python writes it, ")
    assert result.stderr.endswith("; got an empty file\n")
    for pasted in (f"NS = [{tuple(JORDAN)}] * 5  # Jordan's", f"    {tuple(JORDAN)},\n" * 5):
        result = CliRunner().invoke(app, ["ns", "validate", "-"], input=pasted)
        assert (result.exit_code, result.stderr) == (0, "")
        assert ": 5 steps, slope 484.9 " in result.stdout


def test_every_operator_of_a_schedule_is_judged(diag, tmp_path, strict_json):
    good, bad = matched_coefficients(4), FAMILIES["polar_express"].coefficients[:3]
    entries = {name: OperatorSchedule(c, (name,), 0.1, 0.2, 5) for name, c in {"attn_q": good, "mlp_up": bad}.items()}
    path = tmp_path / "schedule.json"
    Schedule(entries).save(path)
    result = diag("ns", "validate", path, "--json")
    assert result.exit_code == 1
    lists = strict_json(result.stdout)["lists"]
    assert list(lists) == ["attn_q", "mlp_up"]
    assert {name: [h["rule"] for h in one["hazards"] if h["severity"] != "info"] for name, one in lists.items()} == {
        "attn_q": [],
        "mlp_up": ["band"],
    }


UNREADABLE = {
    "; got text that holds no such list": ["hello"],
    "; got neither JSON nor Python (line 1: '[' was never closed)": ["[[1, 2"],
    "expected at most 16,000,000 bytes, got more": [" " * 16_000_001],
    "expected JSON of at most 1,000,000 lists and objects": ["[" + "[]," * 1_000_001 + "[]]"],
    "expected JSON nested at most 32 deep": ["[" * 100_000],
    "got an empty file": ["", " \n"],
    "coefficients: expected three numbers (a, b, c) in row 2, got [1.5, -0.5]": [[[1.5, -0.5, 0], [1.5, -0.5]], "NS = [(1.5, -.5, 0), (3/2, -1/2)]"],
    "coefficients: expected three numbers (a, b, c) in row 1, got 1.5": [[1.5, -0.5], [1.5, -0.5, 0, 1]],
    "coefficients: expected three numbers (a, b, c) in row 1, got ['1.5', -0.5, 0]": [[["1.5", -0.5, 0]]],
    "coefficients: expected finite numbers below 1e100 in row 1": ["[[1.5, NaN, 0]]", "[[1.5, Infinity, 0]]"],
    "coefficients: expected at least one (a, b, c) triple, got none": [[], {"coefficients": []}],
    "expected a list of (a, b, c) triples as JSON or Python writes it, ": ["5", "null", '"text"', {"steps": 5}],
    "after_last: expected repeat, cycle or exact, got 'stop'": [{"coefficients": [JORDAN], "after_last": "stop"}],
    "steps: expected a whole number, got 'five'": [{"coefficients": [JORDAN], "steps": "five"}],
    "steps: expected 1 to 100, got 101": [[JORDAN] * 101],
    "coefficients: expected at most 100 triples, got 200,000": [{"coefficients": [JORDAN] * 200_000, "steps": 5}],
    "the schedule names no operator": [{"format": "optiscope-schedule"}, {"format": "optiscope-schedule", "operators": {"q": 5}}],
}  # fmt: skip


@pytest.mark.parametrize(
    ("message", "content"), [(m, c) for m, contents in UNREADABLE.items() for c in contents], ids=lambda x: repr(x)[:40]
)
def test_what_cannot_be_read_exits_with_two_and_one_sentence(diag, tmp_path, message, content):
    for options in ([], ["--json"]):
        result = diag("ns", "validate", write(tmp_path, content), *options)
        assert result.exit_code == 2
        assert result.stdout == ""
        (line,) = result.stderr.splitlines()
        assert line.startswith("diag: ")
        assert message in line
        assert len(line) < 400


@pytest.mark.parametrize(
    "given", ["[(3.4445, -4.7750, 2.0315)] * 5", "NS: list = [(3.4445, −4.7750, 2.0315)] * 5", "torch.tensor([(3.4445, -4.775, 2.0315)] * 5)",
              "# Jordan's\n" + "(3.4445, -4.7750, 2.0315),\n" * 5, json.dumps([JORDAN] * 5)],
)  # fmt: skip
def test_a_list_is_taken_from_the_command_line_itself(diag, given):
    result = diag("ns", "validate", given)
    assert (result.exit_code, result.stderr) == (0, "")
    # Published: slope 3.4445⁵ and the band.
    assert f": 5 steps, slope {3.4445**5:.4g} at 0; values from 0.01 on end in [0.682, 1.13]; " in result.stdout
    result = diag("ns", "validate", "(3.4445, -4.7750, 2.0315)", "--steps", "5")
    assert result.stdout.startswith("list: 5 steps, slope ")


def test_a_file_of_that_name_goes_before_the_list_that_it_reads_as(diag, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "[(1, 2, 3)]").write_text("[(1.5, -0.5, 0)] * 15")
    assert diag("ns", "validate", "[(1, 2, 3)]").stdout.startswith("[(1, 2, 3)]: 15 steps, ")


CODE = """import torch

NS = [(a / 1.0, b, c) for a, b, c in published]
MISPRINTED = [(3.1415, 4.7750, 2.0315)] * 5
FAMILIES = {
    "jordan": [(3.4445, -4.7750, 2.0315)] * 5,
    "cubic": [(3/2, -1/2, 0)] * 15,
}
MISPRINTED = scaled(MISPRINTED)
"""


def test_lists_in_a_python_file_are_chosen_by_name(diag, tmp_path, strict_json):
    path = tmp_path / "muon.py"
    path.write_text(CODE)
    result = diag("ns", "validate", path)
    assert (result.exit_code, result.stdout) == (2, "")
    assert result.stderr == f"diag: --name: expected one or more of MISPRINTED, jordan, cubic, the lists in {path}; got none\n"
    result = diag("ns", "validate", path, "--name", "cubic", "--name", "jordan", "--json")
    assert (result.exit_code, result.stderr) == (0, "")
    assert {name: len(one["coefficients"]) for name, one in strict_json(result.stdout)["lists"].items()} == {"jordan": 5, "cubic": 15}
    result = diag("ns", "validate", path, "--name", "MISPRINTED", "--json")
    assert result.exit_code == 1
    assert (
        result.stderr
        == "diag: MISPRINTED: line 9 gives MISPRINTED another value, by code that is not run; the list judged is that in line 4\n"
    )
    assert "known_wrong" in [hazard["rule"] for hazard in strict_json(result.stdout)["lists"]["MISPRINTED"]["hazards"]]


def test_operators_are_chosen_by_name(diag, tmp_path, strict_json):
    path = write(tmp_path, {"format": "optiscope-schedule", "operators": {o: {"coefficients": [JORDAN] * 5} for o in ("attn_q", "mlp_up")}})
    assert list(strict_json(diag("ns", "validate", path, "--json", "--name", "mlp_up").stdout)["lists"]) == ["mlp_up"]
    assert diag("ns", "validate", path, "--name", "x").stderr == "diag: --name: x is none of attn_q, mlp_up\n"


def test_a_list_that_operators_share_is_judged_and_told_once(diag, tmp_path, monkeypatch, strict_json):
    lists = [matched_coefficients(4), FAMILIES["polar_express"].coefficients[:3]]
    path = write(tmp_path, {"format": "optiscope-schedule", "operators": {f"op{i}": {"coefficients": lists[i % 2]} for i in range(2_000)}})
    judged = []
    measure = validation.validate
    monkeypatch.setattr(
        validation, "validate", lambda coefficients, **options: judged.append(coefficients) or measure(coefficients, **options)
    )
    found = strict_json(diag("ns", "validate", path, "--json").stdout)
    assert len(judged) == 2
    assert (len(found["lists"]), found["failing"]) == (2_000, 1_000)  # op1, op3, …: too few triples of a longer list
    result = diag("ns", "validate", path)
    topics = [line.partition(":")[0] for line in result.stdout.splitlines()]
    assert result.exit_code == 1
    assert [topic for topic in topics if topic.startswith("op")] == [
        ", ".join(f"op{i}" for i in range(first, first + 24, 2)) + " and 988 more" for first in (0, 1)
    ]


def test_a_file_that_cannot_be_read_is_told_in_words(diag, tmp_path, monkeypatch):
    def refuse(path):
        raise PermissionError(13, "Permission denied", str(path))

    monkeypatch.setattr(bounded_json, "read_bounded", refuse)
    path = write(tmp_path, [JORDAN])
    result = diag("ns", "validate", path)
    assert result.exit_code == 2
    assert (
        result.stderr
        == f"diag: coefficients: {path} cannot be read (Permission denied); give a file, the list itself in quotes, or - for standard input\n"
    )


def test_a_list_that_folds_over_and_over_is_judged_in_seconds(diag, tmp_path):
    # Each takes (0, 1] onto itself or beyond several times a step: T₅ of Chebyshev, 5²⁰ sign changes over 20 steps.
    start = time.perf_counter()
    for triple in ([5, -17.7, 14], [5, -20, 16], [-3, 4, 0]):
        result = diag("ns", "validate", write(tmp_path, [triple] * 20))
        assert (result.exit_code, result.stderr) == (1, "")
        assert "error sign: " in result.stdout
    assert time.perf_counter() - start < 60  # 1 s alone on a slow core


def test_huge_numbers_are_told_in_few_digits(diag):
    (line,) = [line for line in diag("ns", "validate", "[(1e99, 5e-324, -1e99)]").stdout.splitlines() if "largest error" in line]
    assert len(line) < 250


@pytest.mark.parametrize("coefficients", [[[-1.5, 0.5, 0]], [[-1e99, 1e99, -1e99]], [[1e-220, -1e99, 0]]])
def test_a_list_that_turns_every_sign_is_a_hazard_and_no_damaged_run(diag, tmp_path, coefficients):
    result = diag("ns", "validate", write(tmp_path, coefficients), "--steps", "1")
    assert (result.exit_code, result.stderr) == (1, "")
    assert "goes against its leading direction whatever its stable rank" in " ".join(result.stdout.split())


@pytest.mark.parametrize("coefficients", [[[1e99, -1e99, 0]] * 5, [[10, -10, 0]] * 30])
def test_what_leaves_all_bounds_is_told_in_words(diag, tmp_path, coefficients):
    result = diag("ns", "validate", write(tmp_path, coefficients))
    assert (result.exit_code, result.stderr) == (1, "")
    assert "values from 0.01 on grow beyond all bounds; largest error ∞ from 0.01" in result.stdout
    assert not {"nan", "inf", "-inf"} & set(result.stdout.replace(",", " ").split())


def test_no_steps_are_refused_not_taken_for_the_default(diag, tmp_path):
    for content, options in (([[1.5, -0.5, 0]], ["--steps", "0"]), ({"coefficients": [[1.5, -0.5, 0]], "steps": 0}, [])):
        result = diag("ns", "validate", write(tmp_path, content), *options)
        assert (result.exit_code, result.stdout) == (2, "")
        assert "steps: expected 1 to 100, got 0" in result.stderr


ARGUMENTS = {
    "diag: coefficients: nothing found at missing.json; give a file, the list itself in quotes, or - for standard input\n": [
        "validate",
        "missing.json",
    ],
    "diag: coefficients: . is a folder; give a file, the list itself in quotes, or - for standard input\n": ["validate", "."],
    "diag: list: coefficients: expected three numbers (a, b, c) in row 2, got [1, 2]\n": ["validate", "[(1.5, -0.5, 0), (1, 2)]"],
    "diag: list: expected numbers or arithmetic on numbers, got S in line 1; write its value, code is not run\n": [
        "validate",
        "NS = [(1.5 / S, -0.5, 0)]",
    ],
    "diag: --name: x is none of NS\n": ["validate", "NS = [(1.5, -0.5, 0)]", "--name", "x"],
    "diag: --name: expected one or more of A, B, the lists in list; got none\n": ["validate", "A = [(1.5, -0.5, 0)]\nB = [(2, -1.5, .5)]"],
    "--family: nothing is none of matched, cubic, quintic, jordan, ": ["--family", "nothing"],
    "--output: expected a file that ends in .png or .svg, got figure.txt": ["--family", "cubic", "-o", "figure.txt"],
    "--output: the folder missing does not exist": ["--family", "cubic", "-o", "missing/figure.png"],
}


@pytest.mark.parametrize("message", ARGUMENTS)
def test_a_wrong_argument_is_named(diag, tmp_path, monkeypatch, message):
    monkeypatch.chdir(tmp_path)
    result = diag("ns", *ARGUMENTS[message])
    assert (result.exit_code, result.stdout) == (2, "")
    assert message in result.stderr
    assert list(tmp_path.iterdir()) == []


def test_names_in_code_are_shown_and_never_sent_to_the_terminal(diag):
    code = "SETS = {'\\x1b[31m': [(1.5, -0.5, 0)]}"
    result = diag("ns", "validate", code)
    assert result.exit_code == 0
    assert "\x1b" not in result.stdout + result.stderr
    assert "1b[31m: 1 step" in result.stdout
    assert "\x1b" not in diag("ns", "validate", f"{code}\nB = [(1, 2, 3)]").stderr
