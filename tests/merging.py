"""Launches of one primitive, merged by hand: what every rule is tested with."""

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

import stfuse
from stfuse import _rules, _trace
from stfuse._program import Literal, Op
from stfuse._rules import Merge, Stack

Member = tuple[Callable[..., Any], tuple[Any, ...]]


def op_of(name: str, fn: Callable[..., Any], args: Sequence[Any]) -> Op:
    """Return the one op of a primitive in a function's trace."""
    args = tuple(args)
    job = stfuse.Job("job", lambda p, x: fn(*x), (), args, batched=False)
    (op,) = [op for op in _trace.trace(job).ops if op.name == name]
    return op


def compute(op: Op, arrays: Sequence[Any], flags: Sequence[bool]) -> tuple[Any, ...]:
    """Map an op over the rows of its stacked operands."""
    if not any(flags):
        return op.bind_fn(*arrays)
    return jax.vmap(op.bind_fn, in_axes=[0 if f else None for f in flags])(*arrays)


def pad_to(x: Any, shape: Sequence[int], fill: Any) -> Any:
    """Return an array padded at the end of each axis."""
    x = np.asarray(x)
    wide = np.full(shape, fill, x.dtype)
    wide[tuple(map(slice, x.shape))] = x
    return wide


def poison_of(dtype: Any) -> Any:
    """Return the worst value that padding can hold."""
    if jnp.issubdtype(dtype, np.inexact):
        return np.nan
    if dtype == bool:
        return True
    return np.iinfo(dtype).max


def stack_of(op: Op, i: int, members: Sequence[Any], fill: Any) -> Stack:
    """Return operand ``i`` of a wide op: the members' values, padded with ``fill``."""
    spec = op.in_specs[i]
    rows = [pad_to(x, spec.shape, fill) for x in members]
    sizes = np.array([np.shape(x) for x in members], int).reshape(len(rows), -1)
    is_clean = fill == 0
    array = jnp.asarray(np.stack(rows))
    return Stack(array, True, sizes, (is_clean,) * len(spec.shape))


def merged(name: str, members: Sequence[Member], fill: Any) -> tuple[list, list]:
    """Return each member's outputs alone, and the stacks of the merged launch.

    A member's operands are the args that its function passes to the primitive, in
    order; literals of the traced op are taken from there.
    """
    ops = [op_of(name, fn, args) for fn, args in members]
    forms = {_rules.form(op) for op in ops}
    assert len(forms) == 1, f"these do not share a launch: {forms}"
    wide = _rules.widen(ops)
    values = [
        [
            np.asarray(atom.value, atom.spec.dtype)
            if isinstance(atom, Literal)
            else args[atom]
            for atom in op.inputs
        ]
        for op, (_, args) in zip(ops, members, strict=True)
    ]
    operands = [
        stack_of(
            wide,
            i,
            [own[i] for own in values],
            poison_of(spec.dtype) if fill is None else fill,
        )
        for i, spec in enumerate(wide.in_specs)
    ]
    alone = [op.bind_fn(*own) for op, own in zip(ops, values, strict=True)]
    merge = Merge(tuple(ops), (1,) * len(ops), wide, compute)
    return alone, launched(merge, operands)


def launched(merge: Merge, operands: Sequence[Stack]) -> list[Stack]:
    """Launch in one compiled step, as an engine does."""
    outs: list[Stack] = []

    def step(arrays: Sequence[Any]) -> list[Any]:
        rows = [replace(x, array=a) for x, a in zip(operands, arrays, strict=True)]
        outs[:] = _rules.launch(merge, rows)
        return [y.array for y in outs]

    arrays = jax.jit(step)([x.array for x in operands])
    return [replace(y, array=a) for y, a in zip(outs, arrays, strict=True)]


def check(
    name: str, members: Sequence[Member], rtol: float = 0.0, atol: float = 0.0
) -> None:
    """Check one merged launch against its members alone.

    Run with worst-case padding and with zero padding; what a stack calls clean must be
    zero. ``rtol`` 0 asks for equal bits.

    Args:
        name: the primitive.
        members: per job a function and its arguments; the function must pass each
            argument to the primitive as it is.
        rtol: relative tolerance.
        atol: absolute tolerance.
    """
    for fill in (None, 0):
        alone, stacks = merged(name, members, fill)
        for i, stack in enumerate(stacks):
            array = np.asarray(_rules.to_stacked(stack).array)
            for row, outs in enumerate(alone):
                want = np.asarray(outs[i])
                own = array[(row, *map(slice, want.shape))]
                assert own.dtype == want.dtype and own.shape == want.shape
                assert tuple(stack.sizes[row]) == want.shape
                if jnp.issubdtype(own.dtype, np.floating):
                    # Exact, and NumPy knows its NaN.
                    own, want = (np.asarray(x, np.float64) for x in (own, want))
                if rtol or atol:
                    np.testing.assert_allclose(own, want, rtol=rtol, atol=atol)
                else:
                    np.testing.assert_array_equal(own, want)
                for axis, is_clean in enumerate(stack.clean):
                    if is_clean:
                        rest = (slice(None),) * axis + (slice(want.shape[axis], None),)
                        assert not array[row][rest].any(), f"axis {axis} is not zero"


def share(name: str, members: Sequence[Member]) -> bool:
    """Return whether some ops may share a launch."""
    return len({_rules.form(op_of(name, fn, args)) for fn, args in members}) == 1
