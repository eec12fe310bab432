"""A job whose requests fail alone is refused, alone, until it is mended."""

import numpy as np
import pytest

import stfuse
from stfuse.testing import FakeDevice, ManualClock, affine_job
from tests.serving import ROW, busy_with, serve

POISON = 666.0


@pytest.fixture
def clock():
    return ManualClock()


@pytest.fixture
def device():
    """Fail every step that has poison in it."""

    def error_of(inputs):
        found = any((x == POISON).any() for x in inputs if x is not None)
        return ValueError("boom") if found else None

    device = FakeDevice()
    device.launch_error = error_of
    return device


@pytest.fixture
def engine(device, clock):
    with serve(affine_job("a"), affine_job("b"), device=device, clock=clock) as engine:
        yield engine


def fail(engine, name, times):
    for _ in range(times):
        with pytest.raises(stfuse.DeviceError, match="boom"):
            engine.infer(name, ROW * POISON)


def test_three_failures_in_a_row_and_its_requests_are_refused(engine):
    fail(engine, "a", 2)
    np.testing.assert_array_equal(engine.infer("a", ROW), ROW * 3)
    fail(engine, "a", 3)  # an answer in between begins the count anew
    with pytest.raises(stfuse.DeviceError, match=r"'a' .*in quarantine.*boom.*Swap"):
        engine.submit("a", ROW)
    stats = engine.stats()
    assert "3 of its requests failed in a row: ValueError: boom" in (
        stats.tenants["a"].quarantine
    )
    assert stats.tenants["a"].unavailable == 1
    assert stats.tenants["a"].failed == 5
    assert stats.tenants["b"].quarantine is None
    health = engine.health(timeout_s=60)
    assert health.is_healthy
    assert health.quarantined == ("a",)
    np.testing.assert_array_equal(engine.infer("b", ROW), ROW * 3)


def test_what_it_has_queued_fails_at_once(engine, device):
    running = busy_with(engine, device, "b")
    # A slot's worth of rows each: the poison runs first, and the rest waits.
    poison = [engine.submit("a", np.repeat(ROW * POISON, 4, 0)) for _ in range(3)]
    queued = [engine.submit("a", np.repeat(ROW, 4, 0)) for _ in range(9)]
    device.release()
    running.result(60)
    for future in poison:
        with pytest.raises(stfuse.DeviceError, match="boom"):
            future.result(60)
    for future in queued:
        with pytest.raises(stfuse.DeviceError, match="in quarantine"):
            future.result(60)
    assert engine.stats().queued == 0


def test_a_swap_of_its_weights_frees_it(engine):
    fail(engine, "a", 3)
    engine.swap("a", affine_job("a", scale=5.0).params)
    assert engine.stats().tenants["a"].quarantine is None
    np.testing.assert_array_equal(engine.infer("a", ROW), ROW * 6)


def test_after_a_pause_an_answer_frees_it(engine, device, clock):
    fail(engine, "a", 3)
    clock.advance(1.0)
    device.hold()
    probe = engine.submit("a", ROW)
    with pytest.raises(stfuse.DeviceError, match="quarantine"):
        engine.submit("a", ROW)  # one at a time
    device.release()
    np.testing.assert_array_equal(probe.result(60), ROW * 3)
    assert engine.stats().tenants["a"].quarantine is None
    np.testing.assert_array_equal(engine.infer("a", ROW), ROW * 3)


def test_after_a_pause_a_failure_doubles_it(engine, clock):
    fail(engine, "a", 3)
    clock.advance(0.125)
    fail(engine, "a", 1)
    assert "4 of its" in engine.stats().tenants["a"].quarantine
    clock.advance(0.125)
    with pytest.raises(stfuse.DeviceError, match="quarantine"):
        engine.submit("a", ROW)
    clock.advance(0.125)
    np.testing.assert_array_equal(engine.infer("a", ROW), ROW * 3)


def test_a_name_that_is_used_again_starts_with_a_clean_sheet(engine):
    fail(engine, "a", 3)
    engine.remove("a")
    engine.add(affine_job("a")).result(60)
    np.testing.assert_array_equal(engine.infer("a", ROW), ROW * 3)


def test_one_that_fails_now_and_then_is_not_put_there(engine):
    for _ in range(5):
        fail(engine, "a", 2)
        np.testing.assert_array_equal(engine.infer("a", ROW), ROW * 3)
    assert engine.health(timeout_s=60).quarantined == ()
