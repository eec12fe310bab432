"""Host buffers of a step: requests' bytes go in, and answers are cut out of them.

Rules:
    Bytes, not arrays: NumPy gives the interpreter away while it copies more than 500
    numbers, and to get it back from a busy thread takes longer than the copy.
    All that no request fills is zero. An answer shares no memory with another.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import numpy as np

from stfuse._lane import Lane, specs
from stfuse._stacked import LeafPlaces
from stfuse._types import Bucket, Chunk

_LARGE = 1 << 18  # bytes: a copy so long that other threads should go on meanwhile
_FEW = 500  # numbers that NumPy copies without giving the interpreter away
Staged = tuple[Any, Any, list[Any]]  # slots, buffers, and the buffers' memory


def stage(
    lane: Lane,
    bucket: Bucket,
    chunks: Sequence[Chunk],
    leaves_of: Mapping[int, Sequence[bytes]],
) -> tuple[Staged, list[tuple[int, int]]]:
    """Copy requests into the host buffers of a step.

    Args:
        lane: whose step.
        bucket: which shape.
        chunks: what runs, each in a slot.
        leaves_of: per request the bytes of its input leaves ``[B, ...]``.

    Returns:
        Slots and buffers, to be given back with `release`, and per chunk its species
        and slot of the step. All that no request fills is zero.
    """
    free = lane.buffers.setdefault(bucket, [])
    slots, buffers, views = staged = free.pop() if free else _allocate(lane, bucket)
    filled = [0] * len(lane.capacities)
    placed = []
    entries_of = _entries(lane, bucket)
    for chunk in chunks:
        s, own = lane.places[chunk.tenant][chunk.length]
        k = own if slots[s] is None else filled[s]
        filled[s] += 1
        placed.append((s, k))
        if slots[s] is not None:
            slots[s][k] = own
        for leaf, i, row, size, shape in entries_of[s]:
            if shape is not None:
                pieces = [leaves_of[r][leaf] for r in chunk.requests]
                _fill_padded(pieces, buffers[i], row + k, shape)
                continue
            at, view = (row + k) * size, views[i]
            stop = at + size
            for request in chunk.requests:
                piece = leaves_of[request][leaf]
                end = at + len(piece)
                view[at:end] = piece
                at = end
            if at < stop:
                view[at:stop] = bytes(stop - at)
    for s, entries in entries_of.items():
        if filled[s] < bucket.slots[s]:
            used = {k for of, k in placed if of == s}
            unused = [k for k in range(bucket.slots[s]) if k not in used]
            for _, i, row, size, _ in entries:
                zeros, view = bytes(size), views[i]
                for k in unused:
                    view[(row + k) * size : (row + k + 1) * size] = zeros
        if slots[s] is not None:
            slots[s][filled[s] :] = 0
    return staged, placed


def release(lane: Lane, bucket: Bucket, staged: Staged) -> None:
    """Give staging buffers back once their step was read."""
    lane.buffers[bucket].append(staged)


def sample(lane: Lane, bucket: Bucket) -> tuple[Any, Any]:
    """Return slots and inputs to time a step with: zeros can run faster than data."""
    slots, buffers, _ = _allocate(lane, bucket)
    rng = np.random.default_rng(0)
    for leaf in jax.tree.leaves(buffers):
        if np.issubdtype(leaf.dtype, np.floating):
            leaf[...] = rng.standard_normal(leaf.shape)
    return slots, buffers


def cut_places(lane: Lane, bucket: Bucket, species: int) -> LeafPlaces:
    """Return where the outputs of a species' slot 0 stand in a bucket's step."""
    key = (bucket, species)
    if key not in lane.cuts:
        lane.cuts[key] = lane.layout.cut_places(bucket.counts, species, 0)
    return lane.cuts[key]


def as_bytes(x: Any) -> Any:
    """Return the memory of an array, None if it has none or not in order."""
    if not isinstance(x, np.ndarray) or not x.flags.c_contiguous:
        return None
    return x.reshape(-1).view(np.uint8).data


def memory_of(outputs: Sequence[Any]) -> list[tuple[Any, Any, int]]:
    """Return each output array of a step, its memory, and the bytes of a row of it."""
    found = []
    for x in outputs:
        view = as_bytes(x)
        found.append((x, view, len(view) // math.prod(x.shape[:2]) if view else 0))
    return found


def cut_leaves(
    outputs: Sequence[tuple[Any, Any, int]],
    places: LeafPlaces,
    slot: int,
    start: int,
    rows: int | None,
) -> list[Any]:
    """Return one request's output leaves, copied so that they are the caller's own.

    Args:
        outputs: a step's output arrays ``[rows, B, *padded]``, by `memory_of`.
        places: where the leaves of its species' slot 0 stand.
        slot: its slot.
        start: its first row.
        rows: how many; None for an unbatched job, whose leaves have no row axis.
    """
    own = []
    for i, row, shape in places:
        x, view, size = outputs[i]
        num = size * (1 if rows is None else rows)
        if 0 < num < _LARGE and x.shape[2:] == shape:
            if rows is not None and num <= _FEW * x.itemsize:
                own.append(x[row + slot, start : start + rows].copy())
                continue
            at = ((row + slot) * x.shape[1] + start) * size
            mine = np.empty(shape if rows is None else (rows, *shape), x.dtype)
            mine.reshape(-1).view(np.uint8).data[:] = view[at : at + num]
            own.append(mine)
            continue
        of = start if rows is None else slice(start, start + rows)
        y = x[(row + slot, of, *map(slice, shape))]
        own.append(np.array(y) if isinstance(x, np.ndarray) else y)
    return own


# Per leaf of a species: its number, its buffer, the row of slot 0, the bytes of a slot,
# and if these are more than its own its row's true shape.
_Entry = tuple[int, int, int, int, tuple[int, ...] | None]


def _entries(lane: Lane, bucket: Bucket) -> dict[int, list[_Entry]]:
    """Return where the inputs of each species stand."""
    found = lane.entries.get(bucket)
    if found is None:
        counts = bucket.counts
        found = lane.entries[bucket] = {s: [] for s in counts}
        for i, buffer in enumerate(lane.layout.inputs):
            starts, padded = buffer.starts(counts), ()
            if buffer.num_rows(counts):
                padded = buffer.shape(counts)
            size = bucket.rows * math.prod(padded) * buffer.dtype.itemsize
            for (s, leaf), shape in zip(buffer.members, buffer.shapes, strict=True):
                if s in counts and leaf >= 0:  # a bare carrier has no rows to copy
                    true = None if shape == padded else shape
                    found[s].append((leaf, i, starts[s], size, true))
    return found


def _allocate(lane: Lane, bucket: Bucket) -> Staged:
    of = specs(lane, bucket)
    slots, buffers = jax.tree.map(lambda s: lane.allocate(s.shape, s.dtype), of)
    return slots, buffers, [as_bytes(buffer) for buffer in buffers]


def _fill_padded(
    pieces: Sequence[bytes], buffer: Any, slot: int, shape: tuple[int, ...]
) -> None:
    """Copy leaves into one slot's rows, which are wider than theirs; zero the rest."""
    at = 0
    for piece in pieces:
        if not piece:
            continue  # an axis of it has no length: there is nothing to copy
        leaf = np.frombuffer(piece, buffer.dtype).reshape(-1, *shape)
        end = at + len(leaf)
        buffer[(slot, slice(at, end), *map(slice, shape))] = leaf
        at = end
    buffer[slot, at:] = 0
