"""Let decoders of different width and depth write in one loop, wholly on the device.

A step of a decoder takes its cache and last token to the new ones: outputs have the
form of inputs, so the fused step can be the body of a ``lax.scan``. The host starts the
loop once, and reads all the tokens at its end; they must be those that each decoder
writes in a loop of its own.
"""

import functools
import time
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from absl import app, flags, logging

import stfuse
from examples import mixes
from models import gpt

_TOKENS = flags.DEFINE_integer("tokens", 48, "Written by each decoder.", lower_bound=1)
_ROWS = flags.DEFINE_integer("rows", 2, "Texts of each decoder.", lower_bound=1)
_REPEATS = flags.DEFINE_integer("repeats", 5, "Loops timed each way.", lower_bound=1)
_COST = flags.DEFINE_string("cost", "auto", "Plan for this device: auto, h200, cpu.")
_SMOKE = flags.DEFINE_bool("smoke", False, "Two tiny decoders, eight tokens.")

# Width, layers, heads.
SIZES = {
    "ant": (64, 2, 4),
    "bee": (96, 3, 4),
    "cricket": (128, 2, 8),
    "drone": (128, 4, 4),
}


def decode(config: gpt.Config, params: Any, state: Any) -> Any:
    """Read a token of each row, write the likeliest next one; cache and token in one.

    Args:
        config: the decoder's sizes.
        params: its weights.
        state: ``"token"``, int32 [B], and ``"cache"``.

    Returns:
        The next state, of the same form.
    """
    logits, cache = gpt.decode(config, params, state["cache"], state["token"])
    return {"token": logits.argmax(-1).astype(jnp.int32), "cache": cache}


def make_jobs() -> tuple[list[stfuse.Job], dict[str, Any]]:
    """Return the decoders, and their first states: a token each, and nothing before."""
    length = 8 if _SMOKE.value else _TOKENS.value
    configs = {
        name: gpt.Config(256, width, layers, heads, max_positions=length)
        for name, (width, layers, heads) in SIZES.items()
    }
    if _SMOKE.value:
        configs = {"tiny": gpt.TINY, "tiny-deep": gpt.TINY_DEEP}
    jobs, states = [], {}
    for seed, (name, config) in enumerate(configs.items()):
        member = mixes.Member("gpt", config)
        params = mixes.make_params(member, seed, np.float32)  # at random
        states[name] = {
            "token": jnp.arange(_ROWS.value, dtype=jnp.int32),
            "cache": gpt.empty_cache(config, _ROWS.value),
        }
        apply_fn = functools.partial(decode, config)
        jobs.append(stfuse.Job(name, apply_fn, params, states[name]))
    return jobs, states


def loop(
    step_fn: Callable[[Any, Any], Any], num_tokens: int, params: Any, states: Any
) -> dict[str, jax.Array]:
    """Return the tokens that each decoder writes, int32 [T, B] by name."""

    def body(states: Any, _: None) -> tuple[Any, Mapping[str, jax.Array]]:
        states = step_fn(params, states)
        return states, {name: state["token"] for name, state in states.items()}

    return jax.lax.scan(body, states, length=num_tokens)[1]


def best_ms(run: Callable[[], Any]) -> float:
    """Return milliseconds until all tokens are there, the best of a few loops."""
    times_s = []
    for _ in range(_REPEATS.value):
        start_s = time.perf_counter()
        jax.block_until_ready(run())
        times_s.append(time.perf_counter() - start_s)
    return 1e3 * min(times_s)


def main(_: list[str]) -> None:
    """Write both ways, compare, time, print; exit with 1 if a token differs."""
    logging.set_verbosity(logging.WARNING)  # JAX tells of every backend it looks for
    # Reduced precision (TF32 on a GPU) could tip the choice between two tokens.
    jax.config.update("jax_default_matmul_precision", "highest")
    jobs, states = make_jobs()
    num_tokens = 8 if _SMOKE.value else _TOKENS.value
    fused = stfuse.fuse(jobs, cost=_COST.value)
    print(str(fused.plan).splitlines()[-2])
    together = functools.partial(
        jax.jit(functools.partial(loop, fused, num_tokens)), fused.pack(), states
    )

    def own_loop(job: stfuse.Job) -> Callable[[], Any]:
        def step_fn(params: Any, states: Any) -> Any:
            return {job.name: job.apply_fn(params, states[job.name])}

        run = jax.jit(functools.partial(loop, step_fn, num_tokens))
        return functools.partial(run, job.params, {job.name: states[job.name]})

    in_turn = [own_loop(job) for job in jobs]
    written = jax.device_get(together())
    for run in in_turn:
        for name, tokens in jax.device_get(run()).items():
            is_same = np.array_equal(tokens, written[name])
            print(f"{name:10} {'same' if is_same else 'OTHER'}  {tokens[:12, 0]} ...")
            if not is_same:
                raise SystemExit(f"'{name}' writes otherwise in its own loop")
    fused_ms, turns_ms = best_ms(together), best_ms(lambda: [run() for run in in_turn])
    print(
        f"{len(jobs)} decoders, {num_tokens} tokens in {_ROWS.value} rows each: "
        f"{fused_ms:.1f} ms in one loop, {turns_ms:.1f} ms in one loop each"
    )


if __name__ == "__main__":
    app.run(main)
