"""Run eight ResNets of two depths, each with its own weights, in one fused step."""

import functools
import sys
import time
from collections.abc import Callable
from typing import Any

import jax
import numpy as np
from absl import app, flags, logging

import stfuse
from models import resnet

_SIDE = flags.DEFINE_integer("side", None, "Of the images; 64 on a CPU, else 224.")
_REPEATS = flags.DEFINE_integer("repeats", 5, "Steps timed each way.", lower_bound=1)
_SMOKE = flags.DEFINE_bool("smoke", False, "Tiny networks, two steps timed.")

NUM_OF_EACH = 4
TOLERANCE = 1e-5  # of the largest logit of an answer


def make_jobs() -> list[stfuse.Job]:
    """Return eight tenants' networks, four of each depth, with weights at random."""
    configs = {"resnet18": resnet.RESNET18, "resnet34": resnet.RESNET34}
    if _SMOKE.value:
        configs = {"tiny": resnet.TINY, "tiny-deep": resnet.TINY_DEEP}
    default = 64 if jax.default_backend() == "cpu" else 224
    side = _SIDE.value or (32 if _SMOKE.value else default)
    image = np.zeros((1, side, side, 3), np.float32)
    jobs = []
    for family, config in configs.items():
        init_fn = jax.jit(functools.partial(resnet.init, config))
        apply_fn = functools.partial(resnet.apply, config)
        for i in range(NUM_OF_EACH):
            params = init_fn(jax.random.key(len(jobs)))
            jobs.append(stfuse.Job(f"{family}-{i}", apply_fn, params, image))
    return jobs


def best_ms(run_fn: Callable[[], Any], num_repeats: int) -> float:
    """Return milliseconds of a call, the best of several; the first only compiles."""
    run_fn()
    times_s = []
    for _ in range(num_repeats):
        start_s = time.perf_counter()
        run_fn()
        times_s.append(time.perf_counter() - start_s)
    return 1e3 * min(times_s)


def main(_: list[str]) -> None:
    """Fuse, check, time, print; exit with 1 if an answer is not the model's own."""
    logging.set_verbosity(logging.WARNING)  # JAX tells of every backend it looks for
    # Reduced precision (TF32 on a GPU) would drown the differences looked for.
    jax.config.update("jax_default_matmul_precision", "highest")
    num_repeats = 2 if _SMOKE.value else _REPEATS.value
    jobs, rng = make_jobs(), np.random.default_rng(0)
    image = jobs[0].row
    inputs = {job.name: rng.random((1, *image.shape), np.float32) for job in jobs}
    alone_fns = {job.apply_fn: jax.jit(job.apply_fn) for job in jobs}

    def ask(job: stfuse.Job) -> np.ndarray:
        return np.asarray(alone_fns[job.apply_fn](job.params, inputs[job.name]))

    fused = stfuse.fuse(jobs)
    bank = fused.pack()
    answers = fused(bank, inputs)
    device = jax.devices()[0]
    print(f"{device.platform} ({device.device_kind}), images {image.shape}")
    print(*str(fused.plan).splitlines()[-2:], sep="\n")  # jobs, and parameters
    print(f"{'network':12} {'weights':>12} {'ms alone':>9} {'difference':>11}")
    differences = []
    for job in jobs:
        alone = ask(job)
        difference = np.abs(answers[job.name] - alone).max() / np.abs(alone).max()
        differences.append(difference)
        size = sum(leaf.size for leaf in jax.tree.leaves(job.params))
        alone_ms = best_ms(functools.partial(ask, job), num_repeats)
        print(f"{job.name:12} {size:12,} {alone_ms:9.2f} {difference:11.1e}")
    fused_ms = best_ms(lambda: fused(bank, inputs), num_repeats)
    in_turn_ms = best_ms(lambda: [ask(job) for job in jobs], num_repeats)
    print(
        f"all {len(jobs)}: {fused_ms:.2f} ms in one fused step, {in_turn_ms:.2f} ms in "
        f"turn, {in_turn_ms / fused_ms:.2f} times as long"
    )
    worst = np.max(differences)  # NaN if any is
    if not worst <= TOLERANCE:
        sys.exit(f"an answer differs from its model alone by {worst:.1e}")
    print(f"every answer is its model's own; largest relative difference {worst:.1e}")


if __name__ == "__main__":
    app.run(main)
