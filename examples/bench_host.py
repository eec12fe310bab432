"""Time the host alone: what a request costs before and after the device.

The device computes nothing and takes no time. Every round, one thread submits a request
of each tenant while the device is held, then lets go: the engine decides, stages,
launches and answers them as one step, with nobody beside it. Medians over rounds.
"""

import dataclasses
import statistics
import time

import numpy as np
from absl import app, flags

import stfuse
from stfuse.testing import FakeDevice, affine_job

_TENANTS = flags.DEFINE_integer("tenants", 64, "One request each.", lower_bound=2)
_WIDTH = flags.DEFINE_integer("width", 64, "Features of a row.", lower_bound=1)
_ROUNDS = flags.DEFINE_integer("rounds", 300, "Steps timed.", lower_bound=1)


def host_s(engine: stfuse.Engine) -> dict[str, float]:
    """Return the device thread's host seconds so far, by stage."""
    time.sleep(1e-3)  # it counts a step after it answered it
    stats = engine.stats()
    stages = dataclasses.asdict(stats.host)
    return {name[:-2]: seconds * stats.steps for name, seconds in stages.items()}


def time_round(engine: stfuse.Engine, device: FakeDevice) -> dict[str, float]:
    """Return host microseconds per request of one full step, by stage."""
    x = np.ones((1, _WIDTH.value), np.float32)
    names = [f"tenant-{i}" for i in range(_TENANTS.value)]
    before = host_s(engine)
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
    after = host_s(engine)
    spent = {name: after[name] - before[name] for name in before}
    per_request = 1e6 / len(futures)
    submit_us = submit_s * 1e6 / len(names)
    return {"submit": submit_us} | {k: s * per_request for k, s in spent.items()}


def main(argv: list[str]) -> None:
    """Serve, time, print."""
    del argv
    device = FakeDevice(step_s=0.0, computes=False)
    with stfuse.Engine(device=device, max_slots=_TENANTS.value) as engine:
        jobs = [
            affine_job(f"tenant-{i}", scale=float(i), width=_WIDTH.value)
            for i in range(_TENANTS.value)
        ]
        for ready in [engine.add(job) for job in jobs]:
            ready.result()
        found = [time_round(engine, device) for _ in range(_ROUNDS.value)]
        fill = engine.stats().rows / engine.stats().steps
    print(f"{_TENANTS.value} tenants, {fill:.1f} requests a step on average")
    print(f"{'stage':<10}{'median us/request':>20}{'least':>10}")
    total = {"total": [sum(each.values()) for each in found]}
    for name, each in ({k: [f[k] for f in found] for k in found[0]} | total).items():
        print(f"{name:<10}{statistics.median(each):>20.2f}{min(each):>10.2f}")


if __name__ == "__main__":
    app.run(main)
