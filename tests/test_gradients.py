"""The bank's gradient is each job's own: differentiated first, fused second."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import stfuse
from tests import cases
from tests.cases import BY_NAME, CASES, alone, assert_same

ROWS = (3, 1, 2)


def is_inexact(x):
    return jnp.issubdtype(jnp.result_type(x), jnp.inexact)


def inexact_leaves(tree):
    return [x for x in jax.tree.leaves(tree) if is_inexact(x)]


@functools.partial(jax.jit, static_argnums=0)
def _own_vjp(apply_fn, params, inputs, cotangents):
    leaves, structure = jax.tree.flatten(params)

    def apply(moving):
        left = iter(moving)
        merged = [next(left) if is_inexact(x) else x for x in leaves]
        return inexact_leaves(apply_fn(structure.unflatten(merged), inputs))

    return jax.vjp(apply, inexact_leaves(params))[1](cotangents)[0]


def own_gradient(job, inputs, cotangents):
    """Return the gradient of a job's inexact params, stfuse not involved."""
    if not job.batched:
        return _own_vjp(job.apply_fn, job.params, inputs, cotangents)
    rows = [
        _own_vjp(
            job.apply_fn,
            job.params,
            *jax.tree.map(
                lambda x, r=r: np.asarray(x)[r : r + 1], (inputs, cotangents)
            ),
        )
        for r in range(len(jax.tree.leaves(inputs)[0]))
    ]
    return jax.tree.map(lambda *xs: sum(np.asarray(x) for x in xs), *rows)


def like(rng, x):
    return rng.normal(size=x.shape).astype(x.dtype)


def check_gradient(fused, requests, case):
    """Check the bank's gradient, under random cotangents, against each job's own."""
    rng = np.random.default_rng(5)
    bank = fused.pack()

    def answers(bank):
        return {n: inexact_leaves(y) for n, y in fused(bank, requests).items()}

    cotangents = jax.tree.map(lambda x: like(rng, x), jax.eval_shape(answers, bank))
    (grads,) = jax.jit(lambda bank, g: jax.vjp(answers, bank)[1](g))(bank, cotangents)
    # The chain of sums is longer: forward, backward, and over the rows.
    looser = dataclasses.replace(case, sum_length=16 * max(case.sum_length, 1))
    for name, x in requests.items():
        job = fused.jobs[name]
        own = slice(0, len(jax.tree.leaves(job.params)))
        actual = [
            g
            for g, p in zip(
                cases.slot_of(fused, grads, name)[own],
                jax.tree.leaves(job.params),
                strict=True,
            )
            if is_inexact(p)
        ]
        expected = own_gradient(job, x, cotangents[name])
        assert_same(actual, jax.tree.map(np.asarray, expected), looser)
    return grads


@pytest.mark.parametrize("case", [c for c in CASES if c.has_gradient], ids=str)
def test_the_gradient_of_the_bank_is_each_jobs_own(case):
    fused = cases.group(case, 3)
    check_gradient(fused, cases.requests(case, fused, ROWS), case)


def test_jobs_that_a_call_does_not_name_have_gradient_zero():
    case, other = BY_NAME["mlp"], BY_NAME["conv"]
    jobs = [cases.job(case, i) for i in range(4)] + [cases.job(other, 0)]
    fused = stfuse.fuse(jobs, cost="cpu")
    requests = {f"mlp.{i}": case.inputs(i, 3) for i in (0, 2, 3)}  # padded to 4 slots
    grads = check_gradient(fused, requests, case)
    for name in ("mlp.1", "conv.0"):
        for leaf in cases.slot_of(fused, grads, name):
            np.testing.assert_array_equal(leaf, np.zeros_like(leaf))


def simple(apply_fn, params, example, **options):
    """Return jobs ``a``, ``b``, ... of one function, fused."""
    names = "abcdefgh"[: len(params)]
    jobs = [
        stfuse.Job(name, apply_fn, p, example, **options)
        for name, p in zip(names, params, strict=True)
    ]
    return stfuse.fuse(jobs, cost="cpu")


def test_relu_has_slope_zero_at_zero():
    fused = simple(
        lambda p, x: jax.nn.relu(x * p), np.eye(2, dtype="f"), np.ones((1, 2), "f")
    )
    x = np.zeros((3, 2), "f")
    grads = jax.grad(lambda b: fused(b, {"a": x, "b": x})["a"].sum())(fused.pack())
    of_inputs = jax.grad(lambda x: fused(fused.pack(), {"a": x, "b": x})["a"].sum())(x)
    np.testing.assert_array_equal(grads.stacks[0], np.zeros((2, 2)))
    np.testing.assert_array_equal(of_inputs, np.zeros((3, 2)))


def test_a_straight_through_estimator_keeps_its_own_gradient():
    case = BY_NAME["straight_through"]
    fused = cases.group(case, 2)
    x = case.inputs(0, 3)
    bank = fused.pack()
    (grad,) = cases.slot_of(
        fused,
        jax.grad(
            lambda b: fused(b, {"straight_through.0": x})["straight_through.0"].sum()
        )(bank),
        "straight_through.0",
    )
    np.testing.assert_allclose(grad, 3 * x.sum(0), rtol=1e-6)


@pytest.mark.parametrize(
    "apply_fn",
    [
        lambda p, x: jnp.log((x * p).sum(-1)),
        lambda p, x: x * p / jnp.linalg.norm(x * p, axis=-1, keepdims=True),
        lambda p, x: jnp.sqrt(x * p).sum(-1),
    ],
    ids=["log", "norm", "sqrt"],
)
def test_padding_keeps_gradients_finite_where_zeros_would_not(apply_fn):
    rng = np.random.default_rng(0)
    params = rng.uniform(0.5, 1, (3, 4)).astype("f")
    fused = simple(apply_fn, params, np.ones((1, 4), "f"))
    x = rng.uniform(0.5, 1, (3, 4)).astype("f")  # padded to 4 rows
    requests = {"a": x, "b": x[:1], "c": x[:2]}
    grads = check_gradient(
        fused, requests, dataclasses.replace(BY_NAME["cond"], sum_length=4)
    )
    assert np.isfinite(grads.stacks[0]).all()


def test_a_leaf_that_jobs_share_gets_the_sum_of_their_gradients():
    rng = np.random.default_rng(0)
    trunk = rng.normal(size=(4, 3)).astype("f")
    heads = rng.normal(size=(3, 3)).astype("f")
    fused = simple(
        lambda p, x: jnp.tanh(x @ p["trunk"]) * p["head"],
        [{"trunk": trunk, "head": head} for head in heads],
        np.ones((1, 4), "f"),
    )
    bank = fused.pack()
    assert [leaf.shape for leaf in bank.stacks] == [(3, 3), (4, 3)]
    x = rng.normal(size=(3, 4)).astype("f")
    for names in ("abc", "ac", "b"):
        grads = jax.grad(
            lambda bank, names=names: sum(
                y.sum() for y in fused(bank, dict.fromkeys(names, x)).values()
            )
        )(bank)
        own = [own_gradient(fused.jobs[n], x, [np.ones((3, 3), "f")]) for n in names]
        np.testing.assert_allclose(
            grads.stacks[1], sum(g[1] for g in own), rtol=1e-5, atol=1e-6
        )


@pytest.mark.parametrize(
    "widen",
    [
        lambda w, n: jnp.broadcast_to(w, (n, 3)).sum(0),
        lambda w, n: jax.nn.softmax(w * jnp.arange(1.0, n + 1)[:, None], 0)[0],
        lambda w, n: jnp.broadcast_to(w, (n, 3)).T @ jnp.outer(jnp.arange(n), w)[:, 0],
        lambda w, n: jax.lax.scan(
            lambda c, r: (c + jnp.tanh(r), None), w, jnp.broadcast_to(w, (n, 3))
        )[0],
    ],
    ids=["sum", "softmax", "dot", "scan"],
)
def test_unlike_jobs_that_hold_one_array_pad_what_they_make_of_it_alone(widen):
    w, x = np.arange(1, 4, dtype="f"), np.ones((2, 3), "f")
    jobs = [
        stfuse.Job(f"j{n}", lambda p, x, n=n: x * widen(p, n), w, x) for n in (2, 5)
    ]
    fused = stfuse.fuse(jobs, cost="h200")
    bank = fused.pack()
    assert {leaf.shape for leaf in bank.stacks} == {(3,)}  # no slots
    requests = dict.fromkeys(fused.jobs, x)
    grads = jax.grad(lambda b: sum(y.sum() for y in fused(b, requests).values()))(bank)
    own = [own_gradient(one, x, [np.ones((2, 3), "f")])[0] for one in jobs]
    for name, y in fused(bank, requests).items():
        np.testing.assert_allclose(y, alone(fused.jobs[name], x), rtol=1e-5)
    np.testing.assert_allclose(sum(grads.stacks), sum(own), rtol=1e-5, atol=1e-6)


def test_integer_params_have_no_gradient_and_disturb_none():
    rng = np.random.default_rng(0)
    params = [{"n": np.int32(i), "w": rng.normal(size=3).astype("f")} for i in (2, 3)]
    fused = simple(lambda p, x: x * p["w"] * p["n"], params, np.ones((1, 3), "f"))
    x = np.ones((2, 3), "f")
    grads = jax.grad(lambda b: fused(b, {"b": x})["b"].sum(), allow_int=True)(
        fused.pack()
    )
    n, w = grads.stacks
    assert n.dtype == jax.dtypes.float0
    np.testing.assert_array_equal(w, [[0, 0, 0], [6, 6, 6]])


def scaled_backward(scale):
    """Return the identity, with a derivative that is not the identity's."""

    @jax.custom_vjp
    def identity(x):
        return x * 1

    identity.defvjp(lambda x: (x * 1, None), lambda _, g: (g * scale,))
    return lambda p, x: identity(x * p)


def test_equal_programs_of_unequal_custom_derivatives_keep_their_own():
    x = np.ones((3, 2), "f")
    jobs = [
        stfuse.Job(name, scaled_backward(scale), np.ones(2, "f"), x[:1])
        for name, scale in {"a": 1, "b": 10, "c": 100}.items()
    ]
    fused = stfuse.fuse(jobs, cost="cpu")
    assert len(fused.plan.species) == 1
    bank = fused.pack({name: np.full(2, 2.0 + i, "f") for i, name in enumerate("abc")})
    for names in ("abc", "cb", "b"):
        grads = jax.grad(
            lambda bank, names=names: sum(
                y.sum() for y in fused(bank, dict.fromkeys(names, x)).values()
            )
        )(bank)
        expected = [
            [3 * scale * (n in names)] * 2
            for n, scale in zip("abc", (1, 10, 100), strict=True)
        ]
        np.testing.assert_array_equal(grads.stacks[0], expected)


def test_closed_over_arrays_get_gradient_zero():
    case = BY_NAME["closed_over"]
    fused = cases.group(case, 3)
    requests = cases.requests(case, fused, ROWS)
    grads = jax.grad(lambda b: sum(y.sum() for y in fused(b, requests).values()))(
        fused.pack()
    )
    for name in requests:
        p, *consts = cases.slot_of(fused, grads, name)
        assert len(consts) == 2 and np.abs(p).max() > 0
        for leaf in consts:
            np.testing.assert_array_equal(leaf, np.zeros_like(leaf))


def test_gradients_flow_through_pack_to_params():
    case = BY_NAME["mlp"]
    fused = cases.group(case, 3)
    requests = cases.requests(case, fused, ROWS)
    params = {name: job.params for name, job in fused.jobs.items()}

    @jax.jit
    @jax.grad
    def grad_fn(params):
        return sum(y.sum() for y in fused(fused.pack(params), requests).values())

    grads = grad_fn(params)
    looser = dataclasses.replace(case, sum_length=16 * case.sum_length)
    for name, x in requests.items():
        ones = [np.ones((len(x), 10), "f")]
        expected = own_gradient(fused.jobs[name], x, ones)
        assert_same(jax.tree.leaves(grads[name]), expected, looser)


def test_gradients_flow_to_inputs():
    case = BY_NAME["lstm"]
    fused = cases.group(case, 3)
    bank, requests = fused.pack(), cases.requests(case, fused, ROWS)

    def total(tree):
        return sum(y.sum() for y in jax.tree.leaves(tree))

    def own(params, x):
        return total(fused.jobs["lstm.0"].apply_fn(params, x))

    grads = jax.jit(jax.grad(lambda x: total(fused(bank, x))))(requests)
    own_fn = jax.jit(jax.grad(own, argnums=1))
    for name, x in requests.items():
        expected = own_fn(fused.jobs[name].params, x)
        assert_same(grads[name], expected, case)


def test_a_job_without_derivative_does_not_keep_others_from_theirs():
    jobs = [cases.job(BY_NAME[name], 0) for name in ("while_loop", "mlp")]
    fused = stfuse.fuse(jobs, cost="cpu")
    x = {job.name: BY_NAME[job.name[:-2]].inputs(0, 2) for job in jobs}
    bank = fused.pack()
    grads = jax.grad(lambda b: fused(b, x)["mlp.0"].sum())(bank)
    expected = own_gradient(jobs[1], x["mlp.0"], [np.ones((2, 10), "f")])
    assert_same(
        cases.slot_of(fused, grads, "mlp.0"),
        expected,
        dataclasses.replace(BY_NAME["mlp"], sum_length=400),
    )
    with pytest.raises(ValueError, match="while_loop"):
        jax.grad(lambda b: fused(b, x)["while_loop.0"][1].sum())(bank)


def test_second_derivatives_are_refused_in_words():
    fused = simple(lambda p, x: x * p, np.ones((1, 2), "f"), np.ones((1, 2), "f"))

    def loss(bank):
        return (fused(bank, {"a": np.ones((1, 2), "f")})["a"] ** 2).sum()

    with pytest.raises(stfuse.StfuseError, match="second derivative"):
        jax.hessian(loss)(fused.pack())
    with pytest.raises(stfuse.StfuseError, match="second derivative"):
        jax.grad(lambda b: jax.grad(loss)(b).stacks[0].sum())(fused.pack())


def test_forward_mode_is_refused_in_words():
    fused = simple(lambda p, x: x * p, np.ones((1, 2), "f"), np.ones((1, 2), "f"))
    bank, x = fused.pack(), {"a": np.ones((1, 2), "f")}
    with pytest.raises(TypeError, match="forward-mode"):
        jax.jvp(lambda b: fused(b, x), (bank,), (bank,))


def test_sgd_on_the_bank_trains_every_job_as_alone():
    """Sharing a step must not couple the jobs' training either: plain SGD is exact."""
    case = BY_NAME["training_step"]
    fused = cases.group(case, 3)
    states = {name: job.params for name, job in fused.jobs.items()}
    own = dict(states)
    for turn in range(3):
        batch = {name: case.inputs(10 * turn + i, 1) for i, name in enumerate(states)}
        outs = fused(fused.pack(states), batch)
        states = {name: out[0] for name, out in outs.items()}
        own = {n: alone(fused.jobs[n], batch[n], own[n])[0] for n in own}
    for name in own:
        assert_same(states[name], own[name], case)
