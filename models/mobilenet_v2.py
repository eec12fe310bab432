"""MobileNetV2: inverted residual blocks of thin, depthwise convolutions.

A block widens its input with a 1x1 convolution, filters each channel on its own with a
3x3 one, and narrows the result with a 1x1 one that no activation follows.

Two forms of the same network. The training form normalizes by its batch, so its rows
depend on each other. The inference form has every normalization folded into the
convolution before it, a kernel and a bias, so its rows do not; it is what `init`,
`load` and `apply` speak of.

Axes: B rows, H and W the image's height and width, C classes.

Source: Sandler et al., "MobileNetV2: Inverted Residuals and Linear Bottlenecks", 2018,
Table 2 and section 4.
"""

import dataclasses
import functools
import pathlib
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import linen as nn

from models import checkpoint
from models.resnet import TORCH_MODULES, ConvNorm, fold_norms

_MOMENTUM = 0.997  # of the running statistics, as in the authors' training
_STAGES = (
    *((16, 1, 1), (24, 2, 2), (32, 3, 2), (64, 4, 2)),
    *((96, 3, 1), (160, 3, 2), (320, 1, 1)),
)


@dataclasses.dataclass(frozen=True)
class Config:
    """What one member of the family looks like.

    Attributes:
        multiplier: of the channels of all layers; the result is rounded to a multiple
            of ``divisor``, and to ``min_channels`` at least.
        stages: channels, blocks, and the stride of the first block, before the
            multiplier; the first stage has one block and no stride.
        stem_channels: output channels of the 3x3 stem, before the multiplier.
        head_channels: units before the output layer, before the multiplier.
        input_shape: (H, W, channels) of one image; H and W matter to no parameter.
        num_classes: C, units of the output layer.
        expansion: how much wider a block is inside than its input.
        divisor: what numbers of channels are multiples of.
        min_channels: the smallest number of channels.
        output_stride: how many times smaller the last images are than the inputs;
            once there, convolutions are dilated instead of strided.
        is_first_expanded: whether the first block has a 1x1 convolution as well; in
            the paper the stem stands for it.
        is_head_thinned: whether a multiplier below one applies to ``head_channels``;
            in the paper it does not.
        is_padding_same: whether a strided convolution pads as TensorFlow does, as
            little as possible and the end before the start; otherwise a 3x3 one pads
            one pixel on each side, as PyTorch does.
        epsilon: what each normalization adds to the variance.
        dtype: what activations are computed in; parameters and logits are float32.
            Cast the parameters too, and they take half the memory.
    """

    multiplier: float = 1.0
    stages: tuple[tuple[int, int, int], ...] = _STAGES
    stem_channels: int = 32
    head_channels: int = 1280
    input_shape: tuple[int, int, int] = (224, 224, 3)
    num_classes: int = 1000
    expansion: float = 6.0
    divisor: int = 8
    min_channels: int = 8
    output_stride: int = 32
    is_first_expanded: bool = False
    is_head_thinned: bool = False
    is_padding_same: bool = True
    epsilon: float = 1e-3
    dtype: Any = jnp.float32

    def __post_init__(self) -> None:
        """Refuse what is no MobileNetV2."""
        sizes = (
            *(size for stage in self.stages for size in stage),
            *(self.stem_channels, self.head_channels, *self.input_shape),
            *(self.num_classes, self.divisor, self.min_channels, self.output_stride),
        )
        if any(not isinstance(size, int) or size < 1 for size in sizes) or (
            len(self.input_shape) != 3
        ):
            raise ValueError(
                "`mobilenet_v2.Config`: sizes must be positive integers, and "
                f"input_shape have three; got {self}."
            )
        if not (self.multiplier > 0 and self.expansion > 0 and self.epsilon > 0):
            raise ValueError(
                "`mobilenet_v2.Config`: multiplier, expansion and epsilon must be "
                f"positive; got {self}."
            )
        if self.stages[0][1:] != (1, 1) or any(s[2] > 2 for s in self.stages):
            raise ValueError(
                f"`mobilenet_v2.Config`: stages {self.stages} must have strides of 1 "
                "or 2, and the first one block of stride 1."
            )

    @property
    def num_params(self) -> int:
        """Number of trained values of the training form, the published figure."""
        stem, last = _scaled(self, self.stem_channels), _num_features(self)
        total = (9 * self.input_shape[2] + 2) * stem
        for block in _blocks(self):
            if block.is_expanded:
                total += (block.num_in + 2) * block.num_inner
            total += (9 + 2) * block.num_inner
            total += (block.num_inner + 2) * block.num_out
        total += (block.num_out + 2) * last
        return total + (last + 1) * self.num_classes


MOBILENET_V2 = Config()
"""Multiplier 1.0 for 224x224 images, 3,504,872 parameters.

The weights on the Hub have 1001 classes, a background before the others: 3,506,153.
"""

TINY = Config(
    stages=((8, 1, 1), (8, 2, 2)),
    stem_channels=8,
    head_channels=16,
    input_shape=(16, 16, 3),
    num_classes=10,
    expansion=2.0,
)
"""Three blocks for 16x16 images, 1,690 parameters."""

TINY_DEEP = dataclasses.replace(TINY, stages=((8, 1, 1), (8, 2, 2), (16, 2, 2)))
"""Five blocks for 16x16 images, 3,914 parameters."""


def _rounded(config: Config, num_channels: int) -> int:
    """Round to a multiple of the divisor, at most a tenth down."""
    divisor = config.divisor
    rounded = int(num_channels + divisor / 2) // divisor * divisor
    rounded = max(config.min_channels, rounded)
    return rounded + divisor if rounded < 0.9 * num_channels else rounded


def _scaled(config: Config, num_channels: int) -> int:
    return _rounded(config, round(num_channels * config.multiplier))


def _num_features(config: Config) -> int:
    """Return the number of units before the output layer."""
    if config.multiplier < 1 and not config.is_head_thinned:
        return config.head_channels
    return _scaled(config, config.head_channels)


class _Block(NamedTuple):
    name: str
    num_in: int
    num_inner: int
    num_out: int
    stride: int
    dilation: int
    is_expanded: bool
    is_residual: bool


def _blocks(config: Config) -> Iterator[_Block]:
    """Yield the sizes of each block, first to last."""
    layers = [
        (_scaled(config, channels), stride if i == 0 else 1)
        for channels, repeats, stride in config.stages
        for i in range(repeats)
    ]
    num_in = num_inner = _scaled(config, config.stem_channels)
    reached, next_dilation = 2, 1  # after the stem
    for index, (num_out, stride) in enumerate(layers):
        dilation = next_dilation if reached == config.output_stride else 1
        if reached == config.output_stride:
            next_dilation *= stride  # a later block's dilation instead of the stride
            stride = 1
        reached *= stride
        yield _Block(
            name=f"block{index}",
            num_in=num_in,
            num_inner=num_inner,
            num_out=num_out,
            stride=stride,
            dilation=dilation,
            is_expanded=index > 0 or config.is_first_expanded,
            is_residual=index > 0 and stride == 1 and num_in == num_out,
        )
        num_in = num_out
        num_inner = _rounded(config, round(num_in * config.expansion))


def _conv_norm(config: Config, is_folded: bool) -> Callable[..., ConvNorm]:
    """Return what makes this network's convolutions, 1x1 unless told otherwise."""
    return functools.partial(
        ConvNorm,
        size=1,
        stride=1,
        dtype=config.dtype,
        is_folded=is_folded,
        is_padding_same=config.is_padding_same,
        momentum=_MOMENTUM,
        epsilon=config.epsilon,
    )


class _InvertedResidual(nn.Module):
    config: Config
    block: _Block
    is_folded: bool

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        block = self.block
        conv = _conv_norm(self.config, self.is_folded)
        y = x
        if block.is_expanded:
            y = nn.relu6(conv(block.num_inner, name="expand")(y))
        depthwise = conv(
            block.num_inner,
            size=3,
            stride=block.stride,
            dilation=block.dilation,
            num_groups=block.num_inner,
            name="depthwise",
        )
        y = conv(block.num_out, name="reduce")(nn.relu6(depthwise(y)))
        return x + y if block.is_residual else y


class _MobileNetV2(nn.Module):
    config: Config
    is_folded: bool

    @nn.compact
    def __call__(self, inputs: jax.Array) -> jax.Array:
        config = self.config
        conv = _conv_norm(config, self.is_folded)
        stem = _scaled(config, config.stem_channels)
        x = nn.relu6(conv(stem, size=3, stride=2, name="stem")(inputs))
        for block in _blocks(config):
            x = _InvertedResidual(config, block, self.is_folded, name=block.name)(x)
        x = nn.relu6(conv(_num_features(config), name="last")(x))
        x = x.mean((1, 2))
        head = nn.Dense(config.num_classes, dtype=config.dtype, name="head")
        return head(x).astype(jnp.float32)


def init_train(config: Config, key: jax.Array) -> Any:
    """Make fresh variables of the training form.

    Args:
        config: the network's sizes.
        key: random key, used up.

    Returns:
        ``{"params": ..., "batch_stats": ...}``, pytrees of float32 arrays: what is
        trained, and each normalization's running mean and variance.
    """
    inputs = jnp.zeros((1, *config.input_shape), jnp.float32)
    return _MobileNetV2(config, is_folded=False).init(key, inputs)


def apply_train(
    config: Config, variables: Any, inputs: jax.Array
) -> tuple[jax.Array, Any]:
    """Compute class scores as in training: each row depends on the whole batch.

    There is no dropout. To evaluate what has been trained, `fold` it and `apply` that.

    Args:
        config: the network's sizes.
        variables: what `init_train` returned, trained or not.
        inputs: images, float32 [B, H, W, channels].

    Returns:
        Logits, float32 [B, C], and the new ``batch_stats``.
    """
    logits, new = _MobileNetV2(config, is_folded=False).apply(
        variables, inputs, mutable=["batch_stats"]
    )
    return logits, new["batch_stats"]


def fold(config: Config, variables: Any) -> Any:
    """Turn variables of the training form into parameters of the inference form.

    Args:
        config: the network's sizes; its epsilon counts.
        variables: what `init_train` returned, trained or not.

    Returns:
        Parameters for `apply`, float32: the same function (see `resnet.fold_norms`).
    """
    return fold_norms(variables["params"], variables["batch_stats"], config.epsilon)


def init(config: Config, key: jax.Array) -> Any:
    """Make fresh parameters: those of `init_train`, folded.

    Args:
        config: the network's sizes.
        key: random key, used up.

    Returns:
        A pytree of float32 arrays: for each layer a kernel and a bias.
    """
    return fold(config, init_train(config, key))


def apply(config: Config, params: Any, inputs: jax.Array) -> jax.Array:
    """Compute class scores; pure, row by row.

    Args:
        config: the network's sizes.
        params: what `init`, `fold` or `load` returned.
        inputs: images, float32 [B, H, W, channels].

    Returns:
        Logits, float32 [B, C].
    """
    return _MobileNetV2(config, is_folded=True).apply({"params": params}, inputs)


def load(folder: str | pathlib.Path) -> tuple[Config, Any]:
    """Load what ``MobileNetV2ForImageClassification.save_pretrained`` wrote.

    Args:
        folder: has ``config.json`` and ``model.safetensors``.

    Returns:
        The config, and parameters for `apply`, float32 however they are stored.

    Raises:
        FileNotFoundError: if a file is missing.
        ValueError: if the config asks for what this family has not, or the weights
            do not fit it.
    """
    config = _read_config(folder)
    specs = jax.eval_shape(functools.partial(init_train, config), jax.random.key(0))
    variables = checkpoint.read_variables(folder, specs, _torch_name)
    return config, fold(config, variables)


def _read_config(folder: str | pathlib.Path) -> Config:
    """Read a config, or refuse it; what it leaves out has the writer's default."""
    found = checkpoint.read_config(
        folder, model_type="mobilenet_v2", hidden_act="relu6"
    )
    size = found.get("image_size", 224)
    try:
        size = (size, size) if isinstance(size, int) else tuple(size)
        return Config(
            multiplier=found.get("depth_multiplier", 1.0),
            input_shape=(*size, found.get("num_channels", 3)),
            num_classes=checkpoint.num_labels(found),
            expansion=found.get("expand_ratio", 6.0),
            divisor=found.get("depth_divisible_by", 8),
            min_channels=found.get("min_depth", 8),
            output_stride=found.get("output_stride", 32),
            is_first_expanded=not found.get("first_layer_is_expansion", True),
            is_head_thinned=not found.get("finegrained_output", True),
            is_padding_same=bool(found.get("tf_padding", True)),
            epsilon=found.get("layer_norm_eps", 1e-3),
        )
    except TypeError as error:
        raise ValueError(
            f"`mobilenet_v2.load`: {folder} has a setting of another type: {error}."
        ) from error


_TORCH_CONVS = {"expand": "expand_1x1", "depthwise": "conv_3x3", "reduce": "reduce_1x1"}


def _torch_name(path: tuple[str, ...]) -> str:
    """Return the PyTorch module of one of this network's innermost modules."""
    module, *rest = path
    if module == "head":
        return "classifier"
    if module == "stem":
        prefix = "conv_stem.first_conv"
    elif module == "last":
        prefix = "conv_1x1"
    else:
        index = int(module.removeprefix("block"))
        owner = f"layer.{index - 1}" if index else "conv_stem"
        prefix = f"{owner}.{_TORCH_CONVS[rest[0]]}"
    return f"mobilenet_v2.{prefix}.{TORCH_MODULES[rest[-1]]}"
