"""Mixes of unlike jobs, at two sizes: who stands beside whom in `bench_dissimilar`.

A member of a mix is a family and a config. Weights are random, drawn on the host, so
that nothing has to be compiled to have them; other examples take theirs from here too.
"""

import dataclasses
import functools
import math
from collections.abc import Callable, Iterable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

import stfuse
from models import bert, cnn, gpt, lstm, mlp, resnet


class Scale(NamedTuple):
    """How large the members are.

    Attributes:
        divisor: of widths, channels and images' sides.
        halving: of depths.
        num_tokens: T of encoders, and steps of recurrent networks.
        num_gpt_tokens: T of decoders.
        vocab: number of token ids.
    """

    divisor: int
    halving: int
    num_tokens: int
    num_gpt_tokens: int
    vocab: int


SCALES = {"full": Scale(1, 1, 32, 16, 8192), "small": Scale(8, 2, 8, 6, 97)}


class Family(NamedTuple):
    """How the members of one family are made.

    Attributes:
        init_fn: ``(config, key) -> params``; only its shapes are used.
        apply_fn: ``(config, params, inputs) -> outputs``.
        input_fn: ``(config, rng, rows, scale) -> inputs``.
    """

    init_fn: Callable[[Any, jax.Array], Any]
    apply_fn: Callable[[Any, Any, Any], Any]
    input_fn: Callable[[Any, np.random.Generator, int, Scale], Any]


class Member(NamedTuple):
    """One job of a mix: a key of `FAMILIES`, and its sizes."""

    family: str
    config: Any


class Mix(NamedTuple):
    """Jobs to run beside each other, and B, the rows of each one's request."""

    members: tuple[Member, ...]
    rows: int


class HeadConfig(NamedTuple):
    """Dense layers of one's own on a trunk that others have too."""

    trunk: bert.Config
    head: mlp.Config


def _classify(config: mlp.Config, params: Any, inputs: jax.Array) -> jax.Array:
    return jax.nn.log_softmax(mlp.apply(config, params, inputs))


def _init_head(config: HeadConfig, key: jax.Array) -> Any:
    trunk, head = bert.init(config.trunk, key), mlp.init(config.head, key)
    return {"trunk": trunk, "head": head}


def _apply_head(config: HeadConfig, params: Any, inputs: Any) -> jax.Array:
    states = bert.encode(config.trunk, params["trunk"], inputs)
    pooled = bert.mean_pool(states, inputs["mask"]).astype(states.dtype)
    return mlp.apply(config.head, params["head"], pooled)


def _image(config: Any, rng: np.random.Generator, rows: int, _: Scale) -> Any:
    return rng.normal(size=(rows, *config.input_shape)).astype(np.float32)


def _steps(config: Any, rng: np.random.Generator, rows: int, scale: Scale) -> Any:
    size = (rows, scale.num_tokens, config.features)
    return rng.normal(size=size).astype(np.float32)


def _tokens(config: Any, rng: np.random.Generator, rows: int, scale: Scale) -> Any:
    ids = rng.integers(1, scale.vocab, size=(rows, scale.num_tokens), dtype=np.int32)
    return {"ids": ids, "mask": np.ones_like(ids)}


def _ids(config: Any, rng: np.random.Generator, rows: int, scale: Scale) -> Any:
    size = (rows, scale.num_gpt_tokens)
    return rng.integers(0, config.vocab, size=size, dtype=np.int32)


FAMILIES = {
    "mlp": Family(mlp.init, _classify, _image),
    "cnn": Family(cnn.init, cnn.apply, _image),
    "lstm": Family(lstm.init, lstm.apply, _steps),
    "encoder": Family(bert.init, bert.apply, _tokens),
    "gpt": Family(gpt.init, gpt.apply, _ids),
    "resnet": Family(resnet.init, resnet.apply, _image),
    "head": Family(_init_head, _apply_head, _tokens),
}


def _mlps(all_widths: Iterable[Iterable[int]], scale: Scale) -> list[Member]:
    d = scale.divisor
    return [
        Member("mlp", mlp.Config((256 // d,), tuple(w // d for w in widths)))
        for widths in all_widths
    ]


def _cnns(all_channels: Iterable[Iterable[int]], scale: Scale) -> list[Member]:
    d = scale.divisor
    side = 32 if d == 1 else 16
    return [
        Member("cnn", cnn.Config((side, side), tuple(c // d for c in channels)))
        for channels in all_channels
    ]


def _lstms(all_hidden: Iterable[int], scale: Scale, dtype: Any) -> list[Member]:
    sizes = [hidden // scale.divisor for hidden in all_hidden]
    return [
        Member("lstm", lstm.Config(features=size, hidden=size, dtype=dtype))
        for size in sizes
    ]


def _encoders(
    sizes: Iterable[tuple[int, int, int]], scale: Scale, dtype: Any
) -> list[Member]:
    """Return encoders of (width, layers, heads)."""
    return [
        Member(
            "encoder",
            bert.Config(
                vocab=scale.vocab,
                width=width // scale.divisor,
                layers=layers // scale.halving,
                heads=heads,
                mlp_width=4 * width // scale.divisor,
                max_positions=64,
                dtype=dtype,
            ),
        )
        for width, layers, heads in sizes
    ]


def _gpts(
    sizes: Iterable[tuple[int, int, int]], scale: Scale, dtype: Any
) -> list[Member]:
    """Return decoders of (width, layers, heads)."""
    return [
        Member(
            "gpt",
            gpt.Config(
                vocab=scale.vocab,
                width=width // scale.divisor,
                layers=layers // scale.halving,
                heads=heads,
                max_positions=64,
                dtype=dtype,
            ),
        )
        for width, layers, heads in sizes
    ]


def _resnets(scale: Scale, dtype: Any) -> list[Member]:
    is_full = scale.divisor == 1
    side, num_of_each = (64, 4) if is_full else (32, 2)
    presets = (resnet.RESNET18, resnet.RESNET34)
    presets = presets if is_full else (resnet.TINY, resnet.TINY_DEEP)
    configs = [
        dataclasses.replace(preset, input_shape=(side, side, 3), dtype=dtype)
        for preset in presets
    ]
    return [Member("resnet", c) for c in configs for _ in range(num_of_each)]


def _heads(
    sizes: Iterable[tuple[tuple[int, ...], int]], trunk: bert.Config, scale: Scale
) -> list[Member]:
    """Return heads of (widths, classes) on one trunk."""
    return [
        Member(
            "head",
            HeadConfig(
                trunk,
                mlp.Config(
                    (trunk.width,), tuple(w // scale.divisor for w in widths), classes
                ),
            ),
        )
        for widths, classes in sizes
    ]


def make_mixes(scale: Scale, dtype: Any) -> Mapping[str, Mix]:
    """Return all mixes by name.

    Args:
        scale: of `SCALES`.
        dtype: what the models that take one compute in.
    """
    random = np.random.default_rng(0).integers(128, 513, size=(12, 4)).tolist()
    mlps = _mlps(random, scale)
    channels = [(16, 32), (32, 64), (24, 48, 96), (32, 64, 128), (16, 32, 64, 128)]
    channels += [(64, 128), (48, 48, 48), (32, 32, 64, 64)]
    cnns = _cnns(channels, scale)
    lstms = _lstms((256, 288, 320, 352, 384, 416, 448, 512), scale, dtype)
    sizes = [(192, 4, 6), (256, 5, 4), (320, 6, 5), (384, 7, 6), (448, 8, 7)]
    encoders = _encoders([*sizes, (512, 6, 8)], scale, dtype)
    gpts = _gpts([(256, 3, 4), (320, 4, 5), (384, 6, 6), (512, 5, 8)], scale, dtype)
    (trunk,) = _encoders([(384, 6, 6)], scale, dtype)
    heads = [((), 2), ((), 5), ((128,), 10), ((256,), 3), ((256, 128), 20), ((64,), 2)]
    families = [ms[i] for ms in (mlps, cnns, lstms, encoders) for i in (0, 3)]
    mixes = {
        "mlp12": (mlps, 8),
        "lstm8": (lstms, 1),
        "encoder6": (encoders, 1),
        "resnet_18_34": (_resnets(scale, dtype), 1),
        "cnn8": (cnns, 8),
        "mlp_depths": (_mlps([[256] * n for n in range(2, 8)], scale), 8),
        "gpt_mix": (gpts, 1),
        "families": (families, 2),
        "mlp_wide_narrow": (_mlps([[64] * 4] * 4 + [[2048] * 4] * 4, scale), 8),
        "equal12": (_mlps([random[0]] * 12, scale), 8),
        "lora_heads": (_heads(heads, trunk.config, scale), 1),
    }
    return {name: Mix(tuple(ms), rows) for name, (ms, rows) in mixes.items()}


@functools.cache
def apply_fn_of(member: Member) -> Callable[[Any, Any], Any]:
    """Return ``apply_fn(params, inputs)``, the same object for equal members."""
    return functools.partial(FAMILIES[member.family].apply_fn, member.config)


def make_params(member: Member, seed: int, dtype: Any) -> Any:
    """Return random weights of a sensible size, on the device.

    Args:
        member: whose.
        seed: weights differ between seeds; a shared trunk has the seed 0.
        dtype: of all leaves.
    """
    init_fn = functools.partial(FAMILIES[member.family].init_fn, member.config)
    specs = jax.eval_shape(init_fn, jax.random.key(0))
    if member.family != "head":
        return _draw(specs, seed, dtype)
    trunk = _draw_trunk(member.config.trunk, dtype)
    return {"trunk": trunk, "head": _draw(specs["head"], seed, dtype)}


@functools.cache
def _draw_trunk(config: bert.Config, dtype: Any) -> Any:
    init_fn = functools.partial(bert.init, config)
    return _draw(jax.eval_shape(init_fn, jax.random.key(0)), 0, dtype)


def _draw(specs: Any, seed: int, dtype: Any) -> Any:
    rng = np.random.default_rng(seed)

    def leaf(path: Any, spec: Any) -> jax.Array:
        x = rng.standard_normal(spec.shape, np.float32)
        if len(spec.shape) < 2:
            x = 0.1 * x + (path[-1].key == "scale")
        elif path[-1].key == "embedding":
            x /= math.sqrt(spec.shape[-1])
        else:
            x *= math.sqrt(2 / math.prod(spec.shape[:-1]))
        return jnp.asarray(x, dtype)

    return jax.tree_util.tree_map_with_path(leaf, specs)


def make_jobs(
    mix: Mix, scale: Scale, dtype: Any
) -> tuple[list[stfuse.Job], dict[str, Any]]:
    """Return a mix's jobs, and the inputs of one request of each, on the host.

    Args:
        mix: of `make_mixes`.
        scale: what it was made with.
        dtype: of weights and of inputs that are no ids.
    """
    jobs, inputs, rng = [], {}, np.random.default_rng(0)
    for i, member in enumerate(mix.members):
        name = f"{member.family}-{i}"
        x = FAMILIES[member.family].input_fn(member.config, rng, mix.rows, scale)
        inputs[name] = jax.tree.map(
            lambda a: a.astype(dtype) if a.dtype == np.float32 else a, x
        )
        params = make_params(member, i, dtype)
        jobs.append(stfuse.Job(name, apply_fn_of(member), params, inputs[name]))
    return jobs, inputs
