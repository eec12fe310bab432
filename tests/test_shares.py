"""Leaky buckets: a burst is nobody's flood, a share runs out, alone there are walls."""

import math

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
    claims = shares.claims([one], all_of, 1, now_s)
    shares.spend([one] * slots, claims, all_of, Bucket((1,), 1), now_s)
    return not shares.claims([one], all_of, 1, now_s)[name]


def test_a_burst_is_no_flood_and_runs_out_with_time():
    shares = shares_of(a=1.0, b=1.0)
    assert not serve(shares, "a", 7, 0.0)
    assert serve(shares, "a", 1, 0.0)
    both = [Tenant(name, 1.0) for name in "ab"]
    assert shares.claims(both, lane(), 1, 0.0) == {"a": 0, "b": 8}
    # Half of the time runs out of it, and a slot of a full step takes 0.1 s.
    assert shares.claims(both, lane(), 1, 0.19)["a"] == 1
    assert shares.claims(both, lane(), 1, 0.21)["a"] == 2
    assert shares.claims(both, lane(), 1, 9.0)["a"] == 8


def test_a_weight_says_how_much_it_holds_and_how_fast_that_runs_out():
    shares, all_of = shares_of(a=1.0, b=3.0), lane()
    both = [Tenant(name, 1.0) for name in "ab"]
    assert shares.claims(both, all_of, 1, 0.0) == {"a": 4, "b": 12}
    for name in "ab":
        assert serve(shares, name, 20, 0.0)
    assert shares.claims(both, all_of, 1, 2.0) == {"a": 0, "b": 7}


def test_who_asks_for_its_share_is_never_beyond_it():
    shares = shares_of(**dict.fromkeys("abcdefghij", 1.0))
    assert not any(serve(shares, "a", 1, float(i)) for i in range(100))  # a slot a s
    assert any(serve(shares, "a", 1, 100 + 0.8 * i) for i in range(100))


def test_those_beyond_have_short_steps_now_and_then_while_others_are_about():
    shares, all_of = shares_of(a=1.0, b=1.0), lane()
    assert shares.turn(all_of, 1, 0.0) == (0.0, math.inf)
    assert not serve(shares, "b", 1, 0.0)
    assert serve(shares, "a", 20, 0.2)
    assert shares.turn(all_of, 1, 0.3)[0] < 0.3
    assert serve(shares, "a", 9, 0.3)  # a step of one second, its own
    assert shares.turn(all_of, 1, 0.9) == (0.3 + 8.0, 1.25)
    assert shares.turn(all_of, 1, 1.3) == (1.3, math.inf)  # nobody else for a second


def test_a_clock_that_goes_back_makes_nobody_wait_for_it():
    shares, all_of = shares_of(a=1.0, b=1.0), lane()
    assert not serve(shares, "b", 1, 1000.0)
    assert serve(shares, "a", 20, 1000.0) and serve(shares, "a", 9, 1000.0)
    assert shares.turn(all_of, 1, 5.0) == (13.0, 1.25)
    assert shares.turn(all_of, 1, 12.0) == (13.0, 1.25)


def test_a_clock_that_goes_back_gives_and_takes_nothing():
    shares = shares_of(a=1.0)
    assert serve(shares, "a", 9, 100.0)
    assert shares.claims([Tenant("a", 1.0)], lane(), 1, 50.0) == {"a": 0}


def test_where_no_step_has_so_many_rows_nobody_is_beyond():
    shares = shares_of(a=1.0)
    assert serve(shares, "a", 9, 0.0)
    assert shares.claims([Tenant("a", 1.0)], lane(), 2, 0.0) == {"a": 8}


def test_who_left_and_comes_back_starts_anew():
    shares = shares_of(a=1.0, b=1.0)
    assert serve(shares, "a", 9, 0.0)
    shares.leave("a")
    shares.join("a", 1.0)
    assert shares.claims([Tenant("a", 1.0)], lane(), 1, 0.0) == {"a": 8}
