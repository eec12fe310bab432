"""Ours against transformers' ResNet: the same weights, the same images."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

torch = pytest.importorskip("torch", reason="the oracle is PyTorch's")
transformers = pytest.importorskip("transformers", reason="the oracle's models")
pytest.importorskip("safetensors", reason="loading weights needs safetensors")

from models import resnet  # noqa: E402

SMALL = {
    "embedding_size": 8,
    "hidden_sizes": [16, 24, 32],
    "depths": [2, 1, 2],
    "num_labels": 7,
}
CONFIGS = {
    "basic": {"layer_type": "basic"},
    "basic_without_shortcut": {"layer_type": "basic", "hidden_sizes": [8, 16, 32]},
    "basic_first_stage_halved": {
        "layer_type": "basic",
        "downsample_in_first_stage": True,
    },
    "bottleneck": {},
    "bottleneck_without_shortcut": {"embedding_size": 16},
    "bottleneck_stride_first": {"downsample_in_bottleneck": True},
    "bottleneck_all_halved": {
        "downsample_in_first_stage": True,
        "downsample_in_bottleneck": True,
    },
    "one_channel": {"num_channels": 1},
}


def save(folder, settings, seed=0):
    """Write a random model, its statistics random too, and return it."""
    torch.manual_seed(seed)
    config = transformers.ResNetConfig(**settings)
    model = transformers.ResNetForImageClassification(config).eval()
    for module in model.modules():
        if isinstance(module, torch.nn.BatchNorm2d):
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
def test_small_models_agree(tmp_path, record_property, name):
    settings = SMALL | CONFIGS[name]
    model = save(tmp_path, settings)
    config, params = resnet.load(tmp_path)
    assert config.num_classes == 7
    assert config.num_params == model.num_parameters()
    inputs = images(3, 64, 49, config.input_shape[2])
    logits = jax.jit(functools.partial(resnet.apply, config))(params, inputs)
    record_property("error", found := error(logits, ask(model, inputs)))
    assert found < 1e-4


@pytest.mark.parametrize("name", ["resnet18", "resnet34", "resnet50"])
def test_published_sizes_agree(tmp_path, record_property, name):
    preset = getattr(resnet, name.upper())
    model = save(
        tmp_path,
        {
            "layer_type": preset.block,
            "depths": preset.depths,
            "hidden_sizes": preset.widths,
            "num_labels": 1000,
        },
    )
    config, params = resnet.load(tmp_path)
    assert config == preset
    assert config.num_params == model.num_parameters()
    inputs = images(1, 224, 224)
    logits = jax.jit(functools.partial(resnet.apply, config))(params, inputs)
    record_property("error", found := error(logits, ask(model, inputs)))
    assert found < 1e-4


@pytest.mark.parametrize("name", ["basic", "bottleneck"])
def test_training_agrees(tmp_path, record_property, name):
    """The same logits and running means; PyTorch's variances are unbiased."""
    model = save(tmp_path, SMALL | CONFIGS[name]).train()
    config, _ = resnet.load(tmp_path)
    variables = read_training_form(tmp_path, config)
    inputs = images(4, 48, 48)
    apply_train = jax.jit(functools.partial(resnet.apply_train, config))
    logits, stats = apply_train(variables, inputs)
    record_property("error", found := error(logits, ask(model, inputs)))
    assert found < 1e-4
    norm = model.resnet.encoder.stages[0].layers[0].layer[0].normalization
    mean = stats["stage0_block0"]["conv0"]["norm"]["mean"]
    assert error(mean, norm.running_mean.numpy()) < 1e-5


def read_training_form(folder, config):
    specs = jax.eval_shape(
        functools.partial(resnet.init_train, config), jax.random.key(0)
    )
    return resnet.checkpoint.read_variables(folder, specs, resnet._torch_name)


@pytest.mark.parametrize("name", ["basic", "bottleneck"])
def test_half_precision_agrees_within_its_own(tmp_path, record_property, name):
    """Both in bfloat16 differ from float32, and from each other, by its roundings."""
    model = save(tmp_path, SMALL | CONFIGS[name])
    inputs = images(3, 64, 64)
    expected = ask(model, inputs)
    model.to(torch.bfloat16).save_pretrained(tmp_path)
    config, params = resnet.load(tmp_path)
    assert all(leaf.dtype == jnp.float32 for leaf in jax.tree.leaves(params))
    half = dataclasses.replace(config, dtype=jnp.bfloat16)
    logits = jax.jit(functools.partial(resnet.apply, half))(params, inputs)
    record_property("error", found := error(logits, expected))
    record_property("oracle_error", error(ask(model, inputs), expected))
    # Some 12 layers of roundings of 2^-9 each.
    assert found < 0.03
