import dataclasses
import functools
import json
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from models import mobilenet_v2

FULL = mobilenet_v2.MOBILENET_V2
PUBLISHED = [
    (FULL, 3_504_872),
    (dataclasses.replace(FULL, num_classes=1001), 3_506_153),
    (mobilenet_v2.TINY, 1_690),
    (mobilenet_v2.TINY_DEEP, 3_914),
]
DILATED = dataclasses.replace(
    mobilenet_v2.TINY_DEEP,
    output_stride=4,
    is_first_expanded=True,
    is_padding_same=False,
)


def num_values(tree):
    return sum(leaf.size for leaf in jax.tree.leaves(tree))


def variables_of(config, seed=0):
    """Return training variables whose every leaf is random, variances positive."""
    specs = jax.eval_shape(
        functools.partial(mobilenet_v2.init_train, config), jax.random.key(0)
    )
    rng = np.random.default_rng(seed)

    def draw(path, spec):
        fan_in = np.prod(spec.shape[:-1]) if len(spec.shape) > 1 else 1
        values = rng.normal(size=spec.shape) / np.sqrt(fan_in)
        is_positive = path[-1].key in ("var", "scale")
        return jnp.float32(np.abs(values) + 0.5 if is_positive else values)

    return jax.tree_util.tree_map_with_path(draw, specs)


def images(config, num_rows, seed=0):
    rng = np.random.default_rng([seed, num_rows])
    return rng.normal(size=(num_rows, *config.input_shape)).astype(np.float32)


@functools.partial(jax.jit, static_argnums=0)
def apply(config, params, inputs):
    return mobilenet_v2.apply(config, params, inputs)


def assert_close(actual, expected, tolerance):
    limit = tolerance * np.abs(np.asarray(expected, np.float32)).max()
    np.testing.assert_allclose(actual, expected, rtol=0, atol=limit)


@pytest.mark.parametrize(("config", "count"), PUBLISHED)
def test_the_training_form_has_the_published_number_of_parameters(config, count):
    init = functools.partial(mobilenet_v2.init_train, config)
    specs = jax.eval_shape(init, jax.random.key(0))
    assert num_values(specs["params"]) == count
    assert config.num_params == count


def test_the_inference_form_has_a_bias_for_each_normalization():
    key = jax.random.key(0)
    specs = jax.eval_shape(functools.partial(mobilenet_v2.init, FULL), key)
    train = jax.eval_shape(functools.partial(mobilenet_v2.init_train, FULL), key)
    # A scale and a bias became one bias, and a mean and a variance nothing.
    num_norm_values = num_values(train["batch_stats"])
    assert num_values(specs) == FULL.num_params - num_norm_values // 2


@pytest.mark.parametrize(
    ("change", "stem", "last"),
    [
        ({}, 32, 1280),
        ({"multiplier": 0.35}, 16, 1280),  # 11.2 would lose a tenth as 8
        ({"multiplier": 0.35, "is_head_thinned": True}, 16, 448),
        ({"multiplier": 1.4}, 48, 1792),  # 44.8
        ({"multiplier": 0.1, "min_channels": 24}, 24, 1280),
        ({"multiplier": 0.5, "divisor": 3}, 15, 1280),  # 16 loses less than a tenth
    ],
)
def test_numbers_of_channels_are_rounded_as_the_authors_do(change, stem, last):
    config = dataclasses.replace(FULL, **change)
    specs = jax.eval_shape(
        functools.partial(mobilenet_v2.init_train, config), jax.random.key(0)
    )["params"]
    assert specs["stem"]["conv"]["kernel"].shape[-1] == stem
    assert specs["last"]["conv"]["kernel"].shape[-1] == last
    assert num_values(specs) == config.num_params


@pytest.mark.parametrize("config", [mobilenet_v2.TINY_DEEP, DILATED])
def test_folding_a_batchs_statistics_gives_the_logits_of_training_on_it(config):
    variables = variables_of(config)
    inputs = images(config, 4)
    # A running mean of momentum m that starts at nothing is 1 - m of the batch's.
    variables["batch_stats"] = jax.tree.map(jnp.zeros_like, variables["batch_stats"])
    apply_train = jax.jit(functools.partial(mobilenet_v2.apply_train, config))
    logits, new = apply_train(variables, inputs)
    stats = jax.tree.map(lambda leaf: leaf / (1 - 0.997), new)
    params = mobilenet_v2.fold(
        config, {"params": variables["params"], "batch_stats": stats}
    )
    assert_close(apply(config, params, inputs), logits, 1e-5)


def test_rows_of_the_inference_form_do_not_depend_on_each_other():
    config = mobilenet_v2.TINY
    params = mobilenet_v2.fold(config, variables_of(config))
    inputs = images(config, 3)
    alone = [apply(config, params, inputs[i : i + 1]) for i in range(3)]
    together = apply(config, params, inputs)
    assert_close(together, np.concatenate(alone), 1e-6)


@pytest.mark.parametrize("is_cast", [False, True])
def test_half_precision_stays_near(is_cast):
    config = mobilenet_v2.TINY
    half = dataclasses.replace(config, dtype=jnp.bfloat16)
    params = mobilenet_v2.fold(config, variables_of(config))
    inputs = images(config, 2)
    expected = apply(config, params, inputs)
    if is_cast:
        params = jax.tree.map(lambda leaf: leaf.astype(jnp.bfloat16), params)
    logits = apply(half, params, inputs)
    assert (logits.shape, logits.dtype) == ((2, 10), jnp.float32)
    assert_close(logits, expected, 0.03)


def test_a_step_of_training_lowers_the_loss():
    config = mobilenet_v2.TINY
    variables = variables_of(config)
    inputs, labels = images(config, 8), jnp.arange(8)

    @jax.jit
    @jax.value_and_grad
    def loss(params):
        state = {"params": params, "batch_stats": variables["batch_stats"]}
        scores = jax.nn.log_softmax(mobilenet_v2.apply_train(config, state, inputs)[0])
        return -scores[labels, labels].mean()

    before, gradient = loss(variables["params"])
    params = jax.tree.map(lambda p, g: p - 0.01 * g, variables["params"], gradient)
    assert loss(params)[0] < before


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"num_classes": 0}, "sizes must be positive integers"),
        ({"divisor": None}, "sizes must be positive integers"),
        ({"input_shape": (224, 3)}, "input_shape have three"),
        ({"multiplier": 0.0}, "must be positive"),
        ({"multiplier": float("nan")}, "must be positive"),
        ({"stages": ((16, 2, 1),)}, "the first one block of stride 1"),
        ({"stages": ((16, 1, 1), (8, 1, 3))}, "must have strides of 1 or 2"),
    ],
)
def test_a_config_that_is_no_mobilenet_is_refused(change, message):
    with pytest.raises(ValueError, match=f"`mobilenet_v2.Config`: .*{message}"):
        dataclasses.replace(FULL, **change)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"model_type": "mobilenet_v1"}, "model_type 'mobilenet_v1'; only 'mobilen"),
        ({"hidden_act": "relu"}, "hidden_act 'relu'; only 'relu6'"),
        ({"depth_multiplier": "1"}, "setting of another type"),
        ({"image_size": [8]}, "input_shape have three"),
    ],
)
def test_a_config_that_this_family_has_not_is_refused(tmp_path, settings, message):
    (tmp_path / "config.json").write_text(json.dumps(settings))
    with pytest.raises(ValueError, match=re.escape(message)):
        mobilenet_v2.load(tmp_path)


@pytest.mark.parametrize("is_first_expanded", [False, True])
def test_the_stored_layout_is_what_the_hub_calls_it(tmp_path, is_first_expanded):
    safetensors = pytest.importorskip("safetensors.numpy", reason="to write a file")
    safetensors.save_file({}, tmp_path / "model.safetensors")
    settings = {
        "first_layer_is_expansion": not is_first_expanded,
        "id2label": {str(i): f"class {i}" for i in range(1001)},
    }
    (tmp_path / "config.json").write_text(json.dumps(settings))
    with pytest.raises(ValueError) as error:
        mobilenet_v2.load(tmp_path)
    layers = ["conv_stem.first_conv", "conv_stem.conv_3x3", "conv_stem.reduce_1x1"]
    layers += ["conv_stem.expand_1x1"] * is_first_expanded + ["conv_1x1"]
    for index in range(16):
        for name in ("expand_1x1", "conv_3x3", "reduce_1x1"):
            layers.append(f"layer.{index}.{name}")
    leaves = [
        "convolution.weight",
        "normalization.weight",
        "normalization.bias",
        "normalization.running_mean",
        "normalization.running_var",
    ]
    expected = {f"mobilenet_v2.{name}.{leaf}" for name in layers for leaf in leaves}
    expected |= {"classifier.weight", "classifier.bias"}
    found = re.findall(r"missing: '(.*)'", str(error.value))
    assert sorted(found) == sorted(expected)
    assert "'classifier.weight' (1001, 1280)" in str(error.value)
    assert "'mobilenet_v2.layer.0.conv_3x3.convolution.weight' (96, 1, 3, 3)" in str(
        error.value
    )
