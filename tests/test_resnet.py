import dataclasses
import functools
import json
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from models import resnet

PUBLISHED = [
    (resnet.RESNET18, 11_689_512),
    (resnet.RESNET34, 21_797_672),
    (resnet.RESNET50, 25_557_032),
    (resnet.TINY, 6_226),
    (resnet.TINY_DEEP, 12_082),
]
BOTTLENECK = dataclasses.replace(
    resnet.TINY,
    block="bottleneck",
    is_stride_first=True,
    is_first_stage_halved=True,
)


def num_values(tree):
    return sum(leaf.size for leaf in jax.tree.leaves(tree))


def variables_of(config, seed=0):
    """Return training variables whose every leaf is random, variances positive."""
    specs = jax.eval_shape(
        functools.partial(resnet.init_train, config), jax.random.key(0)
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
    return resnet.apply(config, params, inputs)


def assert_close(actual, expected, tolerance):
    limit = tolerance * np.abs(np.asarray(expected, np.float32)).max()
    np.testing.assert_allclose(actual, expected, rtol=0, atol=limit)


@pytest.mark.parametrize(("config", "count"), PUBLISHED)
def test_the_training_form_has_the_published_number_of_parameters(config, count):
    init = functools.partial(resnet.init_train, config)
    specs = jax.eval_shape(init, jax.random.key(0))
    assert num_values(specs["params"]) == count
    assert config.num_params == count


@pytest.mark.parametrize("config", [resnet.RESNET50, resnet.TINY])
def test_the_inference_form_has_a_bias_for_each_normalization(config):
    key = jax.random.key(0)
    specs = jax.eval_shape(functools.partial(resnet.init, config), key)
    train = jax.eval_shape(functools.partial(resnet.init_train, config), key)
    # A scale and a bias became one bias, and a mean and a variance nothing.
    num_norm_values = num_values(train["batch_stats"])
    assert num_values(specs) == config.num_params - num_norm_values // 2


@pytest.mark.parametrize("config", [resnet.TINY_DEEP, BOTTLENECK])
def test_folding_a_batchs_statistics_gives_the_logits_of_training_on_it(config):
    variables = variables_of(config)
    inputs = images(config, 4)
    # A running mean of momentum 0.9 that starts at nothing is a tenth of the batch's.
    variables["batch_stats"] = jax.tree.map(jnp.zeros_like, variables["batch_stats"])
    apply_train = jax.jit(functools.partial(resnet.apply_train, config))
    logits, new = apply_train(variables, inputs)
    stats = jax.tree.map(lambda leaf: leaf / (1 - 0.9), new)
    params = resnet.fold({"params": variables["params"], "batch_stats": stats})
    assert_close(apply(config, params, inputs), logits, 1e-5)


def test_rows_of_the_inference_form_do_not_depend_on_each_other():
    config = resnet.TINY
    params = resnet.fold(variables_of(config))
    inputs = images(config, 3)
    alone = [apply(config, params, inputs[i : i + 1]) for i in range(3)]
    together = apply(config, params, inputs)
    assert_close(together, np.concatenate(alone), 1e-6)


@pytest.mark.parametrize("is_cast", [False, True])
def test_half_precision_stays_near(is_cast):
    config = resnet.TINY
    half = dataclasses.replace(config, dtype=jnp.bfloat16)
    params = resnet.fold(variables_of(config))
    inputs = images(config, 2)
    expected = apply(config, params, inputs)
    if is_cast:
        params = jax.tree.map(lambda leaf: leaf.astype(jnp.bfloat16), params)
    logits = apply(half, params, inputs)
    assert (logits.shape, logits.dtype) == ((2, 10), jnp.float32)
    assert_close(logits, expected, 0.03)


def test_fresh_parameters_serve_images_of_any_size():
    config = dataclasses.replace(resnet.TINY, depths=(1,), widths=(8,))
    params = jax.jit(functools.partial(resnet.init, config))(jax.random.key(0))
    logits = apply(config, params, jnp.ones((1, 17, 40, 3)))
    assert logits.shape == (1, 10)
    assert jnp.isfinite(logits).all()


def test_a_step_of_training_lowers_the_loss():
    config = resnet.TINY
    variables = variables_of(config)
    inputs, labels = images(config, 8), jnp.arange(8)

    @jax.jit
    @jax.value_and_grad
    def loss(params):
        state = {"params": params, "batch_stats": variables["batch_stats"]}
        scores = jax.nn.log_softmax(resnet.apply_train(config, state, inputs)[0])
        return -scores[labels, labels].mean()

    before, gradient = loss(variables["params"])
    params = jax.tree.map(lambda p, g: p - 0.01 * g, variables["params"], gradient)
    assert loss(params)[0] < before


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"block": "wide"}, "block is 'wide'; pass 'basic' or 'bottleneck'"),
        ({"depths": (2, 2)}, "must be of the same stages"),
        ({"depths": (), "widths": ()}, "must be of the same stages"),
        ({"num_classes": 0}, "sizes must be positive integers"),
        ({"depths": (3, 4, 6.0, 3)}, "sizes must be positive integers"),
        ({"depths": (3, 4, 10**9, 3)}, "must add up to 1000 blocks at most"),
        ({"widths": (2, 4, 8, 16)}, "be 4 at least"),
    ],
)
def test_a_config_that_is_no_resnet_is_refused(change, message):
    with pytest.raises(ValueError, match=f"`resnet.Config`: .*{re.escape(message)}"):
        dataclasses.replace(resnet.RESNET50, **change)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"model_type": "vit"}, "model_type 'vit'; only 'resnet'"),
        ({"hidden_act": "gelu"}, "hidden_act 'gelu'; only 'relu'"),
        ({"depths": 3}, "setting of another type"),
        ({"embedding_size": "64"}, "sizes must be positive integers"),
    ],
)
def test_a_config_that_this_family_has_not_is_refused(tmp_path, settings, message):
    (tmp_path / "config.json").write_text(json.dumps(settings))
    with pytest.raises(ValueError, match=message):
        resnet.load(tmp_path)


def test_the_stored_layout_is_what_the_hub_calls_it(tmp_path):
    safetensors = pytest.importorskip("safetensors.numpy", reason="to write a file")
    safetensors.save_file({}, tmp_path / "model.safetensors")
    settings = {
        "layer_type": "bottleneck",
        "depths": [1],
        "hidden_sizes": [8],
        "embedding_size": 4,
        "id2label": {"0": "cat", "1": "dog", "2": "cow"},
    }
    (tmp_path / "config.json").write_text(json.dumps(settings))
    with pytest.raises(ValueError) as error:
        resnet.load(tmp_path)
    block = "resnet.encoder.stages.0.layers.0"
    layers = {
        "resnet.embedder.embedder": (4, 3, 7, 7),
        f"{block}.layer.0": (2, 4, 1, 1),
        f"{block}.layer.1": (2, 2, 3, 3),
        f"{block}.layer.2": (8, 2, 1, 1),
        f"{block}.shortcut": (8, 4, 1, 1),
    }
    expected = {"'classifier.1.weight' (3, 8)", "'classifier.1.bias' (3,)"}
    for name, shape in layers.items():
        expected.add(f"'{name}.convolution.weight' {shape}")
        for leaf in ("weight", "bias", "running_mean", "running_var"):
            expected.add(f"'{name}.normalization.{leaf}' {shape[:1]}")
    lines = str(error.value).splitlines()[1:]
    assert {line.removeprefix("  missing: ") for line in lines} == expected
