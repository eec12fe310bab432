"""Launches that may become regions, grown in running order."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np

from stfuse._lower import _tiles
from stfuse._plan import Node
from stfuse._program import Literal, Op, Trace
from stfuse._regions._record import (
    ELEMENTWISE,
    LONG,
    MOST_OF_SCORES,
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
    if op.name in REDUCTIONS:
        return op.in_specs[0].dtype != np.bool_
    if op.name in ELEMENTWISE:
        return op.name != "select_n" or len(op.in_specs) == 3  # of two cases
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
    return max(m, n) <= 128 and max(m * n, m * k, k * n) <= MOST_OF_SCORES


class Groups:
    """Launches that may become regions, grown in running order.

    Attributes:
        of: per launch its group, named by the place of one of its launches.
        members: per group, the places of its launches, ascending.
    """

    def __init__(
        self, programs: Programs, nodes: Sequence[Node], barred: set[int]
    ) -> None:
        """Group launches; those barred stay by themselves."""
        self.of: list[int] = []
        self.members: dict[int, list[int]] = {}
        self._before: list[int] = []  # per group the groups that run first, as bits
        self._after: list[int] = []  # and those that wait for it
        self._species: list[tuple[int, ...] | None] = []
        self._waiting: dict[int, set[int]] = {}  # reshapes, and whose values they take
        made: dict[tuple[int, int], int] = {}
        for i, node in enumerate(nodes):
            ops = list(zip(node.members, ops_of(programs, node), strict=True))
            reads = {
                made[s, atom]
                for (s, _), op in ops
                for atom in op.inputs
                if not isinstance(atom, Literal) and (s, atom) in made
            }
            is_open = i not in barred and _may_join(programs, node)
            self._append(i, node.species if is_open else None, reads)
            if is_open and self._reads_whole(programs, node, made):
                if name_of(programs, node) in SHAPES:
                    self._waiting[i] = reads
                for place in sorted(reads):
                    self._join_through(i, place)
            made.update({(s, v): i for (s, _), op in ops for v in op.outputs})
        for i, reads in self._waiting.items():
            if self._is_waiting(self.of[i]):  # its reader is in no region
                for place in sorted(reads):
                    self._join(self.of[i], self.of[place])

    def before(self, group: int) -> list[int]:
        """Return the groups that have to run before one, ascending."""
        return _numbers(self._before[group])

    def _append(self, i: int, species: tuple[int, ...] | None, reads: set[int]) -> None:
        """Make a launch a group of its own."""
        self.of.append(i)
        self.members[i] = [i]
        self._species.append(species)
        before = 0
        for group in {self.of[place] for place in reads}:
            before |= self._before[group] | 1 << group
        self._before.append(before)
        self._after.append(0)
        for group in _numbers(before):
            self._after[group] |= 1 << i

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
        own = 1 << a | 1 << b
        before = (self._before[a] | self._before[b]) & ~own
        after = (self._after[a] | self._after[b]) & ~own
        if before & after:
            return
        for i in self.members.pop(a):
            self.of[i] = b
            self.members[b].append(i)
        self.members[b].sort()
        self._before[b], self._after[b] = before, after
        for p in _numbers(before):
            self._after[p] = self._after[p] & ~own | after | 1 << b
        for p in _numbers(after):
            self._before[p] = self._before[p] & ~own | before | 1 << b


def _numbers(bits: int) -> list[int]:
    """Return which bits are set, ascending."""
    found = []
    while bits:
        lowest = bits & -bits
        found.append(lowest.bit_length() - 1)
        bits ^= lowest
    return found
