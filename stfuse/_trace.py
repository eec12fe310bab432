"""Job to Trace, a tuple of plain Op records. The only file that knows jaxprs.

Rules:
    Calls that only wrap a body (jit, custom_jvp, custom_vjp, remat, closed_call) are
    inlined; loops, branches and unknown higher-order primitives stay one opaque op.
    Arrays that a function closed over become parameters, wherever they hide.
    Values are numbered in trace order: parameters, then inputs, then op outputs.
    Two traces are interchangeable exactly when their ``key`` is equal.
"""

from __future__ import annotations

import math
import weakref
from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass, field
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.extend import core as jex

from stfuse import _tree
from stfuse._fingerprint import Key, canonical, literal_form, params_form
from stfuse._job import Job

_INLINED = frozenset(
    "jit pjit custom_jvp_call custom_vjp_call custom_vjp_call_jaxpr remat remat2 "
    "checkpoint closed_call core_call".split()
)
# Launches of their own on a device; XLA fuses the light ops around them.
_HEAVY = frozenset(
    "dot_general conv_general_dilated scan while cond ragged_dot_general sort top_k "
    "fft cholesky lu qr eigh svd triangular_solve custom_linear_solve".split()
)
_TRACES: weakref.WeakKeyDictionary[Any, Trace] = weakref.WeakKeyDictionary()


@dataclass(frozen=True, slots=True)
class Literal:
    """A value written into the program, with the type it was written in."""

    value: Any
    spec: jax.ShapeDtypeStruct


@dataclass(frozen=True, slots=True)
class Op:
    """One primitive of a trace.

    Attributes:
        name: the primitive's name.
        inputs: value numbers or `Literal`, in operand order.
        outputs: value numbers.
        in_specs: shapes and dtypes of the operands, for one job.
        specs: shapes and dtypes of the outputs, for one job.
        params: the primitive's own parameters.
        flops: arithmetic for one job.
        num_bytes: bytes read plus written for one job.
        bind_fn: evaluates the op on operands of one job.
    """

    name: str
    inputs: tuple[int | Literal, ...]
    outputs: tuple[int, ...]
    in_specs: tuple[jax.ShapeDtypeStruct, ...]
    specs: tuple[jax.ShapeDtypeStruct, ...]
    params: dict[str, Any]
    flops: float
    num_bytes: float
    bind_fn: Callable[..., tuple[Any, ...]] = field(repr=False)

    @property
    def is_heavy(self) -> bool:
        """Whether the op is a launch of its own."""
        return self.name in _HEAVY


@dataclass(frozen=True, slots=True, eq=False)
class Trace:
    """A program of one job as plain records.

    Attributes:
        num_params: values ``0 .. num_params-1`` are parameters (closed-over last).
        specs: shape and dtype of every parameter, then of every input.
        consts: the closed-over arrays, the last of the parameters.
        ops: live ops in trace order.
        outputs: value numbers or literals, in leaf order.
        out_specs: their shapes and dtypes.
        key: hashable canonical form; equal keys mean equal programs.
    """

    num_params: int
    specs: tuple[jax.ShapeDtypeStruct, ...]
    consts: tuple[Any, ...] = field(repr=False)
    ops: tuple[Op, ...]
    outputs: tuple[int | Literal, ...]
    out_specs: tuple[jax.ShapeDtypeStruct, ...]
    key: Key = field(repr=False)

    @property
    def param_specs(self) -> tuple[jax.ShapeDtypeStruct, ...]:
        """Specs of the parameters, closed-over arrays last."""
        return self.specs[: self.num_params]

    @property
    def input_specs(self) -> tuple[jax.ShapeDtypeStruct, ...]:
        """Specs of one row of inputs."""
        return self.specs[self.num_params :]


def trace(job: Job) -> Trace:
    """Return the job's program at one row.

    Its parameters are the leaves of ``job.params``, then the closed-over arrays.

    Example:
        >>> job = Job("sum", lambda p, x: x @ p, np.ones((3, 2), "f"), np.ones((1, 3)))
        >>> [op.name for op in trace(job).ops if op.is_heavy]
        ['dot_general']
    """
    if job.jaxpr not in _TRACES:
        _TRACES[job.jaxpr] = _flatten(job.jaxpr, len(jax.tree.leaves(job.params)))
    return _TRACES[job.jaxpr]


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

    def backward(params: Any, rows: Any, cotangents: Any) -> Any:
        def apply(moving: Any) -> Any:
            values = merge_inexact((*params, *rows), moving)
            outs = jax.vmap(
                lambda x: _evaluate(job.jaxpr, values[:num_own], x), axis_size=num_rows
            )(values[num_own:])
            return tuple(y for y in outs if is_inexact(y))

        moving = tuple(v for v in (*params, *rows) if is_inexact(v))
        return jax.vjp(apply, moving)[1](cotangents)[0]

    jaxpr = jax.make_jaxpr(backward)(
        forward.param_specs[:num_own],
        tuple(map(with_rows, forward.input_specs)),
        tuple(with_rows(s) for s in forward.out_specs if is_inexact(s)),
    )
    return _flatten(jaxpr, num_own, forward.consts)


def is_inexact(x: Any) -> bool:
    """Return whether a value has a derivative: floating or complex."""
    return jnp.issubdtype(x.dtype, np.inexact)


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
        outs = _binder(eqn.primitive, eqn.params)(*map(read, eqn.invars))
        env.update(zip(eqn.outvars, outs, strict=True))
    return [read(v) for v in open_jaxpr.outvars]


def _binder(primitive: Any, params: dict[str, Any]) -> Callable[..., tuple[Any, ...]]:
    bind_params = primitive.get_bind_params(params)

    def bind_fn(*operands: Any) -> tuple[Any, ...]:
        outs = primitive.bind(*operands, **bind_params)
        return tuple(outs) if primitive.multiple_results else (outs,)

    return bind_fn


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
    specs = tuple(v.spec for v in values)
    num_params = num_own + len(held)
    form = (
        num_params,
        canonical(specs),
        tuple(
            (op.name, _atoms(op.inputs), canonical(op.specs), params_form(op.params))
            for op in records
        ),
        _atoms(outputs),
    )
    return Trace(
        num_params=num_params,
        specs=specs,
        consts=tuple(c for _, c in held),
        ops=records,
        outputs=outputs,
        out_specs=tuple(v.spec for v in outs),
        key=Key(form),
    )


def _atoms(atoms: Sequence[int | Literal]) -> Hashable:
    return tuple(
        literal_form(a.value, a.spec) if isinstance(a, Literal) else a for a in atoms
    )


def _op(eqn: Any, ins: list[Any], outs: list[_Value], numbers: dict[Any, int]) -> Op:
    """Return one equation as a record, numbering its outputs."""
    for value in outs:
        numbers[value] = len(numbers)
    return Op(
        name=eqn.primitive.name,
        inputs=tuple(v if isinstance(v, Literal) else numbers[v] for v in ins),
        outputs=tuple(numbers[v] for v in outs),
        in_specs=tuple(v.spec for v in ins),
        specs=tuple(v.spec for v in outs),
        params=dict(eqn.params),
        flops=_flops(eqn),
        num_bytes=float(sum(_num_bytes(v.spec) for v in (*ins, *outs))),
        bind_fn=_binder(eqn.primitive, eqn.params),
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


def _num_bytes(spec: jax.ShapeDtypeStruct) -> int:
    return math.prod(spec.shape) * getattr(spec.dtype, "itemsize", 4)


def _flops(eqn: Any) -> float:
    """Return the arithmetic of one equation, loops counted once if unbounded."""
    out: int = sum(math.prod(getattr(v.aval, "shape", ())) for v in eqn.outvars)
    shapes: list[Any] = [getattr(v.aval, "shape", ()) for v in eqn.invars]
    name, params = eqn.primitive.name, dict[str, Any](eqn.params)
    if name == "dot_general":
        (contracted, _), _ = params["dimension_numbers"]
        return 2.0 * out * math.prod(shapes[0][i] for i in contracted)
    if name == "conv_general_dilated":
        out_features = shapes[1][params["dimension_numbers"].rhs_spec[0]]
        return 2.0 * out * math.prod(shapes[1]) / max(out_features, 1)
    inner = sum(
        _flops(e) for body in _bodies(params) for e in getattr(body, "jaxpr", body).eqns
    )
    return inner * params.get("length", 1) if inner else float(out)


def _bodies(params: dict[str, Any]) -> list[Any]:
    """Return every jaxpr among a primitive's parameters."""
    found = []
    for value in params.values():
        for x in value if isinstance(value, tuple | list) else (value,):
            if hasattr(x, "eqns") or hasattr(x, "jaxpr"):
                found.append(x)
    return found
