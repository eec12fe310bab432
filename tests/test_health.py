"""The rules of pauses and quarantine, on times given by hand."""

import pytest

from stfuse._health import DeviceState, Quarantine


def test_a_lost_device_is_asked_again_after_pauses_that_double():
    state = DeviceState()
    assert state.probe_in_s(0.0) == 0.0
    pauses_s = []
    for _ in range(12):
        state.lose("gone", 100.0)
        pauses_s.append(state.probe_in_s(100.0))
    assert pauses_s[:4] == pytest.approx([0.1, 0.2, 0.4, 0.8])
    assert pauses_s[-1] == 30.0
    assert state.reason == "gone"
    state.recover()
    assert state.reason == ""
    state.lose("again", 0.0)
    assert state.probe_in_s(0.0) == pytest.approx(0.1)


def test_a_clock_that_jumps_back_does_not_prolong_a_pause():
    state = DeviceState()
    state.lose("gone", 3600.0)
    assert state.probe_in_s(0.0) == 0.0


def test_three_failures_in_a_row_put_a_job_in_quarantine_and_an_answer_before_not():
    quarantine = Quarantine()
    assert not quarantine
    for _ in range(5):
        assert not quarantine.blame("a", "boom", 0.0)
        assert not quarantine.blame("a", "boom", 0.0)
        assert not quarantine.release("a")  # it was answered
    assert not quarantine.blame("a", "boom", 0.0)
    assert not quarantine.blame("a", "boom", 0.0)
    assert quarantine.blame("a", "boom", 0.0)
    assert list(quarantine) == ["a"]
    assert quarantine.reason("a") == "3 of its requests failed in a row: boom"
    assert quarantine.reason("b") is None
    assert not quarantine.admits("a", 0.0, 0)
    assert quarantine.admits("b", 0.0, 99)


def test_after_a_pause_one_request_at_a_time_is_let_through():
    quarantine = Quarantine()
    for _ in range(3):
        quarantine.blame("a", "boom", 10.0)
    assert not quarantine.admits("a", 10.05, 0)
    assert quarantine.admits("a", 10.2, 0)
    assert not quarantine.admits("a", 10.2, 1)
    assert quarantine.blame("a", "boom", 11.0)  # that one failed as well
    assert not quarantine.admits("a", 11.19, 0)
    assert quarantine.admits("a", 11.3, 0)
    assert quarantine.release("a")
    assert quarantine.admits("a", 11.3, 99)
    assert not quarantine.blame("a", "boom", 12.0)  # it starts from nothing
