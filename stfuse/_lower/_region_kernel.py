"""A region as one kernel: what is loaded, computed and stored by one program.

A program computes one place of every grid label, for one row of one slot. What it reads
is zero where it is padding; what it leaves is zero there too. Heads are read and
written where they stand: the place of a feature of a head follows from the job's own
number of features.

Written for the Triton backend of Pallas, which needs a GPU; on a CPU it is interpreted,
for tests.

Axes: R slots, B rows; a value's own axes have labels (`_regions`).
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from stfuse._lower import _tiles
from stfuse._lower._regions import Region, Step, Value, block, leaves
from stfuse._program import Literal, Op


class Operand(Protocol):
    """Where an input stands: rows of an array, from some row and column on."""

    array: Any
    is_stacked: bool
    rows: tuple[int, ...]
    column: int


Places = dict[int, Any]  # label -> place: a number, or all of them


def run(
    region: Region,
    counts: Sequence[int],
    operands: Sequence[Operand],
    shapes: Sequence[tuple[int, ...]],
    *,
    is_interpreted: bool = False,
) -> list[Any]:
    """Compute a region.

    Args:
        region: what to compute.
        counts: per species, its slots.
        operands: where its inputs stand.
        shapes: the padded shapes of its outputs.
        is_interpreted: for a device that has no such kernels.

    Returns:
        Per output ``[R, *shape]``, zero where it is padding.
    """
    kernel = _Kernel(
        region,
        tuple(counts),
        tuple(x.is_stacked for x in operands),
        tuple(x.array.shape[x.is_stacked :] for x in operands),
        tuple(tuple(x.rows) if x.is_stacked else () for x in operands),
        tuple(x.column for x in operands),
        tuple(shapes),
        is_interpreted,
    )
    return _mapped(kernel, (False,) * len(operands))(*(x.array for x in operands))


def _mapped(kernel: _Kernel, has_rows: tuple[bool, ...]) -> Callable[..., list[Any]]:
    """Return what computes a region; mapped over rows, they stand after the slots."""

    @jax.custom_batching.custom_vmap
    def compute(*arrays: Any) -> list[Any]:
        return kernel(arrays, has_rows)

    @compute.def_vmap
    def rows(size: int, in_batched: Sequence[bool], *arrays: Any) -> Any:
        given, flags = [], []
        for x, is_mapped, stacked, had in zip(
            arrays, in_batched, kernel.is_stacked, has_rows, strict=True
        ):
            at = int(stacked)
            if is_mapped:
                x = jnp.moveaxis(x, 0, at)
            if any(has_rows):  # mapped a second time: all rows are one axis
                x = (
                    x
                    if is_mapped
                    else jnp.broadcast_to(
                        jnp.expand_dims(x, at), (*x.shape[:at], size, *x.shape[at:])
                    )
                )
                old = x.shape[at + 1] if had else _num_rows(kernel, arrays, has_rows)
                x = (
                    x
                    if had
                    else jnp.broadcast_to(
                        jnp.expand_dims(x, at + 1),
                        (*x.shape[: at + 1], old, *x.shape[at + 1 :]),
                    )
                )
                x = x.reshape(*x.shape[:at], size * old, *x.shape[at + 2 :])
                is_mapped = True
            given.append(x)
            flags.append(bool(is_mapped))
        outs = _mapped(kernel, tuple(flags))(*given)
        if any(has_rows):
            return [
                jnp.moveaxis(y.reshape(y.shape[0], size, -1, *y.shape[2:]), 1, 0)
                for y in outs
            ], [True] * len(outs)
        return [jnp.moveaxis(y, 1, 0) for y in outs], [True] * len(outs)

    return compute


def _num_rows(kernel: _Kernel, arrays: Sequence[Any], has_rows: Sequence[bool]) -> int:
    i = list(has_rows).index(True)
    # The array still has its mapped axis first where that was mapped too.
    return arrays[i].shape[-1 - len(kernel.in_shapes[i])]


@dataclass(frozen=True, slots=True)
class _Kernel:
    """A region at some sizes.

    Attributes:
        region: what to compute.
        counts: per species, its slots.
        is_stacked: per operand, whether it has slots.
        in_shapes: per operand, the shape of its array's rows.
        in_rows: per operand, the row that each slot reads.
        in_columns: per operand, where it begins in the last axis.
        out_shapes: per output, its padded shape.
        is_interpreted: for a device that has no such kernels.
    """

    region: Region
    counts: tuple[int, ...]
    is_stacked: tuple[bool, ...]
    in_shapes: tuple[tuple[int, ...], ...]
    in_rows: tuple[tuple[int, ...], ...]
    in_columns: tuple[int, ...]
    out_shapes: tuple[tuple[int, ...], ...]
    is_interpreted: bool

    def __call__(self, arrays: Sequence[Any], has_rows: tuple[bool, ...]) -> list[Any]:
        """Compute ``[R, *shape]`` per output, or ``[R, B, *shape]`` of rows."""
        from jax.experimental import pallas as pl
        from jax.experimental.pallas import triton

        region, num_slots = self.region, sum(self.counts)
        num_rows = next(
            (
                x.shape[stacked]
                for x, stacked, rows in zip(
                    arrays, self.is_stacked, has_rows, strict=True
                )
                if rows
            ),
            1,
        )
        own = [_as_numbers(x).reshape(-1) for x in arrays]
        sizes = self._sizes()
        dtypes = [region.values[i].dtype for i in region.outputs]
        lead = (num_slots, num_rows) if any(has_rows) else (num_slots,)
        grid = tuple(max(region.labels.sizes[x]) for x in reversed(region.grid))
        outs = pl.pallas_call(
            functools.partial(self._program, has_rows, num_rows),
            out_shape=[
                jax.ShapeDtypeStruct(
                    (num_slots * num_rows * math.prod(shape),), _stored(dtype)
                )
                for shape, dtype in zip(self.out_shapes, dtypes, strict=True)
            ],
            grid=(*grid, num_rows, num_slots),
            in_specs=[_whole(pl, x) for x in (sizes, *own)],
            out_specs=[
                pl.BlockSpec(
                    (num_slots * num_rows * math.prod(shape),), lambda *at: (0,)
                )
                for shape in self.out_shapes
            ],
            compiler_params=triton.CompilerParams(
                num_warps=self._num_warps(), num_stages=1
            ),
            interpret=self.is_interpreted,
            name="region",
        )(sizes, *own)
        return [
            y.reshape(*lead, *shape).astype(dtype)
            for y, shape, dtype in zip(outs, self.out_shapes, dtypes, strict=True)
        ]

    def _sizes(self) -> Any:
        """Return what differs by slot: true sizes, then rows; a column per slot."""
        sizes = [self.region.labels.sizes[x] for x in self._uneven()]
        table = [np.repeat(own, self.counts) for own in sizes]
        table += [np.array(own) for own in self._scattered()]
        return np.array(table or [[0]], np.int32).reshape(-1)

    def _scattered(self) -> list[tuple[int, ...]]:
        """Return the rows of operands whose rows are not one after the other."""
        found = dict.fromkeys(rows for rows in self.in_rows if rows)
        return [x for x in found if x != tuple(range(x[0], x[0] + len(x)))]

    def _row(self, i: int, slot: Any, tables: Mapping[tuple[int, ...], Any]) -> Any:
        """Return which row of an operand a slot reads."""
        rows = self.in_rows[i]
        if not rows:
            return slot
        return tables[rows] if rows in tables else slot + rows[0]

    def _uneven(self) -> list[int]:
        labels = (*self.region.extents, *self.region.grid)
        return [x for x in labels if len(set(self.region.labels.sizes[x])) > 1]

    def _num_warps(self) -> int:
        values = self.region.values
        most = max(
            math.prod(self.region.extents[x] for x in block(self.region, v))
            for v in values
        )
        # A row of 512 in four warps takes 2 us where it takes 3 in one.
        return min(max(_tiles.power(most // 128), 1), 4 if most <= 4096 else 8)

    def _program(
        self, has_rows: tuple[bool, ...], num_rows: int, sizes_ref: Any, *refs: Any
    ) -> None:
        """Compute one program's part of all outputs."""
        from jax.experimental import pallas as pl
        from jax.experimental.pallas import triton

        region, num = self.region, self.region.num_inputs
        num_grid = len(region.grid)
        slot = pl.program_id(num_grid + 1)
        row = pl.program_id(num_grid)
        uneven = self._uneven()
        true: dict[int, Any] = {
            x: region.labels.sizes[x][0] for x in (*region.extents, *region.grid)
        }
        num_slots = sum(self.counts)
        for i, x in enumerate(uneven):
            true[x] = triton.load(sizes_ref.at[slot + i * num_slots])
        tables = {
            rows: triton.load(sizes_ref.at[slot + (len(uneven) + i) * num_slots])
            for i, rows in enumerate(self._scattered())
        }
        at: Places = {
            x: pl.program_id(num_grid - 1 - i) for i, x in enumerate(region.grid)
        }
        here = _Here(region, true, at)
        values: dict[int, Any] = {}
        for i, value in enumerate(region.values[:num]):
            shape, stacked = self.in_shapes[i], self.is_stacked[i]
            own = self._row(i, slot, tables)
            first = _first(stacked, has_rows[i], own, row, num_rows, shape)
            values[i] = here.load(refs[i], value, shape, first + self.in_columns[i])
        for step in region.steps:
            values[step.output] = here.compute(step, values)
        for i, ref, shape in zip(
            region.outputs, refs[num:], self.out_shapes, strict=True
        ):
            is_row = any(has_rows)
            first = _first(True, is_row, slot, row, num_rows, shape)
            here.store(ref, region.values[i], shape, first, values[i])


def _whole(pl: Any, x: Any) -> Any:
    return pl.BlockSpec(x.shape, lambda *at: (0,))


def _stored(dtype: Any) -> Any:
    """Return the type that stands in memory for a type."""
    return np.dtype(np.int8) if dtype == np.bool_ else dtype


def _as_numbers(x: Any) -> Any:
    return x.astype(_stored(x.dtype))


def _first(
    is_stacked: bool, is_row: bool, slot: Any, row: Any, num_rows: int, shape: Any
) -> Any:
    """Return the address of a slot's and row's own part of an array."""
    size = math.prod(shape)
    if not is_stacked:
        return row * size if is_row else lax.full_like(slot, 0)
    return (slot * num_rows + row) * size if is_row else slot * size


@dataclass(frozen=True, slots=True)
class _Here:
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
        x = _spread(x.astype(_stored(value.dtype)), self._shape(value))
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
        zeros = jnp.zeros(block_shape, _stored(value.dtype))
        _write(triton, ref, _spread(at, block_shape), zeros, mask)

    def compute(self, step: Step, values: Mapping[int, Any]) -> Any:
        """Evaluate one launch on a program's blocks."""
        op, out = step.ops[0], self.region.values[step.output]
        if op.name == "dot_general":
            return self._product(step, values)
        operands = [self._operand(x, values) for x in step.operands]
        if op.name in ("reshape", "squeeze"):
            return operands[0]
        if op.name in ("reduce_max", "reduce_min", "reduce_sum"):
            return self._reduce(step, operands[0])
        if op.name in ("broadcast_in_dim", "transpose"):
            return self._moved(step, operands[0])
        spread = [
            self._spread_to(out, x, step.operands[i]) for i, x in enumerate(operands)
        ]
        return _elementwise(op, spread)

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
            fill = _NEUTRAL[name](x.dtype)
            x = jnp.where(_spread(inside, x.shape), x, jnp.asarray(fill, x.dtype))
        axes = tuple(i for i, d in enumerate(own) if d in gone)
        if not axes:
            return x.astype(dtype)
        y = _REDUCE[name](x, axis=axes)
        if is_float and name != "reduce_sum":  # the device's maximum drops NaN
            is_nan = jnp.max((x != x).astype(jnp.int32), axis=axes) > 0
            y = jnp.where(is_nan, jnp.asarray(np.nan, y.dtype), y)
        return y.astype(dtype)

    def _product(self, step: Step, values: Mapping[int, Any]) -> Any:
        from jax.experimental.pallas import triton

        op, out = step.ops[0], block(self.region, self.region.values[step.output])
        sides = []
        for i, x in enumerate(step.operands):
            value = self.region.values[x]  # type: ignore[index]
            own = block(self.region, value)
            (kept,) = [d for d in own if d in out]
            (gone,) = [d for d in own if d not in out]
            inside = self.inside(value, [gone])
            y = values[x]  # type: ignore[index]
            if inside is not None:
                y = jnp.where(_spread(inside, y.shape), y, jnp.zeros((), y.dtype))
            order = (kept, gone) if i == 0 else (gone, kept)
            sides.append(y if own == order else y.T)
        precision = op.params["precision"]
        return triton.dot(*sides, precision=_tiles.precision(precision)).astype(
            op.specs[0].dtype
        )


def _spread(x: Any, shape: tuple[int, ...]) -> Any:
    """Return an array of a shape, of one that has it or is a number."""
    return jnp.broadcast_to(x, shape) if jnp.shape(x) != shape else jnp.asarray(x)


def _write(triton: Any, ref: Any, at: Any, x: Any, mask: Any) -> None:
    triton.store(ref.at[at], x, mask=None if mask is None else _spread(mask, x.shape))


def _lowest(dtype: Any) -> Any:
    is_float = jnp.issubdtype(dtype, np.floating)
    return -np.inf if is_float else np.iinfo(dtype).min


def _highest(dtype: Any) -> Any:
    is_float = jnp.issubdtype(dtype, np.floating)
    return np.inf if is_float else np.iinfo(dtype).max


_NEUTRAL = {"reduce_max": _lowest, "reduce_min": _highest, "reduce_sum": lambda _: 0}
_REDUCE = {"reduce_max": jnp.max, "reduce_min": jnp.min, "reduce_sum": jnp.sum}
_SAME = frozenset(["copy", "copy_p", "stop_gradient"])
_NATIVE = frozenset(
    "and convert_element_type eq ge gt le lt ne not or select_n xor".split()
)


def _elementwise(op: Op, operands: Sequence[Any]) -> Any:
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
        y = _erfc(x) if op.name == "erfc" else _erf(x)
    elif op.name in ("max", "min"):
        y = _extreme(op.name, *operands)
    elif op.name == "add_any":
        y = operands[0] + operands[1]
    else:
        y = op.bind_fn(*operands)[0]
    return y.astype(dtype) if is_short else y


def _converted(x: Any, dtype: Any) -> Any:
    return x != 0 if dtype == np.bool_ else x.astype(dtype)


def _extreme(name: str, x: Any, y: Any) -> Any:
    """Return the larger or smaller; NaN of either, which the device would drop."""
    best = lax.max(x, y) if name == "max" else lax.min(x, y)
    if not jnp.issubdtype(x.dtype, np.floating):
        return best
    return jnp.where(x != x, x, jnp.where(y != y, y, best))


# Source: Moshier, Cephes, ndtrf.c: erf(x) / x in x^2; erfc(x) over exp(-x^2) / x in
# 1 / x^2, below 2 and above.
_ERF = (7.85386135e-5, -8.01019363e-4, 5.18832769e-3, -2.68538119e-2, 1.12835851e-1)
_ERF += (-3.76126258e-1, 1.12837917)
_ERFC = (2.32681997e-2, -1.38703939e-1, 3.68742467e-1, -5.82473303e-1, 6.21000462e-1)
_ERFC += (-4.94451532e-1, 3.40487994e-1, -2.74112703e-1, 5.63825943e-1)
_ERFC_FAR = (-1.04776640e1, 1.29771996e1, -7.49551872, 2.92101902, -1.01526528)
_ERFC_FAR += (4.21846336e-1, -2.82076744e-1, 5.64189507e-1)


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


def _erfc(x: Any) -> Any:
    far = _erfc_far(jnp.maximum(jnp.abs(x), 1.0))
    y = jnp.where(x < 0.0, 2.0 - far, far)
    return jnp.where(jnp.abs(x) < 1.0, 1.0 - _erf_near(x), y)


def _erf(x: Any) -> Any:
    far = 1.0 - _erfc_far(jnp.maximum(jnp.abs(x), 1.0))
    y = jnp.where(x < 0.0, -far, far)
    return jnp.where(jnp.abs(x) < 1.0, _erf_near(x), y)
