"""Hashable canonical forms of programs: equal forms mean equal programs."""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from typing import Any

import jax
import numpy as np
from jax.extend import core as jex

from stfuse import _tree

# Parameters that say where a value lives, not what it is.
_PLACEMENT = frozenset(
    "sharding out_sharding in_shardings out_shardings ctx_mesh".split()
)
# Custom derivatives inside a loop's body: they do not change what it computes.
_RULES = frozenset("jvp_jaxpr_fun fwd_jaxpr_thunk bwd out_trees".split())


class Key:
    """A hashable canonical form, hashed once: forms are long and compared often."""

    __slots__ = ("_form", "_hash")

    def __init__(self, form: Hashable) -> None:
        """Keep the form and its hash."""
        self._form, self._hash = form, hash(form)

    def __hash__(self) -> int:
        """Return the hash taken when built."""
        return self._hash

    def __eq__(self, other: object) -> bool:
        """Return whether two forms are equal."""
        return (
            isinstance(other, Key)
            and self._hash == other._hash
            and self._form == other._form
        )


def params_form(params: dict[str, Any]) -> Hashable:
    """Return a primitive's parameters in canonical form: what it computes, only."""
    left_out = _PLACEMENT | _RULES
    return canonical({k: v for k, v in params.items() if k not in left_out})


def literal_form(value: Any, aval: Any) -> Hashable:
    """Return the canonical form of a value written into a program."""
    return ("literal", canonical(np.asarray(value)), aval.shape, aval.dtype)


def canonical(x: Any) -> Hashable:
    """Return a hashable form that is equal for equal meaning."""
    if isinstance(x, jax.ShapeDtypeStruct):
        return (x.shape, x.dtype)
    if isinstance(x, dict):
        return tuple((k, canonical(x[k])) for k in sorted(x, key=str))
    is_array = isinstance(x, np.ndarray | np.generic | jax.Array)
    if (is_array or isinstance(x, float)) and not _tree.is_typed_key(x):
        # By its bytes: 0.0 equals -0.0, and NaN not even itself.
        array = np.asarray(x)
        return ("array", array.dtype, array.shape, array.tobytes())
    if isinstance(x, tuple | list):
        return (type(x).__name__, *map(canonical, x))
    if hasattr(x, "eqns") or hasattr(x, "jaxpr"):
        return _jaxpr_form(x)
    try:
        hash(x)
    except TypeError:
        return _Same(x)
    # Equal numbers of different types hash alike: 1, 1.0 and True are three things.
    return (type(x), x)


class _Same:
    """Stands for an unhashable parameter: equal only to itself."""

    def __init__(self, x: Any) -> None:
        self._x = x

    def __eq__(self, other: object) -> bool:
        return isinstance(other, _Same) and self._x is other._x

    def __hash__(self) -> int:
        return id(self._x)


def _jaxpr_form(jaxpr: Any) -> Hashable:
    """Return a body's canonical form: local numbers instead of variables."""
    open_jaxpr = getattr(jaxpr, "jaxpr", jaxpr)
    numbers: dict[Any, int] = {}

    def number(variables: Sequence[Any]) -> Hashable:
        for v in variables:
            numbers.setdefault(v, len(numbers))
        return tuple((numbers[v], v.aval.shape, v.aval.dtype) for v in variables)

    def read(atom: Any) -> Hashable:
        if isinstance(atom, jex.Literal):
            return literal_form(atom.val, atom.aval)
        return numbers[atom]

    head = (number(open_jaxpr.constvars), number(open_jaxpr.invars))
    eqns = tuple(
        (
            eqn.primitive.name,
            tuple(map(read, eqn.invars)),
            number(eqn.outvars),
            params_form(eqn.params),
        )
        for eqn in open_jaxpr.eqns
    )
    consts = tuple(map(canonical, getattr(jaxpr, "consts", ())))
    return (head, consts, eqns, tuple(map(read, open_jaxpr.outvars)))
