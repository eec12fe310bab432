"""What a rule is, what it works on, and the two ways in which most rules work.

A `Stack` holds one value of several jobs in one array, each padded at the end of its
axes. Padding is finite or not, never observable: a rule masks what it contracts,
reduces, sorts or convolves over a padded axis, with ``where`` and the neutral element.
An axis is *clean* if its padding is zero by construction.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Hashable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from stfuse._program import Op

Axes = Iterable[int]
Fills = Mapping[int, Mapping[int, Any]]  # operand -> axis -> neutral element
# Evaluates an op on arrays ``[R, ...]`` where flagged, else as for one job; the outputs
# are ``[R, ...]`` if any operand was.
ComputeFn = Callable[[Op, Sequence[Any], Sequence[bool]], tuple[Any, ...]]


@dataclass(frozen=True, slots=True)
class Stack:
    """One value of several jobs.

    Attributes:
        array: ``[R, *shape]``, a row per job; or ``[*shape]`` if all rows are equal.
        is_stacked: whether it has the row axis.
        sizes: int ``[R, ndim]``, the true shape of each row's value.
        clean: per axis of one row, whether padding along it is zero.
    """

    array: Any
    is_stacked: bool
    sizes: np.ndarray
    clean: tuple[bool, ...]

    @property
    def shape(self) -> tuple[int, ...]:
        """The padded shape of one row."""
        return tuple(self.array.shape[self.is_stacked :])

    def is_full(self, axis: int) -> bool:
        """Return whether no row is padded along an axis."""
        return bool((self.sizes[:, axis] == self.shape[axis]).all())

    def is_zero_padded(self, axis: int) -> bool:
        """Return whether padding along an axis is zero, or not there."""
        return self.clean[axis] or self.is_full(axis)


@dataclass(frozen=True, slots=True)
class Merge:
    """One launch of several ops.

    Attributes:
        ops: per member (a species), its op.
        counts: per member, how many rows it has in every stack.
        wide: the op at the padded shapes.
        compute: how to evaluate an op over rows.
    """

    ops: tuple[Op, ...]
    counts: tuple[int, ...]
    wide: Op
    compute: ComputeFn = field(repr=False)

    def per_row(self, value_fn: Callable[[Op], Any]) -> np.ndarray:
        """Return ``[R, ...]``: what ``value_fn`` says of each row's op."""
        return np.repeat([value_fn(op) for op in self.ops], self.counts, axis=0)

    def bind(self, operands: Sequence[Stack], op: Op | None = None) -> list[Stack]:
        """Evaluate the wide op (or another one) over rows; nothing is clean."""
        flags = [x.is_stacked for x in operands]
        outs = self.compute(op or self.wide, [x.array for x in operands], flags)
        return [self.output(i, y, any(flags)) for i, y in enumerate(outs)]

    def output(self, i: int, array: Any, is_stacked: bool, clean: Axes = ()) -> Stack:
        """Return an array as the launch's output ``i``."""
        ndim = len(self.wide.specs[i].shape)
        sizes = self.per_row(lambda op: op.specs[i].shape)
        sizes = sizes.astype(int).reshape(sum(self.counts), ndim)
        held = frozenset(clean)
        return Stack(array, is_stacked, sizes, tuple(a in held for a in range(ndim)))


def _no_params(ops: Sequence[Op], ins: Any, outs: Any) -> dict[str, Any]:
    return ops[0].params


def _no_fills(op: Op) -> Fills:
    return {}


def _no_clean(op: Op, operands: Sequence[Stack]) -> Sequence[Axes]:
    return [()] * len(op.specs)


def mapped(rule: Rule, merge: Merge, operands: Sequence[Stack]) -> list[Stack]:
    """Mask what must be neutral, then map the primitive itself over rows."""
    operands = list(operands)
    for i, fills in rule.fills(merge.wide).items():
        for axis, fill in fills.items():
            operands[i] = mask(operands[i], [axis], fill)
    outs = merge.bind(operands)
    axes = rule.clean(merge.wide, operands)
    return [
        merge.output(i, y.array, y.is_stacked, clean)
        for i, (y, clean) in enumerate(zip(outs, axes, strict=True))
    ]


@dataclass(frozen=True, slots=True)
class Rule:
    """What padding does to a primitive.

    Attributes:
        form: op to a hashable form, over and above its name, dtypes and ranks: ops of
            equal forms may share a launch, padded to the largest in every axis. None:
            only with ops that equal it.
        params: ``(ops, in_shapes, out_shapes) -> params`` of the op at padded shapes.
        fills: per operand and axis, the neutral element that must stand in padding.
        clean: ``(wide op, operands)`` to the zero-padded axes of each output.
        apply: evaluates a launch; operands have the wide op's shapes.
    """

    form: Callable[[Op], Hashable | None]
    params: Callable[[Sequence[Op], Any, Any], dict[str, Any]] = _no_params
    fills: Callable[[Op], Fills] = _no_fills
    clean: Callable[[Op, Sequence[Stack]], Sequence[Axes]] = _no_clean
    apply: Callable[[Rule, Merge, Sequence[Stack]], list[Stack]] = mapped


def mask(x: Stack, axes: Axes, fill: Any = 0) -> Stack:
    """Return a stack whose padding along some axes is ``fill``.

    Costs nothing where there is no padding, or where it is zero and ``fill`` is.
    """
    is_zero = not np.any(np.asarray(fill, np.asarray(fill).dtype))
    axes = [a for a in axes if not (x.is_full(a) or (is_zero and x.clean[a]))]
    if not axes:
        return x
    masks = [inside(x, a) for a in axes]
    is_stacked = x.is_stacked or any(by_row for _, by_row in masks)
    keep = functools.reduce(jnp.logical_and, [here for here, _ in masks])
    array = x.array if x.is_stacked == is_stacked else x.array[None]
    keep = keep if is_stacked else keep[0]
    array = jnp.where(keep, array, jnp.asarray(fill, x.array.dtype))
    clean = tuple(
        is_zero and (c or a in axes) or x.is_full(a) for a, c in enumerate(x.clean)
    )
    return replace(x, array=array, is_stacked=is_stacked, clean=clean)


def inside(x: Stack, axis: int) -> tuple[Any, bool]:
    """Return what is true data along an axis, and whether that differs by row.

    Returns:
        bool ``[R or 1, 1, .., size, .., 1]``, and a flag.
    """
    sizes = x.sizes[:, axis]
    by_row = bool((sizes != sizes[0]).any())
    lead = (-1, *(1,) * len(x.shape))
    sizes = np.asarray(sizes if by_row else sizes[:1], np.int32).reshape(lead)
    shape = [1] * (len(x.shape) + 1)
    shape[axis + 1] = x.shape[axis]
    places = lax.broadcasted_iota(np.int32, tuple(shape), axis + 1)
    return places < sizes, by_row


def widest(shapes: Sequence[tuple[int, ...]]) -> tuple[int, ...]:
    """Return the elementwise maximum of some shapes of one rank."""
    return tuple(map(max, zip(*shapes, strict=True))) if shapes[0] else ()


def to_stacked(x: Stack) -> Stack:
    """Return a stack that has its row axis."""
    if x.is_stacked:
        return x
    array = jnp.broadcast_to(x.array, (len(x.sizes), *x.array.shape))
    return replace(x, array=array, is_stacked=True)


def spec_at(spec: jax.ShapeDtypeStruct, shape: tuple[int, ...]) -> Any:
    """Return a spec of another shape."""
    return jax.ShapeDtypeStruct(shape, spec.dtype)
