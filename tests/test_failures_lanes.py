"""Failures 9, 10 and 11: a slow tenant, compiles under load, the end of memory."""

import threading

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import stfuse
from stfuse._regroup import _CHECK_EVERY
from stfuse.testing import FakeDevice, ManualClock, affine_job
from tests.serving import ROW, busy_with, serve, wait_for

# Programs that differ in what they read, so that a fake device can tell them apart.
FAST = {"a": np.float32, "b": np.float16, "c": np.uint8}
FACTOR = {"a": 1.0, "b": 2.0, "c": 3.0, "slow": 5.0}
STEP_S, SLOW_S, DELAY_S = 0.001, 0.010, 0.0001


def typed_job(name, dtype, add, **options):
    def apply_fn(p, x):
        return x.astype(jnp.float32) @ p

    params = np.eye(3, dtype=np.float32) * np.float32(add)
    return stfuse.Job(name, apply_fn, params, np.ones((1, 3), dtype), **options)


def reads(inputs, dtype):
    return any(leaf.dtype == dtype for leaf in jax.tree.leaves(inputs))


def step_s(inputs):
    """One launch, and a little for each program; the slow one is ten times slower."""
    num_fast = sum(reads(inputs, dtype) for dtype in FAST.values())
    slow_s = SLOW_S if reads(inputs, np.int32) else 0.0
    return STEP_S + 0.0001 * num_fast + slow_s


def latencies(engine):
    """Return a list that fills with the seconds each request of FAST waited."""
    found, observe = [], engine._server.observe

    def also(record):
        found.extend(s for n in FAST for s in record.latencies_s.get(n, ()))
        observe(record)

    engine._server.observe = also
    return found


def serve_round(engine, clock, *names):
    """Have a request of each job served."""
    futures = {}
    for name in (*FAST, *names):
        x = np.ones((1, 3), FAST.get(name, np.int32))
        futures[name] = engine.submit(name, x)
    clock.advance(DELAY_S)  # they were waiting for company
    for name, future in futures.items():
        np.testing.assert_array_equal(future.result(60), ROW * FACTOR[name])


def p99(seconds):
    return float(np.quantile(seconds, 0.99))


@pytest.fixture
def slow_group():
    clock = ManualClock()
    device = FakeDevice(clock, step_s=step_s)
    jobs = [typed_job(n, dtype, FACTOR[n]) for n, dtype in FAST.items()]
    options = {"max_batch_size": 1, "max_queue_delay_s": DELAY_S}
    engine = serve(*jobs, device=device, clock=clock, **options)
    yield engine, device, clock
    device.release()
    engine.close()


def test_failure_09_a_slow_tenant_is_evicted_and_the_others_are_as_fast_as_before(
    slow_group,
):
    engine, device, clock = slow_group
    found = latencies(engine)
    for _ in range(10):
        serve_round(engine, clock)
    before = p99(found)
    engine.add(typed_job("slow", np.int32, 5.0)).result(60)
    assert engine.stats().tenants["slow"].lane == "all"
    steps = engine.stats().steps
    while engine.stats().tenants["slow"].lane == "all":
        serve_round(engine, clock)
        done = engine.stats().steps - steps
        if done > 2 * _CHECK_EVERY:  # decided by now: what is left is the build
            wait_for(lambda: engine.stats().tenants["slow"].lane != "all")
    stats = engine.stats().tenants
    assert stats["slow"].evictions == 1 and stats["slow"].lane.startswith("slow#")
    assert all(stats[n].lane == "all" and not stats[n].evictions for n in FAST)
    wait_for(lambda: len(engine._server.lanes["all"].capacities) == 3)
    lane = engine._server.lanes["all"]
    known = engine._server.scheduler._lanes["all"]
    wait_for(lambda: set(engine._builder._buckets(lane)) <= set(known.ready))
    found.clear()
    for i in range(200):
        serve_round(engine, clock, *["slow"] * (i == 100))
    assert len(found) == 600
    assert p99(found) <= 1.1 * before


def test_failure_09_an_evicted_tenant_is_tried_again_and_returns_once_it_is_quick(
    slow_group, monkeypatch
):
    engine, device, clock = slow_group
    engine.add(typed_job("slow", np.int32, 5.0)).result(60)
    for _ in range(_CHECK_EVERY):
        serve_round(engine, clock)
    wait_for(lambda: engine.stats().tenants["slow"].lane != "all")
    wait_for(lambda: len(engine._server.lanes["all"].capacities) == 3)
    lane = engine.stats().tenants["slow"].lane
    backoff = engine._builder._regroup._backoff

    def due_in_s():
        return backoff.next_s() - clock()

    assert 0 < due_in_s() <= 30
    clock.advance(31.0)
    wait_for(lambda: due_in_s() > 31)  # tried, found as slow as ever: twice the wait
    assert engine.stats().tenants["slow"].lane == lane
    serve_round(engine, clock, "slow")
    monkeypatch.setattr("tests.test_failures_lanes.SLOW_S", 0.0001)
    clock.advance(due_in_s() + 1.0)
    wait_for(lambda: engine.stats().tenants["slow"].lane == "all")
    wait_for(lambda: lane not in engine._server.lanes)
    serve_round(engine, clock, "slow")


def test_failure_10_a_lane_takes_over_with_the_steps_that_the_old_one_has():
    serving = []

    class Device(FakeDevice):
        def compile(self, step_fn, *specs):
            if serving:
                serving.append(serving[0]._server.lanes["all"].capacities)
            return super().compile(step_fn, *specs)

    jobs = [affine_job(name, width=13) for name in "abc"]
    with serve(*jobs[:2], device=Device(), max_batch_size=1) as engine:
        serving.append(engine)
        engine.add(jobs[2]).result(60)
        assert engine._server.lanes["all"].capacities == (4,)
    # The largest step, and those of one and of two slots; a lane like the one that is
    # too small serves the newcomer meanwhile, with nothing to compile.
    assert serving[1:] == [(2,)] * 3


def test_failure_10_nothing_is_traced_or_stalled_while_a_tenant_is_added_under_load():
    clock, traces = ManualClock(), []

    def counted(p, x):
        traces.append(threading.current_thread().name)
        return x @ p

    job = stfuse.Job("a", counted, np.eye(3, dtype="f"), ROW)
    device = FakeDevice(clock)
    compile_step, go, is_slow = device.compile, threading.Event(), threading.Event()

    def slow_compile(step_fn, *specs):
        if is_slow.is_set():
            go.wait(60)
        return compile_step(step_fn, *specs)

    device.compile = slow_compile

    with serve(job, device=device, clock=clock) as engine:
        found = latencies(engine)

        def waited():
            found.clear()
            for _ in range(50):
                engine.infer("a", ROW)
            return max(found)

        before = waited()
        num_traces = len(traces)
        is_slow.set()
        ready = engine.add(affine_job("b", width=4))
        assert waited() <= 1.1 * before  # the build stands still
        assert not ready.done()
        assert len(traces) == num_traces
        go.set()
        found.clear()
        while not ready.done():
            engine.infer("a", ROW)
        # A request waits for one step that measures a new bucket, at most.
        assert max(found, default=0.0) <= 2.1 * before
        ready.result(60)
        compiles = device.num_compiles
        assert waited() <= 1.1 * before
        engine.infer("b", np.ones((1, 4), np.float32))
        assert device.num_compiles == compiles
    assert not [name for name in traces if "serve" in name]


def test_failure_10_a_new_tenant_is_answered_before_its_fused_bucket_is_compiled():
    device, go, first = FakeDevice(), threading.Event(), threading.Event()
    compile_step = device.compile

    def one_then_wait(step_fn, *specs):
        if first.is_set():
            go.wait(60)
        first.set()
        return compile_step(step_fn, *specs)

    with serve(affine_job("a"), device=device) as engine:
        device.compile = one_then_wait
        ready = engine.add(affine_job("b", width=4, scale=3.0))
        x = np.ones((1, 4), np.float32)
        np.testing.assert_array_equal(engine.submit("b", x).result(60), x * 4)
        np.testing.assert_array_equal(engine.infer("a", ROW), ROW * 3)
        assert not ready.done()
        assert engine.stats().tenants["b"].lane.startswith("b#")
        engine.swap("b", affine_job("b", width=4, scale=5.0).params)
        np.testing.assert_array_equal(engine.infer("b", x), x * 6)
        go.set()
        ready.result(60)
        assert engine.stats().tenants["b"].lane == "all"
        assert list(engine._server.lanes) == ["all"]
        np.testing.assert_array_equal(engine.infer("b", x), x * 6)


def test_failure_10_those_that_joined_together_are_served_wherever_they_move():
    """They share a small lane at first, and leave it together."""
    names = [f"t{i}" for i in range(5)]
    with serve(affine_job("a"), device=FakeDevice()) as engine:
        with engine._server.lock:  # the builder sees all of them or none
            added = [engine.add(affine_job(n, scale=3.0, width=4)) for n in names]
        for ready in added:
            ready.result(60)
        x = np.ones((1, 4), np.float32)
        for future in [engine.submit(n, x, deadline_s=30) for n in names]:
            np.testing.assert_array_equal(future.result(60), x * 4)
        assert {t.lane for t in engine.stats().tenants.values()} == {"all"}
        assert list(engine._server.lanes) == ["all"]


def test_failure_10_a_step_that_fails_while_its_tenant_moves_is_run_where_it_is_now():
    device, go = FakeDevice(), threading.Event()
    compile_step = device.compile
    with serve(affine_job("a"), device=device) as engine:
        x = np.ones((1, 4), np.float32)
        calls = []

        def hold_fused(step_fn, *specs):
            calls.append(1)
            if len(calls) > 1:
                go.wait(60)
            return compile_step(step_fn, *specs)

        device.compile = hold_fused
        ready = engine.add(affine_job("b", width=4))
        np.testing.assert_array_equal(engine.infer("b", x), x * 3)  # in its own lane
        server = engine._server
        failing = busy_with(engine, device, "a")
        moved = [engine.submit("b", x) for _ in range(3)]
        errors = [RuntimeError("once")]
        device.launch_error = lambda inputs: (
            errors.pop() if errors and _has_width(inputs, 4) else None
        )
        own = server.lanes[engine.stats().tenants["b"].lane]
        device.release()
        go.set()
        ready.result(60)
        failing.result(60)
        for future in moved:
            np.testing.assert_array_equal(future.result(60), x * 3)
        assert own.name not in server.lanes and not errors


def _has_width(inputs, width):
    return any(leaf.shape[-1] == width for leaf in jax.tree.leaves(inputs))


WIDE = 64
WIDE_BYTES = 4 * (WIDE * WIDE + WIDE)


def test_failure_11_the_tenant_that_does_not_fit_is_refused_and_the_others_stay():
    device = FakeDevice(memory_limit_bytes=6 * WIDE_BYTES)
    x = np.linspace(-1, 1, WIDE, dtype=np.float32)[None]
    with serve(
        affine_job("a", width=WIDE, pinned=True), device=device, max_batch_size=1
    ) as engine:
        bank = engine._server.lanes["all"].bank
        answer = engine.infer("a", x).tobytes()
        # Another program: nothing on the device can make room for it.
        big = affine_job("big", width=3 * WIDE)
        with pytest.raises(stfuse.DeviceError) as caught:
            engine.add(big).result(60)
        text = str(caught.value)
        for number in (10 * WIDE_BYTES - 6 * 4 * WIDE, 6 * WIDE_BYTES):
            assert f"{number:,}" in text, text
        assert "'big'" in text and "are missing" in text and "Remove jobs" in text
        wait_for(lambda: "big" not in engine.stats().tenants)
        assert engine._server.lanes["all"].bank is bank
        assert engine.infer("a", x).tobytes() == answer


def test_failure_11_pinned_tenants_are_served_until_memory_ends_bitwise_unchanged():
    device = FakeDevice(memory_limit_bytes=16 * WIDE_BYTES)
    x = np.linspace(-1, 1, WIDE, dtype=np.float32)[None]
    answers, refused = {}, None
    with stfuse.Engine(device=device, max_batch_size=1, max_slots=1) as engine:
        for i in range(40):
            job = affine_job(f"t{i}", width=WIDE, scale=i + 1.5, pinned=True)
            try:
                engine.add(job).result(60)
            except stfuse.DeviceError as error:
                refused = str(error)
                break
            answers[f"t{i}"] = engine.infer(f"t{i}", x).tobytes()
            for name, answer in answers.items():
                assert engine.infer(name, x).tobytes() == answer
        assert refused is not None and "does not fit" in refused
        assert len(answers) >= 8
        for name, answer in answers.items():
            assert engine.infer(name, x).tobytes() == answer
        wait_for(lambda: len(engine.stats().tenants) == len(answers))
        engine.remove("t0")  # its place is another's now
        engine.add(affine_job("late", width=WIDE, scale=9.0, pinned=True)).result(60)
        np.testing.assert_allclose(engine.infer("late", x), x * 9 + 1, rtol=1e-6)


def test_failure_11_a_bucket_that_does_not_fit_is_left_out_and_the_rest_serve():
    names = [f"t{i}" for i in range(4)]
    jobs = [affine_job(n, width=WIDE, scale=i + 1.0) for i, n in enumerate(names)]
    row_bytes = 2 * 4 * WIDE  # of a request and its answer
    limit = 10 * WIDE_BYTES + 2 * 64 * row_bytes
    device = FakeDevice(memory_limit_bytes=limit)
    x = np.ones((64, WIDE), np.float32)
    with serve(*jobs, device=device, max_batch_size=64) as engine:
        (lane,) = engine._server.lanes.values()
        found = {(b.slots[0], b.rows) for b in lane.steps}
        assert (4, 64) not in found and {(4, 1), (1, 64)} <= found
        for i, name in enumerate(names):
            np.testing.assert_array_equal(engine.infer(name, x), x * (i + 2))


def test_failure_11_a_compile_that_raises_refuses_only_the_job_it_was_for():
    device = FakeDevice()
    with serve(affine_job("a"), device=device) as engine:
        before = engine.infer("a", ROW).tobytes()
        bank = engine._server.lanes["all"].bank
        device.compile_error = MemoryError("out of memory")
        ready = engine.add(affine_job("b", width=4))
        with pytest.raises(stfuse.DeviceError, match=r"'b' was refused.*out of memory"):
            ready.result(60)
        assert engine._server.lanes["all"].bank is bank
        assert engine.infer("a", ROW).tobytes() == before


@pytest.mark.parametrize("is_compiler_broken", [False, True])
def test_failure_10_a_lane_that_begins_to_serve_serves_all(is_compiler_broken):
    """More slots than a step may have: the largest step is not everybody's."""
    device, may_compile = FakeDevice(), threading.Event()
    compile_step, lanes = device.compile, {}

    def gated(step_fn, *specs):
        if "all" in lanes:
            assert may_compile.wait(60)
            if is_compiler_broken:
                raise RuntimeError("no compiler")
        return compile_step(step_fn, *specs)

    device.compile = gated
    widths = [(width, i) for width in (3, 4, 5) for i in range(width - 2)]
    jobs = [affine_job(f"{w}-{i}", scale=i + 2.0, width=w) for w, i in widths]
    with serve(device=device, max_batch_size=1, max_slots=2) as engine:
        with engine._server.lock:  # so that the builder sees all at once
            for job in jobs:
                engine.add(job)
            lanes = engine._server.lanes
        for _ in range(2):  # before anything else is compiled, and then
            for job, (width, _) in zip(jobs, widths, strict=True):
                x = np.ones((1, width), np.float32)
                answer = engine.submit(job.name, x).result(60)
                np.testing.assert_array_equal(answer, job.apply_fn(job.params, x))
            may_compile.set()
