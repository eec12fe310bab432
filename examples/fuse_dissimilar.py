"""Fuse three models of other kinds and sizes, swap weights, and time the step.

Two perceptrons of other width and depth and a convolutional network: the plan says
which launches they share, at what padding, and why others are of one job alone.
"""

import time
from collections.abc import Callable
from typing import Any

import jax
import numpy as np
from absl import app, flags, logging

import stfuse
from examples import mixes
from models import cnn, mlp

_CALLS = flags.DEFINE_integer("calls", 100, "Calls timed each way.", lower_bound=1)
_COST = flags.DEFINE_string("cost", "auto", "Plan for this device: auto, h200, cpu.")
TOLERANCE = 1e-5  # of the largest value of an answer
MODELS = {
    "slim": mixes.Member("mlp", mlp.Config(widths=(48, 32))),
    "deep": mixes.Member("mlp", mlp.Config(widths=(64, 56, 40))),
    "cnn": mixes.Member("cnn", cnn.DIGITS),
}


def best_us(run: Callable[[], Any]) -> float:
    """Return microseconds of a call that waits for its answers, the best of many."""
    times_s = []
    for _ in range(1 + _CALLS.value):
        start_s = time.perf_counter()
        jax.block_until_ready(run())
        times_s.append(time.perf_counter() - start_s)
    return 1e6 * min(times_s[1:])


def main(_: list[str]) -> None:
    """Fuse, check, swap, check again, time, print."""
    logging.set_verbosity(logging.WARNING)  # JAX tells of every backend it looks for
    # Reduced precision (TF32 on a GPU) would drown the differences looked for.
    jax.config.update("jax_default_matmul_precision", "highest")
    rng = np.random.default_rng(0)
    inputs = {name: rng.random((2, 8, 8), np.float32) for name in MODELS}
    apply_fns = {name: mixes.apply_fn_of(model) for name, model in MODELS.items()}
    params = {
        name: mixes.make_params(model, seed, np.float32)  # at random
        for seed, (name, model) in enumerate(MODELS.items())
    }
    jobs = [stfuse.Job(n, apply_fns[n], params[n], inputs[n]) for n in MODELS]
    fused = stfuse.fuse(jobs, cost=_COST.value)
    print(fused.plan)
    bank = fused.pack()
    alone_fns = {name: jax.jit(apply_fn) for name, apply_fn in apply_fns.items()}

    def check(what: str) -> None:
        answers, differences = fused(bank, inputs), []
        for name, alone_fn in alone_fns.items():
            alone = np.asarray(alone_fn(params[name], inputs[name]))
            difference = np.abs(answers[name] - alone).max()
            differences.append(difference / np.abs(alone).max())
        worst = np.max(differences)  # NaN if any is
        print(f"{what}: largest relative difference {worst:.1e}")
        assert worst <= TOLERANCE, "an answer is not its model's own"

    check("fused and alone")
    params["cnn"] = mixes.make_params(MODELS["cnn"], 9, np.float32)
    bank = fused.swap(bank, "cnn", params["cnn"])  # nothing is recompiled
    check("new weights for 'cnn'")
    staged, stacked = jax.device_put((inputs, fused.stack(inputs)))
    turns_us = best_us(lambda: [f(params[n], staged[n]) for n, f in alone_fns.items()])
    fused_us = best_us(lambda: fused.step(bank, stacked))
    print(f"{turns_us:.0f} us in turn, {fused_us:.0f} us in one fused step")


if __name__ == "__main__":
    app.run(main)
