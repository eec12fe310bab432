"""Several launches computed as one: regions, and products of one operand."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from stfuse import _lower, _regions, _rules
from stfuse._lower._tiles import MAX_ADDRESS
from stfuse._program import Op
from stfuse._regions import Region, Siblings
from stfuse._rules import Merge, Stack
from stfuse._types import Cost
from stfuse._values import Env, Held, place, read


@dataclass(frozen=True, slots=True)
class Probe:
    """What a test may do to an evaluation: look at it, or poison its padding.

    Attributes:
        operand: maps each operand of a launch of unlike ops.
        launched: is told each launch: its merge, and per member species and op index;
            then its operands and its outputs.
    """

    operand: Callable[[Stack], Stack] = lambda x: x
    launched: Callable[[Merge, Any, Sequence[Stack], Sequence[Stack]], None] = (
        lambda merge, members, operands, outs: None
    )


@dataclass(frozen=True, slots=True)
class How:
    """How launches are computed.

    Attributes:
        rows: rows of a slot, mapped outside; the chooser of lowerings wants to know.
        cost: the device.
        lowering: one of `_lower.LOWERINGS`, or one of the steps' own.
        probe: for tests.
        has_regions: whether light launches may become kernels of their own.
    """

    rows: int
    cost: Cost
    lowering: str = "auto"
    probe: Probe | None = None
    has_regions: bool = True


def run_together(env: Env, item: Region | Siblings, how: How) -> bool:
    """Run several launches as one.

    Returns:
        Whether they were run; if not, each has to be.
    """
    if isinstance(item, Region):
        return _run_region(env, item, how)
    return _run_siblings(env, item, how)


def _run_region(env: Env, region: Region, how: How) -> bool:
    """Run a region, unless it is too large: a kernel's addresses have 32 bits."""
    operands = [
        place(
            env,
            value.members,
            [jax.ShapeDtypeStruct(shape, value.dtype) for shape in value.shapes],
        )
        for value in region.values[: region.num_inputs]
    ]
    outs = [region.values[i] for i in region.outputs]
    counts = [env.counts[s] for s in region.species]
    shapes = [_rules.widest(value.shapes) for value in outs]
    sizes = [x.array.size for x in operands]
    sizes += [sum(counts) * math.prod(shape) for shape in shapes]
    if how.rows * max(sizes) >= MAX_ADDRESS:
        return False
    arrays = _regions.compute(region, counts, operands, shapes)
    for value, numbers, array in zip(outs, region.numbers, arrays, strict=True):
        true = np.repeat([*value.shapes], counts, axis=0).astype(int)
        true = true.reshape(sum(counts), array.ndim - 1)
        clean = (True,) * (array.ndim - 1)
        env.put(region.species, numbers, Stack(array, True, true, clean))
    return True


def _run_siblings(env: Env, siblings: Siblings, how: How) -> bool:
    """Run products of one operand as one, with their weights side by side.

    Weights that are not gathered yet stay apart, to be read in place.
    """
    species = [s for s, _ in siblings.nodes[0].members]
    columns = [
        [env.programs[s].ops[i] for s, i in node.members] for node in siblings.nodes
    ]
    weights = [(species[0], ops[0].inputs[1]) for ops in columns]
    if any(env.values[w].index is not None for w in weights):  # type: ignore[index]
        return False
    wides = [_rules.widen(ops) for ops in columns]
    x = _operand(env, species, columns[0], wides[0], 0)
    own = zip(columns, wides, strict=True)
    w = _side_by_side([_operand(env, species, ops, wide, 1) for ops, wide in own])
    wide = _widened(wides[0], x.shape, w.shape)
    (y,) = _rules.launch(merge_of(env, species, columns[0], wide, how), [x, w])
    start, starts = 0, env.starts(species)
    for ops, wide in zip(columns, wides, strict=True):
        shape = wide.specs[0].shape
        array, clean = y.array[..., start : start + shape[-1]], (False,) * len(shape)
        held = Held(array, y.is_stacked, clean, starts, within=(y.array, 0, start))
        for s, op in zip(species, ops, strict=True):
            env.values[s, op.outputs[0]] = held
        start += shape[-1]
    return True


def _side_by_side(stacks: Sequence[Stack]) -> Stack:
    """Return weights as the columns of one matrix."""
    if len({x.is_stacked for x in stacks}) > 1:
        stacks = [_rules.to_stacked(x) for x in stacks]
    array = jnp.concatenate([x.array for x in stacks], axis=-1)
    clean = (all(x.clean[0] for x in stacks), False)
    return replace(stacks[0], array=array, clean=clean)


def _operand(
    env: Env, species: Sequence[int], ops: Sequence[Op], wide: Op, p: int
) -> Stack:
    """Return one operand of a launch, padded."""
    values = [(s, op.inputs[p]) for s, op in zip(species, ops, strict=True)]
    return read(env, values, [op.in_specs[p] for op in ops], wide.in_specs[p].shape)


def _widened(op: Op, lhs: tuple[int, ...], rhs: tuple[int, ...]) -> Op:
    """Return a product of rows and a wider matrix."""
    x, w = op.in_specs
    specs = (jax.ShapeDtypeStruct(lhs, x.dtype), jax.ShapeDtypeStruct(rhs, w.dtype))
    out = jax.ShapeDtypeStruct((*lhs[:-1], rhs[-1]), op.specs[0].dtype)
    return op.at(specs, (out,), op.params)


def merge_of(
    env: Env, species: Sequence[int], ops: Sequence[Op], wide: Op, how: How
) -> Merge:
    """Return a launch whose lowering is chosen when it is evaluated."""
    counts = tuple(env.counts[s] for s in species)

    def compute(op: Op, arrays: Sequence[Any], flags: Sequence[bool]) -> Any:
        if not any(flags):
            return op.bind_fn(*arrays)
        name = _lower.choose(
            op,
            flags,
            num_slots=sum(counts),
            rows=how.rows,
            cost=how.cost,
            mode=how.lowering,
        )
        return _lower.apply(name, op, arrays, flags)

    return Merge(tuple(ops), counts, wide, compute)
