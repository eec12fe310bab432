"""A convolution of stacked jobs as one kernel: an implicit matrix product.

Each job's convolution is a product ``[M, K] @ [K, O]`` with M = N * OH * OW positions
and K = taps * C; the left matrix (the patches) is never written: a program reads its
tiles from the image by computed addresses, and what lies outside the image is masked.

Written for the Triton backend of Pallas, which needs a GPU; on a CPU it is interpreted,
for tests. XLA's own product of written patches moves 9 times the image for a 3x3
kernel: on an H200 16 stems (7x7 on 224x224) take 269 us so, 45 us here.

Axes: J jobs, N images, H, W, C of the image, kh, kw, O of the kernel.
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

from stfuse._lower import _conv, _tiles
from stfuse._program import Op


@dataclass(frozen=True, slots=True)
class _Tile:
    """How a job's product is cut: block sizes, and how a program runs.

    Attributes:
        m: positions, a power of two.
        n: output features, a power of two.
        k: elements of K per turn of the loop, a power of two.
        num_warps: of a program.
        num_stages: loads in flight.
    """

    m: int
    n: int
    k: int
    num_warps: int
    num_stages: int


@dataclass(frozen=True, slots=True)
class _Shape:
    """One job's convolution.

    Attributes:
        image: H, W, C.
        kernel: kh, kw.
        out: OH, OW, O.
        num_positions: M.
        strides: of the window.
        dilation: of the kernel.
        low: padding before the image.
        crosses: whether a tap can lie before H, behind H, before W, behind W.
    """

    image: tuple[int, ...]
    kernel: tuple[int, ...]
    out: tuple[int, ...]
    num_positions: int
    strides: tuple[int, int]
    dilation: tuple[int, int]
    low: tuple[int, int]
    crosses: tuple[bool, bool, bool, bool]


def fits(op: Op, rows: int) -> bool:
    """Return whether the kernel computes an op, and there is a device for it."""
    lhs, rhs = op.in_specs
    out = op.specs[0]
    return (
        jax.default_backend() == "gpu"
        and rows * max(lhs.size, out.size) < _tiles.MAX_ADDRESS
        and _conv.is_patchable(op)
        and len(lhs.shape) == 4
        and lhs.dtype == rhs.dtype == out.dtype
        and lhs.dtype in (jnp.bfloat16, jnp.float16)  # float32 would use no matrix unit
        and min(low for pads in op.params["padding"] for low in pads) >= 0
        and _conv.num_taps(op) > 1  # else the image is its own patches
        and min(lhs.size, rhs.size) > 0
    )


def conv(op: Op, lhs: Any, rhs: Any, *, is_interpreted: bool = False) -> tuple[Any]:
    """Compute a stacked convolution.

    Args:
        op: the convolution of one job.
        lhs: images ``[J, ...]``, laid out as the op says.
        rhs: kernels ``[J, ...]``, laid out as the op says.
        is_interpreted: for a device that has no such kernels.

    Returns:
        The output ``[J, ...]``. Mapped over rows, they become more images.
    """

    @jax.custom_batching.custom_vmap
    def run(lhs: Any, rhs: Any) -> Any:
        to_rows, to_matrix, back = _orders(op)
        x, w = lax.transpose(lhs, to_rows), lax.transpose(rhs, to_matrix)
        return lax.transpose(_conv_nhwc(op, x, w, is_interpreted), back)

    @run.def_vmap
    def run_rows(size: int, in_batched: Sequence[bool], lhs: Any, rhs: Any) -> Any:
        has_rows, is_many = in_batched
        if is_many:  # every row has its own weights: nothing to share
            rows = lhs if has_rows else jnp.broadcast_to(lhs, (size, *lhs.shape))
            return lax.map(lambda each: run(*each), (rows, rhs)), True
        batch = op.params["dimension_numbers"][0][0] + 1
        x = jnp.moveaxis(lhs, 0, batch)  # rows before images
        y = run(x.reshape(_joined(x.shape, batch)), rhs)
        out = op.params["dimension_numbers"][2][0] + 1
        y = y.reshape(*y.shape[:out], size, y.shape[out] // size, *y.shape[out + 1 :])
        return jnp.moveaxis(y, out, 0), True

    return (run(lhs, rhs),)


def _joined(shape: tuple[int, ...], axis: int) -> tuple[int, ...]:
    return (*shape[:axis], shape[axis] * shape[axis + 1], *shape[axis + 2 :])


def _orders(op: Op) -> tuple[list[int], list[int], list[int]]:
    """Return how to transpose images and kernels to NHWC and HWIO, and outputs back."""
    lhs, rhs, out = op.params["dimension_numbers"]
    to_rows = [lhs[0], *lhs[2:], lhs[1]]
    to_matrix = [*rhs[2:], rhs[1], rhs[0]]
    places = [out[0], *out[2:], out[1]]
    back = sorted(range(len(places)), key=places.__getitem__)
    found = ([0, *(a + 1 for a in order)] for order in (to_rows, to_matrix, back))
    return tuple(found)  # type: ignore[return-value]


def _conv_nhwc(op: Op, x: Any, w: Any, is_interpreted: bool) -> Any:
    """Compute ``[J, N, H, W, C]`` by ``[J, kh, kw, C, O]``: ``[J, N, OH, OW, O]``."""
    from jax.experimental import pallas as pl
    from jax.experimental.pallas import triton

    num_jobs, num_images = x.shape[:2]
    shape = _shape(op, x.shape[1:], w.shape[1:])
    tile = _tile(num_jobs, shape)
    height, width, features = shape.out
    rows = _tiles.ceil(shape.num_positions, tile.m)
    columns = _tiles.ceil(features, tile.n)
    sizes = (math.prod(x.shape[1:]), math.prod(w.shape[1:]))
    # Tiles of one job and its output features run side by side: they read the same
    # weights, which are the large operand where images are small.
    y = pl.pallas_call(
        functools.partial(_program, shape=shape, tile=tile),
        out_shape=jax.ShapeDtypeStruct(
            (num_jobs, shape.num_positions, features), x.dtype
        ),
        grid=(rows, columns, num_jobs),
        in_specs=[pl.BlockSpec((None, n), lambda i, k, j: (j, 0)) for n in sizes],
        out_specs=pl.BlockSpec((None, tile.m, tile.n), lambda i, k, j: (j, i, k)),
        compiler_params=triton.CompilerParams(
            num_warps=tile.num_warps, num_stages=tile.num_stages
        ),
        interpret=is_interpreted,
        name="stacked_conv",
    )(x.reshape(num_jobs, -1), w.reshape(num_jobs, -1))
    return y.reshape(num_jobs, num_images, height, width, features)


def _shape(op: Op, image: Sequence[int], kernel: Sequence[int]) -> _Shape:
    """Return a job's convolution; its number of images may be several rows'."""
    _, _, out_spec = op.params["dimension_numbers"]
    height, width = (op.specs[0].shape[a] for a in out_spec[2:])
    taps, (low, _) = kernel[:2], zip(*op.params["padding"], strict=True)
    strides, dilation = op.params["window_strides"], op.params["rhs_dilation"]
    last = [
        (size - 1) * s - before + (k - 1) * d
        for size, s, before, k, d in zip(
            (height, width), strides, low, taps, dilation, strict=True
        )
    ]
    return _Shape(
        image=tuple(image[1:]),
        kernel=tuple(taps),
        out=(height, width, kernel[-1]),
        num_positions=image[0] * height * width,
        strides=tuple(strides),
        dilation=tuple(dilation),
        low=tuple(low),
        crosses=(low[0] > 0, last[0] >= image[1], low[1] > 0, last[1] >= image[2]),
    )


def _program(x_ref: Any, w_ref: Any, y_ref: Any, *, shape: _Shape, tile: _Tile) -> None:
    """Compute one tile: ``x_ref`` and ``w_ref`` are a whole job, flat."""
    from jax.experimental import pallas as pl
    from jax.experimental.pallas import triton

    features = shape.out[2]
    m = pl.program_id(0) * tile.m + _tiles.iota(tile.m)
    o = pl.program_id(1) * tile.n + _tiles.iota(tile.n)
    # Positions past the last one read the last one, and are not written.
    position = jnp.minimum(m, shape.num_positions - 1)
    turn = _long_turn if shape.image[2] >= tile.k else _short_turn
    load = turn(shape, tile, position)
    o_inside = None if features % tile.n == 0 else _tiles.across(o < features, tile.k)
    w_start = _tiles.down(_tiles.iota(tile.k) * features, tile.n) + _tiles.across(
        o, tile.k
    )

    def step(t: Any, total: Any) -> Any:
        (x_at, x_inside), (w_at, w_inside) = load(t)
        a = _tiles.load(x_ref, x_at, x_inside)
        b = _tiles.load(
            w_ref, w_start + w_at * features, _tiles.both(o_inside, w_inside)
        )
        return total + triton.dot(a, b)

    taps, channels = math.prod(shape.kernel), shape.image[2]
    num_turns = taps * _tiles.ceil(channels, tile.k)
    if turn is _short_turn:
        num_turns = _tiles.ceil(taps * channels, tile.k)
    start = jnp.zeros((tile.m, tile.n), jnp.float32)
    total = lax.fori_loop(np.int32(0), np.int32(num_turns), step, start)
    m_inside = None if shape.num_positions % tile.m == 0 else m < shape.num_positions
    inside = _tiles.both(
        None if m_inside is None else _tiles.down(m_inside, tile.n),
        None if features % tile.n == 0 else _tiles.across(o < features, tile.m),
    )
    triton.store(y_ref, total.astype(y_ref.dtype), mask=inside)


def _corner(shape: _Shape, position: Any) -> tuple[Any, Any, Any]:
    """Return the address of each position's first tap, and its row and column."""
    height, width, channels = shape.image
    out_height, out_width, _ = shape.out
    image = _tiles.div(position, out_width * out_height)
    row = (
        _tiles.rem(_tiles.div(position, out_width), out_height) * shape.strides[0]
        - shape.low[0]
    )
    column = _tiles.rem(position, out_width) * shape.strides[1] - shape.low[1]
    return ((image * height + row) * width + column) * channels, row, column


def _long_turn(shape: _Shape, tile: _Tile, position: Any) -> Any:
    """Return what a turn reads: some channels of one tap."""
    _, width, channels = shape.image
    start, row, column = _corner(shape, position)
    start = _tiles.down(start, tile.k) + _tiles.across(_tiles.iota(tile.k), tile.m)
    num_chunks = _tiles.ceil(channels, tile.k)

    def load(t: Any) -> Any:
        tap, first = _tiles.div(t, num_chunks), _tiles.rem(t, num_chunks) * tile.k
        down = _tiles.div(tap, shape.kernel[1]) * shape.dilation[0]
        right = _tiles.rem(tap, shape.kernel[1]) * shape.dilation[1]
        inside = _on_image(shape, row + down, column + right)
        x_inside = None if inside is None else _tiles.down(inside, tile.k)
        w_inside = None
        if channels % tile.k:
            is_channel = _tiles.iota(tile.k) + first < channels
            x_inside = _tiles.both(x_inside, _tiles.across(is_channel, tile.m))
            w_inside = _tiles.down(is_channel, tile.n)
        x_at = start + ((down * width + right) * channels + first)
        return (x_at, x_inside), (tap * channels + first, w_inside)

    return load


def _short_turn(shape: _Shape, tile: _Tile, position: Any) -> Any:
    """Return what a turn reads if a tap has few channels: elements of several taps."""
    _, width, channels = shape.image
    start, row, column = _corner(shape, position)
    num_elements = math.prod(shape.kernel) * channels

    def load(t: Any) -> Any:
        k = _tiles.iota(tile.k) + t * tile.k
        tap = _tiles.div(k, channels)
        down = _tiles.div(tap, shape.kernel[1]) * shape.dilation[0]
        right = _tiles.rem(tap, shape.kernel[1]) * shape.dilation[1]
        x_inside = _on_image(
            shape,
            _tiles.down(row, tile.k) + _tiles.across(down, tile.m),
            _tiles.down(column, tile.k) + _tiles.across(right, tile.m),
        )
        w_inside = None
        if num_elements % tile.k:
            x_inside = _tiles.both(x_inside, _tiles.across(k < num_elements, tile.m))
            w_inside = _tiles.down(k < num_elements, tile.n)
        place = (down * width + right) * channels + _tiles.rem(k, channels)
        x_at = _tiles.down(start, tile.k) + _tiles.across(place, tile.m)
        return (x_at, x_inside), (t * tile.k, w_inside)

    return load


def _on_image(shape: _Shape, row: Any, column: Any) -> Any:
    """Return where taps lie on the image; None if they all do."""
    tests = (row >= 0, row < shape.image[0], column >= 0, column < shape.image[1])
    found = None
    for test, can_fail in zip(tests, shape.crosses, strict=True):
        found = _tiles.both(found, test) if can_fail else found
    return found


def _tile(num_jobs: int, shape: _Shape) -> _Tile:
    """Return the tiles with the least estimated time.

    The estimate is in cycles of a multiprocessor, per element of K: products, operands
    from the L2 cache, and a floor of latency that resident programs hide from each
    other. Fewer programs than multiprocessors leave some idle.
    """
    channels, features = shape.image[2], shape.out[2]
    block_k = 64 if channels % 64 == 0 or channels > 96 else 32
    best: tuple[Any, ...] = (math.inf,)
    for m in (128, 64, 32, 16):
        for n in (128, 64, 32, 16):
            if m > max(16, _tiles.power(shape.num_positions)) or n > max(
                16, _tiles.power(features)
            ):
                continue
            programs = (
                num_jobs
                * _tiles.ceil(shape.num_positions, m)
                * _tiles.ceil(features, n)
            )
            share = programs / _tiles.NUM_SMS
            share = math.ceil(share) if share < 6 else share
            rate = 2000 if m >= 64 else 1000  # warp-group products need 64 rows
            work = max(m * n / rate, (m + n) * 2 / 40) + 0.3
            cost = max(share * work, math.ceil(share / 3) * 5.0) + 0.3 * work
            cost *= 1.6 if programs < _tiles.NUM_SMS else 1.0
            best = min(best, (cost, programs, -m, n))
    m, n = -best[2], best[3]
    stages = max(2, min(4, 100_000 // ((m + n) * block_k * 2)))
    if channels < block_k:
        stages = 2  # single elements cannot be copied ahead
    return _Tile(m, n, block_k, 8 if m * n >= 128 * 128 else 4, stages)
