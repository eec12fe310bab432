"""Programs as plain records: literals, ops, traces; what an op costs."""

from __future__ import annotations

import math
from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from stfuse._fingerprint import Key
from stfuse._tree import is_typed_key

# Launches of their own on a device; XLA fuses the light ops around them.
_HEAVY = frozenset(
    "dot_general conv_general_dilated scan while cond ragged_dot_general sort top_k "
    "fft cholesky lu qr eigh svd triangular_solve custom_linear_solve".split()
)


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
        key: hashable canonical form of all but the value numbers.
        primitive: what ``bind_fn`` binds.
        itemsizes: bytes of an element of each operand, then of each output.
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
    key: Hashable = field(repr=False, default=None)
    primitive: Any = field(repr=False, default=None)
    itemsizes: tuple[int, ...] = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        """Look up what the planner asks for at every pair of launches."""
        sizes = [getattr(s.dtype, "itemsize", 4) for s in (*self.in_specs, *self.specs)]
        object.__setattr__(self, "itemsizes", tuple(sizes))

    @property
    def is_heavy(self) -> bool:
        """Whether the op is a launch of its own."""
        return self.name in _HEAVY

    def at(
        self,
        in_specs: Sequence[jax.ShapeDtypeStruct],
        specs: Sequence[jax.ShapeDtypeStruct],
        params: dict[str, Any],
    ) -> Op:
        """Return the op at other shapes, with the parameters that they ask for."""
        return replace(
            self,
            in_specs=tuple(in_specs),
            specs=tuple(specs),
            params=params,
            flops=op_flops(self.name, params, shapes_of(in_specs), shapes_of(specs)),
            num_bytes=op_bytes((*in_specs, *specs)),
            bind_fn=bind_mapped(self.primitive, params, (*in_specs, *specs)),
        )


@dataclass(frozen=True, slots=True, eq=False, weakref_slot=True)
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


def is_inexact(x: Any) -> bool:
    """Return whether a value has a derivative: floating or complex."""
    return jnp.issubdtype(x.dtype, np.inexact)


def bind_with(primitive: Any, params: dict[str, Any]) -> Callable[..., tuple[Any, ...]]:
    """Return what evaluates a primitive with some parameters; always a tuple."""
    bind_params = primitive.get_bind_params(params)

    def bind_fn(*operands: Any) -> tuple[Any, ...]:
        outs = primitive.bind(*operands, **bind_params)
        return tuple(outs) if primitive.multiple_results else (outs,)

    return bind_fn


def bind_mapped(
    primitive: Any, params: dict[str, Any], specs: Sequence[Any]
) -> Callable[..., tuple[Any, ...]]:
    """Return what evaluates a primitive, and gives row by row the same when mapped.

    Args:
        primitive: what to bind.
        params: its parameters.
        specs: of its operands and outputs.
    """
    bind_fn = bind_with(primitive, params)
    if is_looped(primitive.name, params, specs):
        return jax.custom_batching.sequential_vmap(bind_fn)

    def mapped_fn(*operands: Any) -> tuple[Any, ...]:
        try:
            return bind_fn(*operands)
        except NotImplementedError:  # JAX cannot map it, or something inside it
            return jax.custom_batching.sequential_vmap(bind_fn)(*operands)

    return mapped_fn


def is_looped(name: str, params: dict[str, Any], specs: Sequence[Any]) -> bool:
    """Return whether an op that is mapped is not what it is row by row, or never ends.

    Keys of kinds other than the usual one draw other bits when mapped: by design, says
    JAX. A branch becomes a select, so a loop in it runs where its branch is not taken;
    and so does a loop in the body of one that goes on for others.

    Args:
        name: the primitive's name.
        params: its parameters.
        specs: of its operands and outputs.
    """
    if name == "pallas_call":  # a kernel's own branches stay branches
        return False
    if name == "rng_bit_generator":
        return True
    if name.startswith("random_") and any(map(_is_odd_key, specs)):
        return True
    bodies = {"while": "body_jaxpr", "cond": "branches"}.get(name)
    if bodies is not None and has_while({bodies: params[bodies]}):
        return True
    return any(
        is_looped(e.primitive.name, e.params, [v.aval for v in (*e.invars, *e.outvars)])
        for e in _body_eqns(params)
    )


def has_while(params: dict[str, Any]) -> bool:
    """Return whether a loop without a length is in the bodies of a primitive."""
    return any(
        e.primitive.name == "while" or has_while(e.params) for e in _body_eqns(params)
    )


def _is_odd_key(spec: Any) -> bool:
    return is_typed_key(spec) and str(spec.dtype) != "key<fry>"


def op_bytes(specs: Sequence[jax.ShapeDtypeStruct]) -> float:
    """Return the bytes that some values hold."""
    return float(
        sum(math.prod(s.shape) * getattr(s.dtype, "itemsize", 4) for s in specs)
    )


def shapes_of(specs: Sequence[Any]) -> tuple[tuple[int, ...], ...]:
    """Return the shapes of some values."""
    return tuple(tuple(getattr(s, "shape", ())) for s in specs)


def op_flops(name: str, params: dict[str, Any], ins: Any, outs: Any) -> Any:
    """Return the arithmetic of one op from its operands' and outputs' shapes.

    A size may be an array, for many launches at once. Loops are counted once if they
    are unbounded.
    """
    out = sum(map(math.prod, outs))
    if name == "dot_general":
        (contracted, _), _ = params["dimension_numbers"]
        return 2.0 * out * math.prod(ins[0][i] for i in contracted)
    if name == "conv_general_dilated":
        out_features = params["dimension_numbers"].rhs_spec[0]
        window = (n for axis, n in enumerate(ins[1]) if axis != out_features)
        return 2.0 * out * math.prod(window)
    inner = sum(map(_eqn_flops, _body_eqns(params)))
    return inner * params.get("length", 1) if inner else 1.0 * out


def _eqn_flops(eqn: Any) -> float:
    sides = (shapes_of([v.aval for v in vs]) for vs in (eqn.invars, eqn.outvars))
    return op_flops(eqn.primitive.name, dict(eqn.params), *sides)


def _body_eqns(params: dict[str, Any]) -> list[Any]:
    return [e for body in _bodies(params) for e in getattr(body, "jaxpr", body).eqns]


def _bodies(params: dict[str, Any]) -> list[Any]:
    """Return every jaxpr among a primitive's parameters."""
    found = []
    for value in params.values():
        for x in value if isinstance(value, tuple | list) else (value,):
            if hasattr(x, "eqns") or hasattr(x, "jaxpr"):
                found.append(x)
    return found
