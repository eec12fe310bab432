"""LoRA: adapters answer as the merged model would, and never form it."""

import dataclasses
import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from models import bert, cnn, gpt, lora, lstm, mlp
from tests.cases import assert_bitwise

WIDE = mlp.Config(widths=(48,))
IDS = np.arange(10, dtype=np.int32).reshape(2, 5)
IMAGES = np.random.default_rng(0).normal(size=(2, 8, 8)).astype(np.float32)
SERIES = IMAGES[:, :, :6]
# Model, config, inputs, and the trained values of rank 2: 2 (in + out) a kernel.
MODELS = {
    "mlp": (mlp, WIDE, IMAGES, 2 * (64 + 48) + 2 * (48 + 10)),
    "cnn": (cnn, cnn.TINY, IMAGES, 2 * (128 + 10)),
    "lstm": (lstm, lstm.TINY, SERIES, 2 * (6 + 32) + 2 * (8 + 32) + 2 * (8 + 4)),
    "gru": (lstm, lstm.TINY_GRU, SERIES, 2 * (6 + 24) + 2 * (8 + 24) + 2 * (8 + 4)),
    "bert": (
        bert,
        bert.TINY,
        {"ids": IDS, "mask": IDS < 8},
        2 * (4 * 2 * (16 + 16) + 2 * 2 * (16 + 32)),
    ),
    "gpt": (
        gpt,
        gpt.TINY,
        IDS,
        2 * (2 * (16 + 48) + 2 * (16 + 16) + 2 * 2 * (16 + 64)),
    ),
}
over_models = pytest.mark.parametrize(
    ("model", "config", "inputs", "num_trained"), MODELS.values(), ids=list(MODELS)
)
TINY = lora.TINY


@functools.cache
def params_of(model, config):
    return jax.jit(functools.partial(model.init, config))(jax.random.key(0))


def trained(adapters, seed=0):
    """Return adapters whose B is no longer zero."""
    rng = np.random.default_rng(seed)
    return jax.tree.map(lambda x: 0.3 * rng.normal(size=x.shape).astype("f"), adapters)


@over_models
def test_adapters_answer_as_the_merged_model_does(model, config, inputs, num_trained):
    params, run = params_of(model, config), functools.partial(model.apply, config)
    fresh = lora.init(TINY, jax.random.key(1), params)
    assert lora.num_params(fresh) == num_trained
    apply = jax.jit(lambda p, ab, x: lora.apply(TINY, run, p, ab, x))
    adapters = trained(fresh)
    actual = apply(params, adapters, inputs)
    expected = jax.jit(run)(lora.merge(TINY, params, adapters), inputs)
    np.testing.assert_allclose(actual, expected, rtol=1e-5, atol=1e-5)
    without = np.asarray(apply(params, fresh, inputs))
    assert np.abs(without - actual).max() > 0.01
    np.testing.assert_allclose(without, jax.jit(run)(params, inputs), atol=1e-6)


def test_merge_keeps_every_other_leaf_and_the_base():
    config = dataclasses.replace(TINY, targets="query$")
    params = params_of(bert, bert.TINY)
    before = jax.tree.map(np.array, params)
    adapters = trained(lora.init(config, jax.random.key(1), params))
    assert sorted(adapters) == ["trunk/layer_0/query", "trunk/layer_1/query"]
    merged = lora.merge(config, params, adapters)
    old, new = (jax.tree_util.tree_leaves_with_path(p) for p in (params, merged))
    for (path, a), (_, b) in zip(old, new, strict=True):
        name = jax.tree_util.keystr(path, simple=True, separator="/")
        assert (a is b) == (not name.endswith("query/kernel")), name
    assert_bitwise(jax.tree.map(np.array, params), before)


def test_no_merged_kernel_is_formed():
    params = params_of(mlp, WIDE)
    adapters = lora.init(TINY, jax.random.key(1), params)
    run = functools.partial(mlp.apply, WIDE)
    apply = functools.partial(lora.apply, TINY, run)
    # A jaxpr names a shape where a value is made: for the kernels, at its head only.
    head, body = str(jax.make_jaxpr(apply)(params, adapters, IMAGES)).split(" let", 1)
    for shape in ("f32[64,48]", "f32[48,10]"):
        assert (head.count(shape), body.count(shape)) == (1, 0)
    merge = functools.partial(lora.merge, TINY)
    assert "f32[64,48]" in str(jax.make_jaxpr(merge)(params, adapters)).split(" let")[1]


def test_only_the_adapters_are_trained_and_b_moves_first():
    params, run = params_of(mlp, WIDE), functools.partial(mlp.apply, WIDE)

    def loss(adapters):
        return (lora.apply(TINY, run, params, adapters, IMAGES) ** 2).sum()

    grads = jax.grad(loss)(lora.init(TINY, jax.random.key(1), params))
    for path in ("Dense_0", "Dense_1"):
        assert not np.asarray(grads[path]["a"]).any()
        assert np.asarray(grads[path]["b"]).any()


def test_tenants_of_unlike_rank_share_one_base():
    params, run = params_of(mlp, WIDE), functools.partial(mlp.apply, WIDE)
    configs = {"narrow": TINY, "wide": lora.TINY_WIDE}
    adapters = {
        name: trained(lora.init(config, jax.random.key(1), params), seed)
        for seed, (name, config) in enumerate(configs.items())
    }

    @jax.jit
    def both(base, adapters):
        return {
            name: lora.apply(config, run, base, adapters[name], IMAGES)
            for name, config in configs.items()
        }

    for name, actual in both(params, adapters).items():
        expected = run(lora.merge(configs[name], params, adapters[name]), IMAGES)
        np.testing.assert_allclose(actual, expected, rtol=1e-5, atol=1e-5)


def test_bfloat16_stays_bfloat16():
    params = {"Dense_0": {"kernel": jnp.ones((4, 3), jnp.bfloat16)}}
    adapters = lora.init(TINY, jax.random.key(1), params)
    merged = lora.merge(TINY, params, adapters)
    assert merged["Dense_0"]["kernel"].dtype == jnp.bfloat16


@pytest.mark.parametrize(
    ("config", "published"),
    [
        # 6 layers of query and value, r (384 + 384) each.
        (lora.ATTENTION, 6 * 2 * 8 * 768),
        (lora.Config(rank=4, targets="query$"), 6 * 4 * 768),
        (lora.Config(rank=1, targets="layer_0/up$"), 384 + 1536),
    ],
)
def test_the_number_of_trained_values_of_minilm(config, published):
    def init(key):
        return lora.init(config, key, bert.init(bert.MINILM_L6, key))

    assert lora.num_params(jax.eval_shape(init, jax.random.key(0))) == published


def test_targets_that_match_nothing_are_refused():
    config = lora.Config(targets="no_such_layer")
    with pytest.raises(ValueError, match=r"none of the dense kernels.*Dense_0"):
        lora.init(config, jax.random.key(0), params_of(mlp, WIDE))


def test_adapters_of_another_model_are_refused():
    params, run = params_of(mlp, WIDE), functools.partial(mlp.apply, WIDE)
    adapters = lora.init(TINY, jax.random.key(0), params_of(bert, bert.TINY))
    with pytest.raises(ValueError, match=r"`lora\.merge`: no dense layer at .*trunk"):
        lora.merge(TINY, params, adapters)
    with pytest.raises(ValueError, match=r"`lora\.apply`: no dense layer at .*trunk"):
        lora.apply(TINY, run, params, adapters, IMAGES)


def test_a_jitted_model_is_refused():
    params = params_of(mlp, WIDE)
    adapters = lora.init(TINY, jax.random.key(0), params)
    run = jax.jit(functools.partial(mlp.apply, WIDE))
    with pytest.raises(ValueError, match="apply_fn is jitted"):
        lora.apply(TINY, run, params, adapters, IMAGES)


def test_a_config_refuses_what_adapts_nothing():
    with pytest.raises(ValueError, match="rank is 0; pass 1 or more"):
        lora.Config(rank=0)
    with pytest.raises(re.error):
        lora.Config(targets="(")
