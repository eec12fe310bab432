"""Traces to Plan: which ops of which jobs share a launch. Pure Python, no arrays.

Rules:
    Jobs whose traces have equal keys are one species; all bookkeeping is per species.
    Ops may share a launch if their forms are equal (`_rules.form`). Whether they do is
    a matter of cost: launch + max(bytes / bandwidth, flops / rate), at the padded
    shape, must be less together than apart, within ``max_waste``.
    Species are merged one by one, the longest first, into one sequence of launches.
    Heavy ops are aligned by dynamic programming; light ones follow what they read: two
    that read the same launches share one, so that their operands already line up.
    An op whose operands are shared by all slots joins only ops that share the same.
    Every species keeps its own trace order, so any alignment is a valid schedule.
    Nothing depends on hashes or names: equal inputs give equal plans.
"""

from __future__ import annotations

import heapq
import math
from collections.abc import Hashable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from stfuse import _rules
from stfuse._plan import Launch, Node, Plan, Species, count_apart, group
from stfuse._program import Literal, Op, Trace, op_flops, shapes_of
from stfuse._trace import scan_parts, trace_body
from stfuse._types import Cost

Shapes = tuple[tuple[int, ...], ...]
# Beyond this many pairs of heavy ops, only those near the diagonal are compared.
_MAX_PAIRS = 200_000


@dataclass(slots=True, eq=False)
class _Draft:
    """A launch while it is being planned.

    Attributes:
        op: its first member's op.
        form: what its members have in common.
        members: op index by species.
        rows: jobs of all its members.
        ins: padded shapes of its operands.
        outs: padded shapes of its outputs.
        work: flops (heavy) or bytes (light) of its members, unpadded.
        cost_s: predicted time.
        deps: launches that it reads.
        reads: per operand what its first member reads there.
        turns: of a scan, how often its body runs.
        body: of a scan, the launches of its body.
    """

    op: Op
    form: Hashable
    members: dict[int, int]
    rows: int
    ins: Shapes
    outs: Shapes
    work: float
    cost_s: float
    deps: set[_Draft]
    reads: tuple[Any, ...]
    turns: int = 1
    body: list[_Draft] | None = None


@dataclass(frozen=True, slots=True)
class _Joint:
    """What a launch would be with one more member; ``gain_s`` is the time saved."""

    gain_s: float
    ins: Shapes
    outs: Shapes
    cost_s: float
    turns: int = 1
    body: list[_Draft] | None = None


@dataclass(frozen=True, slots=True)
class _Rules:
    """What the planner goes by.

    Attributes:
        cost: the device.
        max_waste: cap on padded work over true work, minus one; None for none.
        counts: jobs per species.
        banks: per species, whose parameters it has; equal ones never share a launch.
        memo: joints by shapes.
    """

    cost: Cost
    max_waste: float | None
    counts: Sequence[int]
    banks: Sequence[Hashable]
    memo: dict[Hashable, _Joint | None] = field(default_factory=dict)


def align(
    names: Sequence[str],
    traces: Sequence[Trace],
    cost: Cost,
    *,
    max_waste: float | None = None,
    shares: Sequence[Sequence[Hashable]] | None = None,
    banks: Sequence[Hashable] | None = None,
    counts: Sequence[int] | None = None,
) -> Plan:
    """Decide which ops share a launch.

    Args:
        names: the jobs' names.
        traces: their traces, in the same order.
        cost: the device to plan for.
        max_waste: most padded work over true work, minus one, of any launch.
        shares: per species and parameter, a mark that is equal for equal arrays if all
            slots share it; None where each slot has its own.
        banks: per species a mark that is equal for programs of the same jobs.
        counts: slots per species, if there are more than jobs.

    Returns:
        The plan; its lowerings are still to be chosen.
    """
    species = group(traces)
    rules = _Rules(
        cost,
        max_waste,
        counts or [len(one.members) for one in species],
        banks if banks is not None else range(len(species)),
    )
    marks = shares or [()] * len(species)
    drafts = _schedule({s: one.trace for s, one in enumerate(species)}, marks, rules)
    solo = _why_solo(drafts, rules) if len(species) > 1 else {}
    return Plan(
        names=tuple(names),
        species=species,
        launches=tuple(
            _launch(d, names, species, solo.get(d, "")) for d in drafts if d.op.is_heavy
        ),
        cost=cost,
        nodes=tuple(map(_node, drafts)),
        apart=count_apart(
            (d.op.name, why) for d, why in solo.items() if not d.op.is_heavy
        ),
    )


def schedule(
    programs: Mapping[int, Trace], cost: Cost, counts: Sequence[int]
) -> tuple[Node, ...]:
    """Return the launches of some programs that are no jobs': derivatives.

    Args:
        programs: per species.
        cost: the device.
        counts: slots of every species, by species.
    """
    rules = _Rules(cost, None, counts, range(len(counts)))
    return tuple(map(_node, _schedule(programs, [()] * len(counts), rules)))


def _schedule(
    programs: Mapping[int, Trace], marks: Sequence[Sequence[Hashable]], rules: _Rules
) -> list[_Draft]:
    """Merge programs into one sequence of launches, the longest first."""
    by_length = sorted(
        programs, key=lambda s: (-sum(op.is_heavy for op in programs[s].ops), s)
    )
    drafts: list[_Draft] = []
    for s in by_length:
        tags = dict(enumerate(marks[s]))
        drafts = _merge(drafts, _singles(s, programs[s], tags, rules), s, rules)
    return drafts


def _singles(
    s: int, trace: Trace, tags: dict[int, Hashable], rules: _Rules
) -> list[_Draft]:
    """Return a species' ops as launches of their own.

    Args:
        s: the species.
        trace: its program.
        tags: marks of values that all slots share, by value; extended here.
        rules: what the planner goes by.
    """
    made_by: dict[int, tuple[_Draft, int]] = {}
    drafts = []
    for i, op in enumerate(trace.ops):
        atoms = [a for a in op.inputs if not isinstance(a, Literal)]
        shared = tuple(tags.get(a) for a in atoms)
        if atoms and None not in shared:
            for k, number in enumerate(op.outputs):
                tags[number] = (op.key, _literals(op), shared, k)
        body = None
        if op.name == "scan" and op.primitive is not None:
            inner = trace_body(op)
            num_consts = scan_parts(op)[0]
            own = [None if isinstance(a, Literal) else tags.get(a) for a in op.inputs]
            held = {inner.num_params + q: own[q] for q in range(num_consts)}
            body = _singles(s, inner, {v: t for v, t in held.items() if t}, rules)
        ins, outs = shapes_of(op.in_specs), shapes_of(op.specs)
        reads = tuple(
            ("literal",)
            if isinstance(a, Literal)
            else made_by.get(a, ("given", tags.get(a)))
            for a in op.inputs
        )
        draft = _Draft(
            op=op,
            form=(_form(op), shared if any(t is not None for t in shared) else ()),
            members={s: i},
            rows=rules.counts[s],
            ins=ins,
            outs=outs,
            work=_work(op, ins, outs) * rules.counts[s],
            cost_s=_cost_s(op, ins, outs, rules.counts[s], body, rules),
            deps={made_by[a][0] for a in atoms if a in made_by},
            reads=reads,
            turns=op.params["length"] if body is not None else 1,
            body=body,
        )
        made_by.update((v, (draft, k)) for k, v in enumerate(op.outputs))
        drafts.append(draft)
    return drafts


def _merge(
    profile: list[_Draft], own: list[_Draft], s: int, rules: _Rules
) -> list[_Draft]:
    """Merge one species into the launches of those before it.

    The launches of ``profile`` take it in; what finds no partner stands between them.
    """
    if not profile:
        return own
    pairs = _match_heavy(profile, own, s, rules)
    merged = _Merging(profile, own, s, rules)
    at, start = 0, 0
    for there, here in [*pairs, (len(profile), len(own))]:
        merged.light(range(at, there), range(start, here))
        if here < len(own) and not merged.join(there, here):
            merged.alone(own[here], here)
        at, start = there + 1, here + 1
    return merged.ordered()


def _match_heavy(
    profile: list[_Draft], own: list[_Draft], s: int, rules: _Rules
) -> list[tuple[int, int]]:
    """Return the pairs of heavy launches that save the most time, in order."""
    left = [i for i, d in enumerate(profile) if d.op.is_heavy]
    right = [i for i, d in enumerate(own) if d.op.is_heavy]
    n, m = len(left), len(right)
    band = m if n * m <= _MAX_PAIRS else max(_MAX_PAIRS // n, 16)
    gains: dict[tuple[int, int], float] = {}
    best = [[0.0] * (m + 1) for _ in range(n + 1)]
    for i in range(n - 1, -1, -1):
        row, below = best[i], best[i + 1]
        middle = i * m // n
        for j in range(m - 1, -1, -1):
            row[j] = max(below[j], row[j + 1])
            if abs(j - middle) > band:
                continue
            gain_s = _gain_s(profile[left[i]], own[right[j]], s, rules)
            if gain_s > 0:
                gains[i, j] = gain_s
                row[j] = max(row[j], gain_s + below[j + 1])
    pairs, i, j = [], 0, 0
    while i < n and j < m:
        gain_s = gains.get((i, j), 0.0)
        if gain_s > 0 and best[i][j] == gain_s + best[i + 1][j + 1]:
            pairs.append((left[i], right[j]))
            i, j = i + 1, j + 1
        elif best[i][j] == best[i + 1][j]:
            i += 1
        else:
            j += 1
    return pairs


class _Merging:
    """One species on its way into a profile."""

    def __init__(
        self, profile: list[_Draft], own: list[_Draft], s: int, rules: _Rules
    ) -> None:
        self.profile, self.own, self.s, self.rules = profile, own, s, rules
        self.became: dict[_Draft, _Draft] = {}  # own launch to where it went
        self.is_foreign: dict[_Draft, bool] = {}
        self.keys: dict[_Draft, tuple[int, int, int]] = {
            d: (i, -1, 0) for i, d in enumerate(profile)
        }
        self.cursor = -1

    def join(self, there: int, here: int) -> bool:
        """Let a launch of the profile take in one of the species', if that pays."""
        target, draft = self.profile[there], self.own[here]
        joint = _joint(target, draft, self.s, self.rules)
        if joint is None or joint.gain_s <= 0:
            return False
        target.ins, target.outs, target.cost_s = joint.ins, joint.outs, joint.cost_s
        target.turns, target.body = joint.turns, joint.body
        target.members[self.s] = draft.members[self.s]
        target.rows += draft.rows
        target.work += draft.work
        target.deps |= {self.became[d] for d in draft.deps}
        self.became[draft] = target
        self.cursor = max(self.cursor, there)
        return True

    def light(self, there: range, here: range) -> None:
        """Place the launches between two pairs of heavy ones."""
        lined_up: dict[Hashable, list[int]] = {}
        alike: dict[Hashable, list[int]] = {}
        for i in there:
            draft = self.profile[i]
            if not draft.op.is_heavy:
                lined_up.setdefault((draft.form, draft.reads), []).append(i)
                alike.setdefault(draft.form, []).append(i)
        for j in here:
            draft = self.own[j]
            draft.reads = tuple(map(self._moved, draft.reads))
            if draft.op.is_heavy or not self._placed(draft, j, lined_up, alike):
                self.alone(draft, j)

    def _placed(self, draft: _Draft, j: int, lined_up: Any, alike: Any) -> bool:
        """Try the launches that read the same, then those that merely look alike."""
        for i in lined_up.get((draft.form, draft.reads), ()):
            if self.s not in self.profile[i].members:
                return self.join(i, j)
        if any(self._foreign(self.became[d]) for d in draft.deps):
            return False
        for i in alike.get(draft.form, ()):
            near = i > self.cursor and self.s not in self.profile[i].members
            if near and not any(map(self._foreign, self.profile[i].deps)):
                return self.join(i, j)
        return False

    def alone(self, draft: _Draft, j: int) -> None:
        """Keep a launch for the species by itself."""
        draft.deps = {self.became[d] for d in draft.deps}
        self.became[draft] = draft
        self.keys[draft] = (self.cursor, 0, j)
        self.is_foreign[draft] = draft.op.is_heavy or any(
            map(self._foreign, draft.deps)
        )

    def _moved(self, read: Any) -> Hashable:
        """Return what an operand reads, in terms of the merged launches."""
        if isinstance(read[0], _Draft):
            return (self.became[read[0]], read[1])
        return read

    def _foreign(self, draft: _Draft) -> bool:
        """Return whether a value descends from a heavy launch that is not shared.

        Merging what follows such a launch would copy its output first.
        """
        known = self.is_foreign.get(draft)
        if known is None:
            known = self.s not in draft.members and (
                draft.op.is_heavy or any(map(self._foreign, draft.deps))
            )
            self.is_foreign[draft] = known
        return known

    def ordered(self) -> list[_Draft]:
        """Return all launches, each after those that it reads."""
        drafts = [*self.profile, *(d for d in self.own if self.became[d] is d)]
        waits = {d: len(d.deps) for d in drafts}
        readers: dict[_Draft, list[_Draft]] = {d: [] for d in drafts}
        for d in drafts:
            for dep in d.deps:
                readers[dep].append(d)
        free = [(self.keys[d], n, d) for n, d in enumerate(drafts) if not waits[d]]
        numbers = {d: n for n, d in enumerate(drafts)}
        heapq.heapify(free)
        found = []
        while free:
            *_, d = heapq.heappop(free)
            found.append(d)
            for reader in readers[d]:
                waits[reader] -= 1
                if not waits[reader]:
                    heapq.heappush(free, (self.keys[reader], numbers[reader], reader))
        assert len(found) == len(drafts), "launches wait for one another"
        return found


def _gain_s(target: _Draft, draft: _Draft, s: int, rules: _Rules) -> float:
    joint = _joint(target, draft, s, rules)
    return joint.gain_s if joint else 0.0


def _joint(target: _Draft, draft: _Draft, s: int, rules: _Rules) -> _Joint | None:
    """Return what a launch would be with one more member; None if it may not."""
    if target.form != draft.form or s in target.members:
        return None
    if any(rules.banks[s] == rules.banks[other] for other in target.members):
        return None
    if target.body is not None:
        return _joint_scan(target, draft, s, rules)
    key = (target.form, target.ins, target.outs, target.rows, target.work)
    key = (*key, draft.ins, draft.outs, draft.rows)
    if key not in rules.memo:
        ins = tuple(map(_wider, target.ins, draft.ins))
        outs = tuple(map(_wider, target.outs, draft.outs))
        rows = target.rows + draft.rows
        cost_s = _cost_s(draft.op, ins, outs, rows, None, rules)
        done = _work(draft.op, ins, outs) * rows
        gain_s = target.cost_s + draft.cost_s - cost_s
        if _is_wasteful(done, target.work + draft.work, rules):
            gain_s = 0.0
        rules.memo[key] = _Joint(gain_s, ins, outs, cost_s)
    return rules.memo[key]


def _joint_scan(target: _Draft, draft: _Draft, s: int, rules: _Rules) -> _Joint | None:
    """Return a loop that runs the bodies of one more species, aligned inside."""
    body = _merge(_copied(target.body or ()), _copied(draft.body or ()), s, rules)
    turns = max(target.turns, draft.turns)
    cost_s = _loop_s(body, turns, rules)
    done = turns * sum(_padded_work(d) for d in body if d.op.is_heavy)
    gain_s = target.cost_s + draft.cost_s - cost_s
    if _is_wasteful(done, target.work + draft.work, rules):
        gain_s = 0.0
    return _Joint(gain_s, target.ins, target.outs, cost_s, turns, body)


def _copied(drafts: Iterable[_Draft]) -> list[_Draft]:
    """Return launches that can be merged without changing these."""
    twins: dict[_Draft, _Draft] = {}
    for d in drafts:
        reads = tuple(
            (twins[r[0]], r[1]) if isinstance(r[0], _Draft) else r
            for r in d.reads  # type: ignore[misc]
        )
        deps = {twins[x] for x in d.deps}
        twins[d] = replace(d, members=dict(d.members), deps=deps, reads=reads)
    return list(twins.values())


def _wider(a: tuple[int, ...], b: tuple[int, ...]) -> tuple[int, ...]:
    return tuple(map(max, a, b))


def _form(op: Op) -> Hashable:
    """Return an op's form; loops may differ in length and body."""
    if op.name == "scan" and op.primitive is not None:
        return ("scan", op.params["reverse"])
    return _rules.form(op)


def _literals(op: Op) -> Hashable:
    return tuple(
        (i, repr(a.value)) for i, a in enumerate(op.inputs) if isinstance(a, Literal)
    )


def _work(op: Op, ins: Shapes, outs: Shapes) -> float:
    """Return what one row of a launch does: flops if it is heavy, else bytes."""
    if op.is_heavy:
        return op_flops(op.name, op.params, ins, outs)
    return _num_bytes(op, ins, outs)


def _num_bytes(op: Op, ins: Shapes, outs: Shapes) -> float:
    specs = (*op.in_specs, *op.specs)
    return float(
        sum(
            math.prod(shape) * getattr(spec.dtype, "itemsize", 4)
            for shape, spec in zip((*ins, *outs), specs, strict=True)
        )
    )


def _cost_s(
    op: Op, ins: Shapes, outs: Shapes, rows: int, body: Any, rules: _Rules
) -> float:
    if body is not None:
        return _loop_s(body, op.params["length"], rules)
    flops = op_flops(op.name, op.params, ins, outs) if op.is_heavy else 0.0
    return rules.cost.seconds(flops * rows, _num_bytes(op, ins, outs) * rows)


def _loop_s(body: Sequence[_Draft], turns: int, rules: _Rules) -> float:
    """Return the time of a loop: its heavy launches, and one for the rest."""
    turn_s = sum(d.cost_s for d in body if d.op.is_heavy) + rules.cost.launch_s
    return turns * turn_s + rules.cost.launch_s


def _padded_work(draft: _Draft) -> float:
    """Return what a launch does, padding included."""
    if draft.body is not None:
        heavy = (d for d in draft.body if d.op.is_heavy)
        return draft.turns * sum(map(_padded_work, heavy))
    return _work(draft.op, draft.ins, draft.outs) * draft.rows


def _is_wasteful(done: float, true: float, rules: _Rules) -> bool:
    if rules.max_waste is None:
        return False
    return done > true * (1 + rules.max_waste) * (1 + 1e-9)


def _node(draft: _Draft) -> Node:
    is_shared = draft.body is not None and len(draft.members) > 1
    return Node(
        members=tuple(sorted(draft.members.items())),
        body=tuple(map(_node, draft.body or ())) if is_shared else None,
    )


def _launch(
    draft: _Draft, names: Sequence[str], species: Sequence[Species], why: str
) -> Launch:
    members = sorted(i for s in draft.members for i in species[s].members)
    ops = [species[s].trace.ops[i] for s, i in draft.members.items()]
    outs = [op.specs[0].shape for op in ops if op.specs]
    is_uniform = len({len(shape) for shape in outs}) == 1
    true = sum(
        op.flops * len(species[s].members)
        for s, op in zip(draft.members, ops, strict=True)
    )
    jobs = len(members)
    done = _padded_work(draft) / draft.rows * jobs
    flops = done if len(draft.members) > 1 else true
    num_bytes = _num_bytes(draft.op, draft.ins, draft.outs) * jobs
    return Launch(
        primitive=draft.op.name,
        jobs=tuple(names[i] for i in members),
        shape=_rules.widest(outs) if is_uniform else tuple(outs[0]) if outs else (),
        waste=flops / true - 1 if true else 0.0,
        flops=flops,
        num_bytes=num_bytes,
        why_solo=why if len(members) == 1 else "",
    )


def _why_solo(drafts: Sequence[_Draft], rules: _Rules) -> dict[_Draft, str]:
    """Return why launches of one species found no partner among the others'."""
    by_name: dict[str, list[_Draft]] = {}
    for d in drafts:
        by_name.setdefault(d.op.name, []).append(d)
    found = {}
    for d in drafts:
        if len(d.members) > 1:
            continue
        (own,) = d.members
        others = [x for x in by_name[d.op.name] if set(x.members) != {own}]
        if others or d.op.is_heavy:
            found[d] = _reason(d, [x.form for x in others], rules)
    return found


def _reason(draft: _Draft, forms: Sequence[Any], rules: _Rules) -> str:
    if not forms:
        return "no other job has one"
    if draft.form in forms:
        capped = "" if rules.max_waste is None else ", or beyond max_waste"
        return f"cheaper apart{capped}"
    form, shared = draft.form  # type: ignore[misc]
    if any(form == other for other, _ in forms):
        return "other weights are shared" if shared else "others share weights"
    is_ruled = draft.op.name in _rules.RULES
    return "forms differ" if is_ruled else "no padding rule"
