"""What an engine promises about speed, measured: rate, latency, walls, newcomers.

Each function returns plain numbers, and the ratio that a goal is about as ``ratio``.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import math
import statistics
import time
from collections import deque
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

import jax
import numpy as np

import stfuse
from examples import load
from examples.fleet import Fleet
from examples.load import (
    no_collections,
    percentiles,
    replay,
    replay_all,
    saturate,
    summarize,
)
from examples.streams import in_turn, make_stream

OWN_SHARE = 0.5  # of its share of the capacity that a well-behaved tenant uses
ABUSE = 10.0  # shares that an abusive one asks for
HIGH_LOAD = 0.7  # of the capacity
WINDOW_STEPS = 4  # full steps' requests that a closed loop keeps outstanding
MIN_DURING_S = 0.5  # a join may be over before a percentile means anything
BARE_ROUNDS = 5
KEEP_EVERY = 17  # answers that are compared; odd, so that no tenant is left out
MOST_PER_S = 200_000  # requests that a closed loop may get through


@dataclasses.dataclass(frozen=True, slots=True)
class Options:
    """How long and how to measure.

    Attributes:
        seconds: of each load, warm-up included.
        warm_s: seconds of it that are not counted.
        seed: of all streams.
        report: called with each run, to check its answers.
    """

    seconds: float
    warm_s: float
    seed: int
    report: Callable[[load.Run], None]


def window(fleet: Fleet, max_batch_size: int) -> int:
    """Return the requests outstanding that keep every slot of two steps filled."""
    of_steps = len(fleet.jobs) * max(1, max_batch_size // fleet.rows)
    return max(WINDOW_STEPS * of_steps, load.WINDOW)


def capacity(
    engine: stfuse.Engine,
    fleet: Fleet,
    shares: np.ndarray,
    outstanding: int,
    options: Options,
) -> tuple[load.Run, str]:
    """Serve as fast as possible; return the run, and the bucket of most steps.

    Equal tenants are asked in turn, so that each has as much waiting.
    """
    most, num_inputs = int(MOST_PER_S * options.seconds), len(fleet.targets[0].inputs)
    if np.allclose(shares, shares[0]):
        stream = in_turn(most, len(shares), num_inputs)
    else:
        stream = make_stream(1.0, most, shares, num_inputs, options.seed)
    before = engine.stats()
    run = saturate(
        engine,
        fleet.targets,
        stream,
        options.seconds,
        outstanding,
        keep_every=KEEP_EVERY,
    )
    after = engine.stats()
    options.report(run)

    steps = num_steps(before, after)
    return run, max(steps, key=lambda bucket: steps[bucket])


def num_steps(before: stfuse.Snapshot, after: stfuse.Snapshot) -> dict[str, int]:
    """Return how many steps there were of each bucket between two snapshots."""
    old = {bucket: each.steps for bucket, each in before.buckets.items()}
    found = {b: each.steps - old.get(b, 0) for b, each in after.buckets.items()}
    return {bucket: steps for bucket, steps in found.items() if steps}


def tenants_per_step(before: stfuse.Snapshot, after: stfuse.Snapshot) -> float:
    """Return the mean number of tenants of the steps between two snapshots."""
    seen = [s.tenants_per_step * s.steps for s in (before, after)]
    return (seen[1] - seen[0]) / max(after.steps - before.steps, 1)


def host_us(before: stfuse.Snapshot, after: stfuse.Snapshot) -> dict[str, float]:
    """Return the host's mean microseconds of a step between two snapshots, by stage."""
    steps = max(after.steps - before.steps, 1)
    old, new = (dataclasses.asdict(each.host) for each in (before, after))
    return {
        name.removesuffix("_s"): 1e6
        * (new[name] * after.steps - old[name] * before.steps)
        / steps
        for name in new
    }


def slots_and_rows(bucket: str) -> tuple[int, int]:
    """Return the slots, over all species, and the rows of a bucket of a snapshot.

    Example:
        >>> slots_and_rows("all 16+8x4")
        (24, 4)
    """
    slots, rows = bucket.rsplit(" ", 1)[1].split("x")
    return sum(map(int, slots.split("+"))), int(rows)


def time_bare(run: Callable[[], Any], seconds: float) -> tuple[float, float]:
    """Return seconds per call with two in flight, and of a call that is waited for.

    Args:
        run: starts a step, and returns what has a ``block_until_ready``.
        seconds: to spend on each, over all rounds; the medians of the rounds count.
    """
    jax.block_until_ready(run())
    start_s = time.perf_counter()
    jax.block_until_ready(run())
    one_s = time.perf_counter() - start_s
    num_calls = max(3, int(seconds / BARE_ROUNDS / one_s))
    pipelined, alone = [], []
    for _ in range(BARE_ROUNDS):
        start_s = time.perf_counter()
        flying = deque([run()])
        for _ in range(num_calls - 1):
            flying.append(run())
            jax.block_until_ready(flying.popleft())
        jax.block_until_ready(flying.popleft())
        middle_s = time.perf_counter()
        for _ in range(num_calls):
            jax.block_until_ready(run())
        pipelined.append((middle_s - start_s) / num_calls)
        alone.append((time.perf_counter() - middle_s) / num_calls)
    return statistics.median(pipelined), statistics.median(alone)


def bare_step(fleet: Fleet, num_slots: int, rows: int, seconds: float) -> dict:
    """Time the compiled step alone: no engine, no staging, no requests.

    Its weights and inputs are on the device, and its outputs stay there.

    Args:
        fleet: whose first ``num_slots`` tenants are in it.
        num_slots: K; at most N are used.
        rows: of each slot.
        seconds: to spend.
    """
    some = fleet.first(min(num_slots, len(fleet.jobs)))
    fused = stfuse.fuse(some.jobs)
    bank = fused.pack()
    inputs = {
        name: jax.tree.map(lambda *xs: _rows(xs, rows), *own)
        for name, own in some.targets
    }
    stacked = jax.device_put(fused.stack(inputs))
    pipelined_s, latency_s = time_bare(lambda: fused.step(bank, stacked), seconds)
    return {
        "slots": len(some.jobs),
        "rows": rows,
        "step_s": pipelined_s,
        "latency_s": latency_s,
        "rows_per_s": len(some.jobs) * rows / pipelined_s,
    }


def _rows(requests: Sequence[np.ndarray], rows: int) -> np.ndarray:
    """Return some rows made of the rows of requests, as often as it takes."""
    there = np.concatenate(requests)
    return there[np.arange(rows) % len(there)]


def against_bare(
    engine: stfuse.Engine, fleet: Fleet, outstanding: int, options: Options
) -> dict[str, Any]:
    """Compare the engine with its own bare step: rows/s saturated, p99 at high load.

    Returns:
        ``ratio``: the engine's rows/s over the bare step's at the bucket that it used
        most; ``p99_steps``: p99 at `HIGH_LOAD` in bare step times, two in flight, and
        ``steps``: of each bucket there; ``host_us``: what a saturated step costs the
        host, by stage.
    """
    equal = np.ones(len(fleet.jobs))
    before = engine.stats()
    run, bucket = capacity(engine, fleet, equal, outstanding, options)
    after = engine.stats()
    bare = bare_step(fleet, *slots_and_rows(bucket), options.seconds / 2)
    rate = HIGH_LOAD * run.answered_per_s
    num_inputs = len(fleet.targets[0].inputs)
    stream = make_stream(rate, options.seconds, equal, num_inputs, options.seed)
    before_load = engine.stats()
    loaded = replay(engine, fleet.targets, stream, None, keep_every=KEEP_EVERY)
    steps = num_steps(before_load, engine.stats())
    options.report(loaded)
    found = summarize(loaded, None, options.warm_s, options.seconds)
    rows_per_s = run.answered_per_s * fleet.rows
    return {
        "bucket": bucket,
        "bare": bare,
        "engine_step_s": after.buckets[bucket].measured_s,
        "tenants_per_step": tenants_per_step(before, after),
        "host_us": host_us(before, after),
        "rows_per_s": rows_per_s,
        "ratio": rows_per_s / bare["rows_per_s"],
        "high_load": dataclasses.asdict(found),
        "steps": steps,
        "p99_steps": found.p99_ms / 1e3 / bare["step_s"],
        "p99_latencies": found.p99_ms / 1e3 / bare["latency_s"],
    }


def isolation(
    engine: stfuse.Engine,
    fleet: Fleet,
    rate: float,
    deadline_s: float | None,
    rounds: int,
    options: Options,
) -> dict[str, Any]:
    """Compare p99 of well-behaved tenants beside an abusive one and a peaceful one.

    A share is the capacity over N. All use `OWN_SHARE` of theirs; when abusive, the
    first tenant asks for `ABUSE` shares, from a thread of its own. Both cases take
    turns; in all rounds the others send the very same requests.

    Args:
        engine: has the fleet's jobs, all of one weight.
        fleet: the first tenant of it is the one.
        rate: the capacity, requests/s.
        deadline_s: of all requests, or None.
        rounds: how often each case has its turn.
        options: how to measure.

    Returns:
        ``ratio``: p99 of the others, all rounds together, abusive over peaceful.
    """
    num, num_inputs = len(fleet.jobs), len(fleet.targets[0].inputs)
    share, seconds, seed = rate / num, options.seconds, options.seed
    one = (np.arange(num) == 0).astype(float)
    others_rate = OWN_SHARE * share * (num - 1)
    others = make_stream(others_rate, seconds, 1 - one, num_inputs, seed)
    found: dict[str, Any] = {"share_per_s": share, "deadline_s": deadline_s}
    latencies_s: dict[str, list[np.ndarray]] = {"peaceful": [], "abusive": []}
    for _ in range(rounds):
        for case, shares in (("peaceful", OWN_SHARE), ("abusive", ABUSE)):
            own = make_stream(shares * share, seconds, one, num_inputs, seed + 1)
            runs = replay_all(
                engine, fleet.targets, (others, own), deadline_s, KEEP_EVERY
            )
            record = {}
            for name, run in zip(("others", "first"), runs, strict=True):
                options.report(run)
                summary = summarize(run, deadline_s, options.warm_s, seconds)
                record[name] = dataclasses.asdict(summary)
            counted = runs[0].is_answered & (others.due_s >= options.warm_s)
            latencies_s[case].append(runs[0].latency_s[counted])
            found.setdefault(case, []).append(record)
    p99 = {
        case: percentiles(np.concatenate(each), (99.0,))[0]
        for case, each in latencies_s.items()
    }
    return found | {
        "peaceful_p99_ms": 1e3 * p99["peaceful"],
        "abusive_p99_ms": 1e3 * p99["abusive"],
        "ratio": p99["abusive"] / p99["peaceful"],
    }


def joining(
    engine: stfuse.Engine,
    fleet: Fleet,
    job: stfuse.Job,
    rate: float,
    after_s: float,
    options: Options,
    times: int = 1,
) -> dict[str, Any]:
    """Compare p99 of tenants while another one is added with their p99 before.

    Args:
        engine: has the fleet's jobs and not ``job``.
        fleet: who sends.
        job: who is added after ``options.seconds``, from another thread.
        rate: requests/s of all that send.
        after_s: how long they send from then on, seconds.
        options: how to measure.
        times: how often it is added, each time for ``after_s``, and removed once a
            third of that is over and it was ready.

    Returns:
        ``ratio``: p99 of what was due between an addition and the moment at which
        ``job`` was ready (at least `MIN_DURING_S`), over p99 before: of all that time,
        or of as long before each of several; ``ready_s``: how long it took, the
        longest; None if it took longer than there was time; ``first_s``: the same of
        the first answer to ``job``, which is asked at once.
    """
    num_inputs = len(fleet.targets[0].inputs)
    seconds, end_s = options.seconds, options.seconds + times * after_s
    equal = np.ones(len(fleet.jobs))
    stream = make_stream(rate, end_s, equal, num_inputs, options.seed)
    added_s: list[float] = []
    ready_s, first_s = [math.inf] * times, [math.inf] * times

    def note(into: list[float], i: int, future: Future[Any]) -> None:
        if not future.cancelled() and future.exception() is None:
            into[i] = time.perf_counter()

    def add() -> None:
        start_s = time.perf_counter()
        for i in range(times):
            due_s = start_s + seconds + i * after_s
            time.sleep(max(due_s - time.perf_counter(), 0.0))
            added_s.append(time.perf_counter())
            ready = engine.add(job)
            ready.add_done_callback(functools.partial(note, ready_s, i))
            first = engine.submit(job.name, fleet.targets[0].inputs[0])
            first.add_done_callback(functools.partial(note, first_s, i))
            if i < times - 1:
                time.sleep(after_s / 3)
                with contextlib.suppress(TimeoutError):
                    ready.result(after_s / 3)
                engine.remove(job.name)

    with no_collections(), ThreadPoolExecutor(1) as pool:
        adding = pool.submit(add)
        run = replay(engine, fleet.targets, stream, None, keep_every=KEEP_EVERY)
        adding.result()
    options.report(run)
    marks = np.array([added_s, ready_s]).T - run.start_s
    waited_s = float(np.max(np.array(first_s) - added_s))
    found = joined(run, marks, options.warm_s, end_s)
    return found | {"first_s": waited_s if math.isfinite(waited_s) else None}


def joined(
    run: load.Run, marks: np.ndarray, warm_s: float, end_s: float
) -> dict[str, Any]:
    """Return what `joining` does, of a run.

    Args:
        run: of those that were there.
        marks: when each time the newcomer was added and was ready, from the start of
            the stream [times, 2].
        warm_s: what is not counted.
        end_s: of the stream.
    """
    added_s, due_s = marks[:, 0], run.stream.due_s
    until_s = np.clip(marks[:, 1], added_s + MIN_DURING_S, end_s)
    since_s = added_s - MIN_DURING_S if len(marks) > 1 else np.array([warm_s])

    def between(from_s: np.ndarray, to_s: np.ndarray) -> load.Summary:
        pairs = zip(from_s, to_s, strict=True)
        windows = [(due_s >= a) & (due_s < b) for a, b in pairs]
        return summarize(run, None, warm_s, end_s, np.any(windows, axis=0))

    before, during = between(since_s, added_s), between(added_s, until_s)
    took_s = float(np.max(marks[:, 1] - marks[:, 0]))
    return {
        "ready_s": took_s if np.all(marks[:, 1] <= end_s) else None,
        "during_s": float(np.sum(until_s - marks[:, 0])),
        "times": len(marks),
        "before": dataclasses.asdict(before),
        "during": dataclasses.asdict(during),
        "ratio": during.p99_ms / before.p99_ms,
    }
