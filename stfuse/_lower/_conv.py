"""Ways to compute one job's convolution; mapped over the slots of a stack.

Mapped over its kernels, a convolution becomes a grouped one, which every backend
computes slowly. These avoid it: the images are laid out with channels last, shifted by
each kernel element, and multiplied as matrices or element by element.
"""

from __future__ import annotations

import functools
import itertools
import math
import operator
from collections.abc import Iterator, Sequence
from typing import Any

import jax.numpy as jnp
from jax import lax

from stfuse._program import Op


def is_shiftable(op: Op) -> bool:
    """Return whether shifted images and the kernel's elements make the convolution."""
    params = op.params
    return (
        params["batch_group_count"] == 1
        and all(d == 1 for d in params["lhs_dilation"])
        and op.specs[0].size > 0  # a kernel wider than its image sees nothing
    )


def is_patchable(op: Op) -> bool:
    """Return whether a convolution can be written as patches times a matrix."""
    return is_shiftable(op) and op.params["feature_group_count"] == 1


def is_depthwise(op: Op) -> bool:
    """Return whether every output feature reads one input feature."""
    groups = op.params["feature_group_count"]
    features = op.in_specs[0].shape[op.params["dimension_numbers"][0][1]]
    return is_shiftable(op) and groups == features > 1


def num_taps(op: Op) -> int:
    """Return how many elements a kernel has in space."""
    _, rhs_spec, _ = op.params["dimension_numbers"]
    return math.prod(op.in_specs[1].shape[i] for i in rhs_spec[2:])


def patch_bytes(op: Op) -> int:
    """Return the size of one row's patches, 0 if they are the image itself."""
    out, kernel = op.specs[0], op.in_specs[1]
    _, rhs_spec, out_spec = op.params["dimension_numbers"]
    if num_taps(op) == 1:
        return 0
    num_patches = math.prod(out.shape) // max(out.shape[out_spec[1]], 1)
    patch = math.prod(kernel.shape) // max(kernel.shape[rhs_spec[0]], 1)
    return num_patches * patch * out.dtype.itemsize


def patches(op: Op, lhs: Any, rhs: Any) -> tuple[Any]:
    """Compute a convolution as shifted images, concatenated, times the kernel.

    Args:
        op: a convolution without groups or input dilation.
        lhs: images, laid out as the op says.
        rhs: kernel, laid out as the op says.
    """
    x, w = canonical(op, lhs, rhs)
    slices = [shifted for _, shifted in _shifts(op, x)]
    found = lax.concatenate(slices, x.ndim - 1)
    return _result(op, _product(op, found, w.reshape(-1, w.shape[-1])))


def shifted_products(op: Op, lhs: Any, rhs: Any) -> tuple[Any]:
    """Compute a convolution as a sum of products, one per kernel element."""
    x, w = canonical(op, lhs, rhs)
    wide = _accumulator(op)
    products = [
        _product(op, shifted, w[offset], wide) for offset, shifted in _shifts(op, x)
    ]
    return _result(op, functools.reduce(operator.add, products))


def shifted_scales(op: Op, lhs: Any, rhs: Any) -> tuple[Any]:
    """Compute a depthwise convolution: multiply and add, one kernel element at a time.

    Nothing is contracted over features, so a matrix unit would be idle.
    """
    x, w = canonical(op, lhs, rhs)
    features, wide = x.shape[-1], _accumulator(op)
    w = w.reshape(*w.shape[:-2], features, w.shape[-1] // features).astype(wide)
    terms = [
        shifted.astype(wide)[..., None] * w[offset]
        for offset, shifted in _shifts(op, x)
    ]
    y = functools.reduce(operator.add, terms)
    return _result(op, y.reshape(*y.shape[:-2], -1))


def canonical(op: Op, lhs: Any, rhs: Any) -> tuple[Any, Any]:
    """Return padded images ``[N, *space, C]`` and the kernel ``[*space, I, O]``."""
    lhs_spec, rhs_spec, _ = op.params["dimension_numbers"]
    x = lax.transpose(lhs, (lhs_spec[0], *lhs_spec[2:], lhs_spec[1]))
    w = lax.transpose(rhs, (*rhs_spec[2:], rhs_spec[1], rhs_spec[0]))
    space = [(low, high, 0) for low, high in op.params["padding"]]
    x = lax.pad(x, jnp.zeros((), x.dtype), ((0, 0, 0), *space, (0, 0, 0)))
    return x, w


def _result(op: Op, y: Any) -> tuple[Any]:
    """Lay out ``[N, *space, O]`` as the op says."""
    _, _, out_spec = op.params["dimension_numbers"]
    places = (out_spec[0], *out_spec[2:], out_spec[1])  # where each axis of y belongs
    order = sorted(range(len(places)), key=places.__getitem__)
    return (lax.transpose(y, order).astype(op.specs[0].dtype),)


def _product(op: Op, x: Any, w: Any, dtype: Any = None) -> Any:
    return lax.dot_general(
        x,
        w,
        (((x.ndim - 1,), (0,)), ((), ())),
        precision=op.params["precision"],
        preferred_element_type=dtype or op.params["preferred_element_type"],
    )


def _accumulator(op: Op) -> Any:
    """Return the dtype that sums are held in: half precision adds up in float32."""
    dtype = op.specs[0].dtype
    is_half = jnp.issubdtype(dtype, jnp.floating) and dtype.itemsize < 4
    return jnp.dtype(jnp.float32) if is_half else dtype


def _shifts(op: Op, x: Any) -> Iterator[tuple[tuple[int, ...], Any]]:
    """Yield each kernel element's place, and what it sees: ``[N, *out space, C]``."""
    _, rhs_spec, out_spec = op.params["dimension_numbers"]
    kernel = [op.in_specs[1].shape[i] for i in rhs_spec[2:]]
    out_space = tuple(op.specs[0].shape[i] for i in out_spec[2:])
    for offset in itertools.product(*map(range, kernel)):
        yield offset, _shifted(x, offset, out_space, op.params)


def _shifted(
    x: Any, offset: Sequence[int], out_space: Sequence[int], params: dict[str, Any]
) -> Any:
    dilation, strides = params["rhs_dilation"], params["window_strides"]
    starts = [o * d for o, d in zip(offset, dilation, strict=True)]
    limits = [
        start + (size - 1) * stride + 1 if size else start
        for start, size, stride in zip(starts, out_space, strides, strict=True)
    ]
    return lax.slice(
        x,
        (0, *starts, 0),
        (x.shape[0], *limits, x.shape[-1]),
        (1, *strides, 1),
    )
