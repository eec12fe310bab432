"""Tenants beside each other: what the paper claims of predictability, measured.

Equal tenants send at random times, each way at the same shares of its own capacity and
all at one common rate. Latency counts from when a request was due.

    spread        the slowest tenant's median over the fastest's
    tail          p99 over p50, all tenants together
    interference  p99 of the others beside a tenant that asks for ten shares, over their
                  p99 beside a peaceful one
    over alone    a tenant's p99 beside the others over its p99 alone
    straggler     p99 of the others with a slow job in their steps, and in its own lane;
                  it runs a larger model several times for each answer

Ways: time and space are a process per tenant; in turn and space-time are an engine of
one process with policy ``"time"`` and ``"space-time"``; exclusive is one tenant alone,
its requests in batches. In all of them a client that asks for more than others has
`IN_FLIGHT` requests outstanding at most, and what else is due waits in the client.
"""

import contextlib
import functools
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, Protocol

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

import stfuse
from examples import fleet as fleets
from examples import goals, load, paper, streams
from examples.fleet import Fleet
from examples.paper import Part
from examples.paper_models import dtype_here, known

WAYS = ("time", "space", "in turn", "space-time")
ENGINES: dict[str, dict[str, Any]] = {  # slots of one row: few steps to compile
    "in turn": {"policy": "time"},
    "space-time": {"max_queue_delay_s": 2e-3},  # full steps cost the host less
    "exclusive": {"policy": "exclusive", "max_batch_size": 8},
}
LOADS = (0.5, 0.7, 0.9)
# Times as long as capacity; else 2. Medians differ by chance: 16 tenants' by 2% here.
LONG = {"load 0.7": 12}
ROUNDS = 3  # of the abuse; 1 if small
IN_FLIGHT = 4  # of a process, and of a client that is abusive
STRAGGLER_SHARE = 0.2  # of a tenant's rate
SLOWED = {False: 8, True: 64}  # times that it runs its model; small ones are quick


class Way(Protocol):
    """Something that serves N tenants."""

    def capacity(self, seconds: float) -> dict[str, Any]:
        """Return requests/s as fast as possible, and the fastest over the slowest."""

    def send(
        self, rates: np.ndarray, seconds: float, seed: int, *, is_apart: bool = False
    ) -> list[np.ndarray]:
        """Send at some rates [N]; return each tenant's latencies, warm-up left out.

        Args:
            rates: requests per second of each tenant.
            seconds: for how long.
            seed: of the times.
            is_apart: whether the first tenant's client is on its own, as the abusive
                one must be; in a process per tenant each is.
        """


class InEngine:
    """An engine of this process."""

    def __init__(self, engine: stfuse.Engine, fleet: Fleet) -> None:
        """Take an engine that is ready."""
        self._engine, self._fleet = engine, fleet

    def capacity(self, seconds: float) -> dict[str, Any]:
        """Ask every tenant in turn; tell what a step costs the host too."""
        num = len(self._fleet.jobs)
        most = int(goals.MOST_PER_S * seconds)
        asked = streams.in_turn(most, num, len(self._fleet.targets[0].inputs))
        before = self._engine.stats()
        targets, every = self._fleet.targets, goals.KEEP_EVERY
        run = load.saturate(self._engine, targets, asked, seconds, keep_every=every)
        self._check(run)
        served = np.bincount(run.stream.tenants[run.is_answered], minlength=num)
        after = self._engine.stats()
        return {
            "per_s": run.answered_per_s,
            "fastest_over_slowest": float(served.max() / max(served.min(), 1)),
            "tenants_per_step": goals.tenants_per_step(before, after),
            "host_us": goals.host_us(before, after),
        }

    def send(
        self, rates: np.ndarray, seconds: float, seed: int, *, is_apart: bool = False
    ) -> list[np.ndarray]:
        """Send from one thread, the first tenant's from another if it is `is_apart`.

        A thread of its own makes a tenant's requests a little later than others', so
        equal tenants share one.
        """
        num_inputs = len(self._fleet.targets[0].inputs)
        is_first = np.arange(len(rates)) == 0
        parts = [(rates * ~is_first, None), (rates * is_first, IN_FLIGHT)]
        if not is_apart:
            parts = [(rates, None)]
        own = [
            streams.make_stream(shares.sum(), seconds, shares, num_inputs, seed + i)
            for i, (shares, _) in enumerate(parts)
        ]
        runs = load.replay_all(
            self._engine,
            self._fleet.targets,
            own,
            None,
            goals.KEEP_EVERY,
            [in_flight for _, in_flight in parts],
        )
        found: list[list[np.ndarray]] = [[] for _ in rates]
        for run in runs:
            self._check(run)
            counted = run.is_answered & (run.stream.due_s >= seconds / 3)
            for i in np.unique(run.stream.tenants):
                which = counted & (run.stream.tenants == i)
                found[i].append(run.latency_s[which])
        return [np.concatenate([np.zeros(0), *each]) for each in found]

    def _check(self, run: load.Run) -> None:
        difference = self._fleet.check(run)
        if not difference <= 3e-2:
            raise SystemExit(f"an answer is not its model's own: {difference:.1e}")


class InPool:
    """A process per tenant."""

    def __init__(self, pool: paper.Pool, num: int) -> None:
        """Take processes that have their models."""
        self._pool, self._num = pool, num

    def capacity(self, seconds: float) -> dict[str, Any]:
        """Have each run as fast as it can."""
        tenants = paper.run(self._pool, self._num, seconds, IN_FLIGHT)
        served = [len(tenant["done_s"]) for tenant in tenants]
        spread = max(served) / max(min(served), 1)
        return {"per_s": paper.per_s(tenants, seconds), "fastest_over_slowest": spread}

    def send(
        self, rates: np.ndarray, seconds: float, seed: int, *, is_apart: bool = False
    ) -> list[np.ndarray]:
        """Have each send to itself."""
        tenants = paper.run(self._pool, rates, seconds, IN_FLIGHT, seed=seed)
        return [
            (tenant["done_s"] - tenant["due_s"])[tenant["due_s"] >= seconds / 3]
            for tenant in tenants
        ]


def quantiles_ms(latencies_s: Sequence[np.ndarray]) -> tuple[float, float]:
    """Return p50 and p99 of several tenants together, milliseconds."""
    p50, p99 = load.percentiles(np.concatenate(latencies_s), (50.0, 99.0))
    return 1e3 * float(p50), 1e3 * float(p99)


def loaded(way: Way, rate: float, num: int, seconds: float) -> dict[str, Any]:
    """Send Poisson traffic, the same rate for each tenant."""
    found = way.send(np.full(num, rate / num), seconds, 1)
    p50_ms, p99_ms = quantiles_ms(found)
    each = np.array([load.percentiles(own, (50.0, 99.0)) for own in found])
    slowest, fastest = np.nanmax(each, axis=0), np.nanmin(each, axis=0)
    return {
        "rate_per_s": rate,
        "p50_ms": p50_ms,
        "p99_ms": p99_ms,
        "tail": p99_ms / p50_ms,
        "spread": float(slowest[0] / fastest[0]),
        "spread_p99": float(slowest[1] / fastest[1]),
    }


def abused(
    way: Way, capacity: float, num: int, seconds: float, rounds: int = ROUNDS
) -> dict[str, Any]:
    """Compare the others beside an abusive tenant, a peaceful one, and one alone."""
    share = capacity / num
    own = goals.OWN_SHARE * share
    cases = {"peaceful": own, "abusive": goals.ABUSE * share}
    found: dict[str, list[np.ndarray]] = {name: [] for name in (*cases, "alone")}
    for seed in range(rounds):
        for name, first in cases.items():
            rates = np.full(num, own)
            rates[0] = first
            found[name] += way.send(rates, seconds, seed, is_apart=True)[1:]
        alone = np.zeros(num)
        alone[1] = own
        found["alone"].append(way.send(alone, seconds, seed)[1])
    p99 = {name: quantiles_ms(each)[1] for name, each in found.items()}
    return {f"{name}_p99_ms": value for name, value in p99.items()} | {
        "interference": p99["abusive"] / p99["peaceful"],
        "over_alone": p99["peaceful"] / p99["alone"],
        "above_alone_ms": p99["peaceful"] - p99["alone"],
    }


def straggler(
    part: Part, fleet: Fleet, slow: stfuse.Job, x: Any, capacity: float
) -> dict[str, Any]:
    """Serve beside a slow job; tell what the others saw with it and without it.

    The engine starts with all in one lane, judges the slow one by measured steps, and
    moves it to a lane of its own.
    """
    seconds = 20 * part.seconds if part.is_small else 70 * part.seconds
    num = len(fleet.jobs)
    lanes: list[tuple[float, str | None]] = []
    ended = threading.Event()
    options = {"max_slots": num + 1, "max_batch_size": 1}
    with fleets.serve([*fleet.jobs, slow], **options) as engine:
        rate = goals.OWN_SHARE * capacity
        own = streams.make_stream(
            rate, seconds, np.ones(num), len(fleet.targets[0].inputs), 0
        )

        def watch() -> None:
            while not ended.wait(0.02):
                lane = engine.stats().tenants[slow.name].lane
                lanes.append((time.perf_counter(), lane))

        def ask() -> None:
            while not ended.wait(num / rate / STRAGGLER_SHARE):
                with contextlib.suppress(stfuse.QueueFullError):
                    engine.submit(slow.name, x)

        threads = [threading.Thread(target=each) for each in (watch, ask)]
        for thread in threads:
            thread.start()
        try:
            run = load.replay(
                engine, fleet.targets, own, None, keep_every=goals.KEEP_EVERY
            )
        finally:
            ended.set()
            for thread in threads:
                thread.join()
        evictions = engine.stats().tenants[slow.name].evictions
    return by_lane(run, lanes) | {"evictions": evictions}


def slowed(job: stfuse.Job, times: int) -> stfuse.Job:
    """Return a job that computes its answer some times, one after the other."""

    def run(params: Any, x: Any) -> Any:
        def turn(_: Any, carry: Any) -> Any:
            x, _ = lax.optimization_barrier(carry)  # or it would be computed once
            return x, job.apply_fn(params, x)

        specs = jax.eval_shape(job.apply_fn, params, x)
        none = jax.tree.map(lambda spec: jnp.zeros(spec.shape, spec.dtype), specs)
        return lax.fori_loop(0, times, turn, (x, none))[1]

    return stfuse.Job(job.name, run, job.params, job.example)


def by_lane(run: load.Run, lanes: Sequence[tuple[float, str | None]]) -> dict[str, Any]:
    """Return p50 and p99 of a run while a job was in the lane of all, and was not."""
    times = np.array([at_s for at_s, _ in lanes]) - run.start_s
    together = np.array([lane == "all" for _, lane in lanes])
    at = np.clip(np.searchsorted(times, run.stream.due_s) - 1, 0, None)
    found: dict[str, Any] = {}
    for name, which in (("together", together[at]), ("apart", ~together[at])):
        own = run.latency_s[which & run.is_answered]
        if len(own):
            found[f"{name}_p50_ms"], found[f"{name}_p99_ms"] = quantiles_ms([own])
    return found


@contextlib.contextmanager
def serving(part: Part, way: str, fleet: Fleet, model: str) -> Iterator[Way | None]:
    """Yield what serves the tenants in some way; None if that cannot be had here."""
    num = len(fleet.jobs)
    if way in ENGINES:
        options = {"max_slots": num, "max_batch_size": 1, **ENGINES[way]}
        with fleets.serve(fleet.jobs, strict_shares=True, **options) as engine:
            yield InEngine(engine, fleet)
        return
    if part.processes < num:
        yield None
        return
    with paper.pool_of(way, num) as pool:
        if pool is not None:
            what = {"scale": part.scale, "dtype": dtype_here(), "repeat": 1}
            what["precision"] = "highest" if part.is_small else "default"
            paper.load(pool, [(model, i) for i in range(num)], what)
        yield None if pool is None else InPool(pool, num)


def common(part: Part, base: Mapping[str, Any]) -> float:
    """Return 70% of the smallest capacity known: a rate that every way can serve."""
    rows = [{**base, "way": way, "what": "capacity"} for way in WAYS]
    found = [part.records.get({**key, "scale": part.scale}) for key in rows]
    return 0.7 * min(values["per_s"] for values in found if values)


def measure_way(
    part: Part,
    way: str,
    base: Mapping[str, Any],
    fleet: Fleet,
    model: str,
    whats: Sequence[str],
) -> None:
    """Measure what is missing of one way.

    Args:
        part: where to keep it.
        way: one of `WAYS`, or ``"exclusive"``.
        base: the start of every key.
        fleet: the tenants.
        model: what they run.
        whats: ``"load SHARE"`` of its capacity, ``"common rate"``, ``"abuse"``.
    """
    key, num, seconds = {**base, "way": way}, len(fleet.jobs), 4 * part.seconds
    if part.is_done([{**key, "what": what} for what in ("capacity", *whats)]):
        return
    with serving(part, way, fleet, model) as server:
        if server is None:
            return
        capacity = functools.partial(server.capacity, seconds)
        found = part.measure({**key, "what": "capacity"}, capacity)
        if found is None:
            return
        for what in whats:
            if what == "abuse":
                rounds = 1 if part.is_small else ROUNDS
                rate = found["per_s"]
                one = functools.partial(abused, server, rate, num, seconds, rounds)
            else:
                share = what.removeprefix("load ")
                is_common = what == "common rate"
                rate = (
                    common(part, base) if is_common else float(share) * found["per_s"]
                )
                times = 2 if part.is_small else LONG.get(what, 2)
                one = functools.partial(loaded, server, rate, num, times * seconds)
            part.measure({**key, "what": what}, one)


def run(part: Part) -> None:
    """Measure what is missing, print the tables."""
    model, slow = ("minilm", "minilm4") if part.is_small else ("minilm", "bert")
    num = 2 if part.is_small else 16
    base = {"part": "predictability", "model": model, "tenants": num}
    print(f"{num} tenants, {model}; {part.records.path}")
    all_known, dtype = known(dtype_here(), part.scale), dtype_here()
    fleet = fleets.make_fleet(all_known[model], num, 1, np.dtype(dtype))
    whats = [*(f"load {share}" for share in LOADS), "common rate", "abuse"]
    measure_way(part, "in turn", base, fleet, model, ())  # the common rate is its own
    for way in WAYS:
        measure_way(part, way, base, fleet, model, whats)
    found = part.records.get(
        {**base, "way": "space-time", "what": "capacity", "scale": part.scale}
    )
    if found is not None:
        one = fleets.make_fleet(all_known[slow], 1, 1, np.dtype(dtype))
        x = one.targets[0].inputs[0]
        job = slowed(one.jobs[0], SLOWED[part.is_small])
        measure = functools.partial(straggler, part, fleet, job, x, found["per_s"])
        part.measure({**base, "way": "space-time", "what": "straggler"}, measure)
    print_table(part, base)
    paper.check(part)


def print_table(part: Part, base: Mapping[str, Any]) -> None:
    """Print a line per way and load, then the walls."""
    print(f"{'way':12}{'load':>14}{'rate/s':>10}{'p50 ms':>9}{'p99':>9}{'tail':>7}"
          f"{'spread':>8}")  # fmt: skip
    names = [*(f"load {load}" for load in LOADS), "common rate"]
    for way in WAYS:
        for what in names:
            key = {**base, "way": way, "what": what, "scale": part.scale}
            if values := part.records.get(key):
                print(
                    f"{way:12}{what:>14}{values['rate_per_s']:10,.0f}"
                    f"{values['p50_ms']:9.2f}{values['p99_ms']:9.2f}"
                    f"{values['tail']:7.2f}{values['spread']:8.3f}"
                )
    for way in WAYS:
        key = {**base, "way": way, "what": "abuse", "scale": part.scale}
        if values := part.records.get(key):
            print(f"{way:12} {paper.line({}, values)[2:]}")
