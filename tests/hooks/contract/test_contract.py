"""Every case of the contract suite is held to the same points, and the coverage document says what they came to."""

from functools import cache

import pytest

from contract import cases
from contract.document import parts, written_out
from contract.harness import Case, Result, run_case

CASES = {case.system: case for case in cases.CASES}


@cache
def result_of(system: str) -> Result:
    return run_case(CASES[system])


@pytest.fixture(params=CASES)
def case(request: pytest.FixtureRequest) -> Case:
    return CASES[request.param]


def test_training_is_bitwise_the_same(case: Case) -> None:
    assert result_of(case.system).neutral


def test_in_the_background_the_run_holds_the_same_to_the_bit(case: Case) -> None:
    assert result_of(case.system).behind


def test_one_record_per_real_step(case: Case) -> None:
    result = result_of(case.system)
    assert result.recorded == list(range(1, result.fired + 1))


def test_moments_are_those_of_an_independent_transcription(case: Case) -> None:
    result = result_of(case.system)
    for error, bound in ((result.momentum, case.momentum_bound), (result.second, case.second_bound), (result.update, case.update_bound)):
        assert error is None or error <= bound


def test_the_run_holds_what_was_read(case: Case) -> None:
    """Sizes of update (with and without decay), gradient and moments, from the test's own copies of the weights."""
    stored = result_of(case.system).stored
    assert {"update_rms", "grad_rms"} <= stored.keys()
    # All are float64 means over the same numbers; largest seen: 3e-15.
    assert max(stored.values()) < 1e-12


def test_quantiles_are_those_of_the_corrected_moments(case: Case) -> None:
    """v̂ and |m̂|/√v̂ by the transcription's own corrections, to the width of a bin; float32 moments can move a value into the next one."""
    for error in result_of(case.system).quantiles.values():
        assert error <= 2**-4 + 1e-3


def test_shares_under_eps_are_counted_exactly(case: Case) -> None:
    assert result_of(case.system).shares is not False


def test_the_transcriptions_correct_many_systems() -> None:
    """What the two tests above compare: nothing where a transcription does not say how it corrects."""
    compared = [result_of(system) for system in CASES]
    assert sum("second_moment_quantile" in result.quantiles for result in compared) >= 45
    assert sum("snr_quantile" in result.quantiles for result in compared) >= 20
    assert sum(result.shares is True for result in compared) >= 45


@pytest.mark.parametrize("system", [case.system for case in cases.CASES if case.newton_schulz])
def test_newton_schulz_input_is_bitwise_what_the_iteration_was_given(system: str) -> None:
    assert result_of(system).ns_input


@pytest.mark.parametrize("system", [case.system for case in cases.CASES if case.newton_schulz and case.replay])
def test_newton_schulz_output_is_the_update(system: str) -> None:
    result = result_of(system)
    assert result.replay is not None
    assert result.replay <= CASES[system].update_bound


def test_systems_are_named_once() -> None:
    assert len(CASES) == len(cases.CASES)


def test_the_coverage_document_is_what_was_just_measured() -> None:
    assert parts()[0] == written_out({case: result_of(case.system) for case in cases.CASES})
