"""Regions: what one kernel computes, interpreted, is what each job's ops give alone."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import stfuse
from models import bert
from stfuse import _regions, _together
from stfuse._bank import open_shelves
from stfuse._evaluate import evaluate
from stfuse._part import Part
from stfuse._together import How
from tests import cases
from tests.cases import Case
from tests.region_jobs import GROUPS, fused_of, jobs_of, names_of


@pytest.fixture
def computed(monkeypatch):
    """Make every step use regions; list what they computed, and check their padding."""
    found = []
    compute = _regions.compute

    def checked(region, counts, operands, shapes):
        outs = compute(region, counts, operands, shapes)
        found.append((region, counts, outs))
        return outs

    monkeypatch.setattr(_regions, "are_used", lambda cost, mode: True)
    monkeypatch.setattr(_regions, "compute", checked)
    return found


def case_of(job):
    dtypes = [x.dtype for x in jax.tree.leaves(job.params)]
    is_short = any(d == jnp.bfloat16 for d in dtypes)
    return Case(job.name, None, None, 64, jnp.bfloat16 if is_short else np.float32)


def draw(job, rows, seed):
    rng = np.random.default_rng(seed)

    def leaf(spec):
        x = rng.normal(size=(rows, *spec.shape[1:]))
        return np.asarray(x > -0.5) if spec.dtype == np.bool_ else x.astype(spec.dtype)

    return jax.tree.map(leaf, job.example)


def requests_of(jobs, rows):
    pairs = zip(jobs, rows, strict=False)
    return {job.name: draw(job, n, i) for i, (job, n) in enumerate(pairs)}


def assert_alone(jobs, outs, requests):
    for job in jobs:
        if job.name in requests:
            expected = cases.alone(job, requests[job.name])
            cases.assert_same(outs[job.name], expected, case_of(job))


@pytest.mark.parametrize("group", GROUPS)
def test_what_a_region_computes_is_what_each_job_gets_alone(group, computed):
    jobs = jobs_of(group)
    fused, requests = fused_of(jobs), requests_of(jobs, [1, 3, 2, 1])
    outs = fused(fused.pack(), requests)
    assert computed
    assert_alone(jobs, outs, requests)


@pytest.mark.parametrize("group", ["norms", "attention_of_unlike", "extremes"])
def test_what_a_region_leaves_is_zero_in_its_padding(group, computed):
    jobs = jobs_of(group)
    fused = fused_of(jobs)
    stacked = fused.stack(requests_of(jobs, [1, 1, 1]))
    plan, counts = fused.plan, {s: 1 for s in range(len(jobs))}
    part = Part(plan, fused._layout, counts)
    slots = dict.fromkeys(counts)

    @jax.jit
    def run(stacks, inputs):
        computed.clear()
        stacks = dict(enumerate(open_shelves(fused._layout, stacks)))
        env = part.env(part.traces, part.named(stacks, slots))
        part.enter(env, [x[:, 0] for x in inputs])
        evaluate(env, plan.nodes, How(1, plan.cost, "heuristic"))
        return [outs for _, _, outs in computed]

    found = run(fused.pack().stacks, stacked.inputs)
    assert computed
    for (region, _, _), outs in zip(computed, found, strict=True):
        for number, array in zip(region.outputs, outs, strict=True):
            for row, shape in zip(array, region.values[number].shapes, strict=True):
                row = np.array(row, np.float32)
                row[tuple(map(slice, shape))] = 0
                assert not row.any()


@pytest.mark.parametrize("group", ["norms", "attention", "extremes", "softmaxes"])
@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_what_is_not_finite_stays_with_its_job(group, bad, computed):
    jobs = jobs_of(group)
    fused, requests = fused_of(jobs), requests_of(jobs, [2, 2, 2])
    bank = fused.pack()
    clean = fused(bank, requests)

    def spoiled(x):
        x = np.array(x)
        if x.dtype != np.bool_:
            x[0].flat[1] = bad
        return x

    sick = {**requests, "a": jax.tree.map(spoiled, requests["a"])}
    outs = fused(bank, sick)
    assert computed
    assert_alone(jobs, outs, sick)
    for job in jobs[1:]:
        cases.assert_bitwise(outs[job.name], clean[job.name])


def test_regions_work_for_some_jobs_under_scan_and_mapped_twice(computed):
    jobs = jobs_of("norms")
    fused = fused_of(jobs)
    bank, requests = fused.pack(), requests_of(jobs, [2, 2])
    outs = fused(bank, requests)  # a and b, in other rows than with c
    assert_alone(jobs, outs, requests)

    def turn(x, _):
        return fused(bank, {"c": x})["c"], None

    x = draw(jobs[2], 1, 7)
    y, _ = jax.lax.scan(turn, x, None, length=2)
    once = cases.alone(jobs[2], x)
    cases.assert_same(y, cases.alone(jobs[2], once), case_of(jobs[2]))
    many = jax.tree.map(lambda v: np.stack([v, 2 * v, 3 * v]), requests)
    mapped = jax.vmap(lambda r: fused(bank, r))(many)
    for k in range(3):
        own = jax.tree.map(lambda v, k=k: v[k], many)
        assert_alone(jobs, jax.tree.map(lambda v, k=k: v[k], mapped), own)


def test_encoders_of_other_depths_read_rows_columns_and_shelves(computed):
    """Few species are left in the last layer, and small leaves share an array."""
    jobs = []
    for i, config in enumerate((bert.TINY, bert.TINY_DEEP)):
        params = bert.init(config, jax.random.key(i))
        example = {k: np.ones((1, 6), np.int32) for k in ("ids", "mask")}
        apply_fn = functools.partial(bert.apply, config)
        jobs.append(stfuse.Job("ab"[i], apply_fn, params, example))
    fused = fused_of(jobs)
    requests = {
        name: {
            "ids": np.arange(12, dtype=np.int32).reshape(2, 6),
            "mask": np.array([[1, 1, 1, 1, 0, 0], [1] * 6], np.int32),
        }
        for name in "ab"
    }
    outs = fused(fused.pack(), requests)
    assert len(fused._layout.shelves) < len(fused._layout.params)
    names = [names_of(region) for region, _, _ in computed]
    assert sum("dot_general" in own for own in names) == 3  # attention of every layer
    assert any(len(region.species) == 1 for region, _, _ in computed)
    assert_alone(jobs, outs, requests)


def test_a_derivative_has_no_regions_and_is_the_derivative(computed):
    jobs = jobs_of("norms")[:2]
    fused = fused_of(jobs)
    requests = requests_of(jobs, [2, 1])

    def loss(bank):
        return sum(jnp.sum(y**3) for y in jax.tree.leaves(fused(bank, requests)))

    got = jax.grad(loss)(fused.pack())
    assert len({tuple(names_of(region)) for region, _, _ in computed}) == 1
    for job in jobs:
        own = jax.grad(
            lambda p, job=job: jnp.sum(job.apply_fn(p, requests[job.name]) ** 3)
        )(job.params)
        slot = cases.slot_of(fused, got, job.name)
        for actual, expected in zip(slot, jax.tree.leaves(own), strict=True):
            np.testing.assert_allclose(actual, expected, rtol=2e-5, atol=2e-5)


def test_what_a_kernel_cannot_address_runs_launch_by_launch(computed, monkeypatch):
    monkeypatch.setattr(_together, "MAX_ADDRESS", 1)
    jobs = jobs_of("attention")
    fused, requests = fused_of(jobs), requests_of(jobs, [2, 1])
    assert_alone(jobs, fused(fused.pack(), requests), requests)
    assert not computed
