"""Time the host alone: what a request costs before and after the device.

The device computes nothing, and takes time only: a step of any size the same. Every
round, one thread submits a request of each tenant while the device is held, then lets
go: the engine decides, stages, launches and answers them as one step, with nobody
beside it. Medians over rounds. Then one client asks as fast as it gets answers: what
the engine serves of what such a device could.

With ``--isolation_seconds`` one tenant then asks for ten shares beside others at half
of theirs; ``--uneven`` steps and ``--strict_shares`` show who makes whose steps longer.

With ``--join_seconds`` a tenant is added at 0.7 of that at last, which needs a larger
lane: each of its steps takes `--compile_s` of the processor to build, in Python, as a
model that is traced does.
"""

import statistics
import time
from typing import Any

import numpy as np
from absl import app, flags

import stfuse
from examples import fleet as fleets
from examples import goals, load, streams
from stfuse.testing import FakeDevice, affine_job

_TENANTS = flags.DEFINE_integer("tenants", 64, "One request each.", lower_bound=2)
_WIDTH = flags.DEFINE_integer("width", 64, "Features of a row.", lower_bound=1)
_ROWS = flags.DEFINE_integer("rows", 1, "Of a request.", lower_bound=1)
_ROUNDS = flags.DEFINE_integer("rounds", 300, "Steps timed.", lower_bound=1)
_STEP_MS = flags.DEFINE_float("step_ms", 0.6, "Of the device.", lower_bound=0.0)
_SECONDS = flags.DEFINE_float("seconds", 3.0, "Of the closed loop; 0 for none.")
_JOIN_SECONDS = flags.DEFINE_float("join_seconds", 0.0, "Before a join; 0 for none.")
_COMPILE_S = flags.DEFINE_float("compile_s", 0.25, "Of a step of the larger lane.")
_ISOLATION_SECONDS = flags.DEFINE_float(
    "isolation_seconds", 0.0, "Of each of eight loads; 0 for none."
)
_STRICT_SHARES = flags.DEFINE_bool("strict_shares", False, "Of the engine.")
_UNEVEN = flags.DEFINE_bool(
    "uneven", False, "Steps take an H200's times by slots (64 MiniLMs, 32 rows each)."
)
_SWITCH_MS = flags.DEFINE_float("switch_ms", None, "The engine's switch_interval_s.")


# By slots, measured there (`bench_serving`, 2026-11-29).
UNEVEN_MS = {1: 0.7, 2: 0.8, 4: 0.93, 8: 1.24, 16: 2.23, 32: 4.2, 64: 6.4}
LAUNCH_S = 2e-4  # of a call into XLA, in which other threads have the interpreter


def step_s_of(num_slots: int) -> float:
    """Return what a step of some slots takes, seconds."""
    if not _UNEVEN.value:
        return _STEP_MS.value / 1e3
    least = min((n for n in UNEVEN_MS if n >= num_slots), default=max(UNEVEN_MS))
    return UNEVEN_MS[least] / 1e3 * max(num_slots / least, 1.0)


def processor_s() -> float:
    """Return what this thread computed, seconds.

    A function in Python, as models have many: where one starts a builder may rest.
    """
    return time.thread_time()


class PacedDevice(FakeDevice):
    """Runs steps one after the other, in time but on no processor."""

    def __init__(self) -> None:
        """Start idle."""
        super().__init__(step_s=0.0, computes=False)
        self._free_s, self.compile_s = 0.0, 0.0

    def compile(self, step_fn: Any, *specs: Any) -> Any:
        """Compile a step, in Python, for `compile_s` of the processor."""
        end_s = time.thread_time() + self.compile_s
        while processor_s() < end_s:
            pass
        step, (first, *_) = super().compile(step_fn, *specs), specs[-1]
        step_s = step_s_of(first.shape[0])
        return lambda *arguments: (step_s, step(*arguments))

    def launch(self, compiled: Any, *arguments: Any) -> Any:
        """Start a step once those before it have ended."""
        self.num_launches += 1
        step_s, outputs = compiled(*arguments)
        if _UNEVEN.value:
            time.sleep(LAUNCH_S)
        self._free_s = max(time.perf_counter(), self._free_s) + step_s
        return self._free_s, outputs

    def read(self, outputs: Any) -> Any:
        """Wait for a step."""
        end_s, arrays = outputs
        time.sleep(max(end_s - time.perf_counter(), 0.0))
        return super().read((arrays, 0.0))


def settled(engine: stfuse.Engine) -> stfuse.Snapshot:
    """Return the engine's counts, the last step's too: it is counted once answered."""
    time.sleep(1e-3)
    return engine.stats()


def time_round(engine: stfuse.Engine, device: FakeDevice) -> dict[str, float]:
    """Return host microseconds per request of one full step, by stage."""
    x = np.ones((_ROWS.value, _WIDTH.value), np.float32)
    names = [f"tenant-{i}" for i in range(_TENANTS.value)]
    before = settled(engine)
    launches = device.num_launches
    device.hold()
    futures = [engine.submit(names[0], x)]  # keeps the device thread out of the way
    while device.num_launches == launches:
        time.sleep(1e-4)
    time.sleep(1e-3)
    start_s = time.perf_counter()
    futures += [engine.submit(name, x) for name in names]
    submit_s = time.perf_counter() - start_s
    device.release()
    for future in reversed(futures):  # the last one first: one wake-up, not many
        future.result()
    after = settled(engine)
    share = (after.steps - before.steps) / len(futures)
    spent = goals.host_us(before, after)
    submit_us = submit_s * 1e6 / len(names)
    return {"submit": submit_us} | {name: us * share for name, us in spent.items()}


def targets_of(num: int) -> list[load.Target]:
    """Return what some tenants are asked."""
    x = np.ones((_ROWS.value, _WIDTH.value), np.float32)
    return [load.Target(f"tenant-{i}", [x]) for i in range(num)]


def saturate(engine: stfuse.Engine) -> None:
    """Ask in a closed loop; print what came of it."""
    num, targets = _TENANTS.value, targets_of(_TENANTS.value)
    stream = streams.in_turn(int(200_000 * _SECONDS.value), num, 1)
    before = engine.stats()
    run = load.saturate(
        engine,
        targets,
        stream,
        _SECONDS.value,
        max(4 * num, load.WINDOW),
        keep_every=1024,
    )
    after = engine.stats()
    fill = (after.rows - before.rows) / (after.steps - before.steps) / _ROWS.value
    print(
        f"saturated: {run.answered_per_s:,.0f} requests/s in steps of {fill:.1f}, "
        f"{1e6 / run.answered_per_s:.1f} us each, client and its callback included"
    )
    print(f"host us per step there: {load.named(goals.host_us(before, after))}")
    if step_s := step_s_of(num):
        device_per_s = num / step_s
        share = run.answered_per_s / device_per_s
        print(f"the device could serve {device_per_s:,.0f}: {share:.2f} of that")


def isolate(engine: stfuse.Engine, jobs: list[stfuse.Job]) -> None:
    """Compare others' p99 beside a flood and beside a peaceful tenant; print it."""
    num, seconds = len(jobs), _ISOLATION_SECONDS.value
    fleet = fleets.Fleet(jobs, targets_of(num), np.zeros(0), _ROWS.value)
    options = goals.Options(seconds, seconds / 3, 0, lambda run: None)
    rate = num / max(step_s_of(num), 1e-5)
    found = goals.isolation(engine, fleet, rate, None, 4, options)
    print(
        f"others' p99 {found['peaceful_p99_ms']:.2f} ms beside a peaceful tenant, "
        f"{found['abusive_p99_ms']:.2f} ms beside one that asks for ten shares: ratio "
        f"{found['ratio']:.2f}"
    )


def join(engine: stfuse.Engine, device: PacedDevice, jobs: list[stfuse.Job]) -> None:
    """Add the last job while the others are asked; print what they saw of it."""
    num, seconds = len(jobs) - 1, _JOIN_SECONDS.value
    fleet = fleets.Fleet(jobs[:-1], targets_of(num), np.zeros(0), _ROWS.value)
    options = goals.Options(seconds, seconds / 3, 0, lambda run: None)
    device.compile_s, num_before = _COMPILE_S.value, device.num_compiles
    rate = goals.HIGH_LOAD * num / max(step_s_of(num), 1e-5)
    found = goals.joining(engine, fleet, jobs[-1], rate, 2 * seconds, options)
    before, during, ready_s = found["before"], found["during"], found["ready_s"]
    print(
        f"a tenant joins a larger lane: others' p99 {before['p99_ms']:.1f} ms before, "
        f"{during['p99_ms']:.1f} ms during {found['during_s']:.1f} s: ratio "
        f"{found['ratio']:.2f}; {device.num_compiles - num_before} steps compiled, "
        + ("not ready in time" if ready_s is None else f"ready in {ready_s:.1f} s")
    )


def main(argv: list[str]) -> None:
    """Serve, time, print."""
    del argv
    device, num = PacedDevice(), _TENANTS.value
    interval_s = _SWITCH_MS.value and _SWITCH_MS.value / 1e3
    options = {"max_slots": 2 * num, "switch_interval_s": interval_s}
    options |= {"strict_shares": _STRICT_SHARES.value, "batch_sizes": [_ROWS.value]}
    with stfuse.Engine(device=device, max_batch_size=_ROWS.value, **options) as engine:
        jobs = [
            affine_job(f"tenant-{i}", scale=float(i), width=_WIDTH.value)
            for i in range(num + 1)
        ]
        for ready in [engine.add(job) for job in jobs[:-1]]:
            ready.result()
        found = [time_round(engine, device) for _ in range(_ROUNDS.value)]
        fill = engine.stats().rows / engine.stats().steps / _ROWS.value
        print(f"{num} tenants, {fill:.1f} requests a step on average")
        print(f"{'stage':<10}{'median us/request':>20}{'least':>10}")
        total = {"total": [sum(each.values()) for each in found]}
        for name, each in (
            {k: [f[k] for f in found] for k in found[0]} | total
        ).items():
            print(f"{name:<10}{statistics.median(each):>20.2f}{min(each):>10.2f}")
        if _SECONDS.value:
            saturate(engine)
        if _ISOLATION_SECONDS.value:
            isolate(engine, jobs[:-1])
        if _JOIN_SECONDS.value:
            join(engine, device, jobs)


if __name__ == "__main__":
    app.run(main)
