"""The engine's life: add, serve, swap, remove, close, on real and fake devices."""

import asyncio
import threading
import time

import jax
import numpy as np
import pytest

import stfuse
from stfuse.testing import FakeDevice, ManualClock, affine_job

ROW = np.ones((1, 3), np.float32)
POLICIES = ("exclusive", "time", "space-time")


def serve(*jobs, **options):
    """Return an engine that serves some jobs at full speed."""
    engine = stfuse.Engine(**{"max_batch_size": 4, **options})
    for ready in [engine.add(job) for job in jobs]:
        ready.result(60)
    return engine


def wait_for(condition):
    """Wait until something that another thread does has happened."""
    until_s = time.monotonic() + 30
    while not condition():
        assert time.monotonic() < until_s, "waited for too long"
        time.sleep(0.001)


def busy_with(engine, device, name):
    """Hold the device with a step in flight; return that step's future."""
    before = device.num_launches
    device.hold()
    future = engine.submit(name, ROW)
    wait_for(lambda: device.num_launches > before)
    return future


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


def test_every_answer_comes_from_one_generation_of_weights():
    def constant(params, x):
        return x * 0 + params["a"], x * 0 + params["b"]

    def weights(generation):
        return {k: np.full(3, generation, np.float32) for k in "ab"}

    jobs = [stfuse.Job(n, constant, weights(0), ROW) for n in ("moving", "still")]
    seen, stop = [], threading.Event()

    def traffic():
        while not stop.is_set():
            seen.append(engine.infer("moving", ROW))
            np.testing.assert_array_equal(engine.infer("still", ROW)[0], ROW * 0)

    with serve(*jobs) as engine:
        thread = threading.Thread(target=traffic)
        thread.start()
        for generation in range(1, 200):
            engine.swap("moving", weights(generation))
            now, _ = engine.infer("moving", ROW)
            assert now[0, 0] == generation
        stop.set()
        thread.join()
        assert engine.stats().tenants["moving"].generation == 199
    order = [a[0, 0] for a, _ in seen]
    assert order == sorted(order)
    for a, b in seen:
        assert len({*a.ravel(), *b.ravel()}) == 1


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


def test_closing_answers_what_is_queued():
    device = FakeDevice()
    engine = serve(affine_job("a"), device=device)
    futures = [busy_with(engine, device, "a")]
    futures += [engine.submit("a", ROW) for _ in range(20)]
    device.release()
    engine.close()
    for future in futures:
        np.testing.assert_array_equal(future.result(0), ROW * 3)
    engine.close()


def test_closing_without_draining_fails_what_is_queued():
    device = FakeDevice()
    engine = serve(affine_job("a"), device=device)
    running = busy_with(engine, device, "a")
    waiting = [engine.submit("a", ROW) for _ in range(9)]
    closer = threading.Thread(target=engine.close, kwargs={"drain": False})
    closer.start()
    wait_for(lambda: all(f.done() for f in waiting))
    device.release()
    closer.join(60)
    assert not closer.is_alive()
    np.testing.assert_array_equal(running.result(0), ROW * 3)
    assert all(isinstance(f.exception(0), stfuse.ClosedError) for f in waiting)


def test_a_closed_engine_says_so_and_leaves_no_thread():
    before = threading.active_count()
    engine = serve(affine_job("a"))
    engine.close()
    assert threading.active_count() == before
    for call in (
        lambda: engine.submit("a", ROW),
        lambda: engine.infer("a", ROW),
        lambda: engine.add(affine_job("b")),
        lambda: engine.swap("a", affine_job("a").params),
        lambda: engine.remove("a"),
    ):
        with pytest.raises(stfuse.ClosedError, match="closed"):
            call()


def test_closing_while_a_lane_is_built_ends_every_future():
    engine = stfuse.Engine()
    ready = engine.add(affine_job("a"))
    future = engine.submit("a", ROW)
    engine.close()
    np.testing.assert_array_equal(future.result(0), ROW * 3)
    assert ready.done()


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


def test_a_cancelled_request_frees_its_place():
    device = FakeDevice()
    with serve(affine_job("a"), device=device, max_queue_size=2) as engine:
        running = busy_with(engine, device, "a")
        queued = [engine.submit("a", ROW) for _ in range(2)]
        with pytest.raises(stfuse.QueueFullError):
            engine.submit("a", ROW)
        assert queued[0].cancel()
        assert not running.cancel()  # it is on the device already
        again = engine.submit("a", ROW)
        device.release()
        for future in (running, queued[1], again):
            np.testing.assert_array_equal(future.result(60), ROW * 3)
        stats = engine.stats()
        assert stats.tenants["a"].cancelled == 1
        assert stats.tenants["a"].rejected == 1
        assert stats.queued == 0


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


def test_one_request_that_breaks_the_step_fails_alone():
    device = FakeDevice()
    jobs = [affine_job(f"j{i}") for i in range(4)]

    def breaks(inputs):
        found = any((leaf == 666).any() for leaf in jax.tree.leaves(inputs))
        return ValueError("boom") if found else None

    with serve(*jobs, device=device) as engine:
        device.launch_error = breaks
        running = busy_with(engine, device, "j0")
        futures = {
            (i, k): engine.submit(f"j{i}", ROW * (666 if (i, k) == (2, 1) else 1))
            for i in range(4)
            for k in range(3)
        }
        device.release()
        running.result(60)
        for place, future in futures.items():
            if place == (2, 1):
                with pytest.raises(stfuse.DeviceError, match=r"job 'j2'.*boom"):
                    future.result(60)
            else:
                np.testing.assert_array_equal(future.result(60), ROW * 3)
        assert engine.stats().tenants["j2"].failed == 1


def test_a_lost_device_ends_every_request_and_the_engine_still_closes():
    device = FakeDevice()
    engine = serve(affine_job("a"), affine_job("b"), device=device)
    device.launch_error = lambda inputs: RuntimeError("device lost")
    futures = [engine.submit(name, ROW) for name in "abab"]
    for future in futures:
        with pytest.raises(stfuse.DeviceError, match="device lost"):
            future.result(60)
    engine.close()


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


def test_of_several_new_jobs_only_the_one_that_breaks_is_refused():
    def bad(params, x):
        return jax.pure_callback(
            lambda y: _raise(), jax.typeof(x), x, vmap_method="sequential"
        )

    device = FakeDevice()
    with serve(affine_job("old"), device=device) as engine:
        readies = [
            engine.add(affine_job("good")),
            engine.add(stfuse.Job("bad", bad, (), ROW)),
            engine.add(affine_job("fine", width=2)),
        ]
        readies[0].result(60)
        readies[2].result(60)
        with pytest.raises(stfuse.DeviceError, match="'bad'"):
            readies[1].result(60)
        for name in ("old", "good"):
            np.testing.assert_array_equal(engine.infer(name, ROW), ROW * 3)


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
        ({"max_slots": 1.5}, "max_slots is 1.5"),
        ({"max_queue_size": -1}, "max_queue_size is -1"),
        ({"max_queue_delay_s": -1.0}, "max_queue_delay_s is -1.0"),
    ],
)
def test_a_wrong_option_is_named(options, text):
    with pytest.raises(ValueError, match=text):
        stfuse.Engine(**options)


def test_jobs_come_and_go_without_leaving_anything_behind():
    with serve(affine_job("stays")) as engine:

        def round_trip(i):
            engine.add(affine_job("comes", scale=i)).result(60)
            np.testing.assert_array_equal(engine.infer("comes", ROW), ROW * (i + 1))
            engine.swap("comes", affine_job("x", scale=i + 1).params)
            np.testing.assert_array_equal(engine.infer("comes", ROW), ROW * (i + 2))
            engine.remove("comes")

        for i in range(3):
            round_trip(float(i))
        threads, arrays = threading.active_count(), len(jax.live_arrays())
        for i in range(20):
            round_trip(float(i))
        assert threading.active_count() == threads
        assert len(jax.live_arrays()) <= arrays


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
