"""Typed PRNG keys, which nothing can pad: jobs with unlike numbers of them."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax

from tests.test_mapping import X, check, fused_of


def dropping(n, *, is_loop):
    """A network of ``n`` layers with dropout, a key for each."""

    def layer(x, w_key):
        w, key = w_key
        return jnp.tanh(x @ w) * jax.random.bernoulli(key, 0.5, x.shape[1:]), key

    def apply_fn(params, x):
        w, closed = params["w"], jax.random.split(jax.random.key(0), n)
        keys = params.get("keys", closed)
        if is_loop:
            return lax.scan(layer, x, (w, keys))[0]
        for i in range(n):
            x, _ = layer(x, (w[i], keys[i]))
        return x

    return apply_fn


@pytest.mark.parametrize("is_loop", [False, True])
@pytest.mark.parametrize("has_keys", [False, True])
def test_jobs_with_unlike_numbers_of_keys_answer_as_alone(is_loop, has_keys):
    params = []
    for n in (2, 3):
        own = {"w": np.stack([np.eye(3, dtype="f")] * n)}
        keys = {"keys": jax.random.split(jax.random.key(n), n)}
        params.append({**own, **keys} if has_keys else own)
    fns = [dropping(n, is_loop=is_loop) for n in (2, 3)]
    check(fused_of(fns, params), X[:2], X[:1])


def test_loops_that_carry_unlike_numbers_of_keys_return_their_own():
    def apply_fn(params, x):
        def turn(carry, _):
            y, keys = carry
            keys = jax.vmap(lambda key: jax.random.split(key)[0])(keys)
            return (jnp.tanh(y @ params["w"]), keys), keys

        (y, keys), more = lax.scan(turn, (x, params["keys"]), length=2)
        return y, keys, more

    params = [
        {"w": np.eye(3, dtype="f"), "keys": jax.random.split(jax.random.key(n), n)}
        for n in (2, 3)
    ]
    fused = fused_of(apply_fn, params, batched=False)
    outs = fused(fused.pack(), {"0": X[:1], "1": X[:1]})
    for own, (_, *found) in zip(params, outs.values(), strict=True):
        expected = apply_fn(own, X[:1])[1:]
        for a, e in zip(found, expected, strict=True):
            data = jax.random.key_data
            np.testing.assert_array_equal(data(a), data(e))
