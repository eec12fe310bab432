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

# Where an answer stands: job name, species, slot of the step, rows, and the shapes that
# its outputs are cut back to.
Place = tuple[str, int, int, int, Shapes | None]


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
            None for all of them in order.
        inputs: per species its leaves ``[K, B, ...]``; None where it takes no part.
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
        leaves: per species its leaves ``[K, B, ...]``; None where it took no part.
        places: whose rows stand where.
    """

    leaves: tuple[Any, ...]
    places: tuple[Place, ...]


def fill(leaves: list[Any], rows: int, spec: jax.ShapeDtypeStruct) -> Any:
    """Return ``[K, B, ...]`` from leaves of fewer rows each."""
    if any(_tree.is_tracer(x) for x in leaves):
        return jnp.stack([_repeat_first(jnp.asarray(x), rows) for x in leaves])
    buffer = np.empty((len(leaves), rows, *spec.shape), spec.dtype)
    for k, x in enumerate(leaves):
        buffer[k, : len(x)] = x
        buffer[k, len(x) :] = x[:1]
    return buffer


def _repeat_first(x: Any, rows: int) -> Any:
    missing = rows - x.shape[0]
    if not missing:
        return x
    return jnp.concatenate([x, jnp.broadcast_to(x[:1], (missing, *x.shape[1:]))])


def to_host(x: Any) -> Any:
    """Return an array on the host, unless it is traced or NumPy cannot hold it."""
    if _tree.is_tracer(x) or _tree.is_typed_key(x):
        return x
    return np.asarray(x)


def cut(
    outputs: Sequence[Any],
    k: int,
    start: int,
    rows: int,
    job: Job,
    out_sizes: Shapes | None = None,
) -> Any:
    """Return one request's outputs, copied so that they are the caller's own.

    Args:
        outputs: the leaves of its species, ``[K, B, ...]``.
        k: its slot.
        start: its first row.
        rows: how many.
        job: whose request it is; an unbatched one has no row axis.
        out_sizes: per leaf the shape to cut its padding back to, or None.
    """
    of = slice(start, start + rows) if job.batched else start
    own = []
    for i, x in enumerate(outputs):
        sizes = out_sizes[i] if out_sizes else ()
        y = x[(k, of, *map(slice, sizes))]
        own.append(np.array(y) if isinstance(x, np.ndarray) else y)
    return jax.tree.unflatten(jax.tree.structure(job.outputs), own)
