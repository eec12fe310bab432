"""Launches that may become regions, grown in running order."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

from stfuse._lower import _tiles
from stfuse._plan import Node
from stfuse._program import Literal, Op, Trace
from stfuse._regions._record import (
    ELEMENTWISE,
    LONG,
    MOST_ELEMENTS,
    PRODUCT,
    REDUCTIONS,
    SHAPES,
    TYPES,
    Programs,
    name_of,
    ops_of,
)


def is_anchor(programs: Programs, node: Node) -> bool:
    """Return whether XLA would make no kernel of a launch and its neighbors."""
    ops = ops_of(programs, node)
    if ops[0].name == PRODUCT or ops[0].name in LONG:
        return True
    if ops[0].name not in REDUCTIONS:
        return False
    axes = ops[0].params["axes"]
    return len({tuple(op.in_specs[0].shape[a] for a in axes) for op in ops}) > 1


def _may_join(programs: Programs, node: Node) -> bool:
    """Return whether a kernel could compute a launch."""
    ops = ops_of(programs, node)
    op = ops[0]
    if len(op.outputs) != 1 or node.body is not None:
        return False
    if any(str(s.dtype) not in TYPES for s in (*op.in_specs, *op.specs)):
        return False
    if any(0 in s.shape for one in ops for s in (*one.in_specs, *one.specs)):
        return False
    if op.name in ELEMENTWISE | REDUCTIONS:
        return not (op.name == "clamp" and len({s.shape for s in op.in_specs}) > 1)
    if op.name in SHAPES:
        return len(op.in_specs) == 1
    return op.name == PRODUCT and all(
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
    return max(m, n) <= 128 and max(m * n, m * k, k * n) <= MOST_ELEMENTS


class Groups:
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
                for (s, _), op in zip(node.members, ops_of(programs, node), strict=True)
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
                if name_of(programs, node) in SHAPES:
                    self._waiting[i] = set(reads)
                for place in sorted(reads):
                    self._join_through(i, place)
            for (s, _), op in zip(node.members, ops_of(programs, node), strict=True):
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
        if self.of[i] == self.of[place] and not self._is_waiting(self.of[i]):
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
        for column in zip(*(op.inputs for op in ops_of(programs, node)), strict=True):
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
