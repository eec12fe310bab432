"""Jobs whose steps have regions: norms, orders, error functions, attention."""

import functools
import math

import jax
import jax.numpy as jnp
import numpy as np

import stfuse


def layer_norm(x, scale, bias):
    mean = x.mean(-1, keepdims=True)
    centered = x - mean
    variance = (centered * centered).mean(-1, keepdims=True)
    return centered * jax.lax.rsqrt(variance + 1e-6) * scale + bias


def norm_job(name, width, seed=0, dtype=np.float32):
    rng = np.random.default_rng(seed)
    params = {
        "scale": rng.normal(size=width).astype(dtype),
        "bias": rng.normal(size=width).astype(dtype),
    }
    inputs = jax.ShapeDtypeStruct((1, 4, width), dtype)
    return stfuse.Job(
        name, lambda p, x: layer_norm(x, p["scale"], p["bias"]), params, inputs
    )


def softmax_job(name, width, dtype=np.float32):
    inputs = jax.ShapeDtypeStruct((1, 3, width), dtype)
    return stfuse.Job(name, lambda p, x: jax.nn.log_softmax(x * p), dtype(0.5), inputs)


def gelu_job(name, width, dtype=np.float32):
    rng = np.random.default_rng(width)
    drawn = rng.normal(size=(5, width)), rng.normal(size=width)
    params = tuple(x.astype(dtype) for x in drawn)
    inputs = jax.ShapeDtypeStruct((1, 4, 5), dtype)

    def apply_fn(p, x):
        y = jax.nn.gelu(x @ p[0] + p[1], approximate=False)
        return y, jax.lax.erf(y)

    return stfuse.Job(name, apply_fn, params, inputs)


def extremes_job(name, width):
    inputs = jax.ShapeDtypeStruct((1, 3, width), np.float32)

    def apply_fn(p, x):
        top, low = x.max(-1, keepdims=True), x.min(-1, keepdims=True)
        near = x > (top + low) / 2
        return {
            "top": jnp.maximum(top, x),
            "low": jnp.minimum(low, x),
            "near": near,
            "count": near.astype(jnp.int32).sum(-1) + jnp.int32(width),
        }

    return stfuse.Job(name, apply_fn, (), inputs)


def attention_job(name, tokens, heads, features, dtype=np.float32, seed=0):
    """Return attention over some tokens; features are of one head."""
    rng = np.random.default_rng(seed)
    width = heads * features
    params = {
        key: (rng.normal(size=(width, width)) / math.sqrt(width)).astype(dtype)
        for key in ("q", "k", "v", "out")
    }
    params["bias"] = rng.normal(size=width).astype(dtype)
    inputs = {
        "x": jax.ShapeDtypeStruct((1, tokens, width), dtype),
        "mask": jax.ShapeDtypeStruct((1, tokens), np.bool_),
    }

    def apply_fn(p, inputs):
        x = inputs["x"]
        shape = (*x.shape[:2], heads, features)
        q, k, v = ((x @ p[key] + p["bias"]).reshape(shape) for key in ("q", "k", "v"))
        scores = jnp.einsum("bqhd,bkhd->bhqk", q, k) / math.sqrt(features)
        scores = jnp.where(inputs["mask"][:, None, None, :], scores, -1e9)
        y = jnp.einsum("bhqk,bkhd->bqhd", jax.nn.softmax(scores).astype(v.dtype), v)
        return y.reshape(x.shape) @ p["out"]

    return stfuse.Job(name, apply_fn, params, inputs)


# Jobs whose step has a region.
GROUPS = {
    "norms": lambda: [norm_job("a", 3), norm_job("b", 7), norm_job("c", 8)],
    "norm_of_one": lambda: [norm_job("a", 1), norm_job("b", 6)],
    "norms_twice": lambda: [
        norm_job("a", 3),
        norm_job("b", 5),
        norm_job("c", 3, 1),
        norm_job("d", 5, 1),
    ],
    "half_norms": lambda: [
        norm_job("a", 3, dtype=jnp.bfloat16),
        norm_job("b", 5, dtype=jnp.bfloat16),
    ],
    "softmaxes": lambda: [softmax_job("a", 5), softmax_job("b", 2)],
    "gelus": lambda: [gelu_job("a", 6), gelu_job("b", 9)],
    "extremes": lambda: [extremes_job("a", 4), extremes_job("b", 7)],
    "attention": lambda: [attention_job("a", 5, 2, 3), attention_job("b", 5, 3, 2)],
    "attention_of_unlike": lambda: [
        attention_job("a", 4, 1, 4),
        attention_job("b", 7, 3, 5),
        attention_job("c", 2, 2, 8),
    ],
    "equal_attention": lambda: [
        attention_job("a", 5, 2, 4),
        attention_job("b", 5, 2, 4, seed=1),
    ],
    "half_gelus": lambda: [
        gelu_job("a", 6, jnp.bfloat16),
        gelu_job("b", 9, jnp.bfloat16),
    ],
    "long_attention": lambda: [
        attention_job("a", 70, 2, 3),
        attention_job("b", 100, 3, 2),
    ],
    "half_attention": lambda: [
        attention_job("a", 5, 2, 3, jnp.bfloat16),
        attention_job("b", 5, 3, 2, jnp.bfloat16),
    ],
}


@functools.cache
def jobs_of(group):
    return GROUPS[group]()


def fused_of(jobs):
    return stfuse.fuse(jobs, cost="h200", lowering="heuristic")


def names_of(region):
    """Return the primitives that a region computes, in order."""
    return [step.ops[0].name for step in region.steps]
