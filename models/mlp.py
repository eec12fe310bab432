"""Multilayer perceptron: flatten, then dense layers with ReLU between them.

Axes: B rows, F features (the product of the input shape), C classes.
"""

import dataclasses
import math
from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn
from flax import nnx


@dataclasses.dataclass(frozen=True)
class Config:
    """What one member of the family looks like.

    Attributes:
        input_shape: shape of one input row, flattened to F features.
        widths: units of each hidden layer, first to last.
        num_classes: C, units of the output layer.
    """

    input_shape: tuple[int, ...] = (8, 8)
    widths: tuple[int, ...] = (256, 128)
    num_classes: int = 10

    @property
    def num_params(self) -> int:
        """Number of trained values: a matrix and a bias for each layer."""
        sizes = (math.prod(self.input_shape), *self.widths, self.num_classes)
        return sum((a + 1) * b for a, b in zip(sizes, sizes[1:], strict=False))


TINY = Config(widths=(32,))
"""One hidden layer, 2,410 parameters."""

DIGITS = Config()
"""Two hidden layers for 8x8 digits, 50,826 parameters."""

DEEP = Config(widths=(256, 256, 256, 256))
"""Four hidden layers, 216,586 parameters."""


class _MLP(nn.Module):
    config: Config

    @nn.compact
    def __call__(self, inputs: jax.Array) -> jax.Array:
        x = inputs.reshape(inputs.shape[0], -1)
        for width in self.config.widths:
            x = nn.relu(nn.Dense(width)(x))
        return nn.Dense(self.config.num_classes)(x)


def init(config: Config, key: jax.Array) -> Any:
    """Make fresh parameters.

    Args:
        config: the network's sizes.
        key: random key, used up.

    Returns:
        A pytree of float32 arrays: for each layer a kernel and a bias.
    """
    inputs = jnp.zeros((1, *config.input_shape), jnp.float32)
    return _MLP(config).init(key, inputs)["params"]


def apply(config: Config, params: Any, inputs: jax.Array) -> jax.Array:
    """Compute class scores; pure, row by row.

    Args:
        config: the network's sizes.
        params: what `init` returned, trained or not.
        inputs: float32 [B, *input_shape].

    Returns:
        Logits, float32 [B, C].
    """
    return _MLP(config).apply({"params": params}, inputs)


class NnxMLP(nnx.Module):
    """The same network as an NNX module: parameters live in the object.

    Args:
        config: the network's sizes.
        rngs: where fresh parameters are drawn from.

    Attributes:
        layers: one ``nnx.Linear`` per layer, first to last.
    """

    def __init__(self, config: Config, *, rngs: nnx.Rngs) -> None:
        """Draw fresh parameters."""
        sizes = (math.prod(config.input_shape), *config.widths, config.num_classes)
        self.layers = nnx.List(
            nnx.Linear(a, b, rngs=rngs) for a, b in zip(sizes, sizes[1:], strict=False)
        )

    def __call__(self, inputs: jax.Array) -> jax.Array:
        """Compute class scores.

        Args:
            inputs: float32 [B, *input_shape].

        Returns:
            Logits, float32 [B, C].
        """
        x = inputs.reshape(inputs.shape[0], -1)
        *hidden, last = self.layers
        for layer in hidden:
            x = nnx.relu(layer(x))
        return last(x)
