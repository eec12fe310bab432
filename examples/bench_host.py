"""Time the host alone: what a request costs before and after the device.

The device computes nothing and takes no time. Every round, one thread submits a request
of each tenant while the device is held, then lets go: the engine decides, stages,
launches and answers them as one step, with nobody beside it. Medians over rounds.
"""

import cProfile
import pstats
import statistics
import time
from collections.abc import Iterator

import numpy as np
from absl import app, flags

import stfuse
from stfuse.testing import FakeDevice, affine_job

_TENANTS = flags.DEFINE_integer("tenants", 64, "One request each.", lower_bound=2)
_WIDTH = flags.DEFINE_integer("width", 64, "Features of a row.", lower_bound=1)
_ROUNDS = flags.DEFINE_integer("rounds", 300, "Steps timed.", lower_bound=1)
_PROFILE = flags.DEFINE_bool("profile", False, "Print where the device thread was.")
_STAGES = ("decide", "stage", "launch", "answer")


def host_s(stats: stfuse.Snapshot) -> dict[str, float]:
    """Return host seconds in all, by stage."""
    each = {name: getattr(stats.host, f"{name}_s") for name in _STAGES}
    return {name: seconds * stats.steps for name, seconds in each.items()}


def rounds(engine: stfuse.Engine, device: FakeDevice) -> Iterator[dict[str, float]]:
    """Yield host seconds of one full step, by stage."""
    x = np.ones((1, _WIDTH.value), np.float32)
    names = [f"tenant-{i}" for i in range(_TENANTS.value)]
    while True:
        launches = device.num_launches
        device.hold()
        first = engine.submit(names[0], x)  # keeps the device thread out of the way
        while device.num_launches == launches:
            time.sleep(1e-4)
        time.sleep(1e-3)
        start_s = time.perf_counter()
        futures = [engine.submit(name, x) for name in names]
        submit_s = time.perf_counter() - start_s
        first.add_done_callback(lambda _, before=[]: before.append(0))
        device.release()
        for future in reversed(futures):  # the last one first: one wake-up, not many
            future.result()
        yield {"submit": submit_s}


def main(argv: list[str]) -> None:
    """Serve, time, print."""
    del argv
