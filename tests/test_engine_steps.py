"""What a step shows of itself: two in flight, its counts, its times, its trace."""

import itertools
import math
from concurrent.futures import ThreadPoolExecutor
from types import SimpleNamespace

import jax
import numpy as np
import pytest

import stfuse
from stfuse import DeadlineError, QueueFullError, _engine, _server
from stfuse._turns import Refusals
from stfuse.testing import FakeDevice, ManualClock, affine_job
from tests.serving import ROW, busy_with, serve, wait_for


class Recorder(FakeDevice):
    """Writes down how many steps are in flight whenever one is read."""

    def __init__(self):
        super().__init__()
        self.in_flight = 0
        self.seen = []

    def launch(self, *arguments):
        self.in_flight += 1
        return super().launch(*arguments)

    def read(self, outputs):
        self.seen.append(self.in_flight)
        found = super().read(outputs)
        self.in_flight -= 1
        return found


def test_while_there_is_work_a_step_is_read_with_another_one_behind_it():
    device = Recorder()
    with serve(affine_job("a"), device=device, max_batch_size=1) as engine:
        device.seen.clear()
        futures = [busy_with(engine, device, "a")]
        futures += [engine.submit("a", ROW) for _ in range(10)]
        device.release()
        for future in futures:
            np.testing.assert_array_equal(future.result(60), ROW * 3)
    assert device.seen == [1] + [2] * 9 + [1]


def test_the_host_is_timed_apart_from_the_device():
    clock = ManualClock()
    device = FakeDevice(clock, step_s=0.25)
    launch = device.launch

    def slow_launch(*arguments):
        clock.advance(0.5)
        return launch(*arguments)

    with serve(affine_job("a"), device=device, clock=clock) as engine:
        device.launch = slow_launch
        for _ in range(4):
            engine.infer("a", ROW)
        del device.launch
        engine.health(timeout_s=60)  # it runs once the last step was counted
        stats = engine.stats()
    assert stats.host == stfuse.HostStats(launch_s=0.5)
    # Launching takes time of the device as well: it may work meanwhile.
    assert stats.device_s == 0.75


def test_a_bucket_says_what_was_predicted_and_what_came():
    clock = ManualClock()
    step_s = [0.25]
    device = FakeDevice(clock, step_s=lambda inputs: step_s[0])
    with serve(affine_job("a"), device=device, clock=clock) as engine:
        engine.infer("a", ROW)
        step_s[0] = 1.0
        engine.infer("a", ROW)
        (bucket,) = engine.stats().buckets.values()
    assert bucket.steps == 2
    assert bucket.predicted_s == 0.25  # a median: one surprise does not move it
    assert bucket.measured_s == 0.625
    assert bucket.measured_p50_s == pytest.approx(0.25, rel=0.05)
    assert bucket.measured_p99_s == pytest.approx(1.0, rel=0.05)
    assert bucket.prediction_error == pytest.approx((0.0 + 3.0) / 2)


@pytest.mark.parametrize(
    ("batch_sizes", "rows"),
    [(None, {1, 2, 4, 6}), ((), {6}), ((6,), {6}), ([4, 2, 4], {2, 4, 6})],
)
def test_steps_are_compiled_for_the_batch_sizes_asked_for(batch_sizes, rows):
    options = {"max_batch_size": 6, "batch_sizes": batch_sizes}
    with serve(affine_job("a"), device=FakeDevice(), **options) as engine:
        assert {bucket.rows for bucket in engine._server.lanes["all"].steps} == rows
        expected = affine_job("a").apply_fn(affine_job("a").params, ROW)
        np.testing.assert_allclose(engine.infer("a", ROW), expected)


def test_a_bucket_that_stalls_made_look_slow_is_tried_again():
    clock, stall_s = ManualClock(), [0.0]

    def step_s(inputs):
        return 0.25 + (stall_s[0] if len(inputs[0]) == 2 else 0.0)

    device = FakeDevice(clock, step_s=step_s)
    jobs = [affine_job("a"), affine_job("b")]
    options = {"device": device, "clock": clock, "max_batch_size": 1}
    with serve(*jobs, **options, max_slots=2) as engine:

        def run(rounds):
            """Ask both so often; return how often the bucket of both ran."""
            before = engine.stats().buckets.get("all 2x1")
            for _ in range(rounds):
                futures = [busy_with(engine, device, "a")]
                futures += [engine.submit(name, ROW) for name in "ab"]
                device.release()
                for future in futures:
                    future.result(60)
            after = engine.stats().buckets["all 2x1"].steps
            return after - (before.steps if before else 0)

        assert run(8) >= 8
        stall_s[0] = 5.0
        run(20)
        assert run(4) == 0  # it has learnt that it is slow
        stall_s[0] = 0.0
        assert run(4) == 0
        run(64)
        assert run(4) >= 4


def test_refusals_are_counted_by_their_reason():
    clock, device = ManualClock(), FakeDevice()
    with serve(affine_job("a"), device=device, clock=clock, max_queue_size=2) as engine:
        running = busy_with(engine, device, "a")
        queued = [engine.submit("a", ROW, deadline_s=1.0) for _ in range(2)]
        for _ in range(3):
            with pytest.raises(stfuse.QueueFullError):
                engine.submit("a", ROW)
        with pytest.raises(stfuse.DeadlineError):
            engine.submit("a", ROW, deadline_s=0.0)
        stats = engine.stats()
        assert (stats.queued, stats.tenants["a"].queued) == (2, 2)
        clock.advance(2.0)
        device.release()
        running.result(60)
        assert all(isinstance(f.exception(60), stfuse.DeadlineError) for f in queued)
        found = engine.stats().tenants["a"]
    assert (found.queue_full, found.predicted_miss, found.unavailable) == (3, 1, 0)
    assert (found.rejected, found.expired, found.shed) == (4, 2, 6)
    assert math.isfinite(found.p99_s)


def test_failure_06_who_is_refused_rests_while_the_others_are_served(monkeypatch):
    device, rests = FakeDevice(), []
    monkeypatch.setattr(_engine, "REFUSALS", Refusals())
    with serve(*map(affine_job, "ab"), device=device, max_queue_size=1) as engine:
        running = busy_with(engine, device, "a")
        engine.submit("a", ROW)

        def rest(seconds):
            rests.append(seconds)  # another thread submits meanwhile: no lock is held
            with ThreadPoolExecutor(1) as pool:
                others = pool.submit(engine.submit, "b", ROW).result(60)
            if len(rests) == 1:
                device.release()
            others.result(60)

        clock = SimpleNamespace(sleep=rest, perf_counter=lambda: sum(rests))
        monkeypatch.setattr(_engine, "time", clock)
        for deadline_s, error in (None, QueueFullError), (0.0, DeadlineError):
            for _ in range(8):  # so many rests are one
                with pytest.raises(error):
                    engine.submit("a", ROW, deadline_s=deadline_s)
        assert rests == pytest.approx([8e-4, 8e-4])
        np.testing.assert_array_equal(running.result(60), ROW * 3)


def test_every_step_is_annotated_in_a_profile(tmp_path):
    with serve(affine_job("a")) as engine:
        with jax.profiler.trace(str(tmp_path)):
            for _ in range(3):
                engine.infer("a", ROW)
    (profile,) = tmp_path.rglob("*.xplane.pb")
    assert b"stfuse_step" in profile.read_bytes()
    with serve(affine_job("a")), jax.profiler.trace(str(tmp_path / "idle")):
        pass
    (profile,) = (tmp_path / "idle").rglob("*.xplane.pb")
    assert b"stfuse_step" not in profile.read_bytes()


def test_lives_are_logged_and_requests_are_not(caplog):
    device = FakeDevice()
    with caplog.at_level("INFO", logger="absl"):
        with serve(affine_job("a"), device=device, clock=ManualClock()) as engine:
            for _ in range(20):
                engine.infer("a", ROW)
            device.read_error = RuntimeError("gone")
            engine.health(timeout_s=60)
            device.read_error = None
            engine.health(timeout_s=60)
            engine.remove("a")
    texts = [r.getMessage() for r in caplog.records if "stfuse" in r.getMessage()]
    assert texts == [
        "stfuse: job 'a' added",
        "stfuse: job 'a' ready",
        "stfuse: the device is lost, the canary failed: RuntimeError: gone",
        "stfuse: the device is back",
        "stfuse: job 'a' left",
    ]


class Stopped(FakeDevice):
    """A clock that only its steps move, and a call for every launch."""

    def __init__(self):
        super().__init__()
        self.now_s = 0.0
        self.on_launch = lambda inputs: None

    def launch(self, compiled, bank, slots, inputs):
        self.on_launch(inputs)
        return super().launch(compiled, bank, slots, inputs)

    def read(self, outputs):
        found = super().read(outputs)
        self.now_s += 60.0
        return found


def test_a_step_that_follows_another_waits_for_company_while_it_would_not_run_anyway(
    monkeypatch,
):
    monkeypatch.setattr(_server, "_MOST_WAIT_S", 60.0)
    device, names, late = Stopped(), "abcd", []
    options = {"device": device, "clock": lambda: device.now_s, "max_batch_size": 1}
    jobs = [affine_job(name) for name in names]
    with serve(*jobs, **options, max_slots=4) as engine:

        def come(inputs):
            """While a and b are launched, a third one comes."""
            if len(inputs[0]) == 2 and not late:
                late.append(engine.submit("c", ROW))

        def wake_until(num_launches):
            def is_there():
                engine._server.wake()
                return device.num_launches >= num_launches

            wait_for(is_there)

        device.hold()
        before = device.num_launches + 1
        futures = [engine.submit("a", ROW)]
        wait_for(lambda: device.num_launches == before)
        device.on_launch = come
        futures += [engine.submit(name, ROW) for name in "ab"]
        wake_until(before + 1)
        device.release()
        wait_for(futures[0].done)  # from now on a and b alone are in flight
        futures.append(engine.submit("d", ROW))
        wake_until(before + 2)
        for future in futures + late:
            np.testing.assert_array_equal(future.result(60), ROW * 3)
        assert device.num_launches == before + 2  # c and d together


def test_a_step_that_is_done_sooner_than_ever_is_answered_soon():
    device = Stopped()  # a minute a step by its clock, and no time at all
    options = {"device": device, "clock": lambda: device.now_s}
    with serve(affine_job("a"), **options) as engine:
        for _ in range(3):
            np.testing.assert_array_equal(engine.submit("a", ROW).result(20), ROW * 3)


def test_a_step_is_known_to_keep_the_host_busy_too(monkeypatch):
    ticks = itertools.count()
    with serve(affine_job("a"), clock=lambda: next(ticks) * 1e-3) as engine:
        found, members = [], engine._server.members
        measured = members.measured

        def note(lane, bucket, step_s, host_s=0.0):
            found.append((step_s, host_s))
            return measured(lane, bucket, step_s, host_s)

        monkeypatch.setattr(members, "measured", note)
        for _ in range(2):
            engine.infer("a", ROW)
    # Each look at the clock is a millisecond: decide, stage, launch, fold; then answer.
    assert found[0][1] >= 3.9e-3
    assert found[1][1] >= 4.9e-3
