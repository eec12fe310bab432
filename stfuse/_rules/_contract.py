"""Products and convolutions: what is contracted is masked, on both sides.

Zero in the padding of one operand is not enough, since the other's may hold anything
and 0 x Inf is NaN. For the same reason outputs are never clean.
"""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from stfuse._fingerprint import params_form
from stfuse._program import Op
from stfuse._rules._base import Fills, Merge, Rule, Stack, mask, to_stacked

Ints = Sequence[int]


def _dot_form(op: Op) -> Hashable:
    dims = jax.tree.map(int, op.params["dimension_numbers"])
    return params_form({**op.params, "dimension_numbers": dims})


def _dot_fills(op: Op) -> Fills:
    contracted, _ = op.params["dimension_numbers"]
    return {i: dict.fromkeys(axes, 0) for i, axes in enumerate(contracted)}


def high_pads(
    sizes: Ints,
    windows: Ints,
    outs: Ints,
    strides: Ints,
    lows: Ints,
    base_dilation: Ints,
    window_dilation: Ints,
) -> tuple[int, ...]:
    """Return the padding at the end that gives windows a wanted output shape.

    Strides leave a choice: the one nearest to zero is taken, so that VALID stays so.
    All arguments are per axis.

    Args:
        sizes: of what the windows slide over.
        windows: their sizes.
        outs: how many places they take.
        strides: between places.
        lows: padding at the start.
        base_dilation: of what they slide over.
        window_dilation: of the windows.

    Returns:
        Padding at the end; negative where the end is cut off.
    """
    highs = []
    for i, stride in enumerate(strides):
        window = _dilated(windows[i], window_dilation[i])
        reach = (outs[i] - 1) * stride + window
        least = reach - lows[i] - _dilated(sizes[i], base_dilation[i])
        highs.append(min(max(least, 0), least + stride - 1))
    return tuple(highs)


def _dilated(size: int, dilation: int) -> int:
    return (size - 1) * dilation + 1 if size else 0


def is_pointwise(
    window: int, stride: int, base_dilation: int, pads: Sequence[int]
) -> bool:
    """Return whether windows along an axis see each value, and nothing else."""
    return window == stride == base_dilation == 1 and tuple(pads) == (0, 0)


def _kernel(op: Op) -> tuple[int, ...]:
    """Return the spatial shape of a convolution's kernel."""
    spec = op.params["dimension_numbers"].rhs_spec
    return tuple(op.in_specs[1].shape[a] for a in spec[2:])


def _conv_form(op: Op) -> Hashable | None:
    p, kernel = op.params, _kernel(op)
    if p["batch_group_count"] != 1 or 0 in kernel:
        return None
    own: dict[str, Any] = {
        name: jax.tree.map(int, tuple(p[name]))
        for name in "dimension_numbers window_strides lhs_dilation rhs_dilation".split()
    }
    num_groups = int(p["feature_group_count"])
    groups: Hashable = ()  # channels and kernel sizes may differ
    if num_groups > 1:  # the number of groups may differ
        out_axis, in_axis = p["dimension_numbers"].rhs_spec[:2]
        shape = op.in_specs[1].shape
        groups = (shape[in_axis], shape[out_axis] // num_groups, kernel)
    own["feature_group_count"] = groups
    own["padding"] = tuple(int(low) for low, _ in p["padding"])
    return params_form({**p, **own})


def _conv_params(ops: Sequence[Op], ins: Any, outs: Any) -> dict[str, Any]:
    p = ops[0].params
    lhs_spec, rhs_spec, out_spec = p["dimension_numbers"]
    lows = [low for low, _ in p["padding"]]
    highs = high_pads(
        [ins[0][a] for a in lhs_spec[2:]],
        [ins[1][a] for a in rhs_spec[2:]],
        [outs[0][a] for a in out_spec[2:]],
        p["window_strides"],
        lows,
        p["lhs_dilation"],
        p["rhs_dilation"],
    )
    groups = p["feature_group_count"]
    if groups > 1:
        groups = ins[0][lhs_spec[1]] // ins[1][rhs_spec[1]]
    padding = tuple(zip(lows, highs, strict=True))
    return {**p, "padding": padding, "feature_group_count": groups}


def _slid_axes(op: Op) -> set[int]:
    """Return the axes of the lhs along which the kernel sees more than one place."""
    p = op.params
    lhs_axes = p["dimension_numbers"].lhs_spec[2:]
    ways = zip(
        _kernel(op), p["window_strides"], p["lhs_dilation"], p["padding"], strict=True
    )
    return {a for a, way in zip(lhs_axes, ways, strict=True) if not is_pointwise(*way)}


def _conv(rule: Rule, merge: Merge, operands: Sequence[Stack]) -> list[Stack]:
    lhs_spec, rhs_spec, _ = merge.wide.params["dimension_numbers"]
    slid = set().union(*map(_slid_axes, merge.ops))
    lhs = mask(operands[0], [lhs_spec[1], *sorted(slid)])
    rhs = mask(operands[1], rhs_spec[1:])
    if all(rhs.is_full(a) for a in rhs_spec[2:]):
        return merge.bind([lhs, rhs])
    return _conv_by_patches(merge, to_stacked(lhs), to_stacked(rhs))


def _conv_by_patches(merge: Merge, lhs: Stack, rhs: Stack) -> list[Stack]:
    """Convolve rows whose kernels differ in size, as a product of patches.

    A kernel padded with zeros would multiply a job's own Inf by them, at places where
    its own kernel never sees it. Patches can be masked as the kernel is.
    """
    p = merge.wide.params
    lhs_spec, rhs_spec, out_spec = p["dimension_numbers"]
    x, w = _permuted(lhs, lhs_spec), _permuted(rhs, rhs_spec)
    dilations = zip(p["padding"], p["lhs_dilation"], strict=True)
    pads = [(0, 0, 0)] * 3 + [(low, high, d - 1) for (low, high), d in dilations]
    array = lax.pad(x.array, np.zeros((), x.array.dtype), pads)
    shape = [merge.wide.specs[0].shape[a] for a in out_spec]
    for i, (num_taps, num_places) in enumerate(
        zip(w.shape[2:], shape[2:], strict=True)
    ):
        taps = np.arange(num_taps) * p["rhs_dilation"][i]
        places = np.arange(num_places) * p["window_strides"][i]
        array = jnp.take(array, taps[:, None] + places, axis=3 + 2 * i, mode="clip")
    # [R, N, C, taps, places, taps, places, ..], the two of each spatial axis adjacent.
    sizes = np.repeat([array.shape[1:]], len(x.sizes), axis=0)
    taps = range(2, len(array.shape) - 1, 2)
    sizes[:, list(taps)] = w.sizes[:, 2:]
    patches = mask(Stack(array, True, sizes, (False,) * sizes.shape[1]), taps)
    y = lax.dot_general(
        patches.array,
        w.array,
        (((2, *(1 + a for a in taps)), tuple(range(2, w.array.ndim))), ((0,), (0,))),
        precision=p["precision"],
        preferred_element_type=p["preferred_element_type"],
    )
    y = jnp.moveaxis(y, -1, 2).transpose(0, *(1 + np.argsort(out_spec)))
    return [merge.output(0, y, True)]


def _permuted(x: Stack, axes: Ints) -> Stack:
    """Return a stack with its axes in another order."""
    return Stack(
        x.array.transpose(0, *(1 + a for a in axes)),
        x.is_stacked,
        x.sizes[:, list(axes)],
        tuple(x.clean[a] for a in axes),
    )


RULES: dict[str, Rule] = {
    "dot_general": Rule(form=_dot_form, fills=_dot_fills),
    "conv_general_dilated": Rule(form=_conv_form, params=_conv_params, apply=_conv),
}
