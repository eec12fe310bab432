"""Lanes: what stands in a slot, a staging buffer, an answer, and nothing else."""

import jax
import numpy as np
import pytest

import stfuse
from stfuse import _lane
from stfuse._cost import RECORDS
from stfuse._device import JaxDevice
from stfuse._lane import Member
from stfuse._stacked import cut
from stfuse._trace import trace
from stfuse._types import Bucket, Chunk
from stfuse.testing import affine_job

DEVICE = JaxDevice()


def member(job, generation=0):
    traces = tuple(map(trace, job.programs))
    return Member(job, traces, tuple(job.flatten_params(job.params)), generation)


def network(name, seed, width=4):
    """Return a job with arithmetic that rounds: matrix products and a softmax."""
    rng = np.random.default_rng(seed)
    params = [rng.normal(size=(width, width)).astype(np.float32) for _ in range(2)]
    return stfuse.Job(
        name,
        lambda p, x: jax.nn.softmax(jax.nn.relu(x @ p[0]) @ p[1]),
        params,
        np.zeros((1, width), np.float32),
    )


def run(lane, bucket, requests):
    """Serve ``{tenant: inputs}`` in one step; return ``{tenant: outputs}``."""
    chunks = [Chunk(name, (i,), len(x)) for i, (name, x) in enumerate(requests.items())]
    leaves_of = {i: [x] for i, x in enumerate(requests.values())}
    if bucket not in lane.steps:
        lane.steps[bucket] = _lane.compile_bucket(
            lane, bucket, DEVICE, cost=RECORDS["cpu"]
        )
    slots, buffers, placed = _lane.stage(lane, bucket, chunks, leaves_of)
    launched = DEVICE.launch(lane.steps[bucket], lane.bank.stacks, slots, buffers)
    outputs = DEVICE.read(launched)
    _lane.release(lane, bucket, slots, buffers)
    return {
        chunk.tenant: cut(outputs[s], k, 0, chunk.rows, JOBS[chunk.tenant])
        for chunk, (s, k) in zip(chunks, placed, strict=True)
    }


JOBS = {
    job.name: job
    for job in [network(f"n{i}", i) for i in range(6)] + [affine_job("a", width=2)]
}


@pytest.fixture(scope="module")
def lane():
    return _lane.build("all", [member(job) for job in JOBS.values()], DEVICE)


@pytest.mark.parametrize(
    "bucket", [Bucket((8, 0), 2), Bucket((4, 1), 2), Bucket((1, 0), 2)]
)
def test_an_answer_depends_on_nothing_but_the_tenant_and_the_bucket(lane, bucket):
    rng = np.random.default_rng(0)
    x = rng.normal(size=(1, 4)).astype(np.float32)
    seen = set()
    for _ in range(50):
        others = rng.permutation([n for n in JOBS if n not in ("n3", "a")])
        names = list(others[: rng.integers(0, bucket.slots[0])])
        names.insert(rng.integers(0, len(names) + 1), "n3")
        junk = [np.nan, np.inf, 3e38, 1.0, 0.0]
        requests = {
            name: x
            if name == "n3"
            else np.full((rng.integers(1, 3), 4), rng.choice(junk), np.float32)
            for name in names
        }
        seen.add(run(lane, bucket, requests)["n3"].tobytes())
    assert len(seen) == 1


def test_nothing_of_an_earlier_request_stays_in_a_buffer():
    lane = _lane.build("all", [member(JOBS[n]) for n in ("n0", "n1")], DEVICE)
    bucket = Bucket((2,), 4)
    canary = np.full((4, 4), 777.0, np.float32)
    run(lane, bucket, {"n0": canary, "n1": canary})
    run(lane, bucket, {"n1": np.ones((1, 4), np.float32)})
    ((_, buffers),) = lane.buffers[bucket]
    for leaf in jax.tree.leaves(buffers):
        assert not (leaf == 777.0).any()
        assert leaf.sum() == 4


def test_several_requests_of_one_tenant_share_a_slot_in_order():
    lane = _lane.build("all", [member(affine_job("a"))], DEVICE)
    bucket = Bucket((1,), 4)
    leaves_of = {7: [np.full((2, 3), 1, "f")], 9: [np.full((1, 3), 2, "f")]}
    chunk = Chunk("a", (7, 9), 3)
    _, buffers, placed = _lane.stage(lane, bucket, [chunk], leaves_of)
    assert placed == [(0, 0)]
    assert buffers[0][0][0, :, 0].tolist() == [1, 1, 2, 0]


def test_a_job_joins_leaves_and_swaps_without_touching_its_neighbors():
    lane = _lane.build("all", [member(JOBS[f"n{i}"]) for i in range(3)], DEVICE)
    bucket = Bucket((2,), 1)
    x = np.ones((1, 4), np.float32)
    before = run(lane, bucket, {"n0": x, "n2": x})
    assert _lane.join(lane, member(JOBS["n4"]))
    alone = JOBS["n4"].apply_fn(JOBS["n4"].params, x)
    np.testing.assert_allclose(run(lane, bucket, {"n4": x})["n4"], alone, rtol=1e-5)
    assert not _lane.join(lane, member(JOBS["n5"])), "the lane is full"
    assert not _lane.join(lane, member(JOBS["a"])), "another program"
    _lane.leave(lane, "n1")
    assert _lane.join(lane, member(JOBS["n5"]))
    after = run(lane, bucket, {"n0": x, "n2": x})
    for name in before:
        np.testing.assert_array_equal(before[name], after[name])


def test_a_write_that_would_end_a_sharing_is_refused():
    weights = np.arange(9, dtype=np.float32).reshape(3, 3)
    jobs = [
        stfuse.Job(n, lambda p, x: x @ p, weights, np.ones((1, 3), "f")) for n in "xy"
    ]
    lane = _lane.build("all", [member(job) for job in jobs], DEVICE)
    assert lane.bank.stacks[0][0].shape == (3, 3)
    other = stfuse.Job("x", jobs[0].apply_fn, weights + 1, np.ones((1, 3), "f"))
    assert not _lane.write(lane, member(other, 1))
    assert lane.generations["x"] == 0


def test_compiled_steps_are_shared_by_lanes_of_one_shape():
    bucket = Bucket((2,), 1)
    lanes = [
        _lane.build(n, [member(network(f"{n}{i}", i, 7)) for i in range(2)], DEVICE)
        for n in "pq"
    ]
    steps = [
        _lane.compile_bucket(lane, bucket, DEVICE, cost=RECORDS["cpu"])
        for lane in lanes
    ]
    assert steps[0] is steps[1]
