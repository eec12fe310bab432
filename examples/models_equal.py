"""Fuse eight of every model in `models/`, and compare each answer with it alone.

Prints, per model and dtype, the largest relative difference (norm of the difference
over norm of the answer), and the time of a fused step against the models in turn.
"""

import dataclasses
import functools
import time
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from absl import app, flags

import stfuse
from models import bert, cnn, gpt, lora, lstm, mlp, mobilenet_v2, resnet

_JOBS = flags.DEFINE_integer("jobs", 8, "how many of each model are fused")
_ROWS = flags.DEFINE_integer("rows", 2, "rows of each request")
_DTYPES = flags.DEFINE_list("dtypes", ["float32", "bfloat16"], "computed in")
_ONLY = flags.DEFINE_list("only", [], "names of models; all if empty")
_SMOKE = flags.DEFINE_bool("smoke", False, "the smallest presets")

# Largest relative difference allowed: a few roundings for every product in a row.
TOLERANCE = {"float32": 1e-5, "bfloat16": 3e-2}

# name: (module, preset, smallest preset)
MODELS = {
    "MLP": (mlp, mlp.DIGITS, mlp.TINY),
    "CNN": (cnn, cnn.DIGITS, cnn.TINY),
    "LSTM-512": (lstm, lstm.RNN_512, lstm.TINY),
    "GRU-512": (lstm, dataclasses.replace(lstm.RNN_512, cell="gru"), lstm.TINY_GRU),
    "ResNet-18": (resnet, resnet.RESNET18, resnet.TINY),
    "ResNet-34": (resnet, resnet.RESNET34, resnet.TINY_DEEP),
    "ResNet-50": (resnet, resnet.RESNET50, resnet.TINY),
    "MobileNetV2": (mobilenet_v2, mobilenet_v2.MOBILENET_V2, mobilenet_v2.TINY),
    "MiniLM": (bert, bert.MINILM_L6, bert.TINY),
    "MiniLM + LoRA": (lora, bert.MINILM_L6, bert.TINY),
    "BERT-base": (bert, bert.BERT_BASE, bert.TINY_DEEP),
    "GPT-2": (gpt, gpt.GPT2, gpt.TINY),
}


def make_inputs(module: Any, config: Any, rng: np.random.Generator) -> Any:
    """Return random inputs of one request for a model."""
    rows, length = _ROWS.value, 8 if _SMOKE.value else 32
    if module in (bert, lora):
        ids = rng.integers(1, config.vocab, size=(rows, length)).astype(np.int32)
        return {"ids": ids, "mask": np.ones_like(ids)}
    if module is gpt:
        return rng.integers(0, config.vocab, size=(rows, length)).astype(np.int32)
    if module is lstm:
        return rng.normal(size=(rows, length, config.features)).astype(np.float32)
    return rng.normal(size=(rows, *config.input_shape)).astype(np.float32)


def make_jobs(module: Any, config: Any, example: Any) -> list[stfuse.Job]:
    """Return jobs of one model, each with weights of its own."""
    keys = [jax.random.key(i) for i in range(_JOBS.value)]
    if module is not lora:
        apply_fn = functools.partial(module.apply, config)
        params = [module.init(config, key) for key in keys]
    else:
        base, adapted = bert.init(config, keys[0]), lora.ATTENTION
        fresh = [lora.init(adapted, key, base) for key in keys]
        noise = np.random.default_rng(0)  # fresh adapters change nothing yet
        params = [
            {
                "base": base,
                "adapters": jax.tree.map(
                    lambda x: x + 0.02 * noise.normal(size=x.shape).astype(x.dtype), own
                ),
            }
            for own in fresh
        ]
        run = functools.partial(bert.apply, config)

        def apply_fn(p: Any, x: Any) -> jax.Array:
            return lora.apply(adapted, run, p["base"], p["adapters"], x)

    return [stfuse.Job(f"j{i}", apply_fn, p, example) for i, p in enumerate(params)]


def best_ms(run: Callable[[], Any]) -> float:
    """Return milliseconds of a call that waits for its results, best of ten."""
    times_s = []
    for _ in range(11):
        start_s = time.perf_counter()
        jax.block_until_ready(run())
        times_s.append(time.perf_counter() - start_s)
    return 1e3 * min(times_s[1:])


def compare(module: Any, config: Any) -> tuple[float, float, float]:
    """Return the largest difference, and milliseconds fused and in turn."""
    rng = np.random.default_rng(0)
    inputs = [make_inputs(module, config, rng) for _ in range(_JOBS.value)]
    jobs = make_jobs(module, config, inputs[0])
    fused = stfuse.fuse(jobs)
    bank = fused.pack()
    stacked = fused.stack({job.name: x for job, x in zip(jobs, inputs, strict=True)})
    outputs = fused.split(fused.step(bank, stacked))
    # Each row alone is the promise; a map over rows is that, in one call.
    alone = jax.jit(
        jax.vmap(
            lambda p, x: jobs[0].apply_fn(p, jax.tree.map(lambda a: a[None], x)),
            in_axes=(None, 0),
        )
    )
    params = [jax.device_put(job.params) for job in jobs]
    worst = 0.0
    for job, p, x in zip(jobs, params, inputs, strict=True):
        expected = np.asarray(alone(p, x)[:, 0], np.float64)
        difference = np.asarray(outputs[job.name], np.float64) - expected
        relative = np.linalg.norm(difference) / np.linalg.norm(expected)
        worst = max(worst, float(np.nan_to_num(relative, nan=np.inf)))
    staged = jax.device_put(inputs)
    device_stacked = jax.device_put(stacked)
    return (
        worst,
        best_ms(lambda: fused.step(bank, device_stacked)),
        best_ms(lambda: [alone(p, x) for p, x in zip(params, staged, strict=True)]),
    )


def main(_: list[str]) -> None:
    """Print a line for each model and dtype; fail if one differs."""
    jax.config.update("jax_default_matmul_precision", "highest")
    print(f"{jax.devices()[0].device_kind}, jax {jax.__version__}, {_JOBS.value} jobs")
    print(
        f"{'model':14} {'dtype':9} {'difference':>10} {'fused ms':>9} {'turns ms':>9}"
    )
    failed = []
    for name, (module, preset, smallest) in MODELS.items():
        if _ONLY.value and name not in _ONLY.value:
            continue
        config = smallest if _SMOKE.value else preset
        for dtype in _DTYPES.value if hasattr(config, "dtype") else ["float32"]:
            typed = config
            if hasattr(config, "dtype"):
                typed = dataclasses.replace(config, dtype=jnp.dtype(dtype).type)
            worst, fused_ms, turns_ms = compare(module, typed)
            line = f"{name:14} {dtype:9} {worst:10.1e} {fused_ms:9.2f} {turns_ms:9.2f}"
            print(line, flush=True)
            if worst > TOLERANCE[dtype]:
                failed.append(f"{name} {dtype}")
    if failed:
        raise SystemExit(f"not equal: {', '.join(failed)}")


if __name__ == "__main__":
    app.run(main)
