"""What is refused for its deadline: nothing that could start, and most that could not.

Steps all take as long, on a virtual clock. The reference is the scheduler itself, with
nothing refused.
"""

import math
from collections import Counter

import numpy as np
import pytest

from stfuse._admission import Admission
from stfuse._errors import DeadlineError
from stfuse._scheduler import Scheduler
from stfuse._types import (
    Bucket,
    Cancel,
    Install,
    Join,
    Policy,
    Ready,
    Submit,
)

STEP_S = 0.01
UNLIKE = (0.2, 1.0, 1.0, 3.0, 20.0)  # weights
MANY = 64  # slots of a bank that has more than any step: none of them is dense
KINDS = {
    "slots": {},
    "rows": {"rows": 4},
    "dense": {"is_dense": True},
    "weights": {"weights": UNLIKE},
    "programs": {"num_programs": 2},
    "dense programs": {"num_programs": 2, "is_dense": True},
    "strict": {"strict_shares": True},
    "strict weights": {"strict_shares": True, "weights": UNLIKE},
    "time": {"policy": Policy.TIME},
    "exclusive": {"policy": Policy.EXCLUSIVE, "rows": 4},
}


class Played:
    """A scheduler of some tenants on a virtual clock."""

    def __init__(
        self, names, policy=Policy.SPACE_TIME, rows=1, weights=None, **options
    ):
        self.scheduler = Scheduler(
            policy, max_batch_size=rows, max_queue_size=10_000, **options
        )
        self.names, self.now_s, self.num = names, 0.0, 0
        for name, weight in zip(names, weights or [1.0] * len(names), strict=True):
            self.scheduler.handle(Join(name, weight))

    def install(self, lane, capacities, species, buckets):
        self.scheduler.handle(Install(lane, capacities, species))
        for slots, rows in buckets:
            self.scheduler.handle(Ready(lane, Bucket(slots, rows), STEP_S))

    def submit(self, name, steps=None, num=1, rows=1):
        """Submit requests that may wait for some steps; return what is taken."""
        until_s, taken = None if steps is None else self.now_s + steps * STEP_S, set()
        for _ in range(num):
            self.num += 1
            try:
                event = Submit(self.num, name, rows, self.now_s, until_s)
                self.scheduler.handle(event)
                taken.add(self.num)
            except DeadlineError:
                assert until_s is not None
        return taken

    def step(self):
        """Run a step, or wait; return the requests that it serves."""
        decision = self.scheduler.decide(self.now_s)
        if batch := decision.batch:
            self.now_s += STEP_S
            return {request for chunk in batch.chunks for request in chunk.requests}
        self.now_s = max(self.now_s + STEP_S, decision.wait_until_s or 0.0)
        return set()


def burst(monkeypatch, make, steps, num, is_refused=True):
    """Have one submit requests that have to start within some steps, all at once.

    Args:
        monkeypatch: the fixture.
        make: returns what is played; nothing is refused meanwhile.
        steps: within so many.
        num: of the requests.
        is_refused: whether any is, then.

    Returns:
        How many are taken, and how many of them start.
    """
    with monkeypatch.context() as patch:
        patch.setattr(Admission, "_wait_s", lambda *_: 0.0)
        played = make()
        if is_refused:
            patch.undo()
        taken = played.submit("me", steps, num)
    until_s, begun = played.now_s + (steps + 1) * STEP_S, set()
    while played.now_s <= until_s:
        begun |= played.step()
    return len(taken), len(begun & taken)


def drawn(rng, policy=Policy.SPACE_TIME, weights=(1.0,), rows=1, **kind):
    """Return tenants with steps of random slots, who were served at random before."""
    is_dense, num_programs = kind.pop("is_dense", 0), kind.pop("num_programs", 1)
    names = ["me", *(f"o{i}" for i in range(rng.integers(20)))]
    options = {"weights": rng.choice(weights, len(names)).tolist(), **kind}
    played = Played(names, policy, rows, **options)
    most, sizes = len(names) if is_dense else MANY, (1, 2, 4, 8, 16)
    species = {name: (int(rng.integers(num_programs)),) for name in names}
    if rng.random() < 0.3:
        species["me"] = tuple(range(num_programs))
    slots = [k for k in sizes[: rng.integers(1, 6)] if k < most]
    slots += [most] if is_dense else []
    slots = slots[-1:] if rng.random() < 0.3 else slots
    shapes = [(k,) for k in slots]
    if num_programs == 2:
        shapes = [pair for k in {1, *slots[-2:]} for pair in ((k, 0), (0, k), (k, k))]
    all_rows = [rows] if rng.random() < 0.5 else [1, rows]
    if policy is Policy.SPACE_TIME:
        buckets = [(shape, b) for shape in shapes for b in all_rows]
        played.install("all", (most,) * num_programs, species, buckets)
    else:
        for name in names:
            played.install(name, (1,), {name: (0,)}, [((1,), b) for b in all_rows])
    for name in names:
        played.submit(name, num=rng.integers(1, 12))
    for _ in range(rng.integers(1, 12)):
        played.step()
    return played


def crowded(rng, steps, **kind):
    """Return random tenants, of whom all but one have much or little waiting."""
    played = drawn(rng, **kind)
    rows, scale = kind.get("rows", 1), rng.choice([1, 3, 20, 60])
    for name in played.names[1:]:
        is_urgent, has_deadline = rng.random(2) < 0.5
        later = float(rng.choice([steps, steps + 40 * rng.random()]))
        num = min(rng.geometric(1 / scale), 200)
        some = later if has_deadline else None
        played.submit(name, some, num, int(rng.choice([1, rows])))
        if is_urgent and steps > 10:  # in time for all of these to be served
            played.submit(name, steps * (0.7 + 0.3 * rng.random()))
    return played


@pytest.mark.parametrize("kind", KINDS)
def test_nothing_is_refused_that_could_start(monkeypatch, seed, kind):
    rng, num_refused = np.random.default_rng(seed), 0
    for i in range(40):
        # Beyond a strict share, every 17th step may be one's own: the first is counted.
        most = 17 if "strict_shares" in KINDS[kind] else 30
        steps = rng.integers(1, most) + rng.choice([0.0, 0.13, 0.5])
        num = rng.choice([1, 20, 150])

        def make(seeds=(seed, i), steps=steps):
            return crowded(np.random.default_rng(seeds), steps, **KINDS[kind])

        _, could = burst(monkeypatch, make, steps, num, is_refused=False)
        taken, did = burst(monkeypatch, make, steps, num)
        # Where shares are strict, how long a flood waits is an estimate, no bound.
        least = could if "strict_shares" not in KINDS[kind] else int(0.8 * could) - 1
        assert did >= least, (i, steps, num)
        num_refused += num - taken
    assert num_refused > 0


def beside(others, buckets, policy=Policy.SPACE_TIME, steps=None, **options):
    """Return one that has nothing waiting, and others that have so much, each."""
    names = ["me", *(f"o{i}" for i in range(len(others)))]
    played = Played(names, policy, **options)
    if policy is Policy.SPACE_TIME:
        played.install("all", (MANY,), dict.fromkeys(names, (0,)), buckets)
    else:
        for name in names:
            played.install(name, (1,), {name: (0,)}, buckets)
    for name in names[-4:] + names[:1]:  # known is what a step takes, who is about
        played.submit(name)
    while played.scheduler.num_queued:
        played.step()
    for name, num in zip(names[1:], others, strict=True):
        played.submit(name, steps, num)
    return played


def of(*slots):
    """Return buckets."""
    return [((k,), 1) for k in slots]


@pytest.mark.parametrize(
    ("others", "steps", "num", "could", "kind"),
    [
        ([1] * 10, 50.0, 60, 39, {"policy": Policy.TIME, "buckets": of(1)}),
        ([1] * 15, 10.0, 100, 65, {"buckets": of(8)}),
        ([500] * 3, 10.0, 300, 234, {"buckets": of(1, 2, 4, 8, 16, 32, MANY)}),
        ([1] * 6, 9.5, 100, 38, {"buckets": of(16), "strict_shares": True}),
    ],
    ids=["time", "one each", "dense", "a flood's own step"],
)
def test_what_could_start_is_taken(monkeypatch, others, steps, num, could, kind):
    def make():
        return beside(others, **kind)

    assert burst(monkeypatch, make, steps, num, is_refused=False) == (num, could)
    taken, did = burst(monkeypatch, make, steps, num)
    assert did == could <= taken


@pytest.mark.parametrize("steps", [2.5, 5.5, 10.5])
@pytest.mark.parametrize("num_others", [0, 3, 7, 12, 40])
@pytest.mark.parametrize(
    ("kind", "slots"),
    [
        ({"policy": Policy.TIME, "buckets": of(1)}, 1),
        ({"buckets": of(8)}, 8),
        ({"buckets": of(1, 2, 4, 8, 16, MANY)}, 16),
    ],
    ids=["time", "slots", "dense"],
)
def test_what_cannot_start_is_refused(monkeypatch, steps, num_others, kind, slots):
    """All but a step's worth: that would be answered late, and so it is dropped."""

    def make():
        return beside([500] * num_others, steps=2 * steps, **kind)

    _, could = burst(monkeypatch, make, steps, 500, is_refused=False)
    taken, did = burst(monkeypatch, make, steps, 500)
    assert did == could <= taken <= could + slots


def recount(waiting, policy):
    """Return, by lane, how many wait, their deadlines, and how many for how much."""
    found = {}
    for tenant in waiting.values():
        if not tenant.is_parked:
            lane = tenant.lane if policy is Policy.SPACE_TIME else None
            num, heads, sizes = found.get(lane, (0, [], Counter()))
            first_s = tenant.queue[0].deadline_s
            size = len(tenant.queue) if policy is Policy.TIME else tenant.rows
            heads = sorted([*heads, *([first_s] if first_s < math.inf else [])])
            found[lane] = num + 1, heads, sizes + Counter([size])
    return found


@pytest.mark.parametrize("policy", Policy)
def test_lines_count_those_who_wait_whatever_happens(seed, policy):
    rng, names, num_parked = np.random.default_rng(seed), [*"abcdef"], 0
    played = Played(names, policy, rows=4)
    scheduler, queues = played.scheduler, played.scheduler._queues
    for _ in range(1500):
        lane, some = f"l{rng.integers(3)}", rng.permutation(names)[: rng.integers(4)]
        if policy is not Policy.SPACE_TIME:
            lane, some = (name := str(rng.choice(names))), [name][: rng.integers(2)]
        match rng.integers(8):
            case 0:  # tenants come, go and move; nothing of theirs is ready yet
                members = {str(name): (0,) for name in some}
                scheduler.handle(Install(lane, (4,) if members else (), members))
            case 1 | 2:
                slots = int(rng.integers(1, 4)) if policy is Policy.SPACE_TIME else 1
                scheduler.handle(Ready(lane, Bucket((slots,), 4), STEP_S))
            case 3:
                scheduler.handle(Cancel(int(rng.integers(played.num + 1))))
            case 4 | 5:
                steps = rng.choice([None, 2.0, 9.0, 50.0])
                name, rows = str(rng.choice(names)), int(rng.integers(1, 5))
                played.submit(name, steps, int(rng.integers(1, 4)), rows)
            case _:
                played.step()
        num_parked += any(tenant.is_parked for tenant in queues.waiting.values())
        lines = queues.lines._lines.items()
        found = {of: (line.num, line.heads, line.sizes) for of, line in lines}
        assert found == recount(queues.waiting, policy)
        for tenant in scheduler._tenants.values():
            beside = {n: t for n, t in queues.waiting.items() if t is not tenant}
            lane = tenant.lane if policy is Policy.SPACE_TIME else None
            num, _, sizes = recount(beside, policy).get(lane, (0, [], {}))
            assert queues.lines.num_beside(tenant) == num
            assert queues.lines.sizes_beside(tenant) == sizes
    assert num_parked > 100


def crowd_of(policy, num, steps):
    """Return many who wait for some steps at most, and one that has nothing waiting."""
    names = ["me", *(f"o{i}" for i in range(num))]
    played = Played(names, policy)
    if policy is Policy.SPACE_TIME:
        played.install("all", (512,), dict.fromkeys(names, (0,)), of(8))
    for name in names if policy is Policy.EXCLUSIVE else ():
        played.install(name, (1,), {name: (0,)}, of(1))
    played.submit("me")
    played.step()
    played.now_s += 10 * STEP_S
    for name in names[1:]:
        assert played.submit(name, steps)
    return played


@pytest.mark.parametrize("policy", [Policy.SPACE_TIME, Policy.EXCLUSIVE])
def test_those_who_cannot_all_be_in_time_are_not_all_waited_for(policy):
    played = crowd_of(policy, 400, 5.0)
    assert played.submit("me", 40.0)


@pytest.mark.parametrize("policy", [Policy.SPACE_TIME, Policy.EXCLUSIVE])
def test_what_has_expired_is_not_waited_for(policy, monkeypatch):
    played = crowd_of(policy, 100, 0.5)
    with monkeypatch.context() as patch:
        patch.setattr(Admission, "_wait_s", lambda *_: 0.0)
        played.submit("me", 0.5, 100)
    played.now_s += 0.51 * STEP_S
    assert played.submit("me", 2.0)


def test_a_request_that_has_room_beside_an_earlier_one_waits_for_no_other_length():
    played = Played(["me", "other"], rows=8)
    played.install("all", (64,), {"me": (0, 0), "other": (0,)}, [((2,), 8)])
    played.submit("me")
    played.step()
    played.now_s += 10 * STEP_S
    played.submit("other")
    until_s = played.now_s + 0.9 * STEP_S
    for i, (rows, length) in enumerate([(4, 0), (8, 1), (4, 0)], 100):
        event = Submit(i, "me", rows, played.now_s, until_s, length)
        played.scheduler.handle(event)
    assert {100, 102} < played.step()
