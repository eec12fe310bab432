"""A region as one kernel: what is loaded, computed and stored by one program.

A program computes one place of every grid label, for one row of one slot. What it reads
is zero where it is padding; what it leaves is zero there too. Heads are read and
written where they stand: the place of a feature of a head follows from the job's own
number of features.

Written for the Triton backend of Pallas, which needs a GPU; on a CPU it is interpreted,
for tests.

Axes: R slots, B rows; a value's own axes have labels (`_axes`).
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from stfuse._lower import _tiles
from stfuse._program import Literal
from stfuse._regions._block import Here, Places, stored
from stfuse._regions._record import PRODUCT, Place, Region, block


def run(
    region: Region,
    counts: Sequence[int],
    operands: Sequence[Place],
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
        if any(has_rows):  # mapped twice: there is one axis of rows only
            given = [
                x if is_in else jnp.broadcast_to(x, (size, *x.shape))
                for x, is_in in zip(arrays, in_batched, strict=True)
            ]
            outs = lax.map(lambda each: compute(*each), tuple(given))
            return outs, [True] * len(outs)
        given = [
            jnp.moveaxis(x, 0, int(stacked)) if is_in else x
            for x, is_in, stacked in zip(
                arrays, in_batched, kernel.is_stacked, strict=True
            )
        ]
        outs = _mapped(kernel, tuple(map(bool, in_batched)))(*given)
        return [jnp.moveaxis(y, 1, 0) for y in outs], [True] * len(outs)

    return compute


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
        num_rows = self._num_rows(arrays, has_rows)
        given = [self._sizes(), *(_as_numbers(x).reshape(-1) for x in arrays)]
        dtypes = [region.values[i].dtype for i in region.outputs]
        outs = [
            jax.ShapeDtypeStruct((num_slots * num_rows * math.prod(s),), stored(dtype))
            for s, dtype in zip(self.out_shapes, dtypes, strict=True)
        ]
        grid = tuple(max(region.labels.sizes[x]) for x in reversed(region.grid))
        options = {"num_warps": self._num_warps(), "num_stages": 1}
        found = pl.pallas_call(
            functools.partial(self._program, has_rows, num_rows),
            out_shape=outs,
            grid=(*grid, num_rows, num_slots),
            in_specs=[_whole(pl, x) for x in given],
            out_specs=[_whole(pl, x) for x in outs],
            compiler_params=triton.CompilerParams(**options),
            interpret=self.is_interpreted,
            name="region",
        )(*given)
        lead = (num_slots, num_rows) if any(has_rows) else (num_slots,)
        return [
            y.reshape(*lead, *shape).astype(dtype)
            for y, shape, dtype in zip(found, self.out_shapes, dtypes, strict=True)
        ]

    def _num_rows(self, arrays: Sequence[Any], has_rows: Sequence[bool]) -> int:
        each = zip(arrays, self.is_stacked, has_rows, strict=True)
        return next((x.shape[stacked] for x, stacked, rows in each if rows), 1)

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

    def _row(self, i: int, slot: Any, tables: Mapping[Any, Any]) -> Any:
        """Return which row of an operand a slot reads."""
        rows = self.in_rows[i]
        if not rows:
            return slot
        return tables[rows] if rows in tables else slot + rows[0]

    def _sizes_of(self, slot: Any, sizes_ref: Any) -> tuple[Any, Any]:
        """Return a slot's size per label, and its row per table of rows."""
        from jax.experimental.pallas import triton

        labels, num_slots = self.region.labels, sum(self.counts)
        held = (*self.region.extents, *self.region.grid)
        true: dict[int, Any] = {x: labels.sizes[x][0] for x in held}
        uneven = self._uneven()
        for i, x in enumerate(uneven):
            true[x] = triton.load(sizes_ref.at[slot + i * num_slots])
        tables = {
            rows: triton.load(sizes_ref.at[slot + (len(uneven) + i) * num_slots])
            for i, rows in enumerate(self._scattered())
        }
        return true, tables

    def _uneven(self) -> list[int]:
        labels = (*self.region.extents, *self.region.grid)
        return [x for x in labels if len(set(self.region.labels.sizes[x])) > 1]

    def _num_warps(self) -> int:
        region = self.region

        def sides(value: int) -> list[int]:
            own = block(region, region.values[value])
            return [region.extents[x] for x in own]

        # A matrix unit takes 16 rows: more warps would only wait for one another.
        products = [x.output for x in region.steps if x.ops[0].name == PRODUCT]
        if products:
            rows = min(max(sides(value), default=1) for value in products)
            return min(max(rows // 16, 1), 8)
        most = max(math.prod(sides(i)) for i in range(len(region.values)))
        # A row of 512 in four warps takes 2 us where it takes 3 in one.
        return min(max(_tiles.power(most // 128), 1), 4 if most <= 4096 else 8)

    def _program(
        self, has_rows: tuple[bool, ...], num_rows: int, sizes_ref: Any, *refs: Any
    ) -> None:
        """Compute one program's part of all outputs."""
        from jax.experimental import pallas as pl

        region, num = self.region, self.region.num_inputs
        num_grid = len(region.grid)
        slot = pl.program_id(num_grid + 1)
        row = pl.program_id(num_grid)
        true, tables = self._sizes_of(slot, sizes_ref)
        at: Places = {
            x: pl.program_id(num_grid - 1 - i) for i, x in enumerate(region.grid)
        }
        here = Here(region, true, at)
        values: dict[int, Any] = {}
        for step in region.steps:
            for i in step.operands:  # what is loaded early holds registers until then
                if not isinstance(i, Literal) and i not in values:
                    shape, stacked = self.in_shapes[i], self.is_stacked[i]
                    own = self._row(i, slot, tables)
                    first = _first(stacked, has_rows[i], own, row, num_rows, shape)
                    first = first + self.in_columns[i]
                    values[i] = here.load(refs[i], region.values[i], shape, first)
            values[step.output] = here.compute(step, values)
        for i, ref, shape in zip(
            region.outputs, refs[num:], self.out_shapes, strict=True
        ):
            is_row = any(has_rows)
            first = _first(True, is_row, slot, row, num_rows, shape)
            here.store(ref, region.values[i], shape, first, values[i])


def _whole(pl: Any, x: Any) -> Any:
    return pl.BlockSpec(x.shape, lambda *at: (0,))


def _as_numbers(x: Any) -> Any:
    return x.astype(stored(x.dtype))


def _first(
    is_stacked: bool, is_row: bool, slot: Any, row: Any, num_rows: int, shape: Any
) -> Any:
    """Return the address of a slot's and row's own part of an array."""
    size = math.prod(shape)
    if not is_stacked:
        return row * size if is_row else lax.full_like(slot, 0)
    return (slot * num_rows + row) * size if is_row else slot * size
