"""Regions: light launches around a reduction, which one kernel computes.

Where rows are all alike XLA makes one kernel of a norm or a softmax; a mask or a count
that differs by job ends that, and each reduction becomes a kernel of its own. Here
such launches are found again, for `_region_kernel` to compute.

Rules:
    A region holds launches of the same species, and nothing in between: what depends
    on it, and it depends on, is in it.
    Every axis of every value has a label; axes that must agree have the same one. An
    axis that is cut into two, or made of two, is their *composite*: heads and features
    of a head. A program of the kernel computes all of some labels (*block*: what is
    reduced or contracted, and what products leave) and one place of each other (*grid*).
    What would be computed again by every place of a grid label, or does not fit into
    registers, is no region.
    Products take part if they are small and no weights are in them: attention.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from stfuse._lower import _tiles
from stfuse._plan import Node
from stfuse._program import Literal, Op, Trace
from stfuse._rules._shape import factor_groups

ELEMENTWISE = frozenset(
    "abs add add_any and ceil clamp convert_element_type copy copy_p cos div eq erf "
    "erfc exp exp2 expm1 floor ge gt integer_pow is_finite le log log1p logistic lt max min mul "
    "ne neg not or rsqrt select_n sin sqrt square stop_gradient sub tanh xor".split()
)
# XLA computes what these read by itself, since it would have to do so many times.
_LONG = frozenset(["erf", "erfc"])
REDUCTIONS = frozenset(["reduce_max", "reduce_min", "reduce_sum"])
_SHAPES = frozenset(["broadcast_in_dim", "reshape", "squeeze", "transpose"])
_TYPES = frozenset("bfloat16 bool float16 float32 int32".split())
_MOST_ELEMENTS = 8192  # of a value in a program's registers
_LEAST_OF_PRODUCT = 16  # of what a matrix unit takes

Member = tuple[int, int | Literal]  # species, value number or literal
Axes = tuple[int | None, ...]  # labels; None is an axis of size one


class Conflict(Exception):
    """Axes that cannot have one label."""


class Labels:
    """Axes that must agree, as sets of labels."""

    def __init__(self) -> None:
        """Start without labels."""
        self.sizes: list[tuple[int, ...]] = []  # per label, of each species
        self._root: list[int] = []
        self._parts: dict[int, tuple[int, ...]] = {}
        self._block: set[int] = set()
        self._product: set[int] = set()

    def new(self, sizes: Sequence[int]) -> int | None:
        """Return a label for an axis of some sizes; None if all are one."""
        if set(sizes) == {1}:
            return None
        self._root.append(len(self._root))
        self.sizes.append(tuple(sizes))
        return self._root[-1]

    def of(self, shapes: Sequence[tuple[int, ...]]) -> Axes:
        """Return labels for a value that is like no other."""
        return tuple(map(self.new, zip(*shapes, strict=True)))

    def find(self, label: int) -> int:
        """Return what stands for all that agree with a label."""
        while self._root[label] != label:
            label = self._root[label]
        return label

    def unify(self, a: int | None, b: int | None) -> None:
        """Say that two axes agree.

        Raises:
            Conflict: they have other sizes, or are composites of unlike parts.
        """
        if a is None or b is None:
            if a is not b:
                raise Conflict
            return
        a, b = self.find(a), self.find(b)
        if a == b:
            return
        if self.sizes[a] != self.sizes[b]:
            raise Conflict
        self._root[b] = a
        own, other = self._parts.get(a), self._parts.pop(b, None)
        if own and other:
            if len(own) != len(other):
                raise Conflict
            for x, y in zip(own, other, strict=True):
                self.unify(x, y)
        elif other:
            self._parts[a] = other

    def compose(self, whole: int, parts: Sequence[int]) -> None:
        """Say that an axis is made of others, the last one walked first."""
        sizes = [self.sizes[p] for p in parts]
        if [math.prod(s) for s in zip(*sizes, strict=True)] != [*self.sizes[whole]]:
            raise Conflict
        made = self.new(self.sizes[whole])
        assert made is not None
        self._parts[made] = tuple(parts)
        self.unify(whole, made)

    def hold(self, axes: Axes, *, is_product: bool = False) -> None:
        """Say that a program needs all of some axes."""
        self._block |= {a for a in axes if a is not None}
        if is_product:
            self._product |= {a for a in axes if a is not None}

    def leaves(self, label: int | None) -> tuple[int, ...]:
        """Return what an axis is made of in the end."""
        if label is None:
            return ()
        root = self.find(label)
        parts = self._parts.get(root)
        return sum(map(self.leaves, parts), ()) if parts else (root,)

    def _leaves_of(self, labels: set[int]) -> set[int]:
        return {leaf for label in labels for leaf in self.leaves(label)}

    def extents(self) -> dict[int, int]:
        """Return how many places of each block label a program holds, a power of 2."""
        products = self._leaves_of(self._product)
        return {
            leaf: max(
                _tiles.power(max(self.sizes[leaf])),
                _LEAST_OF_PRODUCT if leaf in products else 1,
            )
            for leaf in self._leaves_of(self._block)
        }


@dataclass(frozen=True, slots=True)
class Value:
    """What a region reads or computes.

    Attributes:
        axes: its labels.
        shapes: per species, its true shape.
        dtype: its type.
        members: of an input, per species what it is.
    """

    axes: Axes
    shapes: tuple[tuple[int, ...], ...]
    dtype: Any
    members: tuple[Member, ...] = ()


@dataclass(frozen=True, slots=True)
class Step:
    """One launch in a region: values are numbered, inputs first.

    Attributes:
        ops: per species, its op.
        operands: numbers of values, or literals that all species have.
        output: the number of its value.
    """

    ops: tuple[Op, ...]
    operands: tuple[int | Literal, ...]
    output: int


@dataclass(frozen=True, slots=True)
class Region:
    """Launches that one kernel computes.

    Attributes:
        species: who takes part, ascending.
        values: all values, inputs first.
        num_inputs: how many are inputs.
        steps: what to compute, in order.
        outputs: numbers of the values that others read.
        numbers: per output, each species' number of it.
        labels: what axes agree.
        extents: places of each block label in a program.
        grid: the other labels.
    """

    species: tuple[int, ...]
    values: tuple[Value, ...]
    num_inputs: int
    steps: tuple[Step, ...]
    outputs: tuple[int, ...]
    numbers: tuple[tuple[int, ...], ...]
    labels: Labels = field(repr=False)
    extents: Mapping[int, int] = field(default_factory=dict)
    grid: tuple[int, ...] = ()


@dataclass(frozen=True, slots=True)
class Siblings:
    """Products of one value with several weights, for one region: computed as one.

    XLA would make them one too, and then copy each out of what it made.

    Attributes:
        nodes: the launches.
    """

    nodes: tuple[Node, ...]


Programs = Mapping[int, Trace]
Item = Node | Region | Siblings


def schedule(programs: Programs, nodes: Sequence[Node]) -> list[Item]:
    """Return launches in an order in which regions are one each.

    Args:
        programs: per species that takes part, its program.
        nodes: launches of these species only, in running order.

    Returns:
        Every launch, by itself or in a region; operands before readers.
    """
    barred: set[int] = set()
    while True:
        groups = _Groups(programs, nodes, barred)
        found: dict[int, Region] = {}
        is_done = True
        for group, places in groups.members.items():
            if len(places) == 1 or not any(
                _is_anchor(programs, nodes[i]) for i in places
            ):
                continue
            try:
                found[group] = _region(programs, nodes, places)
            except Conflict:
                is_done = False  # without its products, or not at all
                products = {i for i in places if _name(programs, nodes[i]) == _DOT}
                barred |= products or set(places)
        if is_done:
            break
    return list(_ordered(nodes, groups, found, _siblings(programs, nodes, found)))


_DOT = "dot_general"


def _ops(programs: Programs, node: Node) -> list[Op]:
    return [programs[s].ops[i] for s, i in node.members]


def _name(programs: Programs, node: Node) -> str:
    s, i = node.members[0]
    return programs[s].ops[i].name


def _is_anchor(programs: Programs, node: Node) -> bool:
    """Return whether XLA would make no kernel of a launch and its neighbors."""
    ops = _ops(programs, node)
    if ops[0].name == _DOT or ops[0].name in _LONG:
        return True
    if ops[0].name not in REDUCTIONS:
        return False
    axes = ops[0].params["axes"]
    return len({tuple(op.in_specs[0].shape[a] for a in axes) for op in ops}) > 1


def _may_join(programs: Programs, node: Node) -> bool:
    """Return whether a kernel could compute a launch."""
    ops = _ops(programs, node)
    op = ops[0]
    if len(op.outputs) != 1 or node.body is not None:
        return False
    if any(str(s.dtype) not in _TYPES for s in (*op.in_specs, *op.specs)):
        return False
    if any(0 in s.shape for one in ops for s in (*one.in_specs, *one.specs)):
        return False
    if op.name in ELEMENTWISE | REDUCTIONS:
        return not (op.name == "clamp" and len({s.shape for s in op.in_specs}) > 1)
    if op.name in _SHAPES:
        return len(op.in_specs) == 1
    return op.name == _DOT and all(
        _is_small_product(programs[s], one)
        for (s, _), one in zip(node.members, ops, strict=True)
    )


def _is_small_product(program: Trace, op: Op) -> bool:
    """Return whether a product is of two computed matrices, side by side or not."""
    if any(isinstance(x, Literal) or x < program.num_params for x in op.inputs):
        return False
    if not all(str(s.dtype)[:2] in ("bf", "fl") for s in (*op.in_specs, *op.specs)):
        return False
    (contracted, batch) = op.params["dimension_numbers"]
    sizes = []
    for spec, gone, kept in zip(op.in_specs, contracted, batch, strict=True):
        free = set(range(len(spec.shape))) - {*gone, *kept}
        sizes.append(math.prod(_tiles.power(spec.shape[a]) for a in free))
        sizes.append(math.prod(_tiles.power(spec.shape[a]) for a in gone))
    m, k, n, _ = sizes
    return max(m, n) <= 128 and max(m * n, m * k, k * n) <= _MOST_ELEMENTS


class _Groups:
    """Launches that may become regions, grown in running order."""

    def __init__(
        self, programs: Programs, nodes: Sequence[Node], barred: set[int]
    ) -> None:
        self.of: list[int] = []  # per launch its group, a launch's place
        self.members: dict[int, list[int]] = {}
        self.before: dict[int, set[int]] = {}  # what has to run first, all of it
        self._species: dict[int, tuple[int, ...] | None] = {}
        self._waiting: dict[int, set[int]] = {}  # reshapes, and whose values they take
        made: dict[tuple[int, int], int] = {}
        for i, node in enumerate(nodes):
            reads = {
                made[s, atom]
                for (s, _), op in zip(node.members, _ops(programs, node), strict=True)
                for atom in op.inputs
                if not isinstance(atom, Literal) and (s, atom) in made
            }
            is_open = i not in barred and _may_join(programs, node)
            self.of.append(i)
            self.members[i] = [i]
            self._species[i] = node.species if is_open else None
            producers = {self.of[place] for place in reads}
            self.before[i] = set().union(producers, *map(self._before, producers))
            if is_open and self._reads_whole(programs, node, made):
                if _name(programs, node) in _SHAPES:
                    self._waiting[i] = set(reads)
                for place in sorted(reads):
                    self._join_through(i, place)
            for (s, _), op in zip(node.members, _ops(programs, node), strict=True):
                made.update(dict.fromkeys([(s, v) for v in op.outputs], i))
        for i, reads in self._waiting.items():
            if self._is_waiting(self.of[i]):  # its reader is in no region
                for place in sorted(reads):
                    self._join(self.of[i], self.of[place])

    def _join_through(self, i: int, place: int) -> None:
        """Join what a launch reads, and what that waited with."""
        group = self.of[place]
        if not self._is_waiting(group):
            if not self._is_waiting(self.of[i]):
                self._join(i, group)
            return
        beyond = {x for own in self.members[group] for x in self._waiting[own]}
        self._join(i, group)
        if not self._is_waiting(self.of[i]):
            for x in sorted(beyond):
                if self.of[x] != self.of[i]:
                    self._join_through(i, x)

    def _is_waiting(self, group: int) -> bool:
        """Return whether a group only gives its reader another shape.

        What it reads may be far away from there, so it waits for its reader.
        """
        return all(i in self._waiting for i in self.members[group])

    def _before(self, group: int) -> set[int]:
        return self.before[group]

    def _reads_whole(self, programs: Any, node: Node, made: Any) -> bool:
        """Return whether each operand is one launch's output for all species."""
        for column in zip(*(op.inputs for op in _ops(programs, node)), strict=True):
            places = {
                None if isinstance(atom, Literal) else made.get((s, atom))
                for (s, _), atom in zip(node.members, column, strict=True)
            }
            if len(places) > 1:
                return False
        return True

    def _join(self, place: int, group: int) -> None:
        """Make two groups one, if nothing has to run between them."""
        a, b = self.of[place], group
        if a == b or self._species[b] != self._species[a]:
            return
        before = self.before[a] | self.before[b]
        if any(
            p not in (a, b) and (a in self.before[p] or b in self.before[p])
            for p in before
        ):
            return
        for i in self.members.pop(a):
            self.of[i] = b
            self.members[b].append(i)
        self.members[b].sort()
        before -= {a, b}
        del self.before[a]
        self.before[b] = before
        for own in self.before.values():
            if a in own or b in own:
                own -= {a}
                own |= {b} | before


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
        ops = _ops(programs, node)
        if ops[0].name != _DOT or not all(
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
    groups: _Groups,
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
        for p in sorted(set().union(*(groups.before[g] for g in together))):
            yield from emit(p)
        if group in found:
            yield found[group]
        elif len(together) > 1:
            yield Siblings(tuple(nodes[i] for i in together))
        else:
            yield from (nodes[i] for i in groups.members[group])

    for group in sorted(groups.members, key=lambda g: groups.members[g][-1]):
        yield from emit(group)


def _region(programs: Programs, nodes: Sequence[Node], places: Sequence[int]) -> Region:
    """Label a region's axes.

    Raises:
        Conflict: it cannot be one kernel.
    """
    build = _Build(programs, nodes[places[0]].species)
    for i in places:
        build.add(_ops(programs, nodes[i]))
    inside = set(places)
    read = {
        (s, atom)
        for i, node in enumerate(nodes)
        if i not in inside
        for (s, _), op in zip(node.members, _ops(programs, node), strict=True)
        for atom in op.inputs
        if not isinstance(atom, Literal)
    }
    read |= {
        (s, atom)
        for s in build.species
        for atom in programs[s].outputs
        if not isinstance(atom, Literal)
    }
    return build.region(read)


class _Build:
    """A region on its way."""

    def __init__(self, programs: Programs, species: tuple[int, ...]) -> None:
        self.programs, self.species = programs, species
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


def leaves(region: Region, value: Value) -> tuple[int, ...]:
    """Return the labels of a value, composites as their parts."""
    return sum(map(region.labels.leaves, value.axes), ())


def block(region: Region, value: Value) -> tuple[int, ...]:
    """Return the labels of a value that a program holds all of, in order."""
    return tuple(x for x in leaves(region, value) if x in region.extents)


def _check(region: Region) -> None:
    """Refuse what a kernel cannot compute, or not well.

    Raises:
        Conflict: if so.
    """
    for number, value in enumerate(region.values):
        own = leaves(region, value)
        composites = sum(len(region.labels.leaves(a)) > 1 for a in value.axes)
        size = math.prod(region.extents[x] for x in block(region, value))
        if len(set(own)) < len(own) or composites > 1 or size > _MOST_ELEMENTS:
            raise Conflict
        is_outside = number < region.num_inputs or number in region.outputs
        # Neighbors in memory belong into one program.
        if is_outside and len(own) > 1 and own[-1] not in region.extents:
            raise Conflict
    for step in region.steps:
        name = step.ops[0].name
        if name in REDUCTIONS or name == _DOT:
            _check_once(region, step)


def _check_once(region: Region, step: Step) -> None:
    """Refuse a reduction or product that every place of a grid label would repeat."""
    seen: set[int] = set()
    for x in step.operands:
        if isinstance(x, Literal):
            raise Conflict
        own = region.values[x]
        seen |= set(leaves(region, own))
        if step.ops[0].name == _DOT and len(block(region, own)) != 2:
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
    if ops[0].name in _LONG:
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
