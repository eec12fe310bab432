"""Merging one species' launches into those of the species before it.

Heavy launches are aligned by dynamic programming: the pairs that save the most time,
in the order of both. Light ones follow what they read, and what only parameters went
into follows its reader. No merge can make launches wait for one another: heavy pairs
keep both orders; a launch that reads what its partner reads depends on nothing else;
any other partner comes after all partners found so far.
"""

from __future__ import annotations

import heapq
import itertools
import math
from collections.abc import Hashable, Sequence
from typing import Any

import numpy as np

from stfuse._draft import (
    Draft,
    Joint,
    Terms,
    copied,
    is_wasteful,
    launch,
    loop_s,
    padded_work,
    wider,
)

# Beyond this many pairs of heavy ops, only those near the diagonal are compared.
_MAX_PAIRS = 4_000

Pairs = list[tuple[int, int]]  # numbers of launches: of a profile, of a species


def merge(
    profile: list[Draft], own: list[Draft], pairs: Pairs, s: int, terms: Terms
) -> list[Draft]:
    """Merge one species into the launches of those before it.

    The launches of ``profile`` take it in; what finds no partner stands between them.
    ``pairs`` are those of `match`.
    """
    if not profile:
        return own
    merged = _Merging(profile, own, s, terms)
    at, start = 0, 0
    for there, here in [*pairs, (len(profile), len(own))]:
        merged.light(range(at, there), range(start, here))
        if here < len(own) and not merged.join(there, here):
            merged.alone(here)
        at, start = there + 1, here + 1
    for j, draft in enumerate(own):
        if draft not in merged.became:  # fixed, and nobody reads it
            merged.alone(j)
    return merged.ordered()


def match(
    profile: Sequence[Draft], own: Sequence[Draft], s: int, terms: Terms
) -> Pairs:
    """Return the pairs of heavy launches that save the most time, in order.

    A pair that does not continue the one before it pays a little: what flows between
    the two has to be collected from elsewhere.
    """
    left = [i for i, d in enumerate(profile) if d.op.is_heavy]
    right = [i for i, d in enumerate(own) if d.op.is_heavy]
    n, m = len(left), len(right)
    if not n or not m:
        return []
    band = m if n * m <= _MAX_PAIRS else max(_MAX_PAIRS // n, 16)
    gap_s = terms.cost.launch_s / 4
    theirs, ours = [profile[i] for i in left], [own[j] for j in right]
    gains = _gains(theirs, ours, band, s, terms)
    # From (i, j) on: the most that is saved, at all, and by pairing these two.
    best = [[0.0] * (m + 1) for _ in range(n + 1)]
    paired = [[-math.inf] * (m + 1) for _ in range(n + 1)]
    paired[n][m] = 0.0  # the ends line up as a pair does, and so do the beginnings
    for i in range(n - 1, -1, -1):
        below, middle = best[i + 1], i * m // n
        row = best[i] = below.copy()  # right of the band nothing is paired
        start, stop = max(middle - band, 0), min(middle + band + 1, m)
        own_gains = gains[i, start:stop].tolist()
        for j in range(stop - 1, start - 1, -1):
            most, gain_s = max(below[j], row[j + 1]), own_gains[j - start]
            if gain_s > 0:
                after = max(paired[i + 1][j + 1], below[j + 1] - gap_s)
                near = _likeness(theirs[i], ours[j]) * 2 * gap_s
                paired[i][j] = gain_s + near + after
                most = max(most, paired[i][j])
            row[j] = most
        for j in range(start - 1, -1, -1):  # nor left of it
            if row[j] >= row[j + 1]:
                break
            row[j] = row[j + 1]
    return [(left[i], right[j]) for i, j in _walk(best, paired, gap_s)]


def _walk(
    best: Sequence[Sequence[float]], paired: Sequence[Sequence[float]], gap_s: float
) -> list[tuple[int, int]]:
    """Return the pairs on the way that saves the most."""
    n, m = len(best) - 1, len(best[0]) - 1
    pairs: list[tuple[int, int]] = []
    i = j = 0
    is_next = paired[0][0] >= best[0][0] - gap_s
    while i < n and j < m and best[i][j] > (gap_s if pairs else 0.0):
        if paired[i][j] == best[i][j] or (is_next and not pairs):
            while i < n and j < m and paired[i][j] > 0:
                pairs.append((i, j))
                i, j = i + 1, j + 1
                if best[i][j] - gap_s > paired[i][j]:
                    break
        elif best[i][j] == best[i + 1][j]:
            i += 1
        else:
            j += 1
    return pairs


def _gains(
    left: Sequence[Draft], right: Sequence[Draft], band: int, s: int, terms: Terms
) -> np.ndarray:
    """Return the seconds that each pair near the diagonal saves; zero if it may not."""
    n, m = len(left), len(right)
    gains, places = np.zeros((n, m)), _by_form(left)
    for form, here in _by_form(right).items():
        there = [i for i in places.get(form, ()) if terms.banks[s] not in left[i].banks]
        i, j = np.array(there, int), np.array(here)
        a, b = np.nonzero(abs(i[:, None] * m // n - j) <= band)
        targets, drafts = [left[x] for x in there], [right[x] for x in here]
        if not len(a):
            continue
        if drafts[0].body is None:
            gains[i[a], j[b]] = _saved_s(targets, drafts, a, b, terms)
            continue
        for x, y in zip(a, b, strict=True):
            joint = _joint(targets[x], drafts[y], s, terms)
            gains[i[x], j[y]] = joint.gain_s if joint is not None else 0.0
    return gains


def _by_form(drafts: Sequence[Draft]) -> dict[Hashable, list[int]]:
    found: dict[Hashable, list[int]] = {}
    for i, d in enumerate(drafts):
        found.setdefault(d.form, []).append(i)
    return found


def _saved_s(
    targets: Sequence[Draft], drafts: Sequence[Draft], a: Any, b: Any, terms: Terms
) -> Any:
    """Return what each pair ``targets[a], drafts[b]`` saves, all of one form.

    What `_joint` says of one pair, for thousands in the time of ten.
    """

    def both(name: str) -> tuple[Any, Any]:
        ours, theirs = ([getattr(d, name) for d in ds] for ds in (targets, drafts))
        return np.array(ours)[a], np.array(theirs)[b]

    first = drafts[0]
    sizes = iter(np.maximum(_sizes(targets)[a], _sizes(drafts)[b]).T)
    ins, outs = (
        [[next(sizes) for _ in shape] for shape in shapes]
        for shapes in (first.ins, first.outs)
    )
    cost_s, done = launch(first.op, ins, outs, sum(both("rows")), terms)
    is_over = is_wasteful(done, sum(both("work")), terms)
    return np.where(is_over, 0.0, sum(both("cost_s")) - cost_s)


def _sizes(drafts: Sequence[Draft]) -> np.ndarray:
    """Return the lengths of all axes of all operands and outputs, a row for each."""
    shapes = ((*d.ins, *d.outs) for d in drafts)
    return np.array([list(itertools.chain(*own)) for own in shapes], np.int64)


def _likeness(a: Draft, b: Draft) -> float:
    """Return how much the ops after two launches are alike, 0 to 1."""
    if a.after == b.after:
        return len(a.after) / 3
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
        self.spots = {d: i for i, d in enumerate(profile)}
        self.places = {d: j for j, d in enumerate(own)}

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
        target.alone_s += draft.alone_s
        self.settle(draft, target)
        target.deps |= {self.became[d] for d in draft.deps}
        self.became[draft] = target
        if not target.is_fixed:
            self.cursor = max(self.cursor, there)
        return True

    def settle(self, draft: Draft, target: Draft | None) -> None:
        """Place the fixed launches that a launch reads, now that it has its place.

        What only parameters went into follows its reader: it stands where the reader's
        partner reads, if it may.
        """
        for p, read in enumerate(draft.reads):
            d = read[0]
            if not isinstance(d, Draft) or d in self.became:
                continue
            partner = target.reads[p][0] if target and p < len(target.reads) else None
            j = self.places[d]
            if not isinstance(partner, Draft) or self.s in partner.members:
                self.alone(j)
            elif not self.join(self.spots[partner], j):
                self.alone(j)

    def light(self, there: range, here: range) -> None:
        """Place the launches between two pairs of heavy ones."""
        lined_up: dict[Hashable, list[int]] = {}
        alike: dict[Hashable, list[int]] = {}
        for i in there:
            draft = self.profile[i]
            if not (draft.op.is_heavy or draft.is_fixed):
                lined_up.setdefault(self._key(draft), []).append(i)
                alike.setdefault(draft.form, []).append(i)
        for j in here:
            draft = self.own[j]
            if draft.is_fixed:
                continue  # until its reader has a place
            if draft.op.is_heavy or not self._placed(draft, j, lined_up, alike):
                self.alone(j)

    def _placed(self, draft: Draft, j: int, lined_up: Any, alike: Any) -> bool:
        """Try the launches that read the same, then those that merely look alike."""
        for i in lined_up.get(self._key(draft), ()):
            if self.s not in self.profile[i].members:
                return self.join(i, j)
        reads = {self.became[d] for d in draft.deps if not d.is_fixed}
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

    def alone(self, j: int) -> None:
        """Keep a launch for the species by itself."""
        draft = self.own[j]
        self.settle(draft, None)
        draft.deps = {self.became[d] for d in draft.deps}
        draft.reads = tuple(map(self._moved, draft.reads))
        self.became[draft] = draft
        self.keys[draft] = (self.cursor, 0, j)
        self.is_foreign[draft] = not draft.is_fixed and (
            draft.op.is_heavy or any(map(self._foreign, draft.deps))
        )

    def _key(self, draft: Draft) -> Hashable:
        """Return a launch's form and what it reads, in terms of merged launches."""
        reads = []
        for read in draft.reads:
            d = read[0]
            if not isinstance(d, Draft):
                reads.append(read)
            elif d.is_fixed:
                reads.append(("fixed", d.form))
            else:
                reads.append(self._moved(read))
        return draft.form, tuple(reads)

    def _moved(self, read: Any) -> Any:
        if isinstance(read[0], Draft):
            return (self.became.get(read[0], read[0]), read[1])
        return read

    def _foreign(self, draft: Draft) -> bool:
        """Return whether a value descends from a heavy launch that is not shared.

        Merging what follows such a launch would copy its output first.
        """
        known = self.is_foreign.get(draft)
        if known is None:
            known = (
                self.s not in draft.members
                and not draft.is_fixed
                and (draft.op.is_heavy or any(map(self._foreign, draft.deps)))
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
    ins = tuple(map(wider, target.ins, draft.ins))
    outs = tuple(map(wider, target.outs, draft.outs))
    cost_s, done = launch(draft.op, ins, outs, target.rows + draft.rows, terms)
    gain_s = target.cost_s + draft.cost_s - cost_s
    if is_wasteful(done, target.work + draft.work, terms):
        gain_s = 0.0
    return Joint(gain_s, ins, outs, cost_s)


def _joint_scan(target: Draft, draft: Draft, s: int, terms: Terms) -> Joint | None:
    """Return a loop that runs the bodies of one more species, aligned inside."""
    theirs, ours = copied(target.body or ()), copied(draft.body or ())
    body = merge(theirs, ours, match(theirs, ours, s, terms), s, terms)
    heavy = [d for d in body if d.op.is_heavy]
    if heavy and not any(s in d.members and len(d.members) > 1 for d in heavy):
        return None  # only the loops themselves would be one
    turns = max(target.turns, draft.turns)
    cost_s = loop_s(body, turns, terms)
    done = turns * sum(map(padded_work, heavy))
    gain_s = target.cost_s + draft.cost_s - cost_s
    if is_wasteful(done, target.work + draft.work, terms):
        gain_s = 0.0
    return Joint(gain_s, target.ins, target.outs, cost_s, turns, body)
