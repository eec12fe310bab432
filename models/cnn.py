"""Small convolutional network: 3x3 convolutions with pooling, then a dense layer.

Axes: B rows, H and W the image's height and width, C classes.
"""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn


@dataclasses.dataclass(frozen=True)
class Config:
    """What one member of the family looks like.

    Attributes:
        input_shape: (H, W) of one image with a single channel.
        channels: output channels of each 3x3 convolution, first to last; every
            convolution is followed by ReLU and 2x2 average pooling.
        num_classes: C, units of the output layer.
    """

    input_shape: tuple[int, int] = (8, 8)
    channels: tuple[int, ...] = (16, 32)
    num_classes: int = 10

    def __post_init__(self) -> None:
        """Refuse images that pooling would shrink to nothing or cut."""
        if any(size % 2 ** len(self.channels) for size in self.input_shape):
            raise ValueError(
                f"`cnn.Config`: input_shape {self.input_shape} cannot be halved "
                f"{len(self.channels)} times; pass multiples of "
                f"{2 ** len(self.channels)}, or fewer channels."
            )

    @property
    def num_params(self) -> int:
        """Number of trained values of all layers."""
        sizes = (1, *self.channels)
        convs = sum((9 * a + 1) * b for a, b in zip(sizes, sizes[1:], strict=False))
        height, width = (size // 2 ** len(self.channels) for size in self.input_shape)
        return convs + (height * width * sizes[-1] + 1) * self.num_classes


TINY = Config(channels=(8,))
"""One convolution, 1,370 parameters."""

DIGITS = Config()
"""Two convolutions for 8x8 digits, 6,090 parameters."""

WIDE = Config(channels=(32, 64))
"""Two wide convolutions, 21,386 parameters."""


class _CNN(nn.Module):
    config: Config

    @nn.compact
    def __call__(self, inputs: jax.Array) -> jax.Array:
        x = inputs[..., None]
        for channels in self.config.channels:
            x = nn.relu(nn.Conv(channels, (3, 3))(x))
            x = nn.avg_pool(x, (2, 2), strides=(2, 2))
        x = x.reshape(x.shape[0], -1)
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
    return _CNN(config).init(key, inputs)["params"]


def apply(config: Config, params: Any, inputs: jax.Array) -> jax.Array:
    """Compute class scores; pure, row by row.

    Args:
        config: the network's sizes.
        params: what `init` returned, trained or not.
        inputs: images, float32 [B, H, W].

    Returns:
        Logits, float32 [B, C].
    """
    return _CNN(config).apply({"params": params}, inputs)
