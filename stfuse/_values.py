"""Values of several species in one array, and how a launch reads them.

A launch reads each operand as one stack in the order of its members. If its values
stand there already, in that order, they are used as they are; else they are cropped,
padded and concatenated, and the result is kept for later readers. Padding is whatever
came out, except where an axis is marked clean: zero.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from stfuse import _rules
from stfuse._program import Literal, Trace
from stfuse._regions import Place
from stfuse._rules import Stack

Atom = int | Literal
Value = tuple[int, Atom]  # species, value number or literal


@dataclass(frozen=True, slots=True, eq=False)
class Held:
    """One array that holds a value of some species; compared by identity.

    Attributes:
        array: ``[R, *padded]``, or ``[*padded]`` for all rows.
        is_stacked: whether it has rows.
        clean: per axis of a row, whether its padding is zero.
        starts: per species its first row.
        index: if not None, which rows of the array are meant, in order: a stack of
            which only some slots take part, not gathered before someone has to.
        within: if not None, an array that has this one inside, and from which row and
            column on: a kernel that computes addresses reads it there, uncut.
    """

    array: Any
    is_stacked: bool
    clean: tuple[bool, ...]
    starts: Mapping[int, int]
    index: Any = None
    within: tuple[Any, int, int] | None = None

    @property
    def shape(self) -> tuple[int, ...]:
        """The padded shape of one row."""
        return tuple(self.array.shape[self.is_stacked :])


@dataclass(slots=True)
class Env:
    """The values of an evaluation.

    Attributes:
        programs: per species that takes part, its program.
        counts: per species, its slots.
        values: what is known so far, by species and value number.
    """

    programs: Mapping[int, Trace]
    counts: Mapping[int, int]
    values: dict[tuple[int, int], Held] = field(default_factory=dict)

    def spec(self, value: Value) -> jax.ShapeDtypeStruct:
        """Return the true shape and dtype of a program's input or parameter."""
        s, number = value
        return self.programs[s].specs[number]  # type: ignore[index]

    def held(self, value: tuple[int, int]) -> Held:
        """Return the array that holds a value, gathered if it was not."""
        found = self.values[value]
        if found.index is None:
            return found
        array = jnp.take(found.array, found.index, axis=0, mode="clip")
        ready = replace(found, array=array, index=None)
        for other, held in self.values.items():
            if held is found:
                self.values[other] = ready
        return ready

    def put(self, species: Sequence[int], numbers: Sequence[int], x: Stack) -> Held:
        """Keep a stack as a value of some species, rows in their order."""
        held = Held(x.array, x.is_stacked, x.clean, self.starts(species))
        for s, number in zip(species, numbers, strict=True):
            self.values[s, number] = held
        return held

    def starts(self, species: Sequence[int]) -> dict[int, int]:
        """Return each species' first row in a stack of some species."""
        starts, at = {}, 0
        for s in species:
            starts[s] = at
            at += self.counts[s]
        return starts


def read(
    env: Env,
    values: Sequence[Value],
    specs: Sequence[jax.ShapeDtypeStruct],
    shape: tuple[int, ...],
) -> Stack:
    """Return values of some species as one stack.

    Args:
        env: the values.
        values: per species its value.
        specs: per species the value's true shape.
        shape: what to pad (and crop) a row to.

    Returns:
        The stack, rows in the order given; without a row axis if all share one array.
    """
    counts = [env.counts[s] for s, _ in values]
    sizes = np.repeat([spec.shape for spec in specs], counts, axis=0)
    sizes = sizes.astype(int).reshape(sum(counts), len(shape))
    ready = _lined_up(env, values, counts)
    if ready is not None:
        return _fit(replace(ready, sizes=sizes), shape)
    pieces, at = [], 0
    for value, spec, count in zip(values, specs, counts, strict=True):
        piece = _piece(env, value, spec, count, sizes[at : at + count])
        pieces.append(_fit(piece, shape))
        at += count
    return _joined(env, values, pieces, sizes)


def place(
    env: Env, values: Sequence[Value], specs: Sequence[jax.ShapeDtypeStruct]
) -> Place:
    """Return where values of some species stand; moved together if they do not yet.

    Args:
        env: the values.
        values: per species its value.
        specs: per species the value's true shape.
    """
    counts = [env.counts[s] for s, _ in values]
    held = _common(env, values)
    if held is not None:
        array, first, column = held.within or (held.array, 0, 0)
        starts = [held.starts[s] for s, _ in values] if held.is_stacked else []
        rows = [range(at, at + n) for at, n in zip(starts, counts, strict=False)]
        numbers = tuple(first + i for own in rows for i in own)
        return Place(array, held.is_stacked, numbers, column)
    x = read(env, values, specs, _rules.widest([spec.shape for spec in specs]))
    return Place(x.array, x.is_stacked, tuple(range(sum(counts))))


def _common(env: Env, values: Sequence[Value]) -> Held | None:
    """Return the array that holds all of some values, if one does."""
    if any(isinstance(atom, Literal) for _, atom in values):
        return None
    found = [env.held((s, atom)) for s, atom in values]  # type: ignore[arg-type]
    return found[0] if all(held is found[0] for held in found) else None


def _first_row(
    held: Held, values: Sequence[Value], counts: Sequence[int]
) -> int | None:
    """Return where values' rows begin in an array; None if they are not in order."""
    if not held.is_stacked:
        return 0
    start = at = held.starts[values[0][0]]
    for (s, _), count in zip(values, counts, strict=True):
        if held.starts[s] != at:
            return None
        at += count
    return start


def _lined_up(env: Env, values: Sequence[Value], counts: Sequence[int]) -> Stack | None:
    """Return the array where all values stand in order already, if there is one."""
    if isinstance(values[0][1], Literal):
        return _constant(values, counts)
    held = _common(env, values)
    row = None if held is None else _first_row(held, values, counts)
    if held is None or row is None:
        return None
    array, num_rows = held.array, sum(counts)
    if held.is_stacked and num_rows != array.shape[0]:
        array = lax.slice_in_dim(array, row, row + num_rows)
    return Stack(array, held.is_stacked, np.zeros((num_rows, 0)), held.clean)


def _constant(values: Sequence[Value], counts: Sequence[int]) -> Stack | None:
    """Return literals as a constant: one for all rows, or one a row."""
    atoms = [atom for _, atom in values]
    if not all(isinstance(atom, Literal) for atom in atoms):
        return None
    specs = [atom.spec for atom in atoms]  # type: ignore[union-attr]
    if any(spec.shape != specs[0].shape for spec in specs):
        return None
    arrays = [np.asarray(atom.value, atom.spec.dtype) for atom in atoms]  # type: ignore[union-attr]
    ndim, clean = len(specs[0].shape), (False,) * len(specs[0].shape)
    if all(x.tobytes() == arrays[0].tobytes() for x in arrays):
        array, is_stacked = jnp.asarray(arrays[0], specs[0].dtype), False
    else:
        array, is_stacked = jnp.asarray(np.repeat(arrays, counts, axis=0)), True
    return Stack(array, is_stacked, np.zeros((sum(counts), ndim)), clean)


def _piece(env: Env, value: Value, spec: Any, count: int, sizes: np.ndarray) -> Stack:
    """Return one species' value by itself."""
    s, atom = value
    if isinstance(atom, Literal):
        array = jnp.asarray(atom.value, atom.spec.dtype)
        return Stack(array, False, sizes, (False,) * len(spec.shape))
    held = env.held((s, atom))
    array = held.array
    if held.is_stacked:
        start = held.starts[s]
        if count != array.shape[0]:
            array = lax.slice_in_dim(array, start, start + count)
    return Stack(array, held.is_stacked, sizes, held.clean)


def _joined(
    env: Env, values: Sequence[Value], pieces: Sequence[Stack], sizes: np.ndarray
) -> Stack:
    """Concatenate pieces, and keep the result for later readers."""
    clean = tuple(
        all(x.is_zero_padded(axis) for x in pieces) for axis in range(sizes.shape[1])
    )
    arrays = [_rules.to_stacked(x).array for x in pieces]
    array = arrays[0] if len(arrays) == 1 else lax.concatenate(arrays, 0)
    held = Held(array, True, clean, env.starts([s for s, _ in values]))
    for s, atom in values:
        if not isinstance(atom, Literal):
            env.values[s, atom] = held
    return Stack(array, True, sizes, clean)


def _fit(x: Stack, shape: tuple[int, ...]) -> Stack:
    """Crop and pad (with zeros) each row to a shape that holds its true size."""
    if x.shape == shape:
        return x
    array, lead = x.array, int(x.is_stacked)
    smaller = tuple(map(min, x.shape, shape))
    if smaller != x.shape:
        rows = array.shape[:1] if x.is_stacked else ()
        array = lax.slice(array, (0,) * array.ndim, (*rows, *smaller))
    x = replace(x, array=array)
    if smaller == shape:
        return x
    clean = tuple(
        x.clean[a] or bool((x.sizes[:, a] == small).all())
        if small < want
        else x.clean[a]
        for a, (small, want) in enumerate(zip(smaller, shape, strict=True))
    )
    more = [(0, want - small) for small, want in zip(smaller, shape, strict=True)]
    array = jnp.pad(array, [(0, 0)] * lead + more)
    return replace(x, array=array, clean=clean)


def assemble(
    env: Env, values: Sequence[Value], specs: Sequence[Any], *, is_masked: bool = False
) -> Stack:
    """Return values as one stack with rows, padded to the largest.

    Args:
        env: the values.
        values: per species its value.
        specs: per species the value's true shape.
        is_masked: whether padding must be zero.
    """
    shape = _rules.widest([spec.shape for spec in specs])
    x = _rules.to_stacked(read(env, values, specs, shape))
    return _rules.mask(x, range(len(shape))) if is_masked else x
