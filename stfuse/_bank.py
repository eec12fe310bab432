"""Parameter bank: slots, shared leaves, pack, swap, grow.

A species' parameters are one array per leaf: ``[capacity, ...]``, a slot per job; or
``[...]``, kept once, when every job has the same. A shared leaf is used unbatched, so
its layers become one large launch over everybody's rows. Which leaves are shared is
part of a step's signature: an array's rank says it.

Laws (tested): reading a slot after `write` gives what was written, bitwise; `write`
changes no other slot; `grow` and `unshare` change no slot.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from stfuse import _tree
from stfuse._step import is_leaf_stacked

Leaves = tuple[Any, ...]
Specs = Sequence[jax.ShapeDtypeStruct]


class Bank(NamedTuple):
    """Parameters of a fused step, a pytree of device arrays.

    Attributes:
        stacks: per species, per leaf in trace order, ``[capacity, ...]`` or, if all
            jobs share it, ``[...]``.
    """

    stacks: tuple[Leaves, ...]


def pack(members: Sequence[Sequence[Any]], specs: Specs, capacity: int) -> Leaves:
    """Stack the parameters of a species.

    Args:
        members: per job, its leaves in trace order; jobs take slots 0, 1, ....
        specs: shape and dtype of each leaf.
        capacity: number of slots, at least the number of jobs; the rest is zero.

    Returns:
        One array per leaf.
    """
    return tuple(
        _as_leaf(column[0], spec)
        if is_shared(column, capacity)
        else _stack(column, spec, capacity)
        for column, spec in zip(zip(*members, strict=True), specs, strict=True)
    )


def alias(
    names: Sequence[Sequence[str]], columns: Sequence[Sequence[Sequence[Any]]]
) -> tuple[int, ...]:
    """Return which stack each species reads: one for the same leaves of the same jobs.

    Args:
        names: per species, its jobs.
        columns: per species, per job, its leaves.

    Returns:
        Stack numbers 0, 1, ... in order of their first species.
    """
    numbers: dict[tuple[Any, ...], int] = {}
    keys = [
        (tuple(jobs), tuple(tuple(map(id, leaves)) for leaves in species))
        for jobs, species in zip(names, columns, strict=True)
    ]
    return tuple(numbers.setdefault(key, len(numbers)) for key in keys)


def is_shared(column: Sequence[Any], capacity: int) -> bool:
    """Return whether one leaf of all jobs is kept once.

    Equal objects are; equal bytes are too, unless they repeat one value: a fresh bias
    or adapter is equal by accident and is about to differ. With one slot there is
    nobody to share with, and the leaf stands without a slot axis.
    """
    first = column[0]
    if capacity == 1 or len(column) == 1:
        return capacity == 1
    if all(leaf is first for leaf in column):
        return True
    if any(_tree.is_tracer(x) for x in column):
        return False
    return all(_tree.same_bytes(first, x) for x in column[1:]) and not (
        _tree.is_one_value(first)
    )


def fits_shared(leaves: Leaves, specs: Specs, new: Sequence[Any]) -> bool:
    """Return whether every shared leaf equals the one that a job brings."""
    return all(
        is_leaf_stacked(leaf, spec)
        or not (_tree.is_tracer(leaf) or _tree.is_tracer(x))
        and _tree.same_bytes(leaf, _as(x, spec))
        for leaf, spec, x in zip(leaves, specs, new, strict=True)
    )


def unshare(leaves: Leaves, specs: Specs, capacity: int, new: Sequence[Any]) -> Leaves:
    """Give slots to every shared leaf that differs from the one a job brings."""
    return tuple(
        leaf
        if is_leaf_stacked(leaf, spec) or fits_shared((leaf,), (spec,), (x,))
        else jnp.broadcast_to(leaf, (capacity, *leaf.shape))
        for leaf, spec, x in zip(leaves, specs, new, strict=True)
    )


def write(
    leaves: Leaves, specs: Specs, slot: int, new: Sequence[Any], *, donate: bool = False
) -> Leaves:
    """Return a species' leaves with one slot replaced; shared leaves stay.

    Args:
        leaves: the stacks; consumed if donated, so that nothing is copied.
        specs: shape and dtype of each leaf.
        slot: which slot.
        new: the job's leaves.
        donate: whether to reuse the stacks' memory.

    Returns:
        The new leaves. One compile serves every slot.
    """
    places = [
        i
        for i, (leaf, spec) in enumerate(zip(leaves, specs, strict=True))
        if is_leaf_stacked(leaf, spec)
    ]
    if not places:
        return leaves
    put = _write_donating if donate else _write
    stacks = put(
        [leaves[i] for i in places], [_as(new[i], specs[i]) for i in places], slot
    )
    out = list(leaves)
    for i, stack in zip(places, stacks, strict=True):
        out[i] = stack
    return tuple(out)


def grow(leaves: Leaves, specs: Specs, capacity: int) -> Leaves:
    """Return the leaves with room for more slots, the new ones zero."""

    def widen(leaf: Any) -> Any:
        return jnp.concatenate(
            [leaf, jnp.zeros((capacity - leaf.shape[0], *leaf.shape[1:]), leaf.dtype)]
        )

    return tuple(
        widen(leaf) if is_leaf_stacked(leaf, spec) else leaf
        for leaf, spec in zip(leaves, specs, strict=True)
    )


def read(leaves: Leaves, specs: Specs, slot: int) -> Leaves:
    """Return the leaves of one slot."""
    return tuple(
        leaf[slot] if is_leaf_stacked(leaf, spec) else leaf
        for leaf, spec in zip(leaves, specs, strict=True)
    )


def _update(stacks: list[Any], new: list[Any], slot: Any) -> list[Any]:
    update = jax.lax.dynamic_update_index_in_dim
    return [update(s, x, slot, 0) for s, x in zip(stacks, new, strict=True)]


_write = jax.jit(_update)
_write_donating = functools.partial(jax.jit, donate_argnums=0)(_update)


def _as(x: Any, spec: jax.ShapeDtypeStruct) -> Any:
    """Return a leaf in the dtype that the trace expects, on the host if it was."""
    if _tree.is_typed_key(x) or isinstance(x, jax.Array):
        return x
    return np.asarray(x, spec.dtype)


def _as_leaf(x: Any, spec: jax.ShapeDtypeStruct) -> Any:
    x = _as(x, spec)
    # On a CPU JAX may keep a NumPy array's own memory, which its owner can change.
    return jnp.array(x) if isinstance(x, np.ndarray) else jnp.asarray(x)


def _stack(column: Sequence[Any], spec: jax.ShapeDtypeStruct, capacity: int) -> Any:
    leaves = [_as(x, spec) for x in column]
    if all(isinstance(x, np.ndarray) for x in leaves):
        stack = np.zeros((capacity, *spec.shape), spec.dtype)
        np.stack(leaves, out=stack[: len(leaves)])
        return jax.device_put(stack)
    stack = jnp.stack([jnp.asarray(x) for x in leaves])
    return grow((stack,), (spec,), capacity)[0] if len(leaves) < capacity else stack
