"""Ours against torch's LSTM and GRU: the same weights, the same sequences."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

torch = pytest.importorskip("torch", reason="the oracle is PyTorch's")

from models import lstm  # noqa: E402

CONFIGS = {
    "tiny": lstm.Config(features=6, hidden=8),
    "stacked": lstm.Config(features=5, hidden=24, layers=3),
    "rnn_512": lstm.RNN_512,
}
over_cells = pytest.mark.parametrize("cell", ["lstm", "gru"])


def build(config, seed=0):
    """Return the oracle and our parameters, its weights."""
    torch.manual_seed(seed)
    module = {"lstm": torch.nn.LSTM, "gru": torch.nn.GRU}[config.cell]
    model = module(config.features, config.hidden, config.layers, batch_first=True)
    assert config.num_params == sum(p.numel() for p in model.parameters())
    tensors = {name: x.numpy() for name, x in model.state_dict().items()}
    return model, lstm.from_torch(config, tensors)


def ask(model, inputs):
    """Return the oracle's states [B, T, H]."""
    with torch.no_grad():
        dtype = next(model.parameters()).dtype
        return model(torch.from_numpy(inputs).to(dtype))[0].float().numpy()


def draw(config, rows, time):
    rng = np.random.default_rng([rows, time])
    return rng.normal(size=(rows, time, config.features)).astype(np.float32)


def error(actual, expected):
    """Return the largest difference, relative to the largest value."""
    return float(np.abs(actual - expected).max() / np.abs(expected).max())


@over_cells
@pytest.mark.parametrize("name", CONFIGS)
def test_every_state_agrees(record_property, name, cell):
    config = dataclasses.replace(CONFIGS[name], cell=cell)
    model, params = build(config)
    inputs = draw(config, rows=3, time=32)
    expected = ask(model, inputs)
    states = jax.jit(functools.partial(lstm.encode, config))(params, inputs)
    last = jax.jit(functools.partial(lstm.apply, config))(params, inputs)
    record_property("error", found := error(states, expected))
    assert found < 1e-4
    assert error(last, expected[:, -1]) < 1e-4


@over_cells
def test_half_precision_agrees_within_its_own(record_property, cell):
    """Both in bfloat16 differ from float32 by its roundings, step after step."""
    config = dataclasses.replace(CONFIGS["stacked"], cell=cell)
    model, params = build(config)
    inputs = draw(config, rows=3, time=32)
    expected = ask(model, inputs)
    half = dataclasses.replace(config, dtype=jnp.bfloat16)
    states = jax.jit(functools.partial(lstm.encode, half))(params, inputs)
    record_property("error", found := error(states, expected))
    record_property("oracle_error", error(ask(model.bfloat16(), inputs), expected))
    assert found < 0.02
