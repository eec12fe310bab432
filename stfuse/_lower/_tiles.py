"""What the kernels for the Triton backend of Pallas are made of."""

from __future__ import annotations

from typing import Any

import jax.numpy as jnp
import numpy as np
from jax import lax

NUM_SMS = 132  # of a Hopper chip; elsewhere tiles are only less well chosen
MAX_ADDRESS = 2**31  # addresses inside an array are 32 bits wide


def load(ref: Any, at: Any, inside: Any) -> Any:
    """Read a tile; what is not inside is zero."""
    from jax.experimental.pallas import triton

    if inside is None:
        return triton.load(ref.at[at])
    return triton.load(ref.at[at], mask=inside, other=0.0)


def both(a: Any, b: Any) -> Any:
    """Return what is in both of two masks; None is everywhere."""
    if a is None or b is None:
        return b if a is None else a
    return jnp.logical_and(a, b)


def div(a: Any, c: int) -> Any:
    """Divide numbers that are not negative: nothing has to be rounded down."""
    return a if c == 1 else lax.div(a, lax.full_like(a, c))


def rem(a: Any, c: int) -> Any:
    """Return the remainder of numbers that are not negative."""
    return lax.full_like(a, 0) if c == 1 else lax.rem(a, lax.full_like(a, c))


def iota(n: int) -> Any:
    """Return 0, 1, ... n-1, 32 bits wide."""
    return lax.broadcasted_iota(np.int32, (n,), 0)


def down(x: Any, n: int) -> Any:
    """Return a column, ``[m, n]``, of ``[m]``."""
    return lax.broadcast_in_dim(x, (x.shape[0], n), (0,))


def across(x: Any, m: int) -> Any:
    """Return a row, ``[m, n]``, of ``[n]``."""
    return lax.broadcast_in_dim(x, (m, x.shape[0]), (1,))


def ceil(a: int, b: int) -> int:
    """Divide and round up."""
    return -(-a // b)


def power(n: int) -> int:
    """Return the smallest power of two that is at least ``n``."""
    return 1 << max(n - 1, 0).bit_length()


def precision(of_product: Any) -> lax.Precision:
    """Return a kernel's precision: as XLA's default, or all bits."""
    wanted = of_product if isinstance(of_product, tuple) else (of_product,)
    exact = {lax.Precision.HIGH, lax.Precision.HIGHEST} & {*wanted}
    return lax.Precision.HIGHEST if exact else lax.Precision.DEFAULT
