"""Launches while they are being planned, and what they cost alone and together."""

from __future__ import annotations

import math
from collections.abc import Hashable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np

from stfuse import _rules
from stfuse._program import Literal, Op, Trace, has_while, op_flops, shapes_of
from stfuse._trace import scan_parts, trace_body
from stfuse._tree import is_typed_key
from stfuse._types import Cost

Shapes = tuple[tuple[int, ...], ...]


@dataclass(slots=True, eq=False)
class Draft:
    """A launch while it is being planned.

    Attributes:
        op: its first member's op.
        form: what its members have in common.
        after: the three primitives after it, of its first member.
        members: op index by species.
        banks: whose parameters its members have.
        rows: jobs of all its members.
        ins: padded shapes of its operands.
        outs: padded shapes of its outputs.
        work: flops (heavy) or bytes (light) of its members, unpadded.
        cost_s: predicted time.
        alone_s: predicted time of its members, each by itself.
        deps: launches that it reads.
        reads: per operand what its first member reads there.
        is_fixed: whether only parameters go into it.
        turns: of a scan, how often its body runs.
        body: of a scan, the launches of its body.
    """

    op: Op
    form: tuple[int, int]
    after: tuple[str, ...]
    members: dict[int, int]
    banks: set[Hashable]
    rows: int
    ins: Shapes
    outs: Shapes
    work: float
    cost_s: float
    alone_s: float
    deps: set[Draft]
    reads: tuple[Any, ...]
    is_fixed: bool = False
    turns: int = 1
    body: list[Draft] | None = None


@dataclass(frozen=True, slots=True)
class Joint:
    """What a launch would be with one more member; ``gain_s`` is the time saved."""

    gain_s: float
    ins: Shapes
    outs: Shapes
    cost_s: float
    turns: int = 1
    body: list[Draft] | None = None


@dataclass(frozen=True, slots=True)
class Terms:
    """What the planner goes by.

    Attributes:
        cost: the device.
        max_waste: cap on padded work over true work, minus one; None for none.
        counts: jobs per species.
        banks: per species, whose parameters it has; equal ones never share a launch.
        numbers: of the forms met so far.
    """

    cost: Cost
    max_waste: float | None
    counts: Sequence[int]
    banks: Sequence[Hashable]
    numbers: dict[Hashable, int] = field(default_factory=dict)

    def number(self, form: Hashable) -> int:
        """Return a small number for a form: equal ones for equal forms."""
        return self.numbers.setdefault(form, len(self.numbers))

    def alone_s(self, op: Op, rows: int) -> float:
        """Return the predicted time of one op of one species."""
        ins, outs = shapes_of(op.in_specs), shapes_of(op.specs)
        return launch(op, ins, outs, rows, self)[0]

    def form(self, op: Op, shared: tuple[Hashable, ...]) -> tuple[int, int]:
        """Return an op's form, and what its operands share among all slots.

        Loops may differ in their bodies, and most of them in length.
        """
        own = self.numbers.get(op.key)
        if own is None:
            is_loop = op.name == "scan" and op.primitive is not None
            rule = _loop_form(op) if is_loop else _rules.form(op)
            own = self.numbers[op.key] = self.number(("form", rule))
        is_shared = any(tag is not None for tag in shared)
        return own, self.number(("shared", shared)) if is_shared else -1


def _loop_form(op: Op) -> Hashable:
    """Return which way a scan goes, and what of it cannot be padded.

    A loop in its body may never end on turns that are padding; keys have none.
    """
    length = op.params["length"] if has_while(op.params) else None
    specs = enumerate((*op.in_specs, *op.specs))
    keys = tuple((i, spec.shape) for i, spec in specs if is_typed_key(spec))
    return "scan", op.params["reverse"], length, keys


def singles(
    s: int,
    trace: Trace,
    tags: dict[int, Hashable],
    terms: Terms,
    num_fixed: int | None = None,
) -> list[Draft]:
    """Return a species' ops as launches of their own.

    Args:
        s: the species.
        trace: its program.
        tags: marks of values that all slots share, by value; extended here.
        terms: what the planner goes by.
        num_fixed: how many of its first values are parameters, or a loop's constants.
    """
    num_fixed = trace.num_params if num_fixed is None else num_fixed
    fixed = set(range(num_fixed))
    made_by: dict[int, tuple[Draft, int]] = {}
    names = [op.name for op in trace.ops]
    drafts = []
    for i, op in enumerate(trace.ops):
        atoms = [a for a in op.inputs if not isinstance(a, Literal)]
        shared = _pass_on(op, [tags.get(a) for a in atoms], tags, terms)
        is_fixed = not op.is_heavy and bool(atoms) and fixed.issuperset(atoms)
        if is_fixed:
            fixed.update(op.outputs)
        cost_s = terms.alone_s(op, terms.counts[s])
        draft = Draft(
            op=op,
            form=terms.form(op, shared),
            after=tuple(names[i + 1 : i + 4]),
            members={s: i},
            banks={terms.banks[s]},
            rows=terms.counts[s],
            ins=shapes_of(op.in_specs),
            outs=shapes_of(op.specs),
            work=(op.flops if op.is_heavy else op.num_bytes) * terms.counts[s],
            cost_s=cost_s,
            alone_s=cost_s,
            deps={made_by[a][0] for a in atoms if a in made_by},
            reads=_reads(op, made_by, tags),
            is_fixed=is_fixed,
            body=_body(s, op, tags, terms),
        )
        if draft.body is not None:
            draft.turns = op.params["length"]
            draft.work = padded_work(draft)
            draft.cost_s = draft.alone_s = loop_s(draft.body, draft.turns, terms)
        made_by.update((v, (draft, k)) for k, v in enumerate(op.outputs))
        drafts.append(draft)
    return drafts


def _reads(
    op: Op, made_by: Mapping[int, tuple[Draft, int]], tags: Mapping[int, Hashable]
) -> tuple[Any, ...]:
    """Return per operand the launch and the output that it is, or what was given."""
    return tuple(
        ("literal",)
        if isinstance(a, Literal)
        else made_by.get(a, ("given", tags.get(a)))
        for a in op.inputs
    )


def _pass_on(
    op: Op, shared: list[Hashable], tags: dict[int, Hashable], terms: Terms
) -> tuple[Hashable, ...]:
    """Mark the outputs of an op that reads shared values only."""
    if shared and None not in shared:
        for k, number in enumerate(op.outputs):
            tag = (op.key, _literals(op), tuple(shared), k)
            tags[number] = terms.number(("tag", tag))
    return tuple(shared)


def _body(
    s: int, op: Op, tags: dict[int, Hashable], terms: Terms
) -> list[Draft] | None:
    """Return the launches of a scan's body."""
    if op.name != "scan" or op.primitive is None:
        return None
    inner = trace_body(op)
    own = [None if isinstance(a, Literal) else tags.get(a) for a in op.inputs]
    held = {inner.num_params + q: own[q] for q in range(scan_parts(op)[0])}
    shared = {v: tag for v, tag in held.items() if tag is not None}
    return singles(s, inner, shared, terms, inner.num_params + len(held))


def copied(drafts: Iterable[Draft]) -> list[Draft]:
    """Return launches that can be merged without changing these."""
    twins: dict[Draft, Draft] = {}
    for d in drafts:
        reads = tuple(
            (twins[r[0]], r[1]) if isinstance(r[0], Draft) else r
            for r in d.reads  # type: ignore[misc]
        )
        deps = {twins[x] for x in d.deps}
        twins[d] = replace(
            d, members=dict(d.members), banks=set(d.banks), deps=deps, reads=reads
        )
    return list(twins.values())


def wider(a: tuple[int, ...], b: tuple[int, ...]) -> tuple[int, ...]:
    """Return the elementwise maximum of two shapes."""
    # Called for every pair of launches looked at: plain comparisons, no calls.
    if len(a) == 2:
        (m, n), (p, q) = a, b
        return (m if m > p else p, n if n > q else q)
    return tuple([x if x > y else y for x, y in zip(a, b)])  # noqa: B905


def _literals(op: Op) -> Hashable:
    return tuple(
        (i, repr(a.value)) for i, a in enumerate(op.inputs) if isinstance(a, Literal)
    )


def work(op: Op, ins: Shapes, outs: Shapes) -> float:
    """Return what one row of a launch does: flops if it is heavy, else bytes."""
    if op.is_heavy:
        return op_flops(op.name, op.params, ins, outs)
    return num_bytes(op, ins, outs)


def num_bytes(op: Op, ins: Any, outs: Any) -> Any:
    """Return what one row of a launch reads and writes."""
    total = 0.0
    for shape, size in zip((*ins, *outs), op.itemsizes, strict=True):
        total += math.prod(shape) * size
    return total


def launch(op: Op, ins: Any, outs: Any, rows: Any, terms: Terms) -> tuple[Any, Any]:
    """Return a launch's predicted time at some padded shapes, and the work it does.

    Sizes and rows may be arrays, for many launches at once.
    """
    moved = num_bytes(op, ins, outs)
    if not op.is_heavy:
        return _seconds(terms.cost, 0.0, moved * rows), moved * rows
    flops = op_flops(op.name, op.params, ins, outs)
    if op.name == "conv_general_dilated" and terms.cost.source == "cpu":
        # Stacked kernels are multiplied with patches, which are written and read.
        patches = flops / np.maximum(_out_features(op, outs), 1)
        moved = moved + np.where(rows > 1, patches * op.itemsizes[-1], 0.0)
    return _seconds(terms.cost, flops * rows, moved * rows), flops * rows


def _seconds(cost: Cost, flops: Any, moved: Any) -> Any:
    if isinstance(moved, np.ndarray):
        return np.vectorize(cost.seconds, otypes=[float])(flops, moved)
    return cost.seconds(flops, moved)


def _out_features(op: Op, outs: Any) -> Any:
    return outs[0][op.params["dimension_numbers"].out_spec[1]]


def loop_s(body: Sequence[Draft], turns: int, terms: Terms) -> float:
    """Return the time of a loop: its heavy launches, and one for the rest."""
    turn_s = sum(d.cost_s for d in body if d.op.is_heavy) + terms.cost.launch_s
    return turns * turn_s + terms.cost.launch_s


def padded_work(draft: Draft) -> float:
    """Return what a launch does, padding included."""
    if draft.body is not None:
        heavy = (d for d in draft.body if d.op.is_heavy)
        return draft.turns * sum(map(padded_work, heavy))
    return work(draft.op, draft.ins, draft.outs) * draft.rows


def is_wasteful(done: Any, true: Any, terms: Terms) -> Any:
    """Return whether padded work goes beyond ``max_waste``."""
    if terms.max_waste is None:
        return False
    return done > true * (1 + terms.max_waste) * (1 + 1e-9)
