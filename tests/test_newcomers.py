"""Jobs that come while the builder is at something long are served meanwhile."""

import contextlib
import threading

import jax.numpy as jnp
import numpy as np
import pytest

import stfuse
from stfuse import _lane
from stfuse.testing import FakeDevice, ManualClock, affine_job
from tests.serving import assert_idle, serve, wait_for
from tests.test_siblings import ROW, assert_all_answer, expected, job, lane_of


class Slow(FakeDevice):
    """Compiles nothing while it is held up."""

    def __init__(self):
        super().__init__()
        self.may_compile, self.is_asked = threading.Event(), threading.Event()
        self.may_compile.set()
        self.left = 0

    def compile(self, step_fn, *specs):
        self.left -= 1
        if self.left < 0:
            self.is_asked.set()
            assert self.may_compile.wait(60)
        return super().compile(step_fn, *specs)

    @contextlib.contextmanager
    def held_up(self, after=0):
        """Hold up whatever is compiled from now on, after so many steps, while in."""
        self.left = after
        self.is_asked.clear()
        self.may_compile.clear()
        try:
            yield
        finally:
            self.may_compile.set()


def other(i, **options):
    """Return a job of another program."""
    return affine_job(f"o{i}", scale=i + 1.0, width=9, **options)


def serving(num, device, **options):
    options = {"max_batch_size": 1, **options}
    return serve(*map(job, range(num)), device=device, **options)


def test_who_comes_while_a_lane_grows_is_served_where_the_first_one_is():
    device = Slow()
    with serving(4, device) as engine:
        with device.held_up():
            ready = [engine.add(job(4))]
            assert device.is_asked.wait(60)
            for i in (5, 6):
                ready.append(engine.add(job(i)))
                np.testing.assert_array_equal(engine.infer(f"t{i}", ROW), expected(i))
            assert lane_of(engine, 4) == lane_of(engine, 5) == lane_of(engine, 6)
            assert len(engine._server.lanes) == 2
            assert_all_answer(engine, range(7))
            assert not any(each.done() for each in ready)
        for each in ready:
            each.result(60)
        assert {lane_of(engine, i) for i in range(7)} == {"all"}
        assert set(engine._server.lanes) == {"all"}
        assert_all_answer(engine, range(7))
        assert_idle(engine)


def test_a_free_slot_is_taken_while_a_bucket_is_compiled():
    device, jobs = Slow(), [*map(job, range(3))]
    with stfuse.Engine(device=device, max_batch_size=4) as engine:
        wait_for(lambda: engine._server.faults.canary._lane)  # compiled, too
        with device.held_up(after=1):
            with engine._server.lock:  # so that the builder sees all at once
                ready = [engine.add(each) for each in jobs]
            assert_all_answer(engine, range(3))
            assert device.is_asked.wait(60)
            ready.append(engine.add(job(3)))
            np.testing.assert_array_equal(engine.infer("t3", ROW), expected(3))
            assert lane_of(engine, 3) == "all" and len(engine._server.lanes) == 1
            assert not any(each.done() for each in ready)
        for each in ready:
            each.result(60)
        assert_all_answer(engine, range(4))
        assert_idle(engine)


def test_a_lane_that_is_replaced_takes_nobody_in():
    device = Slow()
    with serving(3, device) as engine:  # of four slots
        with device.held_up(after=1):  # a small lane comes first
            ready = [engine.add(other(0))]  # the lane is built anew for this one
            assert device.is_asked.wait(60)
            assert engine._builder._siblings._replaced == "all"
            ready.append(engine.add(job(3)))
            np.testing.assert_array_equal(engine.infer("t3", ROW), expected(3))
        for each in ready:
            each.result(60)
        assert lane_of(engine, 3) == "all"
        assert_all_answer(engine, range(4))
        assert_idle(engine)


def test_who_joins_before_a_lane_is_replaced_is_in_the_next_one(monkeypatch):
    device, joined = Slow(), threading.Event()
    with serving(3, device) as engine:
        siblings = engine._builder._siblings
        replacing = siblings.replacing

        def late(name, tenants):
            if name == "all" and not joined.is_set():
                joined.set()  # as the other thread does, just before
                with engine._server.lock:
                    tenant = engine._server.tenants["t3"]
                siblings.place(engine._server.lanes["all"], tenant)
                assert tenant.is_placed and tenant.lane == "all"
                tenants = [t for t in tenants if t is not tenant]
            return replacing(name, tenants)

        monkeypatch.setattr(siblings, "replacing", late)
        with engine._server.lock:
            ready = [engine.add(other(0))]
            ready.append(engine.add(job(3)))
            tenant = engine._server.tenants["t3"]
            tenant.home = "elsewhere"  # the builder leaves it alone
        wait_for(joined.is_set)
        ready[0].result(60)
        assert lane_of(engine, 3) == "all"
        assert_all_answer(engine, range(4))
        assert len(engine._server.lanes["all"].places) == 5


def test_who_is_not_asked_waits_for_the_builder():
    device = Slow()
    with serving(4, device) as engine:
        with device.held_up():
            engine.add(job(4))
            assert device.is_asked.wait(60)
            ready, tenant = engine.add(job(5)), engine._server.tenants["t5"]
            with pytest.raises(TimeoutError):
                ready.result(0.3)
            assert not tenant.is_placed
            np.testing.assert_array_equal(engine.infer("t5", ROW), expected(5))
            assert tenant.is_placed
        ready.result(60)


def test_a_full_lane_gets_a_sibling_while_something_is_compiled():
    device = Slow()
    with serving(2, device, max_slots=2) as engine:
        with device.held_up():
            engine.add(other(0))
            assert device.is_asked.wait(60)
            ready = engine.add(job(2))
            np.testing.assert_array_equal(engine.infer("t2", ROW), expected(2))
        ready.result(60)
        assert_all_answer(engine, range(3))
        assert_idle(engine)


def test_another_program_waits_and_a_device_that_fails_costs_nobody_an_answer(
    monkeypatch,
):
    device = Slow()
    with serving(4, device) as engine:

        def fail(*_):
            raise RuntimeError("no memory")

        with device.held_up():
            engine.add(job(4))
            assert device.is_asked.wait(60)
            row = np.ones((1, 9), np.float32)
            waiting = [engine.submit("o1", row)] if engine.add(other(1)) else []
            with monkeypatch.context() as patch:
                patch.setattr(_lane, "staged", fail)
                patch.setattr(_lane, "sibling", fail)
                engine.add(job(5))
                waiting.append(engine.submit("t5", ROW))
                assert_all_answer(engine, range(5))
                with pytest.raises(TimeoutError):
                    waiting[1].result(0.3)
        np.testing.assert_array_equal(waiting[0].result(60), row * 2 + 1)
        np.testing.assert_array_equal(waiting[1].result(60), expected(5))
        assert_idle(engine)


@pytest.mark.parametrize("drain", [False, True])
def test_an_engine_is_closed_while_newcomers_wait(drain):
    device = Slow()
    engine = serving(4, device)
    with device.held_up():
        engine.add(job(4))
        assert device.is_asked.wait(60)
        engine.add(other(1))
        waiting = engine.submit("o1", np.ones((1, 9), np.float32))
        closing = threading.Thread(target=lambda: engine.close(drain, timeout_s=60))
        closing.start()
        wait_for(lambda: engine._server.is_closed)
    closing.join(60)
    assert not closing.is_alive() and waiting.done()
    assert not any(thread.is_alive() for thread in engine._threads)


def test_a_newcomer_that_leaves_meanwhile_has_no_slot(monkeypatch):
    device, staged = Slow(), _lane.staged
    with serving(4, device) as engine:

        def leave(lane, member):
            if member.job.name == "t5":
                monkeypatch.setattr(_lane, "staged", staged)  # once
                with engine._server.lock:
                    waiting = engine._server.tenants["t5"]
                gone = threading.Thread(target=lambda: engine.remove("t5"))
                gone.start()
                wait_for(lambda: waiting.is_leaving)
            return staged(lane, member)

        monkeypatch.setattr(_lane, "staged", leave)
        with device.held_up():
            engine.add(job(4))
            assert device.is_asked.wait(60)
            engine.add(job(5))
            np.testing.assert_array_equal(engine.infer("t5", ROW), expected(5))
            wait_for(lambda: "t5" not in engine._server.tenants)
            assert all("t5" not in x.places for x in engine._server.lanes.values())
            again = engine.add(job(5))
            np.testing.assert_array_equal(engine.infer("t5", ROW), expected(5))
        again.result(60)
        assert_all_answer(engine, range(6))
        assert_idle(engine)


@contextlib.contextmanager
def measuring(engine, monkeypatch):
    """Stand still with a bucket of the shared lane compiled and not measured."""
    builder, begun, go_on = engine._builder, threading.Event(), threading.Event()
    lane, measure = engine._server.lanes["all"], builder._measure
    bucket = [*lane.steps][-1]
    del lane.steps[bucket], lane.step_s[bucket]  # as if it was not there yet

    def slow(*of):
        begun.set()
        assert go_on.wait(60)
        measure(*of)

    monkeypatch.setattr(builder, "_measure", slow)
    builder.request("all")
    assert begun.wait(60)
    try:
        yield
    finally:
        go_on.set()


def test_a_lane_like_one_has_only_steps_that_were_measured(monkeypatch):
    device = FakeDevice()
    with serving(2, device, max_batch_size=2, max_slots=2) as engine:
        lanes = engine._server.lanes
        with measuring(engine, monkeypatch):
            ready = [engine.add(job(2))]
            np.testing.assert_array_equal(engine.infer("t2", ROW), expected(2))
            assert lane_of(engine, 2) == "all##1"
            assert lanes["all##1"].steps.keys() == lanes["all##1"].step_s.keys()
            assert len(lanes["all##1"].steps) == len(lanes["all"].steps) - 1
            engine.remove("t1")
        ready += [engine.add(job(i)) for i in (3, 4)]
        for each in ready:
            each.result(60)
        engine.swap("t2", job(9).params)
        np.testing.assert_array_equal(engine.infer("t2", ROW), expected(9))
        places = [name for lane in lanes.values() for name in lane.places]
        assert sorted(places) == ["t0", "t2", "t3", "t4"]
        assert lanes["all##1"].steps.keys() == lanes["all"].steps.keys()
        assert_idle(engine)


def test_an_engine_that_drains_answers_whom_newcomers_were_at(monkeypatch):
    device, staged = Slow(), _lane.staged
    engine = serving(4, device)
    begun, go_on = threading.Event(), threading.Event()

    def fail(lane, member):
        if threading.current_thread().name == "stfuse-place":
            begun.set()
            assert go_on.wait(60)
            raise RuntimeError("no memory for a moment")
        return staged(lane, member)

    monkeypatch.setattr(_lane, "staged", fail)
    with device.held_up():
        engine.add(job(4))
        assert device.is_asked.wait(60)
        engine.add(job(5))
        waiting = engine.submit("t5", ROW)
        assert begun.wait(60)
    closing = threading.Thread(target=engine.close)
    closing.start()
    with pytest.raises(TimeoutError):
        waiting.result(0.3)
    go_on.set()
    closing.join(60)
    np.testing.assert_array_equal(waiting.result(1), expected(5))


def test_who_is_in_a_sibling_is_ready_whoever_was_at_it_last(monkeypatch):
    device, go_on = Slow(), threading.Event()
    with serving(2, device, max_slots=2) as engine:
        newcomers = engine._builder.newcomers
        place = newcomers._place

        def slow(tenant):
            place(tenant)
            assert go_on.wait(60)

        monkeypatch.setattr(newcomers, "_place", slow)
        with device.held_up():
            engine.add(other(0))
            assert device.is_asked.wait(60)
            ready = engine.add(job(2))
            np.testing.assert_array_equal(engine.infer("t2", ROW), expected(2))
        wait_for(lambda: not engine._builder._pending and newcomers._builders is None)
        go_on.set()
        ready.result(60)


@pytest.mark.parametrize("is_asked", [False, True])
def test_memory_of_a_lane_that_is_being_built_is_nobody_elses(is_asked):
    def wide(i):
        return affine_job(f"t{i}", scale=i + 1.0, shift=0.0, width=64)

    def another(p, x):
        return jnp.tanh(jnp.dot(x, p["a"])) + p["b"]

    params = {"a": np.eye(64, dtype="f"), "b": np.zeros(64, "f")}
    row = np.ones((1, 64), np.float32)
    device, options = Slow(), {"max_batch_size": 1, "max_slots": 2}
    options |= {"max_device_bytes": 140_000, "clock": ManualClock()}
    with serve(wide(0), wide(1), device=device, **options) as engine:
        with device.held_up(after=1):  # the other program has a small lane
            ready = [engine.add(stfuse.Job("z", another, params, row))]
            assert device.is_asked.wait(60)
            ready.append(engine.add(wide(2)))
            waiting = [engine.submit("t2", row)] if is_asked else []
            assert_nothing_is_answered(waiting)
        for each in (*ready, *waiting):
            each.result(60)
        assert engine._server.lanes["all"].capacities[0] == 2
        assert engine.stats().tenants["z"].lane == "all"
        assert not any(t.is_on_host for t in engine._server.tenants.values())


def assert_nothing_is_answered(futures):
    for future in futures:
        with pytest.raises(TimeoutError):
            future.result(0.5)
