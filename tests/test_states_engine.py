"""The engine as a state machine: whatever is done to it, in whatever order.

The reference is a table of weights by tenant and generation. Each generation's weights
occur once, so that an answer says whose it is and of which generation.
"""

import dataclasses
import itertools
import threading
from concurrent.futures import Future
from typing import Any

import hypothesis
import jax
import numpy as np
import pytest
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    precondition,
    rule,
    run_state_machine_as_test,
)

import stfuse
from stfuse.testing import FakeDevice, ManualClock, affine_job
from tests.serving import POLICIES, assert_idle, wait_for

NAMES = ("a", "b", "c", "d")
BAD = -666.0
names = st.sampled_from(NAMES)
fresh_widths = itertools.count(4)
requests = st.tuples(
    names,
    st.lists(st.integers(1, 9), min_size=1, max_size=2),  # a value per row
    st.sampled_from([None, None, 10.0, 5000.0]),  # its deadline
    st.integers(0, 15).map(lambda n: n == 1),  # whether it breaks its step
)


@dataclasses.dataclass(eq=False)
class Asked:
    """A request that was taken, and which outcomes it may have."""

    x: Any
    first: int
    future: Future
    deadline_s: float | None
    latest_s: float
    is_bad: bool
    may_be_lost: bool


@dataclasses.dataclass(eq=False)
class Life:
    """A tenant from its addition to its removal."""

    ready: Future
    scales: list
    asked: list = dataclasses.field(default_factory=list)
    num_bad: int = 0
    may_be_refused: bool = False


def params(scale):
    return affine_job("x", scale=scale, shift=1000 * scale).params


class EngineMachine(RuleBasedStateMachine):
    @initialize(policy=st.sampled_from(POLICIES), drain=st.booleans())
    def start(self, policy, drain):
        self.num_threads = threading.active_count()
        self.clock, self.device = ManualClock(1e6), FakeDevice()
        self.device.name = "fake:states"  # all examples share what is compiled
        self.engine = stfuse.Engine(
            policy=policy,
            max_batch_size=2,
            max_slots=4,
            max_queue_size=6,
            device=self.device,
            clock=self.clock,
        )
        self.device.launch_error = self.breaks
        self.scales = map(float, itertools.count(1))
        self.lives, self.past = {}, []
        self.is_held = self.is_lost = self.may_refuse = self.is_closed = False
        self.is_drained, self.num_doomed, self.jumped_s = drain, 0, 0.0
        self.has_new = False  # since all were ready
        for name in NAMES[:2]:
            self.add(name)

    def breaks(self, inputs):
        if self.is_lost:
            return RuntimeError("device lost")
        is_bad = any((x == BAD).any() for x in jax.tree.leaves(inputs))
        return ValueError("boom") if is_bad else None

    def is_open(self):
        return not self.is_closed

    def is_free(self):
        """Whether calls that wait for the device may be made."""
        return not self.is_held and not self.is_closed

    @precondition(lambda self: not (self.is_held and self.is_lost))
    @rule(name=names)
    def add(self, name):
        scale = next(self.scales)
        job = affine_job(name, scale=scale, shift=1000 * scale)
        if name in self.lives:
            with pytest.raises(stfuse.JobError, match="here already"):
                self.engine.add(job)
            return
        self.lives[name] = Life(self.engine.add(job), [scale])
        self.has_new = True
        if self.is_lost:
            self.lives[name].may_be_refused = True
            self.settle_additions()

    @precondition(lambda self: not (self.is_held and self.is_lost))
    @rule()
    def add_who_is_missing(self):
        """They may share a small lane first, and leave it together."""
        for name in NAMES:
            if name not in self.lives:
                self.add(name)

    @precondition(
        lambda self: self.is_free() and not self.is_lost and self.num_doomed < 1
    )
    @rule()
    def add_what_does_not_compile(self):
        self.settle_additions()
        self.num_doomed += 1
        self.device.compile_error = MemoryError("too big")
        ready = self.engine.add(affine_job("doomed", width=next(fresh_widths)))
        error = ready.exception(60)
        assert isinstance(error, stfuse.DeviceError) and "too big" in str(error)
        self.device.compile_error = None
        wait_for(lambda: "doomed" not in self.engine.stats().tenants)

    def settle_additions(self):
        """Wait until every job is ready or refused; forget the latter."""
        for name, life in list(self.lives.items()):
            error = life.ready.exception(60)
            if error is not None:
                assert life.may_be_refused and isinstance(error, stfuse.DeviceError)
                wait_for(lambda n=name: n not in self.engine.stats().tenants)
                self.past.append(self.lives.pop(name))
        self.has_new = False

    @precondition(is_free)
    @rule(name=names)
    def remove(self, name):
        if name not in self.lives:
            self.assert_unknown(stfuse.JobError, lambda: self.engine.remove(name))
            return
        life = self.lives[name]
        if life.may_be_refused:
            self.settle_additions()
            if name not in self.lives:
                return
        self.engine.remove(name)
        assert all(asked.future.done() for asked in life.asked)
        self.past.append(self.lives.pop(name))
        self.assert_unknown(stfuse.RequestError, lambda: self.engine.submit(name, 1))

    def assert_unknown(self, kind, call):
        with pytest.raises(kind, match="the engine has"):
            call()

    @precondition(is_free)
    @rule(name=names)
    def swap(self, name):
        scale = next(self.scales)
        if name not in self.lives:
            self.assert_unknown(
                stfuse.JobError, lambda: self.engine.swap(name, params(scale))
            )
            return
        life = self.lives[name]
        life.scales.append(scale)  # it may be seen from now on,
        self.engine.swap(name, params(scale))  # and must be from here on
        life.num_bad = 0

    @precondition(is_open)
    @rule(drawn=st.lists(requests, min_size=4, max_size=12))
    def submit(self, drawn):
        for each in drawn:
            self.submit_one(*each)

    @precondition(is_open)
    @rule(drawn=requests)
    def submit_and_swap(self, drawn):
        """Have a swap race with what was just submitted."""
        self.submit_one(*drawn)
        if self.is_free():
            self.swap(drawn[0])

    def submit_one(self, name, rows, deadline_s, is_bad):
        x = np.repeat(np.array(rows, np.float32)[:, None], 3, 1)
        if is_bad:
            x[-1, 1] = BAD
        life = self.lives.get(name)
        if life is None:
            self.assert_unknown(
                stfuse.RequestError, lambda: self.engine.submit(name, x)
            )
            return
        first = len(life.scales) - 1
        num_open = sum(not asked.future.done() for asked in life.asked)
        try:
            future = self.engine.submit(name, x, deadline_s=deadline_s)
        except stfuse.QueueFullError:
            assert num_open >= 6  # before; by now some may have been answered
            return
        except stfuse.DeadlineError:
            assert deadline_s is not None  # what runs already takes longer
            return
        except stfuse.DeviceError:
            assert self.may_refuse or life.num_bad >= 3
            return
        except (stfuse.ClosedError, stfuse.RequestError):
            assert life.may_be_refused  # it is on its way out
            return
        life.num_bad += is_bad
        until_s = None if deadline_s is None else self.clock() + deadline_s
        life.asked.append(
            Asked(x, first, future, until_s, self.clock(), is_bad, self.may_refuse)
        )

    @precondition(is_open)
    @rule(picked=st.lists(st.integers(0, 99), min_size=1, max_size=5))
    def cancel(self, picked):
        asked = [a for life in self.lives.values() for a in life.asked]
        for i in picked[: len(asked)]:
            asked[-1 - i % len(asked)].future.cancel()

    @rule(by_s=st.sampled_from([0.2, 60.0, 3600.0, -0.2, -3600.0]))
    def jump(self, by_s):
        now_s = self.clock() + by_s
        self.jumped_s += max(by_s, 0.0)
        for asked in self.all_asked():
            asked.latest_s = max(asked.latest_s, now_s)
        self.clock.advance(by_s)

    @precondition(is_free)
    @rule()
    def hold(self):
        self.settle_additions()
        self.device.hold()
        self.is_held = True

    @precondition(lambda self: self.is_held)
    @rule()
    def release(self):
        self.device.release()
        self.is_held = False
        self.settle_additions()

    @precondition(lambda self: self.is_open() and not self.is_lost)
    @rule(how=st.sampled_from(["launch", "read"]))
    def lose(self, how):
        if not self.is_held:
            self.settle_additions()
        elif self.has_new:  # whether it is ready already depends on the moment
            return
        for life in self.lives.values():
            for asked in life.asked:
                asked.may_be_lost = asked.may_be_lost or not asked.future.done()
        self.is_lost = self.may_refuse = True
        if how == "read":
            self.device.read_error = RuntimeError("device lost")

    @precondition(lambda self: self.is_open() and self.is_lost)
    @rule()
    def mend(self):
        self.is_lost, self.device.read_error = False, None
        if not self.is_held:
            self.settle_additions()
            assert self.engine.health(timeout_s=60).is_healthy
            self.may_refuse = False

    @precondition(lambda self: self.is_free() and not self.is_lost)
    @rule()
    def see(self):
        """Wait for all there is, and check it."""
        self.settle_additions()
        assert self.engine.health(timeout_s=60).is_healthy
        self.may_refuse = False
        self.check_all(())
        assert_idle(self.engine)
        tenants = self.engine.stats().tenants
        assert set(tenants) == set(self.lives)
        for name, life in self.lives.items():
            t = tenants[name]
            assert t.generation == len(life.scales) - 1
            ended = t.served + t.expired + t.failed + t.cancelled
            assert ended == len(life.asked)

    def close(self):
        closer = threading.Thread(target=self.engine.close, args=(self.is_drained,))
        closer.start()
        wait_for(lambda: self.engine._server.is_closed)
        self.device.release()
        closer.join(60)
        assert not closer.is_alive()
        self.is_held, self.is_closed = False, True
        self.engine.close()

    def all_asked(self):
        lives = [*self.lives.values(), *self.past]
        return [asked for life in lives for asked in life.asked]

    def check_all(self, also):
        for life in [*self.lives.values(), *self.past]:
            for asked in life.asked:
                self.check(life, asked, also)

    def check(self, life, asked, also):
        """Check one outcome: an answer of one generation that was current, or why not.

        Args:
            life: whose it is.
            asked: the request.
            also: errors that are fine just now.
        """
        wait_for(asked.future.done)
        if asked.future.cancelled():
            return
        error = asked.future.exception()
        if error is None:
            assert not asked.is_bad
            scales = np.array(life.scales[asked.first :])[:, None, None]
            may_be = scales * asked.x + 1000 * scales
            found = asked.future.result()
            assert any(np.array_equal(found, each) for each in may_be)
        elif isinstance(error, stfuse.DeadlineError):
            assert asked.deadline_s is not None
            # A step that ran while the clock jumped is measured to take so long.
            assert asked.latest_s + self.jumped_s >= asked.deadline_s
        elif isinstance(error, stfuse.DeviceError):
            is_told = "boom" in str(error) and (asked.is_bad or life.num_bad >= 3)
            assert is_told or asked.may_be_lost or life.may_be_refused, error
        else:
            assert isinstance(error, also) or life.may_be_refused, error

    def teardown(self):
        if not hasattr(self, "engine"):
            return
        self.close()  # with all there is queued, held, or lost
        self.check_all(() if self.is_drained else stfuse.ClosedError)
        assert_idle(self.engine)
        for life in [*self.lives.values(), *self.past]:
            assert life.ready.done()
        with pytest.raises(stfuse.ClosedError):
            self.engine.add(affine_job("e"))
        for name in self.lives:  # some may have been refused meanwhile
            with pytest.raises((stfuse.ClosedError, stfuse.RequestError)):
                self.engine.submit(name, np.ones((1, 3), np.float32))
        assert threading.active_count() == self.num_threads


@pytest.mark.timeout(7200)  # 2,000 examples, if so many are asked for
def test_the_engine_keeps_its_word_in_any_order_of_events(seed, machine_settings):
    run_state_machine_as_test(
        hypothesis.seed(seed)(EngineMachine), settings=machine_settings
    )
