"""Leaky buckets: a burst is nobody's flood, a share runs out, alone there are walls."""

import math
from collections import Counter

import numpy as np
import pytest

from stfuse._arrivals import Arrivals
from stfuse._buckets import LaneBuckets, Times
from stfuse._queues import Entry, Tenant
from stfuse._scheduler import Scheduler
from stfuse._shares import Shares
from stfuse._simulate import simulate
from stfuse._types import Bucket, Chunk, Drain, Install, Join, Policy, Ready
from tests.test_scheduler import served, submit

ONE = Bucket((1,), 1)
STEP_S = {1: 1.0, 4: 1.2, 16: 1.6}  # so a slot of a full step takes 0.1 s


def lane(scale=1.0):
    found = LaneBuckets((16,), ())
    for slots, step_s in STEP_S.items():
        found.predict(Bucket((slots,), 1), Times(*[scale * step_s] * 3))
    return found


def waiting(name, rows=1):
    return Tenant(name, 1.0, queue=[Entry(math.inf, 0, rows, 0.0)])


def shares_of(**weights):
    shares = Shares()
    for name, weight in weights.items():
        shares.join(name, weight)
    return shares


def made(names, step_s, weights=None, **options):
    """Return a scheduler with strict shares, a lane of all, times by slots."""
    scheduler = Scheduler(Policy.SPACE_TIME, strict_shares=True, **options)
    for name in names:
        scheduler.handle(Join(name, (weights or {}).get(name, 1.0)))
    scheduler.handle(Install("all", (64,), dict.fromkeys(names, (0,))))
    for slots, each_s in step_s.items():
        scheduler.handle(Ready("all", Bucket((slots,), 1), each_s))
    return scheduler


def serve(shares, name, slots, now_s, scale=1.0):
    """Serve a tenant, whoever is beyond its share; return whether it is then."""
    one, all_of = waiting(name), lane(scale)
    claims = shares.claims([one], all_of, now_s)
    shares.spend([Chunk(name, (), 1, 0, 0)] * slots, claims, all_of, ONE, now_s)
    return not shares.claims([one], all_of, now_s)[name]


def test_a_burst_is_no_flood_and_runs_out_with_time():
    shares = shares_of(a=1.0, b=1.0)
    assert not serve(shares, "a", 7, 0.0)
    assert serve(shares, "a", 1, 0.0)
    both = [*map(waiting, "ab")]
    assert shares.claims(both, lane(), 0.0) == {"a": 0, "b": 8}
    # Half of the time runs out of it, and a slot of a full step takes 0.1 s.
    assert shares.claims(both, lane(), 0.19)["a"] == 0
    assert shares.claims(both, lane(), 0.21)["a"] == 1
    assert shares.claims(both, lane(), 9.0)["a"] == 8


def test_a_weight_says_how_much_it_holds_and_how_fast_that_runs_out():
    shares, all_of = shares_of(a=1.0, b=3.0), lane()
    both = [*map(waiting, "ab")]
    assert shares.claims(both, all_of, 0.0) == {"a": 4, "b": 12}
    for name in "ab":
        assert serve(shares, name, 20, 0.0)
    # More than two bursts is not held against anybody: 8 and 20 slots, less 5 and 15.
    assert shares.claims(both, all_of, 2.0) == {"a": 1, "b": 7}


def test_who_asks_for_its_share_is_never_beyond_it():
    shares = shares_of(**dict.fromkeys("abcdefghij", 1.0))
    assert not any(serve(shares, "a", 1, float(i)) for i in range(100))  # a slot a s
    assert any(serve(shares, "a", 1, 100 + 0.8 * i) for i in range(100))


def test_those_beyond_have_short_steps_now_and_then_while_others_are_about():
    shares, all_of = shares_of(a=1.0, b=1.0), lane()
    assert shares.turn([waiting("a")], all_of, 0.0) == (0.0, math.inf)
    assert not serve(shares, "b", 1, 0.0)
    assert serve(shares, "a", 20, 0.2)
    assert shares.turn([waiting("a")], all_of, 0.3)[0] < 0.3
    assert serve(shares, "a", 9, 0.3)  # a step of one second, its own
    # It would rest for 16, but then there was nobody else for a second.
    assert shares.turn([waiting("a")], all_of, 0.9) == (1.0, 1.25)
    assert shares.turn([waiting("a")], all_of, 1.3) == (1.3, math.inf)


def test_a_step_for_those_beyond_alone_is_followed_by_a_rest_of_16_times_its_length():
    shares, quick = shares_of(a=1.0, b=1.0), lane(0.01)
    assert not serve(shares, "b", 1, 0.0, 0.01)
    assert serve(shares, "a", 20, 0.0, 0.01) and serve(shares, "a", 9, 0.0, 0.01)
    assert shares.turn([waiting("a")], quick, 0.0) == (0.16, 0.0125)
    assert shares.turn([waiting("a")], quick, 0.16) == (0.16, 0.0125)


def test_whoever_is_alone_is_nobody_else():
    shares, all_of = shares_of(a=1.0, b=1.0), lane()
    assert serve(shares, "a", 20, 0.0)
    assert shares.turn([waiting("a")], all_of, 0.1) == (0.1, math.inf)


def test_a_lone_tenant_has_all_there_is():
    scheduler = Scheduler(Policy.SPACE_TIME, max_batch_size=1, strict_shares=True)
    for name in "ab":
        scheduler.handle(Join(name))
    scheduler.handle(Install("all", (64,), {"a": (0,), "b": (0,)}))
    for slots, step_s in ((1, 1.0), (8, 1.2), (64, 3.0)):
        ready = Bucket((slots,), 1, is_open=slots == 64)
        scheduler.handle(Ready("all", ready, step_s))
    for request in range(640):
        submit(scheduler, request, "a")
    now_s = 0.0
    for _ in range(10):
        batch = scheduler.decide(now_s).batch
        assert len(batch.chunks) == 64
        now_s += batch.predicted_s


def test_who_has_a_claim_is_found_behind_many_who_have_none():
    names = [f"flood{i}" for i in range(30)]
    scheduler = Scheduler(Policy.SPACE_TIME, max_batch_size=1, strict_shares=True)
    for name in (*names, "good"):
        scheduler.handle(Join(name, 100.0 if name == "good" else 0.1))
    scheduler.handle(Install("all", (32,), dict.fromkeys((*names, "good"), (0,))))
    scheduler.handle(Ready("all", Bucket((2,), 1), 0.001))
    for request in range(300):
        submit(scheduler, request, names[request % 30])
    for _ in range(15):  # each has had its share, and more
        scheduler.decide(0.0)
    submit(scheduler, 300, "good")
    assert served(scheduler.decide(0.0))[0][0] == "good"
    now_s = 0.0
    for request in range(301, 320):
        for _ in range(3):
            now_s += 0.001
            scheduler.decide(now_s)
        submit(scheduler, request, "good")
        assert "good" in dict(served(scheduler.decide(now_s)))


def test_what_is_held_is_served_when_nobody_comes_any_more():
    scheduler = Scheduler(Policy.SPACE_TIME, max_batch_size=1, strict_shares=True)
    for name, weight in (("a", 1.0), ("b", 99.0)):
        scheduler.handle(Join(name, weight))
    scheduler.handle(Install("all", (1,), dict.fromkeys("ab", (0,))))
    scheduler.handle(Ready("all", ONE, 1.0))
    submit(scheduler, 0, "b")
    assert served(scheduler.decide(0.0)) == [("b", (0,))]
    for request in (1, 2, 3, 4):
        submit(scheduler, request, "a")
    while (decision := scheduler.decide(0.0)).batch:
        pass
    assert decision.wait_until_s is not None
    scheduler.handle(Drain())
    assert scheduler.decide(0.0).batch


def test_a_slot_of_a_dear_program_counts_for_what_it_takes():
    shares, both = shares_of(a=1.0, b=1.0), LaneBuckets((8, 8), ())
    both.predict(Bucket((8, 0), 1), Times(0.8, 0.8, 0.8))
    both.predict(Bucket((0, 8), 1), Times(80.0, 80.0, 80.0))
    shares.spend([Chunk("a", (), 1, 0, 1)] * 8, {"a": 8}, both, Bucket((0, 8), 1), 0.0)
    cheap, dear = waiting("a"), waiting("a")
    dear.species = (1,)
    assert shares.claims([dear], both, 0.0) == {"a": 0}
    assert shares.claims([dear], both, 40.0) == {"a": 2}
    assert shares.claims([cheap], both, 40.0) == {"a": 0}


def test_a_clock_that_goes_back_makes_nobody_wait_for_it():
    shares, all_of = shares_of(a=1.0, b=1.0), lane()
    assert not serve(shares, "b", 1, 1000.0)
    assert serve(shares, "a", 20, 1000.0) and serve(shares, "a", 9, 1000.0)
    assert shares.turn([waiting("a")], all_of, 5.0) == (6.0, 1.25)
    assert shares.turn([waiting("a")], all_of, 5.9) == (6.0, 1.25)
    assert shares.turn([waiting("a")], all_of, 7.0) == (7.0, math.inf)


def test_how_long_a_backlog_takes_is_told_by_what_its_tenant_got_lately():
    shares, all_of = shares_of(a=1.0, b=1.0), lane()
    both = [*map(waiting, "ab")]

    def steps(slots, full_slots=10.0, now_s=0.0):
        all_of.full_slots = full_slots
        return shares.steps_until("a", slots, all_of, now_s)

    assert steps(100) == 0  # nobody else is about
    claims = shares.claims(both, all_of, 0.0)
    of_b, of_a = Chunk("b", (), 1, 0, 0), Chunk("a", (), 1, 0, 0)
    shares.spend([of_b, *[of_a] * 9], claims, all_of, ONE, 0.0)
    assert steps(8) == 0  # a burst
    # Half of what a full step would have in its time, or two slots of each step.
    assert steps(8 + 70) == 14
    assert steps(8 + 70, 2.0) == 35
    for _ in range(200):  # others leave it nothing
        shares.spend([of_b], {"a": 0, "b": 8}, all_of, ONE, 0.0)
    assert steps(8 + 70) == 14
    assert steps(8 + 70, 2.0) == pytest.approx(70, abs=1)
    assert steps(8 + 70, now_s=2.0) == 0  # nobody is about any more


def test_who_was_quiet_so_far_has_a_short_step_of_its_own_besides():
    shares, all_of = shares_of(a=1.0, b=1.0), lane()
    all_of.full_slots = 10.0
    shares.spend([Chunk("b", (), 1, 0, 0)], {"b": 8}, all_of, ONE, 0.0)
    assert shares.steps_until("a", 8 + 4, all_of, 0.0) == 0
    assert shares.steps_until("a", 8 + 4 + 70, all_of, 0.0) == 14


def test_what_a_flood_cannot_have_in_time_is_refused_and_nothing_lost_by_it(seed):
    times_ms = {1: 0.7, 2: 0.8, 4: 0.93, 8: 1.24, 16: 2.23, 32: 4.2, 64: 6.4}
    table = {(slots, 1): 1e-3 * ms for slots, ms in times_ms.items()}
    rng, share = np.random.default_rng(seed), 64 / 6.4e-3 / 64
    times, tenants = [], []
    for tenant in range(64):
        rate = 10 * share if tenant == 0 else 0.5 * share
        own = np.cumsum(rng.exponential(1 / rate, int(2 * rate)))
        times.append(own)
        tenants.append(np.full(len(own), tenant))
    due_s, whose = np.concatenate(times), np.concatenate(tenants)
    order = np.argsort(due_s)
    trace = Arrivals(due_s[order], whose[order])
    strict = simulate(trace, table, deadline_s=0.06, strict_shares=True)
    assert strict.shed > strict.expired  # all of the flood's
    others_s = strict.latency_s[strict.tenants > 0]
    assert np.isfinite(others_s).all() and np.quantile(others_s, 0.99) < 6e-3
    served = np.isfinite(strict.latency_s[strict.tenants == 0]).sum()
    assert served > 0.35 * (strict.tenants == 0).sum()  # a tenth is its share


def test_a_clock_that_goes_back_gives_and_takes_nothing():
    shares = shares_of(a=1.0)
    assert serve(shares, "a", 9, 100.0)
    assert shares.claims([waiting("a")], lane(), 50.0) == {"a": 0}


def test_where_no_step_has_so_many_rows_nobody_is_beyond():
    shares = shares_of(a=1.0)
    assert serve(shares, "a", 9, 0.0)
    assert shares.claims([waiting("a", rows=2)], lane(), 0.0) == {"a": 8}


def test_who_left_and_comes_back_starts_anew():
    shares = shares_of(a=1.0, b=1.0)
    assert serve(shares, "a", 9, 0.0)
    shares.leave("a")
    shares.join("a", 1.0)
    assert shares.claims([waiting("a")], lane(), 0.0) == {"a": 8}


def test_who_is_beyond_its_share_is_served_though_no_step_is_short_enough():
    scheduler = Scheduler(Policy.SPACE_TIME, max_batch_size=1, strict_shares=True)
    for name, weight in (("a", 1.0), ("b", 99.0)):
        scheduler.handle(Join(name, weight))
    scheduler.handle(Install("all", (2,), dict.fromkeys("ab", (0,))))
    scheduler.handle(Ready("all", Bucket((1,), 1), 1.0))
    # The shortest serves only those who have several waiting.
    scheduler.handle(Ready("all", Bucket((2,), 1, is_open=True), 0.1))
    submit(scheduler, 5, "b")
    assert served(scheduler.decide(0.0)) == [("b", (5,))]
    for request in range(5):
        submit(scheduler, request, "a")
    assert len(served(scheduler.decide(0.0))) == 2  # its share, and more
    assert len(served(scheduler.decide(0.0))) == 2  # a step of its own
    decision = scheduler.decide(0.0)
    assert decision.batch is None
    # It would rest 16 times as long; but by then b is not about any more.
    assert decision.wait_until_s == pytest.approx(1.0)
    assert served(scheduler.decide(1.0)) == [("a", (4,))]


def test_a_wait_of_those_beyond_ends_as_soon_as_one_has_a_claim_again():
    scheduler = Scheduler(Policy.SPACE_TIME, max_batch_size=1, strict_shares=True)
    for name in "ab":
        scheduler.handle(Join(name))
    scheduler.handle(Install("all", (16,), dict.fromkeys("ab", (0,))))
    for slots, step_s in STEP_S.items():
        scheduler.handle(Ready("all", Bucket((slots,), 1), step_s / 10))
    submit(scheduler, 100, "b")
    for request in range(20):
        submit(scheduler, request, "a")
    while served(decision := scheduler.decide(0.0)):
        pass
    until_s = decision.wait_until_s
    assert 0.0 < until_s < 0.1  # a slot takes 0.01, and half of the time is a's
    assert not served(scheduler.decide(until_s - 1e-4))
    assert served(scheduler.decide(until_s + 1e-6))


@pytest.mark.parametrize("start_s", [0.0, 1e5, 1.76e9])
def test_nobody_is_lost_where_a_claim_is_nearer_than_the_clock_can_tell(start_s):
    scheduler = Scheduler(Policy.SPACE_TIME, max_batch_size=1, strict_shares=True)
    names = ["a", "b", *(f"other-{i}" for i in range(58))]
    for name in names:
        scheduler.handle(Join(name))
    scheduler.handle(Install("all", (64,), dict.fromkeys(names, (0,))))
    for slots, step_s in ((1, 0.002), (64, 0.0064)):
        scheduler.handle(Ready("all", Bucket((slots,), 1), step_s))
    now_s, num_served = start_s, 0
    submit(scheduler, 0, "b", now_s=now_s)
    for request in range(1, 101):
        submit(scheduler, request, "a", now_s=now_s)
    while scheduler.num_queued:
        decision = scheduler.decide(now_s)
        num_served += len(served(decision))
        batch = decision.batch
        now_s = now_s + batch.predicted_s if batch else decision.wait_until_s
    assert num_served == 101


def test_those_beyond_their_shares_are_served_whatever_their_program():
    scheduler = Scheduler(Policy.SPACE_TIME, max_batch_size=1, strict_shares=True)
    for name in "abc":
        scheduler.handle(Join(name))
    scheduler.handle(Install("all", (1, 1), {"a": (0,), "b": (1,), "c": (0,)}))
    scheduler.handle(Ready("all", Bucket((1, 0), 1), 0.001))
    scheduler.handle(Ready("all", Bucket((0, 1), 1), 0.01))
    for request in range(40):
        submit(scheduler, request, "b")
    now_s = 0.0
    while scheduler.num_queued:
        submit(scheduler, 1000 + int(1e6 * now_s), "c")
        while (decision := scheduler.decide(now_s)).batch:
            now_s += decision.batch.predicted_s
        now_s = max(decision.wait_until_s or now_s, now_s + 1e-3)
        assert now_s < 60.0


def test_a_small_step_forgives_nothing_of_what_large_ones_have_left():
    shares, all_of = shares_of(a=1.0, b=1.0), LaneBuckets((16,), ())
    for slots, rows, step_s in ((1, 1, 0.001), (16, 1, 0.0016), (16, 32, 0.0256)):
        all_of.predict(Bucket((slots,), rows), Times(step_s, step_s, step_s))
    big = [waiting("a", rows=32)]
    claims = shares.claims(big, all_of, 0.0)
    chunks = [Chunk("a", (i,), 32) for i in range(16)]
    shares.spend(chunks, claims, all_of, Bucket((16,), 32), 0.0)
    assert shares.claims(big, all_of, 0.0) == {"a": 0}
    shares.spend([Chunk("a", (99,), 1)], {"a": 0}, all_of, Bucket((1,), 1), 0.0)
    assert shares.claims(big, all_of, 0.0) == {"a": 0}


class Noted(dict):
    """A dictionary that counts which of its items were looked at."""

    looks = 0

    def items(self):
        return self

    def __reversed__(self):
        for name in reversed([*self.keys()]):
            self.looks += 1
            yield name, self[name]

    __iter__ = None


def test_who_was_about_long_ago_is_not_looked_at():
    shares, all_of, num = shares_of(a=1.0, b=1.0), lane(), 3000
    for i in range(num):
        shares.join(f"t{i}", 1.0)
        shares.spend([Chunk(f"t{i}", (), 1)], {f"t{i}": 8}, all_of, ONE, 1e-5 * i)
    assert shares.steps_until("a", 100, all_of, 0.5) > 0
    shares._recent = Noted(shares._recent)
    assert shares.steps_until("a", 100, all_of, 5.0) == 0
    assert shares._recent.looks <= 2


@pytest.mark.parametrize(
    ("slots", "weight", "num"), [(4, 16, 16), (4, 4, 4), (8, 8, 8)]
)
def test_who_is_beyond_takes_no_slot_that_another_has_a_claim_to(slots, weight, num):
    floods = [f"f{i}" for i in range(num)]
    step_s = {k: 0.001 * (1 + 0.05 * k) for k in (1, 2, 4, 8) if k <= slots}
    scheduler = made(["b", *floods], step_s, {"b": float(weight)})
    request, got, now_s = 0, Counter(), 0.0
    for step in range(4000):
        for name in ("b", *floods):
            for _ in range(2 * slots - len(scheduler.queued(name))):
                request += 1
                submit(scheduler, request, name, now_s)
        decision = scheduler.decide(now_s)
        if decision.batch is None:
            now_s = decision.wait_until_s
            continue
        now_s += decision.batch.predicted_s
        for chunk in decision.batch.chunks if step > 500 else ():
            got[chunk.tenant] += 1
    assert got["b"] / got.total() == pytest.approx(0.5, abs=0.05)
