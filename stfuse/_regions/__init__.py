"""Regions: light launches around a reduction, which one kernel computes.

Where rows are all alike XLA makes one kernel of a norm or a softmax; a mask or a count
that differs by job ends that, and each reduction becomes a kernel of its own. Here
such launches are found again, for `_kernel` to compute.

Rules:
    A region holds launches of the same species, and nothing in between: what depends
    on it, and it depends on, is in it.
    Every axis of every value has a label; axes that must agree have the same one. An
    axis that is cut into two, or made of two, is their *composite*: heads and features
    of a head. A program of the kernel computes all of some labels (*block*: what is
    reduced or contracted, and what products leave) and one place of each other one
    (*grid*).
    What would be computed again by every place of a grid label, or does not fit into
    registers, is no region.
    Products take part if they are small and no weights are in them: attention.
"""

from __future__ import annotations

import functools
import importlib.util
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import jax

from stfuse._plan import Node
from stfuse._program import Literal, Op, Trace
from stfuse._regions import _kernel
from stfuse._regions._axes import Conflict
from stfuse._regions._build import label, readers_of
from stfuse._regions._grow import Groups, is_anchor
from stfuse._regions._record import (
    PRODUCT,
    Item,
    Place,
    Programs,
    Region,
    Siblings,
    name_of,
    ops_of,
)
from stfuse._types import Cost

__all__ = [
    "Item",
    "Place",
    "Region",
    "Siblings",
    "are_used",
    "compute",
    "schedule",
]


_MOST_LAUNCHES = 4000  # finding regions takes longer than in proportion


def are_used(cost: Cost, mode: str) -> bool:
    """Return whether light launches around reductions become kernels of their own.

    Args:
        cost: the device that the step is for.
        mode: how it is lowered.
    """
    if mode in ("native", "plain") or cost.source == "cpu":
        return False
    return jax.default_backend() == "gpu" and _has_kernels()


@functools.cache
def _has_kernels() -> bool:
    """Return whether this JAX still has what the kernels are written for."""
    try:
        return importlib.util.find_spec("jax.experimental.pallas.triton") is not None
    except ModuleNotFoundError:
        return False


def compute(
    region: Region,
    counts: Sequence[int],
    operands: Sequence[Place],
    shapes: Sequence[tuple[int, ...]],
) -> list[Any]:
    """Compute a region.

    Args:
        region: of `schedule`.
        counts: per species, its slots.
        operands: where its inputs stand.
        shapes: the padded shapes of its outputs.

    Returns:
        Per output ``[K, *shape]``, zero in its padding.
    """
    is_interpreted = jax.default_backend() == "cpu"
    return _kernel.run(region, counts, operands, shapes, is_interpreted=is_interpreted)


def schedule(programs: Programs, nodes: Sequence[Node]) -> list[Item]:
    """Return launches in an order in which regions are one each.

    Args:
        programs: per species that takes part, its program.
        nodes: launches of these species only, in running order.

    Returns:
        Every launch, by itself or in a region; operands before readers.
    """
    if len(nodes) > _MOST_LAUNCHES:
        return list(nodes)
    barred: set[int] = set()
    readers = readers_of(programs, nodes)
    while True:
        groups = Groups(programs, nodes, barred)
        found: dict[int, Region] = {}
        is_done = True
        for group, places in groups.members.items():
            if len(places) == 1 or not any(
                is_anchor(programs, nodes[i]) for i in places
            ):
                continue
            try:
                found[group] = label(programs, nodes, places, readers)
            except Conflict:
                is_done = False  # without its products, or not at all
                products = {i for i in places if name_of(programs, nodes[i]) == PRODUCT}
                barred |= products or set(places)
        if is_done:
            break
    return list(_ordered(nodes, groups, found, _siblings(programs, nodes, found)))


def _siblings(
    programs: Programs, nodes: Sequence[Node], found: Mapping[int, Region]
) -> dict[int, tuple[int, ...]]:
    """Return per place of such a product the places of all its siblings."""
    reader = {
        member: group
        for group, region in found.items()
        for value in region.values[: region.num_inputs]
        for member in value.members
        if not isinstance(member[1], Literal)
    }
    families: dict[Any, list[int]] = {}
    for i, node in enumerate(nodes):
        ops = ops_of(programs, node)
        if ops[0].name != PRODUCT or not all(
            _has_weights(programs[s], op)
            for (s, _), op in zip(node.members, ops, strict=True)
        ):
            continue
        readers = {
            reader.get((s, op.outputs[0]))
            for (s, _), op in zip(node.members, ops, strict=True)
        }
        lhs = tuple(op.inputs[0] for op in ops)
        if len(readers) == 1 and None not in readers:
            types = tuple(x.dtype for x in (*ops[0].in_specs, *ops[0].specs))
            params = str(sorted(ops[0].params.items()))
            families.setdefault(
                (node.species, lhs, *readers, types, params), []
            ).append(i)
    return {i: tuple(own) for own in families.values() if len(own) > 1 for i in own}


def _has_weights(program: Trace, op: Op) -> bool:
    """Return whether a product is rows times a matrix of weights."""
    (on_lhs, on_rhs), (batch, _) = op.params["dimension_numbers"]
    weights = op.inputs[1]
    return (
        not batch
        and not isinstance(op.inputs[0], Literal)
        and not isinstance(weights, Literal)
        and weights < program.num_params
        and len(op.in_specs[1].shape) == 2
        and tuple(on_rhs) == (0,)
        and tuple(on_lhs) == (len(op.in_specs[0].shape) - 1,)
    )


def _ordered(
    nodes: Sequence[Node],
    groups: Groups,
    found: Mapping[int, Region],
    siblings: Mapping[int, tuple[int, ...]],
) -> Iterator[Item]:
    """Yield launches and regions, each after what it reads."""
    done: set[int] = set()

    def emit(group: int) -> Iterator[Item]:
        if group in done:
            return
        together = siblings.get(group, (group,))
        done.update(together)
        for g in together:
            for p in groups.before(g):
                yield from emit(p)
        if group in found:
            yield found[group]
        elif len(together) > 1:
            yield Siblings(tuple(nodes[i] for i in together))
        else:
            yield from (nodes[i] for i in groups.members[group])

    for group in sorted(groups.members, key=lambda g: groups.members[g][-1]):
        yield from emit(group)
