"""BERT: published sizes, padding without influence, and the files it reads."""

import dataclasses
import functools
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from models import bert
from tests.cases import assert_bitwise

CLASSIFIER = dataclasses.replace(bert.TINY, num_classes=3)
KINDS = {
    "mean": bert.TINY,
    "first": dataclasses.replace(bert.TINY, pooling="first"),
    "classes": CLASSIFIER,
    "sibling": bert.TINY_DEEP,
}
over_kinds = pytest.mark.parametrize("config", KINDS.values(), ids=list(KINDS))
# What transformers.BertModel calls the tensors of one layer, typed by hand.
STORED = {
    "embeddings.word_embeddings.weight": (7, 4),
    "embeddings.position_embeddings.weight": (5, 4),
    "embeddings.token_type_embeddings.weight": (2, 4),
    "embeddings.LayerNorm.weight": (4,),
    "embeddings.LayerNorm.bias": (4,),
    "encoder.layer.0.attention.self.query.weight": (4, 4),
    "encoder.layer.0.attention.self.query.bias": (4,),
    "encoder.layer.0.attention.self.key.weight": (4, 4),
    "encoder.layer.0.attention.self.key.bias": (4,),
    "encoder.layer.0.attention.self.value.weight": (4, 4),
    "encoder.layer.0.attention.self.value.bias": (4,),
    "encoder.layer.0.attention.output.dense.weight": (4, 4),
    "encoder.layer.0.attention.output.dense.bias": (4,),
    "encoder.layer.0.attention.output.LayerNorm.weight": (4,),
    "encoder.layer.0.attention.output.LayerNorm.bias": (4,),
    "encoder.layer.0.intermediate.dense.weight": (6, 4),
    "encoder.layer.0.intermediate.dense.bias": (6,),
    "encoder.layer.0.output.dense.weight": (4, 6),
    "encoder.layer.0.output.dense.bias": (4,),
    "encoder.layer.0.output.LayerNorm.weight": (4,),
    "encoder.layer.0.output.LayerNorm.bias": (4,),
}
POOLER = {"pooler.dense.weight": (4, 4), "pooler.dense.bias": (4,)}
HEAD = {"classifier.weight": (3, 4), "classifier.bias": (3,)}
SETTINGS = {
    "model_type": "bert",
    "vocab_size": 7,
    "hidden_size": 4,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "intermediate_size": 6,
    "max_position_embeddings": 5,
    "id2label": {"0": "a", "1": "b", "2": "c"},
}


@functools.cache
def params_of(config):
    return jax.jit(functools.partial(bert.init, config))(jax.random.key(0))


apply = jax.jit(bert.apply, static_argnums=0)
encode = jax.jit(bert.encode, static_argnums=0)


def draw(config, lengths, num_tokens, seed=0):
    rng = np.random.default_rng(seed)
    ids = rng.integers(0, config.vocab, (len(lengths), num_tokens), np.int32)
    mask = np.arange(num_tokens) < np.asarray(lengths)[:, None]
    return {"ids": ids, "mask": mask.astype(np.int32)}


def num_params(config):
    specs = jax.eval_shape(functools.partial(bert.init, config), jax.random.key(0))
    return sum(leaf.size for leaf in jax.tree.leaves(specs))


@pytest.mark.parametrize(
    ("config", "published"),
    [
        (bert.TINY, 6_320),
        (bert.TINY_DEEP, 16_248),
        (CLASSIFIER, 6_320 + 51),
        (bert.MINILM_L6, 22_713_216 - 147_840),
        (dataclasses.replace(bert.MINILM_L6, pooling="first"), 22_713_216),
        (bert.BERT_BASE, 109_482_240),
    ],
)
def test_the_number_of_parameters_is_the_published_one(config, published):
    assert num_params(config) == config.num_params == published


@over_kinds
def test_what_a_masked_place_holds_changes_no_bit(config):
    inputs = draw(config, (7, 1, 4), 9)
    masked = np.where(inputs["mask"], 0, [[-1], [config.vocab + 5], [2**31 - 1]])
    other = inputs | {"ids": np.where(inputs["mask"], inputs["ids"], masked)}
    other["ids"] = other["ids"].astype(np.int32)
    params = params_of(config)
    assert_bitwise(apply(config, params, other), apply(config, params, inputs))


@pytest.mark.parametrize("config", [bert.TINY, CLASSIFIER], ids=["mean", "classes"])
def test_a_padded_row_answers_as_it_does_alone(config):
    inputs = draw(config, (7, 1, 4), 9)
    together = apply(config, params_of(config), inputs)
    row = {name: x[2:, :4] for name, x in inputs.items()}
    alone = apply(config, params_of(config), row)
    np.testing.assert_allclose(together[2:], alone, atol=2e-6)


@over_kinds
def test_a_row_that_is_all_masked_is_finite(config):
    out = apply(config, params_of(config), draw(config, (0, 3, 9), 9))
    assert np.isfinite(out).all()


def test_a_row_that_is_all_masked_has_a_finite_gradient():
    config, inputs = bert.TINY, draw(bert.TINY, (0, 3, 9), 9)
    grads = jax.grad(lambda p: apply(config, p, inputs)[:, 0].sum())(params_of(config))
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(grads))


def test_the_embedding_has_length_one_and_is_zero_if_all_is_masked():
    out = apply(bert.TINY, params_of(bert.TINY), draw(bert.TINY, (5, 0, 2), 9))
    np.testing.assert_allclose(np.linalg.norm(out, axis=1), [1, 0, 1], atol=1e-6)


def test_encode_pool_and_normalize_are_apply():
    config, inputs = bert.TINY, draw(bert.TINY, (5, 2, 9), 9)
    states = encode(config, params_of(config), inputs)
    assert states.shape == (3, 9, 16)
    pooled = bert.mean_pool(states, inputs["mask"])
    whole = apply(config, params_of(config), inputs)
    np.testing.assert_allclose(bert.normalize(pooled), whole, atol=1e-6)


def test_the_trunk_is_read_alone():
    inputs = draw(CLASSIFIER, (5, 2, 9), 9)
    params = params_of(CLASSIFIER)
    trunk = {"trunk": params["trunk"]}
    assert_bitwise(
        encode(CLASSIFIER, trunk, inputs), encode(CLASSIFIER, params, inputs)
    )


def test_segments_are_zero_unless_given():
    config, inputs = bert.TINY, draw(bert.TINY, (5, 2, 9), 9)
    run = functools.partial(apply, config, params_of(config))
    zeros = np.zeros_like(inputs["ids"])
    assert_bitwise(run(inputs | {"types": zeros}), run(inputs))
    assert np.abs(run(inputs | {"types": zeros + 1}) - run(inputs)).max() > 1e-3


@pytest.mark.parametrize("config", [bert.TINY, CLASSIFIER], ids=["mean", "classes"])
def test_bfloat16_answers_within_its_rounding(config):
    inputs = draw(config, (7, 1, 4), 9)
    narrow = dataclasses.replace(config, dtype=jnp.bfloat16)
    expected = apply(config, params_of(config), inputs)
    actual = apply(narrow, params_of(config), inputs)
    assert actual.dtype == jnp.float32
    np.testing.assert_allclose(actual, expected, atol=0.06)


def test_more_tokens_than_positions_are_refused():
    inputs = draw(bert.TINY, (17,), 17)
    for call in (bert.apply, bert.encode):
        with pytest.raises(ValueError, match="17 tokens, the model 16 positions"):
            call(bert.TINY, params_of(bert.TINY), inputs)


@pytest.mark.parametrize(
    "wrong",
    [
        {"heads": 5},
        {"layers": 0},
        {"layers": 10**9},
        {"width": "16"},
        {"pooling": "max"},
        {"vocab": 2**31},
    ],
    ids=str,
)
def test_a_config_refuses_what_makes_no_network(wrong):
    with pytest.raises(ValueError, match=r"`bert\.Config`"):
        dataclasses.replace(bert.TINY, **wrong)


def write(folder, shapes, **settings):
    numpy_files = pytest.importorskip("safetensors.numpy", reason="needs safetensors")
    rng = np.random.default_rng(0)
    tensors = {n: rng.normal(size=s).astype(np.float32) for n, s in shapes.items()}
    numpy_files.save_file(tensors, folder / "model.safetensors")
    (folder / "config.json").write_text(json.dumps(SETTINGS | settings))
    return tensors


def spelled(name, prefix, scale, shift):
    name = name.replace("Norm.weight", f"Norm.{scale}")
    return prefix + name.replace("Norm.bias", f"Norm.{shift}")


@pytest.mark.parametrize("norm", [("weight", "bias"), ("gamma", "beta")], ids=str)
@pytest.mark.parametrize("prefix", ["", "bert."])
@pytest.mark.parametrize("pooling", ["mean", "first"])
def test_load_finds_every_tensor_under_each_spelling(tmp_path, pooling, prefix, norm):
    spellings = {name: spelled(name, prefix, *norm) for name in STORED | POOLER}
    shapes = {spellings[n]: shape for n, shape in (STORED | POOLER).items()}
    unread = {prefix + "embeddings.position_ids": (1, 5), "cls.predictions.bias": (7,)}
    stored = write(tmp_path, shapes | unread)
    config, params = bert.load(tmp_path, pooling=pooling)
    assert config == bert.Config(7, 4, 1, 2, 6, 5, 2, pooling=pooling)
    assert jax.tree.map(jnp.shape, params) == jax.tree.map(jnp.shape, params_of(config))
    query = stored[spellings["encoder.layer.0.attention.self.query.weight"]]
    assert_bitwise(params["trunk"]["layer_0"]["query"]["kernel"], query.T)
    norm_2 = stored[spellings["encoder.layer.0.output.LayerNorm.weight"]]
    assert_bitwise(params["trunk"]["layer_0"]["norm_2"]["scale"], norm_2)
    assert ("pooler" in params) == (pooling == "first")


def test_load_of_a_classifier_brings_its_head(tmp_path):
    shapes = {f"bert.{name}": shape for name, shape in (STORED | POOLER).items()}
    architecture = "BertForSequenceClassification"
    stored = write(tmp_path, shapes | HEAD, architectures=[architecture])
    config, params = bert.load(tmp_path)
    assert (config.pooling, config.num_classes) == ("first", 3)
    assert_bitwise(params["head"]["kernel"], stored["classifier.weight"].T)


def test_load_names_all_tensors_at_fault_in_the_spelling_of_the_file(tmp_path):
    shapes = {f"bert.{name}": shape for name, shape in STORED.items()}
    del shapes["bert.encoder.layer.0.output.dense.bias"]
    shapes["bert.encoder.layer.0.intermediate.dense.bias"] = (5,)
    shapes["bert.surplus"] = (1,)
    write(tmp_path, shapes)
    with pytest.raises(ValueError, match="bert") as caught:
        bert.load(tmp_path)
    for name in ("output.dense.bias", "intermediate.dense.bias"):
        assert f"'bert.encoder.layer.0.{name}'" in str(caught.value)
    assert "'bert.surplus'" in str(caught.value)
    assert "word_embeddings" not in str(caught.value)


@pytest.mark.parametrize(
    "setting",
    [
        {"model_type": "roberta"},
        {"hidden_act": "relu"},
        {"position_embedding_type": "relative_key"},
    ],
    ids=str,
)
def test_load_refuses_a_model_that_it_has_no_code_for(tmp_path, setting):
    (tmp_path / "config.json").write_text(json.dumps(SETTINGS | setting))
    with pytest.raises(ValueError, match=next(iter(setting))):
        bert.load(tmp_path)
