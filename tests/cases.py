"""One table of cases for the whole suite, and the one comparison.

A row says how to build a job, how to draw its inputs, and how closely an answer must
match. Tests cross the rows with group sizes, transforms and poison; none of them
branches on a row's name.
"""

import dataclasses
import functools
import math
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import optax
from flax import linen as nn
from flax import nnx
from jax import lax

import stfuse
from models import cnn, mlp
from stfuse import _bank

Rng = np.random.Generator


@dataclasses.dataclass(frozen=True)
class Case:
    """One kind of job.

    Attributes:
        name: what pytest prints.
        make: seed to the arguments of ``build`` between the name and the example.
        make_inputs: ``(rng, rows)`` to a request's inputs; rows are ignored by a job
            without a row axis.
        sum_length: number of terms of its longest chain of sums; 0 if the function
            only moves data, or works on integers.
        dtype: the coarsest dtype that its arithmetic passes through.
        batched: whether the job has a row axis.
        has_gradient: whether ``jax.grad`` of the function exists.
        build: the constructor.
    """

    name: str
    make: Callable[[int], tuple[Any, ...]]
    make_inputs: Callable[[Rng, int], Any]
    sum_length: int
    dtype: Any = np.float32
    batched: bool = True
    has_gradient: bool = True
    build: Callable[..., stfuse.Job] = stfuse.Job

    def __str__(self) -> str:
        return self.name

    def job(self, name: str, seed: int = 0) -> stfuse.Job:
        """Build the job that a seed stands for."""
        options = {} if self.batched else {"batched": False}
        return self.build(name, *self.make(seed), self.inputs(0, 1), **options)

    def inputs(self, seed: int, rows: int) -> Any:
        """Draw one request."""
        return self.make_inputs(np.random.default_rng(seed), rows)


def alone(job: stfuse.Job, inputs: Any, params: Any = None) -> Any:
    """Return the promise's right-hand side: the job's own answer, stfuse not involved.

    A batched job answers row by row, each as if it were alone; any other is called on
    its inputs as they are.
    """
    params = job.params if params is None else params
    apply_fn = jax.jit(job.apply_fn)
    if not job.batched:
        return jax.tree.map(np.asarray, apply_fn(params, inputs))
    num_rows = len(jax.tree.leaves(inputs)[0])
    rows = [
        apply_fn(params, jax.tree.map(lambda x, r=r: np.asarray(x)[r : r + 1], inputs))
        for r in range(num_rows)
    ]
    return jax.tree.map(lambda *xs: np.concatenate(list(map(np.asarray, xs))), *rows)


def assert_same(actual: Any, expected: Any, case: Case) -> None:
    """Check that two answers have one structure, shapes, dtypes, and values.

    Leaves of integers, and of cases that only move data (``sum_length`` 0), must be
    equal bit for bit. Else, with n = ``case.sum_length``, for every element

        |actual - expected| <= 8 eps(case.dtype) sqrt(n) max(1, max |expected|)

    since n roundings of relative size eps/2 in another order differ by about
    eps sqrt(n) of the largest partial sum. NaN must face NaN, and an infinity its like.
    """
    assert jax.tree.structure(actual) == jax.tree.structure(expected)
    for a, e in zip(jax.tree.leaves(actual), jax.tree.leaves(expected), strict=True):
        a, e = np.asarray(a), np.asarray(e)
        assert (a.shape, a.dtype) == (e.shape, e.dtype)
        if case.sum_length == 0 or not jnp.issubdtype(e.dtype, jnp.inexact):
            assert_bitwise(a, e)
            continue
        wide = np.complex128 if np.iscomplexobj(e) else np.float64
        a, e = a.astype(wide), e.astype(wide)
        largest = np.max(np.abs(e), where=np.isfinite(e), initial=1.0)
        eps = float(ml_dtypes.finfo(case.dtype).eps)
        limit = 8 * eps * math.sqrt(case.sum_length) * largest
        np.testing.assert_allclose(a, e, rtol=0, atol=limit, err_msg=case.name)


def assert_bitwise(actual: Any, expected: Any) -> None:
    """Check that two pytrees hold the same bytes."""
    assert jax.tree.structure(actual) == jax.tree.structure(expected)
    for a, e in zip(jax.tree.leaves(actual), jax.tree.leaves(expected), strict=True):
        a, e = np.asarray(a), np.asarray(e)
        assert (a.shape, a.dtype) == (e.shape, e.dtype)
        if a.tobytes() != e.tobytes():
            np.testing.assert_array_equal(a, e)
            raise AssertionError(f"equal values of unequal bytes: {a} and {e}")


@functools.cache
def job(case: Case, seed: int) -> stfuse.Job:
    """Return the job ``<case>.<seed>``, built once for the whole suite."""
    return case.job(f"{case.name}.{seed}", seed)


@functools.cache
def group(case: Case, num_jobs: int) -> stfuse.Fused:
    """Return ``num_jobs`` jobs of a case, fused once for the whole suite."""
    return stfuse.fuse([job(case, seed) for seed in range(num_jobs)], cost="cpu")


def requests(case: Case, fused: stfuse.Fused, rows: Sequence[int]) -> dict[str, Any]:
    """Return a request for each of some first jobs, with so many rows."""
    names = list(fused.jobs)[: len(rows)]
    return {
        name: case.inputs(i, n)
        for i, (name, n) in enumerate(zip(names, rows, strict=True))
    }


def slot_of(fused: stfuse.Fused, bank: stfuse.Bank, name: str) -> list[Any]:
    """Return one job's leaves of a bank, or of its gradient, closed-over ones last."""
    species, slot = fused._where[name]
    specs = fused.plan.species[species].trace.param_specs
    return list(_bank.read(bank.stacks[species], specs, slot))


def _normal(rng: Rng, *shape: int, dtype: Any = np.float32) -> Any:
    return rng.normal(size=shape).astype(dtype)


def _weights(seed: int, *shapes: tuple[int, ...], dtype: Any = np.float32) -> list[Any]:
    """Return arrays that keep values near one: scaled by their fan-in."""
    rng = np.random.default_rng([seed, 1])
    return [
        _normal(rng, *shape, dtype=dtype)
        / np.asarray(math.sqrt(math.prod(shape[:-1]) or 1), dtype)
        for shape in shapes
    ]


@functools.cache
def _specs_of(init: Callable[..., Any]) -> Any:
    return jax.eval_shape(init, jax.random.key(0))


def _drawn_like(specs: Any, seed: int) -> Any:
    """Return params of a model's shapes without running its initializers."""
    leaves, structure = jax.tree.flatten(specs)
    return structure.unflatten(_weights(seed, *(leaf.shape for leaf in leaves)))


MLP = mlp.Config(input_shape=(8, 8), widths=(16,))
CNN = cnn.Config(input_shape=(8, 8), channels=(4,))
_mlp_apply, _mlp_init = (
    functools.partial(mlp.apply, MLP),
    functools.partial(mlp.init, MLP),
)
_cnn_apply, _cnn_init = (
    functools.partial(cnn.apply, CNN),
    functools.partial(cnn.init, CNN),
)


def _closed_over(seed: int) -> tuple[Any, Any]:
    w, b, p = _weights(seed, (4, 4), (4,), (4,))
    w = jnp.asarray(w)
    return lambda p, x: (x @ w + b) * p, p


def _closed_in_jit(seed: int) -> tuple[Any, Any]:
    w, p = _weights(seed, (4, 4), (4,))

    @jax.jit
    def inner(x):
        return x @ w

    return lambda p, x: jax.jit(lambda y: inner(y) * p)(x), p


def _closed_in_scan(seed: int) -> tuple[Any, Any]:
    w, v, p = _weights(seed, (4, 4), (4,), (4,))
    w = jnp.asarray(w)

    @jax.jit
    def inner(x):
        return x + v

    def apply_fn(p, x):
        def body(carry, _):
            return jnp.tanh(inner(carry @ w)), carry

        return lax.scan(body, x * p, None, length=3)[0]

    return apply_fn, p


def _embedding(params, ids):
    return params["table"][ids].mean(1) @ params["kernel"]


def _embedding_params(seed: int) -> tuple[Any, Any]:
    table, kernel = _weights(seed, (7, 4), (4, 3))
    return _embedding, {"table": table, "kernel": kernel}


def _bool_input(p, mask):
    return jnp.where(mask, p, -p), ~mask


def _nested_trees(params, inputs):
    a, (b, c) = inputs["a"], inputs["pair"]
    y = a @ params["deep"][0]["w"]
    return {"sum": (y + b, c), "b": [b[:, ::-1], y.max(1, keepdims=True)]}


def _scalar_outputs(p, x):
    return jnp.sum(x * p, axis=(1, 2)), jnp.max(x, axis=(1, 2))


def _zero_size(params, inputs):
    rows = inputs["x"] @ params["w"]
    nothing = inputs["none"] @ params["none"]  # a sum of no terms
    return rows + nothing, inputs["none"]


def _bf16(params, x):
    for w in params:
        x = jax.nn.gelu(x @ w)
    return x


def _mixed_dtypes(params, inputs):
    half = inputs["half"] * params["half"]
    return {
        "half": half,
        "int": inputs["int"] * params["int"] + jnp.int8(1),
        "byte": inputs["byte"] >> 1,
        "wide": half.astype(jnp.float32) @ params["wide"],
        "complex": inputs["half"].astype(jnp.complex64) * params["complex"],
    }


def _mixed_params(seed: int) -> tuple[Any, Any]:
    (wide,) = _weights(seed, (3, 2))
    rng = np.random.default_rng([seed, 2])
    return _mixed_dtypes, {
        "half": _normal(rng, 3, dtype=np.float16),
        "int": rng.integers(-9, 9, 3, np.int8),
        "wide": wide,
        "complex": (_normal(rng, 3) + 1j * _normal(rng, 3)).astype(np.complex64),
    }


def _mixed_inputs(rng: Rng, rows: int) -> Any:
    return {
        "half": _normal(rng, rows, 3, dtype=np.float16),
        "int": rng.integers(-9, 9, (rows, 3), np.int8),
        "byte": rng.integers(0, 255, (rows, 2), np.uint8),
    }


def _conv(strides, padding, dims, **options):
    def apply_fn(w, x):
        return lax.conv_general_dilated(
            x, w, strides, padding, dimension_numbers=dims, **options
        )

    return apply_fn


_CONV = _conv((2, 1), ((1, 2), (0, 1)), ("NCHW", "OIHW", "NCHW"), rhs_dilation=(1, 2))
_DEPTHWISE = _conv((1, 1), "SAME", ("NHWC", "HWIO", "NHWC"), feature_group_count=4)
_GROUPED = _conv((1, 2), "VALID", ("NHWC", "HWIO", "NHWC"), feature_group_count=2)


def _transposed(w, x):
    return lax.conv_transpose(x, w, (2, 2), "SAME")


def _lstm(params, x):
    def cell(carry, x_t):
        c, h = carry
        i, f, g, o = jnp.split(x_t @ params["x"] + h @ params["h"], 4, axis=-1)
        c = jax.nn.sigmoid(f) * c + jax.nn.sigmoid(i) * jnp.tanh(g)
        h = jax.nn.sigmoid(o) * jnp.tanh(c)
        return (c, h), h

    zero = jnp.zeros((x.shape[0], 3), x.dtype)
    (_, last), all_h = lax.scan(cell, (zero, zero), jnp.swapaxes(x, 0, 1))
    return {"last": last, "all": jnp.swapaxes(all_h, 0, 1)}


def _lstm_params(seed: int) -> tuple[Any, Any]:
    x, h = _weights(seed, (2, 12), (3, 12))
    return _lstm, {"x": x, "h": h}


def _while_loop(p, x):
    """Halve each row until it is small; the number of turns depends on its values."""

    def is_large(state):
        turns, y = state
        return (jnp.abs(y).max() > 0.1) & (turns < 40)

    def turn(state):
        turns, y = state
        return turns + 1, y * 0.5 * jnp.tanh(p)

    def one(row):
        return lax.while_loop(is_large, turn, (0, row))

    return jax.vmap(one)(x)


def _cond(p, x):
    def one(row):
        return lax.cond(row[0] > 0, lambda r: r * p, lambda r: r[::-1] - p, row)

    return jax.vmap(one)(x)


def _sort_top_k(p, x):
    keys, values = lax.sort((x, jnp.broadcast_to(p, x.shape)), dimension=1, num_keys=1)
    top, places = lax.top_k(x, 2)
    return keys, values, top, places, jnp.argsort(x, axis=1)


def _move_data(p, x):
    rolled = jnp.roll(x, 1, axis=1)
    return jnp.concatenate([rolled, jnp.broadcast_to(p, x.shape)], 1)[:, ::-2], x[:, 0]


def _random(p, keys):
    def one(key):
        return jax.random.uniform(jax.random.wrap_key_data(key), (3,)) * p

    return jax.vmap(one)(keys), keys


@jax.custom_vjp
def straight_through(x):
    """Round, with the gradient of the identity."""
    return jnp.round(x)


straight_through.defvjp(lambda x: (jnp.round(x), None), lambda _, g: (g,))


def _straight_through(p, x):
    return straight_through(x * p * 3)


def _remat(params, x):
    @jax.remat
    def block(w, y):
        return jnp.sin(jax.nn.relu(y @ w))

    for w in params:
        x = block(w, x)
    return x


def _attention(params, x):
    mean = x.mean(-1, keepdims=True)
    y = (x - mean) * lax.rsqrt(x.var(-1, keepdims=True) + 1e-5) * params["scale"]
    q, k, v = jnp.split(y @ params["qkv"], 3, axis=-1)
    scores = jnp.einsum("bqd,bkd->bqk", q, k) / math.sqrt(q.shape[-1])
    return x + jax.nn.softmax(scores) @ v


def _attention_params(seed: int) -> tuple[Any, Any]:
    scale, qkv = _weights(seed, (4,), (4, 12))
    return _attention, {"scale": scale, "qkv": qkv}


class _TrainingNorm(nn.Module):
    @nn.compact
    def __call__(self, x):
        return nn.BatchNorm(use_running_average=False)(nn.Dense(3)(x))


def _batch_norm(variables, x):
    """Couples its rows, unless each is computed alone."""
    return _TrainingNorm().apply(variables, x, mutable=["batch_stats"])[0]


def _batch_norm_params(seed: int) -> tuple[Any, Any]:
    init = functools.partial(_TrainingNorm().init, x=jnp.zeros((1, 5, 4)))
    return _batch_norm, _drawn_like(jax.eval_shape(init, jax.random.key(0)), seed)


def _row_coupled(p, x):
    y = x * p
    return {"normed": (y - y.mean(0)) / (y.std(0) + 1), "mean": y.mean()}


_SGD = optax.sgd(0.1, momentum=0.9)


def _training_step(state, batch):
    params, moments = state

    def loss(params):
        errors = jax.nn.relu(batch["x"] @ params["w"]) @ params["v"] - batch["y"]
        return (errors**2).mean()

    value, grads = jax.value_and_grad(loss)(params)
    updates, moments = _SGD.update(grads, moments)
    return (optax.apply_updates(params, updates), moments), value


def _training_params(seed: int) -> tuple[Any, Any]:
    w, v = _weights(seed, (3, 4), (4, 1))
    params = {"w": w, "v": v}
    zeros = jax.tree.map(np.zeros_like, params)
    state = jax.tree.unflatten(
        jax.tree.structure(jax.eval_shape(_SGD.init, params)), jax.tree.leaves(zeros)
    )
    return _training_step, (params, state)


def _no_inputs(p, _):
    return jnp.cumsum(p) @ jnp.ones((4, 2))


def _python_scalars(params, x):
    """Python numbers are weakly typed: bfloat16 stays bfloat16."""
    return x * params["scale"] + params["shift"]


def _weak_arrays(params, x):
    """So are JAX arrays made of Python numbers alone."""
    return x * params


def _linalg(p, x):
    square = x @ jnp.swapaxes(x, 1, 2) + 3 * jnp.eye(3) + p * p
    lower = jnp.linalg.cholesky(square)
    solved = lax.linalg.triangular_solve(lower, x, left_side=True, lower=True)
    return lower, solved, jnp.fft.rfft(x * p[0])


class _Linen(nn.Module):
    width: int = 5

    @nn.compact
    def __call__(self, x, train):
        y = nn.LayerNorm()(nn.Dense(self.width)(x))
        return nn.Dropout(0.5, deterministic=not train)(nn.gelu(y))


def _linen(seed: int) -> tuple[Any, Any]:
    init = functools.partial(_Linen().init, x=jnp.zeros((1, 4)), train=False)
    return _Linen(), _drawn_like(jax.eval_shape(init, jax.random.key(0)), seed)


class Nnx(nnx.Module):
    """Every kind of variable: parameters, statistics, random state."""

    def __init__(self, seed: int) -> None:
        self.dense = nnx.Linear(4, 3, rngs=nnx.Rngs(seed))
        self.norm = nnx.BatchNorm(3, rngs=nnx.Rngs(seed))
        self.dropout = nnx.Dropout(0.5, rngs=nnx.Rngs(seed))

    def __call__(self, x):
        return self.dropout(nnx.relu(self.norm(self.dense(x))))


@functools.cache
def nnx_model(seed: int) -> Nnx:
    """Return a model in the mode that it is served in."""
    model = Nnx(seed)
    model.eval()
    return model


def _floats(*shape: int, dtype: Any = np.float32) -> Callable[[Rng, int], Any]:
    return lambda rng, rows: _normal(rng, rows, *shape, dtype=dtype)


def _with(apply_fn: Any, *shapes: tuple[int, ...], dtype: Any = np.float32) -> Any:
    """Return ``make`` of a function whose params are arrays of these shapes."""

    def make(seed: int) -> tuple[Any, Any]:
        leaves = _weights(seed, *shapes, dtype=dtype)
        return apply_fn, leaves if len(leaves) > 1 else leaves[0]

    return make


CASES = (
    Case(
        "mlp",
        lambda seed: (_mlp_apply, _drawn_like(_specs_of(_mlp_init), seed)),
        _floats(8, 8),
        sum_length=80,
    ),
    Case(
        "cnn",
        lambda seed: (_cnn_apply, _drawn_like(_specs_of(_cnn_init), seed)),
        _floats(8, 8),
        sum_length=80,
    ),
    Case("closed_over", _closed_over, _floats(4), sum_length=5),
    Case("closed_in_jit", _closed_in_jit, _floats(4), sum_length=5),
    Case("closed_in_scan", _closed_in_scan, _floats(4), sum_length=15),
    Case(
        "embedding",
        _embedding_params,
        lambda rng, rows: rng.integers(0, 7, (rows, 5), np.int32),
        sum_length=9,
    ),
    Case(
        "bool_input",
        _with(_bool_input, (4,)),
        lambda rng, rows: rng.integers(0, 2, (rows, 4)).astype(bool),
        sum_length=0,
    ),
    Case(
        "nested_trees",
        lambda seed: (_nested_trees, {"deep": [{"w": _weights(seed, (3, 3))[0]}]}),
        lambda rng, rows: {
            "a": _normal(rng, rows, 3),
            "pair": (_normal(rng, rows, 3), rng.integers(0, 9, rows, np.int32)),
        },
        sum_length=4,
    ),
    Case(
        "scalar_outputs", _with(_scalar_outputs, (3, 4)), _floats(3, 4), sum_length=12
    ),
    Case(
        "zero_size",
        lambda seed: (
            _zero_size,
            {"w": _weights(seed, (3, 2))[0], "none": np.zeros((0, 2), np.float32)},
        ),
        lambda rng, rows: {"x": _normal(rng, rows, 3), "none": _normal(rng, rows, 0)},
        sum_length=3,
    ),
    Case(
        "bf16",
        _with(_bf16, (4, 6), (6, 2), dtype=ml_dtypes.bfloat16),
        _floats(4, dtype=ml_dtypes.bfloat16),
        sum_length=10,
        dtype=ml_dtypes.bfloat16,
    ),
    Case("mixed_dtypes", _mixed_params, _mixed_inputs, sum_length=3, dtype=np.float16),
    Case("conv", _with(_CONV, (4, 3, 3, 2)), _floats(3, 7, 6), sum_length=18),
    Case("depthwise_conv", _with(_DEPTHWISE, (3, 3, 1, 4)), _floats(5, 5, 4), 9),
    Case("grouped_conv", _with(_GROUPED, (2, 2, 2, 6)), _floats(4, 5, 4), 8),
    Case("transposed_conv", _with(_transposed, (3, 3, 2, 3)), _floats(3, 4, 2), 18),
    Case("lstm", _lstm_params, _floats(4, 2), sum_length=24),
    Case(
        "while_loop",
        _with(_while_loop, (4,)),
        _floats(4),
        sum_length=40,
        has_gradient=False,
    ),
    Case("cond", _with(_cond, (4,)), _floats(4), sum_length=1),
    Case("sort_top_k", _with(_sort_top_k, (5,)), _floats(5), sum_length=0),
    Case("move_data", _with(_move_data, (4,)), _floats(4), sum_length=0),
    Case(
        "random",
        _with(_random, (3,)),
        lambda rng, rows: rng.integers(0, 2**32, (rows, 2), np.uint32),
        sum_length=1,
    ),
    Case("straight_through", _with(_straight_through, (4,)), _floats(4), sum_length=1),
    Case("remat", _with(_remat, (4, 4), (4, 4)), _floats(4), sum_length=8),
    Case("attention", _attention_params, _floats(5, 4), sum_length=16),
    Case("training_batch_norm", _batch_norm_params, _floats(5, 4), sum_length=16),
    Case(
        "row_coupled",
        _with(_row_coupled, (3,)),
        lambda rng, rows: _normal(rng, 6, 3),
        sum_length=12,
        batched=False,
    ),
    Case(
        "training_step",
        _training_params,
        lambda rng, rows: {"x": _normal(rng, 6, 3), "y": _normal(rng, 6, 1)},
        sum_length=32,
        batched=False,
    ),
    Case(
        "no_inputs",
        _with(_no_inputs, (4,)),
        lambda rng, rows: None,
        sum_length=8,
        batched=False,
    ),
    Case(
        "python_scalars",
        lambda seed: (_python_scalars, {"scale": 0.5 + seed, "shift": seed}),
        _floats(3, dtype=ml_dtypes.bfloat16),
        sum_length=2,
        dtype=ml_dtypes.bfloat16,
    ),
    Case(
        "weak_arrays",
        lambda seed: (_weak_arrays, jnp.full((3,), 0.5 + seed)),
        _floats(3, dtype=ml_dtypes.bfloat16),
        sum_length=1,
        dtype=ml_dtypes.bfloat16,
    ),
    Case("linalg", _with(_linalg, (3, 3)), _floats(3, 3), sum_length=64),
    Case(
        "linen",
        _linen,
        _floats(4),
        sum_length=9,
        build=functools.partial(stfuse.Job.from_linen, train=False),
    ),
    Case(
        "nnx",
        lambda seed: (nnx_model(seed),),
        _floats(4),
        sum_length=5,
        build=stfuse.Job.from_nnx,
    ),
)
BY_NAME = {case.name: case for case in CASES}
