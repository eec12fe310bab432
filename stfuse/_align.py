"""Traces to Plan: which ops of which jobs share a launch. Pure Python, no arrays.

Rules:
    Jobs whose traces have equal keys are one species; all bookkeeping is per species.
    Ops may share a launch if their forms are equal (`_rules.form`). Whether they do is
    a matter of cost: launch + max(bytes / bandwidth, flops / rate), at the padded
    shape, must be less together than apart, within ``max_waste``.
    Species are merged one by one, the longest first, into one sequence of launches;
    where launches overlap, into few: one that would share too little of a sequence, and
    make it much longer, begins its own.
    Heavy ops are aligned by dynamic programming; light ones follow what they read: two
    that read the same launches share one, so that their operands already line up.
    An op whose operands are shared by all slots joins only ops that share the same.
    Species whose sharing saves next to nothing of their time share nothing, unless
    they read the same weights: what is shared has costs that nobody predicts.
    Every species keeps its own trace order, so any alignment is a valid schedule.
    Nothing depends on hashes or names: equal inputs give equal plans.
"""

from __future__ import annotations

import itertools
from collections.abc import Hashable, Mapping, Sequence

from stfuse import _rules
from stfuse._draft import Draft, Terms, num_bytes, padded_work, singles
from stfuse._merge import Pairs, match, merge
from stfuse._plan import Launch, Node, Plan, Species, components, count_apart, group
from stfuse._program import Trace
from stfuse._types import Cost

# Part of the predicted time. The full-size mixes of `examples/mixes.py` save 23 % or
# more on an H200. On a CPU (0.2 us a launch) many save 0 to 0.4 % and were slower for
# it: cnn8 at 0.94 of the speed apart, resnet_18_34 0.97. mlp12 saves 1.7 %, was faster.
_LEAST_SAVED = 0.01

# Where launches overlap a species leaves at most so many heavy ops, or this part of its
# own, without a partner in the sequence that it joins. MobileNetV2 shares 60 % with
# ResNet-50, ResNet-34 55 %, ResNet-18 all with ResNet-34. Four jobs each of six kinds
# on an H200: 1,453 us without overlap, 1,228 with it, 1,081 with such sequences, too.
_MOST_SOLO, _MOST_SOLO_PART = 8, 1 / 3
_MOST_SEQUENCES = 8  # each species is compared with all of them


def align(
    names: Sequence[str],
    traces: Sequence[Trace],
    cost: Cost,
    *,
    max_waste: float | None = None,
    shares: Sequence[Sequence[Hashable]] | None = None,
    banks: Sequence[Hashable] | None = None,
    counts: Sequence[int] | None = None,
    is_concurrent: bool = False,
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
        is_concurrent: whether launches that wait for nothing of one another overlap.

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
    programs = {s: one.trace for s, one in enumerate(species)}
    chains = _schedule(programs, marks, terms, is_concurrent)
    drafts = _worth_it(chains, programs, marks, terms)
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
    programs: Mapping[int, Trace],
    marks: Sequence[Sequence[Hashable]],
    terms: Terms,
    is_concurrent: bool = False,
) -> list[Draft]:
    """Merge programs into one sequence of launches, or few; the longest first."""
    by_length = sorted(
        programs, key=lambda s: (-sum(op.is_heavy for op in programs[s].ops), s)
    )
    readers: dict[Hashable, list[int]] = {}  # of what is kept once
    for s, own_marks in enumerate(marks):
        for mark in filter(None, own_marks):
            readers.setdefault(mark, []).append(s)
    groups = components(len(terms.counts), readers.values())
    group_of = {s: group for group in groups for s in group}
    chains: list[list[Draft]] = []
    places: dict[tuple[int, ...], int] = {}  # of a group, the sequence
    for s in by_length:
        own = singles(s, programs[s], dict(enumerate(marks[s])), terms)
        found = [match(chain, own, s, terms) for chain in chains]
        i = _chain_of(own, found) if is_concurrent else 0
        i = places.setdefault(group_of[s], i)
        if chains[i:]:
            chains[i] = merge(chains[i], own, found[i], s, terms)
        else:
            chains.append(own)
    return list(itertools.chain(*chains))


def _chain_of(own: Sequence[Draft], found: Sequence[Pairs]) -> int:
    """Return which sequence a species joins, by its pairs with each; or the next."""
    i = max(range(len(found)), key=lambda i: len(found[i]), default=0)
    num_heavy = sum(draft.op.is_heavy for draft in own)
    most_solo = max(_MOST_SOLO, _MOST_SOLO_PART * num_heavy)
    is_near = bool(found) and num_heavy - len(found[i]) <= most_solo
    return i if is_near or len(found) == _MOST_SEQUENCES else len(found)


def _worth_it(
    drafts: list[Draft],
    programs: Mapping[int, Trace],
    marks: Sequence[Sequence[Hashable]],
    terms: Terms,
) -> list[Draft]:
    """Return the launches, without sharing among species where it saves too little."""
    apart: set[int] = set()
    sets = [sorted(d.members) for d in drafts]
    for component in components(len(terms.counts), sets):
        if len(component) == 1:
            continue
        own = [d for d in drafts if not d.members.keys().isdisjoint(component)]
        shares_weights = any(len(d.members) > 1 and d.form[1] >= 0 for d in own)
        alone_s = sum(d.alone_s for d in own)
        saved_s = alone_s - sum(d.cost_s for d in own)
        if not shares_weights and saved_s < _LEAST_SAVED * alone_s:
            apart.update(component)
    kept = [d for d in drafts if apart.isdisjoint(d.members)]
    for s in sorted(apart):
        kept += singles(s, programs[s], dict(enumerate(marks[s])), terms)
    return kept


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
    found: dict[Draft, str] = {}
    known: dict[tuple[str, int], dict[tuple[int, int], bool]] = {}
    for d in drafts:
        if len(d.members) > 1:
            continue
        (own,) = d.members
        if (d.op.name, own) not in known:
            others = [x for x in by_name[d.op.name] if set(x.members) != {own}]
            solo = {x.form for x in others if len(x.members) == 1}
            known[d.op.name, own] = {x.form: x.form in solo for x in others}
        forms = known[d.op.name, own]
        if forms or d.op.is_heavy:
            found[d] = _reason(d, forms, terms)
    return found


def _reason(draft: Draft, forms: Mapping[tuple[int, int], bool], terms: Terms) -> str:
    """Return why a launch is solo; ``forms`` are others', and whether one is, too."""
    if not forms:
        return "no other job has one"
    if any(len(d.members) == 1 for d in draft.deps) and not draft.op.is_heavy:
        return "reads a launch of its own"
    if draft.form in forms:
        if not forms[draft.form]:
            return "no partner is left"
        capped = "" if terms.max_waste is None else ", or beyond max_waste"
        return f"cheaper apart{capped}"
    form, shared = draft.form
    if any(form == other for other, _ in forms):
        return "others share weights" if shared < 0 else "shares other weights"
    is_ruled = draft.op.name in _rules.RULES
    return "forms differ" if is_ruled else "no padding rule"
