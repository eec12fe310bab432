"""GPT-2: published sizes, a cache that changes nothing, and the files it reads."""

import dataclasses
import functools
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax

from models import gpt
from tests.cases import assert_bitwise

over_kinds = pytest.mark.parametrize(
    "config", [gpt.TINY, gpt.TINY_DEEP], ids=["tiny", "deep"]
)
# What transformers.GPT2Model calls the tensors of one layer, typed by hand.
STORED = {
    "wte.weight": (7, 4),
    "wpe.weight": (5, 4),
    "h.0.ln_1.weight": (4,),
    "h.0.ln_1.bias": (4,),
    "h.0.attn.c_attn.weight": (4, 12),
    "h.0.attn.c_attn.bias": (12,),
    "h.0.attn.c_proj.weight": (4, 4),
    "h.0.attn.c_proj.bias": (4,),
    "h.0.ln_2.weight": (4,),
    "h.0.ln_2.bias": (4,),
    "h.0.mlp.c_fc.weight": (4, 16),
    "h.0.mlp.c_fc.bias": (16,),
    "h.0.mlp.c_proj.weight": (16, 4),
    "h.0.mlp.c_proj.bias": (4,),
    "ln_f.weight": (4,),
    "ln_f.bias": (4,),
}
SETTINGS = {
    "model_type": "gpt2",
    "vocab_size": 7,
    "n_embd": 4,
    "n_layer": 1,
    "n_head": 2,
    "n_positions": 5,
}
LENGTHS = np.array([6, 1, 9], np.int32)

apply = jax.jit(gpt.apply, static_argnums=0)
prefill = jax.jit(gpt.prefill, static_argnums=0)
decode = jax.jit(gpt.decode, static_argnums=0)


@functools.cache
def params_of(config):
    return jax.jit(functools.partial(gpt.init, config))(jax.random.key(0))


@functools.cache
def scores_of(config):
    return np.asarray(apply(config, params_of(config), tokens(config)))


def tokens(config):
    """Draw three rows that are as long as can be."""
    shape = (3, config.max_positions)
    return np.random.default_rng(0).integers(0, config.vocab, shape, np.int32)


@pytest.mark.parametrize(
    ("config", "published"),
    [(gpt.TINY, 7_760), (gpt.TINY_DEEP, 23_472), (gpt.GPT2, 124_439_808)],
)
def test_the_number_of_parameters_is_the_published_one(config, published):
    specs = jax.eval_shape(functools.partial(gpt.init, config), jax.random.key(0))
    assert sum(leaf.size for leaf in jax.tree.leaves(specs)) == published
    assert config.num_params == published


def test_a_token_changes_no_score_before_it():
    config, ids = gpt.TINY, tokens(gpt.TINY)
    ids[:, 5:] = 0
    out = apply(config, params_of(config), ids)
    assert_bitwise(np.asarray(out)[:, :5], scores_of(config)[:, :5])
    assert (np.abs(out - scores_of(config))[:, 5:].max((1, 2)) > 1e-3).all()


@over_kinds
def test_prefill_then_decode_scores_as_apply_does(config):
    ids, rows = tokens(config), np.arange(3)
    params, expected = params_of(config), scores_of(config)
    logits, cache = prefill(config, params, ids[:, :9], LENGTHS)
    np.testing.assert_allclose(logits, expected[rows, LENGTHS - 1], atol=5e-6)
    for i in range(3):
        at = LENGTHS + i
        logits, cache = decode(config, params, cache, ids[rows, at])
        np.testing.assert_allclose(logits, expected[rows, at], atol=5e-6)
    assert cache.position.tolist() == (LENGTHS + 3).tolist()


@over_kinds
def test_decode_in_a_scan_from_nothing_scores_as_apply_does(config):
    params, ids = params_of(config), tokens(config)

    def step(cache, ids):
        return gpt.decode(config, params, cache, ids)[::-1]

    start = gpt.empty_cache(config, 3)
    _, logits = jax.jit(lambda xs: lax.scan(step, start, xs))(ids.T)
    np.testing.assert_allclose(logits.swapaxes(0, 1), scores_of(config), atol=5e-6)


def test_prefill_leaves_what_decoding_the_prompt_leaves():
    config, ids = gpt.TINY, tokens(gpt.TINY)
    params = params_of(config)
    _, expected = prefill(config, params, ids[:, :3], np.full(3, 3, np.int32))
    cache = gpt.empty_cache(config, 3)
    for i in range(3):
        _, cache = decode(config, params, cache, ids[:, i])
    jax.tree.map(
        functools.partial(np.testing.assert_allclose, atol=5e-6), cache, expected
    )


def test_padding_of_a_prompt_leaves_no_bit_behind():
    config, ids = gpt.TINY, tokens(gpt.TINY)[:, :9]
    is_prompt = np.arange(9) < LENGTHS[:, None]
    other = np.where(is_prompt, ids, [[-1], [2**31 - 1], [5]]).astype(np.int32)
    params = params_of(config)
    expected = prefill(config, params, ids, LENGTHS)
    assert_bitwise(prefill(config, params, other, LENGTHS), expected)
    for leaf in jax.tree.leaves(expected[1][:2]):
        assert not np.asarray(leaf)[:, :9][~is_prompt].any()
        assert not np.asarray(leaf)[:, 9:].any()


def test_a_full_row_is_nan_and_harms_no_other():
    config, ids = gpt.TINY, tokens(gpt.TINY)
    params = params_of(config)
    _, cache = prefill(config, params, ids[:, :9], LENGTHS)
    expected, _ = decode(config, params, cache, ids[:, 0])
    full = cache._replace(position=cache.position.at[1].set(config.max_positions))
    logits, after = decode(config, params, full, ids[:, 0])
    assert np.isnan(logits[1]).all()
    assert_bitwise(np.asarray(logits)[[0, 2]], np.asarray(expected)[[0, 2]])
    for new, old in zip(
        after.keys + after.values, full.keys + full.values, strict=True
    ):
        assert_bitwise(np.asarray(new)[1], np.asarray(old)[1])


def test_decode_compiles_once_whatever_the_position():
    config, params = gpt.TINY, params_of(gpt.TINY)
    step = jax.jit(functools.partial(gpt.decode, config))
    cache = gpt.empty_cache(config, 2)
    for _ in range(4):
        _, cache = step(params, cache, np.zeros(2, np.int32))
    assert step._cache_size() == 1


def test_bfloat16_answers_within_its_rounding_and_keeps_a_narrow_cache():
    config = dataclasses.replace(gpt.TINY, dtype=jnp.bfloat16)
    ids, params = tokens(config), params_of(gpt.TINY)
    out = apply(config, params, ids)
    assert out.dtype == jnp.float32
    np.testing.assert_allclose(out, scores_of(gpt.TINY), atol=0.15)
    logits, cache = prefill(config, params, ids[:, :9], LENGTHS)
    assert cache.keys[0].dtype == jnp.bfloat16
    np.testing.assert_allclose(logits, out[np.arange(3), LENGTHS - 1], atol=0.15)
    _, after = decode(config, params, cache, ids[:, 0])
    assert [x.dtype for x in jax.tree.leaves(after)] == [
        x.dtype for x in jax.tree.leaves(cache)
    ]


def test_more_tokens_than_positions_are_refused():
    ids = np.zeros((1, 13), np.int32)
    with pytest.raises(ValueError, match="13 tokens, the model 12 positions"):
        gpt.apply(gpt.TINY, params_of(gpt.TINY), ids)
    with pytest.raises(ValueError, match="13 tokens, the model 12 positions"):
        gpt.prefill(gpt.TINY, params_of(gpt.TINY), ids, np.array([1]))


@pytest.mark.parametrize(
    "wrong", [{"heads": 5}, {"layers": 0}, {"layers": 10**9}, {"width": 1.5}], ids=str
)
def test_a_config_refuses_what_makes_no_network(wrong):
    with pytest.raises(ValueError, match=r"`gpt\.Config`"):
        dataclasses.replace(gpt.TINY, **wrong)


def write(folder, shapes, **settings):
    numpy_files = pytest.importorskip("safetensors.numpy", reason="needs safetensors")
    rng = np.random.default_rng(0)
    tensors = {n: rng.normal(size=s).astype(np.float32) for n, s in shapes.items()}
    numpy_files.save_file(tensors, folder / "model.safetensors")
    (folder / "config.json").write_text(json.dumps(SETTINGS | settings))
    return tensors


@pytest.mark.parametrize("prefix", ["", "transformer."])
def test_load_finds_every_tensor_with_and_without_its_prefix(tmp_path, prefix):
    shapes = {prefix + name: shape for name, shape in STORED.items()}
    unread = {prefix + "h.0.attn.bias": (1, 1, 5, 5), "lm_head.weight": (7, 4)}
    stored = write(tmp_path, shapes | unread)
    config, params = gpt.load(tmp_path)
    assert config == gpt.Config(7, 4, 1, 2, 5)
    assert jax.tree.map(jnp.shape, params) == jax.tree.map(jnp.shape, params_of(config))
    kernel = stored[prefix + "h.0.attn.c_attn.weight"]
    assert_bitwise(params["layer_0"]["qkv"]["kernel"], jnp.asarray(kernel))
    scale = stored[prefix + "ln_f.weight"]
    assert_bitwise(params["norm"]["scale"], jnp.asarray(scale))


def test_load_names_all_tensors_at_fault_in_the_spelling_of_the_file(tmp_path):
    shapes = {f"transformer.{name}": shape for name, shape in STORED.items()}
    del shapes["transformer.h.0.ln_2.bias"]
    shapes["transformer.h.0.mlp.c_fc.weight"] = (16, 4)
    write(tmp_path, shapes | {"surplus": (1,)})
    with pytest.raises(ValueError, match="surplus") as caught:
        gpt.load(tmp_path)
    assert "'transformer.h.0.ln_2.bias'" in str(caught.value)
    assert "'transformer.h.0.mlp.c_fc.weight'" in str(caught.value)
    assert "wte" not in str(caught.value)


@pytest.mark.parametrize(
    "setting",
    [
        {"model_type": "gptj"},
        {"activation_function": "relu"},
        {"n_inner": 5},
        {"tie_word_embeddings": False},
        {"scale_attn_by_inverse_layer_idx": True},
    ],
    ids=str,
)
def test_load_refuses_a_model_that_it_has_no_code_for(tmp_path, setting):
    (tmp_path / "config.json").write_text(json.dumps(SETTINGS | setting))
    with pytest.raises(ValueError, match=next(iter(setting))):
        gpt.load(tmp_path)
