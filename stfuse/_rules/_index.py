"""Indices: slices, gathers and scatters whose places are data.

What is out of range is so against each row's own size, never the padded one: there an
index is clamped, or moved out of the padded range too, as the job alone would clamp,
fill or drop. So no row reads padding or a neighbour, and none writes past its end.

Windows start in range and have equal sizes, or span their axis in every member.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Sequence
from dataclasses import replace
from functools import partial, reduce
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from stfuse._program import Op
from stfuse._rules._base import (
    Axes,
    Merge,
    Rule,
    Stack,
    inside,
    mask,
    spec_at,
    to_stacked,
)

_CLIP = lax.GatherScatterMode.CLIP
_FILL_OR_DROP = lax.GatherScatterMode.FILL_OR_DROP
_PROMISE = lax.GatherScatterMode.PROMISE_IN_BOUNDS
# What the batched form no longer is.
_UNORDERED = {"indices_are_sorted": False, "unique_indices": False}


def _is_odd(op: Op) -> bool:
    """Return whether an op has an empty operand, or output."""
    return any(0 in s.shape for s in (*op.in_specs, *op.specs))


def _bind(merge: Merge, operands: Sequence[Stack], out: tuple[int, ...]) -> Stack:
    """Evaluate the wide op on operands that changed size or dtype."""
    wide = merge.wide
    ins = [jax.ShapeDtypeStruct(x.shape, x.array.dtype) for x in operands]
    op = wide.at(ins, [spec_at(wide.specs[0], out)], wide.params)
    return merge.bind(operands, op)[0]


def _in_range(ids: Stack, limits: np.ndarray, is_clip: bool) -> Stack:
    """Return int32 indices that are in ``0 .. limit``, or -1 if they are not to clip.

    Args:
        ids: ``[..., K]``; compared in their own dtype, which may be small or unsigned.
        limits: ``[R, K]``, the largest index of each row.
        is_clip: whether to clamp them.
    """
    by_row = bool((limits != limits[0]).any())
    top = np.minimum(limits if by_row else limits[:1], jnp.iinfo(ids.array.dtype).max)
    top = top.reshape(len(top), *(1,) * (len(ids.shape) - 1), *limits.shape[1:])
    array = ids.array if ids.is_stacked or not by_row else ids.array[None]
    top = jnp.asarray(top if ids.is_stacked or by_row else top[0], ids.array.dtype)
    if is_clip:
        array = jnp.maximum(jnp.minimum(array, top), 0).astype(np.int32)
    else:
        keep = (array >= 0) & (array <= top)
        array = jnp.where(keep, array.astype(np.int32), np.int32(-1))
    return replace(ids, array=array, is_stacked=ids.is_stacked or by_row)


# Slices at one place


def _dynamic_form(op: Op) -> Hashable | None:
    return None if _is_odd(op) else ()


def _slice_params(ops: Sequence[Op], ins: Any, outs: Any) -> dict[str, Any]:
    return {**ops[0].params, "slice_sizes": outs[0]}


def _placed(
    merge: Merge, operands: Sequence[Stack], window_fn: Callable[[Op], Any]
) -> tuple[Stack, list[Stack]]:
    """Return an operand with room for the widest window anywhere, and clamped starts.

    With that room JAX's own clamping changes no start: each is clamped to what the
    row's own operand and window leave.
    """
    x, *starts = operands
    windows = merge.per_row(window_fn)
    limits = x.sizes - windows
    width = windows.max(0)
    shape = np.maximum(x.shape, limits.max(0) + width)
    if not (limits == shape - width).all():
        starts = [
            _in_range(s, limits[:, a], is_clip=True) for a, s in enumerate(starts)
        ]
    return _grown(x, shape.tolist()), starts


def _grown(x: Stack, shape: Sequence[int]) -> Stack:
    """Return a stack with more zeros at the ends of its axes."""
    if tuple(shape) == x.shape:
        return x
    more = [(0, n - m) for n, m in zip(shape, x.shape, strict=True)]
    return replace(x, array=jnp.pad(x.array, [(0, 0)] * x.is_stacked + more))


def _dynamic_slice(rule: Rule, merge: Merge, operands: Sequence[Stack]) -> list[Stack]:
    """Read the widest window; only what spans its axis ends where the data does."""
    out = merge.wide.specs[0].shape
    x, starts = _placed(merge, operands, lambda op: op.specs[0].shape)
    y = _bind(merge, [x, *starts], out)
    clean = [
        a
        for a in range(len(out))
        if x.is_zero_padded(a)
        and ((y.sizes[:, a] == x.sizes[:, a]) | (y.sizes[:, a] == out[a])).all()
    ]
    return [merge.output(0, y.array, y.is_stacked, clean)]


def _dynamic_update_slice(
    rule: Rule, merge: Merge, operands: Sequence[Stack]
) -> list[Stack]:
    """Write each row's own window; what spans its axis may write on in the padding."""
    shape, update = operands[0].shape, operands[1]
    x, starts = _placed(
        merge, [operands[0], *operands[2:]], lambda op: op.in_specs[1].shape
    )
    sizes = update.sizes
    cut = [
        a
        for a, width in enumerate(update.shape)
        if not ((sizes[:, a] == width) | (sizes[:, a] == x.sizes[:, a])).all()
    ]
    if cut:
        update = _over(x, update, starts, cut)
    y = _bind(merge, [x, update, *starts], x.shape)
    array = y.array
    if x.shape != shape:
        lead = (slice(None),) * y.is_stacked
        array = array[(*lead, *map(slice, shape))]
    clean = [
        a
        for a in range(len(shape))
        if x.is_zero_padded(a) and (a in cut or update.is_zero_padded(a))
    ]
    return [merge.output(0, array, y.is_stacked, clean)]


def _over(x: Stack, update: Stack, starts: Sequence[Stack], cut: Axes) -> Stack:
    """Return an update whose padding along some axes is what stands there now."""
    x, update, *starts = map(to_stacked, (x, update, *starts))
    here = jax.vmap(partial(lax.dynamic_slice_p.bind, slice_sizes=update.shape))(
        x.array, *(s.array for s in starts)
    )
    keep = reduce(lax.bitwise_and, [inside(update, a)[0] for a in cut])
    return replace(update, array=jnp.where(keep, update.array, here))


# Many places


def _numbers(dimension_numbers: Any) -> Hashable:
    return tuple(tuple(map(int, axes)) for axes in dimension_numbers)


def _window_form(shape: Any, windows: Any, fixed: Any, indexed: Any) -> Hashable:
    """Return each axis's window size; None where it spans the axis."""
    return tuple(
        None
        if size == n and a not in fixed and not (size == 1 and a in indexed)
        else int(size)
        for a, (n, size) in enumerate(zip(shape, windows, strict=True))
    )


def _gather_form(op: Op) -> Hashable | None:
    numbers, mode = op.params["dimension_numbers"], op.params["mode"]
    if _is_odd(op) or mode not in (_CLIP, _FILL_OR_DROP, _PROMISE):
        return None
    windows = _window_form(
        op.in_specs[0].shape,
        op.params["slice_sizes"],
        (*numbers.collapsed_slice_dims, *numbers.operand_batching_dims),
        numbers.start_index_map,
    )
    fill = repr(op.params["fill_value"]) if mode == _FILL_OR_DROP else None
    return _numbers(numbers), fill, windows


def _gather_params(ops: Sequence[Op], ins: Any, outs: Any) -> dict[str, Any]:
    sizes = zip(*(op.params["slice_sizes"] for op in ops), strict=True)
    return {**ops[0].params, **_UNORDERED, "slice_sizes": tuple(map(max, sizes))}


def _gather_limits(op: Op) -> np.ndarray:
    axes = [int(a) for a in op.params["dimension_numbers"].start_index_map]
    room = np.subtract(op.in_specs[0].shape, op.params["slice_sizes"])
    return room[axes]


def _gather(rule: Rule, merge: Merge, operands: Sequence[Stack]) -> list[Stack]:
    """Read in range, or fill.

    Windows read the operand's padding as theirs; a filled one is filled all over.
    """
    (x, ids), wide = operands, merge.wide
    limits, mode = merge.per_row(_gather_limits), wide.params["mode"]
    if (limits != _gather_limits(wide)).any():
        ids = _in_range(ids, limits, is_clip=mode != _FILL_OR_DROP)
    y = _bind(merge, [x, ids], wide.specs[0].shape)
    fill = wide.params["fill_value"]
    is_pure = mode != _FILL_OR_DROP or (fill is not None and not fill)
    clean = [a for a, b in _gather_axes(wide) if is_pure and x.is_zero_padded(b)]
    return [merge.output(0, y.array, y.is_stacked, clean)]


def _gather_axes(op: Op) -> list[tuple[int, int]]:
    """Return the output's axes that are axes of the operand, with those."""
    numbers = op.params["dimension_numbers"]
    gone = (*numbers.collapsed_slice_dims, *numbers.operand_batching_dims)
    windows = [a for a in range(len(op.in_specs[0].shape)) if a not in gone]
    batch = [a for a in range(len(op.specs[0].shape)) if a not in numbers.offset_dims]
    return [
        *zip(numbers.offset_dims, windows, strict=True),
        *zip(
            (batch[a] for a in numbers.start_indices_batching_dims),
            numbers.operand_batching_dims,
            strict=True,
        ),
    ]


def _scatter_axes(op: Op) -> dict[int, int]:
    """Return the operand's axes that windows span, each with the updates' axis."""
    numbers = op.params["dimension_numbers"]
    gone = (*numbers.inserted_window_dims, *numbers.operand_batching_dims)
    windows = [a for a in range(len(op.in_specs[0].shape)) if a not in gone]
    return dict(zip(windows, numbers.update_window_dims, strict=True))


def _scatter_windows(op: Op) -> list[int]:
    axes, updates = _scatter_axes(op), op.in_specs[2].shape
    return [
        updates[axes[a]] if a in axes else 1 for a in range(len(op.in_specs[0].shape))
    ]


def _scatter_limits(op: Op) -> np.ndarray:
    axes = op.params["dimension_numbers"].scatter_dims_to_operand_dims
    room = np.subtract(op.in_specs[0].shape, _scatter_windows(op))
    return room[[int(a) for a in axes]]


def _scatter_form(op: Op) -> Hashable | None:
    numbers, mode = op.params["dimension_numbers"], op.params["mode"]
    axes = numbers.scatter_dims_to_operand_dims
    # `x.at[i].apply(f)` is a scatter with a body of its own.
    is_apply = op.name == "scatter" and op.params["update_jaxpr"] is not None
    if _is_odd(op) or is_apply or op.params["update_consts"] or not axes:
        return None
    if mode not in (_CLIP, _FILL_OR_DROP, _PROMISE):
        return None
    windows, spans = _scatter_windows(op), _scatter_axes(op)
    fixed = [a for a in range(len(windows)) if a not in spans]
    form = _window_form(op.in_specs[0].shape, windows, fixed, axes)
    return _numbers(numbers), mode == _CLIP, form


def _scatter_params(ops: Sequence[Op], ins: Any, outs: Any) -> dict[str, Any]:
    # Clamping comes before, so that what must not be written can be dropped.
    return {**ops[0].params, **_UNORDERED, "mode": _FILL_OR_DROP}


def _scatter(rule: Rule, merge: Merge, operands: Sequence[Stack]) -> list[Stack]:
    """Write in range, drop the rest and all that padding asks for.

    A window that spans its axis writes its padding into the operand's.
    """
    x, ids, updates = operands
    is_clip = merge.ops[0].params["mode"] == _CLIP
    ids = _in_range(ids, merge.per_row(_scatter_limits), is_clip)
    ids = mask(ids, range(len(ids.shape) - 1), -1)
    y = _bind(merge, [x, ids, updates], x.shape)
    spans = _scatter_axes(merge.wide)
    clean = [
        a
        for a in range(len(x.shape))
        if x.is_zero_padded(a) and (a not in spans or updates.is_zero_padded(spans[a]))
    ]
    return [merge.output(0, y.array, y.is_stacked, clean)]


_SCATTER = Rule(form=_scatter_form, params=_scatter_params, apply=_scatter)

RULES: dict[str, Rule] = {
    "dynamic_slice": Rule(
        form=_dynamic_form, params=_slice_params, apply=_dynamic_slice
    ),
    "dynamic_update_slice": Rule(form=_dynamic_form, apply=_dynamic_update_slice),
    "gather": Rule(form=_gather_form, params=_gather_params, apply=_gather),
    **{
        f"scatter{kind}": _SCATTER
        for kind in ("", "-add", "-sub", "-mul", "-min", "-max")
    },
}
