"""BERT: a transformer encoder over token ids, pooled to an embedding or to classes.

Each layer is self-attention and a two-layer perceptron, each with a residual sum and
then LayerNorm. Padding has no influence at all: masked ids are not even looked up.

Axes: B rows, T tokens, F features (the width), H heads, C classes.

Source: Devlin et al., BERT, 2018, arXiv:1810.04805, section 3; Wang et al., MiniLM,
2020, arXiv:2002.10957; Reimers and Gurevych, Sentence-BERT, 2019, arXiv:1908.10084,
section 3 (mean pooling).
"""

import dataclasses
import itertools
import math
import pathlib
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn
from flax import traverse_util

from models import checkpoint


@dataclasses.dataclass(frozen=True)
class Config:
    """What one member of the family looks like.

    Attributes:
        vocab: number of token ids.
        width: F, features of a token.
        layers: number of encoder layers.
        heads: H, attention heads of a layer; they divide the width.
        mlp_width: units between the two dense layers of a perceptron.
        max_positions: the most tokens of a row.
        type_vocab: number of segment ids.
        eps: what LayerNorm adds to the variance.
        pooling: ``"mean"`` over the tokens that are not masked; or ``"first"``, BERT's
            own pooler: a dense layer with tanh on the first token.
        num_classes: C, units of the output layer; None for an embedding.
        dtype: what activations are computed in; parameters are float32, and so are
            softmax, the statistics of LayerNorm, and everything after the last layer.
    """

    vocab: int = 30522
    width: int = 768
    layers: int = 12
    heads: int = 12
    mlp_width: int = 3072
    max_positions: int = 512
    type_vocab: int = 2
    eps: float = 1e-12
    pooling: str = "mean"
    num_classes: int | None = None
    dtype: Any = jnp.float32

    def __post_init__(self) -> None:
        """Refuse sizes that make no network; a config may come from a stranger."""
        sizes = (self.vocab, self.width, self.layers, self.heads, self.mlp_width)
        sizes += (self.max_positions, self.type_vocab, self.num_classes or 1)
        if not all(isinstance(n, int) and 1 <= n < 2**31 for n in sizes):
            raise ValueError(f"`bert.Config`: {self}; sizes must be positive integers.")
        if self.layers > 256:
            raise ValueError(f"`bert.Config`: {self.layers} layers; pass at most 256.")
        if self.width % self.heads:
            raise ValueError(
                f"`bert.Config`: {self.heads} heads do not divide width {self.width}."
            )
        if self.pooling not in ("mean", "first"):
            raise ValueError(
                f"`bert.Config`: pooling is {self.pooling!r}; pass 'mean' or 'first'."
            )

    @property
    def num_params(self) -> int:
        """Number of trained values; the pooler counts where it is used."""
        width, mlp_width = self.width, self.mlp_width
        tables = self.vocab + self.max_positions + self.type_vocab
        layer = 4 * (width + 1) * width + 4 * width
        layer += (width + 1) * mlp_width + (mlp_width + 1) * width
        pooler = (width + 1) * width if self.pooling == "first" else 0
        head = (width + 1) * (self.num_classes or 0)
        return (tables + 2) * width + self.layers * layer + pooler + head


TINY = Config(vocab=97, width=16, layers=2, heads=2, mlp_width=32, max_positions=16)
"""Two layers of width 16, 6,320 parameters."""

TINY_DEEP = dataclasses.replace(TINY, width=24, layers=3, heads=4, mlp_width=40)
"""Its sibling: three layers of width 24 and 4 heads, 16,248 parameters."""

MINILM_L6 = Config(width=384, layers=6, mlp_width=1536)
"""all-MiniLM-L6-v2, 22,565,376 parameters.

The published 22,713,216 include the 147,840 of a pooler that mean pooling never uses.
"""

BERT_BASE = Config(pooling="first")
"""BERT base, uncased, 109,482,240 parameters with its pooler."""


class _Layer(nn.Module):
    config: Config

    @nn.compact
    def __call__(self, x: jax.Array, mask: jax.Array) -> jax.Array:
        config = self.config
        attended = self._attend(x, mask)
        x = _norm(config, "norm_1")(x + self._dense("out", config.width, attended))
        # BERT's gelu is the exact one, by erf.
        y = nn.gelu(self._dense("up", config.mlp_width, x), approximate=False)
        return _norm(config, "norm_2")(x + self._dense("down", config.width, y))

    def _attend(self, x: jax.Array, mask: jax.Array) -> jax.Array:
        """Mix the tokens; a masked one gets the weight zero, exactly."""
        config = self.config
        heads = (*x.shape[:2], config.heads, config.width // config.heads)
        q, k, v = (
            self._dense(name, config.width, x).reshape(heads)
            for name in ("query", "key", "value")
        )
        scores = jnp.einsum("bqhd,bkhd->bhqk", q, k) / math.sqrt(heads[-1])
        scores = scores.astype(jnp.float32)
        # The least finite number, not -inf: a row that is all masked gives no NaN.
        lowest = jnp.finfo(jnp.float32).min
        scores = jnp.where(mask[:, None, None, :], scores, lowest)
        weights = jax.nn.softmax(scores).astype(v.dtype)
        return jnp.einsum("bhqk,bkhd->bqhd", weights, v).reshape(x.shape)

    def _dense(self, name: str, units: int, x: jax.Array) -> jax.Array:
        return nn.Dense(units, dtype=self.config.dtype, name=name)(x)


class _Trunk(nn.Module):
    config: Config

    @nn.compact
    def __call__(self, inputs: Mapping[str, jax.Array]) -> jax.Array:
        config, length = self.config, inputs["ids"].shape[1]
        if length > config.max_positions:
            raise ValueError(
                f"`bert`: rows have {length} tokens, the model {config.max_positions} "
                "positions; cut the rows."
            )
        mask = inputs["mask"].astype(bool)
        # Whatever a masked place holds, an id out of range too, it reads as token 0.
        ids = jnp.where(mask, inputs["ids"], 0)
        types = inputs.get("types")
        types = jnp.zeros_like(ids) if types is None else jnp.where(mask, types, 0)
        x = self._embed("tokens", config.vocab, ids)
        x += self._embed("positions", config.max_positions, jnp.arange(length))
        x += self._embed("types", config.type_vocab, types)
        x = _norm(config, "norm")(x)
        for i in range(config.layers):
            x = _Layer(config, name=f"layer_{i}")(x, mask)
        return x

    def _embed(self, name: str, size: int, ids: jax.Array) -> jax.Array:
        table = nn.Embed(size, self.config.width, dtype=self.config.dtype, name=name)
        return table(ids)


class _BERT(nn.Module):
    config: Config

    def setup(self) -> None:
        self.trunk = _Trunk(self.config)
        if self.config.pooling == "first":
            self.pooler = nn.Dense(self.config.width)
        if self.config.num_classes is not None:
            self.head = nn.Dense(self.config.num_classes)

    def encode(self, inputs: Mapping[str, jax.Array]) -> jax.Array:
        return self.trunk(inputs)

    def __call__(self, inputs: Mapping[str, jax.Array]) -> jax.Array:
        states = self.trunk(inputs).astype(jnp.float32)
        if self.config.pooling == "first":
            pooled = jnp.tanh(self.pooler(states[:, 0]))
        else:
            pooled = mean_pool(states, inputs["mask"])
        if self.config.num_classes is not None:
            return self.head(pooled)
        return normalize(pooled) if self.config.pooling == "mean" else pooled


def init(config: Config, key: jax.Array) -> Any:
    """Make fresh parameters.

    Args:
        config: the network's sizes.
        key: random key, used up.

    Returns:
        A dict of float32 arrays: ``"trunk"`` with three tables and the layers, then
        ``"pooler"`` and ``"head"`` where the config has them.
    """
    ids = jnp.zeros((1, 1), jnp.int32)
    return _BERT(config).init(key, {"ids": ids, "mask": ids})["params"]


def apply(config: Config, params: Any, inputs: Mapping[str, jax.Array]) -> jax.Array:
    """Embed or classify rows of tokens; pure, row by row.

    Args:
        config: the network's sizes.
        params: what `init` returned, trained or not.
        inputs: ``"ids"``, int32 [B, T]; ``"mask"``, integers or booleans [B, T], zero
            where a row is padded; and, if any, the segment ids ``"types"``, int32
            [B, T]. T is at most ``config.max_positions``.

    Returns:
        Logits, float32 [B, C]. Without classes: embeddings, float32 [B, F], of length
        one with mean pooling (zero for a row that is all masked), and as they leave
        the pooler with the other.

    Raises:
        ValueError: there are more tokens than positions.
    """
    return _BERT(config).apply({"params": params}, inputs)


def encode(config: Config, params: Any, inputs: Mapping[str, jax.Array]) -> jax.Array:
    """Compute the states of the tokens: the trunk, which many heads may share.

    Args:
        config: the network's sizes.
        params: what `init` returned; only ``"trunk"`` is read.
        inputs: as for `apply`.

    Returns:
        States, ``config.dtype`` [B, T, F]; masked places hold finite numbers of no
        meaning.

    Raises:
        ValueError: there are more tokens than positions.
    """
    return _BERT(config).apply({"params": params}, inputs, method="encode")


def mean_pool(states: jax.Array, mask: jax.Array) -> jax.Array:
    """Average the tokens that are not masked.

    Args:
        states: [B, T, F], of any floating dtype.
        mask: integers or booleans [B, T].

    Returns:
        Float32 [B, F]; zero for a row that is all masked.
    """
    mask = mask.astype(bool)[..., None]
    total = jnp.where(mask, states.astype(jnp.float32), 0).sum(1)
    return total / jnp.maximum(mask.sum(1), 1)


def normalize(x: jax.Array) -> jax.Array:
    """Scale vectors [..., F] to length one; zero stays zero."""
    return x * jax.lax.rsqrt(jnp.maximum((x * x).sum(-1, keepdims=True), 1e-24))


def load(folder: str | pathlib.Path, *, pooling: str = "mean") -> tuple[Config, Any]:
    """Read a model of the Hugging Face layout.

    Args:
        folder: holds ``config.json`` and ``model.safetensors`` of a ``BertModel``, or
            of a larger model with one under ``bert.``. Pretraining heads are left
            unread.
        pooling: as in `Config`; a ``BertForSequenceClassification`` has ``"first"``
            and its classes, whatever is passed.

    Returns:
        The config, and parameters as of `init`, float32.

    Raises:
        ValueError: a setting that this file has no code for, or tensors that are
            missing, not expected, or of another shape, listed by name.
    """
    config = _read_config(folder, pooling)
    specs = traverse_util.flatten_dict(
        jax.eval_shape(lambda: init(config, jax.random.key(0)))
    )
    shapes = {
        _stored_name(path): spec.shape[::-1] if path[-1] == "kernel" else spec.shape
        for path, spec in specs.items()
    }
    tensors = _read_tensors(folder, shapes)
    params = {}
    for path in specs:
        x = tensors[_stored_name(path)]
        params[path] = jnp.asarray(x.T if path[-1] == "kernel" else x, jnp.float32)
    return config, traverse_util.unflatten_dict(params)


_STORED = {
    "tokens": "embeddings.word_embeddings",
    "positions": "embeddings.position_embeddings",
    "types": "embeddings.token_type_embeddings",
    "norm": "embeddings.LayerNorm",
    "pooler": "pooler.dense",
    "head": "classifier",
}
_STORED_OF_LAYER = {
    "query": "attention.self.query",
    "key": "attention.self.key",
    "value": "attention.self.value",
    "out": "attention.output.dense",
    "norm_1": "attention.output.LayerNorm",
    "up": "intermediate.dense",
    "down": "output.dense",
    "norm_2": "output.LayerNorm",
}
_UNREAD = (
    "embeddings.position_ids",
    "pooler.dense.weight",
    "pooler.dense.bias",
    "cls.predictions.bias",
    "cls.predictions.decoder.weight",
    "cls.predictions.decoder.bias",
    "cls.predictions.transform.dense.weight",
    "cls.predictions.transform.dense.bias",
    "cls.predictions.transform.LayerNorm.weight",
    "cls.predictions.transform.LayerNorm.bias",
    "cls.seq_relationship.weight",
    "cls.seq_relationship.bias",
)


def _norm(config: Config, name: str) -> nn.LayerNorm:
    # The fast variance, E[x^2] - E[x]^2, cancels where the mean is large.
    return nn.LayerNorm(
        config.eps, dtype=config.dtype, use_fast_variance=False, name=name
    )


def _read_config(folder: str | pathlib.Path, pooling: str) -> Config:
    found = checkpoint.read_config(
        folder,
        model_type="bert",
        hidden_act="gelu",
        position_embedding_type="absolute",
    )
    # An absent setting has the value of BERT base, as in transformers.BertConfig.
    classifies = "BertForSequenceClassification" in (found.get("architectures") or ())
    return Config(
        vocab=found.get("vocab_size", 30522),
        width=found.get("hidden_size", 768),
        layers=found.get("num_hidden_layers", 12),
        heads=found.get("num_attention_heads", 12),
        mlp_width=found.get("intermediate_size", 3072),
        max_positions=found.get("max_position_embeddings", 512),
        type_vocab=found.get("type_vocab_size", 2),
        eps=float(found.get("layer_norm_eps", 1e-12)),
        pooling="first" if classifies else pooling,
        num_classes=checkpoint.num_labels(found) if classifies else None,
    )


def _stored_name(path: tuple[str, ...]) -> str:
    """Return the file's name of a parameter, without ``bert.``."""
    *_, room, leaf = path
    leaf = "bias" if leaf == "bias" else "weight"
    layer = next((part for part in path if part.startswith("layer_")), None)
    if layer is None:
        return f"{_STORED[room]}.{leaf}"
    return f"encoder.layer.{layer[6:]}.{_STORED_OF_LAYER[room]}.{leaf}"


def _spell(name: str, prefix: str, scale: str, shift: str) -> str:
    """Return a file's own name for a tensor: under ``bert.``, or TensorFlow's norms."""
    name = name.replace("Norm.weight", f"Norm.{scale}")
    name = name.replace("Norm.bias", f"Norm.{shift}")
    return name if name.startswith(("classifier", "cls")) else prefix + name


def _read_tensors(
    folder: str | pathlib.Path, shapes: Mapping[str, tuple[int, ...]]
) -> dict[str, Any]:
    """Read tensors under whichever names the file has, and return them under ours."""
    faults = []
    norms = (("weight", "bias"), ("gamma", "beta"))
    for prefix, norm in itertools.product(("", "bert."), norms):
        names = {name: _spell(name, prefix, *norm) for name in (*shapes, *_UNREAD)}
        expected = {names[name]: shape for name, shape in shapes.items()}
        optional = [names[name] for name in _UNREAD if name not in shapes]
        try:
            tensors = checkpoint.read_tensors(folder, expected, optional=optional)
            return {name: tensors[names[name]] for name in shapes}
        except ValueError as error:
            faults.append(error)
    # The right spelling leaves the shortest list of tensors at fault.
    raise min(faults, key=lambda error: len(str(error)))
