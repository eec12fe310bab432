"""FAILURES rows 12, 13, 14 and 20: swaps, spoilt banks, a lost device, leaks."""

import gc
import threading

import jax
import numpy as np
import pytest

import stfuse
from stfuse import _bank
from stfuse.testing import FakeDevice, affine_job
from tests.serving import ROW, assert_idle, busy_with, serve, wait_for

SHAPES = ((3,), (), (2, 3), (3,))  # leaves of one job, in several arrays of the bank


def weights(generation):
    return [np.full(shape, generation, np.float32) for shape in SHAPES]


def show_weights(params, x):
    """Return every weight, and the row: an answer of two generations shows both."""
    return [x * 0 + p.sum() / p.size for p in params], x


def generation_of(answer, x):
    """Return the one generation of an answer; its row must be the caller's own."""
    found, own = answer
    np.testing.assert_array_equal(own, x)
    values = np.unique(np.stack(found))
    assert len(values) == 1, f"a mix of generations: {values}"
    return int(values[0])


class Swapped:
    """A tenant whose weights are its generation; knows which ones were current."""

    def __init__(self, engine, name):
        self.engine, self.name = engine, name
        self.begun = self.ended = self.served = 0

    def swap(self, count):
        for _ in range(count):
            self.begun += 1
            self.engine.swap(self.name, weights(self.begun))
            self.ended = self.begun

    def ask(self, rng, is_over):
        """Ask until told that it is over; check every answer."""
        last = 0
        while not is_over():
            asked = []
            for _ in range(rng.integers(1, 9)):
                x = rng.normal(size=(rng.integers(1, 4), 3)).astype(np.float32)
                asked.append((self.ended, x, self.engine.submit(self.name, x)))
            for first, x, future in asked:
                found = generation_of(future.result(60), x)
                assert max(first, last) <= found <= self.begun
                last, self.served = found, self.served + 1


class Calls:
    """Functions on threads of their own; `join` raises what the first one raised."""

    def __init__(self, calls):
        self.errors = []
        self.threads = [
            threading.Thread(target=self._run, args=(call,)) for call in calls
        ]
        for thread in self.threads:
            thread.start()

    def _run(self, call):
        try:
            call()
        except BaseException as error:  # pytest's own failures are no Exception
            self.errors.append(error)

    def are_over(self):
        return not any(thread.is_alive() for thread in self.threads)

    def join(self):
        for thread in self.threads:
            thread.join(120)
        assert self.are_over()
        if self.errors:
            raise self.errors[0]


@pytest.mark.parametrize(
    ("policy", "swaps"), [("exclusive", 500), ("time", 500), ("space-time", 10_000)]
)
def test_failure_12_ten_thousand_swaps_under_load_never_mix(policy, swaps, seed):
    jobs = [stfuse.Job(name, show_weights, weights(0), ROW) for name in ("a", "b", "c")]
    with serve(*jobs, policy=policy, device=FakeDevice()) as engine:
        tenants = [Swapped(engine, job.name) for job in jobs]
        shares = (swaps // 2, swaps // 2, 0)  # the last one is a bystander
        swapping = Calls(
            [lambda t=t, n=n: t.swap(n) for t, n in zip(tenants, shares, strict=True)]
        )
        rngs = [np.random.default_rng((seed, i)) for i in range(len(tenants))]
        asking = Calls(
            [
                lambda t=t, rng=rng: t.ask(rng, swapping.are_over)
                for t, rng in zip(tenants, rngs, strict=True)
            ]
        )
        swapping.join()
        asking.join()
        for tenant, count in zip(tenants, shares, strict=True):
            assert tenant.served
            assert generation_of(engine.infer(tenant.name, ROW), ROW) == count
            assert engine.stats().tenants[tenant.name].generation == count
        assert_idle(engine)


WRONG = {
    "shape": [np.zeros((4,), "f"), *weights(9)[1:]],
    "dtype": [np.zeros((3,), "i4"), *weights(9)[1:]],
    "rank": [*weights(9)[:2], np.zeros(3, "f"), weights(9)[3]],
    "too few": weights(9)[:3],
}


@pytest.mark.parametrize("what", WRONG)
def test_failure_12_wrong_weights_are_refused_and_the_old_ones_stay(what):
    jobs = [stfuse.Job(name, show_weights, weights(7), ROW) for name in "ab"]
    with serve(*jobs, device=FakeDevice()) as engine:
        with pytest.raises(stfuse.JobError, match="'a'"):
            engine.swap("a", WRONG[what])
        for name in "ab":
            assert generation_of(engine.infer(name, ROW), ROW) == 7
            assert engine.stats().tenants[name].generation == 0


@pytest.fixture
def spoil(monkeypatch):
    """Return a function that has the next donating write eat its arrays and fail."""
    write = _bank._write_donating

    def spoil_next():
        def broken(arrays, written, where):
            monkeypatch.setattr(_bank, "_write_donating", write)
            for array in arrays:
                array.delete()
            raise RuntimeError("out of memory")

        monkeypatch.setattr(_bank, "_write_donating", broken)

    return spoil_next


def answers_of(engine, names):
    """Return each tenant's answer to one request, as bytes."""
    x = np.random.default_rng(0).normal(size=(2, 3)).astype(np.float32)
    return {name: engine.infer(name, x).tobytes() for name in names}


def three(**options):
    return [affine_job(n, scale=i + 0.3, **options) for i, n in enumerate("abc")]


def test_failure_13_a_swap_that_fails_after_donation_costs_nobody_anything(spoil):
    with serve(*three(), device=FakeDevice()) as engine:
        before = answers_of(engine, "abc")
        lane = engine._server.lanes["all"]
        for name in "ab":
            spoil()
            with pytest.raises(stfuse.DeviceError, match=rf"'{name}'.*out of memory"):
                engine.swap(name, affine_job("x", scale=9.0).params)
            assert engine._server.lanes.get("all") is not lane  # it lost its weights
            waiting = [engine.submit(n, ROW) for n in "abc" * 4]
            assert all(future.exception(60) is None for future in waiting)
            assert answers_of(engine, "abc") == before
        engine.swap("a", affine_job("x", scale=9.0).params)
        np.testing.assert_array_equal(engine.infer("a", ROW), ROW * 10)
        after = answers_of(engine, "bc")
        assert after == {n: before[n] for n in "bc"}
        assert_idle(engine)


def test_failure_13_a_join_that_fails_after_donation_costs_nobody_anything(spoil):
    with serve(*three(), device=FakeDevice()) as engine:
        before = answers_of(engine, "abc")
        spoil()
        ready = engine.add(affine_job("d", scale=9.0))  # a slot is free: it is written
        with pytest.raises(stfuse.DeviceError, match=r"'d' was refused.*out of memory"):
            ready.result(60)
        assert answers_of(engine, "abc") == before
        wait_for(lambda: "d" not in engine.stats().tenants)
        engine.add(affine_job("d", scale=9.0)).result(60)
        np.testing.assert_array_equal(engine.infer("d", ROW), ROW * 10)
        assert answers_of(engine, "abc") == before
        assert_idle(engine)


def test_failure_13_a_step_that_fails_gave_nothing_away():
    device = FakeDevice()
    with serve(*three(), device=device) as engine:
        before = answers_of(engine, "abc")
        for generation in range(5):  # donating writes and failing steps by turns
            engine.swap("a", three()[0].params)
            device.corrupt = lambda outputs: _raise(ValueError("boom"))
            failing = busy_with(engine, device, "b")
            device.release()
            assert failing.exception(60) is not None
            device.corrupt = None
            assert engine.health(timeout_s=60).is_healthy
            assert answers_of(engine, "abc") == before
            assert engine.stats().tenants["a"].generation == generation + 1


def _raise(error):
    raise error


def lost(*_):
    raise RuntimeError("device lost")


def lose(device, how):
    if how == "launch":
        device.launch_error = lost
    elif how == "read":
        device.read_error = RuntimeError("device lost")
    else:
        device.corrupt = lost


@pytest.mark.parametrize("how", ["launch", "read", "answer"])
def test_failure_14_a_device_lost_for_ever_ends_every_future(how, seed):
    """It is lost at some time under load; nothing hangs, and no thread is left."""
    rng, threads = np.random.default_rng(seed), threading.active_count()
    device = FakeDevice()
    engine = serve(*three(), device=device)
    futures, lost_after = [], rng.integers(1, 200)

    def call(name):
        refused = 0
        while refused < 20:
            try:
                futures.append(engine.submit(name, ROW))
            except (stfuse.DeviceError, stfuse.QueueFullError):
                refused += 1
            except stfuse.RequestError:
                assert name == "b"  # `change` was faster and removed it
                return

    def change():
        wait_for(lambda: engine.stats().problem)
        ready = engine.add(affine_job("d", width=2))
        engine.swap("a", affine_job("x").params)
        engine.remove("b")
        assert isinstance(ready.exception(60), stfuse.DeviceError)

    calls = Calls([*(lambda n=n: call(n) for n in "abc"), change])
    wait_for(lambda: len(futures) >= lost_after)
    lose(device, how)
    calls.join()
    outcomes = [future.exception(60) for future in futures]
    failed = [error for error in outcomes if error is not None]
    assert failed and all(isinstance(e, stfuse.DeviceError) for e in failed)
    health = engine.health(timeout_s=60)
    assert not health.is_healthy and "device lost" in health.reason
    assert_idle(engine)
    engine.close()
    assert threading.active_count() == threads


def test_failure_14_a_device_that_never_answers_is_no_health_and_closes_in_time():
    device, threads = FakeDevice(), threading.active_count()
    engine = serve(*three(), device=device)
    futures = [busy_with(engine, device, "a"), engine.submit("b", ROW)]
    assert not engine.health(timeout_s=0.01).is_healthy
    engine.close(timeout_s=0.01)
    for future in futures:
        assert isinstance(future.exception(0), stfuse.ClosedError)
    device.release()  # only so that the thread it holds may end, too
    wait_for(lambda: threading.active_count() == threads)


def test_failure_20_a_thousand_lives_of_a_tenant_leave_nothing_behind(seed):
    """Add, serve, swap, remove: every life under a name of its own."""
    rng = np.random.default_rng(seed)

    def live(number):
        name, scale = f"t{number}", float(rng.integers(2, 99))
        x = rng.integers(-9, 9, (rng.integers(1, 5), 3)).astype(np.float32)
        engine.add(affine_job(name, scale=scale))
        future = engine.submit(name, x)
        np.testing.assert_array_equal(future.result(60), scale * x + 1)
        engine.swap(name, affine_job(name, scale=scale + 1).params)
        np.testing.assert_array_equal(engine.infer(name, x), (scale + 1) * x + 1)
        engine.submit("stays", x)
        engine.submit(name, x).cancel()
        engine.remove(name)

    def held():
        wait_for(lambda: engine.infer("stays", ROW) is not None and is_idle(engine))
        engine._server.command(lambda: None).result(60)  # the last step is forgotten
        gc.collect()
        lane = engine._server.lanes["all"]
        return {
            "threads": threading.active_count(),
            "arrays": len(jax.live_arrays()),
            "tenants": len(engine._server.tenants),
            "places": len(lane.places),
            "generations": len(lane.generations),
            "queued": engine.stats().queued,
        }, np.array([len(gc.get_objects()), sum(x.nbytes for x in jax.live_arrays())])

    with serve(affine_job("stays"), device=FakeDevice()) as engine:
        for number in range(20):
            live(number)
        before, sizes = held()
        for number in range(20, 1020):
            live(number)
        after, sizes_after = held()
        assert after == before
        assert np.all(sizes_after < sizes + 1000)  # not one object or byte a life
        assert_idle(engine)


def is_idle(engine):
    builder = engine._builder  # what it compiles runs on the device, too
    is_building = builder._pending or builder.newcomers._builders is not None
    return not engine._server.books._requests and not is_building
