"""What the cases compute: one function, or one maker of functions, for each.

A maker takes a seed and returns the function and its parameters.
"""

import functools
import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import linen as nn
from flax import nnx
from jax import lax

from models import cnn, mlp

Rng = np.random.Generator


def normal(rng: Rng, *shape: int, dtype: Any = np.float32) -> Any:
    return rng.normal(size=shape).astype(dtype)


def weights(seed: int, *shapes: tuple[int, ...], dtype: Any = np.float32) -> list[Any]:
    """Return arrays that keep values near one: scaled by their fan-in."""
    rng = np.random.default_rng([seed, 1])
    return [
        normal(rng, *shape, dtype=dtype)
        / np.asarray(math.sqrt(math.prod(shape[:-1]) or 1), dtype)
        for shape in shapes
    ]


def specs_of(init: Callable[..., Any]) -> Any:
    return jax.eval_shape(init, jax.random.key(0))


def drawn_like(specs: Any, seed: int) -> Any:
    """Return params of a model's shapes without running its initializers."""
    leaves, structure = jax.tree.flatten(specs)
    return structure.unflatten(weights(seed, *(leaf.shape for leaf in leaves)))


MLP = mlp.Config(input_shape=(8, 8), widths=(16,))
CNN = cnn.Config(input_shape=(8, 8), channels=(4,))
MLP_APPLY = functools.partial(mlp.apply, MLP)
CNN_APPLY = functools.partial(cnn.apply, CNN)


def digits_mlp(seed: int) -> tuple[Any, Any]:
    return MLP_APPLY, drawn_like(specs_of(functools.partial(mlp.init, MLP)), seed)


def digits_cnn(seed: int) -> tuple[Any, Any]:
    return CNN_APPLY, drawn_like(specs_of(functools.partial(cnn.init, CNN)), seed)


def closed_over(seed: int) -> tuple[Any, Any]:
    w, b, p = weights(seed, (4, 4), (4,), (4,))
    w = jnp.asarray(w)
    return lambda p, x: (x @ w + b) * p, p


def closed_in_jit(seed: int) -> tuple[Any, Any]:
    w, p = weights(seed, (4, 4), (4,))

    @jax.jit
    def inner(x):
        return x @ w

    return lambda p, x: jax.jit(lambda y: inner(y) * p)(x), p


def closed_in_scan(seed: int) -> tuple[Any, Any]:
    w, v, p = weights(seed, (4, 4), (4,), (4,))
    w = jnp.asarray(w)

    @jax.jit
    def inner(x):
        return x + v

    def apply_fn(p, x):
        def body(carry, _):
            return jnp.tanh(inner(carry @ w)), carry

        return lax.scan(body, x * p, None, length=3)[0]

    return apply_fn, p


def embedding(params, ids):
    return params["table"][ids].mean(1) @ params["kernel"]


def embedding_params(seed: int) -> tuple[Any, Any]:
    table, kernel = weights(seed, (7, 4), (4, 3))
    return embedding, {"table": table, "kernel": kernel}


def bool_input(p, mask):
    return jnp.where(mask, p, -p), ~mask


def nested_trees(params, inputs):
    a, (b, c) = inputs["a"], inputs["pair"]
    y = a @ params["deep"][0]["w"]
    return {"sum": (y + b, c), "b": [b[:, ::-1], y.max(1, keepdims=True)]}


def scalar_outputs(p, x):
    return jnp.sum(x * p, axis=(1, 2)), jnp.max(x, axis=(1, 2))


def zero_size(params, inputs):
    rows = inputs["x"] @ params["w"]
    nothing = inputs["none"] @ params["none"]  # a sum of no terms
    return rows + nothing, inputs["none"]


def bf16(params, x):
    for w in params:
        x = jax.nn.gelu(x @ w)
    return x


def mixed_dtypes(params, inputs):
    half = inputs["half"] * params["half"]
    return {
        "half": half,
        "int": inputs["int"] * params["int"] + jnp.int8(1),
        "byte": inputs["byte"] >> 1,
        "wide": half.astype(jnp.float32) @ params["wide"],
        "complex": inputs["half"].astype(jnp.complex64) * params["complex"],
    }


def mixed_params(seed: int) -> tuple[Any, Any]:
    (wide,) = weights(seed, (3, 2))
    rng = np.random.default_rng([seed, 2])
    return mixed_dtypes, {
        "half": normal(rng, 3, dtype=np.float16),
        "int": rng.integers(-9, 9, 3, np.int8),
        "wide": wide,
        "complex": (normal(rng, 3) + 1j * normal(rng, 3)).astype(np.complex64),
    }


def mixed_inputs(rng: Rng, rows: int) -> Any:
    return {
        "half": normal(rng, rows, 3, dtype=np.float16),
        "int": rng.integers(-9, 9, (rows, 3), np.int8),
        "byte": rng.integers(0, 255, (rows, 2), np.uint8),
    }


def conv(strides, padding, dims, **options):
    def apply_fn(w, x):
        return lax.conv_general_dilated(
            x, w, strides, padding, dimension_numbers=dims, **options
        )

    return apply_fn


CONV = conv((2, 1), ((1, 2), (0, 1)), ("NCHW", "OIHW", "NCHW"), rhs_dilation=(1, 2))
DEPTHWISE = conv((1, 1), "SAME", ("NHWC", "HWIO", "NHWC"), feature_group_count=4)
GROUPED = conv((1, 2), "VALID", ("NHWC", "HWIO", "NHWC"), feature_group_count=2)


def transposed(w, x):
    return lax.conv_transpose(x, w, (2, 2), "SAME")


def lstm(params, x):
    def cell(carry, x_t):
        c, h = carry
        i, f, g, o = jnp.split(x_t @ params["x"] + h @ params["h"], 4, axis=-1)
        c = jax.nn.sigmoid(f) * c + jax.nn.sigmoid(i) * jnp.tanh(g)
        h = jax.nn.sigmoid(o) * jnp.tanh(c)
        return (c, h), h

    zero = jnp.zeros((x.shape[0], 3), x.dtype)
    (_, last), all_h = lax.scan(cell, (zero, zero), jnp.swapaxes(x, 0, 1))
    return {"last": last, "all": jnp.swapaxes(all_h, 0, 1)}


def lstm_params(seed: int) -> tuple[Any, Any]:
    x, h = weights(seed, (2, 12), (3, 12))
    return lstm, {"x": x, "h": h}


def while_loop(p, x):
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


def cond(p, x):
    def one(row):
        return lax.cond(row[0] > 0, lambda r: r * p, lambda r: r[::-1] - p, row)

    return jax.vmap(one)(x)


def sort_top_k(p, x):
    keys, values = lax.sort((x, jnp.broadcast_to(p, x.shape)), dimension=1, num_keys=1)
    top, places = lax.top_k(x, 2)
    return keys, values, top, places, jnp.argsort(x, axis=1)


def move_data(p, x):
    rolled = jnp.roll(x, 1, axis=1)
    return jnp.concatenate([rolled, jnp.broadcast_to(p, x.shape)], 1)[:, ::-2], x[:, 0]


def random(p, keys):
    def one(key):
        return jax.random.uniform(jax.random.wrap_key_data(key), (3,)) * p

    return jax.vmap(one)(keys), keys


@jax.custom_vjp
def straight_through(x):
    """Round, with the gradient of the identity."""
    return jnp.round(x)


straight_through.defvjp(lambda x: (jnp.round(x), None), lambda _, g: (g,))


def quantized(p, x):
    return straight_through(x * p * 3)


def remat(params, x):
    @jax.remat
    def block(w, y):
        return jnp.sin(jax.nn.relu(y @ w))

    for w in params:
        x = block(w, x)
    return x


def attention(params, x):
    mean = x.mean(-1, keepdims=True)
    y = (x - mean) * lax.rsqrt(x.var(-1, keepdims=True) + 1e-5) * params["scale"]
    q, k, v = jnp.split(y @ params["qkv"], 3, axis=-1)
    scores = jnp.einsum("bqd,bkd->bqk", q, k) / math.sqrt(q.shape[-1])
    return x + jax.nn.softmax(scores) @ v


def attention_params(seed: int) -> tuple[Any, Any]:
    scale, qkv = weights(seed, (4,), (4, 12))
    return attention, {"scale": scale, "qkv": qkv}


class TrainingNorm(nn.Module):
    @nn.compact
    def __call__(self, x):
        return nn.BatchNorm(use_running_average=False)(nn.Dense(3)(x))


def batch_norm(variables, x):
    """Couples its rows, unless each is computed alone."""
    return TrainingNorm().apply(variables, x, mutable=["batch_stats"])[0]


def batch_norm_params(seed: int) -> tuple[Any, Any]:
    init = functools.partial(TrainingNorm().init, x=jnp.zeros((1, 5, 4)))
    return batch_norm, drawn_like(jax.eval_shape(init, jax.random.key(0)), seed)


def row_coupled(p, x):
    y = x * p
    return {"normed": (y - y.mean(0)) / (y.std(0) + 1), "mean": y.mean()}


SGD = optax.sgd(0.1, momentum=0.9)


def training_step(state, batch):
    params, moments = state

    def loss(params):
        errors = jax.nn.relu(batch["x"] @ params["w"]) @ params["v"] - batch["y"]
        return (errors**2).mean()

    value, grads = jax.value_and_grad(loss)(params)
    updates, moments = SGD.update(grads, moments)
    return (optax.apply_updates(params, updates), moments), value


def training_params(seed: int) -> tuple[Any, Any]:
    w, v = weights(seed, (3, 4), (4, 1))
    params = {"w": w, "v": v}
    zeros = jax.tree.map(np.zeros_like, params)
    state = jax.tree.unflatten(
        jax.tree.structure(jax.eval_shape(SGD.init, params)), jax.tree.leaves(zeros)
    )
    return training_step, (params, state)


def no_inputs(p, _):
    return jnp.cumsum(p) @ jnp.ones((4, 2))


def python_scalars(params, x):
    """Python numbers are weakly typed: bfloat16 stays bfloat16."""
    return x * params["scale"] + params["shift"]


def weak_arrays(params, x):
    """So are JAX arrays made of Python numbers alone."""
    return x * params


def linalg(p, x):
    square = x @ jnp.swapaxes(x, 1, 2) + 3 * jnp.eye(3) + p * p
    lower = jnp.linalg.cholesky(square)
    solved = lax.linalg.triangular_solve(lower, x, left_side=True, lower=True)
    return lower, solved, jnp.fft.rfft(x * p[0])


class Linen(nn.Module):
    width: int = 5

    @nn.compact
    def __call__(self, x, train):
        y = nn.LayerNorm()(nn.Dense(self.width)(x))
        return nn.Dropout(0.5, deterministic=not train)(nn.gelu(y))


def linen(seed: int) -> tuple[Any, Any]:
    init = functools.partial(Linen().init, x=jnp.zeros((1, 4)), train=False)
    return Linen(), drawn_like(jax.eval_shape(init, jax.random.key(0)), seed)


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
