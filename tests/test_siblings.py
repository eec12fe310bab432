"""More jobs than a step has slots: lanes like the full one, and nothing compiled."""

import threading

import numpy as np
import pytest

import stfuse
from stfuse import _bank, _lane
from stfuse.testing import FakeDevice, ManualClock, affine_job
from tests.serving import ROW, assert_idle, serve
from tests.test_lengths import assert_alone, encoder, request, sample


def job(i, **options):
    return affine_job(f"t{i}", scale=i + 1.0, shift=0.5 * i, **options)


def expected(i):
    return ROW * np.float32(i + 1.0) + np.float32(0.5 * i)


def full(device, num=2, **options):
    """Return an engine whose shared lane has all the slots of a step."""
    options = {"max_batch_size": 1, "max_slots": num, **options}
    return serve(*map(job, range(num)), device=device, **options)


def lane_of(engine, i):
    return engine.stats().tenants[f"t{i}"].lane


def assert_all_answer(engine, numbers):
    futures = {i: engine.submit(f"t{i}", ROW) for i in numbers}
    for i, future in futures.items():
        np.testing.assert_array_equal(future.result(60), expected(i))


def test_a_full_lane_gets_a_sibling_and_nothing_is_compiled():
    device = FakeDevice()
    with full(device) as engine:
        compiles, traced = device.num_compiles, engine.stats().compiles
        for i in range(2, 7):
            engine.add(job(i)).result(60)
            assert_all_answer(engine, range(i + 1))
        assert device.num_compiles == compiles and engine.stats().compiles == traced
        found = [lane_of(engine, i) for i in range(7)]
        assert found == ["all"] * 2 + ["all##1"] * 2 + ["all##2"] * 2 + ["all##3"]
        assert all(engine._server.lanes[name].capacities == (2,) for name in found)
        assert_idle(engine)


def test_a_sibling_has_all_steps_and_their_times():
    device = FakeDevice()
    with full(device) as engine:
        engine.add(job(2)).result(60)
        one, other = (engine._server.lanes[name] for name in ("all", "all##1"))
        assert one.steps == other.steps and one.step_s == other.step_s
        assert one.bank.stacks[0] is not other.bank.stacks[0]
        assert not np.asarray(other.bank.stacks[0])[1].any()  # nobody's slot


def test_swaps_stay_in_their_lane():
    with full(FakeDevice()) as engine:
        engine.add(job(2)).result(60)
        engine.swap("t2", job(9).params)
        np.testing.assert_array_equal(engine.infer("t2", ROW), expected(9))
        engine.swap("t0", job(8).params)
        np.testing.assert_array_equal(engine.infer("t0", ROW), expected(8))
        np.testing.assert_array_equal(engine.infer("t2", ROW), expected(9))
        np.testing.assert_array_equal(engine.infer("t1", ROW), expected(1))


def test_a_sibling_ends_with_its_last_job_and_free_slots_come_first():
    with full(FakeDevice()) as engine:
        for i in range(2, 5):
            engine.add(job(i)).result(60)
        for i in (2, 3):
            engine.remove(f"t{i}")
        assert set(engine._server.lanes) == {"all", "all##2"}
        engine.add(job(5)).result(60)  # there is room in the sibling that is left
        engine.remove("t0")
        engine.add(job(6)).result(60)
        assert [lane_of(engine, i) for i in (1, 4, 5, 6)] == [
            "all",
            "all##2",
            "all##2",
            "all",
        ]
        assert_all_answer(engine, (1, 4, 5, 6))


def test_other_programs_and_other_shared_leaves_are_no_siblings():
    trunk = np.eye(3, dtype=np.float32) * 7

    def apply_fn(p, x):
        return x @ p["trunk"] + p["head"]

    def head(i, trunk=trunk):
        params = {"trunk": trunk, "head": np.full(3, i, "f")}
        return stfuse.Job(f"h{i}", apply_fn, params, ROW)

    with serve(head(0), head(1), device=FakeDevice(), max_slots=2) as engine:
        engine.add(head(2)).result(60)
        assert engine.stats().tenants["h2"].lane == "all##1"
        lanes = engine._server.lanes
        kept = [lane.bank.stacks for lane in lanes.values()]
        assert any(a is b for a in kept[0] for b in kept[1])  # the trunk is there once
        engine.add(head(3, trunk * 2)).result(60)  # the shared lane is built anew
        engine.add(job(0)).result(60)
        assert engine.stats().tenants["t0"].lane == "all"
        for i in range(4):
            wanted = ROW @ (trunk * (2 if i == 3 else 1)) + i
            np.testing.assert_array_equal(engine.infer(f"h{i}", ROW), wanted)
        assert_all_answer(engine, [0])


def test_a_namesake_with_another_shared_leaf_is_not_taken_for_the_one_before():
    trunk = np.arange(9, dtype=np.float32).reshape(3, 3)

    def head(i, trunk=trunk):
        params = {"trunk": trunk, "head": np.full(3, i, "f")}
        return stfuse.Job(f"h{i}", lambda p, x: x @ p["trunk"] + p["head"], params, ROW)

    heads = [head(i) for i in range(3)]
    other = stfuse.Job(
        "h2", heads[0].apply_fn, {"trunk": trunk * 2, "head": heads[2].params["head"]},
        ROW,
    )  # fmt: skip
    heads = [stfuse.Job(h.name, other.apply_fn, h.params, ROW) for h in heads]
    device = FakeDevice(memory_limit_bytes=1 << 30)
    with serve(*heads[:2], device=device, max_slots=2, max_batch_size=1) as engine:
        engine.add(heads[2]).result(60)
        for name in ("h2", "h1"):
            engine.remove(name)
        engine.add(other).result(60)
        np.testing.assert_array_equal(engine.infer("h2", ROW), ROW @ (trunk * 2) + 2)


def test_what_siblings_share_counts_once():
    trunk = np.arange(4096, dtype=np.float32).reshape(64, 64) % 7

    def apply_fn(p, x):
        return x @ p["trunk"] + p["head"]

    row = np.ones((1, 64), np.float32)
    params = [{"trunk": trunk, "head": np.full(64, i, "f")} for i in range(8)]
    heads = [stfuse.Job(f"h{i}", apply_fn, p, row) for i, p in enumerate(params)]
    options = {"max_batch_size": 1, "max_slots": 2, "device": FakeDevice()}
    options["max_device_bytes"] = 5 * trunk.nbytes
    with serve(*heads[:2], **options) as engine:
        for one in heads[2:]:
            engine.add(one).result(60)
        assert len(engine._server.lanes) == 4
        for i, one in enumerate(heads):
            wanted = row @ trunk + i
            np.testing.assert_array_equal(engine.infer(one.name, row), wanted)


@pytest.mark.parametrize("length", [4, 8])
def test_jobs_of_one_length_and_of_two_have_slots_of_their_own(length):
    both = [encoder(f"e{i}", i, (4, 8)) for i in range(5)]
    one = stfuse.Job("one", both[0].apply_fn, both[4].params, sample(length))
    options = {"max_batch_size": 2, "max_slots": 4, "device": FakeDevice()}
    with serve(*both[:3], **options) as engine:
        engine.remove("e0")
        engine.add(one).result(60)
        engine.add(both[3]).result(60)
        for each in both[1:4]:
            for size in (3, 6):
                x = request(size, 1, size)
                assert_alone(each, x, engine.infer(each.name, x))


def test_where_there_is_no_memory_for_one_jobs_take_turns():
    size = 4 * (3 * 3 + 3)
    with full(FakeDevice(), max_device_bytes=int(3.9 * size) + 200) as engine:
        engine.add(job(2)).result(60)
        assert set(engine._server.lanes) == {"all"}
        assert_all_answer(engine, range(3))


def test_memory_for_a_sibling_is_enough_though_none_is_there_for_twice_the_slots():
    size = 4 * (3 * 3 + 3)
    with full(FakeDevice(), max_device_bytes=int(4.9 * size) + 200) as engine:
        engine.add(job(2)).result(60)
        assert set(engine._server.lanes) == {"all", "all##1"}
        engine.add(job(3)).result(60)  # there is none for another one, but it has room
        assert not any(t.is_on_host for t in engine._server.tenants.values())
        engine.add(job(4)).result(60)
        assert engine._server.tenants["t4"].is_on_host
        assert_all_answer(engine, range(5))


def test_a_sibling_that_lost_its_weights_is_built_anew():
    device = FakeDevice()
    with full(device) as engine:
        engine.add(job(2)).result(60)
        lane = engine._server.lanes["all##1"]
        server = engine._server
        server.command(lambda: server.members.lose_lane(lane)).result(60)
        assert_all_answer(engine, range(3))
        assert engine._server.lanes["all##1"] is not lane


def test_a_job_that_leaves_meanwhile_has_nothing_built(monkeypatch):
    device = FakeDevice()
    with full(device) as engine:
        compiles, open_lane = device.num_compiles, _lane.sibling

        def slow_sibling(*arguments):
            engine.remove("t2")
            return open_lane(*arguments)

        monkeypatch.setattr(_lane, "sibling", slow_sibling)
        with pytest.raises(stfuse.ClosedError):
            engine.add(job(2)).result(60)
        monkeypatch.undo()
        engine.add(job(3)).result(60)
        assert device.num_compiles == compiles
        assert lane_of(engine, 0) == "all" and lane_of(engine, 3).startswith("all##")
        assert_all_answer(engine, (0, 1, 3))


def test_a_job_that_leaves_while_it_is_staged_gets_no_slot(monkeypatch):
    with full(FakeDevice()) as engine:
        engine.add(job(2)).result(60)
        stage = _lane.staged

        def slow_staged(lane, member):
            found = stage(lane, member)
            engine.remove("t3")
            return found

        monkeypatch.setattr(_lane, "staged", slow_staged)
        with pytest.raises(stfuse.ClosedError):
            engine.add(job(3)).result(60)
        monkeypatch.undo()
        namesake = affine_job("t3", scale=10.0, shift=4.5)
        engine.add(namesake).result(60)
        np.testing.assert_array_equal(engine.infer("t3", ROW), expected(9))
        engine.remove("t2")
        np.testing.assert_array_equal(engine.infer("t3", ROW), expected(9))


def test_a_job_that_is_swapped_meanwhile_has_its_newest_weights(monkeypatch):
    with full(FakeDevice()) as engine:
        stage = _lane.staged

        def slow_staged(lane, member):
            found = stage(lane, member)
            if lane.name == "all##1" and not member.generation:
                engine.swap("t2", job(9).params)
            return found

        monkeypatch.setattr(_lane, "staged", slow_staged)
        engine.add(job(2)).result(60)
        np.testing.assert_array_equal(engine.infer("t2", ROW), expected(9))
        assert lane_of(engine, 2) == "all##1"


@pytest.mark.parametrize("num", [5, 12])
def test_many_that_come_at_once_are_all_served(num):
    with full(FakeDevice()) as engine:
        for ready in [engine.add(job(i)) for i in range(2, num)]:
            ready.result(60)
        assert_all_answer(engine, range(num))
        assert_idle(engine)


def test_what_an_empty_lane_needs_is_compiled_once_before_it_is_asked_for(monkeypatch):
    asked, expect = [], _bank.expect_emptied
    monkeypatch.setattr(
        _bank, "expect_emptied", lambda *of: (asked.append(1), expect(*of))
    )
    with serve(job(0), device=FakeDevice(), max_batch_size=1, max_slots=2) as engine:
        assert len(asked) == 1
        engine.add(job(1)).result(60)
        assert len(asked) == 2  # a lane of two slots needs other ones
        for i in range(2, 5):
            engine.add(job(i)).result(60)
            assert_all_answer(engine, range(i + 1))
    assert len(asked) == 2


def test_until_a_lane_has_grown_one_like_it_serves_the_newcomers():
    device, may_compile = FakeDevice(), threading.Event()
    compile_step = device.compile
    with serve(*map(job, range(4)), device=device, max_batch_size=1) as engine:

        def slow_compile(step_fn, *specs):
            assert may_compile.wait(60)
            return compile_step(step_fn, *specs)

        device.compile = slow_compile
        with engine._server.lock:  # so that the builder sees both at once
            ready = [engine.add(job(i)) for i in range(4, 6)]
        assert_all_answer(engine, range(6))
        assert {lane_of(engine, i) for i in range(4)} == {"all"}
        assert not any(one.done() for one in ready)
        may_compile.set()
        for one in ready:
            one.result(60)
        assert {lane_of(engine, i) for i in range(6)} == {"all"}
        assert set(engine._server.lanes) == {"all"}
        assert engine._server.lanes["all"].capacities == (8,)
        assert_all_answer(engine, range(6))
        assert_idle(engine)


def test_if_a_lane_cannot_grow_newcomers_get_small_lanes_of_their_own():
    device = FakeDevice()
    compile_step = device.compile

    def broken(step_fn, *specs):
        if specs[0][0].shape[0] == 8:
            raise RuntimeError("too large")
        return compile_step(step_fn, *specs)

    options = {"max_batch_size": 1, "clock": ManualClock()}
    with serve(*map(job, range(4)), device=device, **options) as engine:
        device.compile = broken
        for i in (4, 5):
            engine.add(job(i)).result(60)
        lanes = engine._server.lanes.values()
        assert sorted(lane.capacities for lane in lanes) == [(1,), (1,), (4,)]
        device.compile = compile_step
        engine.add(job(6)).result(60)
        assert engine._server.lanes["all"].capacities == (8,)
        assert_all_answer(engine, range(7))
        assert_idle(engine)


@pytest.mark.parametrize("limit", [290_000, 320_000])
def test_no_lane_holds_newcomers_that_a_larger_one_has_no_memory_beside(limit):
    def wide(i):
        return affine_job(f"t{i}", scale=i + 1.0, width=64, pinned=i == 4)

    options = {"max_batch_size": 1, "max_slots": 8, "max_device_bytes": limit}
    options["clock"] = ManualClock()  # so that nobody is slow, and evicted
    with serve(wide(0), device=FakeDevice(), **options) as engine:
        for i in range(1, 4):
            engine.add(wide(i)).result(60)
        engine.add(affine_job("thin", width=8)).result(60)
        with engine._server.lock:  # so that the builder sees both at once
            other = engine.add(affine_job("other", width=8, pinned=True))
            ready = [other, engine.add(wide(4))]
        for one in ready:
            one.result(60)
        assert not any(t.is_on_host for t in engine._server.tenants.values())
        assert engine._server.lanes["all"].capacities == (8, 2)


def test_an_empty_lane_that_cannot_be_prepared_costs_nobody_its_place(monkeypatch):
    def fail(*_):
        raise RuntimeError("no compiler")

    monkeypatch.setattr(_bank, "expect_emptied", fail)
    with full(FakeDevice()) as engine:
        engine.add(job(2)).result(60)
        assert_all_answer(engine, range(3))


def test_a_sibling_is_ready_though_the_next_one_cannot_be(monkeypatch):
    staged = _lane.staged

    def fail(lane, member):
        if member.job.name == "t2":
            raise RuntimeError("no memory")
        return staged(lane, member)

    monkeypatch.setattr(_lane, "staged", fail)
    with full(FakeDevice(), num=1) as engine:
        with engine._server.lock:  # so that the builder sees both at once
            ready = [engine.add(job(i)) for i in (1, 2)]
        with pytest.raises(stfuse.DeviceError):
            ready[1].result(60)
        ready[0].result(60)
        assert_all_answer(engine, range(2))
