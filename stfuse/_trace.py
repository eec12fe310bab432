"""Job to Trace, a tuple of plain Op records. The only file that knows jaxprs.

Rules:
    Calls that only wrap a body (jit, custom_jvp, custom_vjp, remat, closed_call) are
    inlined; loops, branches and unknown higher-order primitives stay one opaque op.
    Arrays that a function closed over become parameters, wherever they hide.
    Values are numbered in trace order: parameters, then inputs, then op outputs.
    Two traces are interchangeable exactly when their ``key`` is equal.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Hashable, Sequence
from functools import partial
from typing import Any

import jax
import numpy as np
from jax import lax
from jax.extend import core as jex

from stfuse import _tree
from stfuse._errors import JobError
from stfuse._fingerprint import Key, canonical, literal_form, params_form
from stfuse._job import Job
from stfuse._program import (
    Literal,
    Op,
    Trace,
    bind_mapped,
    bind_with,
    is_inexact,
    is_looped,
    op_bytes,
    op_flops,
    shapes_of,
)

_INLINED = frozenset(
    "jit pjit custom_jvp_call custom_vjp_call custom_vjp_call_jaxpr remat remat2 "
    "checkpoint closed_call core_call".split()
)
_WIDE = frozenset(map(np.dtype, ("int64", "uint64", "float64", "complex128")))
_TRACES: weakref.WeakKeyDictionary[Any, Trace] = weakref.WeakKeyDictionary()
_NO_TRACE = jex.get_opaque_trace_state()


def is_within() -> bool:
    """Return whether this is called while JAX traces, or maps, whatever is around."""
    return jex.get_opaque_trace_state() != _NO_TRACE


def trace(job: Job) -> Trace:
    """Return the job's program at one row.

    Its parameters are the leaves of ``job.params``, then the closed-over arrays.

    Raises:
        JobError: it has numbers of 64 bits, and JAX has none on this thread.

    Example:
        >>> job = Job("sum", lambda p, x: x @ p, np.ones((3, 2), "f"), np.ones((1, 3)))
        >>> [op.name for op in trace(job).ops if op.is_heavy]
        ['dot_general']
    """
    if job.jaxpr not in _TRACES:
        _TRACES[job.jaxpr] = _flatten(job.jaxpr, len(jax.tree.leaves(job.params)))
    check_width(job, _TRACES[job.jaxpr], is_wide=jax.config.jax_enable_x64)  # pyright: ignore
    return _TRACES[job.jaxpr]


def check_width(job: Job, traced: Trace, *, is_wide: bool) -> None:
    """Refuse a job whose numbers JAX would cut to 32 bits without a word.

    Args:
        job: whose program it is.
        traced: the program.
        is_wide: whether numbers of 64 bits stay such where it is to run.

    Raises:
        JobError: they do not.
    """
    specs = [*traced.param_specs, *traced.input_specs]
    specs += [spec for op in traced.ops for spec in op.specs]
    dtypes = {s.dtype for s in specs if isinstance(s.dtype, np.dtype)}
    wide = sorted(str(d) for d in dtypes if not is_wide and d in _WIDE)
    if wide:
        raise JobError(
            f"job '{job.name}' has values of {', '.join(wide)}, which JAX takes for 32 "
            f"bits here; set `jax_enable_x64` where `stfuse.fuse` and "
            f"`stfuse.Engine` are called, too, not only where the job is made.",
            jobs=(job.name,),
        )


def trace_body(op: Op) -> Trace:
    """Return a scan's body; its inputs are the constants, the carries, one step's xs.

    Arrays that the body closed over are its parameters, held in ``consts``.
    """
    body = op.params["jaxpr"]
    if body not in _TRACES:
        _TRACES[body] = _flatten(body, 0)
    return _TRACES[body]


def scan_parts(op: Op) -> tuple[int, int, int]:
    """Return how many of a scan's operands are constants, carries and xs.

    Read off the ranks: the parameters that say it differ between JAX versions.
    """
    body = trace_body(op)
    ins = zip(op.in_specs, body.input_specs, strict=True)
    num_xs = sum(len(x.shape) > len(b.shape) for x, b in ins)
    outs = zip(op.specs, body.out_specs, strict=True)
    num_carries = sum(len(y.shape) == len(b.shape) for y, b in outs)
    return len(op.in_specs) - num_carries - num_xs, num_carries, num_xs


def trace_vjp(job: Job, num_rows: int) -> Trace:
    """Return the program of the job's reverse derivative over ``num_rows`` rows.

    It is differentiated before it is flattened, so JAX applies every custom rule.
    Closed-over arrays are constants: they get no cotangent.

    Args:
        job: whose derivative it is.
        num_rows: B; the cotangents of the parameters are summed over rows.

    Returns:
        A trace whose parameters are those of `trace`; whose inputs are the inputs
        ``[B, ...]``, then one cotangent ``[B, ...]`` per inexact output; and whose
        outputs are the cotangents of the inexact parameters, then inexact inputs.
    """
    forward = trace(job)
    num_own = forward.num_params - len(forward.consts)

    def with_rows(spec: jax.ShapeDtypeStruct) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct((num_rows, *spec.shape), spec.dtype)

    def backward(map_fn: Any, params: Any, rows: Any, cotangents: Any) -> Any:
        def apply(moving: Any) -> Any:
            values = merge_inexact((*params, *rows), moving)
            row_fn = partial(_evaluate, job.jaxpr, values[:num_own])
            outs = map_fn(row_fn, values[num_own:], num_rows)
            return tuple(y for y in outs if is_inexact(y))

        moving = tuple(v for v in (*params, *rows) if is_inexact(v))
        return jax.vjp(apply, moving)[1](cotangents)[0]

    specs = (
        forward.param_specs[:num_own],
        tuple(map(with_rows, forward.input_specs)),
        tuple(with_rows(s) for s in forward.out_specs if is_inexact(s)),
    )
    try:
        jaxpr = jax.make_jaxpr(partial(backward, _map_for(forward)))(*specs)
    except NotImplementedError:  # JAX cannot map one of the ops
        jaxpr = jax.make_jaxpr(partial(backward, _in_turn))(*specs)
    return _flatten(jaxpr, num_own, forward.consts)


def _map_for(forward: Trace) -> Callable[..., Any]:
    """Return what applies a program to all rows, as `bind_mapped` does to its ops."""
    ops = ((op.name, op.params, (*op.in_specs, *op.specs)) for op in forward.ops)
    return _in_turn if any(is_looped(*op) for op in ops) else _at_once


def _at_once(row_fn: Callable[[Any], Any], rows: Any, num_rows: int) -> Any:
    return jax.vmap(row_fn, axis_size=num_rows)(rows)


def _in_turn(row_fn: Callable[[Any], Any], rows: Any, num_rows: int) -> Any:
    return lax.scan(lambda _, x: (None, row_fn(x)), None, rows, length=num_rows)[1]


def merge_inexact(values: Sequence[Any], moving: Sequence[Any]) -> tuple[Any, ...]:
    """Return ``values`` with its inexact members replaced by ``moving``, in order."""
    left = iter(moving)
    return tuple(next(left) if is_inexact(v) else v for v in values)


def _evaluate(jaxpr: Any, params: Sequence[Any], row: Sequence[Any]) -> list[Any]:
    """Evaluate a jaxpr, custom derivative rules included."""
    open_jaxpr = getattr(jaxpr, "jaxpr", jaxpr)
    env = dict(zip(open_jaxpr.constvars, jaxpr.consts, strict=True))
    env.update(zip(open_jaxpr.invars, (*params, *row), strict=True))

    def read(atom: Any) -> Any:
        return atom.val if isinstance(atom, jex.Literal) else env[atom]

    for eqn in open_jaxpr.eqns:
        outs = bind_with(eqn.primitive, eqn.params)(*map(read, eqn.invars))
        env.update(zip(eqn.outvars, outs, strict=True))
    return [read(v) for v in open_jaxpr.outvars]


class _Value:
    """A named intermediate; compared by identity."""

    __slots__ = ("spec",)

    def __init__(self, spec: jax.ShapeDtypeStruct) -> None:
        self.spec = spec


class _Walk:
    """Collects the ops and constants of a jaxpr and of the bodies it wraps."""

    def __init__(self, known_consts: Sequence[Any] | None) -> None:
        self.ops: list[tuple[Any, list[Any], list[_Value]]] = []
        self.is_closed = known_consts is not None
        self.consts = [(_Value(_tree.spec_of(c)), c) for c in known_consts or ()]

    def body(self, jaxpr: Any, operands: Sequence[Any]) -> list[Any]:
        """Append a body's ops; return what its outputs are called outside."""
        open_jaxpr = getattr(jaxpr, "jaxpr", jaxpr)
        env: dict[Any, Any] = dict(zip(open_jaxpr.invars, operands, strict=True))
        consts = getattr(jaxpr, "consts", ())
        env.update(zip(open_jaxpr.constvars, map(self.const, consts), strict=True))

        def read(atom: Any) -> Any:
            if not isinstance(atom, jex.Literal):
                return env[atom]
            if np.ndim(atom.val):  # an array written into the program
                return self.const(atom.val)
            return Literal(atom.val, _spec(atom.aval))

        for eqn in open_jaxpr.eqns:
            ins = [read(v) for v in eqn.invars]
            if eqn.primitive.name in _INLINED:
                body = eqn.params.get("jaxpr", eqn.params.get("call_jaxpr"))
                outs = self.body(body, ins)
            else:
                outs = [_Value(_spec(v.aval)) for v in eqn.outvars]
                self.ops.append((eqn, ins, outs))
            env.update(zip(eqn.outvars, outs, strict=True))
        return [read(v) for v in open_jaxpr.outvars]

    def const(self, array: Any) -> _Value | Literal:
        """Return the parameter that holds a closed-over array."""
        for value, held in self.consts:
            if held is array:
                return value
        if self.is_closed:  # not one of the forward trace's: part of the program
            return Literal(array, _tree.spec_of(array))
        self.consts.append((_Value(_tree.spec_of(array)), array))
        return self.consts[-1][0]


def _flatten(jaxpr: Any, num_own: int, consts: Sequence[Any] | None = None) -> Trace:
    """Return a jaxpr of ``(own parameters, inputs)`` as a trace.

    Args:
        jaxpr: a closed jaxpr.
        num_own: how many of its arguments are parameters.
        consts: the closed-over arrays to number, or None to collect them.
    """
    walk = _Walk(consts)
    args = [_Value(_spec(v.aval)) for v in getattr(jaxpr, "jaxpr", jaxpr).invars]
    outs = walk.body(jaxpr, args)
    ops = _live(walk.ops, outs)
    used = {v for _, ins, _ in ops for v in ins if isinstance(v, _Value)} | {
        v for v in outs if isinstance(v, _Value)
    }
    held = [(v, c) for v, c in walk.consts if consts is not None or v in used]
    values = [*args[:num_own], *(v for v, _ in held), *args[num_own:]]
    numbers = {v: i for i, v in enumerate(values)}
    records = tuple(_op(eqn, ins, produced, numbers) for eqn, ins, produced in ops)
    outputs = tuple(v if isinstance(v, Literal) else numbers[v] for v in outs)
    return as_trace(
        num_own + len(held),
        tuple(v.spec for v in values),
        tuple(c for _, c in held),
        records,
        outputs,
        tuple(v.spec for v in outs),
    )


def as_trace(
    num_params: int,
    specs: tuple[jax.ShapeDtypeStruct, ...],
    consts: tuple[Any, ...],
    ops: tuple[Op, ...],
    outputs: tuple[int | Literal, ...],
    out_specs: tuple[jax.ShapeDtypeStruct, ...],
) -> Trace:
    """Return what a trace is made of as a trace, with the key that follows."""
    form = (
        num_params,
        canonical(specs),
        tuple((op.key, _atoms(op.inputs)) for op in ops),
        _atoms(outputs),
    )
    return Trace(num_params, specs, consts, ops, outputs, out_specs, Key(form))


def _atoms(atoms: Sequence[int | Literal]) -> Hashable:
    return tuple(
        literal_form(a.value, a.spec) if isinstance(a, Literal) else a for a in atoms
    )


def _op(eqn: Any, ins: list[Any], outs: list[_Value], numbers: dict[Any, int]) -> Op:
    """Return one equation as a record, numbering its outputs."""
    for value in outs:
        numbers[value] = len(numbers)
    name, params = eqn.primitive.name, dict(eqn.params)
    in_specs, specs = tuple(v.spec for v in ins), tuple(v.spec for v in outs)
    return Op(
        name=name,
        inputs=tuple(v if isinstance(v, Literal) else numbers[v] for v in ins),
        outputs=tuple(numbers[v] for v in outs),
        in_specs=in_specs,
        specs=specs,
        params=params,
        flops=op_flops(name, params, shapes_of(in_specs), shapes_of(specs)),
        num_bytes=op_bytes((*in_specs, *specs)),
        bind_fn=bind_mapped(eqn.primitive, params, (*in_specs, *specs)),
        key=Key((name, canonical(in_specs), canonical(specs), params_form(params))),
        primitive=eqn.primitive,
    )


def _live(ops: list[Any], outs: Sequence[Any]) -> list[Any]:
    """Drop ops whose results nobody reads, unless they have effects."""
    wanted = {v for v in outs if isinstance(v, _Value)}
    kept = []
    for eqn, ins, produced in reversed(ops):
        if eqn.effects or not wanted.isdisjoint(produced):
            kept.append((eqn, ins, produced))
            wanted.update(v for v in ins if isinstance(v, _Value))
    return kept[::-1]


def _spec(aval: Any) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(aval.shape, aval.dtype)
