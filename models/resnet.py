"""Residual network: a 7x7 stem, four stages of residual blocks, a dense head.

Two forms of the same network. The training form normalizes by its batch, so its rows
depend on each other. The inference form has every normalization folded into the
convolution before it, a kernel and a bias, so its rows do not; it is what `init`,
`load` and `apply` speak of.

Axes: B rows, H and W the image's height and width, C classes.

Source: He et al., "Deep Residual Learning for Image Recognition", 2015, Table 1. The
stride of a bottleneck is on its 3x3 convolution, as in PyTorch, which wrote the weights
that people serve; `Config.is_stride_first` puts it where the paper has it.
"""

import dataclasses
import functools
import pathlib
import re
from collections.abc import Iterator, Mapping
from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn

from models import checkpoint

_EPSILON = 1e-5  # PyTorch's; no config says it
_MAX_BLOCKS = 1000  # the paper's deepest network has 1202 layers, two a block
_REDUCTION = 4  # a bottleneck's outer width over its inner one

TORCH_MODULES = {"conv": "convolution", "norm": "normalization"}
"""What a normalized convolution's two modules are called in the stored layout."""


@dataclasses.dataclass(frozen=True)
class Config:
    """What one member of the family looks like.

    Attributes:
        block: ``"basic"``, two 3x3 convolutions, or ``"bottleneck"``, 1x1, 3x3, 1x1.
        depths: number of blocks of each stage.
        widths: output channels of each stage's blocks; each stage but the first
            halves height and width.
        stem_width: output channels of the 7x7 stem.
        input_shape: (H, W, channels) of one image; H and W matter to no parameter.
        num_classes: C, units of the output layer.
        is_first_stage_halved: whether the first stage halves height and width too.
        is_stride_first: whether a bottleneck strides in its first 1x1 convolution
            instead of the 3x3 one.
        dtype: what activations are computed in; parameters and logits are float32.
            Cast the parameters too, and they take half the memory.
    """

    block: str = "bottleneck"
    depths: tuple[int, ...] = (3, 4, 6, 3)
    widths: tuple[int, ...] = (256, 512, 1024, 2048)
    stem_width: int = 64
    input_shape: tuple[int, int, int] = (224, 224, 3)
    num_classes: int = 1000
    is_first_stage_halved: bool = False
    is_stride_first: bool = False
    dtype: Any = jnp.float32

    def __post_init__(self) -> None:
        """Refuse what is no ResNet, or larger than any."""
        if self.block not in ("basic", "bottleneck"):
            raise ValueError(
                f"`resnet.Config`: block is {self.block!r}; pass 'basic' or "
                "'bottleneck'."
            )
        if len(self.depths) != len(self.widths) or not self.depths:
            raise ValueError(
                f"`resnet.Config`: depths {self.depths} and widths {self.widths} must "
                "be of the same stages, one or more."
            )
        sizes = (*self.depths, *self.widths, self.stem_width, *self.input_shape)
        if any(
            not isinstance(size, int) or size < 1 for size in (*sizes, self.num_classes)
        ):
            raise ValueError(
                f"`resnet.Config`: sizes must be positive integers; got {self}."
            )
        if sum(self.depths) > _MAX_BLOCKS or min(self.widths) < _REDUCTION:
            raise ValueError(
                f"`resnet.Config`: depths {self.depths} must add up to {_MAX_BLOCKS} "
                f"blocks at most, and widths {self.widths} be {_REDUCTION} at least."
            )

    @property
    def num_params(self) -> int:
        """Number of trained values of the training form, the published figure."""
        total = (49 * self.input_shape[2] + 2) * self.stem_width
        for _, num_in, num_out, stride in _blocks(self):
            width = num_in
            for channels, size, _ in _convs(self, num_out, stride):
                total += (size * size * width + 2) * channels
                width = channels
            if num_in != num_out or stride != 1:
                total += (num_in + 2) * num_out
        return total + (self.widths[-1] + 1) * self.num_classes


RESNET18 = Config("basic", depths=(2, 2, 2, 2), widths=(64, 128, 256, 512))
"""18 layers, 11,689,512 parameters."""

RESNET34 = Config("basic", depths=(3, 4, 6, 3), widths=(64, 128, 256, 512))
"""34 layers, 21,797,672 parameters."""

RESNET50 = Config()
"""50 layers, 25,557,032 parameters."""

TINY = Config(
    "basic",
    depths=(1, 1),
    widths=(8, 16),
    stem_width=8,
    input_shape=(32, 32, 3),
    num_classes=10,
)
"""6 layers for 32x32 images, 6,226 parameters."""

TINY_DEEP = dataclasses.replace(TINY, depths=(2, 2))
"""10 layers for 32x32 images, 12,082 parameters."""


def _blocks(config: Config) -> Iterator[tuple[str, int, int, int]]:
    """Yield each block's name, input and output channels, and stride."""
    num_in = config.stem_width
    for stage, (depth, width) in enumerate(
        zip(config.depths, config.widths, strict=True)
    ):
        is_halved = stage > 0 or config.is_first_stage_halved
        for index in range(depth):
            stride = 2 if is_halved and index == 0 else 1
            yield f"stage{stage}_block{index}", num_in, width, stride
            num_in = width


def _convs(config: Config, width: int, stride: int) -> list[tuple[int, int, int]]:
    """Return output channels, kernel size and stride of a block's convolutions."""
    if config.block == "basic":
        return [(width, 3, stride), (width, 3, 1)]
    first, second = (stride, 1) if config.is_stride_first else (1, stride)
    inner = width // _REDUCTION
    return [(inner, 1, first), (inner, 3, second), (width, 1, 1)]


class ConvNorm(nn.Module):
    """Convolution and normalization by the batch; folded, one with a bias.

    Attributes:
        num_channels: of the output.
        size: height and width of the kernel.
        stride: of both axes.
        dtype: what activations are computed in.
        is_folded: whether the normalization is in the kernel and the bias.
        dilation: of both axes.
        num_groups: groups of channels that are convolved apart.
        is_padding_same: pad as TensorFlow does, not evenly as PyTorch does.
        momentum: what each step keeps of the running mean and variance.
        epsilon: what is added to the variance.
    """

    num_channels: int
    size: int
    stride: int
    dtype: Any
    is_folded: bool
    dilation: int = 1
    num_groups: int = 1
    is_padding_same: bool = False
    momentum: float = 0.9
    epsilon: float = _EPSILON

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """Map images [B, H, W, channels] to images, without an activation."""
        padding = self.size // 2 * self.dilation
        x = nn.Conv(
            self.num_channels,
            (self.size, self.size),
            self.stride,
            padding="SAME" if self.is_padding_same else padding,
            kernel_dilation=self.dilation,
            feature_group_count=self.num_groups,
            use_bias=self.is_folded,
            dtype=self.dtype,
            kernel_init=nn.initializers.variance_scaling(2.0, "fan_out", "normal"),
            name="conv",
        )(x)
        if self.is_folded:
            return x
        return nn.BatchNorm(
            use_running_average=False,
            momentum=self.momentum,
            epsilon=self.epsilon,
            dtype=self.dtype,
            name="norm",
        )(x)


class _Block(nn.Module):
    config: Config
    width: int
    stride: int
    is_folded: bool

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        form = {"dtype": self.config.dtype, "is_folded": self.is_folded}
        y = x
        for i, sizes in enumerate(_convs(self.config, self.width, self.stride)):
            y = nn.relu(y) if i else y
            y = ConvNorm(*sizes, **form, name=f"conv{i}")(y)
        if x.shape[-1] != self.width or self.stride != 1:
            x = ConvNorm(self.width, 1, self.stride, **form, name="shortcut")(x)
        return nn.relu(x + y)


class _ResNet(nn.Module):
    config: Config
    is_folded: bool

    @nn.compact
    def __call__(self, inputs: jax.Array) -> jax.Array:
        config, folded = self.config, self.is_folded
        stem = ConvNorm(config.stem_width, 7, 2, config.dtype, folded, name="stem")
        x = nn.relu(stem(inputs))
        x = nn.max_pool(x, (3, 3), strides=(2, 2), padding=((1, 1), (1, 1)))
        for name, _, width, stride in _blocks(config):
            x = _Block(config, width, stride, folded, name=name)(x)
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
    return _ResNet(config, is_folded=False).init(key, inputs)


def apply_train(
    config: Config, variables: Any, inputs: jax.Array
) -> tuple[jax.Array, Any]:
    """Compute class scores as in training: each row depends on the whole batch.

    To evaluate what has been trained, `fold` it and `apply` that.

    Args:
        config: the network's sizes.
        variables: what `init_train` returned, trained or not.
        inputs: images, float32 [B, H, W, channels].

    Returns:
        Logits, float32 [B, C], and the new ``batch_stats``.
    """
    logits, new = _ResNet(config, is_folded=False).apply(
        variables, inputs, mutable=["batch_stats"]
    )
    return logits, new["batch_stats"]


def fold(variables: Any) -> Any:
    """Turn variables of the training form into parameters of the inference form.

    With running mean m and variance v, a convolution's kernel k becomes k f and its
    bias b - m f, where f = scale / sqrt(v + epsilon): the same function, exactly.

    Args:
        variables: what `init_train` returned, trained or not.

    Returns:
        Parameters for `apply`, float32.
    """
    return fold_norms(variables["params"], variables["batch_stats"], _EPSILON)


def fold_norms(
    params: Mapping[str, Any], stats: Mapping[str, Any], epsilon: float
) -> Any:
    """Fold each ``norm`` of a tree of modules into the ``conv`` beside it.

    Args:
        params: parameters by module; those of a normalized convolution are
            ``{"conv": {"kernel"}, "norm": {"scale", "bias"}}``.
        stats: running ``mean`` and ``var`` of each ``norm``, by module.
        epsilon: what the normalization adds to the variance.

    Returns:
        The parameters with ``{"conv": {"kernel", "bias"}}`` in these places.
    """
    if "norm" in params:
        norm, running = params["norm"], stats["norm"]
        factor = norm["scale"] / jnp.sqrt(running["var"] + epsilon)
        kernel = params["conv"]["kernel"] * factor  # outputs are the last axis
        return {
            "conv": {"kernel": kernel, "bias": norm["bias"] - running["mean"] * factor}
        }
    return {
        name: fold_norms(child, stats.get(name, {}), epsilon)
        if isinstance(child, Mapping)
        else child
        for name, child in params.items()
    }


def init(config: Config, key: jax.Array) -> Any:
    """Make fresh parameters: those of `init_train`, folded.

    Args:
        config: the network's sizes.
        key: random key, used up.

    Returns:
        A pytree of float32 arrays: for each layer a kernel and a bias.
    """
    return fold(init_train(config, key))


def apply(config: Config, params: Any, inputs: jax.Array) -> jax.Array:
    """Compute class scores; pure, row by row.

    Args:
        config: the network's sizes.
        params: what `init`, `fold` or `load` returned.
        inputs: images, float32 [B, H, W, channels].

    Returns:
        Logits, float32 [B, C].
    """
    return _ResNet(config, is_folded=True).apply({"params": params}, inputs)


def load(folder: str | pathlib.Path) -> tuple[Config, Any]:
    """Load a folder that ``ResNetForImageClassification.save_pretrained`` wrote.

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
    return config, fold(checkpoint.read_variables(folder, specs, _torch_name))


def _read_config(folder: str | pathlib.Path) -> Config:
    """Read a config, or refuse it; what it leaves out has the writer's default."""
    found = checkpoint.read_config(folder, model_type="resnet", hidden_act="relu")
    try:
        return Config(
            block=found.get("layer_type", "bottleneck"),
            depths=tuple(found.get("depths", RESNET50.depths)),
            widths=tuple(found.get("hidden_sizes", RESNET50.widths)),
            stem_width=found.get("embedding_size", 64),
            input_shape=(*RESNET50.input_shape[:2], found.get("num_channels", 3)),
            num_classes=checkpoint.num_labels(found),
            is_first_stage_halved=bool(found.get("downsample_in_first_stage", False)),
            is_stride_first=bool(found.get("downsample_in_bottleneck", False)),
        )
    except TypeError as error:
        raise ValueError(
            f"`resnet.load`: {folder} has a setting of another type: {error}."
        ) from error


def _torch_name(path: tuple[str, ...]) -> str:
    """Return the PyTorch module of one of this network's innermost modules."""
    module, *rest = path
    if module == "head":
        return "classifier.1"
    if module == "stem":
        prefix = "resnet.embedder.embedder"
    else:
        stage, index = re.findall(r"\d+", module)
        inner, *rest = rest  # shortcut, or convN
        inner = inner.replace("conv", "layer.")
        prefix = f"resnet.encoder.stages.{stage}.layers.{index}.{inner}"
    return f"{prefix}.{TORCH_MODULES[rest[-1]]}"
