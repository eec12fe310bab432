"""Parameter bank: slots, shared leaves, pack, swap.

One array for each leaf, or for the leaves of several species that one launch reads:
``[rows, *padded]``, a row per slot, padded with zeros; or ``[...]``, kept once, when
every job has the same. A shared leaf is used unbatched, so its layers become one large
launch over everybody's rows. Which leaves are shared is part of a step's signature: an
array's rank says it.

Laws (tested): reading a slot after `write` gives what was written, bitwise; `write`
changes no other slot; `unshare` changes no slot; padding is zero.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Hashable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from stfuse import _tree
from stfuse._layout import Buffer, Layout

Leaves = Sequence[Any]


class Bank(NamedTuple):
    """Parameters of a fused step, a pytree of device arrays.

    Attributes:
        stacks: per array of the layout ``[rows, *padded]``; ``[...]`` if all jobs
            share it; ``[n, rows, *padded]`` for a shelf of small leaves.
    """

    stacks: tuple[Any, ...]


def pack(layout: Layout, columns: Sequence[Sequence[Leaves]]) -> Bank:
    """Stack the parameters of some jobs.

    Args:
        layout: where they stand.
        columns: per bank, per job, its leaves in trace order; jobs take slots 0, 1,
            ...; slots that are left are zero.

    Returns:
        The bank.
    """
    arrays = []
    for shelf in layout.shelves:
        stacks = []
        for i in shelf:
            buffer = layout.params[i]
            own = [[each[leaf] for each in columns[b]] for b, leaf in buffer.members]
            flat = [x for column in own for x in column]
            if len(shelf) == 1 and is_shared(flat, layout.rows_of(i)):
                stacks.append(_as_leaf(flat[0], buffer.dtype))
            else:
                stacks.append(_stack(buffer, own, layout.capacities))
        arrays.append(jnp.stack(stacks) if len(shelf) > 1 else stacks[0])
    return Bank(tuple(arrays))


def open_shelves(layout: Layout, arrays: Sequence[Any]) -> list[Any]:
    """Return the stacks of a bank's arrays, one per entry of ``layout.params``."""
    stacks: list[Any] = [None] * len(layout.params)
    for shelf, array in zip(layout.shelves, arrays, strict=True):
        for k, i in enumerate(shelf):
            stacks[i] = array[k] if len(shelf) > 1 else array
    return stacks


def alias(
    names: Sequence[Sequence[str]], columns: Sequence[Sequence[Leaves]]
) -> tuple[int, ...]:
    """Return which bank each species reads: one for the same leaves of the same jobs.

    Args:
        names: per species, its jobs.
        columns: per species, per job, its leaves.

    Returns:
        Bank numbers 0, 1, ... in order of their first species.
    """
    numbers: dict[tuple[Any, ...], int] = {}
    keys = [
        (tuple(jobs), tuple(tuple(map(id, leaves)) for leaves in species))
        for jobs, species in zip(names, columns, strict=True)
    ]
    return tuple(numbers.setdefault(key, len(numbers)) for key in keys)


def marks(
    columns: Sequence[Sequence[Leaves]],
    capacities: Sequence[int],
    bank_of: Sequence[int],
) -> list[list[Hashable]]:
    """Return which leaves all jobs of a species share, marked by what they are.

    Args:
        columns: per species, per job, its leaves; specs for values are fine.
        capacities: slots per species.
        bank_of: per species its bank; equal for programs of the same jobs, which hold
            the same objects and are one holder.

    Returns:
        Per species, per leaf: a mark, equal for equal arrays wherever they are; or
        None where each slot has its own. A species of one slot shares with nobody but
        those that hold the same object.
    """
    holders: dict[int, set[int]] = {}
    for b, column in zip(bank_of, columns, strict=True):
        for leaves in column:
            for i in range(len(leaves)):
                holders.setdefault(id(leaves[i]), set()).add(b)
    known: dict[str, list[Any]] = {}

    def mark(leaf: Any) -> Hashable:
        kind = _tree.describe(leaf)
        alike = known.setdefault(kind, [])
        for n, other in enumerate(alike):
            if _is_same(leaf, other):
                return (kind, n)
        alike.append(leaf)
        return (kind, len(alike) - 1)

    found: list[list[Hashable]] = []
    for column, capacity in zip(columns, capacities, strict=True):
        own = [list(leaves) for leaves in zip(*column, strict=True)]
        found.append(
            [
                mark(leaves[0])
                if is_shared(leaves, capacity)
                and (capacity > 1 or len(holders[id(leaves[0])]) > 1)
                else None
                for leaves in own
            ]
        )
    return found


def is_shared(column: Sequence[Any], rows: int) -> bool:
    """Return whether one leaf of all jobs is kept once.

    Equal objects are; equal bytes are too, unless they repeat one value: a fresh bias
    or adapter is equal by accident and is about to differ. With one slot there is
    nobody to share with, and the leaf stands without a slot axis.
    """
    first = column[0]
    if rows == 1 or len(column) == 1:
        return rows == 1
    if all(leaf is first for leaf in column):
        return True
    return all(_is_same(first, x) for x in column[1:]) and not _tree.is_one_value(first)


def num_bytes(layout: Layout, columns: Sequence[Sequence[Leaves]]) -> tuple[int, int]:
    """Return the bytes of all jobs' parameters, alone and in the bank.

    Args:
        layout: where they stand.
        columns: per bank, per job, its leaves; specs for values are fine.
    """
    alone = held = 0
    for i, buffer in enumerate(layout.params):
        itemsize = getattr(buffer.dtype, "itemsize", 4)
        own = [[leaves[leaf] for leaves in columns[b]] for b, leaf in buffer.members]
        for column, shape in zip(own, buffer.shapes, strict=True):
            alone += math.prod(shape) * itemsize * len(column)
        rows = layout.rows_of(i)
        _, k = layout.array_of(i)
        if k is None and is_shared([x for column in own for x in column], rows):
            rows = 1
        shape = buffer.shape(dict(enumerate(layout.capacities)))
        held += math.prod(shape) * itemsize * rows
    return alone, held


def is_stacked(stack: Any, buffer: Buffer) -> bool:
    """Return whether an array of the bank has rows, or is shared by all slots."""
    return np.ndim(stack) == len(buffer.shapes[0]) + 1


def fits_shared(layout: Layout, bank: Bank, b: int, new: Leaves) -> bool:
    """Return whether every leaf that is kept once equals the one that a job brings.

    Args:
        layout: where leaves stand.
        bank: the parameters.
        b: the job's bank.
        new: its leaves.
    """
    return not _differing(layout, bank, b, new)


def unshare(layout: Layout, bank: Bank, b: int, new: Leaves) -> Bank:
    """Give slots to every shared leaf that differs from the one a job brings."""
    arrays = list(bank.stacks)
    for i in _differing(layout, bank, b, new):
        a, _ = layout.array_of(i)
        arrays[a] = jnp.broadcast_to(arrays[a], (layout.rows_of(i), *arrays[a].shape))
    return Bank(tuple(arrays))


def write(
    layout: Layout,
    bank: Bank,
    b: int,
    slot: int,
    new: Leaves,
    *,
    donate: bool = False,
) -> Bank:
    """Return a bank with one slot replaced; shared leaves stay.

    Args:
        layout: where leaves stand.
        bank: the parameters; its stacks are consumed if donated: nothing is copied.
        b: which bank number.
        slot: which of its slots.
        new: the job's leaves.
        donate: whether to reuse the stacks' memory.

    Returns:
        The new bank. One compile serves every slot.
    """
    arrays = list(bank.stacks)
    written: dict[int, list[Any]] = {}  # values, by array
    places: dict[int, list[tuple[int, ...]]] = {}
    for leaf, (i, start, _) in layout.leaf_rows(b).items():
        x = _as(new[leaf], layout.params[i].dtype)
        a, k = layout.array_of(i)
        if k is not None or is_stacked(arrays[a], layout.params[i]):
            row = start + slot
            written.setdefault(a, []).append(x)
            places.setdefault(a, []).append((row,) if k is None else (k, row))
        elif layout.rows_of(i) == 1:
            arrays[a] = _as_leaf(x, layout.params[i].dtype)
    if written:
        put = _write_donating if donate else _write
        # All in one array: each of them alone would travel to the device by itself.
        where = np.array([n for own in places.values() for p in own for n in p], "i4")
        stacks = put([arrays[a] for a in written], [*written.values()], where)
        for a, stack in zip(written, stacks, strict=True):
            arrays[a] = stack
    return Bank(tuple(arrays))


def kept_once(layout: Layout, bank: Bank) -> set[int]:
    """Return which stacks several jobs share: what is in them is there once."""
    own = set()
    for i, buffer in enumerate(layout.params):
        a, k = layout.array_of(i)
        is_own = k is not None or layout.rows_of(i) == 1
        if is_own or is_stacked(bank.stacks[a], buffer):
            own.add(a)
    return set(range(len(bank.stacks))) - own


def emptied(layout: Layout, bank: Bank) -> Bank:
    """Return a bank like another one, zeros but for the leaves that are kept once."""
    arrays, order = list(bank.stacks), _own(layout, bank)
    zeros = _zeros_like([arrays[a] for a in order])
    # Committed to where the others are, or the next write would be compiled anew.
    zeros = jax.device_put(zeros, [arrays[a].sharding for a in order])
    for a, stack in zip(order, zeros, strict=True):
        arrays[a] = stack
    return Bank(tuple(arrays))


def expect_emptied(layout: Layout, bank: Bank) -> None:
    """Compile what `emptied` needs, so that it takes no time then."""
    _zeros_like.lower([bank.stacks[a] for a in _own(layout, bank)]).compile()


def _own(layout: Layout, bank: Bank) -> list[int]:
    kept = kept_once(layout, bank)
    return [a for a in range(len(bank.stacks)) if a not in kept]


@jax.jit
def _zeros_like(arrays: list[Any]) -> list[Any]:
    return [jnp.zeros_like(x) for x in arrays]


def written_leaves(layout: Layout, bank: Bank, b: int) -> set[int]:
    """Return which leaves of a job `write` writes: those that are not kept once."""
    found = set()
    for leaf, (i, _, _) in layout.leaf_rows(b).items():
        a, k = layout.array_of(i)
        is_own = k is not None or layout.rows_of(i) == 1
        if is_own or is_stacked(bank.stacks[a], layout.params[i]):
            found.add(leaf)
    return found


def read(layout: Layout, bank: Bank, b: int, slot: int) -> tuple[Any, ...]:
    """Return the leaves of one slot, without padding."""
    found = []
    stacks = open_shelves(layout, bank.stacks)
    for i, start, shape in layout.leaf_rows(b).values():
        stack = stacks[i]
        if is_stacked(stack, layout.params[i]):
            stack = stack[(start + slot, *map(slice, shape))]
        found.append(stack)
    return tuple(found)


def _differing(layout: Layout, bank: Bank, b: int, new: Leaves) -> list[int]:
    """Return the shared stacks that differ from what a job brings."""
    found = []
    for leaf, (i, _, _) in layout.leaf_rows(b).items():
        a, k = layout.array_of(i)
        if k is not None or layout.rows_of(i) == 1:
            continue
        held, dtype = bank.stacks[a], layout.params[i].dtype
        if not is_stacked(held, layout.params[i]):
            if not _is_same(held, _as(new[leaf], dtype)):
                found.append(i)
    return found


def _is_same(a: Any, b: Any) -> bool:
    if a is b:
        return True
    if any(_tree.is_tracer(x) or _tree.is_spec(x) for x in (a, b)):
        return False
    return _tree.describe(a) == _tree.describe(b) and _tree.same_bytes(a, b)


def _update(arrays: list[Any], written: list[list[Any]], where: Any) -> list[Any]:
    """Write values into arrays, at one number each, or two, from their front axes."""
    found, at = [], 0
    for array, values in zip(arrays, written, strict=True):
        for x in values:
            num_lead = array.ndim - np.ndim(x)
            shape = array.shape[num_lead:]
            x = jnp.reshape(padded(x, shape), (*(1,) * num_lead, *shape))
            place = [where[at + n] for n in range(num_lead)]
            at += num_lead
            origin = [np.int32(0)] * len(shape)
            array = jax.lax.dynamic_update_slice(array, x, (*place, *origin))
        found.append(array)
    return found


_write = jax.jit(_update)
_write_donating = functools.partial(jax.jit, donate_argnums=0)(_update)


def padded(x: Any, shape: tuple[int, ...], num_lead: int = 0) -> Any:
    """Return an array with zeros at the ends of its axes; the first few stay."""
    true = np.shape(x)[num_lead:]
    if true == tuple(shape):
        return x
    more = [(0, w - n) for n, w in zip(true, shape, strict=True)]
    return jnp.pad(x, [(0, 0)] * num_lead + more)


def _as(x: Any, dtype: Any) -> Any:
    """Return a leaf in the dtype that the trace expects, on the host if it was."""
    if _tree.is_typed_key(x) or isinstance(x, jax.Array):
        return x
    return np.asarray(x, dtype)


def _as_leaf(x: Any, dtype: Any) -> Any:
    x = _as(x, dtype)
    # On a CPU JAX may keep a NumPy array's own memory, which its owner can change.
    return jnp.array(x) if isinstance(x, np.ndarray) else jnp.asarray(x)


def _stack(buffer: Buffer, own: Sequence[Sequence[Any]], capacities: Any) -> Any:
    """Return the stack of a leaf: per member its jobs' leaves, then empty slots."""
    counts = dict(enumerate(capacities))
    shape = buffer.shape(counts)
    columns = [  # where there are more jobs than slots, the first of them
        [_as(x, buffer.dtype) for x in column[: capacities[b]]]
        for (b, _), column in zip(buffer.members, own, strict=True)
    ]
    if all(isinstance(x, np.ndarray) for column in columns for x in column):
        stack = np.zeros((buffer.num_rows(counts), *shape), buffer.dtype)
        starts = buffer.starts(counts)
        for (b, _), column in zip(buffer.members, columns, strict=True):
            for slot, x in enumerate(column):
                stack[(starts[b] + slot, *map(slice, x.shape))] = x
        return jax.device_put(stack)
    return _stacked(columns, tuple(capacities[b] for b, _ in buffer.members), shape)


@functools.partial(jax.jit, static_argnums=(1, 2))
def _stacked(columns: Any, slots: tuple[int, ...], shape: tuple[int, ...]) -> Any:
    """Stack arrays in one program: a call for each of hundreds takes too long."""
    pieces = []
    for x, num in zip(map(jnp.stack, columns), slots, strict=True):
        pieces += [padded(x, shape, 1), jnp.zeros((num - len(x), *shape), x.dtype)]
    return jnp.concatenate(pieces)
