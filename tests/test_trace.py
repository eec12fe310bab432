"""A trace is the job's program as plain records: nothing missing, nothing hidden."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax

import stfuse
from stfuse import _align, _trace
from stfuse._cost import RECORDS
from stfuse._evaluate import evaluate
from stfuse._together import How
from stfuse._values import Env, Held, assemble
from tests import cases, functions
from tests.cases import BY_NAME, CASES, alone, assert_same


def trace(apply_fn, params, example, **options):
    return _trace.trace(stfuse.Job("job", apply_fn, params, example, **options))


def names(traced):
    return [op.name for op in traced.ops]


@pytest.mark.parametrize("case", CASES, ids=str)
def test_evaluating_a_trace_op_by_op_gives_the_jobs_answer(case):
    job, x = cases.job(case, 0), case.inputs(3, 1)
    traced = _trace.trace(job)
    leaves = [*jax.tree.leaves(job.params), *traced.consts]
    own = jax.tree.leaves(jax.tree.map(lambda v: v[0], x) if case.batched else x)

    def specs(arrays):
        return [(x.shape, x.dtype) for x in arrays]

    @jax.jit
    def interpret(values):
        values = dict(enumerate(values))

        def read(atom):
            if isinstance(atom, _trace.Literal):
                return jnp.asarray(atom.value, atom.spec.dtype)
            return values[atom]

        for op in traced.ops:
            outs = op.bind_fn(*map(read, op.inputs))
            assert specs(outs) == specs(op.specs)
            values.update(zip(op.outputs, outs, strict=True))
        return list(map(read, traced.outputs))

    outs = list(map(np.asarray, interpret(list(map(jnp.asarray, [*leaves, *own])))))
    assert specs(outs) == specs(traced.out_specs)
    answer = jax.tree.unflatten(jax.tree.structure(job.outputs), outs)
    if case.batched:
        answer = jax.tree.map(lambda y: y[None], answer)
    assert_same(answer, alone(job, x), case)


@pytest.mark.parametrize("case", CASES, ids=str)
def test_values_are_numbered_in_trace_order_and_read_after_they_are_made(case):
    traced = _trace.trace(cases.job(case, 0))
    known = len(traced.specs)
    assert known == traced.num_params + len(traced.input_specs)
    for op in traced.ops:
        assert all(v < known for v in op.inputs if isinstance(v, int))
        assert op.outputs == tuple(range(known, known + len(op.outputs)))
        known += len(op.outputs)
    assert all(v < known for v in traced.outputs if isinstance(v, int))


def test_calls_that_only_wrap_a_body_are_inlined():
    def apply_fn(p, x):
        @jax.remat
        def body(y):
            return jax.nn.relu(functions.straight_through(y))  # custom_jvp, custom_vjp

        return jax.jit(body)(x * p)

    params = np.ones(3, "f")
    assert names(trace(apply_fn, params, np.ones((1, 3), "f"))) == [
        "broadcast_in_dim",  # the row that the function is called with
        "broadcast_in_dim",
        "mul",
        "round",
        "max",
        "squeeze",
    ]


def test_what_nobody_reads_is_dropped_with_the_arrays_it_closed_over():
    unused = jnp.ones((3, 3))

    def apply_fn(p, x):
        y = jnp.sin(x) @ unused
        del y
        return x * p

    traced = trace(apply_fn, 2.0, np.ones((1, 3), "f"))
    assert "sin" not in names(traced) and traced.consts == ()


def test_what_has_an_effect_is_kept():
    def apply_fn(p, x):
        jax.debug.callback(lambda y: None, jnp.sin(x))
        return x * p

    assert {"sin", "debug_callback"} <= set(
        names(trace(apply_fn, 2.0, np.ones((1, 3), "f")))
    )


def test_a_closed_over_array_used_twice_is_one_parameter():
    w, v = jnp.ones(3), np.ones(3, "f")

    @jax.jit
    def inner(x):
        return x + w

    traced = trace(lambda p, x: inner(x * w + v) * p, 2.0, np.ones((1, 3), "f"))
    assert traced.num_params == 3 and len(traced.consts) == 2
    assert [s.shape for s in traced.param_specs] == [(), (3,), (3,)]


@pytest.mark.parametrize("wrap", [jnp.asarray, np.asarray], ids=["jax", "numpy"])
@pytest.mark.parametrize("where", ["outside", "jit", "scan", "cond"])
def test_an_array_is_found_wherever_it_hides(where, wrap):
    w = wrap(np.full((3, 3), 2, "f"))

    def step(x):
        return x @ w

    def apply_fn(p, x):
        match where:
            case "jit":
                return jax.jit(jax.jit(step))(x)
            case "scan":
                return lax.scan(lambda c, _: (step(c), None), x, None, length=2)[0]
            case "cond":
                return lax.cond(x[0, 0] > 0, step, lambda x: x, x)
        return step(x)

    traced = trace(apply_fn, {}, np.ones((1, 3), "f"))
    assert len(traced.consts) == 1
    np.testing.assert_array_equal(traced.consts[0], w)


def test_heavy_ops_are_launches_and_their_work_is_counted():
    def apply_fn(p, x):
        y = jnp.tanh(x @ p["dense"])  # [1,6] @ [6,8]
        image = y.reshape(1, 2, 2, 2)
        out = lax.conv_general_dilated(
            image, p["conv"], (1, 1), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC")
        )
        turned = lax.scan(lambda c, _: (c @ p["turn"], None), y, None, length=5)[0]
        return out.reshape(1, -1)[:, :8] + turned

    params = {
        "dense": np.ones((6, 8), "f"),
        "conv": np.ones((3, 3, 2, 4), "f"),
        "turn": np.ones((8, 8), "f"),
    }
    traced = trace(apply_fn, params, np.ones((1, 6), "f"))
    heavy = [op for op in traced.ops if op.is_heavy]
    assert sorted((op.name, op.flops) for op in heavy) == [
        ("conv_general_dilated", 2.0 * (2 * 2 * 4) * (3 * 3 * 2)),
        ("dot_general", 2.0 * 8 * 6),
        ("scan", 5 * 2.0 * 8 * 8),
    ]
    dot = next(op for op in heavy if op.name == "dot_general")
    assert dot.num_bytes == 4 * (6 + 6 * 8 + 8)
    assert not any(op.is_heavy for op in traced.ops if op.name == "tanh")


def evaluated(program, rows, params, operands):
    """Evaluate a program of one slot: params have no slot axis, operands have one."""
    env, cost = Env({0: program}, {0: 1}), RECORDS["cpu"]
    for v, x in enumerate((*params, *operands)):
        is_stacked = v >= len(params)
        env.values[0, v] = Held(x, is_stacked, (False,) * (x.ndim - is_stacked), {0: 0})
    nodes = _align.schedule({0: program}, cost, [1])
    evaluate(env, nodes, How(rows, cost, "native"))
    outs = zip(program.outputs, program.out_specs, strict=True)
    return [assemble(env, [(0, atom)], [spec]).array for atom, spec in outs]


@pytest.mark.parametrize("name", ["mlp", "conv", "closed_over"])
def test_the_derivatives_trace_gives_the_derivative(name):
    case, rows = BY_NAME[name], 2
    job, x = cases.job(case, 0), case.inputs(3, rows)
    forward, backward = _trace.trace(job), _trace.trace_vjp(job, rows)
    params = [*jax.tree.leaves(job.params), *forward.consts]
    own = params[: len(params) - len(forward.consts)]

    def answers(own):
        tree = jax.tree.unflatten(jax.tree.structure(job.params), own)
        outs = jax.vmap(
            lambda r: job.apply_fn(tree, jax.tree.map(lambda v: v[None], r))
        )
        leaves = jax.tree.leaves(outs(x))
        return [y[:, 0] for y in leaves if _trace.is_inexact(y)]

    rng = np.random.default_rng(0)
    cotangents = [
        rng.normal(size=y.shape).astype(y.dtype) for y in jax.eval_shape(answers, own)
    ]
    (expected,) = jax.jit(lambda p, g: jax.vjp(answers, p)[1](g))(own, cotangents)
    operands = [np.asarray(v)[None] for v in (*jax.tree.leaves(x), *cotangents)]
    grads = jax.jit(functools.partial(evaluated, backward, rows))(params, operands)
    actual = [np.asarray(g[0]) for g in grads[: len(expected)]]
    assert_same(actual, list(map(np.asarray, expected)), case)
