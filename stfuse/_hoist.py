"""Hoist: what a program makes of one parameter alone is made once, not in every step.

A model with float32 weights that computes in bfloat16 casts all of them in each step:
it reads 4 bytes, writes 2, reads 2. Once is enough, and a bank of the casts is half as
large. A *chain* is what a program does to one parameter before anything else joins in.

Rules:
    Only when a job is served. The bank of `stfuse.fuse` holds the parameters
    themselves: gradients are taken of it and applied to it, and steps too small for
    bfloat16 would be lost in a master copy of it.
    A chain has one parameter, so that what jobs share (a trunk, a frozen base) stays
    shared: whoever has the same parameter and the same chain has the same array.
    All that reads the parameter must do so through the chain, and its end must not be
    larger: a narrow weight that a program widens stays narrow.
    Reshapes and broadcasts are free in a step; no chain ends with one.
    Programs of one job (its lengths) have the chains that all of them have, so that
    they go on sharing a bank.
    The ops are the program's own, with its parameters, run one after another.

Law (tested): a hoisted program of prepared leaves gives what the program gives of the
leaves.
"""

from __future__ import annotations

import functools
import math
import weakref
from collections.abc import Callable, Hashable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from stfuse import _tree
from stfuse._fingerprint import literal_form
from stfuse._program import Literal, Op, Trace
from stfuse._trace import as_trace

_FREE = frozenset("reshape broadcast_in_dim squeeze expand_dims".split())
# Bitwise the same wherever it is computed.
_EXACT = _FREE | frozenset(
    "convert_element_type reduce_precision transpose copy neg abs not".split()
)
# Each element of the result is made of one element, and every one of them is used:
# a part that is cut out is not what other jobs share.
_CHAINED = _EXACT | frozenset(
    "sign floor ceil round exp exp2 expm1 log log1p sqrt rsqrt cbrt square integer_pow "
    "logistic tanh erf sin cos add sub mul div rem pow max min clamp and or xor "
    "shift_left shift_right_logical shift_right_arithmetic".split()
)


@dataclass(frozen=True, slots=True)
class Chain:
    """Ops that follow each other from one parameter on, and read nothing else.

    Attributes:
        key: what they compute; equal chains give equal results.
        ops: the ops, with the numbers of the program that they were found in.
    """

    key: tuple[Hashable, ...]
    ops: tuple[Op, ...] = field(repr=False, compare=False)

    @property
    def dtype(self) -> Any:
        """The dtype of what it begins with."""
        op = self.ops[0]
        pairs = zip(op.inputs, op.in_specs, strict=True)
        return next(spec.dtype for a, spec in pairs if isinstance(a, int))

    @property
    def is_exact(self) -> bool:
        """Whether every device gives the same bytes."""
        return all(op.name in _EXACT for op in self.ops)

    def run(self, x: Any) -> Any:
        """Return the end of the chain."""
        for op in self.ops:
            operands = [
                jnp.asarray(a.value, a.spec.dtype) if isinstance(a, Literal) else x
                for a in op.inputs
            ]
            (x,) = op.bind_fn(*operands)
        return x


@dataclass(frozen=True, slots=True)
class _Link:
    """One op of a walk; several, where a program does the same thing twice."""

    form: Hashable
    places: tuple[int, ...]
    op: Op


@dataclass(frozen=True, slots=True)
class Hoist:
    """A job's programs without their chains.

    Attributes:
        traces: the programs, at each of its lengths; their ``consts`` are not prepared.
        chains: by leaf, of each program: what is to be made of it.
    """

    traces: tuple[Trace, ...]
    chains: tuple[Mapping[int, Chain], ...]

    def prepare(
        self, leaves: Sequence[Any], put: Callable[[Any], Any]
    ) -> tuple[tuple[Trace, ...], tuple[Any, ...]]:
        """Run the chains of some parameters.

        What comes from one array is one array again, whichever job asks, and stands
        where that stands: on the host, or on its device.

        Args:
            leaves: the job's own parameters, in trace order; nobody changes them.
            put: brings an array to the device whose steps would have run the chains.

        Returns:
            The programs with the closed-over arrays that they read now, and the leaves.
        """
        traces = []
        for trace, chains in zip(self.traces, self.chains, strict=True):
            first = trace.num_params - len(trace.consts)
            if any(leaf >= first for leaf in chains):
                consts = enumerate(trace.consts, first)
                made = tuple(_prepared(chains.get(i), c, put) for i, c in consts)
                trace = replace(trace, consts=made)
            traces.append(trace)
        chains = self.chains[0]
        own = tuple(_prepared(chains.get(i), x, put) for i, x in enumerate(leaves))
        # What fails, fails here.
        jax.block_until_ready((own, [trace.consts for trace in traces]))
        return tuple(traces), own


def hoist(traces: Sequence[Trace]) -> Hoist:
    """Return what of a job's programs can be done before they run.

    Args:
        traces: its program at each of its lengths.

    Example:
        >>> from stfuse._job import Job
        >>> from stfuse._trace import trace
        >>> def half(w, x):
        ...     return x @ w.astype(x.dtype)
        >>> x = np.ones((1, 3), jnp.bfloat16)
        >>> found = hoist([trace(Job("half", half, np.ones((3, 2), "f"), x))])
        >>> found.traces[0].param_specs[0].dtype
        dtype(bfloat16)
    """
    names = [_names(trace) for trace in traces]
    walks: dict[Hashable, list[_Link]] = {}
    specs: dict[Hashable, jax.ShapeDtypeStruct] = {}
    for trace, own in zip(traces, names, strict=True):
        specs.update(zip(own, trace.param_specs, strict=True))
        for name, walk in zip(own, _walks(trace), strict=True):
            walks[name] = _common(walks.get(name, walk), walk)
    chains = {}
    for name, walk in walks.items():
        links = walk[: _length(specs[name], walk)]
        if links:
            key, ops = tuple(x.form for x in links), tuple(x.op for x in links)
            chains[name] = Chain(key, ops)
    lengths = {name: len(chain.ops) for name, chain in chains.items()}
    return Hoist(
        tuple(
            _without(trace, tuple(lengths.get(name, 0) for name in own))
            for trace, own in zip(traces, names, strict=True)
        ),
        tuple(
            {leaf: chains[name] for leaf, name in enumerate(own) if name in chains}
            for own in names
        ),
    )


def _names(trace: Trace) -> list[Hashable]:
    """Return what each parameter is called in all of a job's programs."""
    num_own = trace.num_params - len(trace.consts)
    return [*range(num_own), *(("const", id(c)) for c in trace.consts)]


def _common(a: list[_Link], b: list[_Link]) -> list[_Link]:
    """Return the links that two walks begin with."""
    pairs = zip(a, b, strict=False)
    same = [x.form == y.form for x, y in pairs]
    return a[: same.index(False) if False in same else len(same)]


def _length(spec: jax.ShapeDtypeStruct, walk: Sequence[_Link]) -> int:
    """Return how many links of a walk are worth running once, 0 for none."""
    for n in range(len(walk), 0, -1):
        op = walk[n - 1].op
        if op.name not in _FREE and _num_bits(op.specs[0]) <= _num_bits(spec):
            return n
    return 0


def _num_bits(spec: jax.ShapeDtypeStruct) -> int:
    return math.prod(spec.shape) * jax.dtypes.itemsize_bits(spec.dtype)


# By trace, so that jobs of one program share what is found, and it goes with them.
_WALKS: weakref.WeakKeyDictionary[Trace, list[list[_Link]]] = (
    weakref.WeakKeyDictionary()
)
_WITHOUT: weakref.WeakKeyDictionary[Trace, dict[tuple[int, ...], Trace]] = (
    weakref.WeakKeyDictionary()
)


def _walks(trace: Trace) -> list[list[_Link]]:
    """Return, per parameter, the ops that come before anything else joins in."""
    if trace not in _WALKS:
        readers: dict[int, list[int]] = {}
        for n, op in enumerate(trace.ops):
            for v in {a for a in op.inputs if isinstance(a, int)}:
                readers.setdefault(v, []).append(n)
        _WALKS[trace] = [
            [] if _tree.is_typed_key(spec) else _walk(trace, leaf, readers)
            for leaf, spec in enumerate(trace.param_specs)
        ]
    return _WALKS[trace]


def _walk(trace: Trace, leaf: int, readers: Mapping[int, list[int]]) -> list[_Link]:
    walk, values = [], {leaf}  # equal values, where one thing is done twice
    while values.isdisjoint(trace.outputs):
        places = sorted({n for v in values for n in readers.get(v, ())})
        forms = {_form(trace.ops[n], values) for n in places}
        if len(forms) != 1 or None in forms:
            break
        walk.append(_Link(forms.pop(), tuple(places), trace.ops[places[0]]))
        values = {trace.ops[n].outputs[0] for n in places}
    return walk


def _form(op: Op, values: set[int]) -> Hashable:
    """Return what an op makes of some equal values, None if it may not be hoisted."""
    read = [a for a in op.inputs if isinstance(a, int)]
    if op.name not in _CHAINED or not values.issuperset(read):
        return None
    literals = (
        literal_form(a.value, a.spec) if isinstance(a, Literal) else None
        for a in op.inputs
    )
    return (op.key, *literals)


def _without(trace: Trace, lengths: tuple[int, ...]) -> Trace:
    """Return a program that is given the ends of chains instead of parameters.

    Args:
        trace: the program.
        lengths: per parameter, how many links of its walk are left out.
    """
    if not any(lengths):
        return trace
    known = _WITHOUT.setdefault(trace, {})
    if lengths not in known:
        specs, left_out = list(trace.specs), set()
        numbers = {v: v for v in range(len(specs))}
        for leaf, (length, walk) in enumerate(zip(lengths, _walks(trace), strict=True)):
            for link in walk[:length]:
                left_out.update(link.places)
                specs[leaf] = link.op.specs[0]
                # The last link's values are the leaf's; nobody reads the others.
                numbers |= {trace.ops[n].outputs[0]: leaf for n in link.places}

        def renumbered(atoms: Sequence[int | Literal]) -> tuple[int | Literal, ...]:
            return tuple(a if isinstance(a, Literal) else numbers[a] for a in atoms)

        ops, at = [], len(specs)
        for op in [op for n, op in enumerate(trace.ops) if n not in left_out]:
            outputs = tuple(range(at, at + len(op.outputs)))
            at += len(outputs)
            numbers |= zip(op.outputs, outputs, strict=True)
            ops.append(replace(op, inputs=renumbered(op.inputs), outputs=outputs))
        known[lengths] = as_trace(
            trace.num_params,
            tuple(specs),
            trace.consts,
            tuple(ops),
            renumbered(trace.outputs),
            trace.out_specs,
        )
    return known[lengths]


# Chain and array to its result, both held weakly: an array's number may be used again.
_Refs = tuple[Callable[[], Any], Callable[[], Any]]
_REMEMBERED: dict[tuple[Chain, int], _Refs] = {}
_NOTHING: _Refs = (lambda: None, lambda: None)


def _prepared(chain: Chain | None, leaf: Any, put: Callable[[Any], Any]) -> Any:
    """Return the end of a leaf's chain, the same array if somebody still has it."""
    if chain is None:
        return leaf
    key = chain, id(leaf)
    source, result = (ref() for ref in _REMEMBERED.get(key, _NOTHING))
    if source is leaf and result is not None:
        return result
    found = _run(chain, leaf, put)

    def forget(_: Any) -> None:
        _REMEMBERED.pop(key, None)

    try:
        _REMEMBERED[key] = weakref.ref(leaf, forget), weakref.ref(found, forget)
    except TypeError:  # a plain number
        pass
    return found


def _run(chain: Chain, leaf: Any, put: Callable[[Any], Any]) -> Any:
    """Run a chain where its leaf is, if that cannot be told from the result.

    A full device has no room for weights on their way back to the host.
    """
    run = _compiled(chain)
    if not isinstance(leaf, jax.Array):
        x = np.asarray(leaf, chain.dtype)
        return np.asarray(run(_on_host(x) if chain.is_exact else put(x)))
    where = leaf.sharding
    usual = next(iter(where.device_set)).default_memory().kind
    if chain.is_exact and where.memory_kind in (None, usual):
        return run(leaf)
    found = run(put(leaf))
    if len(where.device_set) > 1:
        return found
    (device,) = where.device_set
    kind = where.memory_kind
    back = jax.sharding.SingleDeviceSharding(device, memory_kind=kind)
    return jax.device_put(found, back)


def _on_host(x: np.ndarray) -> Any:
    """Return an array where the host computes, if it is allowed to."""
    try:
        host = jax.local_devices(backend="cpu")[0]
    except RuntimeError:  # JAX_PLATFORMS names others only
        return x
    return jax.device_put(x, host)


@functools.lru_cache(maxsize=256)
def _compiled(chain: Chain) -> Callable[[Any], Any]:
    return jax.jit(chain.run)
