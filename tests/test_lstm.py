"""LSTM and GRU: the equations step by step, the sizes, and torch's weights."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from models import lstm
from tests.cases import assert_bitwise

KINDS = {
    "lstm": lstm.TINY,
    "stacked": lstm.TINY_DEEP,
    "gru": lstm.TINY_GRU,
    "stacked_gru": dataclasses.replace(lstm.TINY_DEEP, cell="gru"),
}
over_kinds = pytest.mark.parametrize("config", KINDS.values(), ids=list(KINDS))

apply = jax.jit(lstm.apply, static_argnums=0)
encode = jax.jit(lstm.encode, static_argnums=0)


@functools.cache
def params_of(config):
    params = jax.jit(functools.partial(lstm.init, config))(jax.random.key(0))
    rng = np.random.default_rng(0)  # fresh biases are zero, and would prove nothing
    return jax.tree.map(
        lambda x: x + 0.3 * rng.normal(size=x.shape).astype("f"), params
    )


def draw(config, rows=3, time=5):
    shape = (rows, time, config.features)
    return np.random.default_rng(1).normal(size=shape).astype(np.float32)


def sigmoid(x):
    return 1 / (1 + np.exp(-x))


def by_hand(config, params, x):
    """Follow the equations of the module in float64, gate by gate."""
    params = jax.tree.map(lambda leaf: np.asarray(leaf, np.float64), params)
    for k in range(config.layers):
        w_i, w_h = params[f"inputs_{k}"], params[f"cells_{k}"]["hidden"]
        h = c = np.zeros((x.shape[0], config.hidden))
        states = []
        for t in range(x.shape[1]):
            gates = 3 if config.cell == "gru" else 4
            of_x = np.split(x[:, t] @ w_i["kernel"] + w_i["bias"], gates, axis=1)
            of_h = np.split(h @ w_h["kernel"] + w_h["bias"], gates, axis=1)
            if config.cell == "gru":
                r, z = (sigmoid(of_x[j] + of_h[j]) for j in (0, 1))
                h = (1 - z) * np.tanh(of_x[2] + r * of_h[2]) + z * h
            else:
                i, f, o = (sigmoid(of_x[j] + of_h[j]) for j in (0, 1, 3))
                c = f * c + i * np.tanh(of_x[2] + of_h[2])
                h = o * np.tanh(c)
            states.append(h)
        x = np.stack(states, axis=1)
    return x, x[:, -1] @ params["head"]["kernel"] + params["head"]["bias"]


def torch_shapes(config):
    """Return the shapes of torch's state_dict of ``TINY_DEEP``, typed by hand."""
    gates = 3 if config.cell == "gru" else 4
    return {
        "weight_ih_l0": (gates * 12, 6),
        "weight_hh_l0": (gates * 12, 12),
        "bias_ih_l0": (gates * 12,),
        "bias_hh_l0": (gates * 12,),
        "weight_ih_l1": (gates * 12, 12),
        "weight_hh_l1": (gates * 12, 12),
        "bias_ih_l1": (gates * 12,),
        "bias_hh_l1": (gates * 12,),
        "head.weight": (4, 12),
        "head.bias": (4,),
    }


@pytest.mark.parametrize(
    ("config", "known"),
    [
        (lstm.TINY, 548),
        (lstm.TINY_DEEP, 2_260),
        (lstm.TINY_GRU, 420),
        (lstm.RNN_512, 2_101_248),
    ],
)
def test_the_number_of_parameters_is_that_of_torch(config, known):
    specs = jax.eval_shape(functools.partial(lstm.init, config), jax.random.key(0))
    assert sum(leaf.size for leaf in jax.tree.leaves(specs)) == known
    assert config.num_params == known


@over_kinds
def test_every_state_follows_the_equations(config):
    params, x = params_of(config), draw(config)
    states, logits = by_hand(config, params, x)
    np.testing.assert_allclose(encode(config, params, x), states, atol=2e-6)
    np.testing.assert_allclose(apply(config, params, x), logits, atol=5e-6)


def test_without_classes_the_last_state_is_the_answer():
    config, params = lstm.TINY, params_of(lstm.TINY)
    x, bare = draw(config), dataclasses.replace(config, num_classes=None)
    states = np.asarray(encode(bare, params, x))
    assert_bitwise(np.asarray(apply(bare, params, x)), states[:, -1])
    assert "head" not in jax.eval_shape(lambda: lstm.init(bare, jax.random.key(0)))


@pytest.mark.parametrize("config", [lstm.TINY, lstm.TINY_GRU], ids=["lstm", "gru"])
def test_bfloat16_answers_within_its_rounding(config):
    params, x = params_of(config), draw(config)
    narrow = dataclasses.replace(config, dtype=jnp.bfloat16)
    out = apply(narrow, params, x)
    assert out.dtype == jnp.float32
    np.testing.assert_allclose(out, apply(config, params, x), atol=0.05)


@pytest.mark.parametrize("cell", ["lstm", "gru"])
def test_weights_of_torch_are_transposed_and_otherwise_kept(cell):
    config = dataclasses.replace(lstm.TINY_DEEP, cell=cell)
    rng = np.random.default_rng(0)
    tensors = {
        name: rng.normal(size=shape).astype(np.float32)
        for name, shape in torch_shapes(config).items()
    }
    params = lstm.from_torch(config, tensors)
    assert jax.tree.map(jnp.shape, params) == jax.tree.map(jnp.shape, params_of(config))
    kernel = params["cells_1"]["hidden"]["kernel"]
    assert_bitwise(kernel, jnp.asarray(tensors["weight_hh_l1"].T))
    assert_bitwise(params["inputs_0"]["bias"], jnp.asarray(tensors["bias_ih_l0"]))


def test_from_torch_names_all_tensors_at_fault():
    shapes = torch_shapes(lstm.TINY_DEEP) | {"bias_hh_l0": (7,), "surplus": (1,)}
    del shapes["weight_ih_l1"]
    tensors = {name: np.zeros(shape, np.float32) for name, shape in shapes.items()}
    with pytest.raises(ValueError, match="from_torch") as caught:
        lstm.from_torch(lstm.TINY_DEEP, tensors)
    for fault in (
        "'bias_hh_l0' is (7,), expected (48,)",
        "'surplus' is (1,), expected nothing",
        "'weight_ih_l1' is missing, expected (48, 12)",
    ):
        assert fault in str(caught.value)
    assert "head" not in str(caught.value)


def test_an_unknown_cell_is_refused():
    with pytest.raises(ValueError, match="cell is 'rnn'; pass one of"):
        lstm.Config(cell="rnn")
