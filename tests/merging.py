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
    if np.issubdtype(dtype, np.bool_):
        return True
    return jnp.iinfo(dtype).max


def stack_of(op: Op, i: int, members: Sequence[Any], fill: Any) -> Stack:
    """Return operand ``i`` of a wide op: the members' values, padded with ``fill``.

    Zero is clean; "even" and "odd" are zero along those axes, else the worst.
    """
    shape, dtype = op.in_specs[i].shape, op.in_specs[i].dtype
    clean = tuple(
        a % 2 == ["even", "odd"].index(fill) if isinstance(fill, str) else fill == 0
        for a in range(len(shape))
    )
    worst = poison_of(dtype) if isinstance(fill, str) else fill
    rows = [pad_to(x, shape, worst) for x in members]
    for row, x in zip(rows, members, strict=True):
        for a in range(len(shape)) if isinstance(fill, str) else ():
            if clean[a]:
                row[(slice(None),) * a + (slice(np.shape(x)[a], None),)] = 0
    sizes = np.array([np.shape(x) for x in members], int).reshape(len(rows), -1)
    return Stack(jnp.asarray(np.stack(rows)), True, sizes, clean)


def merged(
    name: str,
    members: Sequence[Member],
    fill: Any,
    shared: Sequence[int] = (),
    is_compiled: bool = False,
) -> tuple[list, list]:
    """Return each member's outputs alone, and the stacks of the merged launch.

    A member's operands are the args that its function passes to the primitive, in
    order; literals of the traced op are taken from there. ``shared`` operands, equal in
    all members, have no row axis. ``fill`` may be a tuple, of one for each operand.
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
    fills = fill if isinstance(fill, tuple) else (fill,) * len(wide.in_specs)
    operands = [
        stack_of(
            wide,
            i,
            [own[i] for own in values],
            poison_of(spec.dtype) if fills[i] is None else fills[i],
        )
        for i, spec in enumerate(wide.in_specs)
    ]
    for i in shared:
        operands[i] = replace(operands[i], array=operands[i].array[0], is_stacked=False)
    alone = [op.bind_fn(*own) for op, own in zip(ops, values, strict=True)]
    merge = Merge(tuple(ops), (1,) * len(ops), wide, compute)
    held = []

    def run(*arrays: Any) -> list[Any]:
        ins = [replace(x, array=a) for x, a in zip(operands, arrays, strict=True)]
        held[:] = _rules.launch(merge, ins)
        return [x.array for x in held]

    outs = (jax.jit(run) if is_compiled else run)(*(x.array for x in operands))
    return alone, [replace(x, array=y) for x, y in zip(held, outs, strict=True)]


def check(
    name: str,
    members: Sequence[Member],
    rtol: float = 0.0,
    atol: float = 0.0,
    fills: Sequence[Any] = (None, 0),
    shared: Sequence[int] = (),
    is_compiled: bool = False,
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
        fills: what padding holds, see `stack_of`; None is the worst everywhere.
        shared: operands that are equal in all members, to be given without a row axis.
        is_compiled: whether to compile the launch as one: faster, if it is many ops.
    """
    for fill in fills:
        alone, stacks = merged(name, members, fill, shared, is_compiled)
        for i, stack in enumerate(stacks):
            array = np.asarray(_rules.to_stacked(stack).array)
            for row, outs in enumerate(alone):
                want = np.asarray(outs[i])
                own = array[(row, *map(slice, want.shape))]
                assert own.dtype == want.dtype and own.shape == want.shape
                assert tuple(stack.sizes[row]) == want.shape
                if want.dtype.kind == "V":  # NumPy sees no NaN in a bfloat16
                    own, want = own.astype("f"), want.astype("f")
                if rtol or atol:
                    np.testing.assert_allclose(own, want, rtol=rtol, atol=atol)
                else:
                    np.testing.assert_array_equal(own, want)
                for axis, is_clean in enumerate(stack.clean):
                    if is_clean:
                        rest = (slice(None),) * axis + (slice(want.shape[axis], None),)
                        assert not array[row][rest].any(), f"axis {axis} is not zero"


def poisoned(x: Stack) -> Stack:
    """Return a stack with the worst values in all padding that is not clean."""
    if not x.shape:
        return x
    array = np.array(_rules.to_stacked(x).array)
    for row, sizes in zip(array, x.sizes, strict=True):
        places = np.indices(row.shape, sparse=True)
        ends = [p >= n for p, n in zip(places, sizes, strict=True)]
        bad, zero = np.zeros(row.shape, bool), np.zeros(row.shape, bool)
        for end, is_clean in zip(ends, x.clean, strict=True):
            bad, zero = bad | end, zero | (end & is_clean)
        row[bad & ~zero] = poison_of(row.dtype)
    return replace(x, array=jnp.asarray(array), is_stacked=True)


def check_program(fn: Callable[..., Any], members: Sequence[Sequence[Any]]) -> None:
    """Check a function whose every op is one launch, poisoned before each."""
    jobs = [
        stfuse.Job("job", lambda p, x: fn(*x), (), xs, batched=False) for xs in members
    ]
    traces = [_trace.trace(job) for job in jobs]
    env: dict[int, Stack] = {}

    def read(atoms: Sequence[int | Literal]) -> Stack:
        if not isinstance(atoms[0], Literal):
            return poisoned(env[atoms[0]])
        values = jnp.stack([jnp.asarray(a.value, a.spec.dtype) for a in atoms])
        return Stack(values, True, np.zeros((len(atoms), 0), int), ())

    for i, xs in enumerate(zip(*members, strict=True)):
        sizes = np.array([x.shape for x in xs]).reshape(len(xs), -1)
        wide = sizes.max(0)
        rows = [pad_to(x, wide, 0) for x in xs]
        env[i] = Stack(np.stack(rows), True, sizes, (False,) * len(wide))
    for ops in zip(*(t.ops for t in traces), strict=True):
        assert len({_rules.form(op) for op in ops}) == 1, ops[0].name
        merge = Merge(tuple(ops), (1,) * len(ops), _rules.widen(ops), compute)
        operands = [
            read(column) for column in zip(*(op.inputs for op in ops), strict=True)
        ]
        outs = _rules.launch(merge, operands)
        env.update(zip(ops[0].outputs, outs, strict=True))
    stack = poisoned(env[traces[0].outputs[0]])
    for row, xs in zip(np.asarray(stack.array), members, strict=True):
        want = np.asarray(fn(*map(jnp.asarray, xs)))
        np.testing.assert_array_equal(row[tuple(map(slice, want.shape))], want)


def share(name: str, members: Sequence[Member]) -> bool:
    """Return whether some ops may share a launch."""
    return len({_rules.form(op_of(name, fn, args)) for fn, args in members}) == 1
