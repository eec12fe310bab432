"""A region's axes, labelled launch by launch; what cannot be one kernel is refused."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from stfuse._plan import Node
from stfuse._program import Literal, Op
from stfuse._regions._axes import Axes, Conflict, Labels
from stfuse._regions._record import (
    LONG,
    MOST_ELEMENTS,
    MOST_OF_SCORES,
    PRODUCT,
    REDUCTIONS,
    Programs,
    Region,
    Step,
    Value,
    block,
    leaves,
    ops_of,
)
from stfuse._rules._shape import factor_groups

Readers = Mapping[tuple[int, int], set[int]]


def label(
    programs: Programs,
    nodes: Sequence[Node],
    places: Sequence[int],
    readers: Readers,
) -> Region:
    """Label a region's axes.

    Args:
        programs: per species its program.
        nodes: all launches.
        places: which of them are in the region.
        readers: per value the places of the launches that read it; -1 is the caller.

    Raises:
        Conflict: it cannot be one kernel.
    """
    build = _Build(tuple(nodes[i] for i in places))
    for i in places:
        build.add(ops_of(programs, nodes[i]))
    inside = set(places)
    made = ((s, v) for i in places for s, v in _outputs(programs, nodes[i]))
    return build.region({v for v in made if not readers.get(v, inside) <= inside})


def _outputs(programs: Programs, node: Node) -> list[tuple[int, int]]:
    ops = zip(node.members, ops_of(programs, node), strict=True)
    return [(s, v) for (s, _), op in ops for v in op.outputs]


def readers_of(programs: Programs, nodes: Sequence[Node]) -> Readers:
    """Return who reads each value, as `label` takes it."""
    found: dict[tuple[int, int], set[int]] = {}
    for i, node in enumerate(nodes):
        for (s, _), op in zip(node.members, ops_of(programs, node), strict=True):
            for atom in op.inputs:
                if not isinstance(atom, Literal):
                    found.setdefault((s, atom), set()).add(i)
    for s, program in programs.items():
        for atom in program.outputs:
            if not isinstance(atom, Literal):
                found.setdefault((s, atom), set()).add(-1)
    return found


class _Build:
    """A region on its way."""

    def __init__(self, nodes: tuple[Node, ...]) -> None:
        self.nodes, self.species = nodes, nodes[0].species
        self.labels = Labels()
        self.inputs: list[Value] = []
        self.made: list[Value] = []
        self.steps: list[tuple[tuple[Op, ...], tuple[Any, ...]]] = []
        self.known: dict[Any, tuple[str, int]] = {}

    def add(self, ops: Sequence[Op]) -> None:
        """Add one launch."""
        operands: list[Any] = []
        for p in range(len(ops[0].inputs)):
            atoms = [op.inputs[p] for op in ops]
            specs = [op.in_specs[p] for op in ops]
            operands.append(self._operand(atoms, specs))
        axes = [() if isinstance(x, Literal) else self._value(x).axes for x in operands]
        out = _AXES.get(ops[0].name, _elementwise)(self.labels, ops, axes)
        shapes = tuple(tuple(op.specs[0].shape) for op in ops)
        self.made.append(Value(out, shapes, ops[0].specs[0].dtype))
        self.steps.append((tuple(ops), tuple(operands)))
        key = tuple((s, op.outputs[0]) for s, op in zip(self.species, ops, strict=True))
        self.known[key] = ("made", len(self.made) - 1)

    def _value(self, where: tuple[str, int]) -> Value:
        kind, place = where
        return (self.made if kind == "made" else self.inputs)[place]

    def _operand(self, atoms: Sequence[Any], specs: Sequence[Any]) -> Any:
        literals = [x for x in atoms if isinstance(x, Literal)]
        shapes = tuple(tuple(spec.shape) for spec in specs)
        if len(literals) == len(atoms):
            if any(shape != () for shape in shapes):
                raise Conflict
            texts = {np.asarray(x.value, x.spec.dtype).tobytes() for x in literals}
            if len(texts) == 1:
                return literals[0]
        elif literals:
            raise Conflict
        members = tuple(zip(self.species, atoms, strict=True))
        key = members if not literals else ("literals", len(self.inputs))
        if key not in self.known:
            axes = self.labels.of(shapes)
            self.inputs.append(Value(axes, shapes, specs[0].dtype, members))
            self.known[key] = ("input", len(self.inputs) - 1)
        return self.known[key]

    def region(self, read: set[tuple[int, int]]) -> Region:
        """Return the region, if a kernel can compute it.

        Args:
            read: which values others read.
        """
        num = len(self.inputs)

        def number(where: Any) -> Any:
            if isinstance(where, Literal):
                return where
            return where[1] + num * (where[0] == "made")

        steps = tuple(
            Step(ops, tuple(map(number, operands)), num + i)
            for i, (ops, operands) in enumerate(self.steps)
        )
        numbers = [tuple(op.outputs[0] for op in step.ops) for step in steps]
        outputs = [
            (step.output, own)
            for step, own in zip(steps, numbers, strict=True)
            if read & set(zip(self.species, own, strict=True))
        ]
        values = (*self.inputs, *self.made)
        extents = self.labels.extents()
        used = {x for v in values for a in v.axes for x in self.labels.leaves(a)}
        region = Region(
            self.species,
            self.nodes,
            values,
            num,
            steps,
            tuple(i for i, _ in outputs),
            tuple(own for _, own in outputs),
            self.labels,
            extents,
            tuple(sorted(used - extents.keys())),
        )
        _check(region)
        return region


def _check(region: Region) -> None:
    """Refuse what a kernel cannot compute, or not well.

    Raises:
        Conflict: if so.
    """
    has_product = any(step.ops[0].name == PRODUCT for step in region.steps)
    for number, value in enumerate(region.values):
        own = leaves(region, value)
        is_made = has_product and number >= region.num_inputs
        most = MOST_OF_SCORES if is_made else MOST_ELEMENTS
        composites = sum(len(region.labels.leaves(a)) > 1 for a in value.axes)
        size = math.prod(region.extents[x] for x in block(region, value))
        if len(set(own)) < len(own) or composites > 1 or size > most:
            raise Conflict
        is_outside = number < region.num_inputs or number in region.outputs
        # Neighbors in memory belong into one program.
        if is_outside and len(own) > 1 and own[-1] not in region.extents:
            raise Conflict
    for step in region.steps:
        name = step.ops[0].name
        if name in REDUCTIONS or name == PRODUCT:
            _check_once(region, step)


def _check_once(region: Region, step: Step) -> None:
    """Refuse a reduction or product that every place of a grid label would repeat."""
    seen: set[int] = set()
    for x in step.operands:
        if isinstance(x, Literal):
            raise Conflict
        own = region.values[x]
        seen |= set(leaves(region, own))
        if step.ops[0].name == PRODUCT and len(block(region, own)) != 2:
            raise Conflict
    if not seen >= set(region.grid):
        raise Conflict


# Labels of an op's output


def _elementwise(labels: Labels, ops: Sequence[Op], ins: Sequence[Axes]) -> Axes:
    found: list[int | None] = []
    for a, sizes in enumerate(zip(*(op.specs[0].shape for op in ops), strict=True)):
        own = [x[a] for x in ins if x and x[a] is not None]
        for other in own[1:]:
            labels.unify(own[0], other)
        if own and labels.sizes[own[0]] != tuple(sizes):  # type: ignore[index]
            raise Conflict
        found.append(own[0] if own else labels.new(sizes))
    if ops[0].name in LONG:
        labels.hold(tuple(x for x in found if x is not None)[-1:])
    return tuple(found)


def _broadcast(labels: Labels, ops: Sequence[Op], ins: Sequence[Axes]) -> Axes:
    (x,) = ins
    source = {int(a): i for i, a in enumerate(ops[0].params["broadcast_dimensions"])}
    found: list[int | None] = []
    for a, sizes in enumerate(zip(*(op.specs[0].shape for op in ops), strict=True)):
        label = x[source[a]] if a in source else None
        if label is not None and labels.sizes[label] != tuple(sizes):
            raise Conflict
        found.append(labels.new(sizes) if label is None else label)
    return tuple(found)


def _reshape(labels: Labels, ops: Sequence[Op], ins: Sequence[Axes]) -> Axes:
    (x,) = ins
    found = list(labels.of([op.specs[0].shape for op in ops]))
    groups = [factor_groups(op.in_specs[0].shape, op.specs[0].shape) for op in ops]
    if any(own != groups[0] for own in groups):
        raise Conflict
    for before, after in groups[0]:
        wide = [x[a] for a in before if x[a] is not None]
        new = [found[a] for a in after if found[a] is not None]
        if len(wide) == len(new) == 1:
            labels.unify(wide[0], new[0])
        elif len(wide) == 1 and new:
            labels.compose(wide[0], new)  # type: ignore[arg-type]
        elif len(new) == 1 and wide:
            labels.compose(new[0], wide)  # type: ignore[arg-type]
        elif wide or new:
            raise Conflict
    return tuple(found)


def _squeeze(labels: Labels, ops: Sequence[Op], ins: Sequence[Axes]) -> Axes:
    gone = {int(a) for a in ops[0].params["dimensions"]}
    return tuple(label for a, label in enumerate(ins[0]) if a not in gone)


def _transpose(labels: Labels, ops: Sequence[Op], ins: Sequence[Axes]) -> Axes:
    return tuple(ins[0][a] for a in ops[0].params["permutation"])


def _reduce(labels: Labels, ops: Sequence[Op], ins: Sequence[Axes]) -> Axes:
    gone = {int(a) for a in ops[0].params["axes"]}
    labels.hold(tuple(label for a, label in enumerate(ins[0]) if a in gone))
    return tuple(label for a, label in enumerate(ins[0]) if a not in gone)


def _product(labels: Labels, ops: Sequence[Op], ins: Sequence[Axes]) -> Axes:
    contracted, batch = ops[0].params["dimension_numbers"]
    for pairs in (contracted, batch):
        for a, b in zip(*pairs, strict=True):
            labels.unify(ins[0][a], ins[1][b])
    free = []
    for x, gone, kept in zip(ins, contracted, batch, strict=True):
        own = tuple(x[a] for a in range(len(x)) if a not in gone and a not in kept)
        labels.hold((*own, *(x[a] for a in gone)), is_product=True)
        free.append(own)
    return (*(ins[0][a] for a in batch[0]), *free[0], *free[1])


_AXES = {
    "broadcast_in_dim": _broadcast,
    "dot_general": _product,
    "reshape": _reshape,
    "squeeze": _squeeze,
    "transpose": _transpose,
    **dict.fromkeys(REDUCTIONS, _reduce),
}
