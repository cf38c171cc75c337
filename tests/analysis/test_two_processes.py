"""A run analysed by two processes gives what one gives."""

from optiscope.analysis import STUDIES, open_run
from optiscope.analysis.report import two_processes
from optiscope.analysis.report.folder import analyse_study, found_in


def test_two_processes_write_and_say_what_one_does(recorded, tmp_path):
    run = open_run(recorded)
    said = {name: analyse_study(run, name, tmp_path / "one", required=False) for name in STUDIES}
    done = dict(two_processes.analysed(run, recorded, tmp_path / "two", STUDIES))
    assert done == {**said, two_processes.FINDINGS: found_in(run)}
    written = [{f.name: f.read_bytes() for f in (tmp_path / kind).iterdir()} for kind in ("one", "two")]
    assert written[0] == written[1]


def test_a_second_process_is_for_large_runs(build_run, monkeypatch):
    run = build_run({"layers.0.attn.q_proj.weight": {"sigma": (2.0, 1.0)}})
    monkeypatch.setattr(two_processes.os, "sched_getaffinity", lambda _: {0, 1}, raising=False)
    assert not two_processes.pays(run)
    monkeypatch.setattr(two_processes, "LARGE", 3)
    assert two_processes.pays(run)
    monkeypatch.setattr(two_processes.os, "sched_getaffinity", lambda _: {0}, raising=False)
    assert not two_processes.pays(run)


def test_without_the_second_process_this_one_makes_all(recorded, tmp_path):
    run = open_run(recorded)
    done = dict(two_processes.analysed(run, recorded.with_name("moved away"), tmp_path, ("spikes", "weight_decay")))
    assert set(done) == {"spikes", "weight_decay", two_processes.FINDINGS}
