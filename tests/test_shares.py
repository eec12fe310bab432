"""Leaky buckets: a burst is nobody's flood, a share runs out, alone there are walls."""

import math

import pytest

from stfuse._buckets import LaneBuckets, Times
from stfuse._queues import Tenant
from stfuse._shares import Shares
from stfuse._types import Bucket

STEP_S = {1: 1.0, 4: 1.2, 16: 1.6}  # so a slot of a full step takes 0.1 s


def lane():
    found = LaneBuckets((16,), ())
    for slots, step_s in STEP_S.items():
        found.add(Bucket((slots,), 1), Times(step_s, step_s))
    return found


def shares_of(**weights):
    shares = Shares()
    for name, weight in weights.items():
        shares.join(name, weight)
    return shares


def serve(shares, name, slots, now_s):
    """Serve a tenant, whoever is beyond its share; return whether it is then."""
    one, all_of = Tenant(name, 1.0), lane()
    beyond = shares.beyond([one], all_of, 1, now_s)
    shares.spend([one] * slots, beyond, all_of, 1, now_s)
    return bool(shares.beyond([one], all_of, 1, now_s))


def test_a_burst_is_no_flood_and_runs_out_with_time():
    shares = shares_of(a=1.0, b=3.0)
    assert not serve(shares, "a", 8, 0.0)
    assert serve(shares, "a", 1, 0.0)
    one = [Tenant("a", 1.0)]
    assert shares.beyond(one, lane(), 1, 0.39) == {"a"}  # a quarter of it ran out
    assert not shares.beyond(one, lane(), 1, 0.41)
    assert not shares.beyond([Tenant("b", 1.0)], lane(), 1, 0.0)


def test_a_weight_says_how_fast_it_runs_out():
    shares = shares_of(a=1.0, b=3.0)
    for name in "ab":
        assert serve(shares, name, 20, 0.0)
    both = [Tenant(name, 1.0) for name in "ab"]
    assert shares.beyond(both, lane(), 1, 2.0) == {"a"}


def test_who_asks_for_its_share_is_never_beyond_it():
    shares = shares_of(**dict.fromkeys("abcdefghij", 1.0))
    assert not any(serve(shares, "a", 1, float(i)) for i in range(100))  # a slot a s
    assert any(serve(shares, "a", 1, 100 + 0.8 * i) for i in range(100))


def test_those_beyond_have_short_steps_while_others_are_about():
    shares, all_of = shares_of(a=1.0, b=1.0), lane()
    assert shares.longest_s(all_of, 1, 0.0) == math.inf
    assert not serve(shares, "b", 1, 0.0)
    assert serve(shares, "a", 20, 0.5)
    assert shares.longest_s(all_of, 1, 1.4) == pytest.approx(1.25)
    assert serve(shares, "a", 9, 1.4)  # beyond its share, it is not somebody
    assert shares.longest_s(all_of, 1, 1.6) == math.inf


def test_a_clock_that_goes_back_gives_and_takes_nothing():
    shares = shares_of(a=1.0)
    assert serve(shares, "a", 9, 100.0)
    assert shares.beyond([Tenant("a", 1.0)], lane(), 1, 50.0) == {"a"}


def test_who_left_and_comes_back_starts_anew():
    shares = shares_of(a=1.0, b=1.0)
    assert serve(shares, "a", 9, 0.0)
    shares.leave("a")
    shares.join("a", 1.0)
    assert not shares.beyond([Tenant("a", 1.0)], lane(), 1, 0.0)
