"""Where every leaf stands: in the bank, in the staged inputs, in the outputs.

Leaves of several species that one launch reads stand in one array, padded to the
largest; so do outputs that one launch makes. Then a step reads and writes few arrays,
and no launch has to collect its operands.
"""

from __future__ import annotations

import math
from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np

from stfuse._plan import Plan, components, used_together
from stfuse._program import Trace

# A shelf saves arguments, and costs one more slice of something small.
_MANY_STACKS = 32
_SMALL_BYTES = 8192
Counts = Mapping[int, int]  # slots of each species (or bank) that takes part


@dataclass(frozen=True, slots=True)
class Buffer:
    """One array that holds a leaf of each of some species, a row per slot.

    Attributes:
        members: ``(species, leaf)``, species ascending; leaf -1 is a bare carrier of
            rows, for a species without inputs.
        shapes: per member, the leaf's true shape.
        dtype: of them all.
    """

    members: tuple[tuple[int, int], ...]
    shapes: tuple[tuple[int, ...], ...]
    dtype: Any

    def starts(self, counts: Counts) -> dict[int, int]:
        """Return the first row of each species that takes part."""
        starts, at = {}, 0
        for s, _ in self.members:
            if s in counts:
                starts[s] = at
                at += counts[s]
        return starts

    def num_rows(self, counts: Counts) -> int:
        """Return how many rows the species that take part have."""
        return sum(counts.get(s, 0) for s, _ in self.members)

    def shape(self, counts: Counts) -> tuple[int, ...]:
        """Return the padded shape of a row."""
        taking = [
            shape
            for (s, _), shape in zip(self.members, self.shapes, strict=True)
            if s in counts
        ]
        return tuple(map(max, zip(*taking, strict=True)))


@dataclass(frozen=True)  # no slots: what is asked for with every write is kept
class Layout:
    """Where the leaves of a plan stand.

    Attributes:
        components: the sets of species that share launches; each has rows of its own.
        bank_of: per species, whose parameters it has: programs of the same jobs at
            several lengths have one bank between them.
        capacities: slots of each bank.
        params: stacks of parameters; their members are ``(bank, leaf)``.
        shelves: the arrays of the bank: each a stack, or several small ones of one
            shape on a shelf. Every argument costs a call about a microsecond.
        inputs: the staged arrays.
        outputs: the output arrays.
    """

    components: tuple[tuple[int, ...], ...]
    bank_of: tuple[int, ...]
    capacities: tuple[int, ...]
    params: tuple[Buffer, ...]
    shelves: tuple[tuple[int, ...], ...]
    inputs: tuple[Buffer, ...]
    outputs: tuple[Buffer, ...]

    def array_of(self, i: int) -> tuple[int, int | None]:
        """Return which array holds stack ``i``, and its place if that is a shelf."""
        return self._arrays[i]

    def rows_of(self, i: int) -> int:
        """Return how many rows stack ``i`` of the bank has."""
        return self.params[i].num_rows(dict(enumerate(self.capacities)))

    def leaf_rows(self, bank: int) -> dict[int, tuple[int, int, tuple[int, ...]]]:
        """Return where the parameters of a bank stand.

        Returns:
            Per leaf: the stack, the row of slot 0, the leaf's true shape. Everybody
            gets the same dict: it is not to be changed.
        """
        return self._leaf_rows[bank]

    @cached_property
    def _arrays(self) -> dict[int, tuple[int, int | None]]:
        return {
            i: (a, k if len(shelf) > 1 else None)
            for a, shelf in enumerate(self.shelves)
            for k, i in enumerate(shelf)
        }

    @cached_property
    def _leaf_rows(self) -> dict[int, dict[int, tuple[int, int, tuple[int, ...]]]]:
        found: dict[int, Any] = {b: {} for b in range(len(self.capacities))}
        for i, buffer in enumerate(self.params):
            starts = buffer.starts(dict(enumerate(self.capacities)))
            for (b, leaf), shape in zip(buffer.members, buffer.shapes, strict=True):
                found[b][leaf] = (i, starts[b], shape)
        return {b: dict(sorted(own.items())) for b, own in found.items()}

    def cut_places(
        self, counts: Counts, species: int, slot: int
    ) -> tuple[tuple[int, int, tuple[int, ...]], ...]:
        """Return where the outputs of one slot of a species stand.

        Args:
            counts: slots of each species of the step.
            species: which species.
            slot: which of its slots.

        Returns:
            Per output leaf: the array, the row, the leaf's true shape.
        """
        found = {}
        for i, buffer in enumerate(self.outputs):
            for (s, leaf), shape in zip(buffer.members, buffer.shapes, strict=True):
                if s == species:
                    found[leaf] = (i, buffer.starts(counts)[s] + slot, shape)
        return tuple(found[leaf] for leaf in sorted(found))


def lay_out(
    plan: Plan,
    bank_of: Sequence[int],
    capacities: Sequence[int],
    shares: Sequence[Sequence[Hashable]],
) -> Layout:
    """Return the layout that a plan asks for.

    Args:
        plan: who shares which launch.
        bank_of: per species the number of its bank, in order of first occurrence.
        capacities: slots of each bank.
        shares: per species and parameter, None where each slot has its own.
    """
    programs = {s: one.trace for s, one in enumerate(plan.species)}
    first = {b: s for s, b in reversed(list(enumerate(bank_of)))}
    params = used_together(
        programs,
        plan.nodes,
        {s: range(programs[s].num_params) for s in sorted(first.values())},
    )
    inputs = used_together(
        programs,
        plan.nodes,
        {s: range(t.num_params, len(t.specs)) for s, t in programs.items()},
    )
    stacks = tuple(_buffer(programs, group, bank_of) for group in params)
    own = {
        (b, leaf)
        for b, s in first.items()
        for leaf, m in enumerate(shares[s])
        if m is None
    }
    bare = [((s, -1),) for s, t in programs.items() if not t.input_specs]
    return Layout(
        components=components(len(programs), [node.species for node in plan.nodes]),
        bank_of=tuple(bank_of),
        capacities=tuple(capacities),
        params=stacks,
        shelves=_shelve(stacks, capacities, own),
        inputs=(
            *(_buffer(programs, group) for group in inputs),
            *(Buffer(group, ((),), np.dtype(np.int8)) for group in bare),
        ),
        outputs=_outputs(plan, programs),
    )


def _shelve(
    stacks: Sequence[Buffer], capacities: Sequence[int], own: set[tuple[int, int]]
) -> tuple[tuple[int, ...], ...]:
    """Put small stacks of one shape on a shelf, if there are many stacks.

    What all slots share stays apart: it has no rows. So does a lone slot's.
    """
    counts = dict(enumerate(capacities))
    shelves: dict[Any, list[int]] = {}
    for i, buffer in enumerate(stacks):
        shape, rows = buffer.shape(counts), buffer.num_rows(counts)
        size = math.prod(shape) * getattr(buffer.dtype, "itemsize", _SMALL_BYTES + 1)
        is_small = size <= _SMALL_BYTES and rows > 1 and own.issuperset(buffer.members)
        banks = tuple(b for b, _ in buffer.members)
        is_shelved = is_small and len(stacks) > _MANY_STACKS
        key = (banks, shape, buffer.dtype) if is_shelved else i
        shelves.setdefault(key, []).append(i)
    return tuple(map(tuple, shelves.values()))


def _buffer(
    programs: Mapping[int, Trace],
    group: Sequence[tuple[int, int]],
    bank_of: Sequence[int] | None = None,
) -> Buffer:
    """Return the array of a group of values: parameters if banks are given."""
    specs = [programs[s].specs[v] for s, v in group]
    members = [
        (s, v - programs[s].num_params) if bank_of is None else (bank_of[s], v)
        for s, v in group
    ]
    order = sorted(range(len(members)), key=members.__getitem__)
    return Buffer(
        tuple(members[i] for i in order),
        tuple(tuple(specs[i].shape) for i in order),
        specs[0].dtype,
    )


def _outputs(plan: Plan, programs: Mapping[int, Trace]) -> tuple[Buffer, ...]:
    """Group outputs by the launch that makes them."""
    made_by: dict[tuple[int, Any], tuple[int, int]] = {}
    for n, node in enumerate(plan.nodes):
        for s, i in node.members:
            for k, number in enumerate(programs[s].ops[i].outputs):
                made_by[s, number] = (n, k)
    groups: dict[Any, list[tuple[int, int]]] = {}
    for s, trace in programs.items():
        for leaf, (atom, spec) in enumerate(
            zip(trace.outputs, trace.out_specs, strict=True)
        ):
            launch = made_by.get((s, atom)) if isinstance(atom, int) else None
            key = (launch, len(spec.shape), spec.dtype)
            if launch is None or any(s == other for other, _ in groups.get(key, ())):
                key = (s, leaf)  # given, not made; or the same value twice
            groups.setdefault(key, []).append((s, leaf))
    return tuple(
        Buffer(
            tuple(group),
            tuple(tuple(programs[s].out_specs[leaf].shape) for s, leaf in group),
            programs[group[0][0]].out_specs[group[0][1]].dtype,
        )
        for group in groups.values()
    )
