"""Evaluates a fused plan eagerly, and beside it every op alone: who was wrong first?

Each launch is checked by itself. What it read must be, bit for bit, what the step had
made before; what it made must be what each job's op makes of that. So an error is
named where it happens, and roundings do not add up.
"""

import dataclasses
import math
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np

import stfuse
from stfuse import _rules, _step
from stfuse._evaluate import How, Probe, evaluate
from stfuse._inputs import check_inputs
from stfuse._program import Literal, Op, Trace
from stfuse._rules import Merge, Stack
from stfuse._stacked import cut
from stfuse._values import Env

# Results that depend on the order of roundings, or on a library's last bit.
ROUNDED = frozenset(
    "acos acosh add_any asin asinh atan atan2 atanh cbrt cholesky "
    "conv_general_dilated cos cosh cumlogsumexp cumprod cumsum cond digamma div "
    "dot_general eigh erf erf_inv erfc exp exp2 expm1 fft integer_pow lgamma log "
    "log1p logistic lu pow qr reduce_prod reduce_sum reduce_window_sum rsqrt scan "
    "scatter-add scatter-mul scatter_add scatter_mul select_and_gather_add "
    "select_and_scatter_add sin sinh sqrt svd tan tanh triangular_solve while".split()
)


class Wrong(AssertionError):
    """A launch that does not give what its ops give alone."""


def run(
    fused: stfuse.Fused,
    requests: Mapping[str, Any],
    *,
    poison: bool = False,
    params: Mapping[str, Any] | None = None,
) -> dict[str, Any]:
    """Evaluate one row of each request, checking every launch.

    Args:
        fused: whose plan to check.
        requests: inputs by name; their first row is used.
        poison: whether all padding that may hold anything holds the worst.
        params: parameters to use instead of the jobs' own.

    Returns:
        ``{name: outputs}``, one row each.

    Raises:
        Wrong: the first launch that is wrong.
    """
    first = {n: _first_row(fused.jobs[n], x) for n, x in requests.items()}
    stacked = fused.stack(first)
    bank = fused.pack(params)
    counts = _step.slot_counts(fused._layout, stacked.slots)
    outputs: list[Any] = [None] * len(fused._layout.outputs)
    for component in fused._layout.components:
        present = {s: counts[s] for s in component if s in counts}
        if not present:
            continue
        part = _step._Part(fused.plan, fused._layout, present)
        views = part.views(bank.stacks, stacked.slots)
        env = part.env(part.traces, views)
        part.enter(env, [jnp.asarray(stacked.inputs[i][:, 0]) for i in part.inputs])
        check = _Check(env, _given(fused, first, stacked.slots, present, params or {}))
        probe = Probe(poisoned if poison else lambda x: x, check.launched)
        evaluate(env, fused.plan.nodes, How(1, fused.plan.cost, "auto", probe))
        check.left()
        for i, x in zip(part.outputs, part.leave(env), strict=True):
            outputs[i] = np.asarray(x)[:, None]
    return {
        name: cut(outputs, places, 0, 0, rows, fused.jobs[name])
        for name, places, rows in stacked.places
    }


def _first_row(job: stfuse.Job, inputs: Any) -> Any:
    return jax.tree.map(lambda x: np.asarray(x)[:1], inputs) if job.batched else inputs


def _given(
    fused: stfuse.Fused,
    requests: Mapping[str, Any],
    slots: Sequence[Any],
    counts: Mapping[int, int],
    params: Mapping[str, Any],
) -> dict[tuple[int, int], list[Any]]:
    """Return parameters and inputs per species and value, one a slot; no padding."""
    inside = {}
    for name, x in requests.items():
        checked = check_inputs(fused.jobs[name], x, call="lockstep")
        inside[fused._where[name][checked.length]] = [v[0] for v in checked.leaves]
    found = {}
    for s, count in counts.items():
        one = fused.plan.species[s]
        index = range(count) if slots[s] is None else slots[s]
        programs = [fused._programs[one.members[slot]] for slot in index]
        rows = [
            [
                *fused._leaves(name, length, params.get(name, fused.jobs[name].params)),
                *inside[s, int(slot)],
            ]
            for slot, (name, length, _) in zip(index, programs, strict=True)
        ]
        for v, (column, spec) in enumerate(
            zip(zip(*rows, strict=True), one.trace.specs, strict=True)
        ):
            found[s, v] = [_as(x, spec) for x in column]
    return found


def _as(x: Any, spec: jax.ShapeDtypeStruct) -> Any:
    if jnp.issubdtype(spec.dtype, jax.dtypes.extended):
        return x
    return np.asarray(x, spec.dtype).reshape(spec.shape)


def is_traced(x: Stack) -> bool:
    return isinstance(x.array, jax.core.Tracer)


def is_opaque(x: Stack) -> bool:
    """Whether a stack holds something that NumPy has no values for."""
    return jnp.issubdtype(x.array.dtype, jax.dtypes.extended)


def poison_of(dtype: Any) -> Any:
    """Return the worst value that padding can hold."""
    if jnp.issubdtype(dtype, np.inexact):
        return np.nan
    return True if dtype == bool else np.iinfo(dtype).max


def poisoned(x: Stack) -> Stack:
    """Return a stack whose padding is the worst, but for what is surely zero."""
    axes = range(len(x.shape))
    dirty = [a for a in axes if not x.is_zero_padded(a)]
    if not dirty or is_opaque(x):
        return x
    keep = np.ones((1, *(1 for _ in axes)), bool)
    for a in dirty:
        keep = keep & _inside(x, a)
    for a in axes:  # what is beyond a clean axis is zero, wherever it is
        if a not in dirty and not x.is_full(a):
            keep = keep | ~_inside(x, a)
    is_stacked = x.is_stacked or len(keep) > 1
    array = _rules.to_stacked(x).array if is_stacked else x.array[None]
    keep, worst = np.broadcast_to(keep, array.shape), poison_of(x.array.dtype)
    if is_traced(x):
        array = jnp.where(keep, array, jnp.asarray(worst, array.dtype))
    else:
        array = jnp.asarray(np.where(keep, array, np.asarray(worst, array.dtype)))
    array = array if is_stacked else array[0]
    return dataclasses.replace(x, array=array, is_stacked=is_stacked)


def _inside(x: Stack, axis: int) -> np.ndarray:
    sizes = x.sizes[:, axis]
    sizes = sizes if (sizes != sizes[0]).any() else sizes[:1]
    shape = [1] * (1 + len(x.shape))
    shape[1 + axis] = x.shape[axis]
    places = np.arange(x.shape[axis]).reshape(shape)
    return places < sizes.reshape(-1, *(1,) * len(x.shape))


class _Check:
    """What every species' values are, and who made them."""

    def __init__(self, env: Env, given: dict[tuple[int, int], list[Any]]) -> None:
        self.env, self.values = env, given
        self.makers: dict[tuple[int, int], tuple[int, Op]] = {
            (s, v): (i, op)
            for s, trace in env.programs.items()
            for i, op in enumerate(trace.ops)
            for v in op.outputs
        }

    def launched(
        self,
        merge: Merge,
        members: Sequence[tuple[int, int]],
        operands: Sequence[Stack],
        outs: Sequence[Stack],
    ) -> None:
        """Check one launch: what it read, then what it made of that."""
        if any(map(is_traced, (*operands, *outs))):
            return  # inside a loop's body: its results are checked when they are read
        start = 0
        for (s, i), op, count in zip(members, merge.ops, merge.counts, strict=True):
            for k in range(count):
                who = f"{op.name} (species {s}, op {i}, slot {k})"
                own = [
                    self.read(s, k, atom, _true(x, start + k), f"operand {p} of {who}")
                    for p, (atom, x) in enumerate(zip(op.inputs, operands, strict=True))
                ]
                made = [_true(x, start + k) for x in outs]
                for q, (a, e) in enumerate(
                    zip(made, _alone(op, own), strict=True)
                ):
                    compare(a, e, op, own, f"output {q} of {who}; members {members}")
                    self.values.setdefault((s, op.outputs[q]), []).append(a)
            start += count
        for q, x in enumerate(outs):
            _check_clean(x, f"output {q} of {merge.wide.name} {members}")

    def read(self, s: int, k: int, atom: Any, found: Any, what: str) -> Any:
        """Return a job's own value, which a launch must have found."""
        if isinstance(atom, Literal):
            own = np.asarray(atom.value, atom.spec.dtype)
        elif (s, atom) in self.values:
            own = self.values[s, atom][k]
        else:
            i, op = self.makers[s, atom]
            self._finish(s, op, f"{op.name} (species {s}, op {i}), read as {what}")
            own = self.values[s, atom][k]
        same(found, own, what)
        return own

    def _finish(self, s: int, op: Op, what: str) -> None:
        """Check a loop that several species shared, and keep what it made."""
        columns = [
            [self.read(s, k, a, self.known(s, k, a), what) for a in op.inputs]
            for k in range(self.env.counts[s])
        ]
        for k, own in enumerate(columns):
            for q, e in enumerate(_alone(op, own)):
                a = self._held(s, k, op.outputs[q])
                compare(a, e, op, own, f"output {q} of {what}, slot {k}")
                self.values.setdefault((s, op.outputs[q]), []).append(a)

    def known(self, s: int, k: int, atom: Any) -> Any:
        if isinstance(atom, Literal):
            return np.asarray(atom.value, atom.spec.dtype)
        return self.values[s, atom][k] if (s, atom) in self.values else self._held(
            s, k, atom
        )

    def _held(self, s: int, k: int, number: int) -> Any:
        held = self.env.values[s, number]
        i, op = self.makers[s, number]
        spec = op.specs[op.outputs.index(number)]
        array = np.asarray(held.array)
        array = array[held.starts[s] + k] if held.is_stacked else array
        return array[tuple(map(slice, spec.shape))]

    def left(self) -> None:
        """Check the loops whose results only leave."""
        for s, trace in self.env.programs.items():
            for atom in trace.outputs:
                if not isinstance(atom, Literal) and (s, atom) not in self.values:
                    i, op = self.makers[s, atom]
                    self._finish(s, op, f"{op.name} (species {s}, op {i})")


def _alone(op: Op, own: Sequence[Any]) -> list[Any]:
    outs = op.bind_fn(*own)
    return [x if jnp.issubdtype(x.dtype, jax.dtypes.extended) else np.asarray(x)
            for x in outs]


def _true(x: Stack, row: int) -> Any:
    """Return one row's value without its padding."""
    array = x.array if is_opaque(x) else np.asarray(x.array)
    array = array[row] if x.is_stacked else array
    return array[tuple(map(slice, x.sizes[row]))]


def _check_clean(x: Stack, what: str) -> None:
    for axis in range(len(x.shape)):
        if x.clean[axis] and not x.is_full(axis) and not is_opaque(x):
            array = np.asarray(_rules.to_stacked(x).array)
            outside = np.broadcast_to(~_inside(x, axis), array.shape)
            if np.any(array[outside]):
                raise Wrong(f"{what}: padding of axis {axis} is called zero, but is not")


def same(actual: Any, expected: Any, what: str) -> None:
    """Check for equal bits, any NaN like any other."""
    if jnp.issubdtype(actual.dtype, jax.dtypes.extended):
        actual, expected = map(jax.random.key_data, (actual, expected))
    a, e = np.asarray(actual), np.asarray(expected)
    if (a.shape, a.dtype) != (e.shape, e.dtype):
        raise Wrong(f"{what}: found {a.dtype}{a.shape}, not {e.dtype}{e.shape}")
    if not is_same(a, e):
        raise Wrong(f"{what}: found\n{a}\nnot\n{e}")


def is_same(a: np.ndarray, e: np.ndarray) -> bool:
    if a.tobytes() == e.tobytes():
        return True
    if not jnp.issubdtype(a.dtype, np.inexact):
        return False
    nan = np.isnan(a)
    signs = (np.signbit(x.real) for x in (a, e))
    is_equal = (a == e) & np.equal(*signs)
    return bool(np.all(np.where(nan, np.isnan(e), is_equal)))


def compare(actual: Any, expected: Any, op: Op, own: Sequence[Any], what: str) -> None:
    """Check an output: equal bits, or a tolerance where the op rounds."""
    shapes = f"{[x.shape for x in op.in_specs]} to {[x.shape for x in op.specs]}"
    what = f"{what}; {shapes}, {op.params}"
    if op.name not in ROUNDED or not jnp.issubdtype(expected.dtype, np.inexact):
        return same(actual, expected, what)
    if (actual.shape, actual.dtype) != (expected.shape, expected.dtype):
        raise Wrong(f"{what}: found {actual.dtype}{actual.shape}")
    terms = max(op.flops / max(op.specs[0].size, 1), 1)
    wide = np.complex128 if np.iscomplexobj(expected) else np.float64
    eps = float(ml_dtypes.finfo(expected.dtype).eps)
    a, e = actual.astype(wide), expected.astype(wide)
    limit = 8 * eps * math.sqrt(terms) * max(map(_largest, (e, *own)))
    is_close = np.isclose(a, e, rtol=0, atol=limit, equal_nan=True)
    if not is_close.all():
        raise Wrong(f"{what}: found\n{actual}\nnot\n{expected}")


def _largest(x: Any) -> float:
    if not jnp.issubdtype(x.dtype, np.inexact):
        return 1.0
    x = np.abs(np.asarray(x)).astype(np.float64)
    return float(np.max(x, where=np.isfinite(x), initial=1.0))
