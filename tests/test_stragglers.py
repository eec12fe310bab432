"""Who is evicted, why, and when it is tried again: by hand, and in a simulation."""

import math
import random

import pytest

from stfuse._stragglers import (
    Backoff,
    Group,
    Measured,
    Watch,
    alone_s,
    measure,
    without,
    worst,
)
from stfuse._types import Bucket, StepRecord

# Two fast programs and a slow one, a species each, two slots each.
GROUPS = {
    "a": Group(frozenset({"a0", "a1"}), (0,), 2.0),
    "b": Group(frozenset({"b0", "b1"}), (1,), 2.0),
    "slow": Group(frozenset({"slow"}), (2,), 1.0),
}
ALL = Bucket((2, 2, 1), 4)
OWN = {Bucket((2, 0, 0), 4): 1.0, Bucket((0, 2, 0), 4): 1.0, Bucket((0, 0, 1), 4): 10.0}


def step(step_s, *tenants, bucket=ALL, lane="all"):
    return StepRecord(lane, bucket, step_s, step_s, dict.fromkeys(tenants, 1), {}, {})


def watched(*records):
    watch = Watch()
    for record in records:
        watch.add(record)
    return watch


@pytest.mark.parametrize(
    ("measured", "word"),
    [
        # Four share a step that takes hardly longer than one: fusing pays.
        (Measured(1.2, 1.1, 1.0, share=0.25), None),
        # It costs as much as alone, a tenth of what the others cost: nobody minds.
        (Measured(1.1, 1.0, 0.1, share=0.25), None),
        # Always busy, and dearer in the group than alone.
        (Measured(4.0, 1.0, 1.0, share=0.6), "alone it takes 1 s"),
        # As dear as alone, but it runs in every step and has work in few of them.
        (Measured(3.0, 1.0, 2.0, use=0.1, share=0.6), "10% serve it"),
        (Measured(3.0, 1.0, 2.0, use=1.0, share=0.6), None),
        # Two steps keep the others' promise only without it.
        (Measured(3.0, 1.0, 2.0, share=0.6, others_slo_s=5.0), "SLO is 5 s"),
        (Measured(3.0, 1.0, 2.0, share=0.6, others_slo_s=6.0), None),
        # They break it anyway: no reason to move.
        (Measured(3.0, 2.8, 2.0, share=0.6, others_slo_s=5.0), None),
        # A minority makes everybody ten times slower; a majority may.
        (Measured(10.0, 1.0, 10.0, share=0.2), "without it"),
        (Measured(10.0, 1.0, 10.0, share=0.6), None),
    ],
)
def test_each_rule_has_its_reason(measured, word):
    reason = measured.reason()
    assert (reason is None) if word is None else (word in reason)


def test_the_worst_of_several_goes_first():
    slow, slower = Measured(10.0, 2.0, 8.0, share=0.2), Measured(20.0, 1.0, 19.0)
    fine = Measured(1.0, 1.0, 1.0)
    assert worst({"fine": fine, "slow": slow, "slower": slower})[0] == "slower"
    assert worst({"fine": fine}) is None


def test_a_busy_host_makes_steps_longer_and_nobody_a_straggler():
    own = {Bucket((2, 0, 0), 4): 1.0, Bucket((0, 2, 0), 4): 1.0}
    own |= {Bucket((0, 0, 1), 4): 1.0, ALL: 2.5, Bucket((2, 2, 0), 4): 1.8}
    random.seed(0)
    quiet = [step(2.5, "a0", "b0", "slow") for _ in range(8)]
    busy = [step(2.5 + random.uniform(1, 9), "a0", "b0", "slow") for _ in range(56)]
    assert worst(measure("all", GROUPS, own, watched(*quiet, *busy))) is None
    slow = [step(9.5 + random.uniform(0, 9), "a0", "b0", "slow") for _ in range(64)]
    key, _ = worst(measure("all", GROUPS, own, watched(*slow)))
    assert key == "slow"


def test_what_ran_rarely_is_judged_by_its_first_measurement():
    own = {**OWN, ALL: 11.0}
    found = measure("all", GROUPS, own, watched(*[step(50.0, "a0")] * 31))
    assert {m.with_s for m in found.values()} == {11.0}
    found = measure("all", GROUPS, own, watched(*[step(50.0, "a0")] * 32))
    assert {m.with_s for m in found.values()} == {50.0}
    assert measure("all", GROUPS, OWN, watched()) == {}, "no shared bucket was measured"


def test_a_group_is_suspected_of_the_most_that_own_buckets_allow():
    found = measure("all", GROUPS, {**OWN, ALL: 11.5}, watched())
    assert found["slow"].without_s == 1.5  # the rest of the step
    assert found["a"].without_s == 10.5
    assert found["slow"].alone_s == 10 and found["slow"].share == pytest.approx(0.2)
    key, _ = worst(found)
    assert key == "slow" and found[key].rest == Bucket((2, 2, 0), 4)
    # Fusing at a loss: apart, the others would take two.
    assert measure("all", GROUPS, {**OWN, ALL: 30.0}, watched())["slow"].without_s == 2
    # Steps that overlap: no less than the longest of the others.
    assert measure("all", GROUPS, {**OWN, ALL: 10.2}, watched())["slow"].without_s == 1


def test_a_measured_bucket_without_the_group_settles_it():
    for rest_s, key in ((10.0, None), (1.5, "slow")):
        measured = {**OWN, ALL: 11.5, Bucket((2, 2, 0), 4): rest_s}
        found = measure("all", GROUPS, measured, watched())
        assert found["slow"].without_s == rest_s and found["slow"].rest is None
        verdict = worst(found)
        assert (verdict and verdict[0]) == key


def test_steps_that_serve_a_group_are_counted_where_it_takes_part():
    steps = [step(9.0, "a0", "slow"), *[step(1.5, "a0", "b0")] * 3] * 16
    found = measure("all", GROUPS, {**OWN, ALL: 2.0}, watched(*steps))
    assert found["slow"].use == 0.25 and found["slow"].with_s == 9
    assert found["a"].use == 1
    nobody = GROUPS | {"idle": Group(frozenset({"idle"}), (2,))}
    assert measure("all", nobody, {**OWN, ALL: 2.0}, watched(*steps))["idle"].use == 0


def test_the_others_slo_is_the_shortest_of_the_other_groups():
    groups = {
        "a": Group(frozenset({"a0"}), (0,), 1.0, slo_s=3.0),
        "b": Group(frozenset({"b0"}), (1,), 1.0, slo_s=2.0),
        "slow": Group(frozenset({"slow"}), (2,), 1.0, slo_s=1.0),
    }
    found = measure("all", groups, {**OWN, ALL: 12.0}, watched())
    assert [found[k].others_slo_s for k in groups] == [1.0, 1.0, 2.0]


def test_a_groups_own_time_is_that_of_the_smallest_bucket_that_covers_it():
    group = Group(frozenset({"x"}), (0, 2))
    own = {
        Bucket((2, 0, 0), 4): 1.0,
        Bucket((4, 0, 0), 4): 3.0,
        Bucket((0, 0, 1), 8): 5.0,
        Bucket((2, 2, 1), 4): 0.1,
        Bucket((2, 0, 0), 1): 0.2,
    }
    assert alone_s(Bucket((2, 2, 1), 4), group, own) == 6.0
    assert alone_s(Bucket((2, 2, 0), 4), group, own) == 1.0
    assert alone_s(Bucket((8, 2, 0), 4), group, own) is None
    assert without(Bucket((2, 3, 1), 4), group) == Bucket((0, 3, 0), 4)


def test_a_wait_doubles_up_to_its_end_and_starts_anew_for_who_was_forgotten():
    backoff = Backoff(first_s=10.0, most_s=35.0)
    assert backoff.next_s() == math.inf
    waits = []
    now_s = 100.0
    for _ in range(4):
        due_s = backoff.evict("slow", now_s, use=0.5)
        waits.append(due_s - now_s)
        assert backoff.due(due_s - 0.1) == [] and backoff.due(due_s) == ["slow"]
        assert backoff.next_s() == due_s and backoff.use("slow") == 0.5
        backoff.returned("slow")
        assert backoff.due(1e9) == []
        now_s = due_s
    assert waits == [10.0, 20.0, 35.0, 35.0]
    backoff.forget("slow")
    assert backoff.evict("slow", 0.0) == 10.0


def test_in_a_simulation_the_slow_one_goes_and_returns_once_it_is_quick(seed):
    rng = random.Random(seed)
    slow_s, is_in, now_s, history = 10.0, True, 0.0, []
    backoff, watch = Backoff(first_s=200.0), Watch()
    for n in range(4000):
        if n == 2000:
            slow_s = 0.5  # its owner swapped in a smaller model, say
        own = {**OWN, Bucket((0, 0, 1), 4): slow_s, ALL: 1.3 + slow_s}
        own[Bucket((2, 2, 0), 4)] = 1.3
        tenants = [t for t in ("a0", "a1", "b0", "b1") if rng.random() < 0.9]
        tenants += ["slow"] * (rng.random() < 0.5)
        together_s = 1.0 + 0.3 + (slow_s if is_in else 0.0)
        step_s = together_s * rng.uniform(0.95, 1.05)
        now_s += step_s
        watch.add(step(step_s, *tenants))
        if is_in and n % 64 == 63:
            verdict = worst(measure("all", GROUPS, own, watch))
            if verdict is not None:
                assert verdict[0] == "slow"
                backoff.evict("slow", now_s)
                watch.forget("all")
                is_in = False
                history.append(n)
        elif not is_in and backoff.due(now_s):
            trial = Measured(1.3 + slow_s, 1.3, slow_s, share=0.2)
            if trial.reason() is None:
                backoff.returned("slow")
                is_in = True
                history.append(n)
            else:
                backoff.evict("slow", now_s)
    assert history[0] == 63, f"seed {seed}: {history}"
    assert len(history) == 2 and history[1] >= 2000, f"seed {seed}: {history}"
