"""Arithmetic on the blocks of a program, where a device's own is not enough.

Short floats round after each op, as alone. The device's maximum drops NaN; it has no
error function.
"""

from __future__ import annotations

import functools
import math
import operator
from collections.abc import Sequence
from typing import Any

import jax.numpy as jnp
import numpy as np
from jax import lax

from stfuse._program import Literal, Op
from stfuse._rules._reduce import highest, lowest

NEUTRAL = {"reduce_max": lowest, "reduce_min": highest, "reduce_sum": lambda _: 0}
REDUCE = {
    "reduce_max": lambda x, axes: jnp.max(x, axis=axes),
    "reduce_min": lambda x, axes: jnp.min(x, axis=axes),
    "reduce_sum": lambda x, axes: jnp.sum(x, axis=axes, dtype=x.dtype),
}
_SAME = frozenset(["copy", "copy_p", "stop_gradient"])
_NATIVE = frozenset(
    "and convert_element_type eq ge gt le lt ne not or select_n xor".split()
)


def elementwise(op: Op, operands: Sequence[Any]) -> Any:
    """Evaluate an op on blocks; short floats round after each op, as alone."""
    if op.name in _SAME:
        return operands[0]
    if op.name == "select_n":
        return jnp.where(operands[0] != 0, operands[2], operands[1])
    if op.name == "convert_element_type":
        return _converted(operands[0], op.specs[0].dtype)
    if op.name in _NATIVE:
        return op.bind_fn(*operands)[0]
    dtype = op.specs[0].dtype
    is_short = jnp.issubdtype(dtype, np.floating) and dtype.itemsize == 2
    if is_short:
        operands = [x.astype(jnp.float32) for x in operands]
    if op.name in ("erf", "erfc"):
        (x,) = operands
        y = erf(x) if op.name == "erf" else (quick_erfc if is_short else erfc)(x)
    elif op.name in ("max", "min"):
        y = extreme(op.name, *operands)
    elif op.name == "add_any":
        y = operands[0] + operands[1]
    else:
        y = op.bind_fn(*operands)[0]
    return y.astype(dtype) if is_short else y


def _converted(x: Any, dtype: Any) -> Any:
    return x != 0 if dtype == np.bool_ else x.astype(dtype)


def extreme(name: str, x: Any, y: Any) -> Any:
    """Return the larger or smaller; NaN of either, which the device would drop."""
    best = lax.max(x, y) if name == "max" else lax.min(x, y)
    if not jnp.issubdtype(x.dtype, np.floating):
        return best
    return jnp.where(x != x, x, jnp.where(y != y, y, best))


def is_shared(y: Any, shape: Sequence[int]) -> bool:
    """Return whether many numbers of a block are divided by each of some floats."""
    return y.size < math.prod(shape) and jnp.issubdtype(y.dtype, np.floating)


def factors(y: Any, operand: Any) -> list[Any]:
    """Return what to multiply by, one after the other, instead of dividing.

    Args:
        y: some floats, or one.
        operand: what they are of a step: its number, or a literal.
    """
    if isinstance(operand, Literal):
        value = np.asarray(operand.value).item()
        mantissa, exponent = math.frexp(abs(value))
        if mantissa == 0.5 and abs(exponent) < 14:  # exact, in short floats too
            return [jnp.full_like(y, 1 / value)]
    y = y.astype(jnp.float32)
    size, one = jnp.abs(y), jnp.ones_like(y)
    large, small = jnp.full_like(y, 2.0**64), jnp.full_like(y, 2.0**-64)
    # First what keeps the inverse from overflowing, and from vanishing.
    first = jnp.where(size > large, small, jnp.where(size < small, large, one))
    return [first, 1.0 / (y * first)]


def scaled(x: Any, by: Sequence[Any]) -> Any:
    """Return a block times some others, rounded at last."""
    return functools.reduce(operator.mul, by, x.astype(by[0].dtype)).astype(x.dtype)


# Source: Moshier, Cephes, ndtrf.c: erf(x) / x in x^2; erfc(x) over exp(-x^2) / x in
# 1 / x^2, below 2 and above.
_ERF = (7.85386135e-5, -8.01019363e-4, 5.18832769e-3, -2.68538119e-2, 1.12835851e-1)
_ERF += (-3.76126258e-1, 1.12837917)
_ERFC = (2.32681997e-2, -1.38703939e-1, 3.68742467e-1, -5.82473303e-1, 6.21000462e-1)
_ERFC += (-4.94451532e-1, 3.40487994e-1, -2.74112703e-1, 5.63825943e-1)
_ERFC_FAR = (-1.04776640e1, 1.29771996e1, -7.49551872, 2.92101902, -1.01526528)
_ERFC_FAR += (4.21846336e-1, -2.82076744e-1, 5.64189507e-1)
# Source: Press et al., Numerical Recipes, erfcc: log2(erfc(x) / t) + x^2 log2(e) in t.
_QUICK = (1.7087277e-1, -8.2215223e-1, 1.48851587, -1.13520398, 2.7886807e-1)
_QUICK += (-1.8628806e-1, 9.678418e-2, 3.7409196e-1, 1.00002368, -1.26551223)
_LOG2_E = math.log2(math.e)
_QUICK = tuple(_LOG2_E * c for c in _QUICK)


def _polynomial(coefficients: Sequence[float], x: Any) -> Any:
    total = jnp.full_like(x, coefficients[0])
    for c in coefficients[1:]:
        total = total * x + c
    return total


def _erf_near(x: Any) -> Any:
    return x * _polynomial(_ERF, x * x)


def _erfc_far(x: Any) -> Any:
    """Return erfc where it is far from one, of numbers that are at least 1."""
    square = x * x
    inverse = 1.0 / square
    near, far = _polynomial(_ERFC, inverse), _polynomial(_ERFC_FAR, inverse)
    return jnp.exp(-square) / x * jnp.where(x < 2.0, near, far)


def quick_erfc(x: Any) -> Any:
    """Return erfc to 1e-5 of itself, in half of what `erfc` takes."""
    size = jnp.abs(x)
    root = lax.rsqrt(1.0 + 0.5 * size)  # it and a square take less than a division
    t = root * root
    y = t * jnp.exp2(_polynomial(_QUICK, t) - size * (size * _LOG2_E))
    return jnp.where(x < 0.0, 2.0 - y, y)


def erfc(x: Any) -> Any:
    far = _erfc_far(jnp.maximum(jnp.abs(x), 1.0))
    y = jnp.where(x < 0.0, 2.0 - far, far)
    return jnp.where(jnp.abs(x) < 1.0, 1.0 - _erf_near(x), y)


def erf(x: Any) -> Any:
    far = 1.0 - _erfc_far(jnp.maximum(jnp.abs(x), 1.0))
    y = jnp.where(x < 0.0, -far, far)
    return jnp.where(jnp.abs(x) < 1.0, _erf_near(x), y)
