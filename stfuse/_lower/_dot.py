"""Ways to compute one job's matrix product; mapped over the slots of a stack."""

from __future__ import annotations

import math
from typing import Any

import jax.numpy as jnp
from jax import lax

from stfuse._program import Op

# A product with this few rows reads its matrix once whatever it does; a matrix unit
# would mostly multiply padding.
_FEW_ROWS = 8
_TILE = 16  # rows and columns of the smallest tile of a matrix unit


def num_rows(op: Op, rows: int) -> int:
    """Return M, the free size of the first operand, rows included."""
    free, _ = _free(op)
    return rows * math.prod(op.in_specs[0].shape[i] for i in free)


def has_few_rows(op: Op, rows: int) -> bool:
    """Return whether a product is nearer to a matrix times a vector."""
    return num_rows(op, rows) <= _FEW_ROWS and op.specs[0].size > 0


def is_ragged(op: Op, rows: int) -> bool:
    """Return whether a product ends within a tile, on any of its sides."""
    sizes = _sizes(op)
    is_vector = sizes[0] == 1 and rows > 1  # its rows are hidden, and fill the tile
    return all(sizes) and not is_vector and any(size % _TILE for size in sizes)


def padded(op: Op, lhs: Any, rhs: Any) -> tuple[Any]:
    """Compute a product whose sides are filled with zeros up to whole tiles."""
    (on_lhs, on_rhs), (batch_lhs, batch_rhs) = op.params["dimension_numbers"]
    free_lhs, free_rhs = _free(op)
    num_rows, num_contracted, num_features = _sizes(op)
    x = lax.transpose(lhs, (*batch_lhs, *free_lhs, *on_lhs))
    w = lax.transpose(rhs, (*batch_rhs, *on_rhs, *free_rhs))
    first = len(batch_lhs)
    batch = x.shape[:first]
    y = lax.dot_general(
        _filled(x.reshape(*batch, num_rows, num_contracted)),
        _filled(w.reshape(*batch, num_contracted, num_features)),
        (((first + 1,), (first,)), (range(first), range(first))),
        precision=op.params["precision"],
        preferred_element_type=op.params["preferred_element_type"],
    )
    out = op.specs[0]
    y = y[..., :num_rows, :num_features]
    return (y.reshape(out.shape).astype(out.dtype),)


def swapped(op: Op, lhs: Any, rhs: Any) -> tuple[Any]:
    """Compute a product with its operands in the other order.

    The side with many features then fills the larger tile of a matrix unit.
    """
    (on_lhs, on_rhs), (batch_lhs, batch_rhs) = op.params["dimension_numbers"]
    y = lax.dot_general(
        rhs,
        lhs,
        ((on_rhs, on_lhs), (batch_rhs, batch_lhs)),
        precision=op.params["precision"],
        preferred_element_type=op.params["preferred_element_type"],
    )
    _, free_rhs = _free(op)
    first = len(batch_lhs)
    middle = first + len(free_rhs)
    order = [*range(first), *range(middle, y.ndim), *range(first, middle)]
    return (lax.transpose(y, order).astype(op.specs[0].dtype),)


def multiply_reduce(op: Op, lhs: Any, rhs: Any) -> tuple[Any]:
    """Compute a product as a broadcast multiplication and a sum."""
    (on_lhs, on_rhs), (batch_lhs, batch_rhs) = op.params["dimension_numbers"]
    free_lhs, free_rhs = _free(op)
    out = op.specs[0]
    is_half = jnp.issubdtype(out.dtype, jnp.floating) and out.dtype.itemsize < 4
    wide = jnp.float32 if is_half else out.dtype
    x = lax.transpose(lhs, (*batch_lhs, *free_lhs, *on_lhs)).astype(wide)
    w = lax.transpose(rhs, (*batch_rhs, *free_rhs, *on_rhs)).astype(wide)
    batch = x.shape[: len(batch_lhs)]
    x = x.reshape(*batch, math.prod(x.shape[len(batch) : x.ndim - len(on_lhs)]), 1, -1)
    w = w.reshape(*batch, 1, math.prod(w.shape[len(batch) : w.ndim - len(on_rhs)]), -1)
    return (jnp.sum(x * w, axis=-1).reshape(out.shape).astype(out.dtype),)


def _sizes(op: Op) -> tuple[int, int, int]:
    """Return M, K, N: the rows, what is contracted, the features."""
    (on_lhs, _), _ = op.params["dimension_numbers"]
    free_lhs, free_rhs = _free(op)
    lhs, rhs = (spec.shape for spec in op.in_specs)
    sides = (lhs, free_lhs), (lhs, on_lhs), (rhs, free_rhs)
    m, k, n = (math.prod(shape[i] for i in axes) for shape, axes in sides)
    return m, k, n


def _filled(x: Any) -> Any:
    """Return a matrix, or a batch of them, with zeros up to whole tiles."""
    none, missing = (0, 0, 0), [(0, -size % _TILE, 0) for size in x.shape[-2:]]
    return lax.pad(x, jnp.zeros((), x.dtype), [none] * (x.ndim - 2) + missing)


def _free(op: Op) -> tuple[list[int], list[int]]:
    """Return which axes of each operand are in the output alone."""
    (on_lhs, on_rhs), (batch_lhs, batch_rhs) = op.params["dimension_numbers"]
    taken = ({*on_lhs, *batch_lhs}, {*on_rhs, *batch_rhs})
    lhs, rhs = (
        [i for i in range(len(spec.shape)) if i not in used]
        for spec, used in zip(op.in_specs, taken, strict=True)
    )
    return lhs, rhs
