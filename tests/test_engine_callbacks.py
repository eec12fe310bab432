"""Callbacks that raise or block, requests that are cancelled: nobody else notices."""

import asyncio
import concurrent.futures
import threading

import numpy as np
import pytest

import stfuse
from stfuse.testing import FakeDevice, affine_job
from tests.serving import ROW, busy_with, serve, wait_for


@pytest.mark.parametrize("error", [ValueError, SystemExit, KeyboardInterrupt])
def test_a_callback_that_raises_harms_nobody(error):
    called = []

    def raise_(future):
        called.append(future)
        raise error("from a callback")

    device = FakeDevice()
    with serve(affine_job("a"), affine_job("b"), device=device) as engine:
        running = busy_with(engine, device, "a")
        futures = [engine.submit(name, ROW) for name in "ab" * 5]
        for future in futures[::2]:
            future.add_done_callback(raise_)
        device.release()
        for future in (running, *futures):
            np.testing.assert_array_equal(future.result(60), ROW * 3)
        wait_for(lambda: len(called) == 5)
        np.testing.assert_array_equal(engine.infer("b", ROW), ROW * 3)
        assert engine.stats().restarts == 0


def test_a_callback_that_blocks_stops_neither_the_device_nor_the_others():
    gate, is_blocked = threading.Event(), threading.Event()

    def block(_):
        is_blocked.set()
        assert gate.wait(60)

    device = FakeDevice()
    with serve(affine_job("a"), affine_job("b"), device=device) as engine:
        running = busy_with(engine, device, "a")
        running.add_done_callback(block)
        device.release()
        assert is_blocked.wait(60)
        for _ in range(20):
            for name in "ab":
                np.testing.assert_array_equal(engine.infer(name, ROW), ROW * 3)
        assert engine.health(timeout_s=60).is_healthy
        late = []
        patient = engine.submit("a", ROW)
        patient.add_done_callback(late.append)
        # Nor what another event loop awaits.
        answer = asyncio.run(asyncio.wait_for(engine.infer_async("b", ROW), 60))
        np.testing.assert_array_equal(answer, ROW * 3)
        gate.set()
        wait_for(lambda: late == [patient])  # in its turn
        assert running.done()


def test_a_callback_may_submit():
    done = threading.Event()
    answers = []

    def again(future):
        answers.append(future.result())
        if len(answers) == 5:
            done.set()
        else:
            engine.submit("a", ROW).add_done_callback(again)

    with serve(affine_job("a")) as engine:
        engine.submit("a", ROW).add_done_callback(again)
        assert done.wait(60)
    assert all((answer == ROW * 3).all() for answer in answers)


def test_closing_runs_the_callbacks_that_are_left():
    device, called = FakeDevice(), []
    engine = serve(affine_job("a"), device=device)
    futures = [busy_with(engine, device, "a")]
    futures += [engine.submit("a", ROW) for _ in range(9)]
    for future in futures:
        future.add_done_callback(called.append)
    device.release()
    engine.close()
    assert called == futures


@pytest.mark.parametrize("stage", ["queued", "running", "answered", "closed"])
def test_a_request_may_be_cancelled_at_any_stage(stage):
    device = FakeDevice()
    engine = serve(affine_job("a"), device=device)
    running = busy_with(engine, device, "a")
    queued = engine.submit("a", ROW)
    after = engine.submit("a", ROW)
    one = queued if stage in ("queued", "closed") else running
    if stage == "answered":
        device.release()
        running.result(60)
    if stage == "closed":
        closer = threading.Thread(target=engine.close)
        closer.start()
        wait_for(lambda: engine._server.is_closed)
    is_free = stage in ("queued", "closed")
    assert one.cancel() == is_free
    assert one.cancel() == is_free  # as often as one likes
    device.release()
    # `wait` sees a cancelled future only if somebody told it.
    done, _ = concurrent.futures.wait([running, queued, after], timeout=60)
    assert len(done) == 3
    assert queued.cancelled() == is_free
    np.testing.assert_array_equal(after.result(0), ROW * 3)
    engine.close()
    assert not engine._server.books._requests
    assert engine.stats().queued == 0


def test_an_owner_who_cancels_beside_the_launch_is_told_once():
    with serve(affine_job("a"), max_queue_size=10**6) as engine:
        futures = []
        for _ in range(300):
            futures.append(engine.submit("a", ROW))
            futures[-1].cancel()  # before, during or after its launch
        done, _ = concurrent.futures.wait(futures, timeout=60)
        assert len(done) == len(futures)
        wait_for(lambda: not engine._server.books._requests)
        stats = engine.stats().tenants["a"]
        assert stats.served + stats.cancelled == len(futures)
        assert stats.cancelled == sum(future.cancelled() for future in futures)


def test_a_cancelled_task_frees_its_place():
    device = FakeDevice()

    async def main(engine):
        running = busy_with(engine, device, "a")
        tasks = [asyncio.ensure_future(engine.infer_async("a", ROW)) for _ in range(4)]
        await asyncio.sleep(0)  # they submit
        assert engine.stats().queued == 4
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        await asyncio.sleep(0)
        assert engine.stats().queued == 0
        assert engine.stats().tenants["a"].cancelled == 4
        device.release()
        return await asyncio.wrap_future(running)

    with serve(affine_job("a"), device=device) as engine:
        np.testing.assert_array_equal(asyncio.run(main(engine)), ROW * 3)


@pytest.mark.parametrize("drains", [(True, False), (False, True), (True, True)])
def test_closes_that_overlap_all_return(drains):
    device = FakeDevice()
    engine = serve(affine_job("a"), device=device)
    futures = [busy_with(engine, device, "a")]
    futures += [engine.submit("a", ROW) for _ in range(9)]
    closers = [threading.Thread(target=engine.close, args=(d,)) for d in drains]
    for closer in closers:
        closer.start()
    wait_for(lambda: engine._server.is_closed)
    with pytest.raises(stfuse.ClosedError):
        engine.submit("a", ROW)
    device.release()
    for closer in closers:
        closer.join(60)
        assert not closer.is_alive()
    for future in futures:
        assert future.done()
        error = future.exception(0)
        assert error is None or isinstance(error, stfuse.ClosedError)
    if all(drains):
        assert all(future.exception(0) is None for future in futures)
    engine.close()
    engine.close(drain=False)


def test_closing_gives_up_on_a_device_that_is_stuck():
    device = FakeDevice()
    engine = serve(affine_job("a"), device=device)
    futures = [busy_with(engine, device, "a")]
    futures += [engine.submit("a", ROW) for _ in range(9)]
    engine.close(timeout_s=0.0)
    for future in futures:
        assert isinstance(future.exception(0), stfuse.ClosedError)
    device.release()
    engine.close()  # and now the thread can be joined
    assert not any(thread.is_alive() for thread in engine._threads)
