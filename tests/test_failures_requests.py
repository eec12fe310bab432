"""FAILURES rows 5, 15 and 16: one bad request, cancellation, closing under load."""

import asyncio
import threading

import jax
import numpy as np
import pytest

import stfuse
from stfuse.testing import FakeDevice, affine_job
from tests.serving import ROW, assert_idle, busy_with, serve, wait_for

BAD = 666.0  # an input, whose answer at scale 2 and shift 1 is 1333


def fail_on_bad(device, how):
    """Have every step that holds the bad row fail, at its launch or at its read."""

    def breaks(arrays, value):
        return any((x == value).any() for x in jax.tree.leaves(arrays))

    def corrupt(outputs):
        if breaks(outputs, 2 * BAD + 1):
            raise ValueError("boom")
        return outputs

    if how == "launch":
        device.launch_error = lambda inputs: (
            ValueError("boom") if breaks(inputs, BAD) else None
        )
    else:
        device.corrupt = corrupt


def submit_some(engine, rng, count, num_jobs):
    """Submit requests of random jobs, rows and values; return inputs and futures."""
    found = []
    for _ in range(count):
        x = rng.integers(1, 100, (rng.integers(1, 4), 3)).astype(np.float32)
        found.append((x, engine.submit(f"j{rng.integers(num_jobs)}", x)))
    return found


def assert_answered(requests):
    for x, future in requests:
        np.testing.assert_array_equal(future.result(60), 2 * x + 1)


def jobs(count):
    return [affine_job(f"j{i}") for i in range(count)]


@pytest.mark.parametrize("how", ["launch", "read"])
def test_failure_05_a_request_that_breaks_its_step_fails_alone(how, seed):
    rng, device = np.random.default_rng(seed), FakeDevice()
    with serve(*jobs(8), device=device) as engine:
        fail_on_bad(device, how)
        for _ in range(4):
            running = busy_with(engine, device, "j0")
            before = submit_some(engine, rng, rng.integers(0, 16), 8)
            bad = np.where(rng.random((2, 3)) < 0.5, np.float32(BAD), np.float32(1))
            bad.flat[rng.integers(6)] = BAD
            culprit = f"j{rng.integers(8)}"
            failing = engine.submit(culprit, bad)
            after = submit_some(engine, rng, rng.integers(0, 16), 8)
            device.release()
            with pytest.raises(stfuse.DeviceError, match="boom") as caught:
                failing.result(60)
            assert caught.value.jobs == (culprit,)
            assert_answered([(ROW, running), *before, *after])
            engine.infer(culprit, ROW)  # so that it is not put in quarantine
        assert sum(t.failed for t in engine.stats().tenants.values()) == 4
        assert_idle(engine)


@pytest.mark.parametrize("how", ["launch", "read"])
def test_failure_05_a_failed_step_is_retried_by_halves_once(how):
    device = FakeDevice()
    with serve(*jobs(8), device=device) as engine:
        fail_on_bad(device, how)
        running = busy_with(engine, device, "j0")
        rows = [ROW * (BAD if i == 5 else 1) for i in range(8)]
        futures = [engine.submit(f"j{i}", rows[i]) for i in range(1, 8)]
        launches = device.num_launches
        device.release()
        running.result(60)
        for i, future in enumerate(futures, 1):
            assert (future.exception(60) is None) == (i != 5)
        # The step of seven, two at each of three levels, a canary for each failed one.
        assert device.num_launches - launches <= 1 + 2 * 3 + 4
        assert_idle(engine)


def test_failure_15_a_request_cancelled_before_staging_frees_its_place(seed):
    rng, device = np.random.default_rng(seed), FakeDevice()
    with serve(*jobs(3), device=device, max_queue_size=8) as engine:
        running = busy_with(engine, device, "j0")
        for _ in range(20):  # the queue has room for 8
            queued = [engine.submit("j1", ROW) for _ in range(8)]
            with pytest.raises(stfuse.QueueFullError):
                engine.submit("j1", ROW)
            for i in rng.permutation(8):
                assert queued[i].cancel() and queued[i].cancelled()
            assert engine.stats().queued == 0
        kept = submit_some(engine, rng, 3, 3)
        dropped = [engine.submit("j2", ROW * BAD) for _ in range(5)]
        fail_on_bad(device, "launch")  # to find out whether one of them was staged
        assert all(future.cancel() for future in dropped)
        assert not running.cancel()  # it is on the device already
        device.release()
        assert_answered([(ROW, running), *kept])
        stats = engine.stats()
        assert stats.tenants["j1"].cancelled == 160
        assert stats.tenants["j2"].cancelled == 5
        assert sum(t.failed for t in stats.tenants.values()) == 0
        assert_idle(engine)


def test_failure_15_a_request_cancelled_at_any_stage_harms_no_other(seed):
    """Queued, being launched, being read, or answered: its owner may give up."""
    rng, device = np.random.default_rng(seed), FakeDevice()
    tried = {"queued": 0, "launch": 0, "read": 0, "answered": 0}
    given_up = []

    def cancel(stage):
        for future in [future for of, future in given_up if of == stage]:
            future.cancel()
            tried[stage] += 1

    with serve(*jobs(4), device=device) as engine:
        device.launch_error = lambda inputs: cancel("launch")
        device.corrupt = lambda outputs: cancel("read") or outputs
        for _ in range(10):
            given_up.clear()
            running = busy_with(engine, device, "j0")
            others = []
            for stage in rng.choice(list(tried), 12):
                others += submit_some(engine, rng, 2, 4)
                given_up.append((stage, engine.submit(f"j{rng.integers(4)}", ROW)))
            cancel("queued")
            device.release()
            assert_answered([(ROW, running), *others])
            for stage, future in given_up:
                wait_for(future.done)
                assert future.cancelled() or stage != "queued"
                if not future.cancelled():
                    np.testing.assert_array_equal(future.result(), ROW * 3)
            cancel("answered")
            assert_idle(engine)
        cancelled = sum(t.cancelled for t in engine.stats().tenants.values())
        served = sum(t.served for t in engine.stats().tenants.values())
    assert all(tried.values()), tried
    assert served + cancelled == 10 * (1 + 12 + 24)


def test_failure_15_a_cancelled_task_of_asyncio_frees_its_place(seed):
    rng, device = np.random.default_rng(seed), FakeDevice()

    async def round_trip(engine):
        device.hold()
        tasks = [
            asyncio.ensure_future(engine.infer_async(f"j{i % 3}", ROW))
            for i in range(24)
        ]
        await asyncio.sleep(0)  # all of them are submitted now
        given_up = set(rng.choice(24, 12, replace=False).tolist())
        for i in given_up:
            tasks[i].cancel()
        await asyncio.sleep(0)
        device.release()
        found = await asyncio.gather(*tasks, return_exceptions=True)
        for i, answer in enumerate(found):
            if i in given_up:
                assert isinstance(answer, asyncio.CancelledError)
            else:
                np.testing.assert_array_equal(answer, ROW * 3)

    with serve(*jobs(3), device=device) as engine:
        for _ in range(10):
            asyncio.run(round_trip(engine))
        wait_for(lambda: not engine._server.books._requests)
        assert_idle(engine)


def test_failure_15_a_job_whose_requests_were_all_cancelled_can_be_removed():
    device = FakeDevice()
    with serve(*jobs(2), device=device) as engine:
        running = busy_with(engine, device, "j0")
        waiting = [engine.submit("j1", ROW) for _ in range(9)]
        remover = threading.Thread(target=engine.remove, args=("j1",))
        remover.start()
        wait_for(lambda: "j1" not in engine.stats().tenants or _leaves(engine, "j1"))
        assert all(future.cancel() for future in waiting)
        device.release()
        remover.join(60)
        assert not remover.is_alive()
        assert_answered([(ROW, running)])
        assert_idle(engine)


def _leaves(engine, name):
    tenant = engine._server.tenants.get(name)
    return tenant is None or tenant.is_leaving


ENDS = {
    "drain": {},
    "drop": {"drain": False},
    "drain in time": {"timeout_s": 60.0},
    "drop in time": {"drain": False, "timeout_s": 60.0},
}


def test_failure_16_closing_answers_what_is_queued():
    device = FakeDevice()
    engine = serve(*jobs(2), device=device)
    running = busy_with(engine, device, "j0")
    waiting = [engine.submit(f"j{i % 2}", ROW) for i in range(20)]
    device.release()
    engine.close()
    for future in (running, *waiting):
        np.testing.assert_array_equal(future.result(0), ROW * 3)
    assert_idle(engine)


def test_failure_16_closing_without_draining_fails_what_is_queued():
    device = FakeDevice()
    engine = serve(*jobs(2), device=device)
    running = busy_with(engine, device, "j0")
    waiting = [engine.submit(f"j{i % 2}", ROW) for i in range(9)]
    closer = threading.Thread(target=engine.close, kwargs={"drain": False})
    closer.start()
    wait_for(lambda: all(f.done() for f in waiting))
    device.release()
    closer.join(60)
    assert not closer.is_alive()
    np.testing.assert_array_equal(running.result(0), ROW * 3)
    assert all(isinstance(f.exception(0), stfuse.ClosedError) for f in waiting)
    assert_idle(engine)


def test_failure_16_a_closed_engine_says_so_and_leaves_no_thread():
    before = threading.active_count()
    engine = serve(*jobs(1))
    engine.close()
    assert threading.active_count() == before
    for call in (
        lambda: engine.submit("j0", ROW),
        lambda: engine.infer("j0", ROW),
        lambda: engine.add(affine_job("b")),
        lambda: engine.swap("j0", affine_job("j0").params),
        lambda: engine.remove("j0"),
    ):
        with pytest.raises(stfuse.ClosedError, match="closed"):
            call()


def test_failure_16_a_drain_ends_at_its_limit_though_the_device_is_stuck():
    device, threads = FakeDevice(), threading.active_count()
    engine = serve(*jobs(2), device=device)
    running = busy_with(engine, device, "j0")
    waiting = [engine.submit(f"j{i % 2}", ROW) for i in range(9)]
    engine.close(timeout_s=0.01)
    for future in (running, *waiting):
        assert isinstance(future.exception(0), stfuse.ClosedError)
    device.release()
    wait_for(lambda: threading.active_count() == threads)
    engine.close()
    assert_idle(engine)


def test_failure_16_closing_while_a_lane_is_built_ends_every_future():
    engine = stfuse.Engine()
    ready = engine.add(affine_job("a"))
    future = engine.submit("a", ROW)
    engine.close()
    np.testing.assert_array_equal(future.result(0), ROW * 3)
    assert ready.done()


@pytest.mark.parametrize("end", ENDS.values(), ids=ENDS)
def test_failure_16_any_order_of_submit_and_close_ends_every_future(end, seed):
    """Callers race with two closes; what was taken ends, what was not is refused."""
    rng, threads = np.random.default_rng(seed), threading.active_count()
    device = FakeDevice()
    engine = serve(*jobs(3), device=device)
    taken, refused = [], []
    close_after = rng.integers(1, 60)

    def call(seed):
        own = np.random.default_rng(seed)
        for _ in range(40):
            try:
                taken.extend(submit_some(engine, own, 1, 3))
            except stfuse.ClosedError:
                refused.append(1)

    def close():
        wait_for(lambda: len(taken) >= close_after)
        engine.close(**end)

    if rng.integers(2):
        device.hold()
    seeds = [(seed, i) for i in range(3)]
    racing = [threading.Thread(target=call, args=(own,)) for own in seeds]
    racing += [threading.Thread(target=close) for _ in range(2)]
    for thread in racing:
        thread.start()
    wait_for(lambda: engine._server.is_closed)
    device.release()
    for thread in racing:
        thread.join(60)
        assert not thread.is_alive()
    engine.close()
    assert len(taken) + len(refused) == 120
    is_drained = end.get("drain", True)
    for x, future in taken:
        assert future.done()
        if is_drained or future.exception() is None:
            np.testing.assert_array_equal(future.result(), 2 * x + 1)
        else:
            assert isinstance(future.exception(), stfuse.ClosedError)
    assert threading.active_count() == threads
    assert_idle(engine)
