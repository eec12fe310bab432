"""What one program of a region's kernel reads, computes and writes."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import jax.numpy as jnp
import numpy as np
from jax import lax

from stfuse._lower import _tiles
from stfuse._program import Literal
from stfuse._regions._arithmetic import (
    NEUTRAL,
    REDUCE,
    elementwise,
    factors,
    is_shared,
    scaled,
)
from stfuse._regions._record import (
    PRODUCT,
    REDUCTIONS,
    Region,
    Step,
    Value,
    block,
    leaves,
)

Places = dict[int, Any]  # label -> place: a number, or all of them


def stored(dtype: Any) -> Any:
    """Return the type that stands in memory for a type."""
    return np.dtype(np.int8) if dtype == np.bool_ else dtype


@dataclass(frozen=True, slots=True)
class Here:
    """Where a program is.

    Attributes:
        region: what it computes.
        true: per label, the slot's own size.
        at: per grid label, the place.
    """

    region: Region
    true: Mapping[int, Any]
    at: Places

    def _shape(self, value: Value) -> tuple[int, ...]:
        return tuple(self.region.extents[x] for x in block(self.region, value))

    def _place(self, label: int, value: Value) -> Any:
        """Return the places along a label, spread over a value's block."""
        if label in self.at:
            return self.at[label]
        dims = block(self.region, value)
        shape = tuple(self.region.extents[x] for x in dims)
        return lax.broadcasted_iota(np.int32, shape, dims.index(label))

    def _is_short(self, label: int) -> bool:
        """Return whether a program may have places beyond a label's true size."""
        sizes = self.region.labels.sizes[label]
        end = self.region.extents.get(label, max(sizes))
        return set(sizes) != {end}

    def inside(self, value: Value, labels: Sequence[int]) -> Any:
        """Return which places are true data along some labels; None is all."""
        found = None
        for x in labels:
            if self._is_short(x):
                found = _tiles.both(found, self._place(x, value) < self.true[x])
        return found

    def _on_array(self, value: Value, labels: Sequence[int]) -> Any:
        """Return which places along some labels an array has; None is all."""
        found = None
        for x in labels:
            end = max(self.region.labels.sizes[x])
            if self.region.extents.get(x, end) > end:
                found = _tiles.both(found, self._place(x, value) < end)
        return found

    def _axis_at(self, label: int | None, value: Value) -> Any:
        """Return the places along an axis, of a composite in row-major order."""
        at: Any = 0
        for x in self.region.labels.leaves(label):
            at = at * self.true[x] + self._place(x, value)
        return at

    def _address(self, value: Value, shape: tuple[int, ...], first: Any) -> Any:
        at: Any = first
        step = math.prod(shape)
        for size, label in zip(shape, value.axes, strict=True):
            step //= size
            if label is not None:
                at = at + self._axis_at(label, value) * step
        return _spread(at, self._shape(value))

    def load(self, ref: Any, value: Value, shape: tuple[int, ...], first: Any) -> Any:
        """Read a value; what is not true data is zero."""
        from jax.experimental.pallas import triton

        at = self._address(value, shape, first)
        inside = self.inside(value, leaves(self.region, value))
        if inside is None:
            x = triton.load(ref.at[at])
        else:
            x = triton.load(ref.at[at], mask=_spread(inside, at.shape), other=0)
        return x != 0 if value.dtype == np.bool_ else x

    def store(
        self, ref: Any, value: Value, shape: tuple[int, ...], first: Any, x: Any
    ) -> None:
        """Write a value, and zero in its padding."""
        from jax.experimental.pallas import triton

        own = leaves(self.region, value)
        x = _spread(x.astype(stored(value.dtype)), self._shape(value))
        inside = self.inside(value, own)
        if inside is not None:
            x = jnp.where(_spread(inside, x.shape), x, jnp.zeros((), x.dtype))
        # Programs that differ in other labels only have the same: one writes.
        once = None
        for label in self.region.grid:
            if label not in own:
                once = _tiles.both(once, self.at[label] == 0)
        mask = once
        for axis in value.axes:
            parts = self.region.labels.leaves(axis)
            if len(parts) > 1:  # the next place is another part's
                mask = _tiles.both(mask, self.inside(value, parts))
            else:
                mask = _tiles.both(mask, self._on_array(value, parts))
        _write(triton, ref, self._address(value, shape, first), x, mask)
        for axis, label in enumerate(value.axes):
            if len(self.region.labels.leaves(label)) > 1:
                self._fill(ref, value, shape, first, axis, once)

    def _fill(
        self, ref: Any, value: Value, shape: Any, first: Any, axis: int, once: Any
    ) -> None:
        """Write zeros behind the parts of a composite axis."""
        from jax.experimental.pallas import triton

        label = value.axes[axis]
        sizes = self.region.labels.sizes[label]  # type: ignore[index]
        if set(sizes) == {shape[axis]}:
            return
        place: Any = 0
        true: Any = 1
        for x in self.region.labels.leaves(label):
            extent = self.region.extents.get(x, max(self.region.labels.sizes[x]))
            place = place * extent + self._place(x, value)
            true = true * self.true[x]
        mask = _tiles.both(once, _tiles.both(place >= true, place < shape[axis]))
        at: Any = first
        step = math.prod(shape)
        for a, (size, own) in enumerate(zip(shape, value.axes, strict=True)):
            step //= size
            if own is None:
                continue
            at = at + (place if a == axis else self._axis_at(own, value)) * step
            if a != axis:
                parts = self.region.labels.leaves(own)
                mask = _tiles.both(mask, self._on_array(value, parts))
        block_shape = self._shape(value)
        zeros = jnp.zeros(block_shape, stored(value.dtype))
        _write(triton, ref, _spread(at, block_shape), zeros, mask)

    def compute(self, step: Step, values: Mapping[int, Any]) -> Any:
        """Evaluate one launch on a program's blocks."""
        op, out = step.ops[0], self.region.values[step.output]
        if op.name == PRODUCT:
            return self._product(step, values)
        operands = [self._operand(x, values) for x in step.operands]
        if op.name in ("reshape", "squeeze"):
            return operands[0]
        if op.name in REDUCTIONS:
            return self._reduce(step, operands[0])
        if op.name in ("broadcast_in_dim", "transpose"):
            return self._moved(step, operands[0])
        if op.name == "div" and is_shared(operands[1], self._shape(out)):
            x, y = step.operands
            by = [self._spread_to(out, f, y) for f in factors(operands[1], y)]
            return scaled(self._spread_to(out, operands[0], x), by)
        spread = [
            self._spread_to(out, x, step.operands[i]) for i, x in enumerate(operands)
        ]
        return elementwise(op, spread)

    def _operand(self, x: Any, values: Mapping[int, Any]) -> Any:
        if isinstance(x, Literal):
            return jnp.asarray(np.asarray(x.value, x.spec.dtype).item(), x.spec.dtype)
        return values[x]

    def _spread_to(self, out: Value, x: Any, operand: Any) -> Any:
        """Return an operand of an elementwise op, as large as its output's block."""
        shape = self._shape(out)
        if isinstance(operand, Literal) or x.ndim == 0:
            return _spread(x, shape)
        own = block(self.region, self.region.values[operand])
        dims = block(self.region, out)
        if own == dims:
            return x
        return lax.broadcast_in_dim(x, shape, [dims.index(d) for d in own])

    def _moved(self, step: Step, x: Any) -> Any:
        out = self.region.values[step.output]
        (operand,) = step.operands
        if isinstance(operand, Literal):
            return _spread(x, self._shape(out))
        own = block(self.region, self.region.values[operand])
        dims = block(self.region, out)
        kept = [d for d in dims if d in own]
        if list(own) != kept:
            x = lax.transpose(x, [own.index(d) for d in kept])
        if len(kept) < len(dims):
            at = [dims.index(d) for d in kept]
            x = lax.broadcast_in_dim(x, self._shape(out), at)
        return x

    def _reduce(self, step: Step, x: Any) -> Any:
        name, dtype = step.ops[0].name, step.ops[0].specs[0].dtype
        value = self.region.values[step.operands[0]]  # type: ignore[index]
        own = block(self.region, value)
        gone = set(own) - set(block(self.region, self.region.values[step.output]))
        is_float = jnp.issubdtype(x.dtype, np.floating)
        x = x.astype(jnp.float32) if is_float else x
        inside = self.inside(value, [d for d in own if d in gone])
        if inside is not None:
            fill = NEUTRAL[name](x.dtype)
            x = jnp.where(_spread(inside, x.shape), x, jnp.asarray(fill, x.dtype))
        axes = tuple(i for i, d in enumerate(own) if d in gone)
        if not axes:
            return x.astype(dtype)
        y = REDUCE[name](x, axes)
        if is_float and name != "reduce_sum":  # the device's maximum drops NaN
            is_nan = jnp.max((x != x).astype(jnp.int32), axis=axes) > 0
            y = jnp.where(is_nan, jnp.asarray(np.nan, y.dtype), y)
        return y.astype(dtype)

    def _product(self, step: Step, values: Mapping[int, Any]) -> Any:
        from jax.experimental.pallas import triton

        op, out = step.ops[0], block(self.region, self.region.values[step.output])
        sides = []
        for x in step.operands:
            value = self.region.values[x]  # type: ignore[index]
            own = block(self.region, value)
            (kept,) = [d for d in own if d in out]
            (gone,) = [d for d in own if d not in out]
            inside = self.inside(value, [gone])
            y = values[x]  # type: ignore[index]
            if inside is not None:
                y = jnp.where(_spread(inside, y.shape), y, jnp.zeros((), y.dtype))
            sides.append(y if own == (kept, gone) else y.T)
        left, right = sides
        dot = partial(triton.dot, precision=_tiles.precision(op.params["precision"]))
        # The first operand may stay in registers, the second goes to shared memory.
        is_swapped = len(left) < len(right)
        y = dot(right, left.T).T if is_swapped else dot(left, right.T)
        return y.astype(op.specs[0].dtype)


def _spread(x: Any, shape: tuple[int, ...]) -> Any:
    """Return an array of a shape, of one that has it or is a number."""
    return jnp.broadcast_to(x, shape) if jnp.shape(x) != shape else jnp.asarray(x)


def _write(triton: Any, ref: Any, at: Any, x: Any, mask: Any) -> None:
    triton.store(ref.at[at], x, mask=None if mask is None else _spread(mask, x.shape))
