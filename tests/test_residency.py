"""More tenants than slots: all are answered, none starves, nothing is compiled."""

import threading

import jax
import numpy as np
import pytest

import stfuse
from stfuse.testing import FakeDevice, affine_job
from tests.serving import serve, wait_for

WIDTH = 32
JOB_BYTES = 4 * (WIDTH * WIDTH + WIDTH)
ROW = np.linspace(-1, 1, WIDTH, dtype=np.float32)[None]


def job(i, **options):
    return affine_job(f"t{i}", width=WIDTH, scale=i + 1.0, shift=0.5 * i, **options)


def expected(i, x=ROW):
    return x * np.float32(i + 1.0) + np.float32(0.5 * i)


def crowded(num_jobs, *, num_slots=4, pinned=(), **options):
    """Return an engine with fewer slots than tenants, and its device."""
    # Twice as many slots, beside those there are, would not fit any more.
    limit = int(2.9 * num_slots * JOB_BYTES)
    device = options.pop("device", None) or FakeDevice(memory_limit_bytes=limit)
    jobs = [job(i, pinned=i in pinned) for i in range(num_jobs)]
    options = {"max_batch_size": 1, "max_slots": 4, **options}
    engine = stfuse.Engine(device=device, **options)
    for one in jobs:
        engine.add(one).result(60)
    return engine, device


def residents(engine):
    return set(engine._server.lanes["all"].places)


def test_three_times_more_tenants_than_slots_are_all_answered_without_a_compile():
    engine, device = crowded(12)
    with engine:
        lane = engine._server.lanes["all"]
        assert list(engine._server.lanes) == ["all"] and lane.capacities == (4,)
        assert len(residents(engine)) == 4
        compiles, cached = device.num_compiles, _num_writes()
        rng = np.random.default_rng(0)
        wrong = []

        def call(seed):
            own = np.random.default_rng(seed)
            for _ in range(60):
                i = int(own.integers(12))
                x = own.normal(size=(1, WIDTH)).astype(np.float32)
                if not np.allclose(engine.infer(f"t{i}", x), expected(i, x), atol=1e-5):
                    wrong.append(i)

        threads = [
            threading.Thread(target=call, args=(int(rng.integers(1 << 30)),))
            for _ in range(6)
        ]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert not wrong
        assert engine.stats().served == 360
        assert device.num_compiles == compiles and _num_writes() == cached
        assert engine._server.lanes["all"] is lane
        assert engine._server.members.residency.num_moves > 12


def _num_writes():
    from stfuse import _bank

    return _bank._write_donating._cache_size()


def test_an_answer_is_bitwise_that_of_a_tenant_that_never_leaves():
    engine, _ = crowded(12)
    with engine:
        crowd = [engine.infer(f"t{i}", ROW).tobytes() for i in range(12)]
        again = [engine.infer(f"t{i}", ROW).tobytes() for i in reversed(range(12))]
        assert crowd == again[::-1]
    with serve(*map(job, range(4)), max_batch_size=1, max_slots=4) as engine:
        alone = [engine.infer(f"t{i}", ROW).tobytes() for i in range(4)]
    assert alone == crowd[:4]


def test_a_pinned_tenant_keeps_its_slot():
    engine, _ = crowded(9, pinned=(1, 6))
    with engine:
        wait_for(lambda: {"t1", "t6"} <= residents(engine))
        rng = np.random.default_rng(1)
        for i in rng.integers(9, size=60):
            np.testing.assert_allclose(
                engine.infer(f"t{i}", ROW), expected(i), atol=1e-5
            )
            assert {"t1", "t6"} <= residents(engine)


def test_the_least_recently_used_tenant_goes_and_none_with_queued_work():
    engine, device = crowded(6)
    with engine:
        here = ["t0", "t1", "t2", "t3"]
        for name in here:
            engine.infer(name, ROW)
        assert residents(engine) == set(here)
        running = busy_with_row(engine, device, "t0")
        queued = [engine.submit(n, ROW) for n in ("t0", "t1")]
        newcomers = [engine.submit(n, ROW) for n in ("t4", "t5")]
        seen = []
        observe = engine._server.observe
        engine._server.observe = lambda r: (seen.append(residents(engine)), observe(r))
        device.release()
        for future, i in zip(
            [running, *queued, *newcomers], (0, 0, 1, 4, 5), strict=True
        ):
            np.testing.assert_allclose(future.result(60), expected(i), atol=1e-5)
        assert residents(engine) == {"t0", "t1", "t4", "t5"}
        assert all({"t0", "t1"} <= names for names in seen)


def busy_with_row(engine, device, name):
    before = device.num_launches
    device.hold()
    future = engine.submit(name, ROW)
    wait_for(lambda: device.num_launches > before)
    return future


def test_a_tenant_without_a_slot_does_not_wait_for_ever_for_busy_ones():
    engine, device = crowded(5, max_queue_size=4096)
    with engine:
        for i in range(4):
            engine.infer(f"t{i}", ROW)
        running = busy_with_row(engine, device, "t0")
        flood = [engine.submit(f"t{i}", ROW) for _ in range(500) for i in range(4)]
        cold = engine.submit("t4", ROW)
        order = []
        cold.add_done_callback(lambda f: order.append(sum(x.done() for x in flood)))
        device.release()
        np.testing.assert_allclose(cold.result(60), expected(4), atol=1e-5)
        running.result(60)
        for n, future in enumerate(flood):
            np.testing.assert_allclose(future.result(60), expected(n % 4), atol=1e-5)
        wait_for(lambda: order)
        # It got a slot after `patience` steps of at most four requests each.
        patience = engine._server.members.residency._patience
        assert order[0] <= 4 * (patience + 16)


def test_a_tenant_on_the_host_is_swapped_and_removed_like_any_other():
    engine, _ = crowded(8)
    with engine:
        away = next(f"t{i}" for i in range(8) if f"t{i}" not in residents(engine))
        engine.swap(away, affine_job("x", width=WIDTH, scale=100.0).params)
        np.testing.assert_allclose(engine.infer(away, ROW), ROW * 100 + 1, rtol=1e-5)
        assert engine.stats().tenants[away].generation == 1
        away = next(f"t{i}" for i in range(8) if f"t{i}" not in residents(engine))
        engine.remove(away)
        left = [i for i in range(8) if f"t{i}" != away]
        for name in sorted(residents(engine)):  # slots of those that leave are filled
            engine.remove(name)
            left = [i for i in left if f"t{i}" != name]
        for i in left:
            if engine.stats().tenants[f"t{i}"].generation == 0:
                np.testing.assert_allclose(
                    engine.infer(f"t{i}", ROW), expected(i), atol=1e-5
                )
        for i in left:
            engine.remove(f"t{i}")
        assert not engine._server.lanes


def test_every_slot_may_be_given_up_before_the_last_tenant_leaves():
    engine, _ = crowded(6)
    with engine:
        for name in sorted(residents(engine)):
            engine.remove(name)
        left = sorted(engine.stats().tenants)
        assert len(left) == 2
        for name in left:
            i = int(name[1:])
            np.testing.assert_allclose(engine.infer(name, ROW), expected(i), atol=1e-5)


def test_an_engine_may_be_told_to_use_less_memory_than_there_is():
    limit = int(2.9 * 4 * JOB_BYTES)
    engine, _ = crowded(10, device=FakeDevice(), max_device_bytes=limit)
    with engine:
        assert len(residents(engine)) == 4
        for i in range(10):
            np.testing.assert_allclose(
                engine.infer(f"t{i}", ROW), expected(i), atol=1e-5
            )
        weights = sum(x.nbytes for x in engine._server.lanes["all"].bank.stacks)
        assert weights <= limit


def test_tenants_that_come_all_at_once_share_the_slots_that_fit():
    device = FakeDevice(memory_limit_bytes=int(5.5 * JOB_BYTES))
    with serve(
        *map(job, range(12)), device=device, max_batch_size=1, max_slots=2
    ) as engine:
        assert engine._server.lanes["all"].capacities[0] <= 4
        for i in range(12):
            np.testing.assert_allclose(
                engine.infer(f"t{i}", ROW), expected(i), atol=1e-5
            )


def test_weights_travel_while_another_request_waits_for_company():
    engine, _ = crowded(6, max_queue_delay_s=30.0)
    with engine:
        here, *_ = residents(engine)
        away = next(f"t{i}" for i in range(6) if f"t{i}" not in residents(engine))
        waiting = engine.submit(here, ROW)
        wait_for(lambda: engine._server._is_idle)  # decided: to wait
        engine.submit(away, ROW)
        wait_for(lambda: not engine._server.tenants[away].is_on_host)
        assert not waiting.done()


@pytest.mark.parametrize("drain", [True, False])
def test_closing_ends_what_waits_for_a_slot(drain):
    engine, device = crowded(8)
    running = busy_with_row(engine, device, next(iter(residents(engine))))
    away = [f"t{i}" for i in range(8) if f"t{i}" not in residents(engine)]
    waiting = {name: engine.submit(name, ROW) for name in away}
    device.release()
    engine.close(drain=drain)
    running.result(0)
    for name, future in waiting.items():
        if drain:
            i = int(name[1:])
            np.testing.assert_allclose(future.result(0), expected(i), atol=1e-5)
        else:
            assert future.done()
    assert not jax.tree.leaves(list(engine._server.books._requests))


def test_a_trunk_that_all_share_is_neither_moved_nor_compared_again(monkeypatch):
    from stfuse import _bank

    trunk = np.random.default_rng(0).normal(size=(WIDTH, WIDTH)).astype(np.float32)

    def apply_fn(p, x):
        return (x @ p["trunk"]) @ p["head"]

    def tenant(i):
        head = np.eye(WIDTH, dtype=np.float32) * np.float32(i + 1)
        return stfuse.Job(f"t{i}", apply_fn, {"trunk": trunk, "head": head}, ROW)

    device = FakeDevice(memory_limit_bytes=int(8.9 * WIDTH * WIDTH * 4))
    options = {"device": device, "max_batch_size": 1, "max_slots": 2}
    with stfuse.Engine(**options) as engine:
        for i in range(12):
            engine.add(tenant(i)).result(60)
        lane = engine._server.lanes["all"]
        assert 2 <= lane.capacities[0] <= 4 and len(engine._server.lanes) <= 2
        assert sum(t.is_on_host for t in engine._server.tenants.values()) >= 6
        for i in range(12):
            engine.infer(f"t{i}", ROW)
        compared = []
        monkeypatch.setattr(_bank, "_is_same", lambda a, b: compared.append(1) or True)
        for i in range(12):
            expected = apply_fn(tenant(i).params, ROW)
            np.testing.assert_allclose(engine.infer(f"t{i}", ROW), expected, rtol=1e-4)
        assert not compared
