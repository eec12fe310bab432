"""Jobs that cast their weights are served from casts: half the bank, the same answers.

The models are Flax's: float32 weights, computed in bfloat16.
"""

import itertools

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from flax import linen as nn

import stfuse
from stfuse import _hoist, _memory
from stfuse._memory import bank_bytes
from stfuse.testing import FakeDevice
from tests import cases
from tests.serving import POLICIES, serve, wait_for

NAMES = ("a", "b", "c", "d")
ROW = np.linspace(-1, 1, 8, dtype=np.float32)[None]


class Net(nn.Module):
    width: int
    dtype: object = jnp.bfloat16

    @nn.compact
    def __call__(self, x):
        x = nn.relu(nn.Dense(self.width, dtype=self.dtype)(x))
        return nn.Dense(self.width, dtype=self.dtype)(x)


def weights_of(width, seed):
    """Return weights on the host, biases too unlike any other's."""
    rng = np.random.default_rng([width, seed])
    specs = jax.eval_shape(Net(width).init, jax.random.key(0), ROW)
    return jax.tree.map(
        lambda s: (rng.normal(size=s.shape) / 4).astype(np.float32), specs
    )


def net(name, seed, width=16, dtype=jnp.bfloat16, put=np.asarray):
    params = jax.tree.map(put, weights_of(width, seed))
    return stfuse.Job.from_linen(name, Net(width, dtype), params, ROW)


def assert_alone(job, found, params=None, x=ROW):
    alone = job.apply_fn(job.params if params is None else params, x)
    case = cases.Case(job.name, lambda s: (), lambda r, n: None, 48, ml_dtypes.bfloat16)
    cases.assert_same(np.asarray(found), np.asarray(alone), case)


def lane_of(engine, name="all"):
    return engine._server.lanes[name]


def held_bytes(engine):
    return sum(bank_bytes(lane) for lane in engine._server.lanes.values())


@pytest.mark.parametrize("put", [np.asarray, jnp.asarray], ids=["host", "device"])
@pytest.mark.parametrize("policy", POLICIES)
def test_jobs_are_served_as_if_their_weights_were_stored_as_casts(policy, put):
    widths = dict(zip(NAMES, (16, 16, 24, 24), strict=True))
    jobs = [net(n, i, widths[n], put=put) for i, n in enumerate(NAMES)]
    with serve(*jobs, policy=policy) as engine:
        for job in jobs:
            assert_alone(job, engine.infer(job.name, ROW))
        half, plans = held_bytes(engine), plans_of(engine)
    stored = [stored_as_casts(job) for job in jobs]
    with serve(*stored, policy=policy) as engine:
        assert (half, plans) == (held_bytes(engine), plans_of(engine))
    for job in jobs:
        leaves = jax.tree.leaves(job.params)
        assert all(x.dtype == np.float32 for x in leaves), "the job's own stay"


def stored_as_casts(job):
    params = jax.tree.map(lambda x: x.astype(ml_dtypes.bfloat16), job.params)
    return stfuse.Job(job.name, job.apply_fn, params, ROW)


def plans_of(engine):
    lanes = engine._server.lanes.values()
    return {(tuple(t.key for t in lane.traces), lane.plan.launches) for lane in lanes}


def test_the_bank_of_one_width_is_half_as_large():
    found = {}
    for dtype in (np.float32, jnp.bfloat16):
        with serve(*[net(n, i, 16, dtype) for i, n in enumerate(NAMES)]) as engine:
            found[dtype] = held_bytes(engine)
    size = sum(x.size for x in jax.tree.leaves(weights_of(16, 0)))
    assert found == {np.float32: 4 * 4 * size, jnp.bfloat16: 4 * 2 * size}


def test_swap_remove_and_add_bring_new_weights():
    jobs = [net(n, i) for i, n in enumerate(NAMES)]
    with serve(*jobs) as engine:
        lane, before = lane_of(engine), engine.infer("a", ROW)
        new = weights_of(16, 9)
        engine.swap("b", new)
        assert_alone(jobs[1], engine.infer("b", ROW), new)
        engine.swap("b", jobs[1].params)
        assert_alone(jobs[1], engine.infer("b", ROW))
        engine.remove("c")
        late = net("e", 7)
        engine.add(late).result(60)
        assert lane_of(engine) is lane and len(lane.places) == 4, "it took the slot"
        assert_alone(late, engine.infer("e", ROW))
        np.testing.assert_array_equal(engine.infer("a", ROW), before)


def test_a_shared_leaf_stays_shared_until_a_swap_ends_it():
    trunk = jax.tree.map(jnp.asarray, weights_of(16, 0)["params"]["Dense_0"])

    def tuned(name, seed):
        own = weights_of(16, seed)["params"]
        params = {"params": {**own, "Dense_0": trunk}}
        return stfuse.Job.from_linen(name, Net(16), params, ROW)

    jobs = [tuned(n, i) for i, n in enumerate(NAMES, 1)]
    with serve(*jobs) as engine:
        shapes = [x.shape for x in lane_of(engine).bank.stacks]
        assert sorted(shapes) == [(4, 16), (4, 16, 16), (8, 16), (16,)]
        members = [t.member for t in engine._server.tenants.values()]
        kernels = {id(x) for m in members for x in m.params if x.shape == (8, 16)}
        assert len(kernels) == 1, "one array, so no bytes have to be compared"
        new = weights_of(16, 9)
        engine.swap("b", new)
        assert (4, 8, 16) in [x.shape for x in lane_of(engine).bank.stacks]
        assert_alone(jobs[1], engine.infer("b", ROW), new)
        for job in (jobs[0], *jobs[2:]):
            assert_alone(job, engine.infer(job.name, ROW))


def encode(params, x):
    """Mean over the values that are not zero; every use of a weight casts it."""
    table, kernel = (params[k].astype(jnp.bfloat16) for k in ("table", "kernel"))
    places = table[: x.shape[1]]
    y = jnp.tanh(x.astype(jnp.bfloat16)[..., None] * places)
    return jnp.sum(jnp.where(x[..., None] == 0, 0, y), 1) @ kernel


def test_all_lengths_of_a_job_read_one_bank_of_casts():
    def encoder(name, seed):
        rng = np.random.default_rng(seed)
        params = {
            "table": rng.normal(size=(16, 8)).astype(np.float32),
            "kernel": rng.normal(size=(8, 8)).astype(np.float32),
        }
        samples = [np.zeros((1, n), np.float32) for n in (4, 8, 16)]
        return stfuse.Job(name, encode, params, samples, pad_values=0)

    jobs = [encoder(n, i) for i, n in enumerate(NAMES)]
    with serve(*jobs, max_batch_size=1) as engine:
        lane = lane_of(engine)
        assert len(lane.traces) == 3 and set(lane.layout.bank_of) == {0}
        assert held_bytes(engine) == 2 * 4 * (16 * 8 + 8 * 8)
        new = encoder("b", 9).params
        engine.swap("b", new)
        for length in (3, 8, 13):
            x = np.linspace(0.1, 1, length, dtype=np.float32)[None]
            for job in jobs:
                params = new if job.name == "b" else None
                assert_alone(job, engine.infer(job.name, x), params, x)


def test_more_tenants_than_slots_travel_as_casts():
    kept = 2 * sum(x.size for x in jax.tree.leaves(weights_of(16, 0)))
    # Not for 4 slots more: steps take 16, for they cast back before CPUs multiply.
    device = FakeDevice(memory_limit_bytes=23 * kept)
    jobs = [net(f"t{i}", i) for i in range(8)]
    engine = stfuse.Engine(device=device, max_batch_size=1, max_slots=4)
    with engine:
        for job in jobs:
            engine.add(job).result(60)
        assert lane_of(engine).capacities == (4,) and held_bytes(engine) == 4 * kept
        new = weights_of(16, 99)
        engine.swap("t0", new)
        for _ in range(2):
            for i, job in enumerate(jobs):
                found = engine.infer(job.name, ROW)
                assert_alone(job, found, None if i else new)
        assert engine._server.members.residency.num_moves > 4
        hosts = [t for t in engine._server.tenants.values() if t.is_on_host]
        assert {x.dtype for t in hosts for x in t.member.params} == {
            jnp.dtype(jnp.bfloat16)
        }


def test_the_bytes_of_the_casts_are_what_memory_is_asked_for(monkeypatch):
    asked = []
    check = _memory.Memory.check

    def watched(self, weights_bytes, *args, **options):
        asked.append(weights_bytes)
        check(self, weights_bytes, *args, **options)

    monkeypatch.setattr(_memory.Memory, "check", watched)
    with serve(net("a", 0)) as engine:
        assert max(asked) == held_bytes(engine)


def broken(monkeypatch, text="out of memory"):
    def fail(chain):
        raise MemoryError(text)

    monkeypatch.setattr(_hoist, "_compiled", fail)


def test_weights_that_cannot_be_prepared_are_their_own_jobs_trouble(monkeypatch):
    jobs = [net("a", 0), net("b", 1)]
    with serve(*jobs) as engine:
        broken(monkeypatch)
        error = engine.add(net("c", 2)).exception(60)
        assert isinstance(error, stfuse.DeviceError) and error.jobs == ("c",)
        assert "Engine.add" in str(error) and "out of memory" in str(error)
        assert engine.health(timeout_s=60).num_tenants == 2
        with pytest.raises(stfuse.DeviceError, match=r"swap.*'a'.*out of memory"):
            engine.swap("a", weights_of(16, 9))
        with pytest.raises(stfuse.JobError, match="params do not fit"):
            engine.swap("a", weights_of(24, 9))
        for job in jobs:
            assert_alone(job, engine.infer(job.name, ROW))
        monkeypatch.undo()
        late = net("c", 2)
        engine.add(late).result(60)
        assert_alone(late, engine.infer("c", ROW))


def test_every_answer_is_of_one_generation_while_weights_are_swapped():
    rng = np.random.default_rng(0)
    jobs = [net(n, i) for i, n in enumerate(NAMES)]
    sets = [weights_of(16, 20 + i) for i in range(3)]
    with serve(*jobs) as engine:
        known = []
        for new in sets:
            engine.swap("a", new)
            known.append(engine.infer("a", ROW).astype("f"))
        pairs = itertools.combinations(known, 2)
        assert min(np.abs(one - other).max() for one, other in pairs) > 0.1
        engine.swap("a", sets[0])
        futures = []
        for _ in range(20):
            futures += [engine.submit("a", ROW) for _ in range(3)]
            i = int(rng.integers(3))
            engine.swap("a", sets[i])
            assert np.abs(engine.infer("a", ROW).astype("f") - known[i]).max() < 0.05
        for future in futures:  # with other rows in the step a sum may round otherwise
            found = future.result(60).astype("f")
            assert min(np.abs(found - one).max() for one in known) < 0.05


def test_a_job_that_stores_casts_itself_is_of_the_same_program():
    jobs = [net("a", 0), stored_as_casts(net("b", 1))]
    with serve(*jobs) as engine:
        lane = lane_of(engine)
        assert len(lane.traces) == 1 and lane.capacities == (2,)
        for job in jobs:
            assert_alone(job, engine.infer(job.name, ROW))


def test_a_slow_program_is_still_evicted_and_served_alone():
    """Jobs are moved between lanes by their programs, as they are served."""
    jobs = [net("a", 0), net("b", 1), net("wide", 2, width=24)]
    with serve(*jobs) as engine:
        tenant = engine._server.tenants["wide"]
        tenant.home = engine._builder._regroup.new_lane("wide")
        engine._builder.request(tenant.home)
        engine._builder.request("all")
        wait_for(lambda: tenant.home is None and tenant.lane != "all")
        assert held_bytes(engine) > bank_bytes(lane_of(engine)) > 0
        for job in jobs:
            assert_alone(job, engine.infer(job.name, ROW))
