"""A product whose weights are named slots of a large stack, read in place.

Gathering the slots first moves their weights three times; this kernel reads them once:
each program takes the number of its slot from an array, and its tiles from there.

Written for the Triton backend of Pallas, which needs a GPU; on a CPU it is interpreted,
for tests. Without it, slots are gathered.

Axes: S slots of the stack, K of them named, M rows, C contracted, N features.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from stfuse._lower import _tiles
from stfuse._program import Op

_MAX_ROWS = 128  # of a tile
_ENOUGH_PROGRAMS = 3 * _tiles.NUM_SMS  # loads of that many hide each other's latency


@dataclass(frozen=True, slots=True)
class _Tile:
    """How a product is cut.

    Attributes:
        m: rows, a power of two.
        n: features, a power of two.
        k: contracted elements per turn of the loop, a power of two.
        num_parts: into which the contracted axis is cut; their sums are added outside.
    """

    m: int
    n: int
    k: int
    num_parts: int


def fits(op: Op, num_slots: int) -> bool:
    """Return whether the kernel computes an op, and there is a device for it.

    Args:
        op: the product of one job; its second operand is the weights.
        num_slots: S.
    """
    if op.name != "dot_general" or jax.default_backend() != "gpu":
        return False
    return is_plain(op) and num_slots * op.in_specs[1].size < _tiles.MAX_ADDRESS


def is_plain(op: Op) -> bool:
    """Return whether an op is rows times a matrix, as it stands in memory."""
    (on_lhs, on_rhs), (batch, _) = op.params["dimension_numbers"]
    lhs, rhs = op.in_specs
    ndim, num = len(lhs.shape), len(on_lhs)
    return (
        not batch
        and lhs.dtype == rhs.dtype == op.specs[0].dtype
        and lhs.dtype in (jnp.bfloat16, jnp.float16, jnp.float32)
        and tuple(on_lhs) == tuple(range(ndim - num, ndim))
        and tuple(on_rhs) == tuple(range(num))
        and min(lhs.size, rhs.size) > 0
    )


def dot(
    op: Op, lhs: Any, stack: Any, index: Any, *, is_interpreted: bool = False
) -> tuple[Any]:
    """Compute a product of each named slot.

    Args:
        op: the product of one job, for which `is_plain` holds.
        lhs: rows ``[K, ..., C]``.
        stack: weights ``[S, C, ...]``; C and features may be several axes.
        index: int ``[K]``, which slot each is; clipped to the stack.
        is_interpreted: for a device that has no such kernels.

    Returns:
        The output ``[K, ...]``. Mapped over rows, they become more of M.
    """
    num_contracted = len(op.params["dimension_numbers"][0][0])

    @jax.custom_batching.custom_vmap
    def run(lhs: Any, stack: Any, index: Any) -> Any:
        free = lhs.shape[1 : lhs.ndim - num_contracted]
        features = stack.shape[1 + num_contracted :]
        size = math.prod(stack.shape[1 : 1 + num_contracted])
        x = lhs.reshape(lhs.shape[0], -1, size)
        w = stack.reshape(stack.shape[0], size, -1)
        named = jnp.clip(index, 0, stack.shape[0] - 1)
        y = _dot(x, w, named, op.params["precision"], is_interpreted)
        return y.reshape(lhs.shape[0], *free, *features)

    @run.def_vmap
    def run_rows(
        size: int, in_batched: Sequence[bool], lhs: Any, stack: Any, index: Any
    ) -> Any:
        has_rows, *is_many = in_batched
        if any(is_many):  # every row has its own weights: nothing to share
            given = [
                x if is_in else jnp.broadcast_to(x, (size, *x.shape))
                for x, is_in in zip((lhs, stack, index), in_batched, strict=True)
            ]
            return lax.map(lambda each: run(*each), tuple(given)), True
        return jnp.moveaxis(run(jnp.moveaxis(lhs, 0, 1), stack, index), 1, 0), True

    return (run(lhs, stack, index),)


def _dot(x: Any, w: Any, index: Any, precision: Any, is_interpreted: bool) -> Any:
    """Compute ``[K, M, C]`` by ``[S, C, N]`` at ``index``: ``[K, M, N]``."""
    from jax.experimental import pallas as pl
    from jax.experimental.pallas import triton

    (num_named, num_rows, size), features = x.shape, w.shape[2]
    tile = _tile(num_named, num_rows, size, features, x.dtype.itemsize)
    columns = _tiles.ceil(features, tile.n)
    rows = _tiles.ceil(num_rows, tile.m)
    is_cut = tile.num_parts > 1
    y = pl.pallas_call(
        functools.partial(
            _program,
            sizes=(num_rows, size, features),
            tile=tile,
            precision=_tiles.precision(precision),
        ),
        out_shape=jax.ShapeDtypeStruct(
            (tile.num_parts, num_named, num_rows, features),
            jnp.float32 if is_cut else x.dtype,
        ),
        # Tiles of rows side by side: they read the same weights.
        grid=(rows, columns * tile.num_parts, num_named),
        in_specs=[
            pl.BlockSpec((num_named,), lambda i, j, k: (0,)),
            pl.BlockSpec((None, num_rows * size), lambda i, j, k: (k, 0)),
            pl.BlockSpec((w.size,), lambda i, j, k: (0,)),
        ],
        out_specs=pl.BlockSpec(
            (None, None, tile.m, tile.n),
            lambda i, j, k: (j // columns, k, i, j % columns),
        ),
        compiler_params=triton.CompilerParams(num_warps=4, num_stages=4),
        interpret=is_interpreted,
        name="indexed_dot",
    )(index, x.reshape(num_named, -1), w.reshape(-1))
    return y.sum(0).astype(x.dtype) if is_cut else y[0]


def _program(
    index_ref: Any,
    x_ref: Any,
    w_ref: Any,
    y_ref: Any,
    *,
    sizes: tuple[int, int, int],
    tile: _Tile,
    precision: lax.Precision,
) -> None:
    """Compute one tile: ``x_ref`` is a whole slot's rows, ``w_ref`` the whole stack."""
    from jax.experimental import pallas as pl
    from jax.experimental.pallas import triton

    num_rows, size, features = sizes
    columns = _tiles.ceil(features, tile.n)
    turns = _tiles.ceil(_tiles.ceil(size, tile.k), tile.num_parts)
    slot = triton.load(index_ref.at[pl.program_id(2)])
    column = pl.program_id(1)
    first = _tiles.div(column, columns) * turns
    m = pl.program_id(0) * tile.m + _tiles.iota(tile.m)
    n = _tiles.rem(column, columns) * tile.n + _tiles.iota(tile.n)
    k = _tiles.iota(tile.k)
    row = jnp.minimum(m, num_rows - 1)  # what is read twice is not written
    x_start = _tiles.down(row * size, tile.k) + _tiles.across(k, tile.m)
    w_start = _tiles.down(k * features, tile.n) + _tiles.across(n, tile.k)
    w_start = w_start + slot * (size * features)
    n_inside = None if features % tile.n == 0 else n < features
    is_whole = size % (tile.k * tile.num_parts) == 0

    def step(t: Any, total: Any) -> Any:
        at = (first + t) * tile.k
        k_inside = None if is_whole else k + at < size
        x_inside = None if k_inside is None else _tiles.across(k_inside, tile.m)
        w_inside = _tiles.both(
            None if k_inside is None else _tiles.down(k_inside, tile.n),
            None if n_inside is None else _tiles.across(n_inside, tile.k),
        )
        a = _tiles.load(x_ref, x_start + at, x_inside)
        b = _tiles.load(w_ref, w_start + at * features, w_inside)
        return total + triton.dot(a, b, precision=precision)

    start = jnp.zeros((tile.m, tile.n), jnp.float32)
    total = lax.fori_loop(np.int32(0), np.int32(turns), step, start)
    inside = _tiles.both(
        None if num_rows % tile.m == 0 else _tiles.down(m < num_rows, tile.n),
        None if n_inside is None else _tiles.across(n_inside, tile.m),
    )
    triton.store(y_ref, total.astype(y_ref.dtype), mask=inside)


def _tile(
    num_named: int, num_rows: int, size: int, features: int, itemsize: int
) -> _Tile:
    """Return how to cut a product: weights are read once, by many programs."""
    m = min(max(16, _tiles.power(num_rows)), _MAX_ROWS)
    widest = 128 if num_named * features >= 128 * _ENOUGH_PROGRAMS else 64
    n = max(16, min(widest, _tiles.power(features)))
    k = max(16, min(128 // itemsize, _tiles.power(size)))  # 128 bytes of a row
    programs = num_named * _tiles.ceil(features, n) * _tiles.ceil(num_rows, m)
    turns = _tiles.ceil(size, k)
    parts = 1
    while programs * parts < _ENOUGH_PROGRAMS and turns >= 8 * parts and parts < 8:
        parts *= 2
    return _Tile(m, n, k, parts)
