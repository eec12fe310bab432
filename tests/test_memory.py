"""What fits on a device, by hand: weights, steps in flight, the old beside the new."""

import dataclasses
from types import SimpleNamespace

import numpy as np
import pytest

import stfuse
from stfuse import _lane
from stfuse._cost import RECORDS
from stfuse._device import JaxDevice
from stfuse._lane import Member
from stfuse._memory import DoesNotFit, Memory, bank_bytes, step_bytes
from stfuse._trace import trace
from stfuse._types import Bucket
from stfuse.testing import FakeDevice, affine_job
from tests.serving import serve, wait_for


def lane_of(*jobs, cost="cpu", **options):
    members = [
        Member(j, tuple(map(trace, j.programs)), tuple(j.flatten_params(j.params)))
        for j in jobs
    ]
    return _lane.build("all", members, JaxDevice(), cost=RECORDS[cost], **options)


def compiled(arguments=0, output=0, temp=0, alias=0):
    found = SimpleNamespace(
        argument_size_in_bytes=arguments,
        output_size_in_bytes=output,
        temp_size_in_bytes=temp,
        alias_size_in_bytes=alias,
    )
    return SimpleNamespace(memory_analysis=lambda: found)


def test_a_step_needs_its_inputs_outputs_and_temporaries_beside_the_bank():
    assert step_bytes(compiled(1000, 70, 5), bank=900) == 175
    assert step_bytes(compiled(1000, 70, 5, alias=70), bank=1000) == 5
    assert step_bytes(compiled(800, 0, 0), bank=900) == 0
    assert step_bytes(SimpleNamespace(memory_analysis=lambda: None), 0) == 0
    assert step_bytes(lambda: None, 0) == 0


def test_a_real_compiled_step_tells_its_inputs_and_outputs():
    lane = lane_of(affine_job("a", width=64))
    step = _lane.compile_bucket(
        lane, Bucket((1,), 16), JaxDevice(), cost=RECORDS["cpu"]
    )
    in_and_out = 2 * 16 * 64 * 4
    assert in_and_out <= step_bytes(step, bank_bytes(lane)) <= 4 * in_and_out


@pytest.mark.parametrize("cost", ["cpu", "h200"])
def test_the_bytes_of_a_lane_are_those_of_its_arrays_and_grow_by_species(cost):
    narrow = [affine_job(f"n{i}", scale=i + 1.0, width=4) for i in range(3)]
    wide = [affine_job(f"w{i}", scale=i + 1.0, width=7) for i in range(2)]
    lane = lane_of(*narrow, *wide, cost=cost)
    assert lane.capacities == (4, 2)
    assert bank_bytes(lane) == sum(x.nbytes for x in lane.bank.stacks)
    more = [affine_job(f"m{i}", scale=i + 9.0, width=4) for i in range(3)]
    grown = lane_of(*narrow, *more, *wide, cost=cost)
    assert grown.capacities == (8, 2)
    assert bank_bytes(lane, doubled=[0]) == bank_bytes(grown)


def test_the_bytes_that_a_build_announces_are_those_that_it_then_uses():
    asked = []
    lane = lane_of(
        *(affine_job(f"a{i}", scale=i) for i in range(3)), admit=asked.append
    )
    assert asked == [bank_bytes(lane)]


def test_a_build_that_is_not_admitted_puts_nothing_on_the_device():
    def refuse(num_bytes):
        raise DoesNotFit("no")

    class NoPut(JaxDevice):
        def put(self, tree):
            raise AssertionError("it was put there")

    member = affine_job("a")
    member = Member(
        member, (trace(member),), tuple(member.flatten_params(member.params))
    )
    with pytest.raises(DoesNotFit):
        _lane.build("all", [member], NoPut(), cost=RECORDS["cpu"], admit=refuse)


def memory(limit, lanes=(), **device):
    on = SimpleNamespace(memory_limit_bytes=limit, **device)
    return Memory(on, None, lambda: lanes)


def test_the_limit_is_the_lower_of_the_devices_and_the_engines():
    def limit(of_device, of_engine):
        on = SimpleNamespace(memory_limit_bytes=of_device)
        return Memory(on, of_engine, list).limit_bytes

    assert limit(10, None) == limit(None, 10) == limit(10, 20) == limit(20, 10) == 10
    assert limit(None, None) is None
    Memory(SimpleNamespace(), None, list).check(10**15)  # no limit: all fits
    assert JaxDevice().memory_limit_bytes is None  # a CPU does not say


def test_weights_and_two_steps_in_flight_fit_exactly_or_not_at_all():
    lane = lane_of(affine_job("a", width=8))
    held = bank_bytes(lane)
    lane.step_bytes[Bucket((1,), 1)] = 100
    lane.step_bytes[Bucket((1,), 2)] = 300
    plan = memory(held + 600 + 50, [lane])
    plan.check(50)
    with pytest.raises(
        DoesNotFit, match=rf"51 bytes.*{held} in use.*600 bytes.*so 1 are"
    ):
        plan.check(51)
    assert plan.fits(50) and not plan.fits(51)
    plan.check(0, [325])
    with pytest.raises(DoesNotFit):
        plan.check(0, [326])


def test_an_open_step_may_not_need_much_more_than_the_others():
    lane = lane_of(*[affine_job(f"j{i}", scale=i + 1.0) for i in range(8)])
    bank = bank_bytes(lane)
    usual, opened = Bucket((8,), 1), Bucket((8,), 1, is_open=True)
    for limit_bytes in (None, 10_000):
        memory = Memory(FakeDevice(), limit_bytes, lambda: [lane])
        lane.step_bytes.clear()
        memory.admit(lane, usual, compiled(bank, temp=1000))
        memory.admit(lane, opened, compiled(bank, temp=1250))
        assert lane.step_bytes == {usual: 1000, opened: 1250}
        del lane.step_bytes[opened]
        if limit_bytes is None:
            memory.admit(lane, opened, compiled(bank, temp=2000))
            continue
        with pytest.raises(DoesNotFit, match="2,000 bytes, the lane's others 1,000"):
            memory.admit(lane, opened, compiled(bank, temp=2000))
        assert opened not in lane.step_bytes


def test_a_lane_that_does_not_serve_yet_counts_beside_those_that_do():
    old, new = lane_of(affine_job("a", width=8)), lane_of(affine_job("b", width=8))
    bucket, needed = Bucket((1,), 1), bank_bytes(old) + bank_bytes(new) + 2 * 40
    plan = memory(needed, [old])
    plan.admit(new, bucket, compiled(bank_bytes(new) + 30, 10))
    assert new.step_bytes == {bucket: 40}
    with pytest.raises(DoesNotFit):
        memory(needed - 1, [old]).admit(new, bucket, compiled(bank_bytes(new) + 30, 10))
    memory(needed - bank_bytes(old), [new]).check(0, beside=new)  # counted once


def test_what_others_hold_on_the_device_counts_where_it_tells():
    plan = memory(1000, memory_used_bytes=900)
    plan.check(100)
    with pytest.raises(DoesNotFit, match="900 in use"):
        plan.check(101)


def test_where_slots_are_few_the_first_jobs_get_them_and_all_decide_what_is_shared():
    trunk = np.arange(9, dtype=np.float32).reshape(3, 3)
    of = [
        stfuse.Job(f"j{i}", lambda p, x: x @ p, trunk, np.ones((1, 3), "f"))
        for i in range(4)
    ]
    assert lane_of(*of, max_capacity=2).bank.stacks[0].shape == (3, 3)
    of[3] = dataclasses.replace(of[3], params=trunk + 1)
    lane = lane_of(*of, max_capacity=2)
    assert lane.capacities == (2,) and set(lane.places) == {"j0", "j1"}
    assert lane.bank.stacks[0].shape == (2, 3, 3)


WIDE = 64
WIDE_BYTES = 4 * (WIDE * WIDE + WIDE)


def test_a_job_that_fits_alone_but_not_beside_the_old_lane_stays_in_its_own():
    # Old and new shared weights at once would be 4 units; alone it takes 1 more.
    device = FakeDevice(memory_limit_bytes=int(3.8 * WIDE_BYTES))
    x = np.ones((1, WIDE), np.float32)
    with serve(affine_job("a", width=WIDE), device=device, max_batch_size=1) as engine:
        half = affine_job("b", width=WIDE // 2 * 2 - 2)
        engine.add(half).result(60)
        stats = engine.stats().tenants
        assert stats["a"].lane == "all" and stats["b"].lane in ("all", "b#1")
        y = np.ones((1, WIDE - 2), np.float32)
        np.testing.assert_array_equal(engine.infer("b", y), y * 3)
        np.testing.assert_array_equal(engine.infer("a", x), x * 3)
        other = affine_job("c", width=WIDE - 4)
        engine.add(other).result(60)
        assert engine.stats().tenants["c"].lane == "c#2"
        z = np.ones((1, WIDE - 4), np.float32)
        np.testing.assert_array_equal(engine.infer("c", z), z * 3)
        engine.remove("c")
        wait_for(lambda: not any("c#" in name for name in engine._server.lanes))
