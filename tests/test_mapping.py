"""Ops that are not what they are row by row when JAX maps them, if it can at all."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import export, lax

import stfuse
from tests.cases import Case, alone, assert_same

DRAWING = [None, "rbg", "unsafe_rbg"]
X = np.arange(1, 13, dtype="f").reshape(4, 3)
SUMS = Case("sums", lambda seed: (), lambda rng, rows: None, 64)


def fused_of(apply_fns, params, example=X[:1], **options):
    """Return jobs ``0``, ``1``, ... fused; of one function if only one is given."""
    apply_fns = apply_fns if isinstance(apply_fns, list) else [apply_fns] * len(params)
    jobs = [
        stfuse.Job(str(i), fn, p, example, **options)
        for i, (fn, p) in enumerate(zip(apply_fns, params, strict=True))
    ]
    return stfuse.fuse(jobs, cost="h200")


def check(fused, *rows):
    """Check a call's answers, of one request for each of some first jobs."""
    requests = {str(i): x for i, x in enumerate(rows)}
    outs = fused(fused.pack(), requests)
    for name, x in requests.items():
        assert_same(outs[name], alone(fused.jobs[name], x), SUMS)


def check_gradient(apply_fn, params):
    """Check the gradient of a sum of squares of two rows a job."""
    fused = fused_of(apply_fn, params)
    requests = {str(i): X[i : i + 2] for i in range(len(params))}
    bank = fused.pack()

    def fused_loss(requests):
        outs = fused(bank, requests)
        return sum(jnp.sum(jnp.square(y)) for y in outs.values())

    def own_loss(params, x):
        rows = [apply_fn(params, x[r : r + 1]) for r in range(len(x))]
        return sum(jnp.sum(jnp.square(y)) for y in rows)

    found = jax.jit(jax.grad(fused_loss))(requests)
    for name, x in requests.items():
        expected = jax.grad(own_loss, 1)(params[int(name)], x)
        assert_same(found[name], np.asarray(expected), SUMS)


# Keys whose mapped draws are not each key's own


def noisy(params, x):
    """A layer with noise; drawn in a loop, and again outside."""
    key, w = params

    def turn(y, i):
        return y + jax.random.normal(jax.random.fold_in(key, i), y.shape[1:]), None

    y, _ = lax.scan(turn, jnp.tanh(x @ w), jnp.arange(2))
    own, _ = jax.random.split(key)
    return y * jax.random.bernoulli(own, 0.5, y.shape[1:])


def noisy_params(impl, num=2):
    return [
        (jax.random.key(i, impl=impl), np.eye(3, dtype="f") / (i + 5))
        for i in range(num)
    ]


@pytest.mark.parametrize("impl", DRAWING)
def test_a_job_draws_what_its_own_key_says(impl):
    check(fused_of(noisy, noisy_params(impl)), X[:3], X[:1])


@pytest.mark.parametrize("impl", DRAWING)
def test_a_row_draws_what_its_own_key_says(impl):
    keys = jax.random.split(jax.random.key(7, impl=impl), 4)
    rows = np.asarray(jax.random.key_data(keys))

    def draw(params, data):
        key = jax.random.wrap_key_data(data[0], impl=impl)
        return params + jax.random.uniform(key, (1, 3))

    fused = fused_of(draw, [np.float32(0), np.float32(1)], rows[:1])
    check(fused, rows[:3], rows[2:])


@pytest.mark.parametrize("impl", DRAWING)
def test_a_gradient_draws_what_the_answer_drew(impl):
    check_gradient(noisy, noisy_params(impl))


# Loops that end only where they are asked to run


def count_up(n):
    """Return how often a number fits into ten: always, unless it is not positive."""
    start = (jnp.int32(0), jnp.int32(0))
    return lax.while_loop(lambda c: c[0] < 10, lambda c: (c[0] + n, c[1] + 1), start)[1]


def guarded(params, x):
    n = x[0, 0].astype(jnp.int32)
    return lax.cond(n > 0, count_up, lambda n: -jnp.int32(1), n)[None] + params


def nested(params, x):
    start = (x[0, 0].astype(jnp.int32), jnp.int32(0))
    body = lambda c: (c[0] - 1, c[1] + count_up(c[0]))  # noqa: E731
    return lax.while_loop(lambda c: c[0] > 0, body, start)[1][None] + params


def in_turns(params, x):
    """A scan with a guarded loop in its body."""
    ys = lax.map(lambda n: guarded(jnp.float32(0), n[None, None])[0], x[0])
    return ys[None] * params


@pytest.mark.parametrize("apply_fn", [guarded, nested, in_turns])
@pytest.mark.parametrize("num_jobs", [1, 2])
def test_a_loop_in_a_branch_not_taken_does_not_run(apply_fn, num_jobs):
    rows = np.array([[3, 1, 0], [0, 2, 5]], "f")
    fused = fused_of(apply_fn, [np.float32(i + 1) for i in range(num_jobs)])
    check(fused, *[rows[i:] for i in range(num_jobs)])


def test_a_loop_in_a_scan_does_not_run_on_steps_that_are_not_there():
    def steps(params, x):
        def turn(y, n):
            y = jnp.tanh(y @ params) + count_up(n.astype(jnp.int32))
            return y, n

        return lax.scan(turn, jnp.ones((1, 3)), x[0])[0]

    jobs = [
        stfuse.Job(str(i), steps, np.eye(3, dtype="f"), X[:1, : i + 2])
        for i in range(2)
    ]
    fused = stfuse.fuse(jobs, cost="h200")
    check(fused, X[:2, :2], X[:1])


def test_a_guarded_loop_beside_what_has_a_gradient():
    check_gradient(
        lambda w, x: jnp.tanh(x * w) * guarded(jnp.float32(0), x - 4),
        [np.float32(0.5), np.float32(0.25)],
    )


# Ops that JAX cannot map


def called_back(params, x):
    spec = jax.ShapeDtypeStruct(x.shape[1:], x.dtype)
    return jax.pure_callback(np.sin, spec, x[0])[None] * params


def linear(params, x):
    double = jax.custom_derivatives.linear_call(
        lambda r, v: r * v, lambda r, v: r * v, jnp.float32(2), x
    )
    return jnp.tanh(double * params)


def ragged(params, x):
    groups = jnp.array([2, 1], jnp.int32)
    return lax.ragged_dot(x[0, :, None], params * jnp.ones((2, 1, 4)), groups)[None]


def exported(params, x):
    specs = jax.ShapeDtypeStruct((), "f"), jax.ShapeDtypeStruct((1, 3), "f")
    model = export.export(jax.jit(lambda p, x: jnp.sin(x) * p))(*specs)
    return model.call(params, x)


def looping(params, x):
    """One of them in the body of a loop."""
    return lax.scan(lambda y, w: (linear(w, y), None), x, jnp.stack([params] * 2))[0]


UNMAPPED = [called_back, linear, ragged, exported, looping]


@pytest.mark.parametrize("apply_fn", UNMAPPED)
def test_what_cannot_be_mapped_is_done_row_by_row(apply_fn):
    check(fused_of(apply_fn, [np.float32(1), np.float32(2)]), X[:3], X[1:2])


def test_what_cannot_be_mapped_runs_in_a_job_without_rows():
    weights = np.arange(24, dtype="f").reshape(2, 3, 4)

    def apply_fn(params, x):
        return lax.ragged_dot(x, params, jnp.array([3, 1], jnp.int32))

    check(fused_of(apply_fn, [weights, weights + 1], X, batched=False), X, X + 1)


@pytest.mark.parametrize("apply_fn", [linear, ragged, looping])
def test_what_cannot_be_mapped_has_a_gradient(apply_fn):
    check_gradient(apply_fn, [np.float32(0.5), np.float32(0.25)])
