"""How long threads' turns are while an engine serves or builds, and after."""

import math
import sys
import threading
import time
import types

import numpy as np
import pytest

from stfuse import Engine, QueueFullError, _turns
from stfuse._options import turns_of
from stfuse._turns import LONG_S, QUICK_S, OwnTurns, Refusals, Turns, giving_way
from stfuse.testing import FakeDevice, affine_job
from tests.serving import serve, wait_for


@pytest.fixture(autouse=True)
def interval():
    """Give the process's interval, and bring it back."""
    before_s = sys.getswitchinterval()
    yield before_s
    sys.setswitchinterval(before_s)


def now_s():
    return pytest.approx(sys.getswitchinterval())


def test_the_last_one_out_brings_the_interval_back(interval):
    turns = Turns()
    with turns.at_most(1e-3):
        assert now_s() == 1e-3
        with pytest.raises(ValueError), turns.at_most(1e-4):
            assert now_s() == 1e-4
            raise ValueError
        assert now_s() == 1e-3
    assert now_s() == interval


def test_the_shortest_counts_in_whatever_order_they_end(interval):
    turns = Turns()
    first, second = turns.at_most(1e-4), turns.at_most(1e-3)
    first.__enter__(), second.__enter__()
    assert now_s() == 1e-4
    first.__exit__(None, None, None)
    assert now_s() == 1e-3
    second.__exit__(None, None, None)
    assert now_s() == interval


def test_an_interval_that_is_short_or_set_meanwhile_stays():
    sys.setswitchinterval(2e-5)
    with Turns().at_most(1e-4):
        assert now_s() == 2e-5
        sys.setswitchinterval(0.02)
    assert now_s() == 0.02


def test_no_interval_changes_nothing(interval):
    with Turns().at_most(None):
        assert now_s() == interval


def test_turns_are_short_while_a_lane_is_compiled_and_only_then(interval):
    seen_s = []

    class Device(FakeDevice):
        def compile(self, step_fn, *specs):
            seen_s.append(sys.getswitchinterval())
            return super().compile(step_fn, *specs)

    with serve(affine_job("a", width=7), device=Device(), max_batch_size=2):
        # The canary's step comes first, before there is anybody to serve.
        assert len(seen_s) > 1 and max(seen_s[1:]) < interval
        wait_for(lambda: sys.getswitchinterval() == interval)


class Accelerator(FakeDevice):
    """One that says it is one, as a GPU does."""

    is_accelerator = True


@pytest.mark.parametrize(
    ("device", "asked_s", "serving_s"),
    [
        (FakeDevice, None, None),
        (Accelerator, None, LONG_S),
        (FakeDevice, 2e-3, 2e-3),
        (Accelerator, 2e-3, 2e-3),
    ],
)
def test_turns_while_an_engine_serves_and_after(device, asked_s, serving_s, interval):
    expected_s = serving_s or interval
    job, options = affine_job("a", width=7), {"switch_interval_s": asked_s}
    with serve(job, device=device(), max_batch_size=2, **options):
        wait_for(lambda: now_s() == expected_s)
    assert now_s() == interval


def test_two_engines_share_the_shorter_interval(interval):
    with Engine(device=FakeDevice(), switch_interval_s=2e-3):
        wait_for(lambda: now_s() == 2e-3)
        with Engine(device=FakeDevice(), switch_interval_s=1e-3):
            wait_for(lambda: now_s() == 1e-3)
        assert now_s() == 2e-3
    assert now_s() == interval


@pytest.mark.parametrize("wrong", [0, -1e-3, float("nan")])
def test_an_interval_must_be_a_time(wrong):
    with pytest.raises(ValueError, match="switch_interval_s is .*pass seconds > 0"):
        turns_of(wrong, FakeDevice())


def test_turns_are_short_for_a_while_where_somebody_uses_them_up(interval):
    turns = Turns()
    own = OwnTurns(LONG_S, is_choosing=True, turns=turns)
    with own.held():
        assert now_s() == LONG_S
        for i in range(64):  # now and then, as any thread may
            own.waited(LONG_S if i % 3 == 0 else 0.0, 0.0)
        assert now_s() == LONG_S
        at_s = 0.0
        for short_for_s in (1.0, 2.0, 4.0):
            for _ in range(16):
                own.waited(0.8 * LONG_S, at_s)
            assert now_s() == QUICK_S
            own.waited(QUICK_S, at_s + 0.99 * short_for_s)
            assert now_s() == QUICK_S
            at_s += short_for_s
            own.waited(QUICK_S, at_s)
            assert now_s() == LONG_S
        for _ in range(16):
            own.waited(0.0, at_s)  # it is gone: the next one is found as if the first
        for _ in range(16):
            own.waited(LONG_S, at_s)
        own.waited(QUICK_S, at_s + 1.0)
        assert now_s() == LONG_S
    assert now_s() == interval


def test_turns_that_were_asked_for_stay():
    own = OwnTurns(LONG_S, turns=Turns())
    with own.held():
        for _ in range(64):
            with own.watched():
                time.sleep(LONG_S)
        assert now_s() == LONG_S


def test_an_engine_beside_a_thread_that_never_waits_has_short_turns(interval):
    class Device(Accelerator):
        def launch(self, compiled, *arguments):
            time.sleep(1e-4)  # a call in which others have the interpreter
            return super().launch(compiled, *arguments)

    is_over, job = threading.Event(), affine_job("a", width=7)
    row = np.ones((1, 7), np.float32)

    def compute():
        while not is_over.is_set():
            pass

    with serve(job, device=Device(), max_batch_size=1) as engine:
        engine.infer("a", row)
        wait_for(lambda: now_s() == LONG_S)
        thread = threading.Thread(target=compute)
        thread.start()
        try:
            for _ in range(200):
                engine.infer("a", row, timeout_s=60)
                if now_s() == QUICK_S:
                    break
            assert now_s() == QUICK_S
        finally:
            is_over.set()
            thread.join()
    assert now_s() == interval


def one():
    return abs(1)


def called(seconds):
    """Call functions, Python's and others, for so much processor time."""
    end_s = time.thread_time() + seconds
    while time.thread_time() < end_s:
        one()


def is_watched():
    """Return whether this thread looks at the clock again and again."""
    if _turns._HAS_EVENTS:
        return threading.get_ident() in _turns._STARTED.looks
    return sys.getprofile() is not None


@pytest.fixture
def rests_s(monkeypatch):
    """Give the rests that are taken, which take no time."""
    found = []
    fake = types.SimpleNamespace(sleep=found.append, thread_time=time.thread_time)
    fake.monotonic = time.monotonic
    monkeypatch.setattr(_turns, "time", fake)
    return found


@pytest.mark.parametrize(("num", "least", "most"), [(1, 0.5, 1.7), (9, 2.0, 7.0)])
def test_who_gives_way_rests_many_times_as_long_as_it_runs(rests_s, num, least, most):
    with giving_way(True, lambda: num, 8):  # and longer if more than eight wait
        called(0.1)
    assert least < sum(rests_s) < most and max(rests_s) <= 0.05
    assert len(rests_s) > 20


def test_nobody_rests_while_nobody_is_served_or_waits(rests_s):
    with giving_way(False, lambda: 1, 0):
        assert not is_watched()
        called(0.01)
    with giving_way(True, lambda: 0, 0):
        called(0.01)
    assert rests_s == []


def test_only_the_thread_that_gives_way_is_watched_and_only_within(rests_s):
    seen = []
    with pytest.raises(ValueError), giving_way(True, lambda: 1, 0):
        thread = threading.Thread(target=lambda: seen.append(is_watched()))
        thread.start(), thread.join()
        assert is_watched()
        raise ValueError
    assert seen == [False] and not is_watched()


@pytest.mark.skipif(not _turns._HAS_EVENTS, reason="a profile function is a thread's")
def test_other_threads_are_heard_of_once_a_function():
    heard = []

    class Listener(_turns._Starts):
        def _started(self, code, *more):
            heard.append((threading.get_ident(), code))
            return super()._started(code, *more)

    listener, looks = Listener(), []
    listener._again_s = math.inf
    tools = [sys.monitoring.get_tool(i) for i in range(6)]

    def call():
        for _ in range(50):
            one()

    with listener.watched(lambda *_: looks.append(threading.get_ident())):
        thread = threading.Thread(target=call)
        thread.start(), thread.join()
        before = len(looks)
        call()
    others = [code for who, code in heard if who != threading.get_ident()]
    assert others.count(one.__code__) == 1 and others.count(call.__code__) == 1
    assert {*looks} == {threading.get_ident()} and len(looks) > before
    assert [sys.monitoring.get_tool(i) for i in range(6)] == tools
    num = len(heard)
    call()
    assert len(heard) == num

    for tool in _turns._TOOLS:
        sys.monitoring.use_tool_id(tool, "another")
    try:
        with listener.watched(lambda *_: looks.append(0)):
            call()
        assert 0 not in looks  # it rests no more, but does its work
    finally:
        for tool in _turns._TOOLS:
            sys.monitoring.free_tool_id(tool)


@pytest.mark.skipif(not _turns._HAS_EVENTS, reason="a profile function is a thread's")
def test_what_another_thread_switched_off_is_heard_of_again():
    listener, looks = _turns._Starts(), []

    def shared():
        pass

    def call(num):
        for _ in range(num):
            shared()

    with listener.watched(lambda code, _: looks.append(code)):
        thread = threading.Thread(target=call, args=(1,))
        thread.start(), thread.join()
        looks.clear()
        time.sleep(2 * _turns._AGAIN_S)
        one(), call(10)  # the first is heard of, whatever others ran
    assert looks.count(shared.__code__) == 10


@pytest.mark.skipif(not _turns._HAS_EVENTS, reason="a profile function is a thread's")
def test_several_threads_are_watched_each_for_itself():
    listener, seen = _turns._Starts(), {}
    both, done = threading.Barrier(2, timeout=60), threading.Barrier(2, timeout=60)

    def run(name, inner):
        with listener.watched(lambda *_: seen.setdefault(name, set()).add("outer")):
            both.wait()
            one()
            if inner:
                with listener.watched(lambda *_: seen[name].add("inner")):
                    one()
            done.wait()
            seen[name].discard("outer")
            one()

    threads = [threading.Thread(target=run, args=of) for of in (("a", True), ("b", 0))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert seen == {"a": {"outer", "inner"}, "b": {"outer"}}
    assert not listener.looks and listener.tool is None


def test_a_lane_is_built_politely_while_others_are_served():
    seen = []

    class Device(FakeDevice):
        def compile(self, step_fn, *specs):
            seen.append(is_watched())
            return super().compile(step_fn, *specs)

    with serve(affine_job("a", width=7), device=Device(), max_batch_size=2) as engine:
        assert not any(seen)
        ended = threading.Event()

        def ask():
            while not ended.is_set():
                engine.infer("a", np.ones((1, 7), "f"))

        thread = threading.Thread(target=ask)
        thread.start()
        try:
            wait_for(lambda: engine.stats().steps > 3)
            seen.clear()
            engine.add(affine_job("b", width=9)).result(60)
        finally:
            ended.set()
            thread.join()
        assert any(seen)


def test_who_is_refused_again_and_again_rests_for_each_and_others_do_not():
    refusals, now, rested_s, rests = Refusals(), 5.0, 0.0, 0
    for _ in range(9000):
        now += 1e-5  # as long as it takes to ask again
        rest_s = refusals.rest_s(now)
        now, rested_s, rests = now + rest_s, rested_s + rest_s, rests + (rest_s > 0)
    assert now - 5.0 == pytest.approx(9000 * 1e-4, rel=0.02)
    assert rests < 9000 / 7
    assert not any(refusals.rest_s(now + 2 * i * 1e-4) for i in range(1, 100))
    other: list[float] = []
    for _ in range(20):
        refusals.rest_s(now)
    thread = threading.Thread(target=lambda: other.append(refusals.rest_s(now)))
    thread.start()
    thread.join()
    assert other == [0.0] and refusals.rest_s(now) > 0


def test_a_thread_that_asks_a_full_queue_again_and_again_rests_most_of_the_time():
    device = FakeDevice()
    with serve(affine_job("a"), device=device, max_queue_size=1) as engine:
        device.hold()
        try:
            x = np.ones((1, 3), np.float32)
            kept = [engine.submit("a", x)]
            wait_for(lambda: device.num_launches > 0)
            start_s, num = time.perf_counter(), 0
            while num < 400:
                try:
                    kept.append(engine.submit("a", x))
                except QueueFullError:
                    num += 1
            assert time.perf_counter() - start_s > 0.9 * 400 * 1e-4
        finally:
            device.release()
        for future in kept:
            future.result(10)
