"""FAILURES rows 2, 18 and 19: whose bytes an answer holds, and from which request."""

import threading

import jax
import numpy as np
import pytest

from stfuse import _lane
from stfuse._cache import buckets
from stfuse.testing import FakeDevice, affine_job
from tests.serving import ROW, assert_idle, serve
from tests.test_lane import H200, JOBS, SMALL, UNLIKE, build, jobs, member, run

# How far answers of one request may be apart across buckets, in units of the last
# place of the largest one; at one bucket they are equal.
ACROSS_BUCKETS = {"equal jobs": 4, "unlike jobs": 4}
JUNK = np.array([np.nan, np.inf, -np.inf, 3e38, 1.0, 0.0], np.float32)


def width_of(name):
    return 4 if name < "w" else 7


def shuffled(lane, rng):
    """Give the lane's jobs other slots."""
    names = list(lane.places)
    for name in names:
        _lane.leave(lane, name)
    for name in rng.permutation(names):
        assert _lane.join(lane, member(JOBS[name]))


def neighbors(lane, bucket, name, x, rng):
    """Return a step's requests: one of them given, the others' at random."""
    ((species, _),) = lane.places[name]
    left = list(bucket.slots)
    left[species] -= 1
    chosen = {name: x}
    for other in rng.permutation([n for n in lane.places if n != name]):
        ((s, _),) = lane.places[other]
        if left[s] and rng.random() < 0.7:
            left[s] -= 1
            shape = (rng.integers(1, bucket.rows + 1), width_of(other))
            chosen[str(other)] = np.full(shape, rng.choice(JUNK), np.float32)
    order = rng.permutation(list(chosen))
    return {str(n): chosen[str(n)] for n in order}


@pytest.mark.parametrize(
    ("kind", "names", "name"),
    [("equal jobs", SMALL, "n3"), ("unlike jobs", UNLIKE, "w0")],
    ids=["equal jobs", "unlike jobs"],
)
def test_failure_02_one_request_has_one_answer_whoever_shares_its_step(
    kind, names, name, seed
):
    """200 times in each bucket, in other company and in another slot each time."""
    rng = np.random.default_rng(seed)
    lane = build(*jobs(*names), cost=H200)
    x = rng.normal(size=(1, width_of(name))).astype(np.float32)
    ((species, _),) = lane.places[name]
    found = []
    for bucket in buckets(lane.capacities, 64, (1, 2)):
        if not bucket.slots[species]:
            continue
        seen = set()
        for i in range(200):
            if i % 20 == 0:
                shuffled(lane, rng)
            requests = neighbors(lane, bucket, name, x, rng)
            seen.add(run(lane, bucket, requests)[name].tobytes())
        assert len(seen) == 1, f"{bucket}: {len(seen)} answers"
        found.append(np.frombuffer(seen.pop(), np.float32))
    assert len(found) >= 4
    spread = np.max(np.abs(np.stack(found) - found[0]))
    last_place = np.spacing(np.max(np.abs(found[0])))
    assert spread <= ACROSS_BUCKETS[kind] * last_place


def test_failure_18_nothing_of_one_request_is_left_for_another(seed):
    """A writes a canary into every buffer; B's steps hold B's rows and zeros only."""
    rng, device = np.random.default_rng(seed), FakeDevice()
    staged, is_b_alone = [], threading.Event()

    def look(inputs):
        if is_b_alone.is_set():
            staged.extend(np.array(x) for x in jax.tree.leaves(inputs))

    with serve(affine_job("a"), affine_job("b"), device=device) as engine:
        device.launch_error = look
        for _ in range(50):
            full = [
                engine.submit(n, np.full((rows, 3), 777.0, np.float32))
                for n, rows in (("a", 4), ("b", 4), ("a", rng.integers(1, 5)))
            ]
            for future in full:
                np.testing.assert_array_equal(future.result(60), 2 * 777.0 + 1)
            is_b_alone.set()
            x = rng.integers(1, 9, (rng.integers(1, 4), 3)).astype(np.float32)
            answer = engine.infer("b", x)
            is_b_alone.clear()
            np.testing.assert_array_equal(answer, 2 * x + 1)
            for buffer in staged:
                rows = buffer.reshape(-1, 3)
                held = rows[rows.any(-1)]
                np.testing.assert_array_equal(held, x)
            assert staged
            staged.clear()


@pytest.mark.parametrize("computes", [True, False], ids=["device", "host memory"])
def test_failure_18_an_answer_is_its_callers_own_memory(computes, seed):
    """Whoever writes into an answer changes no other, sent together or later."""
    rng, device = np.random.default_rng(seed), FakeDevice(computes=computes)
    with serve(affine_job("a"), affine_job("b"), device=device) as engine:
        kept = []
        for _ in range(20):
            x = rng.integers(1, 9, (4, 3)).astype(np.float32)
            futures = [engine.submit(rng.choice(["a", "b"]), x[:2]) for _ in range(5)]
            answers = [future.result(60) for future in futures]
            expected = (2 * x[:2] + 1) if computes else np.zeros((2, 3))
            for answer in answers:
                np.testing.assert_array_equal(answer, expected)
                assert answer.base is None and answer.flags.writeable
                answer[:] = -1
            kept += answers
        assert all((answer == -1).all() for answer in kept)
        for lane in engine._server.lanes.values():
            buffers = jax.tree.leaves(list(lane.buffers.values()))
            assert buffers
            for buffer in buffers:
                assert not any(np.shares_memory(buffer, answer) for answer in kept)


def test_failure_19_ten_thousand_requests_at_once_get_their_own_answers(seed):
    """All payloads have one shape; every value occurs once."""
    num_threads, each, num_jobs = 8, 1250, 16
    own = [affine_job(f"j{i}", scale=i + 1.0, shift=-i) for i in range(num_jobs)]
    start, wrong = threading.Barrier(num_threads), []

    def call(k):
        rng, asked = np.random.default_rng((seed, k)), []
        start.wait(60)
        for n in range(each):
            i = int(rng.integers(num_jobs))
            x = ROW * (k * each + n)
            asked.append((i, x, engine.submit(f"j{i}", x)))
        for i, x, future in asked:
            if not np.array_equal(future.result(60), (i + 1) * x - i):
                wrong.append((i, x))

    options = {"max_queue_size": num_threads * each, "device": FakeDevice()}
    with serve(*own, **options) as engine:
        threads = [threading.Thread(target=call, args=(k,)) for k in range(num_threads)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(120)
            assert not thread.is_alive()
        assert not wrong
        stats = engine.stats()
        assert stats.served == num_threads * each
        assert stats.tenants_per_step > 1
        assert_idle(engine)
