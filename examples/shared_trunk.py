"""Serve heads of different depth and number of classes on one encoder they share.

No two tenants' programs are equal, yet the trunk is: its weights are in the bank once,
and each of its dense layers is one product over everybody's rows. Only the heads
differ, and they are padded and stacked where that pays.
"""

import dataclasses
import time
from collections.abc import Callable
from typing import Any

import jax
import numpy as np
from absl import app, flags, logging

import stfuse
from examples import mixes
from models import bert, mlp

_CALLS = flags.DEFINE_integer("calls", 20, "Calls timed each way.", lower_bound=1)
_COST = flags.DEFINE_string("cost", "auto", "Plan for this device: auto, h200, cpu.")
_SMOKE = flags.DEFINE_bool("smoke", False, "A tiny trunk.")

TOLERANCE = 1e-5  # of the largest logit of an answer
NUM_TOKENS = 16
# Of each tenant's head: the widths of its hidden layers, and its classes.
HEADS = {
    "spam": ((), 2),
    "topic": ((), 20),
    "mood": ((64,), 3),
    "intent": ((128,), 40),
    "stars": ((128, 64), 5),
    "language": ((96, 96), 12),
}


def make_jobs() -> list[stfuse.Job]:
    """Return the tenants' jobs, whose heads read the very same trunk."""
    trunk = bert.Config(vocab=8192, width=256, layers=4, heads=8, mlp_width=1024)
    trunk = dataclasses.replace(bert.TINY, layers=1) if _SMOKE.value else trunk
    ids = np.zeros((1, NUM_TOKENS), np.int32)
    jobs = []
    for seed, (name, (widths, num_classes)) in enumerate(HEADS.items()):
        head = mlp.Config((trunk.width,), widths, num_classes)
        member = mixes.Member("head", mixes.HeadConfig(trunk, head))
        params = mixes.make_params(member, seed, np.float32)  # at random
        apply_fn = mixes.apply_fn_of(member)
        jobs.append(stfuse.Job(name, apply_fn, params, {"ids": ids, "mask": ids}))
    return jobs


def best_ms(run: Callable[[], Any]) -> float:
    """Return milliseconds of a call that waits for its answers, the best of many."""
    times_s = []
    for _ in range(1 + _CALLS.value):
        start_s = time.perf_counter()
        jax.block_until_ready(run())
        times_s.append(time.perf_counter() - start_s)
    return 1e3 * min(times_s[1:])


def num_bytes(tree: Any) -> int:
    """Return the bytes of all arrays of a pytree."""
    return sum(leaf.nbytes for leaf in jax.tree.leaves(tree))


def describe(plan: stfuse.Plan) -> None:
    """Print the launches that everybody shares as one line, and the others."""
    together = [x for x in plan.launches if len(x.jobs) == len(plan.names)]
    print(
        f"{len(together)} heavy launches serve all {len(plan.names)} tenants; others:"
    )
    for launch in plan.launches:
        if launch not in together:
            jobs = f"{', '.join(launch.jobs)} (waste {launch.waste:.2f})"
            print(f"    {launch.primitive}: {jobs}")
    print(str(plan).splitlines()[-2])


def main(_: list[str]) -> None:
    """Fuse, check, time, print; exit with 1 if an answer is not its model's own."""
    logging.set_verbosity(logging.WARNING)  # JAX tells of every backend it looks for
    # Reduced precision (TF32 on a GPU) would drown the differences looked for.
    jax.config.update("jax_default_matmul_precision", "highest")
    jobs, rng = make_jobs(), np.random.default_rng(0)
    vocab = bert.TINY.vocab if _SMOKE.value else 8192
    inputs = {}
    for job in jobs:
        ids = rng.integers(1, vocab, size=(1, NUM_TOKENS), dtype=np.int32)
        inputs[job.name] = {"ids": ids, "mask": np.ones_like(ids)}
    fused = stfuse.fuse(jobs, cost=_COST.value)
    bank = fused.pack()
    describe(fused.plan)
    trunk, all_params = jobs[0].params["trunk"], [job.params for job in jobs]
    once, copies, held = map(num_bytes, (trunk, all_params, bank))
    print(
        f"weights: {copies / 1e6:.2f} MB in {len(jobs)} copies, {held / 1e6:.2f} MB in "
        f"the bank, {once / 1e6:.2f} MB of them the trunk"
    )
    answers, differences = fused(bank, inputs), []
    alone_fns = {job.name: jax.jit(job.apply_fn) for job in jobs}
    for job in jobs:
        alone = np.asarray(alone_fns[job.name](job.params, inputs[job.name]))
        difference = np.abs(answers[job.name] - alone).max() / np.abs(alone).max()
        differences.append(difference)
    staged, stacked = jax.device_put((inputs, fused.stack(inputs)))
    turns_ms = best_ms(
        lambda: [alone_fns[job.name](job.params, staged[job.name]) for job in jobs]
    )
    fused_ms = best_ms(lambda: fused.step(bank, stacked))
    print(f"{turns_ms:.2f} ms in turn, {fused_ms:.2f} ms in one fused step")
    worst = np.max(differences)  # NaN if any is
    if not worst <= TOLERANCE:
        raise SystemExit(f"an answer differs from its model alone by {worst:.1e}")
    print(f"every answer is its model's own; largest relative difference {worst:.1e}")


if __name__ == "__main__":
    app.run(main)
