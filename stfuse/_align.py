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
from collections.abc import Hashable, Mapping, Sequence
from typing import Any

from stfuse import _rules
from stfuse._draft import (
    Draft,
    Joint,
    Terms,
    copied,
    is_wasteful,
    launch_s,
    loop_s,
    num_bytes,
    padded_work,
    singles,
    wider,
    work,
)
from stfuse._plan import Launch, Node, Plan, Species, count_apart, group
from stfuse._program import Trace
from stfuse._types import Cost

# Beyond this many pairs of heavy ops, only those near the diagonal are compared.
_MAX_PAIRS = 200_000


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
    terms = Terms(
        cost,
        max_waste,
        counts or [len(one.members) for one in species],
        banks if banks is not None else range(len(species)),
    )
    marks = shares or [()] * len(species)
    drafts = _schedule({s: one.trace for s, one in enumerate(species)}, marks, terms)
    solo = _why_solo(drafts, terms) if len(species) > 1 else {}
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
    terms = Terms(cost, None, counts, range(len(counts)))
    return tuple(map(_node, _schedule(programs, [()] * len(counts), terms)))


def _schedule(
    programs: Mapping[int, Trace], marks: Sequence[Sequence[Hashable]], terms: Terms
) -> list[Draft]:
    """Merge programs into one sequence of launches, the longest first."""
    by_length = sorted(
        programs, key=lambda s: (-sum(op.is_heavy for op in programs[s].ops), s)
    )
    drafts: list[Draft] = []
    for s in by_length:
        tags = dict(enumerate(marks[s]))
        drafts = _merge(drafts, singles(s, programs[s], tags, terms), s, terms)
    return drafts


def _merge(profile: list[Draft], own: list[Draft], s: int, terms: Terms) -> list[Draft]:
    """Merge one species into the launches of those before it.

    The launches of ``profile`` take it in; what finds no partner stands between them.
    """
    if not profile:
        return own
    pairs = _match_heavy(profile, own, s, terms)
    merged = _Merging(profile, own, s, terms)
    at, start = 0, 0
    for there, here in [*pairs, (len(profile), len(own))]:
        merged.light(range(at, there), range(start, here))
        if here < len(own) and not merged.join(there, here):
            merged.alone(own[here], here)
        at, start = there + 1, here + 1
    return merged.ordered()


def _match_heavy(
    profile: list[Draft], own: list[Draft], s: int, terms: Terms
) -> list[tuple[int, int]]:
    """Return the pairs of heavy launches that save the most time, in order.

    A pair that does not continue the one before it pays a little: what flows between
    the two has to be collected from elsewhere.
    """
    left = [i for i, d in enumerate(profile) if d.op.is_heavy]
    right = [i for i, d in enumerate(own) if d.op.is_heavy]
    n, m = len(left), len(right)
    band = m if n * m <= _MAX_PAIRS else max(_MAX_PAIRS // n, 16)
    gap_s = terms.cost.launch_s / 4
    # From (i, j) on: the most that is saved, at all, and by pairing these two.
    best = [[0.0] * (m + 1) for _ in range(n + 1)]
    paired = [[0.0] * (m + 1) for _ in range(n + 1)]
    for i in range(n - 1, -1, -1):
        row, below, middle = best[i], best[i + 1], i * m // n
        for j in range(m - 1, -1, -1):
            row[j] = max(below[j], row[j + 1])
            if abs(j - middle) > band:
                continue
            joint = _joint(profile[left[i]], own[right[j]], s, terms)
            if joint is not None and joint.gain_s > 0:
                after = max(paired[i + 1][j + 1], below[j + 1] - gap_s, 0.0)
                near = _likeness(profile[left[i]], own[right[j]]) * 2 * gap_s
                paired[i][j] = joint.gain_s + near + after
                row[j] = max(row[j], paired[i][j])
    pairs: list[tuple[int, int]] = []
    i = j = 0
    while i < n and j < m and best[i][j] > (gap_s if pairs else 0.0):
        if paired[i][j] == best[i][j]:
            while i < n and j < m and paired[i][j] > 0:
                pairs.append((left[i], right[j]))
                i, j = i + 1, j + 1
                if best[i][j] - gap_s > paired[i][j]:
                    break
        elif best[i][j] == best[i + 1][j]:
            i += 1
        else:
            j += 1
    return pairs


def _likeness(a: Draft, b: Draft) -> float:
    """Return how much the ops after two launches are alike, 0 to 1."""
    return sum(x == y for x, y in zip(a.after, b.after, strict=False)) / 3


class _Merging:
    """One species on its way into a profile."""

    def __init__(
        self, profile: list[Draft], own: list[Draft], s: int, terms: Terms
    ) -> None:
        self.profile, self.own, self.s, self.terms = profile, own, s, terms
        self.became: dict[Draft, Draft] = {}  # own launch to where it went
        self.is_foreign: dict[Draft, bool] = {}
        self.keys: dict[Draft, tuple[int, int, int]] = {
            d: (i, -1, 0) for i, d in enumerate(profile)
        }
        self.cursor = -1

    def join(self, there: int, here: int) -> bool:
        """Let a launch of the profile take in one of the species', if that pays."""
        target, draft = self.profile[there], self.own[here]
        joint = _joint(target, draft, self.s, self.terms)
        if joint is None or joint.gain_s <= 0:
            return False
        target.ins, target.outs, target.cost_s = joint.ins, joint.outs, joint.cost_s
        target.turns, target.body = joint.turns, joint.body
        target.members[self.s] = draft.members[self.s]
        target.banks |= draft.banks
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

    def _placed(self, draft: Draft, j: int, lined_up: Any, alike: Any) -> bool:
        """Try the launches that read the same, then those that merely look alike."""
        for i in lined_up.get((draft.form, draft.reads), ()):
            if self.s not in self.profile[i].members:
                return self.join(i, j)
        reads = {self.became[d] for d in draft.deps}
        is_foreign = any(map(self._foreign, reads))
        for i in alike.get(draft.form, ()):
            target = self.profile[i]
            if i <= self.cursor or self.s in target.members:
                continue
            # One operand that lines up is reason enough to collect the others: what
            # follows (a residual stream) lines up again.
            if reads & target.deps:
                return self.join(i, j)
            if not is_foreign and not any(map(self._foreign, target.deps)):
                return self.join(i, j)
        return False

    def alone(self, draft: Draft, j: int) -> None:
        """Keep a launch for the species by itself."""
        draft.deps = {self.became[d] for d in draft.deps}
        self.became[draft] = draft
        self.keys[draft] = (self.cursor, 0, j)
        self.is_foreign[draft] = draft.op.is_heavy or any(
            map(self._foreign, draft.deps)
        )

    def _moved(self, read: Any) -> Hashable:
        """Return what an operand reads, in terms of the merged launches."""
        if isinstance(read[0], Draft):
            return (self.became[read[0]], read[1])
        return read

    def _foreign(self, draft: Draft) -> bool:
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

    def ordered(self) -> list[Draft]:
        """Return all launches, each after those that it reads."""
        drafts = [*self.profile, *(d for d in self.own if self.became[d] is d)]
        waits = {d: len(d.deps) for d in drafts}
        readers: dict[Draft, list[Draft]] = {d: [] for d in drafts}
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


def _joint(target: Draft, draft: Draft, s: int, terms: Terms) -> Joint | None:
    """Return what a launch would be with one more member; None if it may not."""
    if target.form != draft.form or terms.banks[s] in target.banks:
        return None
    if target.body is not None:
        return _joint_scan(target, draft, s, terms)
    key = (target.form, target.ins, target.outs, target.rows, target.work)
    key = (*key, draft.ins, draft.outs, draft.rows)
    if key not in terms.memo:
        ins = tuple(map(wider, target.ins, draft.ins))
        outs = tuple(map(wider, target.outs, draft.outs))
        rows = target.rows + draft.rows
        cost_s = launch_s(draft.op, ins, outs, rows, terms)
        done = work(draft.op, ins, outs) * rows
        gain_s = target.cost_s + draft.cost_s - cost_s
        if is_wasteful(done, target.work + draft.work, terms):
            gain_s = 0.0
        terms.memo[key] = Joint(gain_s, ins, outs, cost_s)
    return terms.memo[key]


def _joint_scan(target: Draft, draft: Draft, s: int, terms: Terms) -> Joint | None:
    """Return a loop that runs the bodies of one more species, aligned inside."""
    body = _merge(copied(target.body or ()), copied(draft.body or ()), s, terms)
    turns = max(target.turns, draft.turns)
    cost_s = loop_s(body, turns, terms)
    done = turns * sum(padded_work(d) for d in body if d.op.is_heavy)
    gain_s = target.cost_s + draft.cost_s - cost_s
    if is_wasteful(done, target.work + draft.work, terms):
        gain_s = 0.0
    return Joint(gain_s, target.ins, target.outs, cost_s, turns, body)


def _node(draft: Draft) -> Node:
    is_shared = draft.body is not None and len(draft.members) > 1
    return Node(
        members=tuple(sorted(draft.members.items())),
        body=tuple(map(_node, draft.body or ())) if is_shared else None,
    )


def _launch(
    draft: Draft, names: Sequence[str], species: Sequence[Species], why: str
) -> Launch:
    members = sorted(i for s in draft.members for i in species[s].members)
    ops = [species[s].trace.ops[i] for s, i in draft.members.items()]
    outs = [op.specs[0].shape for op in ops if op.specs]
    is_uniform = len({len(shape) for shape in outs}) == 1
    counts = [len(species[s].members) for s in draft.members]
    true = sum(op.flops * n for op, n in zip(ops, counts, strict=True))
    waste = padded_work(draft) / draft.work - 1 if draft.work else 0.0
    return Launch(
        primitive=draft.op.name,
        jobs=tuple(names[i] for i in members),
        shape=_rules.widest(outs) if is_uniform else tuple(outs[0]) if outs else (),
        waste=waste if len(ops) > 1 else 0.0,
        flops=true * (1 + waste),
        num_bytes=num_bytes(draft.op, draft.ins, draft.outs) * len(members),
        why_solo=why if len(members) == 1 else "",
    )


def _why_solo(drafts: Sequence[Draft], terms: Terms) -> dict[Draft, str]:
    """Return why launches of one species found no partner among the others'."""
    by_name: dict[str, list[Draft]] = {}
    for d in drafts:
        by_name.setdefault(d.op.name, []).append(d)
    found = {}
    for d in drafts:
        if len(d.members) > 1:
            continue
        (own,) = d.members
        others = [x for x in by_name[d.op.name] if set(x.members) != {own}]
        if others or d.op.is_heavy:
            found[d] = _reason(d, others, terms)
    return found


def _reason(draft: Draft, others: Sequence[Draft], terms: Terms) -> str:
    if not others:
        return "no other job has one"
    forms = [x.form for x in others]
    if any(len(d.members) == 1 for d in draft.deps) and not draft.op.is_heavy:
        return "reads a launch of its own"
    if draft.form in forms:
        if all(len(x.members) > 1 for x in others if x.form == draft.form):
            return "no partner is left"
        capped = "" if terms.max_waste is None else ", or beyond max_waste"
        return f"cheaper apart{capped}"
    form, shared = draft.form
    if any(form == other for other, _ in forms):
        return "others share weights" if shared < 0 else "shares other weights"
    is_ruled = draft.op.name in _rules.RULES
    return "forms differ" if is_ruled else "no padding rule"
