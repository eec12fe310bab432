"""A lost device, a broken loop or builder: all that waits ends, health says so."""

import threading

import jax
import numpy as np
import pytest

import stfuse
from stfuse.testing import FakeDevice, ManualClock, affine_job
from tests.serving import ROW, busy_with, serve, wait_for


def lost(inputs):
    return RuntimeError("device lost")


def break_(device, how):
    if how == "launch":
        device.launch_error = lost
    elif how == "read":
        device.read_error = RuntimeError("device lost")
    else:
        device.corrupt = lambda outputs: [x if x is None else x + 1 for x in outputs]


def mend(device):
    device.launch_error = device.read_error = device.corrupt = None


def test_health_asks_a_canary_and_counts_the_jobs():
    clock = ManualClock()
    device = FakeDevice(clock, step_s=0.25)
    with serve(affine_job("a"), affine_job("b"), device=device, clock=clock) as engine:
        launches = device.num_launches
        health = engine.health(timeout_s=60)
        assert device.num_launches == launches + 1
        assert health == stfuse.Health(True, "", 0.25, 2, 2, 0, (), 0)
        assert engine.stats().steps == 0  # a canary is no tenant's
    health = engine.health(timeout_s=60)
    assert not health.is_healthy
    assert "closed" in health.reason


def test_health_needs_no_job():
    with stfuse.Engine(device=FakeDevice()) as engine:
        wait_for(lambda: engine.health(timeout_s=60).is_healthy)


def test_health_does_not_compile_anything():
    device = FakeDevice()
    with serve(affine_job("a"), device=device) as engine:
        compiles = device.num_compiles
        assert engine.health(timeout_s=60).is_healthy
        assert device.num_compiles == compiles


def test_health_of_a_stuck_device_says_no_in_bounded_time():
    device = FakeDevice()
    with serve(affine_job("a"), device=device) as engine:
        running = busy_with(engine, device, "a")
        health = engine.health(timeout_s=0.01)
        assert not health.is_healthy
        assert "within 0.01 s" in health.reason
        assert health.latency_s is None
        device.release()
        np.testing.assert_array_equal(running.result(60), ROW * 3)
        assert engine.health(timeout_s=60).is_healthy


def test_without_a_compiled_canary_health_says_why_and_later_recovers():
    device = FakeDevice()
    device.compile_error = MemoryError("too big")
    with stfuse.Engine(device=device) as engine:
        wait_for(lambda: "too big" in engine.health(timeout_s=60).reason)
        device.compile_error = None
        engine.add(affine_job("a")).result(60)
        assert engine.health(timeout_s=60).is_healthy


@pytest.mark.parametrize("how", ["launch", "read"])
def test_a_lost_device_ends_all_that_waits_and_nothing_is_taken(how):
    clock = ManualClock()
    device = FakeDevice()
    threads = threading.active_count()
    engine = serve(affine_job("a"), affine_job("b"), device=device, clock=clock)
    futures = [busy_with(engine, device, "a")]
    futures += [engine.submit(name, ROW) for name in "ab" * 20]
    launches = device.num_launches
    break_(device, how)
    device.release()
    failed = 0
    for future in futures:
        error = future.exception(60)
        if error is not None:
            failed += 1
            assert isinstance(error, stfuse.DeviceError)
            assert "device lost" in str(error)
    assert failed >= 40  # the first may have been read in time
    assert device.num_launches <= launches + 4  # not one by one: a canary told all
    wait_for(lambda: engine.stats().problem)
    with pytest.raises(stfuse.DeviceError, match=r"'a' is not served now.*lost"):
        engine.submit("a", ROW)
    stats = engine.stats()
    assert "device lost" in stats.problem
    assert stats.queued == 0
    assert stats.tenants["a"].unavailable == stats.tenants["a"].rejected == 1
    health = engine.health(timeout_s=60)
    assert not health.is_healthy
    assert "device lost" in health.reason
    assert health.quarantined == ()  # nobody is blamed for it
    engine.close()
    assert threading.active_count() == threads


@pytest.mark.parametrize("how", ["launch", "read", "corrupt"])
def test_a_device_that_comes_back_is_taken_back_by_health(how):
    clock = ManualClock()
    device = FakeDevice()
    with serve(affine_job("a"), device=device, clock=clock) as engine:
        break_(device, how)
        assert not engine.health(timeout_s=60).is_healthy
        with pytest.raises(stfuse.DeviceError):
            engine.submit("a", ROW)
        mend(device)
        with pytest.raises(stfuse.DeviceError):  # nobody asked it yet
            engine.submit("a", ROW)
        assert engine.health(timeout_s=60).is_healthy
        np.testing.assert_array_equal(engine.infer("a", ROW), ROW * 3)
        assert engine.stats().problem == ""


def test_a_device_that_comes_back_is_found_by_a_probe_after_a_pause():
    clock = ManualClock()
    device = FakeDevice()
    with serve(affine_job("a"), device=device, clock=clock) as engine:
        break_(device, "launch")
        assert not engine.health(timeout_s=60).is_healthy
        launches = device.num_launches
        clock.advance(0.05)
        clock.advance(0.06)  # the first pause is over: it is asked, in vain
        wait_for(lambda: device.num_launches == launches + 1)
        mend(device)
        clock.advance(30.0)
        wait_for(lambda: not engine.stats().problem)
        np.testing.assert_array_equal(engine.infer("a", ROW), ROW * 3)


def test_a_wrong_canary_takes_the_device_out_of_service():
    device = FakeDevice()
    with serve(affine_job("a"), device=device, clock=ManualClock()) as engine:
        break_(device, "corrupt")
        health = engine.health(timeout_s=60)
        assert (
            "answer is [[5.0, 6.0, 5.0]]; expected [[4.0, 5.0, 4.0]]" in health.reason
        )
        with pytest.raises(stfuse.DeviceError, match="canary"):
            engine.submit("a", ROW)


def test_the_canary_tells_a_bad_request_from_a_lost_device_cheaply():
    device = FakeDevice()
    jobs = [affine_job(f"j{i}") for i in range(16)]

    def breaks(inputs):
        found = any((leaf == 666).any() for leaf in jax.tree.leaves(inputs))
        return ValueError("boom") if found else None

    with serve(*jobs, device=device) as engine:
        device.launch_error = breaks
        running = busy_with(engine, device, "j0")
        futures = [
            engine.submit(f"j{i}", ROW * (666 if i == 5 else 1)) for i in range(16)
        ]
        launches = device.num_launches
        device.release()
        running.result(60)
        for i, future in enumerate(futures):
            if i == 5:
                assert "boom" in str(future.exception(60))
            else:
                np.testing.assert_array_equal(future.result(60), ROW * 3)
        # One step, its halves down to one request, and a canary for each that failed.
        assert device.num_launches - launches <= 1 + 2 * 4 + 5
        assert engine.health(timeout_s=60).is_healthy


class FaultyClock:
    """A clock that raises when told to."""

    def __init__(self):
        self.faults = 0

    def __call__(self):
        if self.faults and threading.current_thread().name == "stfuse-serve":
            self.faults -= 1
            raise OSError("no time")
        return 1.0


def test_an_error_of_the_loop_fails_what_waits_and_the_loop_begins_anew():
    clock, device = FaultyClock(), FakeDevice()
    with serve(affine_job("a"), device=device, clock=clock) as engine:
        futures = [busy_with(engine, device, "a")]
        futures += [engine.submit("a", ROW) for _ in range(9)]
        clock.faults = 1
        device.release()
        for future in futures:
            with pytest.raises(stfuse.DeviceError, match="failed, OSError: no time"):
                future.result(60)
        wait_for(lambda: not engine.stats().problem)
        np.testing.assert_array_equal(engine.infer("a", ROW), ROW * 3)
        assert engine.stats().restarts == 1
        assert engine.health(timeout_s=60).is_healthy
        assert engine.health(timeout_s=60).restarts == 1


def test_a_loop_that_fails_again_at_once_gives_up_and_still_closes():
    clock, device = FaultyClock(), FakeDevice()
    threads = threading.active_count()
    engine = serve(affine_job("a"), device=device, clock=clock)
    running = busy_with(engine, device, "a")
    clock.faults = 10**9
    device.release()
    with pytest.raises(stfuse.DeviceError, match="no time"):
        running.result(60)
    wait_for(lambda: "build a new one" in engine.stats().problem)
    with pytest.raises(stfuse.DeviceError, match="not served now"):
        engine.submit("a", ROW)
    assert not engine.health(timeout_s=60).is_healthy
    engine.close()
    assert threading.active_count() == threads


def test_a_broken_scheduler_ends_all_that_waits(monkeypatch):
    device = FakeDevice()
    engine = serve(affine_job("a"), device=device)
    futures = [busy_with(engine, device, "a")]
    futures += [engine.submit("a", ROW) for _ in range(9)]

    def broken(*_):
        raise KeyError("a bug")

    monkeypatch.setattr(engine._server.scheduler, "decide", broken)
    device.release()
    for future in futures[1:]:
        with pytest.raises(stfuse.DeviceError, match="a bug"):
            future.result(60)
    engine.close()


def test_a_broken_builder_refuses_its_jobs_and_builds_the_next(monkeypatch):
    with serve(affine_job("a")) as engine:
        builder = engine._builder
        update = builder._update

        def broken(lane):
            monkeypatch.setattr(builder, "_update", update)
            raise KeyError("a bug")

        monkeypatch.setattr(builder, "_update", broken)
        ready = engine.add(affine_job("b"))
        with pytest.raises(stfuse.DeviceError, match=r"'b' was refused.*a bug"):
            ready.result(60)
        wait_for(lambda: "b" not in engine.stats().tenants)
        engine.add(affine_job("b")).result(60)
        np.testing.assert_array_equal(engine.infer("b", ROW), ROW * 3)
        np.testing.assert_array_equal(engine.infer("a", ROW), ROW * 3)
