"""What the engine does when a deadline, a device, or a caller lets it down."""

import asyncio
import threading

import jax
import numpy as np
import pytest

import stfuse
from stfuse.testing import FakeDevice, ManualClock, affine_job
from tests.serving import ROW, busy_with, serve, wait_for


def test_an_expired_request_never_starts():
    clock = ManualClock()
    device = FakeDevice(step_s=0.0)
    with serve(affine_job("a"), device=device, clock=clock) as engine:
        first = busy_with(engine, device, "a")
        launches = device.num_launches
        late = engine.submit("a", ROW, deadline_s=1.0)
        clock.advance(2.0)
        device.release()
        with pytest.raises(stfuse.DeadlineError):
            late.result(60)
        first.result(60)
        assert device.num_launches == launches
        assert engine.stats().tenants["a"].expired == 1


def test_a_jobs_slo_is_its_requests_default_deadline():
    clock = ManualClock()
    device = FakeDevice()
    job = affine_job("a", slo_s=1.0)
    with serve(job, device=device, clock=clock) as engine:
        first = busy_with(engine, device, "a")
        late = engine.submit("a", ROW)
        patient = engine.submit("a", ROW, deadline_s=100.0)
        clock.advance(2.0)
        device.release()
        with pytest.raises(stfuse.DeadlineError):
            late.result(60)
        np.testing.assert_array_equal(patient.result(60), ROW * 3)
        first.result(60)
        assert engine.stats().tenants["a"].late == 1


@pytest.mark.parametrize("by_s", [3600.0, -3600.0])
def test_a_clock_that_jumps_breaks_nothing(by_s):
    clock = ManualClock(1e6)
    device = FakeDevice(clock)
    with serve(affine_job("a"), device=device, clock=clock) as engine:
        running = busy_with(engine, device, "a")
        clock.advance(by_s)
        device.release()
        np.testing.assert_array_equal(running.result(60), ROW * 3)
        np.testing.assert_array_equal(engine.infer("a", ROW), ROW * 3)
        assert engine.stats().tenants["a"].p50_s >= 0


def test_failure_17_a_clock_that_goes_back_holds_nobody_up():
    clock = ManualClock(1e6)
    options = {"device": FakeDevice(), "clock": clock, "max_queue_delay_s": 0.5}
    with serve(affine_job("a"), **options) as engine:
        waiting = engine.submit("a", ROW)  # for company
        clock.advance(-3600.0)
        np.testing.assert_array_equal(waiting.result(60), ROW * 3)


def test_infer_gives_up_in_time():
    device = FakeDevice()
    with serve(affine_job("a"), device=device) as engine:
        running = busy_with(engine, device, "a")
        with pytest.raises(stfuse.DeadlineError, match=r"job 'a'"):
            engine.infer("a", ROW, timeout_s=0.01)
        wait_for(lambda: engine.stats().queued == 0)
        device.release()
        running.result(60)


def test_asyncio_callers_are_served_and_may_give_up():
    device = FakeDevice()

    async def main(engine):
        answers = await asyncio.gather(
            *(engine.infer_async("a", ROW * i) for i in range(20))
        )
        for i, answer in enumerate(answers):
            np.testing.assert_array_equal(answer, ROW * (2 * i + 1))
        device.hold()
        stuck = [asyncio.ensure_future(engine.infer_async("a", ROW)) for _ in range(9)]
        await asyncio.sleep(0.05)
        for task in stuck:
            task.cancel()
        with pytest.raises(stfuse.DeadlineError):
            await engine.infer_async("a", ROW, timeout_s=0.01)
        results = await asyncio.gather(*stuck, return_exceptions=True)
        assert all(isinstance(r, asyncio.CancelledError) for r in results)
        device.release()
        return await engine.infer_async("a", ROW, timeout_s=60)

    with serve(affine_job("a"), device=device) as engine:
        np.testing.assert_array_equal(asyncio.run(main(engine)), ROW * 3)
        wait_for(lambda: engine.stats().queued == 0)


def test_a_job_that_does_not_compile_is_refused_and_the_others_go_on():
    device = FakeDevice()
    with serve(affine_job("a"), device=device) as engine:
        device.compile_error = MemoryError("too big")
        ready = engine.add(affine_job("b", width=5))
        doomed = engine.submit("b", np.ones((1, 5), np.float32))
        with pytest.raises(stfuse.DeviceError, match=r"job 'b'.*too big"):
            ready.result(60)
        with pytest.raises(stfuse.DeviceError):
            doomed.result(60)
        np.testing.assert_array_equal(engine.infer("a", ROW), ROW * 3)
        device.compile_error = None
        wait_for(lambda: "b" not in engine.stats().tenants)
        engine.add(affine_job("b", width=5)).result(60)


def broken(params, x):
    return jax.pure_callback(
        lambda y: _raise(), jax.typeof(x), x, vmap_method="sequential"
    )


def test_of_several_new_jobs_only_the_one_that_breaks_is_refused():
    device = FakeDevice()
    with serve(affine_job("old"), device=device) as engine:
        readies = [
            engine.add(affine_job("good")),
            engine.add(stfuse.Job("bad", broken, (), ROW)),
            engine.add(affine_job("fine", width=2)),
        ]
        readies[0].result(60)
        readies[2].result(60)
        with pytest.raises(stfuse.DeviceError, match="'bad'"):
            readies[1].result(60)
        for name in ("old", "good"):
            np.testing.assert_array_equal(engine.infer(name, ROW), ROW * 3)


def test_a_job_is_ready_though_one_that_came_after_it_is_refused():
    with stfuse.Engine() as engine:
        ready = engine.add(affine_job("good"))
        with pytest.raises(stfuse.DeviceError, match="'bad'"):
            engine.add(stfuse.Job("bad", broken, (), ROW)).result(60)
        ready.result(60)


def _raise():
    raise ValueError("this model cannot run")


def test_calls_that_would_wait_for_themselves_are_refused():
    caught = []

    def callback(future):
        for call in (lambda: engine.infer("a", ROW), engine.close):
            try:
                call()
            except RuntimeError as error:
                caught.append(str(error))

    device = FakeDevice()
    with serve(affine_job("a"), device=device) as engine:
        future = busy_with(engine, device, "a")
        future.add_done_callback(callback)
        device.release()
        wait_for(lambda: len(caught) == 2)
    assert all("callback" in text for text in caught)


@pytest.mark.parametrize(
    ("options", "text"),
    [
        ({"policy": "space"}, "policy is 'space'"),
        ({"max_batch_size": 0}, "max_batch_size is 0"),
        ({"batch_sizes": (2, 0)}, "batch_sizes is 0"),
        ({"batch_sizes": (2, 16)}, "batch_sizes has 16; max_batch_size is 8"),
        ({"max_slots": 1.5}, "max_slots is 1.5"),
        ({"max_queue_size": -1}, "max_queue_size is -1"),
        ({"max_queue_delay_s": -1.0}, "max_queue_delay_s is -1.0"),
        ({"max_device_bytes": 0}, "max_device_bytes is 0"),
        ({"max_device_bytes": 1e9}, "max_device_bytes is 1000000000.0"),
    ],
)
def test_a_wrong_option_is_named(options, text):
    with pytest.raises(ValueError, match=text):
        stfuse.Engine(**options)


def _expire(engine, device, clock):
    clock.advance(5.0)
    device.release()


def _close(engine, device, clock):
    threading.Timer(0.1, device.release).start()
    engine.close(drain=False)


def _lose(engine, device, clock):
    device.read_error = RuntimeError("gone")
    device.release()


@pytest.mark.parametrize(
    ("end", "kind"),
    [
        (_expire, stfuse.DeadlineError),
        (_close, stfuse.ClosedError),
        (_lose, stfuse.DeviceError),
    ],
)
def test_each_future_has_an_error_of_its_own_that_names_its_job(end, kind):
    clock = ManualClock()
    device = FakeDevice(clock)
    with serve(affine_job("a"), affine_job("b"), device=device, clock=clock) as engine:
        busy_with(engine, device, "a")
        futures = [(n, engine.submit(n, ROW, deadline_s=1.0)) for n in "abab"]
        end(engine, device, clock)
        errors = [(name, future.exception(60)) for name, future in futures]
    assert len({id(error) for _, error in errors}) == 4
    for name, error in errors:
        assert type(error) is kind and error.jobs == (name,)
        assert f"'{name}'" in str(error)
