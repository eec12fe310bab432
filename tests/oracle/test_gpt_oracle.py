"""Ours against transformers' GPT-2: the same weights, the same tokens."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

torch = pytest.importorskip("torch", reason="the oracle is PyTorch's")
transformers = pytest.importorskip("transformers", reason="the oracle's models")
pytest.importorskip("safetensors", reason="loading weights needs safetensors")

from models import gpt  # noqa: E402

SMALL = {"vocab_size": 101, "n_embd": 48, "n_layer": 3, "n_head": 4, "n_positions": 24}
LENGTHS = np.array([9, 1, 14, 5], np.int32)


def save(folder, settings, kind="GPT2LMHeadModel", seed=0):
    """Write a random model, its biases and norms random too, and return it."""
    torch.manual_seed(seed)
    model = getattr(transformers, kind)(transformers.GPT2Config(**settings)).eval()
    with torch.no_grad():
        for name, x in model.named_parameters():
            x.normal_(
                1.0 if ".ln_" in name and "weight" in name else 0.0,
                model.config.hidden_size**-0.5,
            )
    model.save_pretrained(folder)
    return model


def ask(model, ids):
    """Return the oracle's logits [B, T, V]."""
    with torch.no_grad():
        return model(torch.from_numpy(ids).long()).logits.float().numpy()


def draw(config, rows, length):
    rng = np.random.default_rng([rows, length])
    return rng.integers(0, config.vocab, (rows, length), np.int32)


def error(actual, expected):
    """Return the largest difference, relative to the largest value."""
    return float(np.abs(actual - expected).max() / np.abs(expected).max())


def test_small_models_agree(tmp_path, record_property):
    model = save(tmp_path, SMALL)
    config, params = gpt.load(tmp_path)
    assert config == gpt.Config(101, 48, 3, 4, 24)
    assert config.num_params == model.num_parameters()
    ids = draw(config, 4, 24)
    logits = jax.jit(functools.partial(gpt.apply, config))(params, ids)
    record_property("error", found := error(logits, ask(model, ids)))
    assert found < 1e-4


def test_a_model_without_its_output_layer_loads_too(tmp_path):
    trunk = save(tmp_path, SMALL, kind="GPT2Model")
    config, params = gpt.load(tmp_path)
    model = transformers.GPT2LMHeadModel(trunk.config).eval()
    model.transformer.load_state_dict(trunk.state_dict())
    model.tie_weights()
    ids = draw(config, 2, 7)
    logits = jax.jit(functools.partial(gpt.apply, config))(params, ids)
    assert error(logits, ask(model, ids)) < 1e-4


def test_prefill_and_decode_agree_with_whole_rows(tmp_path, record_property):
    model = save(tmp_path, SMALL)
    config, params = gpt.load(tmp_path)
    ids, rows = draw(config, 4, 24), np.arange(4)
    expected = ask(model, ids)
    prefill = jax.jit(functools.partial(gpt.prefill, config))
    decode = jax.jit(functools.partial(gpt.decode, config))
    logits, cache = prefill(params, ids[:, :14], LENGTHS)
    errors = [error(logits, expected[rows, LENGTHS - 1])]
    for i in range(10):
        logits, cache = decode(params, cache, ids[rows, LENGTHS + i])
        errors.append(error(logits, expected[rows, LENGTHS + i]))
    record_property("error", max(errors))
    assert max(errors) < 1e-4


def test_greedy_writing_agrees(tmp_path):
    model = save(tmp_path, SMALL)
    config, params = gpt.load(tmp_path)
    prompt = draw(config, 3, 6)
    expected = model.generate(
        torch.from_numpy(prompt).long(),
        attention_mask=torch.ones(3, 6, dtype=torch.long),
        max_new_tokens=12,
        do_sample=False,
        eos_token_id=None,
        pad_token_id=0,
    )

    def write(prompt):
        logits, cache = gpt.prefill(config, params, prompt, np.full(3, 6, np.int32))

        def step(carry, _):
            logits, cache = carry
            ids = logits.argmax(-1).astype(np.int32)
            return gpt.decode(config, params, cache, ids), ids

        return jax.lax.scan(step, (logits, cache), None, length=12)[1].T

    np.testing.assert_array_equal(jax.jit(write)(prompt), expected[:, 6:].numpy())


@pytest.mark.slow
def test_the_published_size_agrees(tmp_path, record_property):
    model = save(tmp_path, {})
    config, params = gpt.load(tmp_path)
    assert config == gpt.GPT2
    assert config.num_params == model.num_parameters() == 124_439_808
    ids = draw(config, 2, 12)
    logits = jax.jit(functools.partial(gpt.apply, config))(params, ids)
    record_property("error", found := error(logits, ask(model, ids)))
    assert found < 1e-4


def test_half_precision_agrees_within_its_own(tmp_path, record_property):
    """Both in bfloat16 differ from float32 by its roundings."""
    model = save(tmp_path, SMALL)
    config, params = gpt.load(tmp_path)
    ids = draw(config, 4, 24)
    expected = ask(model, ids)
    half = dataclasses.replace(config, dtype=jnp.bfloat16)
    logits = jax.jit(functools.partial(gpt.apply, half))(params, ids)
    record_property("error", found := error(logits, expected))
    record_property("oracle_error", error(ask(model.bfloat16(), ids), expected))
    assert found < 0.05
