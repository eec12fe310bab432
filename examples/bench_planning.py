"""Time the planner: many unlike programs, from shapes alone.

Two sets of jobs. Encoders of many sizes, two jobs of each: programs of some 550 ops of
which 48 are heavy. And chains of dense layers of random widths: a quarter of all ops is
heavy, so that alignment costs the most. Nothing is computed or compiled, and the device
is planned for, not used.
"""

import functools
import time
from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from absl import app, flags

import stfuse
from models import bert
from stfuse import _align, _cost, _trace

_JOBS = flags.DEFINE_integer("jobs", 64, "Encoders.", lower_bound=1)
_SPECIES = flags.DEFINE_integer("species", 32, "Unlike ones.", 1, 64)
_LAYERS = flags.DEFINE_integer("layers", 6, "Of each encoder.", lower_bound=1)
_CHAINS = flags.DEFINE_integer("chains", 32, "Chains of dense layers.", lower_bound=1)
_CHAIN_OPS = flags.DEFINE_integer("chain_ops", 1000, "Of each chain.", lower_bound=4)
_COST = flags.DEFINE_string("cost", "h200", "Plan for this device: auto, h200, cpu.")
_SEED = flags.DEFINE_integer("seed", 0, "Of the chains' widths.")

_OPS_PER_LAYER = 4  # product, a bias of one more axis, sum, maximum
Shape = jax.ShapeDtypeStruct
Sizes = tuple[str, Any, Any, Any]  # a job's name, function, parameters, example


def encoders() -> Iterator[Sizes]:
    """Yield jobs of `_SPECIES` encoders, in turn; no two of those are of one size."""
    ids = Shape((1, 32), np.int32)
    for i in range(_JOBS.value):
        outer, inner = divmod(i % _SPECIES.value, 8)
        width = 64 * (2 + outer)
        config = bert.Config(
            vocab=8192,
            width=width,
            layers=_LAYERS.value,
            heads=(2, 4, 8)[i % _SPECIES.value % 3],
            mlp_width=width + 64 * (1 + inner),
            max_positions=64,
        )
        init_fn = functools.partial(bert.init, config)
        params = jax.eval_shape(init_fn, jax.random.key(0))
        apply_fn = functools.partial(bert.apply, config)
        yield f"encoder-{i}", apply_fn, params, {"ids": ids, "mask": ids}


def _chain(params: list[tuple[jax.Array, jax.Array]], x: jax.Array) -> jax.Array:
    for kernel, bias in params:
        x = jnp.maximum(x @ kernel + bias, 0)
    return x


def chains() -> Iterator[Sizes]:
    """Yield chains of dense layers, each of its own random widths."""
    rng = np.random.default_rng(_SEED.value)
    for i in range(_CHAINS.value):
        num_layers = _CHAIN_OPS.value // _OPS_PER_LAYER
        widths = [int(w) for w in rng.integers(16, 512, num_layers + 1)]
        params = [
            (Shape((a, b), np.float32), Shape((b,), np.float32))
            for a, b in zip(widths, widths[1:], strict=False)
        ]
        yield f"chain-{i}", _chain, params, Shape((1, widths[0]), np.float32)


def row(label: str, sizes: list[Sizes], cost: stfuse.Cost) -> str:
    """Plan some jobs and return a row of the table."""
    start_s = time.perf_counter()
    traces = [_trace.trace(stfuse.Job(*size)) for size in sizes]
    traced_s = time.perf_counter()
    plan = _align.align([name for name, *_ in sizes], traces, cost)
    aligned_s = time.perf_counter()
    num_ops = sum(len(one.trace.ops) for one in plan.species)
    return (
        f"{label:10}{len(sizes):>6}{len(plan.species):>9}{num_ops:>8}"
        f"{traced_s - start_s:>9.2f}{aligned_s - traced_s:>9.2f}"
        f"{plan.num_launches_alone:>10} -> {plan.num_launches}"
    )


def main(_: list[str]) -> None:
    """Print the table."""
    cost = _cost.resolve(_COST.value)
    print("Ops are counted once per species; launches are of all jobs.")
    print(
        f"{'':10}{'jobs':>6}{'species':>9}{'ops':>8}{'trace s':>9}{'align s':>9}"
        "  launches alone -> fused"
    )
    print(row("encoders", list(encoders()), cost), flush=True)
    print(row("chains", list(chains()), cost))


if __name__ == "__main__":
    app.run(main)
