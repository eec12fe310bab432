"""Lanes: what stands in a slot, a staging buffer, an answer, and nothing else."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import stfuse
from stfuse import _bank, _lane, _regions, _staging
from stfuse._cost import RECORDS
from stfuse._device import JaxDevice
from stfuse._lane import Member
from stfuse._stacked import cut
from stfuse._trace import trace
from stfuse._types import Bucket, Chunk
from stfuse.testing import FakeDevice, affine_job

DEVICE = JaxDevice()
CPU, H200 = RECORDS["cpu"], RECORDS["h200"]  # the latter merges whatever it may


def build(*jobs, name="all", cost=CPU):
    return _lane.build(name, list(map(member, jobs)), DEVICE, cost=cost)


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
    cost = lane.plan.cost
    chunks = [Chunk(name, (i,), len(x)) for i, (name, x) in enumerate(requests.items())]
    leaves_of = {i: [x.tobytes()] for i, x in enumerate(requests.values())}
    if bucket not in lane.steps:
        lane.steps[bucket] = _lane.compile_bucket(lane, bucket, DEVICE, cost=cost)
    staged, placed = _staging.stage(lane, bucket, chunks, leaves_of)
    slots, buffers, _ = staged
    launched = DEVICE.launch(lane.steps[bucket], lane.bank.stacks, slots, buffers)
    outputs = DEVICE.read(launched)
    _staging.release(lane, bucket, staged)
    return {
        chunk.tenant: cut(
            outputs,
            _staging.cut_places(lane, bucket, s),
            k,
            0,
            chunk.rows,
            JOBS[chunk.tenant],
        )
        for chunk, (s, k) in zip(chunks, placed, strict=True)
    }


JOBS = {
    job.name: job
    for job in [
        *(network(f"n{i}", i) for i in range(6)),
        *(network(f"w{i}", 10 + i, width=7) for i in range(4)),
        affine_job("a", width=2),
    ]
}
SMALL = [f"n{i}" for i in range(6)]


def jobs(*names):
    return [JOBS[name] for name in names]


def test_failure_18_nothing_of_an_earlier_request_stays_in_a_buffer():
    lane = build(*jobs("n0", "n1"))
    bucket = Bucket((2,), 4)
    canary = np.full((4, 4), 777.0, np.float32)
    run(lane, bucket, {"n0": canary, "n1": canary})
    run(lane, bucket, {"n1": np.ones((1, 4), np.float32)})
    ((_, buffers, _),) = lane.buffers[bucket]
    for leaf in jax.tree.leaves(buffers):
        assert not (leaf == 777.0).any()
        assert leaf.sum() == 4


def test_several_requests_of_one_tenant_share_a_slot_in_order():
    lane = build(affine_job("a"))
    bucket = Bucket((1,), 4)
    ones, twos = np.full((2, 3), 1, "f"), np.full((1, 3), 2, "f")
    leaves_of = {7: [ones.tobytes()], 9: [twos.tobytes()]}
    chunk = Chunk("a", (7, 9), 3)
    (_, buffers, _), placed = _staging.stage(lane, bucket, [chunk], leaves_of)
    assert placed == [(0, 0)]
    assert buffers[0][0, :, 0].tolist() == [1, 1, 2, 0]


def test_a_tenant_has_several_slots_of_an_open_step():
    lane = build(*[network(f"n{i}", i) for i in range(8)])
    bucket = Bucket((8,), 1, is_open=True)
    lane.steps[bucket] = _lane.compile_bucket(lane, bucket, DEVICE, cost=CPU)
    rng = np.random.default_rng(0)
    rows = rng.normal(size=(7, 1, 4)).astype(np.float32)
    rows[5] = rows[1]
    who = ["n7", "n2", "n2", "n0", "n7", "n2", "n2"]
    chunks = [Chunk(name, (i,), 1) for i, name in enumerate(who)]
    leaves_of = {i: [x.tobytes()] for i, x in enumerate(rows)}
    staged, placed = _staging.stage(lane, bucket, chunks, leaves_of)
    slots, buffers, _ = staged
    assert placed == [(0, k) for k in range(7)]
    launched = DEVICE.launch(lane.steps[bucket], lane.bank.stacks, slots, buffers)
    outputs = DEVICE.read(launched)
    places = _staging.cut_places(lane, bucket, 0)
    answers = [cut(outputs, places, k, 0, 1, network("n0", 0)) for k in range(7)]
    assert answers[1].tobytes() == answers[5].tobytes()
    for name, x, answer in zip(who, rows, answers, strict=True):
        job = network(name, int(name[1:]))
        alone = job.apply_fn(job.params, x)
        np.testing.assert_allclose(answer, alone, rtol=1e-5)


def test_a_job_joins_leaves_and_swaps_without_touching_its_neighbors():
    lane = build(*jobs("n0", "n1", "n2"))
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


def test_staged_weights_are_the_jobs_own_on_the_device_and_shared_ones_stay():
    weights = np.arange(9, dtype=np.float32).reshape(3, 3)

    def apply_fn(p, x):
        return (x + p["own"]) @ p["shared"]

    def made(name, own):
        params = {"own": np.full(3, own, "f"), "shared": weights}
        return member(stfuse.Job(name, apply_fn, params, np.ones((1, 3), "f")))

    lane = build(*(made(name, n).job for n, name in enumerate("xyz")))
    _lane.leave(lane, "y")
    new = made("w", 9.0)
    assert _lane.has_room(lane, new)
    staged = _lane.staged(lane, new)
    own, shared = staged.params
    assert own.sharding == lane.bank.stacks[0].sharding
    assert shared is new.params[1]
    np.testing.assert_array_equal(own, new.params[0])
    assert _lane.staged(lane, staged).params[0] is own  # it is there
    assert _lane.join(lane, staged)
    (s, slot), *_ = lane.places["w"]
    read = _bank.read(lane.layout, lane.bank, lane.layout.bank_of[s], slot)
    for found, leaf in zip(read, new.params, strict=True):
        np.testing.assert_array_equal(found, leaf)
    assert _lane.join(lane, made("v", 3.0)) and not _lane.has_room(lane, new)
    assert not _lane.has_room(lane, member(JOBS["a"])), "another program"


def test_a_write_that_would_end_a_sharing_is_refused():
    weights = np.arange(9, dtype=np.float32).reshape(3, 3)
    pair = [
        stfuse.Job(n, lambda p, x: x @ p, weights, np.ones((1, 3), "f")) for n in "xy"
    ]
    lane = build(*pair)
    assert lane.bank.stacks[0].shape == (3, 3)
    other = stfuse.Job("x", pair[0].apply_fn, weights + 1, np.ones((1, 3), "f"))
    assert not _lane.write(lane, member(other, 1))
    assert lane.generations["x"] == 0


def test_compiled_steps_are_shared_by_lanes_of_one_shape():
    bucket = Bucket((2,), 1)
    lanes = [build(*(network(f"{n}{i}", i, 7) for i in range(2)), name=n) for n in "pq"]
    steps = [_lane.compile_bucket(lane, bucket, DEVICE, cost=CPU) for lane in lanes]
    assert steps[0] is steps[1]


# Two species of unlike widths whose every launch is merged.
UNLIKE = ("n0", "w0", "n1", "w1", "n2")


@pytest.fixture
def merged():
    lane = build(*jobs(*UNLIKE), cost=H200)
    assert lane.capacities == (4, 2)
    assert all(len(launch.jobs) == 5 for launch in lane.plan.launches)
    assert [x.shape for x in lane.bank.stacks] == [(6, 7, 7), (6, 7, 7)]
    return lane


def requests_for(*names, rows=1, seed=0):
    rng = np.random.default_rng(seed)
    return {
        name: rng.normal(size=(rows, 4 if name < "w" else 7)).astype(np.float32)
        for name in names
    }


def assert_alone(answers, requests):
    for name, x in requests.items():
        alone = JOBS[name].apply_fn(JOBS[name].params, x)
        assert answers[name].shape == alone.shape
        np.testing.assert_allclose(answers[name], alone, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(
    "slots, names",
    [
        ((4, 2), UNLIKE),
        ((4, 2), ("w1", "n2")),
        ((2, 2), ("n2", "w0", "n0", "w1")),
        ((4, 1), ("w1", "n1")),
        ((2, 1), ("w1", "n2", "n0")),
        ((1, 0), ("n1",)),
        ((4, 0), ("n2", "n1")),
        ((0, 1), ("w1",)),
        ((0, 2), ("w1", "w0")),
    ],
    ids=lambda x: "+".join(map(str, x)),
)
def test_unlike_species_answer_as_alone_in_shared_launches(merged, slots, names):
    for rows in (1, 2):
        requests = requests_for(*names, rows=rows)
        assert_alone(run(merged, Bucket(slots, 2), requests), requests)


def test_failure_18_a_buffer_of_unlike_species_is_zero_wherever_no_request_is(merged):
    bucket = Bucket((4, 2), 2)
    full = {n: np.full_like(x, 777) for n, x in requests_for(*UNLIKE, rows=2).items()}
    run(merged, bucket, full)
    ones = {n: np.ones_like(x) for n, x in requests_for("n2", "w1").items()}
    run(merged, bucket, ones)
    ((_, buffers, _),) = merged.buffers[bucket]
    (buffer,) = buffers
    assert buffer.shape == (6, 2, 7)
    expected = np.zeros_like(buffer)
    expected[2, 0, :4] = expected[5, 0, :] = 1
    np.testing.assert_array_equal(buffer, expected)


def test_jobs_of_unlike_species_join_leave_and_swap_beside_each_other(merged):
    bucket = Bucket((4, 2), 1)
    kept = requests_for("n0", "w0", "n2")
    before = run(merged, bucket, kept)

    def assert_kept():
        after = run(merged, bucket, kept)
        for name in kept:
            np.testing.assert_array_equal(before[name], after[name])

    def assert_served(name):
        asked = requests_for(name, *kept)
        assert_alone(run(merged, bucket, asked), asked)
        assert_kept()

    assert not _lane.join(merged, member(JOBS["w2"])), "its species is full"
    assert not _lane.join(merged, member(JOBS["a"])), "another program"
    assert _lane.join(merged, member(JOBS["n3"]))
    assert_served("n3")
    _lane.leave(merged, "w1")
    _lane.leave(merged, "n1")
    assert_kept()
    assert _lane.join(merged, member(JOBS["w2"]))
    assert merged.places["w2"] == ((1, 1),)
    assert_served("w2")
    for name, other in {"w2": "w3", "n3": "n5"}.items():  # new weights, old name
        new = dataclasses.replace(member(JOBS[other], 1), job=JOBS[name])
        assert _lane.write(merged, new) and merged.generations[name] == 1
        x = requests_for(name)[name]
        answer = run(merged, bucket, {name: x})[name]
        assert_alone({other: answer}, {other: x})
        assert_kept()
    stacks = [np.array(x) for x in merged.bank.stacks]
    for stack in stacks:  # four slots of width 4, then two of width 7
        assert not stack[:4, 4:].any() and not stack[:4, :, 4:].any()


def trunk_job(name, trunk, width, seed):
    """Return a job of a trunk that others have too, and a head of its own width."""
    head = np.random.default_rng(seed).normal(size=(3, width)).astype(np.float32)
    return stfuse.Job(
        name,
        lambda p, x: jnp.tanh(x @ p["trunk"]) @ p["head"],
        {"trunk": trunk, "head": head},
        np.zeros((1, 4), np.float32),
    )


def test_unlike_species_keep_a_trunk_once_and_no_write_may_end_that():
    trunk = np.random.default_rng(0).normal(size=(4, 3)).astype(np.float32)
    widths = {"a": 2, "b": 5, "c": 2, "d": 5}
    own = {n: trunk_job(n, trunk, w, i) for i, (n, w) in enumerate(widths.items())}
    lane = build(*own.values(), cost=H200)
    assert sorted(x.shape for x in lane.bank.stacks) == [(4, 3), (4, 3, 5)]
    assert [len(launch.jobs) for launch in lane.plan.launches] == [4, 4]
    before = [np.array(x) for x in lane.bank.stacks]
    for name, width in widths.items():
        assert not _lane.write(lane, member(trunk_job(name, trunk + 1, width, 9), 1))
        assert lane.generations[name] == 0
    for old, new in zip(before, lane.bank.stacks, strict=True):
        np.testing.assert_array_equal(old, new)
    assert _lane.write(lane, member(trunk_job("d", trunk.copy(), 5, 9), 1))
    _lane.leave(lane, "a")
    assert not _lane.join(lane, member(trunk_job("e", trunk + 1, 2, 9)))
    assert "e" not in lane.places
    assert _lane.join(lane, member(trunk_job("e", trunk.copy(), 2, 9)))


def test_a_step_whose_regions_a_compiler_refuses_is_compiled_without(monkeypatch):
    lane = build(network("a", 0, width=3), network("b", 1, width=5), cost=H200)
    refused = []

    def refuse(*_):
        refused.append(True)
        raise NotImplementedError("no such kernel")

    monkeypatch.setattr(_regions, "are_used", lambda cost, mode: mode != "plain")
    monkeypatch.setattr(_regions, "compute", refuse)
    bucket = Bucket(tuple(lane.capacities), 3)  # of which no step is compiled yet
    step = _lane.compile_bucket(lane, bucket, DEVICE, cost=H200)
    assert refused
    plain = _lane.compile_bucket(lane, bucket, DEVICE, cost=H200, lowering="plain")
    slots, inputs = _lane.specs(lane, bucket)
    ones = [np.ones(x.shape, x.dtype) for x in inputs]
    given = lane.bank.stacks, slots, ones
    for actual, expected in zip(step(*given), plain(*given), strict=True):
        np.testing.assert_array_equal(actual, expected)


@pytest.mark.parametrize("is_beside", [False, True])
def test_a_device_that_can_compile_beside_others_is_asked_to(is_beside):
    asked = []

    class Device(JaxDevice):
        name = "apart"  # shares no compiled step with others

        def compile(self, step_fn, *specs):
            asked.append("compile")
            return super().compile(step_fn, *specs)

        def compile_beside(self, step_fn, *specs):
            asked.append("compile_beside")
            return super().compile_beside(step_fn, *specs)

    lane, bucket = build(network("a", int(is_beside))), Bucket((1,), 1 + is_beside)
    _lane.compile_bucket(lane, bucket, Device(), cost=CPU, is_beside=is_beside)
    assert asked == ["compile_beside" if is_beside else "compile"]
    other = FakeDevice()  # one that has no such thing
    _lane.compile_bucket(lane, bucket, other, cost=CPU, is_beside=is_beside)
    assert other.num_compiles == 1
