"""Ours against transformers' MobileNetV2: the same weights, the same images."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

torch = pytest.importorskip("torch", reason="the oracle is PyTorch's")
transformers = pytest.importorskip("transformers", reason="the oracle's models")
pytest.importorskip("safetensors", reason="loading weights needs safetensors")

from models import mobilenet_v2  # noqa: E402

NARROW = {"depth_multiplier": 0.35, "num_labels": 7}
CONFIGS = {
    "narrow": {},
    "pytorch_padding": {"tf_padding": False},
    "thin_head": {"finegrained_output": False},
    "first_expanded": {"first_layer_is_expansion": False},
    "output_stride_16": {"output_stride": 16},
    "output_stride_8": {"output_stride": 8},
    "output_stride_8_pytorch_padding": {"output_stride": 8, "tf_padding": False},
    "output_stride_2": {"output_stride": 2},
    "other_rounding": {"depth_divisible_by": 6, "min_depth": 18},
    "other_expansion": {"expand_ratio": 2.5, "layer_norm_eps": 0.1},
    "one_channel": {"num_channels": 1},
}


def save(folder, settings, seed=0):
    """Write a random model, its statistics random too, and return it."""
    torch.manual_seed(seed)
    config = transformers.MobileNetV2Config(**settings)
    model = transformers.MobileNetV2ForImageClassification(config).eval()
    for module in model.modules():
        if isinstance(module, torch.nn.Conv2d):  # its own are too small to matter
            torch.nn.init.kaiming_normal_(module.weight)
        elif isinstance(module, torch.nn.Linear):
            torch.nn.init.normal_(module.bias)
        elif isinstance(module, torch.nn.BatchNorm2d):
            torch.nn.init.uniform_(module.weight, 0.5, 1.5)
            torch.nn.init.normal_(module.bias, std=0.3)
            torch.nn.init.normal_(module.running_mean, std=0.3)
            torch.nn.init.uniform_(module.running_var, 0.5, 2.0)
    model.save_pretrained(folder)
    return model


def images(num_rows, height, width, num_channels=3):
    rng = np.random.default_rng([num_rows, height, width])
    return rng.normal(size=(num_rows, height, width, num_channels)).astype(np.float32)


def ask(model, inputs):
    """Return the oracle's logits for images [B, H, W, channels]."""
    with torch.no_grad():
        pixels = torch.from_numpy(inputs.transpose(0, 3, 1, 2).copy())
        return model(pixels.to(model.dtype)).logits.float().numpy()


def error(actual, expected):
    """Return the largest difference, relative to the largest value."""
    return float(np.abs(actual - expected).max() / np.abs(expected).max())


@pytest.mark.parametrize("name", CONFIGS)
def test_narrow_models_agree(tmp_path, record_property, name):
    model = save(tmp_path, NARROW | CONFIGS[name])
    config, params = mobilenet_v2.load(tmp_path)
    assert config.num_classes == 7
    assert config.num_params == model.num_parameters()
    inputs = images(2, 64, 49, config.input_shape[2])
    logits = jax.jit(functools.partial(mobilenet_v2.apply, config))(params, inputs)
    record_property("error", found := error(logits, ask(model, inputs)))
    assert found < 1e-4


@pytest.mark.parametrize("multiplier", [0.35, 1.0, 1.4])
def test_published_sizes_agree(tmp_path, record_property, multiplier):
    model = save(tmp_path, {"depth_multiplier": multiplier, "num_labels": 1001})
    config, params = mobilenet_v2.load(tmp_path)
    preset = mobilenet_v2.MOBILENET_V2
    assert config == dataclasses.replace(
        preset, multiplier=multiplier, num_classes=1001
    )
    assert config.num_params == model.num_parameters()
    inputs = images(1, 224, 224)
    logits = jax.jit(functools.partial(mobilenet_v2.apply, config))(params, inputs)
    record_property("error", found := error(logits, ask(model, inputs)))
    assert found < 1e-4


def test_training_agrees(tmp_path, record_property):
    """The same logits, without dropout; PyTorch's momentum is another."""
    settings = {"classifier_dropout_prob": 0.0, "output_stride": 8}
    model = save(tmp_path, NARROW | settings).train()
    config, _ = mobilenet_v2.load(tmp_path)
    init = functools.partial(mobilenet_v2.init_train, config)
    variables = mobilenet_v2.checkpoint.read_variables(
        tmp_path,
        jax.eval_shape(init, jax.random.key(0)),
        mobilenet_v2._torch_name,
    )
    inputs = images(4, 64, 64)
    apply_train = jax.jit(functools.partial(mobilenet_v2.apply_train, config))
    logits, _ = apply_train(variables, inputs)
    record_property("error", found := error(logits, ask(model, inputs)))
    assert found < 1e-4


def test_half_precision_agrees_within_its_own(tmp_path, record_property):
    """Both in bfloat16 differ from float32, and from each other, by its roundings."""
    model = save(tmp_path, NARROW)
    inputs = images(3, 64, 64)
    expected = ask(model, inputs)
    model.to(torch.bfloat16).save_pretrained(tmp_path)
    config, params = mobilenet_v2.load(tmp_path)
    assert all(leaf.dtype == jnp.float32 for leaf in jax.tree.leaves(params))
    half = dataclasses.replace(config, dtype=jnp.bfloat16)
    logits = jax.jit(functools.partial(mobilenet_v2.apply, half))(params, inputs)
    record_property("error", found := error(logits, expected))
    record_property("oracle_error", error(ask(model, inputs), expected))
    # Some 50 layers of roundings of 2^-9 each.
    assert found < 0.1
