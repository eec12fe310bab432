"""Evaluates a fused plan, and beside it every op alone: who was wrong first?

Each launch is checked by itself. What it read must be, bit for bit, what the step had
made before; what it made must be what each job's op makes of that. So an error is
named where it happens, and roundings do not add up. All of it is one function,
compiled in haste; whether padding is poisoned is one of its arguments.
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
from stfuse._bank import open_shelves
from stfuse._evaluate import evaluate
from stfuse._inputs import check_inputs
from stfuse._part import Part
from stfuse._program import Literal, Op
from stfuse._rules import Merge, Stack
from stfuse._stacked import cut
from stfuse._together import How, Probe
from stfuse._values import Env

# Results that depend on the order of roundings, or on a library's last bit. What adds
# and multiplies is among them: compiled together, the two may round once.
ROUNDED = frozenset(
    "acos acosh add add_any asin asinh atan atan2 atanh cbrt cholesky cond "
    "conv_general_dilated cos cosh cumlogsumexp cumprod cumsum digamma div dot_general "
    "eigh erf erf_inv erfc exp exp2 expm1 fft integer_pow lgamma log log1p logistic lu "
    "mul pow qr reduce_prod reduce_sum reduce_window_sum rem rsqrt scan scatter-add "
    "scatter-mul scatter_add scatter_mul select_and_gather_add select_and_scatter_add "
    "sin sinh sqrt square sub svd tan tanh triangular_solve while".split()
)
# Programs that run twice: nearly all their time would go to the optimizer.
HASTY = {
    "xla_allow_excess_precision": False,
    "xla_backend_optimization_level": 0,
    "xla_llvm_disable_expensive_passes": True,
}
if jax.version.__version_info__ < (0, 11):  # later versions have one emitter only
    HASTY["xla_cpu_use_fusion_emitters"] = False
Given = dict[tuple[int, int], list[Any]]


class Wrong(AssertionError):
    """A launch that does not give what its ops give alone."""


def run(fused: stfuse.Fused, requests: Mapping[str, Any]) -> dict[str, Any]:
    """Check every launch over one row of each request; then again, padding poisoned.

    Poison fills all padding that is not surely zero with NaN, or the largest integer,
    before each launch of unlike ops, in the bodies of loops too.

    Args:
        fused: whose plan to check.
        requests: inputs by name; their first row is used.

    Returns:
        ``{name: outputs}``, one row each.

    Raises:
        Wrong: the first launch that is wrong.
    """
    try:
        return check(fused, requests, is_compiled=True)
    except Wrong:
        # A compiler computes some values twice, and may round them in two ways.
        return check(fused, requests, is_compiled=False)


def check(
    fused: stfuse.Fused, requests: Mapping[str, Any], *, is_compiled: bool
) -> dict[str, Any]:
    """Check every launch as `run` does: compiled, or op by op, which is slower."""
    first = {n: _first_row(fused.jobs[n], x) for n, x in requests.items()}
    stacked = fused.stack(first)
    checks: list[_Check] = []

    def step(stacks: Any, inputs: Any, given: Any, is_poisoned: Any) -> Any:
        checks[:] = _checked(fused, stacks, stacked.slots, inputs, given, is_poisoned)
        outputs: list[Any] = [None] * len(fused._layout.outputs)
        for check in checks:
            for i, x in zip(
                check.part.outputs, check.part.leave(check.env), strict=True
            ):
                outputs[i] = x[:, None]
        return outputs, [check.arrays for check in checks]

    given = _given(fused, first, stacked.slots)
    args = fused.pack().stacks, stacked.inputs, given
    if is_compiled:
        step = jax.jit(step).lower(*args, np.bool_(False)).compile(HASTY)
    answers = []
    for is_poisoned in (False, True):
        outputs, columns = step(*args, np.bool_(is_poisoned))
        for check, arrays in zip(checks, columns, strict=True):
            host = list(map(np.asarray, arrays))
            for record in check.records:
                when = "padding poisoned: " * is_poisoned
                record.check(host, when, is_compiled)
        answers.append(_split(fused, stacked.places, outputs))
    for name in requests:
        pairs = zip(*(jax.tree.leaves(own[name]) for own in answers), strict=True)
        for e, a in pairs:
            same(np.asarray(a), np.asarray(e), f"padding changed an answer of {name}")
    return answers[0]


def _first_row(job: stfuse.Job, inputs: Any) -> Any:
    return jax.tree.map(lambda x: np.asarray(x)[:1], inputs) if job.batched else inputs


def _split(fused: stfuse.Fused, places: Any, outputs: Sequence[Any]) -> dict[str, Any]:
    host = [x if x is None else np.asarray(x) for x in outputs]
    return {n: cut(host, own, 0, 0, rows, fused.jobs[n]) for n, own, rows in places}


def _checked(
    fused: stfuse.Fused,
    stacks: Any,
    slots: Sequence[Any],
    inputs: Sequence[Any],
    given: Given,
    is_poisoned: Any,
) -> list["_Check"]:
    """Evaluate each component of a plan under a check of its own."""
    layout, plan = fused._layout, fused.plan
    counts = _step.slot_counts(layout, slots)
    stacks = open_shelves(layout, stacks)
    checks = []
    for component in layout.components:
        present = {s: counts[s] for s in component if s in counts}
        if present:
            part = Part(plan, layout, present)
            views = [(x, None, None) for x in part.views(stacks, slots)]
            env = part.env(part.traces, views)
            part.enter(env, [jnp.asarray(inputs[i])[:, 0] for i in part.inputs])
            check = _Check(part, env, given)
            probe = Probe(lambda x: poisoned(x, is_poisoned), check.launched)
            evaluate(env, plan.nodes, How(1, plan.cost, "auto", probe))
            check.finish()
            checks.append(check)
    return checks


def _given(
    fused: stfuse.Fused, requests: Mapping[str, Any], slots: Sequence[Any]
) -> Given:
    """Return parameters and inputs per species and value, one a slot; no padding."""
    inside = {}
    for name, x in requests.items():
        checked = check_inputs(fused.jobs[name], x, call="lockstep")
        inside[fused._where[name][checked.length]] = [v[0] for v in checked.leaves]
    found = {}
    for s, count in _step.slot_counts(fused._layout, slots).items():
        one = fused.plan.species[s]
        rows = []
        for slot in range(count) if slots[s] is None else slots[s]:
            name, length, _ = fused._programs[one.members[slot]]
            own = fused._leaves(name, length, fused.jobs[name].params)
            rows.append([*own, *inside[s, int(slot)]])
        for v, spec in enumerate(one.trace.specs):
            found[s, v] = [_as(row[v], spec) for row in rows]
    return found


def _as(x: Any, spec: Any) -> Any:
    return x if is_opaque(spec) else np.asarray(x, spec.dtype).reshape(spec.shape)


def is_opaque(x: Any) -> bool:
    """Return whether something holds what NumPy has no values for."""
    return jnp.issubdtype(x.dtype, jax.dtypes.extended)


def poison_of(dtype: Any) -> Any:
    """Return the worst value that padding can hold."""
    if jnp.issubdtype(dtype, np.inexact):
        return np.nan
    return True if np.dtype(dtype).kind == "b" else np.iinfo(dtype).max


def poisoned(x: Stack, is_poisoned: Any = True) -> Stack:
    """Return a stack whose padding is the worst, but for what is surely zero."""
    axes = range(len(x.shape))
    dirty = [a for a in axes if not x.is_zero_padded(a)]
    if not dirty or is_opaque(x.array):
        return x
    keep = np.ones((1, *(1 for _ in axes)), bool)
    for a in dirty:
        keep = keep & _inside(x, a)
    for a in axes:  # what is beyond a clean axis is zero, wherever it is
        if a not in dirty and not x.is_full(a):
            keep = keep | ~_inside(x, a)
    is_stacked = x.is_stacked or len(keep) > 1
    array = _rules.to_stacked(x).array if is_stacked else x.array[None]
    worst = jnp.asarray(poison_of(array.dtype), array.dtype)
    array = jnp.where(keep | jnp.logical_not(is_poisoned), array, worst)
    array = array if is_stacked else array[0]
    return dataclasses.replace(x, array=array, is_stacked=is_stacked)


def _inside(x: Stack, axis: int) -> np.ndarray:
    """Return what is true data along an axis: bool ``[R or 1, 1, .., size, .., 1]``."""
    sizes = x.sizes[:, axis]
    sizes = sizes if (sizes != sizes[0]).any() else sizes[:1]
    shape = [1] * (1 + len(x.shape))
    shape[1 + axis] = x.shape[axis]
    places = np.arange(x.shape[axis]).reshape(shape)
    return places < sizes.reshape(-1, *(1,) * len(x.shape))


@dataclasses.dataclass(frozen=True, slots=True)
class _Record:
    """Two arrays that must be equal, to the bit if no op is named."""

    what: str
    actual: int
    expected: int
    op: Op | None = None
    own: tuple[int, ...] = ()

    def check(self, arrays: Sequence[np.ndarray], when: str, is_compiled: bool) -> None:
        """Check for equal bits, unless the op rounds, or a compiler may have."""
        a, e = arrays[self.actual], arrays[self.expected]
        op, own = self.op, [arrays[i] for i in self.own]
        what = f"{when}{self.what}, {op.params if op else ''}"
        is_rounded = op is not None and op.name in ROUNDED
        if is_rounded or (is_compiled and not all(map(is_whole, (a, e, *own)))):
            close(a, e, op, own, what)
        else:
            same(a, e, what)


class _Check:
    """What every species' values are, one a slot, and what is to be compared."""

    def __init__(self, part: Part, env: Env, given: Given) -> None:
        self.part, self.env, self.values = part, env, dict(given)
        self.records: list[_Record] = []
        self.arrays: list[Any] = []
        self.numbers: dict[int, int] = {}
        self.makers = {
            (s, v): (i, op)
            for s, trace in env.programs.items()
            for i, op in enumerate(trace.ops)
            for v in op.outputs
        }

    def number(self, x: Any) -> int:
        """Return where an array stands among those that are compared."""
        if id(x) not in self.numbers:
            self.numbers[id(x)] = len(self.arrays)
            self.arrays.append(x)
        return self.numbers[id(x)]

    def record(
        self, what: str, a: Any, e: Any, op: Op | None = None, own: Sequence[Any] = ()
    ) -> None:
        values = [jax.random.key_data(x) if is_opaque(x) else x for x in (a, e, *own)]
        actual, expected, *rest = map(self.number, values)
        self.records.append(_Record(what, actual, expected, op, tuple(rest)))
        self.numbers = {id(x): n for n, x in enumerate(self.arrays)}

    def launched(
        self,
        merge: Merge,
        members: Sequence[tuple[int, int]],
        operands: Sequence[Stack],
        outs: Sequence[Stack],
    ) -> None:
        """Note one launch: what it read, then what it made of that."""
        s, i = members[0]
        ops = self.env.programs[s].ops
        if i >= len(ops) or ops[i] is not merge.ops[0]:
            return  # inside a loop's body: its results are compared, at its end
        start = 0
        for (s, i), op, count in zip(members, merge.ops, merge.counts, strict=True):
            for k in range(count):
                who = f"{_who(s, i, op)}, slot {k}, launched with {members}"
                own = [self.own(s, k, atom) for atom in op.inputs]
                for p, x in enumerate(operands):
                    what = f"operand {p} of {who}"
                    self.record(what, true_region(x, start + k), own[p])
                made = [true_region(x, start + k) for x in outs]
                self.made(s, op, own, made, who)
            start += count
        for q, x in enumerate(outs):
            for axis in range(len(x.shape)):
                self.zero(x, axis, f"output {q} of {merge.wide.name} {members}")

    def made(
        self, s: int, op: Op, own: Sequence[Any], made: Sequence[Any], who: str
    ) -> None:
        alone = op.bind_fn(*own)
        for q, (a, e) in enumerate(zip(made, alone, strict=True)):
            self.record(f"output {q} of {who}", a, e, op, own)
            self.values.setdefault((s, op.outputs[q]), []).append(a)

    def zero(self, x: Stack, axis: int, what: str) -> None:
        """Note that clean padding must be zero."""
        if x.clean[axis] and not x.is_full(axis) and not is_opaque(x.array):
            array = _rules.to_stacked(x).array
            is_wrong = jnp.any((array != 0) & ~_inside(x, axis))
            what = f"{what}: padding of axis {axis} is called zero, but is not"
            self.record(what, is_wrong, np.zeros((), bool))

    def own(self, s: int, k: int, atom: Any) -> Any:
        """Return one job's value."""
        if isinstance(atom, Literal):
            return np.asarray(atom.value, atom.spec.dtype)
        if (s, atom) not in self.values:
            self.shared_loop(s, *self.makers[s, atom])
        return self.values[s, atom][k]

    def shared_loop(self, s: int, i: int, op: Op) -> None:
        """Note what a loop that several species run made for one of them."""
        for k in range(self.env.counts[s]):
            own = [self.own(s, k, atom) for atom in op.inputs]
            made = []
            for v, spec in zip(op.outputs, op.specs, strict=True):
                held = self.env.values[s, v]
                x = held.array[held.starts[s] + k] if held.is_stacked else held.array
                made.append(x[tuple(map(slice, spec.shape))])
            self.made(s, op, own, made, f"{_who(s, i, op)}, slot {k}, a shared loop")

    def finish(self) -> None:
        """Note the loops whose results nobody read."""
        for s, trace in self.env.programs.items():
            for atom in trace.outputs:
                self.own(s, 0, atom)


def _who(s: int, i: int, op: Op) -> str:
    shapes = [x.shape for x in op.in_specs], [x.shape for x in op.specs]
    return f"{op.name} {shapes[0]} to {shapes[1]} (species {s}, op {i})"


def true_region(x: Stack, row: int) -> Any:
    """Return one row's value without its padding."""
    array = x.array[row] if x.is_stacked else x.array
    return array[tuple(slice(0, int(n)) for n in x.sizes[row])]


def same(a: np.ndarray, e: np.ndarray, what: str) -> None:
    """Check for equal bits, any NaN like any other."""
    if (a.shape, a.dtype) != (e.shape, e.dtype):
        raise Wrong(f"{what}: found {a.dtype}{a.shape}, not {e.dtype}{e.shape}")
    if a.tobytes() == e.tobytes():
        return
    is_equal = a == e
    if jnp.issubdtype(a.dtype, np.inexact):
        is_equal &= np.signbit(a.real) == np.signbit(e.real)
        is_equal |= np.isnan(a) & np.isnan(e)
    if not is_equal.all():
        raise Wrong(f"{what}: found\n{a}\nnot\n{e}")


def close(
    a: np.ndarray, e: np.ndarray, op: Op | None, own: Sequence[Any], what: str
) -> None:
    """Check within a tolerance: the roundings of a sum of an op's length."""
    if not jnp.issubdtype(e.dtype, np.inexact) or a.shape != e.shape:
        return same(a, e, what)
    terms = max(op.flops / max(e.size, 1), 1) if op else 1
    wide = np.complex128 if np.iscomplexobj(e) else np.float64
    eps = float(ml_dtypes.finfo(e.dtype).eps)
    x, y = a.astype(wide), e.astype(wide)
    limit = 8 * eps * math.sqrt(terms) * max(map(_largest, (e, *own)))
    if a.dtype != e.dtype or not np.isclose(x, y, 0, limit, equal_nan=True).all():
        raise Wrong(f"{what}: found\n{a}\nnot\n{e}\nof {own}")


def is_whole(x: np.ndarray) -> bool:
    """Return whether all values are exact in any order of sums."""
    return not jnp.issubdtype(x.dtype, np.inexact) or bool(np.all(x == np.round(x)))


def _largest(x: np.ndarray) -> float:
    if not jnp.issubdtype(x.dtype, np.inexact):
        return 1.0
    x = np.abs(x).astype(np.float64)
    return float(np.max(x, where=np.isfinite(x), initial=1.0))
