"""Futures of requests behave as any future, though their condition is made late."""

import asyncio
import concurrent.futures
import threading
import time
from concurrent.futures import Future, InvalidStateError

import pytest

from stfuse._answers import Answer, Callbacks, settle


def answer(cancelled=None):
    return Answer(7, (lambda _: None) if cancelled is None else cancelled.append)


def test_it_has_all_that_a_future_has():
    """A Python whose futures keep something else must be seen here, not in service."""
    own = {"_made", "_number", "_on_cancel"}
    assert set(vars(answer())) - own == set(vars(Future())) - {"_condition"}


def test_it_makes_no_condition_unless_somebody_blocks():
    future, called = answer(), []
    future.add_done_callback(called.append)
    assert future.set_running_or_notify_cancel()
    future.set_result(3)
    assert future.done()
    assert called == [future]
    assert future.result() == 3 and future.exception() is None
    assert not future.cancelled()
    assert future._made is None


@pytest.mark.parametrize("outcome", [3, ValueError("no")])
def test_whoever_blocks_gets_the_outcome(outcome):
    future = answer()
    with concurrent.futures.ThreadPoolExecutor(1) as pool:
        waiting = pool.submit(future.exception, 60)
        while future._made is None:
            time.sleep(0.001)
        settle(future, outcome)
        found = waiting.result(60)
    assert found is (outcome if isinstance(outcome, Exception) else None)


def test_waiting_for_several_ends():
    futures = [answer() for _ in range(3)]
    timer = threading.Timer(0.05, lambda: [settle(f, 1) for f in futures])
    timer.start()
    done, _ = concurrent.futures.wait(futures, timeout=60)
    assert done == set(futures)
    assert set(concurrent.futures.as_completed(futures, timeout=60)) == set(futures)
    timer.join()


def test_a_coroutine_can_wait_for_it():
    async def main():
        future = answer()
        asyncio.get_running_loop().call_later(0.01, settle, future, 5)
        return await asyncio.wait_for(asyncio.wrap_future(future), 60)

    assert asyncio.run(main()) == 5


def test_cancelled_once_it_takes_no_outcome():
    cancelled = []
    future = answer(cancelled)
    assert future.cancel()
    assert future.cancelled()
    assert future.done()
    assert cancelled == [7]
    assert not future.set_running_or_notify_cancel()
    with pytest.raises(InvalidStateError):
        future.set_result(1)
    settle(future, 1)
    with pytest.raises(concurrent.futures.CancelledError):
        future.result()


@pytest.mark.parametrize("is_awaited", [False, True])
def test_a_second_outcome_is_refused(is_awaited):
    future = answer()
    if is_awaited:
        assert future._condition is future._condition
    future.set_result(1)
    with pytest.raises(InvalidStateError):
        future.set_result(2)
    assert future.result() == 1


def test_running_it_cannot_be_cancelled():
    future = answer()
    assert future.set_running_or_notify_cancel()
    assert future.running()
    assert not future.cancel()
    future.set_result(1)
    assert not future.cancel()


def test_a_callback_comes_once_however_late_it_was_added():
    """Two threads race: one adds callbacks, the other gives the result."""
    for _ in range(200):
        future, called = answer(), []
        gate = threading.Barrier(2)

        def finish(future=future, gate=gate):
            gate.wait()
            future.set_result(1)

        thread = threading.Thread(target=finish)
        thread.start()
        gate.wait()
        for _ in range(5):
            future.add_done_callback(called.append)
        thread.join()
        assert called == [future] * 5


def test_cancelling_and_answering_at_once_has_one_winner():
    for _ in range(200):
        cancelled = []
        future, gate = answer(cancelled), threading.Barrier(2)

        def finish(future=future, gate=gate):
            gate.wait()
            settle(future, 1)

        thread = threading.Thread(target=finish)
        thread.start()
        gate.wait()
        was_cancelled = future.cancel()
        thread.join()
        assert future.cancelled() == was_cancelled == bool(cancelled)
        assert was_cancelled or future.result() == 1


def test_what_has_no_callback_is_resolved_at_once():
    callbacks, called = Callbacks(), []
    plain, other = answer(), answer()
    other.add_done_callback(called.append)
    callbacks.resolve([(plain, 1), (other, 2)])
    assert plain.result() == 1
    assert not other.done()
    callbacks.close()
    callbacks.run()
    assert called == [other]
