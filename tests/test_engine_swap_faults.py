"""A write of weights that fails costs nobody an answer."""

import jax
import numpy as np
import pytest

import stfuse
from stfuse import _bank, _lane
from stfuse.testing import FakeDevice, affine_job
from tests.serving import ROW, busy_with, serve


@pytest.mark.parametrize("eaten", [False, True])
def test_a_swap_that_fails_leaves_the_old_weights_and_all_are_served(
    monkeypatch, eaten
):
    write = _bank.write

    def broken(layout, bank, *arguments, **options):
        monkeypatch.setattr(_bank, "write", write)
        if eaten:  # the donated buffers are gone, as after a failed step
            jax.tree.map(lambda x: x.delete(), bank.stacks)
        raise MemoryError("out of memory")

    jobs = affine_job("a"), affine_job("b", scale=4.0)  # nothing is shared
    with serve(*jobs) as engine:
        monkeypatch.setattr(_bank, "write", broken)
        with pytest.raises(stfuse.DeviceError, match=r"'a'.*out of memory.*old ones"):
            engine.swap("a", affine_job("a", scale=9.0).params)
        for _ in range(3):
            np.testing.assert_array_equal(engine.infer("a", ROW), ROW * 3)
            np.testing.assert_array_equal(engine.infer("b", ROW), ROW * 5)
        engine.swap("a", affine_job("a", scale=5.0).params)
        np.testing.assert_array_equal(engine.infer("a", ROW), ROW * 6)
        assert engine.health(timeout_s=60).quarantined == ()


def test_weights_that_do_not_fit_beside_the_old_ones_leave_those(monkeypatch):
    def broken(lane, member):
        raise MemoryError("out of memory")

    jobs = affine_job("a"), affine_job("b", scale=4.0), affine_job("d", scale=5.0)
    with serve(*jobs) as engine:  # one slot of four is free
        monkeypatch.setattr(_lane, "staged", broken)
        with pytest.raises(stfuse.DeviceError, match=r"'a'.*out of memory.*old ones"):
            engine.swap("a", affine_job("a", scale=9.0).params)
        np.testing.assert_array_equal(engine.infer("a", ROW), ROW * 3)
        assert "out of memory" in str(engine.add(affine_job("c")).exception(60))
        np.testing.assert_array_equal(engine.infer("b", ROW), ROW * 5)


def test_a_swap_between_staging_and_joining_is_not_lost(monkeypatch):
    staged, swapped = _lane.staged, []

    def swap_meanwhile(lane, member):
        found = staged(lane, member)
        if not swapped:
            swapped.append(member.generation)
            engine.swap("new", affine_job("new", scale=7.0).params)
        return found

    jobs = [affine_job(f"j{i}", scale=float(i)) for i in range(3)]
    with serve(*jobs) as engine:  # one slot of four is free
        monkeypatch.setattr(_lane, "staged", swap_meanwhile)
        engine.add(affine_job("new", scale=2.0)).result(60)
        np.testing.assert_array_equal(engine.infer("new", ROW), ROW * 8)
        assert swapped == [0]


def test_a_join_that_eats_the_weights_is_mended(monkeypatch):
    write = _bank.write

    def broken(layout, bank, *arguments, **options):
        monkeypatch.setattr(_bank, "write", write)
        jax.tree.map(lambda x: x.delete(), bank.stacks)
        raise MemoryError("out of memory")

    jobs = [affine_job(f"j{i}", scale=float(i)) for i in range(3)]
    with serve(*jobs) as engine:  # one slot of four is free
        monkeypatch.setattr(_bank, "write", broken)
        ready = engine.add(affine_job("new"))
        assert "out of memory" in str(ready.exception(60))
        for i in range(3):
            np.testing.assert_array_equal(engine.infer(f"j{i}", ROW), ROW * (i + 1))


def test_requests_in_flight_when_a_lane_is_lost_all_end():
    device = FakeDevice()
    with serve(affine_job("a"), affine_job("b"), device=device) as engine:
        futures = [busy_with(engine, device, "a")]
        futures += [engine.submit(name, ROW) for name in "ab" * 4]
        server = engine._server
        lane = server.lanes["all"]
        lost = server.command(lambda: server.members.lose_lane(lane))
        device.release()
        lost.result(60)
        for future in futures:
            np.testing.assert_array_equal(future.result(60), ROW * 3)
        assert server.lanes["all"] is not lane


def test_closing_ends_requests_whose_lane_nobody_builds_any_more():
    engine = serve(affine_job("a"))
    server = engine._server
    server.members.rebuild = lambda lane: None
    server.command(lambda: server.members.lose_lane(server.lanes["all"])).result(60)
    future = engine.submit("a", ROW)
    engine.close()
    assert isinstance(future.exception(0), stfuse.ClosedError)
