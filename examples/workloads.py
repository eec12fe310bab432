"""Stacks of equal models: what `bench_step` and `bench_subset` time, and how.

A workload is a family, a config and the inputs of one request of one row. Weights are
drawn on the device, model by model, in the dtype asked for; every leaf differs between
models, biases too, so that nothing is kept once for all of them.
"""

import collections
import dataclasses
import functools
import math
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np

import stfuse
from models import bert, lstm, mlp, mobilenet_v2, resnet

Params = Any
Run = Callable[[], Any]

# Of the norm of the difference over the norm of the answer.
TOLERANCE = {"float32": 1e-5, "bfloat16": 3e-2}
# An H200, measured: a large copy, and a large bfloat16 product. For an H100, and for
# float32, the floor is lower than what the device can reach.
BYTES_PER_S = 4.3e12
FLOPS_PER_S = 790e12
WAYS = ("latency", "pipelined")


class GemmConfig(NamedTuple):
    """One dense product: ``[rows, contracted] @ [contracted, features]``."""

    rows: int
    contracted: int
    features: int


class Workload(NamedTuple):
    """Equal models with weights of their own.

    Attributes:
        name: a key of `make_workloads`.
        config: the sizes of a model.
        init_fn: ``key -> params``.
        apply_fn: ``(params, inputs) -> outputs``; one object for all the models.
        input_fn: ``rng -> inputs``, of one row, floats as float32.
        num_tokens: T; no more rows of an embedding table are read. 0 without tables.
        most_jobs: how many models are timed unless told.
    """

    name: str
    config: Any
    init_fn: Callable[[jax.Array], Params]
    apply_fn: Callable[[Params, Any], Any]
    input_fn: Callable[[np.random.Generator], Any]
    num_tokens: int = 0
    most_jobs: int = 64


def _init_gemm(config: GemmConfig, key: jax.Array) -> Params:
    shape = (config.contracted, config.features)
    return {"kernel": jax.random.normal(key, shape) / math.sqrt(config.contracted)}


def _apply_gemm(config: GemmConfig, params: Params, inputs: jax.Array) -> jax.Array:
    return inputs @ params["kernel"]


def _floats(shape: tuple[int, ...], rng: np.random.Generator) -> Any:
    return rng.standard_normal((1, *shape), np.float32)


def _ids(vocab: int, num_tokens: int, rng: np.random.Generator) -> Any:
    ids = rng.integers(1, vocab, size=(1, num_tokens), dtype=np.int32)
    return {"ids": ids, "mask": np.ones_like(ids)}


def _encoder(
    name: str, config: bert.Config, num_tokens: int, most_jobs: int
) -> Workload:
    positions = max(config.max_positions, num_tokens)
    config = dataclasses.replace(config, max_positions=positions)
    return Workload(
        name,
        config,
        functools.partial(bert.init, config),
        functools.partial(bert.apply, config),
        functools.partial(_ids, config.vocab, num_tokens),
        num_tokens,
        most_jobs,
    )


def _network(
    name: str, family: Any, config: Any, shape: tuple[int, ...], most_jobs: int = 64
) -> Workload:
    return Workload(
        name,
        config,
        functools.partial(family.init, config),
        functools.partial(family.apply, config),
        functools.partial(_floats, shape),
        most_jobs=most_jobs,
    )


def _gemm(config: GemmConfig) -> Workload:
    return Workload(
        "gemm",
        config,
        functools.partial(_init_gemm, config),
        functools.partial(_apply_gemm, config),
        functools.partial(_floats, (config.rows, config.contracted)),
    )


def make_workloads(
    dtype: Any, *, is_small: bool = False, num_tokens: int | None = None
) -> dict[str, Workload]:
    """Return all workloads by name.

    Args:
        dtype: what the models that take one compute in.
        is_small: the smallest models instead, for tests and the CPU.
        num_tokens: T of the encoders, and steps of the LSTM, instead of their own.
    """
    if is_small:
        presets = [resnet.TINY, mobilenet_v2.TINY, bert.TINY]
        presets += [dataclasses.replace(bert.TINY_DEEP, pooling="first"), lstm.TINY]
        gemm, wide, lengths = GemmConfig(8, 24, 16), mlp.TINY, (8, 12, 4)
    else:
        presets = [resnet.RESNET50, mobilenet_v2.MOBILENET_V2, bert.MINILM_L6]
        presets += [bert.BERT_BASE, lstm.RNN_512]
        gemm, lengths = GemmConfig(256, 1152, 128), (32, 128, 32)
        wide = mlp.Config(input_shape=(512,), widths=(512,) * 4)
    if num_tokens is not None:
        lengths = (num_tokens,) * 3
    presets = [dataclasses.replace(preset, dtype=dtype) for preset in presets]
    deep, thin, minilm, base, recurrent = presets
    found = [
        _network("resnet50", resnet, deep, deep.input_shape, 16),
        _network("mobilenet_v2", mobilenet_v2, thin, thin.input_shape),
        _encoder("minilm", minilm, lengths[0], 64),
        _encoder("bert", base, lengths[1], 16),
        _network("lstm", lstm, recurrent, (lengths[2], recurrent.features)),
        _gemm(gemm),
        _network("mlp", mlp, wide, wide.input_shape),
    ]
    return {workload.name: workload for workload in found}


def make_paper_workloads(dtype: Any, *, is_small: bool = False) -> dict[str, Workload]:
    """Return those of `make_workloads`, and what the paper's tables need beside them.

    Products are named for the paper's: ``matvec``, ``conv2_2``, ``square``.
    """
    found = make_workloads(dtype, is_small=is_small)
    presets = [resnet.RESNET18, resnet.RESNET34, bert.MINILM_L6]
    products = [(1, 512, 512), (128, 1152, 256), (256, 256, 256)]
    num_tokens = 32
    if is_small:
        presets = [resnet.TINY, resnet.TINY, bert.TINY_DEEP]
        products, num_tokens = [(1, 24, 16), (8, 24, 16), (16, 16, 16)], 8
    shallow, deeper, encoder = (dataclasses.replace(p, dtype=dtype) for p in presets)
    if not is_small:
        encoder = dataclasses.replace(encoder, layers=4)
    more = [
        _network("resnet18", resnet, shallow, shallow.input_shape),
        _network("resnet34", resnet, deeper, deeper.input_shape),
        _encoder("minilm4", encoder, num_tokens, 64),
    ]
    for name, sizes in zip(("matvec", "conv2_2", "square"), products, strict=True):
        more.append(_gemm(GemmConfig(*sizes))._replace(name=name))
    return found | {workload.name: workload for workload in more}


def make_params(
    workload: Workload, num_jobs: int, dtype: Any, *, first: int = 0
) -> list[Params]:
    """Return the weights of some models, on the device, model by model.

    Args:
        workload: whose.
        num_jobs: how many models.
        dtype: of all leaves.
        first: number of the first; a number always means the same weights.
    """
    draw, key = _draw_fn(workload.init_fn, dtype), jax.random.key(0)
    return [draw(jax.random.fold_in(key, first + i)) for i in range(num_jobs)]


@functools.cache
def _draw_fn(init_fn: Callable[[jax.Array], Params], dtype: Any) -> Any:
    """Return what draws one model's weights, compiled once."""

    @jax.jit
    def draw(key: jax.Array) -> Params:
        params = init_fn(key)
        flat = [a.size for a in jax.tree.leaves(params) if a.ndim < 2]
        noise = 0.1 * jax.random.normal(
            jax.random.fold_in(key, 1), (max(flat, default=0),)
        )

        def leaf(a: jax.Array) -> jax.Array:
            # Fresh biases are all zero, and would hide a mix-up.
            a = a + noise[: a.size].reshape(a.shape) if a.ndim < 2 else a
            return a.astype(dtype)

        return jax.tree.map(leaf, params)

    return draw


def make_jobs(
    workload: Workload, num_jobs: int, dtype: Any
) -> tuple[list[stfuse.Job], dict[str, Any]]:
    """Return jobs, and the inputs of one request of each, on the host.

    Args:
        workload: what they run.
        num_jobs: how many.
        dtype: of weights, and of inputs that are no ids.
    """
    jobs, inputs, rng = [], {}, np.random.default_rng(0)
    for i, params in enumerate(make_params(workload, num_jobs, dtype)):
        name = f"{workload.name}-{i}"
        inputs[name] = jax.tree.map(
            lambda a: a.astype(dtype) if a.dtype == np.float32 else a,
            workload.input_fn(rng),
        )
        jobs.append(stfuse.Job(name, workload.apply_fn, params, inputs[name]))
    return jobs, inputs


def dtype_of(job: stfuse.Job) -> str:
    """Return the dtype of a job's weights."""
    return jax.tree.leaves(job.params)[0].dtype.name


def answers_alone(
    jobs: Sequence[stfuse.Job], inputs: Mapping[str, Any]
) -> dict[str, Any]:
    """Return each model's own answer, on the host; one jit for all equal models."""
    fns = {job.apply_fn: jax.jit(job.apply_fn) for job in jobs}
    found = {job.name: fns[job.apply_fn](job.params, inputs[job.name]) for job in jobs}
    return jax.device_get(found)


def used_bytes(workload: Workload, params: Params) -> int:
    """Return the bytes of one model's parameters that one request reads.

    Of an embedding table, these are the rows looked up: one per token at most.
    """

    def num_bytes(path: Any, leaf: jax.Array) -> int:
        if path[-1].key == "embedding":
            return leaf.nbytes // len(leaf) * min(len(leaf), workload.num_tokens)
        return leaf.nbytes

    return sum(jax.tree.leaves(jax.tree_util.tree_map_with_path(num_bytes, params)))


def true_flops(plan: Mapping[str, Any]) -> float:
    """Return the arithmetic of a plan's products and loops, without padding.

    XLA's own count takes a loop's body once, however often it runs.

    Args:
        plan: what ``fused.plan.to_dict()`` returned.
    """
    return sum(x["flops"] / (1 + x["waste"]) for x in plan["launches"])


def lowerings(plan: Mapping[str, Any]) -> dict[str, int]:
    """Return how many launches of a plan are computed in which way."""
    each = (f"{x['primitive']}: {x['lowering']}" for x in plan["launches"])
    return dict(collections.Counter(each).most_common())


def floor_us(num_bytes: float, flops: float) -> float | None:
    """Return the least microseconds that a GPU needs; None without a GPU."""
    if jax.default_backend() != "gpu":
        return None
    return 1e6 * max(num_bytes / BYTES_PER_S, flops / FLOPS_PER_S)


def fused_run(fused: stfuse.Fused, bank: stfuse.Bank, inputs: Mapping[str, Any]) -> Run:
    """Return what runs a fused step over inputs that are on the device."""
    return functools.partial(fused.step, bank, jax.device_put(fused.stack(inputs)))


def differences(
    answers: Mapping[str, Any], alone: Mapping[str, Any]
) -> tuple[float, str]:
    """Return the largest relative difference of some answers, and whose it is."""
    found = []
    for name, answer in answers.items():
        expected = np.asarray(alone[name], np.float64)
        difference = np.asarray(answer, np.float64) - expected
        ratio = np.linalg.norm(difference) / np.linalg.norm(expected)
        found.append((float(np.nan_to_num(ratio, nan=np.inf)), name))
    return max(found)


def warm_up(runs: Mapping[str, Run]) -> tuple[dict[str, float], dict[str, Any]]:
    """Run each twice; return seconds of the first call, and its answers."""
    seconds, answers = {}, {}
    for name, run in runs.items():
        start_s = time.perf_counter()
        answers[name] = jax.block_until_ready(run())
        seconds[name] = time.perf_counter() - start_s
        jax.block_until_ready(run())
    return seconds, answers


def times_us(
    runs: Mapping[str, Run], *, num_calls: int, num_rounds: int, most_s: float
) -> dict[str, dict[str, list[float]]]:
    """Return microseconds per call, by way of waiting, rival and round.

    Args:
        runs: what each rival runs per call, by name; the rivals take turns. What it
            returns has a ``block_until_ready``, or is a pytree of what does.
        num_calls: per rival, round and way.
        num_rounds: how often each has its turn.
        most_s: fewer calls are made of a rival whose calls take longer than this.
    """
    found = {way: {name: [] for name in runs} for way in WAYS}
    calls = {}
    for name, run in runs.items():
        start_s = time.perf_counter()
        jax.block_until_ready(run())
        one_s = time.perf_counter() - start_s
        calls[name] = max(1, min(num_calls, int(most_s / one_s)))
    for _ in range(num_rounds):
        for name, run in runs.items():
            start_s = time.perf_counter()
            for _ in range(calls[name]):
                jax.block_until_ready(run())
            middle_s = time.perf_counter()
            jax.block_until_ready([run() for _ in range(calls[name])])
            end_s = time.perf_counter()
            found["latency"][name].append(1e6 * (middle_s - start_s) / calls[name])
            found["pipelined"][name].append(1e6 * (end_s - middle_s) / calls[name])
    return found


def medians(times: Mapping[str, Mapping[str, Sequence[float]]]) -> dict[str, Any]:
    """Return microseconds per call by way and rival, the medians of the rounds."""
    return {
        way: {name: float(np.median(rounds)) for name, rounds in each.items()}
        for way, each in times.items()
    }


def choose_dtype(name: str) -> str:
    """Return the dtype that a flag names, and make float32 mean float32.

    Args:
        name: ``"auto"`` is bfloat16 on a GPU and float32 elsewhere.
    """
    if name == "auto":
        name = "bfloat16" if jax.default_backend() == "gpu" else "float32"
    if name == "float32":  # else TF32 would drown the differences looked for
        jax.config.update("jax_default_matmul_precision", "highest")
    return name
