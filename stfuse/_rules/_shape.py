"""Shapes: primitives that move data from place to place, chosen by shapes alone.

Padding stays at the end of an axis, so what starts at one place in every member may
share, and what moves an axis's end may not. An output axis is clean if all that it
shows past its true end is a clean axis of the operand past its own.
"""

from __future__ import annotations

from collections.abc import Hashable, Iterable, Sequence
from dataclasses import replace
from functools import reduce
from typing import Any

import jax.numpy as jnp
import numpy as np
from jax import lax

from stfuse._program import Literal, Op
from stfuse._rules._base import (
    Axes,
    Merge,
    Rule,
    Stack,
    inside,
    mapped,
    mask,
    to_stacked,
)
from stfuse._rules._moves import refold, span, take


def _ints(values: Iterable[Any]) -> tuple[int, ...]:
    return tuple(map(int, values))


def _kept(operands: Sequence[Stack], axes: Sequence[int]) -> Axes:
    """Return where an axis of the output is clean; it is some axis of all operands."""
    return [
        a
        for a, source in enumerate(axes)
        if all(x.is_zero_padded(source) for x in operands)
    ]


# Reshape


def factor_groups(ins: Sequence[int], outs: Sequence[int]) -> list[tuple[range, range]]:
    """Split two shapes of one size into runs of axes of equal products.

    Example:
        >>> factor_groups((5, 12), (5, 3, 4))
        [(range(0, 1), range(0, 1)), (range(1, 2), range(1, 3))]
    """
    groups, i, j = [], 0, 0
    while i < len(ins) and j < len(outs):
        start_i, start_j = i, j
        size_in, size_out = ins[i], outs[j]
        i, j = i + 1, j + 1
        while size_in != size_out:
            if size_in < size_out:
                size_in, i = size_in * ins[i], i + 1
            else:
                size_out, j = size_out * outs[j], j + 1
        groups.append((range(start_i, i), range(start_j, j)))
    if i < len(ins) or j < len(outs):  # ones
        groups.append((range(i, len(ins)), range(j, len(outs))))
    return groups


def _lead(shape: Sequence[int], axes: range) -> int | None:
    """Return the first axis of a run that is not of size one."""
    return next((a for a in axes if shape[a] != 1), None)


def _reshape_form(op: Op) -> Hashable | None:
    """Return the runs, and in each run all sizes but the leading ones.

    With equal sizes below it, a leading axis is a place in row-major order that counts
    equal steps in every member: padding at its end is padding at the end of the run.
    """
    ins, outs = op.in_specs[0].shape, op.specs[0].shape
    is_odd = len(op.in_specs) != 1 or op.params.get("dimensions") is not None
    if is_odd or 0 in ins or 0 in outs:
        return None

    def side(shape: Sequence[int], axes: range) -> Hashable:
        lead = _lead(shape, axes)
        return tuple(None if a == lead else int(shape[a]) for a in axes)

    return tuple(
        "same" if len(a) == len(b) == 1 else (side(ins, a), side(outs, b))
        for a, b in factor_groups(ins, outs)
    )


def _loose_form(op: Op) -> Hashable | None:
    """Return the runs: members of unlike runs take their elements by index."""
    if _reshape_form(op) is None:
        return None
    groups = factor_groups(op.in_specs[0].shape, op.specs[0].shape)
    return tuple((len(a), len(b)) for a, b in groups)


def _reshape(rule: Rule, merge: Merge, operands: Sequence[Stack]) -> list[Stack]:
    """Reshape as one if every member's runs are alike, else by index."""
    if len({_reshape_form(op) for op in merge.ops}) == 1:
        return mapped(rule, merge, operands)
    op = merge.ops[0]
    groups = factor_groups(op.in_specs[0].shape, op.specs[0].shape)
    return [merge.output(0, *refold(merge, operands[0], groups))]


def _reshape_clean(op: Op, operands: Sequence[Stack]) -> Sequence[Axes]:
    (x,), outs = operands, op.specs[0].shape
    leads = [
        (_lead(x.shape, a), _lead(outs, b)) for a, b in factor_groups(x.shape, outs)
    ]
    return [
        [b for a, b in leads if a is not None and b is not None and x.is_zero_padded(a)]
    ]


def _reshape_params(ops: Sequence[Op], ins: Any, outs: Any) -> dict[str, Any]:
    return {**ops[0].params, "new_sizes": outs[0]}


# Axes that move, come or go


def _transpose_clean(op: Op, operands: Sequence[Stack]) -> Sequence[Axes]:
    return [_kept(operands, op.params["permutation"])]


def _squeeze_clean(op: Op, operands: Sequence[Stack]) -> Sequence[Axes]:
    gone = op.params["dimensions"]
    return [
        _kept(operands, [a for a in range(len(operands[0].shape)) if a not in gone])
    ]


def _broadcast_form(op: Op) -> Hashable | None:
    """Return where axes go, and which are repeated: their padding would be too."""
    if len(op.in_specs) != 1:
        return None
    axes = _ints(op.params["broadcast_dimensions"])
    (x,), (y,) = op.in_specs, op.specs
    return axes, tuple(x.shape[i] != y.shape[a] for i, a in enumerate(axes))


def _broadcast(rule: Rule, merge: Merge, operands: Sequence[Stack]) -> list[Stack]:
    """Return copies; a new axis's padding is a copy too, and only zero if all is."""
    (x,), (y,) = operands, mapped(rule, merge, operands)
    clean = [
        a
        for i, a in enumerate(merge.wide.params["broadcast_dimensions"])
        if x.shape[i] == y.shape[a] and x.is_zero_padded(i)
    ]
    is_zero = all(_is_zero(op.inputs[0]) for op in merge.ops)
    every = range(len(y.shape))
    return [merge.output(0, y.array, y.is_stacked, every if is_zero else clean)]


def _rev_form(op: Op) -> Hashable:
    axes, shape = _ints(op.params["dimensions"]), op.in_specs[0].shape
    return axes, tuple(int(shape[a]) for a in axes)


def _same_clean(op: Op, operands: Sequence[Stack]) -> Sequence[Axes]:
    return [_kept(operands, range(len(operands[0].shape)))] * len(op.specs)


def _shape_params(ops: Sequence[Op], ins: Any, outs: Any) -> dict[str, Any]:
    return {**ops[0].params, "shape": outs[0]}


def _tile_form(op: Op) -> Hashable:
    """Return sizes of repeated axes: fewer copies are the first of more copies."""
    shape = op.in_specs[0].shape
    return tuple(
        None if rep == 1 else int(size)
        for rep, size in zip(op.params["reps"], shape, strict=True)
    )


def _tile_params(ops: Sequence[Op], ins: Any, outs: Any) -> dict[str, Any]:
    reps = zip(*(op.params["reps"] for op in ops), strict=True)
    return {**ops[0].params, "reps": tuple(map(max, reps))}


def _tile_clean(op: Op, operands: Sequence[Stack]) -> Sequence[Axes]:
    reps = op.params["reps"]
    return [[a for a in _kept(operands, range(len(reps))) if reps[a] == 1]]


# Pieces


def _concatenate_form(op: Op) -> Hashable:
    """Return where each piece but the last ends."""
    axis = int(op.params["dimension"])
    return axis, tuple(int(s.shape[axis]) for s in op.in_specs[:-1])


def _concatenate_clean(op: Op, operands: Sequence[Stack]) -> Sequence[Axes]:
    # The pieces before the last are full along the axis.
    return [_kept(operands, range(len(op.specs[0].shape)))]


def _split_form(op: Op) -> Hashable:
    return int(op.params["axis"]), len(op.params["sizes"])


def _split(rule: Rule, merge: Merge, operands: Sequence[Stack]) -> list[Stack]:
    """Split as one if all pieces begin at one place, else by index."""
    all_sizes = [_ints(op.params["sizes"]) for op in merge.ops]
    if len({sizes[:-1] for sizes in all_sizes}) == 1:
        return mapped(rule, merge, operands)
    (x,), axis = operands, merge.wide.params["axis"]
    found = []
    for i, spec in enumerate(merge.wide.specs):
        starts = [sum(sizes[:i]) for sizes in all_sizes]
        counts = [sizes[i] for sizes in all_sizes]
        index = span(merge, starts, counts, 1, spec.shape[axis])
        found.append(merge.output(i, *take(x.array, x.is_stacked, axis, index)))
    return found


def _split_params(ops: Sequence[Op], ins: Any, outs: Any) -> dict[str, Any]:
    axis = ops[0].params["axis"]
    return {**ops[0].params, "sizes": tuple(shape[axis] for shape in outs)}


def _strides(op: Op) -> tuple[int, ...]:
    return _ints(op.params["strides"] or (1,) * len(op.in_specs[0].shape))


def _slice_form(op: Op) -> Hashable:
    return _strides(op)


def _slice_params(ops: Sequence[Op], ins: Any, outs: Any) -> dict[str, Any]:
    starts = ops[0].params["start_indices"]
    limits = tuple(
        start + (size - 1) * stride + 1 if size else start
        for start, size, stride in zip(starts, outs[0], _strides(ops[0]), strict=True)
    )
    return {**ops[0].params, "limit_indices": limits}


def _slice(rule: Rule, merge: Merge, operands: Sequence[Stack]) -> list[Stack]:
    """Take the longest slice; where a shorter one ends early, true data follows."""
    if len({_ints(op.params["start_indices"]) for op in merge.ops}) > 1:
        return _slice_by_index(merge, operands[0])
    (x,), (y,) = operands, merge.bind(operands)
    starts, strides = merge.wide.params["start_indices"], _strides(merge.wide)

    def is_clean(op: Op, a: int) -> bool:
        (ins,), (outs,) = op.in_specs, op.specs
        after = starts[a] + outs.shape[a] * strides[a]
        return outs.shape[a] == y.shape[a] or after >= ins.shape[a]

    clean = [
        a
        for a in range(len(y.shape))
        if x.is_zero_padded(a) and all(is_clean(op, a) for op in merge.ops)
    ]
    return [merge.output(0, y.array, y.is_stacked, clean)]


def _slice_by_index(merge: Merge, x: Stack) -> list[Stack]:
    """Take slices that begin at other places in every member."""
    array, is_stacked = x.array, x.is_stacked
    for axis, size in enumerate(merge.wide.specs[0].shape):
        step = _strides(merge.wide)[axis]
        starts = [op.params["start_indices"][axis] for op in merge.ops]
        counts = [op.specs[0].shape[axis] for op in merge.ops]
        index = span(merge, starts, counts, step, size)
        if len(set(starts)) == 1:
            stop = starts[0] + (size - 1) * step + 1 if size else starts[0]
            at = axis + is_stacked
            array = lax.slice_in_dim(array, starts[0], stop, step, at)
        else:
            array, is_stacked = take(array, is_stacked, axis, index)
    return [merge.output(0, array, is_stacked)]


# Pad


def _pad_form(op: Op) -> Hashable:
    return tuple((int(low), int(gap)) for low, _, gap in op.params["padding_config"])


def _pad_params(ops: Sequence[Op], ins: Any, outs: Any) -> dict[str, Any]:
    config = tuple(
        (low, size_out - low - (size + (size - 1) * gap if size else 0), gap)
        for (low, _, gap), size, size_out in zip(
            ops[0].params["padding_config"], ins[0], outs[0], strict=True
        )
    )
    return {**ops[0].params, "padding_config": config}


def _pad(rule: Rule, merge: Merge, operands: Sequence[Stack]) -> list[Stack]:
    """Pad, with the operand's own padding as the first of what a row adds at its end.

    A row that adds nothing there never shows it; one that cuts there shows true data.
    """
    x, value = operands
    ndim = len(x.shape)

    def high(op: Op, axis: int) -> int:
        return op.params["padding_config"][axis][1]

    shown = [a for a in range(ndim) if any(high(op, a) > 0 for op in merge.ops)]
    is_zero = all(_is_zero(op.inputs[1]) for op in merge.ops)
    x = mask(x, shown) if is_zero else _filled(x, shown, value)
    (y,) = merge.bind([x, value])
    clean = [
        a
        for a in range(ndim)
        if is_zero
        and x.is_zero_padded(a)
        and all(
            high(op, a) >= 0 or op.specs[0].shape[a] == y.shape[a] for op in merge.ops
        )
    ]
    return [merge.output(0, y.array, y.is_stacked, clean)]


def _is_zero(atom: int | Literal) -> bool:
    """Return whether a value is a literal zero, to the bit."""
    return isinstance(atom, Literal) and not any(
        np.asarray(atom.value, atom.spec.dtype).tobytes()
    )


def _filled(x: Stack, axes: Axes, value: Stack) -> Stack:
    """Return a stack whose padding along some axes is each row's value."""
    axes = [a for a in axes if not x.is_full(a)]
    if not axes:
        return x
    x, value = to_stacked(x), to_stacked(value)
    keep = reduce(lax.bitwise_and, [inside(x, a)[0] for a in axes])
    fill = value.array.reshape(-1, *(1,) * len(x.shape))
    clean = (False,) * len(x.shape)
    return replace(x, array=jnp.where(keep, x.array, fill), clean=clean)


RULES: dict[str, Rule] = {
    "broadcast_in_dim": Rule(
        form=_broadcast_form, params=_shape_params, apply=_broadcast
    ),
    "concatenate": Rule(form=_concatenate_form, clean=_concatenate_clean),
    "iota": Rule(
        form=lambda op: None if op.in_specs else int(op.params["dimension"]),
        params=_shape_params,
    ),
    "pad": Rule(form=_pad_form, params=_pad_params, apply=_pad),
    "reshape": Rule(
        form=_loose_form,
        params=_reshape_params,
        clean=_reshape_clean,
        apply=_reshape,
    ),
    "rev": Rule(form=_rev_form, clean=_same_clean),
    "slice": Rule(form=_slice_form, params=_slice_params, apply=_slice),
    "split": Rule(
        form=_split_form, params=_split_params, clean=_same_clean, apply=_split
    ),
    "squeeze": Rule(
        form=lambda op: _ints(op.params["dimensions"]), clean=_squeeze_clean
    ),
    "tile": Rule(form=_tile_form, params=_tile_params, clean=_tile_clean),
    "transpose": Rule(
        form=lambda op: _ints(op.params["permutation"]), clean=_transpose_clean
    ),
}
