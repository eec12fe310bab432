"""Which launches become a region, and in which order they run."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import HealthCheck, Phase, given, settings

import stfuse
from stfuse import _regions
from stfuse._program import Literal
from stfuse._regions import Region, Siblings, _arithmetic, _build
from tests import programs, test_programs
from tests.region_jobs import attention_job, fused_of, jobs_of, names_of, norm_job

SLOW = settings(
    max_examples=settings.default.max_examples // 5 + 1,
    suppress_health_check=list(HealthCheck),
    phases=(Phase.explicit, Phase.generate),
)


# Which launches become a region


def _scheduled(fused):
    plan = fused.plan
    traces = {s: one.trace for s, one in enumerate(plan.species)}
    return traces, plan.nodes, _regions.schedule(traces, plan.nodes)


def test_attention_is_one_region_without_its_products_with_weights():
    _, _, order = _scheduled(fused_of(jobs_of("attention")))
    kinds = [type(item) for item in order]
    (region,) = [item for item in order if isinstance(item, Region)]
    names = names_of(region)
    assert names.count("dot_general") == 2
    assert names[-1] == "reshape"  # heads are put together again
    assert kinds.count(Siblings) == 1  # q, k and v
    assert kinds.index(Siblings) < kinds.index(Region)


@pytest.mark.parametrize(("features", "num"), [(64, 2), (128, 0)])
def test_what_a_region_reads_is_half_of_what_it_may_make(features, num):
    jobs = [attention_job(name, 128, 1, features) for name in "ab"]
    _, _, order = _scheduled(fused_of(jobs))
    names = [name for x in order if isinstance(x, Region) for name in names_of(x)]
    assert names.count("dot_general") == num


def test_norms_of_one_width_are_left_to_the_compiler():
    jobs = [norm_job("a", 8), norm_job("b", 8, 1)]
    _, nodes, order = _scheduled(fused_of(jobs))
    assert [*order] == [*nodes]


def test_a_large_product_is_no_part_of_a_region():
    jobs = [attention_job("a", 300, 1, 4), attention_job("b", 300, 1, 5)]
    _, _, order = _scheduled(fused_of(jobs))
    for item in order:
        assert not isinstance(item, Region) or "dot_general" not in names_of(item)


def test_what_every_program_would_compute_again_is_no_region(monkeypatch):
    """The largest of a job's weights is the same for every place of its rows."""
    jobs = []
    for name, width in (("a", 3), ("b", 5)):
        inputs = jax.ShapeDtypeStruct((1, 4, width), np.float32)
        params = np.ones(width, np.float32)
        jobs.append(stfuse.Job(name, lambda p, x: x * p.max(), params, inputs))
    fused = fused_of(jobs)
    _, nodes, order = _scheduled(fused)
    assert [*order] == [*nodes]
    monkeypatch.setattr(_build, "_check", lambda region: None)
    _, _, order = _scheduled(fused)  # but for that, they could have been one
    assert any(isinstance(item, Region) for item in order)


@given(programs.batches())
@settings(suppress_health_check=list(HealthCheck))
def test_every_launch_is_run_once_and_after_what_it_reads(batch):
    traces, nodes, order = _scheduled(programs.fused_of(batch))
    made, count = set(), 0
    for item in order:
        if isinstance(item, Region):
            ops = [
                list(zip(item.species, step.ops, strict=True)) for step in item.steps
            ]
        else:
            own = item.nodes if isinstance(item, Siblings) else (item,)
            ops = [[(s, traces[s].ops[i]) for s, i in n.members] for n in own]
        for members in ops:
            count += len(members)
            for s, op in members:
                for atom in op.inputs:
                    if isinstance(atom, int) and atom >= len(traces[s].specs):
                        assert (s, atom) in made
                made |= {(s, v) for v in op.outputs}
    assert count == sum(len(node.members) for node in nodes)


@given(programs.batches())
@SLOW
def test_random_programs_answer_as_alone_in_regions(batch):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(_regions, "are_used", lambda cost, mode: True)
        patch.setattr(_regions, "is_anchor", lambda programs, node: True)
        test_programs.check_answers(batch)


# Arithmetic


def test_error_functions_are_as_good_as_the_compilers():
    x = np.concatenate([np.linspace(-11, 11, 4001), [0, np.inf, -np.inf, np.nan]])
    x = jnp.asarray(x, jnp.float32)
    for ours, theirs, exact in (
        (_arithmetic.erf, jax.lax.erf, math.erf),
        (_arithmetic.erfc, jax.lax.erfc, math.erfc),
    ):
        expected = np.array([exact(v) for v in np.asarray(x, float)])
        is_normal = np.isfinite(expected) & (abs(expected) > 1e-36)
        scale = np.where(is_normal & (expected != 0), abs(expected), 1)

        def worst(fn, expected=expected, is_normal=is_normal, scale=scale):
            error = abs(np.asarray(fn(x), float) - expected) / scale
            return error[is_normal].max()

        assert worst(ours) <= 1.5 * worst(theirs)
        assert np.isnan(ours(x)[-1])


def test_the_quick_error_function_is_exact_as_far_as_short_floats_tell():
    x = np.concatenate([np.linspace(-9, 9, 4001), [0, np.inf, -np.inf, np.nan]])
    y = np.asarray(_arithmetic.quick_erfc(jnp.asarray(x, jnp.float32)), float)
    expected = [math.erfc(v) for v in x.astype(np.float32)]
    np.testing.assert_allclose(y, expected, rtol=1e-5, atol=1e-36)


@pytest.mark.parametrize("dtype", [np.float32, jnp.bfloat16])
def test_multiplying_by_factors_is_dividing_wherever_the_quotient_is(dtype):
    ends = [0.0, 1e-37, 2.0**-64, 1e-3, 1.0, 3.0, 2.0**64, 1e30, 2.0**127, np.inf]
    x, y = (np.array([*ends, *(-v for v in ends), np.nan], dtype) for _ in range(2))
    x, y = x[:, None], y[None]
    by = _arithmetic.factors(jnp.asarray(y), 0)
    found = np.asarray(_arithmetic.scaled(jnp.asarray(x), by), np.float64)
    with np.errstate(all="ignore"):
        expected = (x.astype(np.float64) / y.astype(np.float64)).astype(dtype)
    expected = expected.astype(np.float64)
    error = 3e-7 if dtype == np.float32 else 4e-3
    np.testing.assert_allclose(found, expected, rtol=error, atol=2.0**-126)


@pytest.mark.parametrize("value", [8.0, -0.25, 3.0, 2.0**20, 0.0, np.inf])
def test_a_literal_divides_short_floats_as_they_are_where_that_is_exact(value):
    x = np.linspace(-5, 5, 99).astype(jnp.bfloat16)
    literal = Literal(np.array(value, jnp.bfloat16), jax.ShapeDtypeStruct((), x.dtype))
    by = _arithmetic.factors(jnp.asarray(value, x.dtype), literal)
    assert (len(by) == 1) == (value in (8.0, -0.25))
    found = np.asarray(_arithmetic.scaled(jnp.asarray(x), by))
    with np.errstate(all="ignore"):
        expected = (x / np.array(value, jnp.bfloat16)).astype("f")
    np.testing.assert_array_equal(found.astype("f"), expected)


def test_the_larger_of_a_nan_is_nan():
    x, y = jnp.array([np.nan, 1.0, 2.0]), jnp.array([0.0, np.nan, 1.0])
    np.testing.assert_array_equal(_arithmetic.extreme("max", x, y), [np.nan, np.nan, 2])
    np.testing.assert_array_equal(_arithmetic.extreme("min", x, y), [np.nan, np.nan, 1])
