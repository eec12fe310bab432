"""Moves whose places differ from row to row: by an index, computed ahead.

Where a shape decides what goes where (a head's features, a gate's units), members of
unlike shapes cannot share one reshape, split or slice. They can share one gather: every
row takes its elements from where its own shape puts them.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from stfuse._rules._base import Merge, Stack

Sizes = Sequence[int]


def take(x: Any, is_stacked: bool, axis: int, index: np.ndarray) -> tuple[Any, bool]:
    """Return what each row takes along one axis.

    Args:
        x: ``[R, *shape]`` or ``[*shape]``.
        is_stacked: which of them.
        axis: of one row.
        index: int ``[R, n]``, places on that axis.

    Returns:
        The array with ``n`` elements along the axis, and whether it has rows.
    """
    index = index.astype(np.int32)
    if (index == index[:1]).all():
        return jnp.take(x, index[0], axis=axis + is_stacked, mode="clip"), is_stacked
    one = jax.vmap(
        lambda row, own: jnp.take(row, own, axis=axis, mode="clip"),
        in_axes=(0 if is_stacked else None, 0),
    )
    return one(x, index), True


def span(merge: Merge, starts: Sizes, counts: Sizes, step: int, n: int) -> np.ndarray:
    """Return an index that takes a run from each member: int ``[R, n]``.

    Args:
        merge: the launch.
        starts: per member, where its run begins.
        counts: per member, how long it is.
        step: from one element to the next.
        n: the longest run; past a member's own end it repeats its last element.
    """
    rows = [
        start + step * np.minimum(np.arange(n), max(count - 1, 0))
        for start, count in zip(starts, counts, strict=True)
    ]
    return np.repeat(rows, merge.counts, axis=0)


def refold(
    merge: Merge, x: Stack, groups: Sequence[tuple[range, range]]
) -> tuple[Any, bool]:
    """Reshape members of unlike shapes, run of axes by run of axes.

    Args:
        merge: a launch of reshapes.
        x: its operand.
        groups: which axes of the operand become which axes of the output.

    Returns:
        The padded output, and whether it has rows.
    """
    array, is_stacked = x.array, x.is_stacked
    wide_in, wide_out = merge.wide.in_specs[0].shape, merge.wide.specs[0].shape
    for ins, outs in reversed(groups):  # the axes before stay where they are
        big, new = _sizes(wide_in, ins), _sizes(wide_out, outs)
        lead, tail = (
            array.shape[: ins.start + is_stacked],
            array.shape[ins.stop + is_stacked :],
        )
        array = array.reshape(*lead, math.prod(big), *tail)
        index = np.repeat(
            [
                _fold(
                    _sizes(op.in_specs[0].shape, ins),
                    big,
                    _sizes(op.specs[0].shape, outs),
                    new,
                )
                for op in merge.ops
            ],
            merge.counts,
            axis=0,
        )
        if (
            index.shape[1] != math.prod(big)
            or (index != np.arange(math.prod(big))).any()
        ):
            array, stacked = take(array, is_stacked, ins.start, index)
            if stacked and not is_stacked:
                lead, is_stacked = (array.shape[0], *lead), True
        array = array.reshape(*lead, *new, *tail)
    return array, is_stacked


def _sizes(shape: Sizes, axes: range) -> tuple[int, ...]:
    return tuple(shape[a] for a in axes)


def _fold(ins: Sizes, wide_in: Sizes, outs: Sizes, wide_out: Sizes) -> np.ndarray:
    """Return, per place of a padded output, its place in the padded operand."""
    flat = np.arange(math.prod(ins))
    index = np.zeros(math.prod(wide_out), int)
    at = _ravel(np.unravel_index(flat, ins), wide_in) if len(ins) else 0 * flat
    to = _ravel(np.unravel_index(flat, outs), wide_out) if len(outs) else 0 * flat
    index[to] = at
    return index


def _ravel(places: Any, shape: Sizes) -> np.ndarray:
    return np.ravel_multi_index(places, shape)
