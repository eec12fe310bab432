"""The engine's life: add, serve, swap, remove, on real and fake devices."""

import asyncio
import fractions
import math
import threading

import numpy as np
import pytest

import stfuse
from stfuse.testing import FakeDevice, affine_job
from tests.serving import POLICIES, ROW, busy_with, serve, wait_for


@pytest.mark.parametrize("policy", POLICIES)
def test_every_caller_gets_its_own_answer(policy):
    jobs = [affine_job(f"j{i}", scale=i + 1.0, shift=0.25 * i) for i in range(5)]
    wrong = []

    def call(seed):
        rng = np.random.default_rng(seed)
        futures = []
        for _ in range(150):
            i, rows = rng.integers(5), rng.integers(1, 5)
            x = rng.normal(size=(rows, 3)).astype(np.float32)
            futures.append((i, x, engine.submit(f"j{i}", x)))
        for i, x, future in futures:
            if not np.allclose(future.result(60), (i + 1) * x + 0.25 * i, atol=1e-5):
                wrong.append((i, x))

    with serve(*jobs, policy=policy) as engine:
        threads = [threading.Thread(target=call, args=(seed,)) for seed in range(6)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        stats = engine.stats()
    assert not wrong
    assert stats.served == 900
    assert sum(t.served for t in stats.tenants.values()) == 900
    assert stats.queued == 0
    if policy != "space-time":
        assert stats.tenants_per_step == 1


@pytest.mark.parametrize(
    "seconds", [100, np.float32(100), np.int64(100), fractions.Fraction(100), math.inf]
)
def test_a_deadline_may_be_any_number(seconds):
    with serve(affine_job("a")) as engine:
        found = [
            engine.submit("a", ROW, deadline_s=seconds).result(60),
            engine.infer("a", ROW, timeout_s=seconds),
            asyncio.run(engine.infer_async("a", ROW, timeout_s=seconds)),
        ]
    np.testing.assert_array_equal(found, [ROW * 3] * 3)


def test_jobs_of_many_kinds_are_served_together():
    def stats_of(params, x):
        return {"sum": x["a"].sum(-1) * params, "ids": x["i"] + 1}

    jobs = [
        affine_job("affine"),
        stfuse.Job(
            "tree",
            stats_of,
            np.float32(2),
            {"a": np.zeros((1, 2), "f"), "i": np.zeros((1,), "i4")},
        ),
        stfuse.Job("step", lambda w, g: w - g, ROW[0], ROW[0], batched=False),
        stfuse.Job("none", lambda w, _: w * 2, ROW[0], (), batched=False),
    ]
    with serve(*jobs) as engine:
        tree = engine.infer("tree", {"a": [[1, 2], [3, 4]], "i": [5, 6]})
        np.testing.assert_array_equal(tree["sum"], [6, 14])
        np.testing.assert_array_equal(tree["ids"], [6, 7])
        assert tree["ids"].dtype == np.int32
        np.testing.assert_array_equal(engine.infer("step", ROW[0] * 3), ROW[0] * -2)
        np.testing.assert_array_equal(engine.infer("none", ()), ROW[0] * 2)
        np.testing.assert_array_equal(engine.infer("affine", ROW), ROW * 3)


def test_requests_are_taken_before_the_job_is_ready():
    with stfuse.Engine() as engine:
        engine.add(affine_job("a"))
        np.testing.assert_array_equal(engine.submit("a", ROW).result(60), ROW * 3)


def test_inputs_are_copied_and_outputs_are_the_callers_own():
    device = FakeDevice()
    with serve(affine_job("a"), device=device) as engine:
        first = busy_with(engine, device, "a")
        x = ROW.copy()
        second = engine.submit("a", x)
        x[:] = 99
        device.release()
        np.testing.assert_array_equal(second.result(60), ROW * 3)
        mine = first.result(60)
        mine[:] = -1
        np.testing.assert_array_equal(engine.infer("a", ROW), ROW * 3)
        assert mine.base is None and (mine == -1).all()


def test_nothing_compiles_while_requests_are_served():
    device = FakeDevice()
    traced = []

    def apply_fn(params, x):
        traced.append(x.shape)
        return x * params

    job = stfuse.Job("a", apply_fn, np.float32(2), ROW)
    with serve(job, affine_job("b"), device=device) as engine:
        compiles, traces = device.num_compiles, len(traced)
        for rows in (1, 2, 3, 4, 1):
            x = np.ones((rows, 3), np.float32)
            np.testing.assert_array_equal(engine.infer("a", x), x * 2)
            engine.infer("b", x)
        engine.swap("a", np.float32(3))
        np.testing.assert_array_equal(engine.infer("a", ROW), ROW * 3)
        assert (device.num_compiles, len(traced)) == (compiles, traces)


def test_a_job_joins_a_free_slot_without_compiling():
    device = FakeDevice()
    jobs = [affine_job(f"j{i}", scale=i + 2.0, shift=i + 1.0) for i in range(4)]
    with serve(*jobs[:3], device=device) as engine:
        compiles = device.num_compiles
        engine.add(jobs[3]).result(60)
        np.testing.assert_array_equal(engine.infer("j3", ROW), ROW * 9)
        assert device.num_compiles == compiles


def test_capacity_grows_while_traffic_runs():
    answers, stop = [], threading.Event()

    def traffic():
        while not stop.is_set():
            answers.append(engine.infer("j0", ROW))

    with serve(affine_job("j0", scale=2.0)) as engine:
        thread = threading.Thread(target=traffic)
        thread.start()
        for i in range(1, 6):
            engine.add(affine_job(f"j{i}", scale=i + 2.0)).result(60)
        stop.set()
        thread.join()
        for i in range(6):
            np.testing.assert_array_equal(engine.infer(f"j{i}", ROW), ROW * (i + 3))
    assert len(answers) > 5
    np.testing.assert_array_equal(np.stack(answers), np.stack([ROW * 3] * len(answers)))


def test_a_swap_may_end_the_sharing_of_a_leaf():
    rng = np.random.default_rng(0)
    trunk = rng.normal(size=(3, 3)).astype(np.float32)

    def apply_fn(params, x):
        return x @ params["trunk"] * params["head"]

    def params(i, trunk=trunk):
        return {"trunk": trunk, "head": np.full(3, i, np.float32)}

    jobs = [stfuse.Job(f"j{i}", apply_fn, params(i), ROW) for i in range(1, 4)]
    with serve(*jobs) as engine:
        engine.swap("j2", params(2, trunk * 10))
        for i, factor in ((1, 1), (2, 10), (3, 1)):
            expected = apply_fn(params(i, trunk * factor), ROW)
            np.testing.assert_allclose(engine.infer(f"j{i}", ROW), expected, rtol=1e-5)


def test_a_removed_job_is_drained_and_its_name_is_free_again():
    device = FakeDevice()
    with serve(affine_job("a"), affine_job("b", shift=5.0), device=device) as engine:
        first = busy_with(engine, device, "a")
        waiting = engine.submit("a", ROW)
        remover = threading.Thread(target=engine.remove, args=("a",))
        remover.start()
        wait_for(lambda: _is_refused(engine, "a"))
        device.release()
        remover.join(60)
        assert not remover.is_alive()
        for future in (first, waiting):
            np.testing.assert_array_equal(future.result(60), ROW * 3)
        assert "a" not in engine.stats().tenants
        np.testing.assert_array_equal(engine.infer("b", ROW), ROW * 7)
        engine.add(affine_job("a", shift=9.0)).result(60)
        np.testing.assert_array_equal(engine.infer("a", ROW), ROW * 11)


def _is_refused(engine, name):
    try:
        engine.submit(name, ROW)
    except (stfuse.ClosedError, stfuse.RequestError):
        return True
    return False


def test_a_swap_during_a_build_is_not_lost():
    device, building, go = FakeDevice(), threading.Event(), threading.Event()
    with serve(affine_job("a", shift=1.0), device=device) as engine:
        compile_step = device.compile

        def slow_compile(*args):
            building.set()
            go.wait(60)
            return compile_step(*args)

        device.compile = slow_compile
        ready = engine.add(affine_job("b", width=2))
        assert building.wait(60)  # the new lane has packed the old weights
        engine.swap("a", affine_job("a", shift=7.0).params)
        np.testing.assert_array_equal(engine.infer("a", ROW), ROW * 9)
        go.set()
        ready.result(60)
        np.testing.assert_array_equal(engine.infer("a", ROW), ROW * 9)


def test_a_removal_during_a_build_is_not_undone():
    device, building, go = FakeDevice(), threading.Event(), threading.Event()
    with serve(affine_job("a"), affine_job("b"), device=device) as engine:
        compile_step = device.compile

        def slow_compile(*args):
            building.set()
            go.wait(60)
            return compile_step(*args)

        device.compile = slow_compile
        ready = engine.add(affine_job("c", width=2))
        assert building.wait(60)
        engine.remove("a")
        go.set()
        ready.result(60)
        assert set(engine.stats().tenants) == {"b", "c"}
        np.testing.assert_array_equal(engine.infer("b", ROW), ROW * 3)


@pytest.mark.parametrize("policy", POLICIES)
def test_a_lane_ends_with_its_last_job(policy):
    with serve(affine_job("a"), affine_job("b"), policy=policy) as engine:
        engine.remove("a")
        engine.remove("b")
        server = engine._server
        assert not server.lanes
        assert not server.scheduler._lanes
        assert not server.tenants
        engine.add(affine_job("a", shift=4.0)).result(60)
        np.testing.assert_array_equal(engine.infer("a", ROW), ROW * 6)
