"""What a region is made of, and which primitives a kernel of one can compute."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from stfuse._plan import Node
from stfuse._program import Literal, Op, Trace
from stfuse._regions._axes import Axes, Labels

ELEMENTWISE = frozenset(
    "abs add add_any and ceil convert_element_type copy copy_p cos div eq erf "
    "erfc exp exp2 expm1 floor ge gt integer_pow is_finite le log log1p logistic lt "
    "max min mul ne neg not or rsqrt select_n sin sqrt square stop_gradient sub tanh "
    "xor".split()
)
# XLA computes what these read by itself, since it would have to do so many times.
LONG = frozenset(["erf", "erfc"])
REDUCTIONS = frozenset(["reduce_max", "reduce_min", "reduce_sum"])
SHAPES = frozenset(["broadcast_in_dim", "reshape", "squeeze", "transpose"])
TYPES = frozenset("bfloat16 bool float16 float32 int32".split())
MOST_ELEMENTS = 8192  # of a value in a program's registers
MOST_OF_SCORES = 16384  # of what a program with products makes: 128 x 128
PRODUCT = "dot_general"

Member = tuple[int, int | Literal]  # species, value number or literal
Programs = Mapping[int, Trace]


@dataclass(frozen=True, slots=True)
class Place:
    """Where an operand stands: rows of an array, from some column on.

    Attributes:
        array: ``[rows, *padded]``, or ``[*padded]`` for all slots.
        is_stacked: whether it has rows.
        rows: which row each slot reads.
        column: where in the last axis it begins.
    """

    array: Any
    is_stacked: bool
    rows: tuple[int, ...]
    column: int = 0


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
        nodes: the launches.
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
    nodes: tuple[Node, ...] = field(repr=False)
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


Item = Node | Region | Siblings


def leaves(region: Region, value: Value) -> tuple[int, ...]:
    """Return the labels of a value, composites as their parts."""
    return sum(map(region.labels.leaves, value.axes), ())


def block(region: Region, value: Value) -> tuple[int, ...]:
    """Return the labels of a value that a program holds all of, in order."""
    return tuple(x for x in leaves(region, value) if x in region.extents)


def ops_of(programs: Programs, node: Node) -> list[Op]:
    """Return a launch's ops, one per species."""
    return [programs[s].ops[i] for s, i in node.members]


def name_of(programs: Programs, node: Node) -> str:
    """Return the primitive of a launch."""
    s, i = node.members[0]
    return programs[s].ops[i].name
