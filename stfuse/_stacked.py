"""The stacked form: what a step takes and gives, and how it is filled and cut."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from stfuse import _tree
from stfuse._job import Job
from stfuse._lengths import Shapes

# Where one output leaf of a slot stands: which array, which row, its true shape.
LeafPlaces = Sequence[tuple[int, int, tuple[int, ...]]]
# Where an answer stands: job name, its leaves, its rows.
Place = tuple[str, LeafPlaces, int]


@functools.partial(
    jax.tree_util.register_dataclass,
    data_fields=["slots", "inputs"],
    meta_fields=["places"],
)
@dataclasses.dataclass(frozen=True)
class Stacked:
    """Inputs of a step: one buffer per input leaf of each species.

    Attributes:
        slots: per species int32 ``[K]``, which bank slot each slot of the step uses;
            None for all of them in order; ``()`` where it takes no part.
        inputs: per buffer ``[rows, B, *padded]``; None where nobody takes part.
        places: whose rows stand where.
    """

    slots: tuple[Any, ...]
    inputs: tuple[Any, ...]
    places: tuple[Place, ...]


@functools.partial(
    jax.tree_util.register_dataclass, data_fields=["leaves"], meta_fields=["places"]
)
@dataclasses.dataclass(frozen=True)
class StackedOutputs:
    """Outputs of a step.

    Attributes:
        leaves: per buffer ``[rows, B, *padded]``; None where nobody took part.
        places: whose rows stand where.
    """

    leaves: tuple[Any, ...]
    places: tuple[Place, ...]


def fill(leaves: list[Any], rows: int, shape: tuple[int, ...], dtype: Any) -> Any:
    """Return ``[len(leaves), B, *shape]`` from leaves of fewer rows, or smaller ones.

    Missing rows repeat the first one, which keeps gradients finite; padding of the
    other axes is zero.
    """
    if any(_tree.is_tracer(x) for x in leaves):
        return jnp.stack([_repeat_first(jnp.asarray(x), rows, shape) for x in leaves])
    buffer = np.zeros((len(leaves), rows, *shape), dtype)
    for k, x in enumerate(leaves):
        inner = tuple(map(slice, x.shape[1:]))
        buffer[(k, slice(len(x)), *inner)] = x
        buffer[(k, slice(len(x), None), *inner)] = x[:1]
    return buffer


def _repeat_first(x: Any, rows: int, shape: tuple[int, ...]) -> Any:
    missing = rows - x.shape[0]
    if missing:
        x = jnp.concatenate([x, jnp.broadcast_to(x[:1], (missing, *x.shape[1:]))])
    if x.shape[1:] == shape:
        return x
    more = [(0, want - n) for n, want in zip(x.shape[1:], shape, strict=True)]
    return jnp.pad(x, [(0, 0), *more])


def to_host(x: Any) -> Any:
    """Return an array on the host, unless it is traced or NumPy cannot hold it."""
    if _tree.is_tracer(x) or _tree.is_typed_key(x):
        return x
    return np.asarray(x)


def cut(
    outputs: Sequence[Any],
    places: LeafPlaces,
    slot: int,
    start: int,
    rows: int,
    job: Job,
) -> Any:
    """Return one request's outputs, copied so that they are the caller's own.

    Args:
        outputs: a step's output arrays ``[rows, B, *padded]``.
        places: where the leaves of its species' slot 0 stand.
        slot: its slot.
        start: its first row.
        rows: how many.
        job: whose request it is; an unbatched one has no row axis.
    """
    of = slice(start, start + rows) if job.batched else start
    own = []
    for i, row, shape in places:
        x = outputs[i]
        y = x[(row + slot, of, *map(slice, shape))]
        own.append(np.array(y) if isinstance(x, np.ndarray) else y)
    return jax.tree.unflatten(jax.tree.structure(job.outputs), own)


def resized(places: LeafPlaces, shapes: Shapes | None) -> LeafPlaces:
    """Return places whose leaves are cut back to some shapes, if any."""
    if shapes is None:
        return places
    return tuple((i, row, s) for (i, row, _), s in zip(places, shapes, strict=True))
