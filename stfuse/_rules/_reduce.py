"""Reductions, scans along an axis, orders and windows.

Padding becomes the neutral element where it is reduced. An order is another matter:
nothing that a job may hold is surely last, so padding sorts by a key of its own.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Sequence
from dataclasses import replace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from stfuse._fingerprint import params_form
from stfuse._program import Op
from stfuse._rules._base import (
    Axes,
    Fills,
    Merge,
    Rule,
    Stack,
    inside,
    mapped,
    mask,
    spec_at,
    to_stacked,
)
from stfuse._rules._contract import high_pads, is_pointwise


def lowest(dtype: Any) -> Any:
    """Return what every value of a type is at least."""
    if jnp.issubdtype(dtype, np.bool_):
        return False
    if jnp.issubdtype(dtype, np.integer):
        return int(jnp.iinfo(dtype).min)
    return -np.inf if _has_inf(dtype) else float(jnp.finfo(dtype).min)


def highest(dtype: Any) -> Any:
    """Return what every value of a type is at most."""
    if jnp.issubdtype(dtype, np.bool_):
        return True
    if jnp.issubdtype(dtype, np.integer):
        return int(jnp.iinfo(dtype).max)
    return np.inf if _has_inf(dtype) else float(jnp.finfo(dtype).max)


def _has_inf(dtype: Any) -> bool:
    return bool(np.isinf(np.asarray(np.inf).astype(dtype)))


def _zero(dtype: Any) -> Any:
    return 0


def _one(dtype: Any) -> Any:
    return 1


def _all_bits(dtype: Any) -> Any:
    is_signed = jnp.issubdtype(dtype, np.signedinteger)
    return -1 if is_signed else highest(dtype)


_NEUTRAL = {
    "argmax": lowest,
    "argmin": highest,
    "cumlogsumexp": lowest,
    "cummax": lowest,
    "cummin": highest,
    "cumprod": _one,
    "cumsum": _zero,
    "reduce_and": _all_bits,
    "reduce_max": lowest,
    "reduce_min": highest,
    "reduce_or": _zero,
    "reduce_prod": _one,
    "reduce_sum": _zero,
    "reduce_window_max": lowest,
    "reduce_window_min": highest,
    "reduce_window_sum": _zero,
    "reduce_xor": _zero,
}


def _has_neutral(op: Op) -> bool:
    """Return whether the type is ordered, or needs not be."""
    is_complex = jnp.issubdtype(op.in_specs[0].dtype, np.complexfloating)
    return not is_complex or _NEUTRAL[op.name] in (_zero, _one)


def _plain_params(op: Op) -> Hashable:
    """Return all of an op's parameters, axes as plain integers."""
    names = op.params.keys() & {"axes", "axis", "dimension"}
    own = {name: jax.tree.map(int, op.params[name]) for name in names}
    return params_form({**op.params, **own})


def _form(op: Op) -> Hashable | None:
    return _plain_params(op) if _has_neutral(op) else None


def _reduce_fills(op: Op) -> Fills:
    fill = _NEUTRAL[op.name](op.in_specs[0].dtype)
    return {0: dict.fromkeys(op.params["axes"], fill)}


def _scan_fills(op: Op) -> Fills:
    """Padding comes first if the axis is walked from its end, else nobody sees it."""
    if not op.params["reverse"]:
        return {}
    return {0: {op.params["axis"]: _NEUTRAL[op.name](op.in_specs[0].dtype)}}


def _sort_clean(op: Op, operands: Sequence[Stack]) -> Sequence[Axes]:
    """Values move along one axis, padding stays last on it."""
    return [[a for a in range(len(x.shape)) if x.is_zero_padded(a)] for x in operands]


def _sort(rule: Rule, merge: Merge, operands: Sequence[Stack]) -> list[Stack]:
    """Sort by "is padding" first: a job's own NaN sorts last and is still its own."""
    p, x = merge.wide.params, operands[0]
    axis = p["dimension"]
    if x.is_full(axis):
        return mapped(rule, merge, operands)
    arrays = [to_stacked(x).array for x in operands]
    is_padding = jnp.broadcast_to(~inside(x, axis)[0], arrays[0].shape)
    _, *outs = lax.sort(
        (is_padding, *arrays),
        dimension=axis + 1,
        is_stable=p["is_stable"],
        num_keys=p["num_keys"] + 1,
    )
    axes = rule.clean(merge.wide, operands)
    return [merge.output(i, y, True, axes[i]) for i, y in enumerate(outs)]


def _top_k_form(op: Op) -> Hashable | None:
    dtype = op.in_specs[0].dtype
    if jnp.issubdtype(dtype, np.floating) and dtype.itemsize == 1:
        return None  # no common order of their bits
    axis = int(op.params["axis"])
    return params_form({**op.params, "axis": axis, "k": None, "is_stable": None})


def _top_k_params(ops: Sequence[Op], ins: Any, outs: Any) -> dict[str, Any]:
    p = ops[0].params
    # A stable order is one that an unstable member may get; jax < 0.11 has no other.
    order = {"is_stable": True} if "is_stable" in p else {}
    return {**p, **order, "k": outs[0][p["axis"]]}


def _top_k_clean(op: Op, operands: Sequence[Stack]) -> Sequence[Axes]:
    """Along the ordered axis, a row with a smaller k holds true values in padding."""
    (x,) = operands
    axes = range(len(x.shape))
    return [a for a in axes if a != op.params["axis"] and x.is_zero_padded(a)], ()


def _top_k(rule: Rule, merge: Merge, operands: Sequence[Stack]) -> list[Stack]:
    """Order keys of which padding has the least: the first of equals wins, never it.

    `jax.lax.top_k` orders floats totally, by sign and bits: -NaN is below -Inf. Where
    padding would need a NaN of its own, it takes an integer.
    """
    (x,), wide = operands, merge.wide
    axis = wide.params["axis"]
    if x.is_full(axis):
        return mapped(rule, merge, operands)
    keys = replace(x, array=_sortable(x.array))
    spec = jax.ShapeDtypeStruct(x.shape, keys.array.dtype)
    by_key = wide.at(
        (spec,), (spec_at(spec, wide.specs[0].shape), wide.specs[1]), wide.params
    )
    _, places = merge.bind([mask(keys, [axis], lowest(spec.dtype))], by_key)
    array = to_stacked(x).array if places.is_stacked else x.array
    values = jnp.take_along_axis(
        array, places.array, axis + places.is_stacked, mode="clip"
    )
    axes, _ = rule.clean(wide, operands)
    return [merge.output(0, values, places.is_stacked, axes), places]


def _sortable(array: Any) -> Any:
    """Return integers in the total order of a float array."""
    if not jnp.issubdtype(array.dtype, np.floating):
        return array
    bits = lax.bitcast_convert_type(array, np.dtype(f"int{8 * array.dtype.itemsize}"))
    return jnp.where(bits < 0, bits ^ jnp.iinfo(bits.dtype).max, bits)


# A max pool's derivative, of ``(cotangents, what the windows slid over)``. Its forward
# twin, select_and_gather_add, has no rule: it skips what lies outside, where a masked
# value takes the place of a NaN that came before it.
_BACKWARD = "select_and_scatter_add"
_SELECTS = {"ge": lowest, "le": highest}


def _window_fill(op: Op) -> Callable[[Any], Any] | None:
    """Return what wins or adds nothing in no window; None if unknown."""
    if op.name == _BACKWARD:
        return _SELECTS.get(op.params["select_prim"].name)
    return _NEUTRAL[op.name] if _has_neutral(op) else None


def _window_form(op: Op) -> Hashable | None:
    p = op.params
    if _window_fill(op) is None or 0 in p["window_dimensions"]:
        return None
    names = [n for n in p if n.endswith(("_dimensions", "_strides", "_dilation"))]
    own: dict[str, Any] = {n: jax.tree.map(int, tuple(p[n])) for n in names}
    own["padding"] = tuple(int(low) for low, _ in p["padding"])
    return params_form({**p, **own})


def _window_params(ops: Sequence[Op], ins: Any, outs: Any) -> dict[str, Any]:
    p = ops[0].params
    ones = (1,) * len(p["window_dimensions"])
    lows = [low for low, _ in p["padding"]]
    places, slid = ins if ops[0].name == _BACKWARD else (outs[0], ins[0])
    highs = high_pads(
        slid,
        p["window_dimensions"],
        places,
        p["window_strides"],
        lows,
        p.get("base_dilation", ones),
        p.get("window_dilation", ones),
    )
    return {**p, "padding": tuple(zip(lows, highs, strict=True))}


def _slid_axes(op: Op) -> set[int]:
    """Return the axes along which a window sees more than one place."""
    p = op.params
    windows, strides = p["window_dimensions"], p["window_strides"]
    dilations = p.get("base_dilation", (1,) * len(windows))
    ways = zip(windows, strides, dilations, p["padding"], strict=True)
    return {axis for axis, way in enumerate(ways) if not is_pointwise(*way)}


def _windowed(rule: Rule, merge: Merge, operands: Sequence[Stack]) -> list[Stack]:
    axes = sorted(set().union(*map(_slid_axes, merge.ops)))
    fill_fn = _window_fill(merge.wide) or _zero
    *cotangents, x = operands
    x = mask(x, axes, fill_fn(merge.wide.in_specs[-1].dtype))
    return merge.bind([*(mask(g, axes) for g in cotangents), x])


_REDUCTIONS = (
    "argmax argmin reduce_and reduce_max reduce_min reduce_or reduce_prod reduce_sum "
    "reduce_xor"
).split()
_WINDOWS = ("reduce_window_max", "reduce_window_min", "reduce_window_sum", _BACKWARD)
_SCANS = "cumlogsumexp cummax cummin cumprod cumsum".split()

RULES: dict[str, Rule] = {
    **{name: Rule(form=_form, fills=_reduce_fills) for name in _REDUCTIONS},
    **{name: Rule(form=_form, fills=_scan_fills) for name in _SCANS},
    **{
        name: Rule(form=_window_form, params=_window_params, apply=_windowed)
        for name in _WINDOWS
    },
    "sort": Rule(form=_plain_params, clean=_sort_clean, apply=_sort),
    "top_k": Rule(
        form=_top_k_form, params=_top_k_params, clean=_top_k_clean, apply=_top_k
    ),
}
