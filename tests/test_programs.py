"""The promise over random programs: whoever shares the launches, nothing changes."""

import functools

import hypothesis
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from jax import lax

from stfuse._bank import open_shelves
from tests import cases, lockstep, programs
from tests.programs import Batch, Program
from tests.programs_regressions import REGRESSIONS

# Of 25 in the normal suite, 400 with --slow.
EXAMPLES = settings.default.max_examples
QUICK = {
    "suppress_health_check": list(hypothesis.HealthCheck),
    # A failing spec is small already, and each smaller one would have to be compiled.
    "phases": (hypothesis.Phase.explicit, hypothesis.Phase.generate),
}
pytestmark = pytest.mark.timeout(300 if EXAMPLES < 100 else 0)


def many(factor):
    return settings(max_examples=factor * EXAMPLES, **QUICK)


def alone(batch, jobs, params, requests):
    """Return each job's own answers, row by row, stfuse not involved."""

    def rows_of(job, own, x):
        def one(row):
            y = job.apply_fn(own, jax.tree.map(lambda v: v[None], row))
            return jax.tree.map(lambda v: v[0], y)

        return lax.map(one, x)

    return {n: rows_of(jobs[n], params[n], x) for n, x in requests.items()}


def hasty(fn, *args):
    return jax.jit(fn).lower(*args).compile(lockstep.HASTY)


def assert_same(actual, expected, program):
    """As `cases.assert_same`; but what was never rounded is equal, any NaN to any."""
    case = programs.case_of(program)
    if case.sum_length:
        return cases.assert_same(actual, expected, case)
    has_sums = programs.outline(program).has_sums
    for a, e in zip(jax.tree.leaves(actual), jax.tree.leaves(expected), strict=True):
        a, e = np.asarray(a), np.asarray(e)
        if has_sums and jnp.issubdtype(e.dtype, np.inexact):
            a, e = a + 0, e + 0  # the sign of a zero may be padding's
        lockstep.same(a, e, repr(program))


def check_launches(batch):
    """Check every launch, and that the launches together answer as each job alone."""
    fused = programs.fused_of(batch)
    requests = programs.requests_of(batch, [1] * len(batch.members))
    outs = lockstep.run(fused, requests)
    params = {name: job.params for name, job in fused.jobs.items()}
    own = functools.partial(alone, batch, fused.jobs)
    expected = hasty(own, params, requests)(params, requests)
    for name, y in expected.items():
        assert_same(outs[name], y, programs.program_of(batch, name))


def check_answers(batch):
    """Check a call of several rows; then with NaN and Inf of one job's own."""
    fused = programs.fused_of(batch)
    requests = programs.requests_of(batch)
    params = {name: job.params for name, job in fused.jobs.items()}

    def both(bank, stacked, params, requests):
        own = alone(batch, fused.jobs, params, requests)
        return fused.step(bank, stacked), own

    args = fused.pack(), fused.stack(requests), params, requests
    run = hasty(both, *args)
    clean = answers(batch, fused, run(*args))
    name = list(requests)[-1]
    for bad in (np.nan, np.inf):
        sick = {**requests, name: spoiled(requests[name], bad)}
        args = fused.pack(), fused.stack(sick), params, sick
        assert_untouched(answers(batch, fused, run(*args)), clean, name)
    weak = {**params, name: spoiled(params[name], np.nan)}
    bank = fused.pack({name: weak[name]})
    args = bank, fused.stack(requests), weak, requests
    if jax.tree.map(np.shape, bank) != jax.tree.map(np.shape, fused.pack()):
        # A leaf that jobs shared has slots now: another program, with roundings of its
        # own, so that answers are compared with those of the jobs alone only.
        run, clean = hasty(both, *args), {}
    # What a NaN in a kernel makes of the zeros around an image is the backend's choice:
    # it differs between two ways of computing one convolution alone.
    own = programs.program_of(batch, name)
    but = name if any(step[0] == "conv" for step in own.steps) else None
    assert_untouched(answers(batch, fused, run(*args), but), clean, name)


def answers(batch, fused, found, but=None):
    """Return a call's answers, each (but one) the same as alone."""
    outs, expected = fused.split(found[0]), found[1]
    for name, y in expected.items():
        if name == but:
            continue
        assert_same(outs[name], y, programs.program_of(batch, name))
    return outs


def assert_untouched(outs, clean, name):
    for other in clean.keys() - {name}:  # none, if the program is another one
        cases.assert_bitwise(outs[other], clean[other])


def spoiled(tree, bad):
    """Return arrays whose first floating leaf has something bad in its middle."""
    leaves, structure = jax.tree.flatten(tree)
    floating = (i for i, x in enumerate(leaves) if jnp.issubdtype(x.dtype, np.inexact))
    i = next(floating, None)
    if i is not None:
        leaves[i] = leaves[i].copy()
        leaves[i].reshape(-1)[leaves[i].size // 2] = bad
    return structure.unflatten(leaves)


@many(3)
@given(programs.batches())
def test_every_launch_gives_what_its_ops_give_alone(batch):
    check_launches(batch)


@many(7)
@given(programs.batches())
def test_every_job_answers_as_alone_and_keeps_its_nan_to_itself(batch):
    check_answers(batch)


@pytest.mark.parametrize("batch", REGRESSIONS, ids=range(len(REGRESSIONS)))
def test_what_was_wrong_once_stays_right(batch):
    check_launches(batch)
    check_answers(batch)


# Steps whose derivative exists everywhere that whole numbers go.
SMOOTH = (
    "unary binary select dense einsum conv reduction softmax norm rnn attention "
    "reshape transpose broadcast cut concatenate pad split iota move along window_at"
).split()


def own_gradients(batch, jobs, requests, params):
    def loss(params):
        return total(alone(batch, jobs, params, requests))

    return jax.grad(loss, allow_int=True)(params)


def total(outs):
    leaves = [x for x in jax.tree.leaves(outs) if jnp.issubdtype(x.dtype, np.inexact)]
    return sum([jnp.sum(jnp.square(x.astype(jnp.float32))) for x in leaves], 0.0)


def check_gradients(batch):
    """Check the gradient of a sum of squares, and that padding's is zero."""
    fused = programs.fused_of(batch)
    requests = programs.requests_of(batch)
    params = {name: job.params for name, job in fused.jobs.items()}

    def both(bank, params):
        grads = jax.grad(lambda b: total(fused(b, requests)), allow_int=True)(bank)
        return grads, own_gradients(batch, fused.jobs, requests, params)

    bank = fused.pack()
    grads, expected = hasty(both, bank, params)(bank, params)
    for name in fused.jobs:
        program = programs.program_of(batch, name)
        case = programs.case_of(program, longer=64)
        own = cases.slot_of(fused, grads, name)[: len(params[name])]
        for a, e in zip(own, expected[name], strict=True):
            if jnp.issubdtype(e.dtype, np.inexact):
                cases.assert_same(np.asarray(a), np.asarray(e), case)
    assert_padding_is_zero(fused, grads)


def assert_padding_is_zero(fused, grads):
    """Check that nothing of a gradient is left when every slot's own is taken away."""
    rest = [np.array(x) for x in open_shelves(fused._layout, grads.stacks)]
    for name in fused.jobs:
        ((s, slot),) = fused._where[name]
        places = fused._layout.leaf_rows(fused._layout.bank_of[s])
        for i, start, shape in places.values():
            stacked = rest[i].ndim == len(shape) + 1
            where = (start + slot,) if stacked else ()
            if rest[i].dtype != jax.dtypes.float0:
                rest[i][(*where, *map(slice, shape))] = 0
    for x in rest:
        assert x.dtype == jax.dtypes.float0 or not x.any()


@settings(max_examples=30 * EXAMPLES // 25, **QUICK)
@given(programs.batches(tuple(SMOOTH), 3))
def test_the_gradient_of_the_bank_is_each_jobs_own(batch):
    check_gradients(batch)


def test_a_spec_is_its_own_regression_case():
    batch = Batch((Program((3, 5), "float32", (("dense", 1, 0, 2, 1),)),), (0, 0))
    assert eval(repr(batch)) == batch
