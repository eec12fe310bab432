"""The scheduler as a state machine: any events in any order, on a clock that jumps.

The reference knows who asked for what, who is served by which lane, and nothing else.
"""

import math

import hypothesis
import pytest
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    invariant,
    precondition,
    rule,
    run_state_machine_as_test,
)

from stfuse._admission import Bounds
from stfuse._errors import ClosedError, DeadlineError, QueueFullError
from stfuse._scheduler import Scheduler
from stfuse._types import (
    Bucket,
    Cancel,
    Drain,
    Install,
    Join,
    Leave,
    Policy,
    Ready,
    Submit,
)

TENANTS = {"a": 1, "b": 1, "c": 1, "d": 2, "e": 2}  # of how many lengths
SHARED = ("all", "some#1")
MOST_ROWS = 4
names = st.sampled_from(sorted(TENANTS))
requests = st.tuples(
    names,
    st.integers(1, MOST_ROWS),
    st.sampled_from([None, None, -0.01, 0.002, 0.05, 1.0]),  # until its deadline
    st.integers(0, 1),  # its length
    st.integers(1, 60),  # its bytes
)
species = {1: st.sampled_from([(0,), (1,)]), 2: st.sampled_from([(0, 1), (1, 0)])}
BOUNDS = Bounds(4, max_queue_rows=9, max_total_rows=24, max_total_bytes=200)
SLOWEST_S = 0.02  # of any step, as predicted


class SchedulerMachine(RuleBasedStateMachine):
    @initialize(
        policy=st.sampled_from(Policy),
        delay_s=st.sampled_from([0.0, 0.0, 0.05]),
        is_strict=st.booleans(),
    )
    def start(self, policy, delay_s, is_strict):
        self.policy, self.now_s, self.next = policy, 0.0, 0
        self.scheduler = Scheduler(
            policy,
            max_batch_size=MOST_ROWS,
            max_queue_delay_s=delay_s,
            bounds=BOUNDS,
            strict_shares=is_strict,
        )
        self.delay_s = delay_s
        self.waiting = {}  # request: (tenant, rows, deadline, length, bytes)
        self.tenants, self.leaving = set(), set()
        self.lanes = {}  # name: (capacities, species by tenant, ready buckets)
        for name in "abe":
            self.join(name, 1.0)
        self.install_all(keeps_ready=False)

    def of(self, tenant):
        return [r for r, (whose, *_) in self.waiting.items() if whose == tenant]

    def lane_of(self, tenant):
        for name, (_, members, _) in self.lanes.items():
            if tenant in members:
                return name
        return None

    @rule(name=names, weight=st.sampled_from([0.5, 1.0, 3.0]))
    def join(self, name, weight):
        if name not in self.tenants:
            self.tenants.add(name)
            self.scheduler.handle(Join(name, weight))

    @rule(name=names, is_sure=st.integers(0, 3))
    def leave(self, name, is_sure):
        if is_sure < 3:
            return
        self.scheduler.handle(Leave(name))
        if name in self.tenants:
            self.leaving.add(name)
            self.forget_those_that_left()

    def forget_those_that_left(self):
        """A tenant that leaves is gone once nothing of it waits."""
        for name in [name for name in self.leaving if not self.of(name)]:
            self.leaving.remove(name)
            self.tenants.remove(name)
            for _, members, _ in self.lanes.values():
                members.pop(name, None)

    @rule(data=st.data(), keeps_ready=st.booleans())
    def install(self, data, keeps_ready):
        """A lane is built, regrouped or lost; whom it leaves out has none."""
        if self.policy is not Policy.SPACE_TIME:
            return self.install_all(keeps_ready)
        name = data.draw(st.sampled_from(SHARED))
        who = data.draw(st.lists(names, unique=True, max_size=5))
        members = {n: data.draw(species[TENANTS[n]]) for n in who if n in self.tenants}
        return self.put(name, (4, 2), members, keeps_ready)

    def install_all(self, keeps_ready):
        if self.policy is Policy.SPACE_TIME:
            members = {n: (0, 1)[: TENANTS[n]] for n in self.tenants}
            self.put("some#1", (4, 2), {}, False)
            self.put("all", (4, 2), members, keeps_ready)
        else:
            for name in self.tenants:
                num = TENANTS[name]
                self.put(name, (1,) * num, {name: (*range(num),)}, keeps_ready)
        for lane in list(self.lanes):
            self.make_ready(lane, 0.001)

    def put(self, name, capacities, members, keeps_ready):
        old = self.lanes.pop(name, None)
        self.scheduler.handle(Install(name, capacities, dict(members), keeps_ready))
        for _, others, _ in self.lanes.values():
            for member in members:
                others.pop(member, None)
        if members:
            ready = old[2] if old and keeps_ready else set()
            self.lanes[name] = (capacities, dict(members), ready)

    @precondition(lambda self: self.lanes)
    @rule(data=st.data(), step_s=st.floats(0.0001, SLOWEST_S / 4))
    def become_ready(self, data, step_s):
        lane = data.draw(st.sampled_from(sorted(self.lanes)))
        self.make_ready(lane, step_s, data.draw(st.sampled_from([1, MOST_ROWS])))

    def make_ready(self, lane, step_s, *rows):
        slots = [(1, 0), (0, 1), (2, 2), (4, 2)]
        if lane not in SHARED:
            slots = [(1,)] if TENANTS[lane] == 1 else slots[:2]
        shapes = [(k, False) for k in slots] + [((4, 2), True)] * (lane in SHARED)
        rows = rows or (1, MOST_ROWS)
        for bucket in [Bucket(k, b, is_open) for k, is_open in shapes for b in rows]:
            self.lanes[lane][2].add(bucket)
            took_s = step_s * (1 + sum(bucket.slots) * bucket.rows / 8)
            self.scheduler.handle(Ready(lane, bucket, took_s))

    @rule(drawn=st.lists(requests, min_size=1, max_size=8))
    def submit(self, drawn):
        for each in drawn:
            self.submit_one(*each)

    def submit_one(self, name, rows, patience_s, length, num_bytes):
        length = min(length, TENANTS[name] - 1)
        until_s = None if patience_s is None else self.now_s + patience_s
        self.next += 1
        event = Submit(self.next, name, rows, self.now_s, until_s, length, num_bytes)
        try:
            self.scheduler.handle(event)
        except ClosedError:
            assert name not in self.tenants or name in self.leaving
        except QueueFullError:
            assert not self.has_room(name, rows, num_bytes)
        except DeadlineError:  # it has passed, or what runs already takes longer
            assert until_s is not None
        else:
            assert name in self.tenants and name not in self.leaving
            assert self.has_room(name, rows, num_bytes)
            assert until_s is None or until_s > self.now_s
            self.waiting[self.next] = (name, rows, until_s, length, num_bytes)

    def has_room(self, name, rows, num_bytes):
        own = [self.waiting[r] for r in self.of(name)]
        return (
            len(own) < BOUNDS.max_queue_size
            and sum(n for _, n, *_ in own) + rows <= BOUNDS.max_queue_rows
            and sum(n for _, n, *_ in self.waiting.values()) + rows
            <= BOUNDS.max_total_rows
            and sum(n for *_, n in self.waiting.values()) + num_bytes
            <= BOUNDS.max_total_bytes
        )

    @rule(data=st.data())
    def cancel(self, data):
        """One that waits, or one that does not any more."""
        known = st.sampled_from(sorted(self.waiting) or [0])
        request = data.draw(known | st.integers(0, self.next))
        self.scheduler.handle(Cancel(request))
        self.waiting.pop(request, None)
        self.forget_those_that_left()

    @rule(by_s=st.floats(0.0, 0.5) | st.sampled_from([-1e6, -1.0, 1e6]))
    def pass_time(self, by_s):
        self.now_s += by_s

    @rule()
    def drain(self):
        self.scheduler.handle(Drain())
        self.delay_s = 0.0

    @rule()
    def decide(self):
        decision = self.scheduler.decide(self.now_s)
        for request in decision.expired:
            deadline_s = self.waiting.pop(request)[2]
            # Two steps may be in flight, and its own would come after them.
            assert deadline_s is not None and deadline_s <= self.now_s + 3 * SLOWEST_S
        if decision.batch is not None:
            self.check(decision.batch)
        elif decision.wait_until_s is None or decision.wait_until_s <= self.now_s:
            assert not self.can_start(), "work waits, a bucket is ready, nothing starts"
        else:
            assert self.delay_s or not self.can_start()
        self.forget_those_that_left()

    def can_start(self):
        """Return whether some tenant's first request fits a bucket that is ready."""
        firsts = {}
        for request in sorted(
            self.waiting, key=lambda r: (self.waiting[r][2] or math.inf, r)
        ):
            firsts.setdefault(self.waiting[request][0], self.waiting[request])
        for name, (_, rows, _, length, _) in firsts.items():
            _, members, ready = self.lanes.get(self.lane_of(name), (0, {}, ()))
            if name in members:
                s = members[name][length]
                if any(bucket.slots[s] and bucket.rows >= rows for bucket in ready):
                    return True
        return False

    def check(self, batch):
        capacities, members, ready = self.lanes[batch.lane]
        assert batch.bucket in ready and batch.chunks
        found = []
        for chunk in batch.chunks:
            of = [self.waiting.pop(request) for request in chunk.requests]
            assert {tenant for tenant, *_ in of} == {chunk.tenant}
            assert {length for *_, length, _ in of} == {chunk.length}
            assert members[chunk.tenant][chunk.length] == chunk.species
            assert sum(rows for _, rows, *_ in of) == chunk.rows
            assert chunk.rows <= batch.bucket.rows
            for _, _, deadline_s, *_ in of:
                assert deadline_s is None or deadline_s > self.now_s
            found.append((chunk.species, chunk.tenant))
        for s, slots in enumerate(batch.bucket.slots):
            own = [tenant for species, tenant in found if species == s]
            assert len(own) <= slots
            # Where every slot runs, and is not open, each tenant is in its own.
            if slots == capacities[s] and not batch.bucket.is_open:
                assert len(own) == len(set(own))
        if self.policy is not Policy.SPACE_TIME:
            assert len({tenant for _, tenant in found}) == 1

    @invariant()
    def it_holds_exactly_what_waits(self):
        queued = {r for name in TENANTS for r in self.scheduler.queued(name)}
        assert queued == set(self.waiting)
        assert self.scheduler.num_queued == len(self.waiting)
        assert self.scheduler.queued_rows == sum(
            n for _, n, *_ in self.waiting.values()
        )
        assert self.scheduler.queued_bytes == sum(n for *_, n in self.waiting.values())

    def teardown(self):
        """Whatever happened: given lanes, all that was taken is served, or expires."""
        if not hasattr(self, "scheduler"):
            return
        self.drain()
        self.install_all(keeps_ready=True)
        for _ in range(len(self.waiting)):
            self.decide()
            self.it_holds_exactly_what_waits()
        assert not self.waiting


@pytest.mark.timeout(7200)  # 2,000 examples, if so many are asked for
def test_the_scheduler_keeps_its_word_in_any_order_of_events(seed, machine_settings):
    run_state_machine_as_test(
        hypothesis.seed(seed)(SchedulerMachine), settings=machine_settings
    )
