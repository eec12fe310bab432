"""What random programs are made of: steps from one value to the next.

Values start as small whole numbers, and steps keep them so as long as they can: then
sums are exact in any order, and answers can be compared bit for bit. A step that
rounds says so (`Body.rounds`); a step that would jump where its input is rounded
(an order, an index, a comparison) takes the latest exact value instead.

A step is ``fn(body, x, a, b, m, n)``: ``a`` and ``b`` choose its form, ``m`` and ``n``
its sizes, 1 to 7.
"""

import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

MAX_SIZE = 200
MAX_TERMS = 8  # in bfloat16, whole numbers are exact up to 256
FLOATS = (jnp.float32, jnp.bfloat16)


class Body:
    """One program while it runs: its parameters, and what is known of its values.

    Attributes:
        weights: its parameters; or None, and `specs` are collected.
        exact: the latest value of whole numbers.
        is_exact: whether the current value is one.
        kept: earlier values.
        terms: numbers summed, and roundings, so far.
        coarse: whether anything was rounded to bfloat16.
        has_sums: whether there are sums: a sum of -0 and padding is +0.
    """

    def __init__(self, weights: list[Any] | None, x: Any, key: Any) -> None:
        self.weights, self.specs = weights, []
        self.exact, self.is_exact = x, True
        self.key, self.kept = key, [(x, True)]
        self.terms, self.has_sums = 0, False
        self.coarse = x.dtype == jnp.bfloat16

    def weight(self, *shape: int, dtype: Any = np.float32) -> Any:
        """Return the next parameter."""
        self.specs.append(jax.ShapeDtypeStruct(shape, dtype))
        if self.weights is None:
            return jnp.zeros(shape, dtype)
        return self.weights[len(self.specs) - 1]

    def rounds(self, terms: int = 1) -> None:
        """Say that the current value is rounded from now on."""
        self.is_exact, self.terms = False, self.terms + terms

    def tame(self, y: Any, terms: int = 1) -> Any:
        """Keep a sum of so many products of the current value small."""
        self.has_sums = True
        if self.is_exact and (y.dtype != jnp.bfloat16 or terms <= MAX_TERMS):
            return lax.rem(y, jnp.asarray(5, y.dtype))
        self.rounds(terms)
        return y * (1 / (4 * terms))

    def sure(self, x: Any) -> Any:
        """Return the current value, or the latest exact one."""
        if not self.is_exact:
            x, self.is_exact = self.exact, True
        return x

    def after(self, x: Any) -> Any:
        """Remember a step's value; keep it small."""
        if x.dtype == bool:
            x = x.astype(jnp.float32)
        self.coarse |= x.dtype == jnp.bfloat16
        while x.size > MAX_SIZE:
            axis = int(np.argmax(x.shape))
            x = lax.slice_in_dim(x, 0, x.shape[axis] // 2, axis=axis)
        if self.is_exact:
            self.exact = x
        self.kept.append((x, self.is_exact))
        return x

    def alike(self, x: Any) -> list[Any]:
        """Return earlier values that a value can be added to."""
        return [
            y
            for y, is_exact in self.kept
            if (y.shape, y.dtype) == (x.shape, x.dtype)
            and (is_exact or not self.is_exact)
        ]


def floating(x: Any) -> Any:
    return x if x.dtype in FLOATS else x.astype(jnp.float32)


def whole(body: Body, x: Any) -> Any:
    return body.sure(x).astype(jnp.int32)


def ranked(x: Any, rank: int) -> Any:
    """Return a value of another rank: leading axes come, or become one."""
    if x.ndim < rank:
        return x.reshape((1,) * (rank - x.ndim) + x.shape)
    return x.reshape((-1,) + x.shape[x.ndim - rank + 1 :]) if x.ndim > rank else x


def unary(body: Body, x: Any, a: int, b: int, m: int, n: int) -> Any:
    exact = (
        jnp.negative,
        jnp.abs,
        jnp.sign,
        lambda x: body.tame(x * x),
        jax.nn.relu,
        jnp.copy,
        lambda x: body.tame(lax.integer_pow(x, 2 if x.dtype == jnp.bfloat16 else 3)),
        lambda x: jnp.floor(floating(body.sure(x)) / 2),
        lambda x: jnp.round(floating(body.sure(x)) / 2),
    )
    rounding = (
        jnp.tanh,
        jax.nn.sigmoid,
        lambda x: jnp.exp(-jnp.abs(x)),
        lax.erf,
        lambda x: lax.rsqrt(1 + jnp.abs(x)),
        lambda x: jnp.log1p(jnp.abs(x)),
        jnp.sin,
        jax.nn.gelu,
        jax.nn.silu,
        jax.nn.softplus,
        lambda x: jnp.sqrt(1 + x * x),
    )
    if b % 2:
        return exact[a % len(exact)](x)
    body.rounds()
    return rounding[a % len(rounding)](floating(x))


def operand(body: Body, x: Any, b: int, m: int) -> Any:
    """Return something that broadcasts against a value."""
    last = x.shape[-1] if x.ndim else 1
    alike = body.alike(x)
    return (
        lambda: m,
        lambda: body.weight(*x.shape),
        lambda: body.weight(last),
        lambda: body.weight(),
        lambda: alike[0] if alike else x,
        lambda: x.max(0, keepdims=True) if x.ndim else x,
        lambda: body.weight(*x.shape[:-1], 1) if x.ndim else m,
        lambda: body.weight(m, 1, *(1 for _ in x.shape[1:])) if x.ndim < 4 else m,
    )[b % 8]()


def binary(body: Body, x: Any, a: int, b: int, m: int, n: int) -> Any:
    y = operand(body, x, b, m)
    if not isinstance(y, int):
        y = y.astype(x.dtype)
    jumps = (lax.rem, jnp.floor_divide)
    chosen = (
        jnp.add,
        jnp.subtract,
        lambda x, y: body.tame(x * y),
        jnp.maximum,
        jnp.minimum,
        lambda x, y: floating(x) / (1 + abs(y)),
        lambda x, y: jnp.arctan2(floating(x), 1 + abs(floating(jnp.asarray(y)))),
        *jumps,
        jnp.hypot,
    )[a % 10]
    if a % 10 in (5, 6, 9):
        body.rounds()
        return chosen(floating(x), y)
    if chosen in jumps:
        x = body.sure(x)
        return chosen(x, jnp.asarray(m + 1, x.dtype))
    y = jnp.asarray(y, x.dtype)
    return body.tame(chosen(x, y)) if a % 10 < 2 else chosen(x, y)


def bits(body: Body, x: Any, a: int, b: int, m: int, n: int) -> Any:
    x = whole(body, x)
    y = jnp.int32(m) if b % 2 else body.weight(*x.shape, dtype=np.int32)
    return (
        lambda: x & y,
        lambda: x | y,
        lambda: x ^ y,
        lambda: (x << (m % 4)) & 63,
        lambda: lax.shift_right_logical(x, jnp.int32(m % 8 + 24)),
        lambda: x >> 1,
        lambda: ~x,
        lambda: lax.population_count(x),
        lambda: lax.clz(x),
        lambda: x.astype(jnp.uint8).astype(jnp.int32) & 31,
        lambda: lax.bitcast_convert_type(x.astype(jnp.float32), jnp.int32) >> 24,
    )[a % 11]()


def select(body: Body, x: Any, a: int, b: int, m: int, n: int) -> Any:
    y = operand(body, x, b, m)
    y = jnp.asarray(y, x.dtype)
    left, right = (x, y) if body.is_exact else (body.weight(*x.shape), y * 0)
    compare = (jnp.greater, jnp.less_equal, jnp.equal, jnp.not_equal)[a % 4]
    if a % 3 == 0 and x.ndim:
        here = lax.broadcasted_iota(jnp.int32, x.shape, x.ndim - 1) < n
    else:
        here = compare(left, right)
    return jnp.where(here, x, y) if a % 2 else jnp.where(here, jnp.zeros_like(x), x)


def clamp(body: Body, x: Any, a: int, b: int, m: int, n: int) -> Any:
    return lax.clamp(jnp.asarray(-m, x.dtype), x, jnp.asarray(n, x.dtype))


def convert(body: Body, x: Any, a: int, b: int, m: int, n: int) -> Any:
    names = ("float32", "bfloat16", "int32", "bool", "uint8", "float16")
    dtype = names[a % 6] if body.is_exact else names[a % 2]
    if dtype == "bfloat16" and body.is_exact:
        x = lax.rem(x, jnp.asarray(5, x.dtype))
    y = (abs(x) if dtype == "uint8" else x).astype(dtype)
    return y if dtype in names[:3] else y.astype(jnp.float32)


def dense(body: Body, x: Any, a: int, b: int, m: int, n: int) -> Any:
    x = ranked(floating(x), max(x.ndim, 1))
    kernel = body.weight(x.shape[-1], m).astype(x.dtype)
    y = body.tame(x @ kernel, x.shape[-1])
    return y + body.weight(m).astype(x.dtype) if a % 2 else y


_EINSUMS = (
    ("abc,cd->abd", "cd"),
    ("abc,acd->abd", "acd"),
    ("abc,bcd->bad", "bcd"),
    ("abc,bcd->ad", "bcd"),
    ("abc,abcd->abd", "abcd"),
    ("abc,dca->bd", "dca"),
    ("abc,abd->cd", "abd"),
    ("abc,abd->acd", "abd"),
    ("abc,d->abcd", "d"),
    ("abc,abc->", "abc"),
    ("abc,abc->b", "abc"),
    ("abc,adc->abd", "adc"),
    ("abc,cb->a", "cb"),
)


def einsum(body: Body, x: Any, a: int, b: int, m: int, n: int) -> Any:
    x = ranked(floating(x), 3)
    sizes = dict(zip("abcd", (*x.shape, m), strict=True))
    form, axes = _EINSUMS[a % len(_EINSUMS)]
    kernel = body.weight(*(sizes[i] for i in axes)).astype(x.dtype)
    ins, out = form.split("->")
    terms = math.prod(sizes[i] for i in set(ins) - set(out) - {","})
    wide = jnp.float32 if b % 3 == 0 else x.dtype
    return body.tame(jnp.einsum(form, x, kernel, preferred_element_type=wide), terms)


def conv(body: Body, x: Any, a: int, b: int, m: int, n: int) -> Any:
    num_space = 1 + a % 2
    x = ranked(floating(x), num_space + 1)[None]
    channels, kernel = x.shape[-1], (1 + n % 3,) * num_space
    groups = (1, 1, channels, 2 if channels % 2 == 0 else 1)[b % 4]
    out = m if groups == 1 else channels * (1 + m % 2)
    stride, dilation, base = 1 + a // 2 % 2, 1 + a // 4 % 2, 1 + b // 4 % 2
    padding = ("SAME", "VALID", [(1, n % 2)] * num_space, [(0, m % 3)] * num_space)
    reach = (kernel[0] - 1) * dilation + 1
    is_small = min(x.shape[1:-1]) < reach
    w = body.weight(*kernel, channels // groups, out).astype(x.dtype)
    y = lax.conv_general_dilated(
        x,
        w,
        (stride,) * num_space,
        [(reach, 0)] * num_space if is_small or base > 1 else padding[b // 8 % 4],
        (base,) * num_space,
        (dilation,) * num_space,
        dimension_numbers=(("NHC", "HIO", "NHC"), ("NHWC", "HWIO", "NHWC"))[a % 2],
        feature_group_count=groups,
    )
    return body.tame(y[0], math.prod(kernel) * channels // groups)


def reduction(body: Body, x: Any, a: int, b: int, m: int, n: int) -> Any:
    kind = a % 10
    x = body.sure(x) if kind >= 5 else x
    x = ranked(x, max(x.ndim, 1))
    axis, keep = b % x.ndim, bool(b // 4 % 2)
    axis = None if b % 7 == 6 else axis
    terms = x.size if axis is None else x.shape[axis]
    if kind == 0:
        return body.tame(x.sum(axis, keepdims=keep), terms)
    if kind == 1:
        body.rounds(terms)
        return floating(x).mean(axis, keepdims=keep)
    if kind == 2:
        body.rounds(2 * terms)
        return floating(x).var(axis, keepdims=keep)
    if kind in (3, 4):
        return (jnp.max, jnp.min)[kind - 3](x, axis, keepdims=keep)
    if kind == 9:  # whole powers of two
        return jnp.sign(jnp.prod(jnp.clip(x, -1, 2), axis, keepdims=keep))
    if kind in (5, 6):
        return (jnp.argmax, jnp.argmin)[kind - 5](x, axis, keepdims=keep)
    return (jnp.any, jnp.all)[kind - 7](x > 0, axis, keepdims=keep)


def softmax(body: Body, x: Any, a: int, b: int, m: int, n: int) -> Any:
    x = floating(ranked(x, max(x.ndim, 1)))
    axis = b % x.ndim
    fn = (jax.nn.softmax, jax.nn.log_softmax, jax.nn.logsumexp)[a % 3]
    body.rounds(x.shape[axis])
    return fn(x, axis)


def norm(body: Body, x: Any, a: int, b: int, m: int, n: int) -> Any:
    x = floating(ranked(x, max(x.ndim, 1)))
    body.rounds(2 * x.shape[-1])
    if a % 2:
        x = x - x.mean(-1, keepdims=True)
    y = x * lax.rsqrt(jnp.mean(x * x, -1, keepdims=True) + 0.5)
    return y * (body.weight(x.shape[-1]) / 4).astype(x.dtype) if b % 2 else y


def cumulative(body: Body, x: Any, a: int, b: int, m: int, n: int) -> Any:
    x = body.sure(x) if a % 5 == 3 else x
    x = ranked(x, max(x.ndim, 1))
    axis, reverse = b % x.ndim, bool(b // 4 % 2)
    if a % 5 == 0:
        return body.tame(lax.cumsum(x, axis, reverse), x.shape[axis])
    if a % 5 < 3:
        return (lax.cummax, lax.cummin)[a % 5 - 1](x, axis, reverse)
    if a % 5 == 3:
        x = jnp.clip(x, -1, 2)
        return jnp.sign(lax.cumprod(x, axis, reverse))
    x = floating(x)
    body.rounds(x.shape[axis])
    return lax.cumlogsumexp(x, axis, reverse)


def rnn(body: Body, x: Any, a: int, b: int, m: int, n: int) -> Any:
    x = ranked(floating(x), 2)
    w, u = body.weight(x.shape[1], m), body.weight(m, m)
    w, u = w.astype(x.dtype), u.astype(x.dtype)
    size, body.has_sums = x.shape[1] + m, True
    is_exact = body.is_exact and (x.dtype != jnp.bfloat16 or size <= MAX_TERMS)

    def turn(h: Any, x: Any) -> Any:
        y = x @ w + h @ u
        if is_exact:
            h = lax.rem(y, jnp.asarray(5, y.dtype))
        else:
            h = jnp.tanh(y / (4 * size))
        return h, h.sum() if a % 2 else h

    h, ys = lax.scan(turn, jnp.zeros(m, x.dtype), x, reverse=bool(b % 2))
    if not is_exact:
        body.rounds(size * x.shape[0])
    if b // 2 % 3 == 0:
        return h
    return body.tame(ys, m) if a % 2 else ys


def deep(body: Body, x: Any, a: int, b: int, m: int, n: int) -> Any:
    """A loop over stacked layers, or a counted one."""
    x = ranked(floating(x), max(x.ndim, 1))
    size = x.shape[-1]
    if a % 3 == 0:
        layers = body.weight(1 + m % 3, size, size).astype(x.dtype)
        body.rounds(size * (1 + m % 3))
        scaled = layers / (4 * size)
        return lax.scan(lambda y, w: (jnp.tanh(y @ w), None), x, scaled)[0]
    if a % 3 == 1:
        return lax.fori_loop(0, m, lambda i, y: jnp.maximum(-y, i - 3), x)
    hit = body.sure(x).reshape(-1)[0] > 0
    x = ranked(floating(body.exact), max(body.exact.ndim, 1))
    return lax.cond(hit, lambda y: y + 1, lambda y: y[..., ::-1], x)


def attention(body: Body, x: Any, a: int, b: int, m: int, n: int) -> Any:
    x = ranked(floating(x), 2)
    heads, width, length = 1 + m % 3, n, x.shape[0]
    qkv = x @ (body.weight(x.shape[1], 3 * heads * width) / 8).astype(x.dtype)
    q, k, v = jnp.moveaxis(qkv.reshape(length, 3, heads, width), 1, 0)
    scores = jnp.einsum("qhd,khd->hqk", q, k) / math.sqrt(width)
    if a % 2:
        scores = jnp.where(jnp.tri(length, dtype=bool), scores, -jnp.inf)
    y = jnp.einsum("hqk,khd->qhd", jax.nn.softmax(scores), v)
    body.rounds(x.shape[1] * (width + length))
    return y.reshape(length, -1)


Step = Callable[[Body, Any, int, int, int, int], Any]
STEPS: dict[str, Step] = {
    fn.__name__: fn
    for fn in (
        *(unary, binary, bits, select, clamp, convert, dense, einsum, conv),
        *(reduction, softmax, norm, cumulative, rnn, deep, attention),
    )
}
