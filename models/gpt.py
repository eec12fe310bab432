"""GPT-2: a transformer decoder over token ids, with its cache as a pure state.

Each layer is LayerNorm, causal self-attention and a residual sum, then LayerNorm, a
two-layer perceptron and a residual sum. The output layer is the token table.

`apply` scores whole rows. To write on, `prefill` a prompt, then `decode` token by
token; both give the logits that `apply` would, and `decode` has one shape for ever:

    prefill(ids[:, :n], n)  then  decode(ids[:, n])  ==  apply(ids[:, :n + 1])[:, n]

Axes: B rows, T tokens, P positions, F features (the width), H heads, V vocabulary.

Source: Radford et al., Language Models are Unsupervised Multitask Learners, 2019,
section 2.3.
"""

import dataclasses
import math
import pathlib
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import linen as nn
from flax import traverse_util

from models import checkpoint


@dataclasses.dataclass(frozen=True)
class Config:
    """What one member of the family looks like.

    Attributes:
        vocab: V, number of token ids.
        width: F, features of a token.
        layers: number of decoder layers.
        heads: H, attention heads of a layer; they divide the width.
        max_positions: P, the most tokens of a row, and the length of a cache.
        eps: what LayerNorm adds to the variance.
        dtype: what activations and the cache are in; parameters and logits are
            float32, and so are softmax and the statistics of LayerNorm.
    """

    vocab: int = 50257
    width: int = 768
    layers: int = 12
    heads: int = 12
    max_positions: int = 1024
    eps: float = 1e-5
    dtype: Any = jnp.float32

    def __post_init__(self) -> None:
        """Refuse sizes that make no network; a config may come from a stranger."""
        sizes = (self.vocab, self.width, self.layers, self.heads, self.max_positions)
        if not all(isinstance(n, int) and 1 <= n < 2**31 for n in sizes):
            raise ValueError(f"`gpt.Config`: {self}; sizes must be positive integers.")
        if self.layers > 256:
            raise ValueError(f"`gpt.Config`: {self.layers} layers; pass at most 256.")
        if self.width % self.heads:
            raise ValueError(
                f"`gpt.Config`: {self.heads} heads do not divide width {self.width}."
            )

    @property
    def num_params(self) -> int:
        """Number of trained values; the token table, used twice, counts once."""
        width = self.width
        layer = 12 * width * width + 13 * width
        tables = (self.vocab + self.max_positions) * width
        return tables + self.layers * layer + 2 * width


TINY = Config(vocab=61, width=16, layers=2, heads=2, max_positions=12)
"""Two layers of width 16, 7,760 parameters."""

TINY_DEEP = dataclasses.replace(TINY, width=24, layers=3, heads=4)
"""Its sibling: three layers of width 24 and 4 heads, 23,472 parameters."""

GPT2 = Config()
"""The smallest published GPT-2, 124,439,808 parameters."""


class Cache(NamedTuple):
    """What `decode` knows of the past; zero where nothing was written yet.

    Every leaf has the row axis first, so rows can be moved between batches.
    """

    keys: tuple[jax.Array, ...]  # one a layer, config.dtype [B, P, H, F / H]
    values: tuple[jax.Array, ...]  # one a layer, config.dtype [B, P, H, F / H]
    position: jax.Array  # int32 [B], tokens seen so far


# Takes the keys and values of the tokens at hand, returns those to attend to.
_Store = Callable[[jax.Array, jax.Array], tuple[jax.Array, jax.Array]]


class _Layer(nn.Module):
    config: Config

    @nn.compact
    def __call__(self, x: jax.Array, mask: jax.Array, store: _Store) -> tuple[Any, Any]:
        width = self.config.width
        attended, stored = self._attend(_norm(self.config, "norm_1")(x), mask, store)
        x = x + self._dense("out", width, attended)
        y = self._dense("up", 4 * width, _norm(self.config, "norm_2")(x))
        # GPT-2's gelu is the approximation by tanh.
        return x + self._dense("down", width, nn.gelu(y, approximate=True)), stored

    def _attend(
        self, x: jax.Array, mask: jax.Array, store: _Store
    ) -> tuple[jax.Array, tuple[jax.Array, jax.Array]]:
        """Mix the tokens; a masked one gets the weight zero, exactly."""
        width, heads = self.config.width, self.config.heads
        qkv = self._dense("qkv", 3 * width, x)
        qkv = qkv.reshape(*x.shape[:2], 3, heads, width // heads)
        keys, values = store(qkv[:, :, 1], qkv[:, :, 2])
        scores = jnp.einsum("bqhd,bkhd->bhqk", qkv[:, :, 0], keys)
        scores = scores.astype(jnp.float32) / math.sqrt(width // heads)
        scores = jnp.where(mask, scores, jnp.finfo(jnp.float32).min)
        weights = jax.nn.softmax(scores).astype(values.dtype)
        mixed = jnp.einsum("bhqk,bkhd->bqhd", weights, values)
        return mixed.reshape(x.shape), (keys, values)

    def _dense(self, name: str, units: int, x: jax.Array) -> jax.Array:
        return nn.Dense(units, dtype=self.config.dtype, name=name)(x)


class _GPT(nn.Module):
    config: Config

    @nn.compact
    def __call__(
        self,
        ids: jax.Array,
        positions: jax.Array,
        mask: jax.Array,
        stores: Sequence[_Store],
        last: jax.Array | None = None,
    ) -> tuple[jax.Array, list[tuple[jax.Array, jax.Array]]]:
        """Score tokens at their positions, or of each row only the ``last``."""
        config = self.config
        tokens = nn.Embed(config.vocab, config.width, dtype=config.dtype, name="tokens")
        x = tokens(ids) + nn.Embed(
            config.max_positions, config.width, dtype=config.dtype, name="positions"
        )(positions)
        stored = []
        for i, store in enumerate(stores):
            x, kept = _Layer(config, name=f"layer_{i}")(x, mask, store)
            stored.append(kept)
        if last is not None:
            x = jnp.take_along_axis(x, last[:, None, None], axis=1)
        x = _norm(config, "norm")(x)
        return tokens.attend(x).astype(jnp.float32), stored


def init(config: Config, key: jax.Array) -> Any:
    """Make fresh parameters.

    Args:
        config: the network's sizes.
        key: random key, used up.

    Returns:
        A dict of float32 arrays: two tables, the layers, and the last norm.
    """
    ids = jnp.zeros((1, 1), jnp.int32)
    stores = [_forget] * config.layers
    return _GPT(config).init(key, ids, ids, ids.astype(bool), stores)["params"]


def apply(config: Config, params: Any, ids: jax.Array) -> jax.Array:
    """Score the next token at every place; pure, row by row.

    Args:
        config: the network's sizes.
        params: what `init` returned, trained or not.
        ids: tokens, int32 [B, T], at most ``config.max_positions`` each. A row that is
            padded at its end has true logits before it.

    Returns:
        Logits, float32 [B, T, V]; at place t, of the token t + 1.

    Raises:
        ValueError: there are more tokens than positions.
    """
    return _score(config, params, ids, None)[0]


def empty_cache(config: Config, batch: int) -> Cache:
    """Make the cache of rows without a past.

    Args:
        config: the network's sizes.
        batch: B, number of rows.

    Returns:
        A cache of zeros.
    """
    heads = (config.heads, config.width // config.heads)
    zeros = jnp.zeros((batch, config.max_positions, *heads), config.dtype)
    one_a_layer = (zeros,) * config.layers
    return Cache(one_a_layer, one_a_layer, jnp.zeros(batch, jnp.int32))


def prefill(
    config: Config, params: Any, ids: jax.Array, length: jax.Array
) -> tuple[jax.Array, Cache]:
    """Read prompts at once; pure, row by row.

    Args:
        config: the network's sizes.
        params: what `init` returned, trained or not.
        ids: prompts, int32 [B, T], each padded at its end with anything.
        length: tokens of each prompt, int32 [B], from 1 to T.

    Returns:
        Logits of the token after each prompt, float32 [B, V], and the cache to decode
        on with. Padding leaves no trace in either.

    Raises:
        ValueError: there are more tokens than positions.
    """
    is_prompt = jnp.arange(ids.shape[1]) < length[:, None]
    ids = jnp.where(is_prompt, ids, 0)
    logits, stored = _score(config, params, ids, length - 1)
    rest = (0, config.max_positions - ids.shape[1])

    def as_cache(x: jax.Array) -> jax.Array:
        x = jnp.where(is_prompt[..., None, None], x, 0)
        return jnp.pad(x, ((0, 0), rest, (0, 0), (0, 0)))

    keys = tuple(as_cache(keys) for keys, _ in stored)
    values = tuple(as_cache(values) for _, values in stored)
    return logits[:, 0], Cache(keys, values, length.astype(jnp.int32))


def decode(
    config: Config, params: Any, cache: Cache, ids: jax.Array
) -> tuple[jax.Array, Cache]:
    """Read one more token of each row; pure, row by row, of static shapes.

    Args:
        config: the network's sizes.
        params: what `init` returned, trained or not.
        cache: the past, from `empty_cache`, `prefill` or the last call. Rows may be of
            different length.
        ids: one token a row, int32 [B].

    Returns:
        Logits of the token after it, float32 [B, V], and the cache with it. A row
        whose cache was full has NaN logits, and keeps its keys and values.
    """
    places, position = jnp.arange(config.max_positions), cache.position[:, None]
    is_here = (places == position)[..., None, None]

    def store(old: tuple[jax.Array, jax.Array]) -> _Store:
        # A select, not a scatter: attention reads the whole cache anyway, and a
        # position out of range writes nothing.
        return lambda *new: tuple(
            jnp.where(is_here, x, kept) for x, kept in zip(new, old, strict=True)
        )

    logits, stored = _GPT(config).apply(
        {"params": params},
        ids[:, None],
        position,
        (places <= position)[:, None, None],
        [store(old) for old in zip(cache.keys, cache.values, strict=True)],
    )
    keys, values = zip(*stored, strict=True)
    return logits[:, 0], Cache(keys, values, cache.position + 1)


def load(folder: str | pathlib.Path) -> tuple[Config, Any]:
    """Read a model of the Hugging Face layout.

    Args:
        folder: holds ``config.json`` and ``model.safetensors`` of a ``GPT2Model``, or
            of a ``GPT2LMHeadModel`` with one under ``transformer.``. Stored masks, and
            an output layer that is the token table again, are left unread.

    Returns:
        The config, and parameters as of `init`, float32.

    Raises:
        ValueError: a setting that this file has no code for, or tensors that are
            missing, not expected, or of another shape, listed by name.
    """
    config = _read_config(folder)
    specs = traverse_util.flatten_dict(
        jax.eval_shape(lambda: init(config, jax.random.key(0)))
    )
    # GPT-2's Conv1D stores a kernel as Flax does, inputs first: nothing to transpose.
    shapes = {_stored_name(path): spec.shape for path, spec in specs.items()}
    masks = [f"h.{i}.attn.{n}" for i in range(config.layers) for n in _MASKS]
    tensors = _read_tensors(folder, shapes, masks)
    params = {p: jnp.asarray(tensors[_stored_name(p)], jnp.float32) for p in specs}
    return config, traverse_util.unflatten_dict(params)


_MASKS = ("bias", "masked_bias")
_STORED = {
    "tokens": "wte",
    "positions": "wpe",
    "norm": "ln_f",
    "norm_1": "ln_1",
    "qkv": "attn.c_attn",
    "out": "attn.c_proj",
    "norm_2": "ln_2",
    "up": "mlp.c_fc",
    "down": "mlp.c_proj",
}


def _norm(config: Config, name: str) -> nn.LayerNorm:
    # The fast variance, E[x^2] - E[x]^2, cancels where the mean is large.
    return nn.LayerNorm(
        config.eps, dtype=config.dtype, use_fast_variance=False, name=name
    )


def _forget(keys: jax.Array, values: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Attend to the tokens at hand and no others: the store without a past."""
    return keys, values


def _score(
    config: Config, params: Any, ids: jax.Array, last: jax.Array | None
) -> tuple[jax.Array, list[tuple[jax.Array, jax.Array]]]:
    """Score rows without a past: all places, or of each row one."""
    length = ids.shape[1]
    if length > config.max_positions:
        raise ValueError(
            f"`gpt`: rows have {length} tokens, the model {config.max_positions} "
            "positions; cut the rows."
        )
    places = jnp.arange(length)
    is_past = places <= places[:, None]
    inputs = (ids, places[None], is_past, [_forget] * config.layers, last)
    return _GPT(config).apply({"params": params}, *inputs)


def _read_config(folder: str | pathlib.Path) -> Config:
    found = checkpoint.read_config(
        folder,
        model_type="gpt2",
        activation_function="gelu_new",
        scale_attn_weights=True,
        scale_attn_by_inverse_layer_idx=False,
        tie_word_embeddings=True,
    )
    # An absent setting has the value of GPT-2, as in transformers.GPT2Config.
    config = Config(
        vocab=found.get("vocab_size", 50257),
        width=found.get("n_embd", 768),
        layers=found.get("n_layer", 12),
        heads=found.get("n_head", 12),
        max_positions=found.get("n_positions", 1024),
        eps=float(found.get("layer_norm_epsilon", 1e-5)),
    )
    if found.get("n_inner") not in (None, 4 * config.width):
        raise ValueError(
            f"`gpt.load`: {folder} has n_inner {found['n_inner']!r}; only four times "
            "the width is supported."
        )
    return config


def _stored_name(path: tuple[str, ...]) -> str:
    """Return the file's name of a parameter, without ``transformer.``."""
    *layer, room, leaf = path
    leaf = "bias" if leaf == "bias" else "weight"
    prefix = f"h.{layer[0].removeprefix('layer_')}." if layer else ""
    return f"{prefix}{_STORED[room]}.{leaf}"


def _read_tensors(
    folder: str | pathlib.Path, shapes: dict[str, tuple[int, ...]], masks: list[str]
) -> dict[str, Any]:
    """Read tensors, whether they are stored under ``transformer.`` or not."""
    faults = []
    for prefix in ("", "transformer."):
        expected = {prefix + name: shape for name, shape in shapes.items()}
        optional = ["lm_head.weight", *(prefix + name for name in masks)]
        try:
            tensors = checkpoint.read_tensors(folder, expected, optional=optional)
            return {name: tensors[prefix + name] for name in shapes}
        except ValueError as error:
            faults.append(error)
    # The right prefix leaves the shorter list of tensors at fault.
    raise min(faults, key=lambda error: len(str(error)))
