"""Steps of random programs that move data: shapes, pieces, indices, orders."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from tests.program_ops import Body, Step, floating, ranked, whole


def _axes(x: Any) -> Any:
    return ranked(x, max(x.ndim, 1))


def reshape(body: Body, x: Any, a: int, b: int, m: int, n: int) -> Any:
    x = _axes(x)
    axis = b % x.ndim
    size, lead, rest = x.shape[axis], x.shape[:axis], x.shape[axis + 1 :]
    split = next(k for k in (m, 3, 2, 1) if size % k == 0)
    return (
        lambda: x.reshape(-1),
        lambda: x.reshape(*lead, split, size // split, *rest) if x.ndim < 4 else x,
        lambda: x.reshape(*lead, size // split, split, *rest) if x.ndim < 4 else x,
        lambda: ranked(x, 2),
        lambda: x.reshape(*lead, -1),
        lambda: x.reshape(1, *x.shape) if x.ndim < 4 else x,
        lambda: jnp.expand_dims(x, axis) if x.ndim < 4 else x.squeeze(),
        lambda: x.reshape(x.shape[::-1]),
        lambda: x.squeeze(),
    )[a % 9]()


def transpose(body: Body, x: Any, a: int, b: int, m: int, n: int) -> Any:
    axes = list(range(x.ndim))
    shift = a % max(x.ndim, 1)
    axes = axes[shift:] + axes[:shift]
    return x.transpose(axes[::-1] if b % 2 else axes)


def broadcast(body: Body, x: Any, a: int, b: int, m: int, n: int) -> Any:
    x = _axes(x)
    axis = b % x.ndim
    return (
        lambda: jnp.broadcast_to(x, (m, *x.shape)) if x.ndim < 4 else x,
        lambda: jnp.broadcast_to(x[..., None], (*x.shape, m)) if x.ndim < 4 else x,
        lambda: jnp.tile(x, (1 + m % 3, *(1 for _ in x.shape[1:]))),
        lambda: jnp.repeat(x, 1 + m % 3, axis),
        lambda: jnp.full((m, n), 2, x.dtype) if x.ndim > 2 else jnp.full(m, n, x.dtype),
    )[a % 5]()


def cut(body: Body, x: Any, a: int, b: int, m: int, n: int) -> Any:
    x = _axes(x)
    axis = b % x.ndim
    size = x.shape[axis]
    return (
        lambda: lax.slice_in_dim(x, 0, min(m, size), axis=axis),
        lambda: lax.slice_in_dim(x, min(1, size - 1), size, axis=axis),
        lambda: lax.slice_in_dim(x, min(n, size) - 1, size, axis=axis),
        lambda: lax.slice_in_dim(x, 0, size, 2, axis),
        lambda: lax.index_in_dim(x, -1, axis, keepdims=bool(m % 2)),
        lambda: lax.index_in_dim(x, 0, axis, keepdims=False),
        lambda: x[..., ::-2],
        lambda: lax.slice_in_dim(x, 0, max(size - n, 1), axis=axis),
    )[a % 8]()


def window_at(body: Body, x: Any, a: int, b: int, m: int, n: int) -> Any:
    """A slice, or an update, at a computed place that may be out of range."""
    x = _axes(x)
    axis = b % x.ndim
    was = body.is_exact
    at = whole(body, x).sum() - 3 if a % 2 else jnp.int32(m - 2)
    body.is_exact = was
    size = min(n, x.shape[axis])
    if a // 2 % 2:
        shape = (*x.shape[:axis], size, *x.shape[axis + 1 :])
        patch = body.weight(*shape).astype(x.dtype)
        return lax.dynamic_update_slice_in_dim(x, patch, at, axis)
    return lax.dynamic_slice_in_dim(x, at, size, axis)


def gather(body: Body, x: Any, a: int, b: int, m: int, n: int) -> Any:
    ids = whole(body, x)
    mode = ("clip", "fill", None, "promise_in_bounds")[b % 4]
    if mode == "promise_in_bounds":
        ids = ids % m
    if a % 4 == 0:
        table = body.weight(m, n)
        return table.at[ranked(ids, 2)].get(mode=mode, fill_value=2)
    if a % 4 == 1:
        return body.weight(m).at[ids].get(mode=mode, fill_value=-1)
    if a % 4 == 2:
        return body.weight(n, m, 2).at[:, ranked(ids, 1)].get(mode=mode, fill_value=1)
    table = body.weight(m, n)
    one = ranked(ids, 1)
    return table.at[one, one[::-1] % n].get(mode=mode, fill_value=0)


def scatter(body: Body, x: Any, a: int, b: int, m: int, n: int) -> Any:
    ids = ranked(whole(body, x), 1)
    mode = ("drop", "clip", None)[b % 3]
    if a % 2:
        target, new = body.weight(m), body.weight(*ids.shape)
        at = target.at[ids]
    else:
        target, new = body.weight(m, n), body.weight(*ids.shape, n)
        at = target.at[ids] if b % 2 else target.at[ids, ids]
        new = new if b % 2 else new[:, 0]
    kind = a // 2 % 4
    if kind == 0:
        return body.tame(at.add(new, mode=mode), min(ids.size, 10))
    if kind == 3:
        unique = jnp.argsort(ids)
        at = target.at[unique] if a % 2 or b % 2 else target.at[unique, unique]
        return at.set(new, mode=mode)
    return at.max(new, mode=mode) if kind == 1 else at.min(new, mode=mode)


def along(body: Body, x: Any, a: int, b: int, m: int, n: int) -> Any:
    x = _axes(x)
    axis = b % x.ndim
    shape = list(x.shape)
    if a % 2:
        shape[axis] = m
    ids = body.weight(*shape, dtype=np.int32)
    mode = ("clip", "fill", None)[a // 2 % 3]
    options = {} if mode == "clip" else {"fill_value": 0}
    return jnp.take_along_axis(x, ids, axis, mode=mode, **options)


def order(body: Body, x: Any, a: int, b: int, m: int, n: int) -> Any:
    x = ranked(body.sure(x), max(x.ndim, 1)) if a % 6 else ranked(x, max(x.ndim, 1))
    axis, last = b % x.ndim, x.shape[-1]
    return (
        lambda: jnp.sort(x, axis),
        lambda: jnp.argsort(x, axis),
        lambda: jnp.argsort(x, axis, descending=True),
        lambda: lax.top_k(x, min(m, last))[a // 6 % 2],
        lambda: lax.sort((x, x + body.weight(*x.shape).astype(x.dtype)), axis)[1],
        lambda: lax.sort(
            (x, body.weight(*x.shape)), axis, num_keys=2, is_stable=bool(b % 2)
        )[1],
    )[a % 6]()


def concatenate(body: Body, x: Any, a: int, b: int, m: int, n: int) -> Any:
    x = _axes(x)
    axis = b % x.ndim
    shape = (*x.shape[:axis], m, *x.shape[axis + 1 :])
    new = body.weight(*shape).astype(x.dtype)
    return (
        lambda: jnp.concatenate([x, new], axis),
        lambda: jnp.concatenate([new, x], axis),
        lambda: jnp.concatenate([x, x, new], axis),
        lambda: jnp.stack([x, x + 1], axis) if x.ndim < 4 else x,
    )[a % 4]()


def pad(body: Body, x: Any, a: int, b: int, m: int, n: int) -> Any:
    x = _axes(x)
    axis = b % x.ndim
    low, high, gap = ((0, m, 0), (1, 0, 0), (2, n, 1), (0, -1, 0), (-1, m, 0))[a % 5]
    if x.shape[axis] < 2:
        low, high = max(low, 0), max(high, 0)
    if a // 5 % 3 == 2:
        width = [(0, 0)] * x.ndim
        width[axis] = (max(low, 0), max(high, 0))
        return jnp.pad(x, width, mode=("edge", "wrap", "symmetric")[m % 3])
    value = jnp.asarray(m if a // 5 % 3 else 0, x.dtype)
    config = [(0, 0, 0)] * x.ndim
    config[axis] = (low, high, gap)
    return lax.pad(x, value, config)


def split(body: Body, x: Any, a: int, b: int, m: int, n: int) -> Any:
    x = _axes(x)
    axis = b % x.ndim
    size = x.shape[axis]
    if size < 2:
        return x
    if size % 2 == 0 and a % 2:
        left, right = jnp.split(x, 2, axis)
        return jnp.maximum(left, -right)
    at = (1, size - 1, size // 2, min(m, size - 1))[a // 2 % 4]
    left, right = jnp.split(x, [at], axis)
    return (left, right)[n % 2] if a % 3 else jnp.concatenate([right, left], axis)


def iota(body: Body, x: Any, a: int, b: int, m: int, n: int) -> Any:
    x = _axes(x)
    axis = b % x.ndim
    places = lax.broadcasted_iota(jnp.int32, x.shape, axis)
    return (
        lambda: jnp.maximum(x, (places % 5).astype(x.dtype)),
        lambda: jnp.where(places % 2 == 0, x, 0),
        lambda: jax.nn.one_hot(whole(body, ranked(x, 1)), m),
        lambda: jnp.tril(x) if x.ndim > 1 else x,
        lambda: jnp.arange(m) + n,
        lambda: jnp.where(places == x.shape[axis] - 1, x, -x),
    )[a % 6]()


def pool(body: Body, x: Any, a: int, b: int, m: int, n: int) -> Any:
    x = ranked(floating(x), 2 + b % 2)
    window = [1 + m % 3] * (x.ndim - 1) + [1]
    strides = [1 + a // 3 % 2] * (x.ndim - 1) + [1]
    window = [min(pair) for pair in zip(window, x.shape, strict=True)]
    padding = ("SAME", "VALID", [(0, n % window[0])] + [(0, 0)] * (x.ndim - 1))[
        b // 2 % 3
    ]
    init, fn = ((-jnp.inf, lax.max), (jnp.inf, lax.min), (0.0, lax.add))[a % 3]
    y = lax.reduce_window(x, np.asarray(init, x.dtype), fn, window, strides, padding)
    return body.tame(y, int(np.prod(window))) if a % 3 == 2 else y


def move(body: Body, x: Any, a: int, b: int, m: int, n: int) -> Any:
    x = _axes(x)
    axis = b % x.ndim
    return jnp.roll(x, m - 3, axis) if a % 2 else jnp.flip(x, axis)


def random(body: Body, x: Any, a: int, b: int, m: int, n: int) -> Any:
    key = jax.random.wrap_key_data(body.key)
    if a % 2:
        key = jax.random.fold_in(key, whole(body, x).sum())
    shape = (x.shape, (m,), (m, n), ())[b % 4]
    draws = (
        lambda: jax.random.randint(key, shape, -m, n),
        lambda: jax.random.bernoulli(key, 0.5, shape),
        lambda: jax.random.bits(key, shape) >> 28,
        lambda: jnp.floor(jax.random.uniform(jax.random.split(key)[1], shape) * 8),
        lambda: jax.random.permutation(key, m),
    )
    drawn = draws[a // 2 % 5]()
    if drawn.shape != x.shape:
        return drawn.astype(jnp.int32)
    return jnp.where(drawn > 0, x, jnp.zeros_like(x))


def residual(body: Body, x: Any, a: int, b: int, m: int, n: int) -> Any:
    alike = body.alike(x)
    if len(alike) < 2:
        return jax.checkpoint(lambda y: body.tame(y + y))(x)
    return body.tame(x + alike[a % len(alike)])


MOVES: dict[str, Step] = {
    fn.__name__: fn
    for fn in (
        *(reshape, transpose, broadcast, cut, window_at, gather, scatter, along, order),
        *(concatenate, pad, split, iota, pool, move, random, residual),
    )
}
