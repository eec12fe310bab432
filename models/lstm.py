"""Stacked LSTM or GRU over a sequence: the last state, or classes made from it.

With x the input, h the state, W and b the rows of a gate in a kernel and its bias:

    LSTM  i = sigmoid(W_ii x + b_ii + W_hi h + b_hi)        h' = o tanh(c')
          f = sigmoid(W_if x + b_if + W_hf h + b_hf)        c' = f c + i g
          g =    tanh(W_ig x + b_ig + W_hg h + b_hg)
          o = sigmoid(W_io x + b_io + W_ho h + b_ho)

    GRU   r = sigmoid(W_ir x + b_ir + W_hr h + b_hr)        h' = (1 - z) n + z h
          z = sigmoid(W_iz x + b_iz + W_hz h + b_hz)
          n =    tanh(W_in x + b_in + r (W_hn h + b_hn))

The GRU resets after the product with W_hn, as torch and cuDNN do, and not before, as
the paper does. Each layer has both biases, though an LSTM would do with their sum: so
weights of torch copy over, see `from_torch`.

Axes: B rows, T time, F features of the input, H hidden units, C classes.

Source: Hochreiter and Schmidhuber, Long Short-Term Memory, 1997, with the forget gate
of Gers et al., 2000; Cho et al., 2014, arXiv:1406.1078; the notation is that of
https://docs.pytorch.org/docs/stable/generated/torch.nn.LSTM.html and ``GRU``.
"""

import dataclasses
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn

_NUM_GATES = {"lstm": 4, "gru": 3}


@dataclasses.dataclass(frozen=True)
class Config:
    """What one member of the family looks like.

    Attributes:
        features: F, features of one step of the input.
        hidden: H, units of each layer.
        layers: number of layers, each fed with the states of the one below.
        cell: ``"lstm"`` or ``"gru"``.
        num_classes: C, units of the output layer; None for the last state itself.
        dtype: what the products are computed in; parameters, gates and states are
            float32, as roundings of a state would add up over time.
    """

    features: int = 512
    hidden: int = 512
    layers: int = 1
    cell: str = "lstm"
    num_classes: int | None = None
    dtype: Any = jnp.float32

    def __post_init__(self) -> None:
        """Refuse a cell that this file has no equations for."""
        if self.cell not in _NUM_GATES:
            raise ValueError(
                f"`lstm.Config`: cell is {self.cell!r}; pass one of "
                f"{sorted(_NUM_GATES)}."
            )

    @property
    def num_params(self) -> int:
        """Number of trained values, both biases of each gate among them."""
        units = _NUM_GATES[self.cell] * self.hidden
        inputs = self.features + (self.layers - 1) * self.hidden
        recurrent = units * (inputs + self.layers * (self.hidden + 2))
        return recurrent + (self.hidden + 1) * (self.num_classes or 0)


TINY = Config(features=6, hidden=8, num_classes=4)
"""One LSTM layer of 8 units, 548 parameters."""

TINY_DEEP = Config(features=6, hidden=12, layers=2, num_classes=4)
"""Its sibling: two layers of 12 units, 2,260 parameters."""

TINY_GRU = dataclasses.replace(TINY, cell="gru")
"""One GRU layer of 8 units, 420 parameters."""

RNN_512 = Config()
"""One LSTM layer of 512 units, 2,101,248 parameters.

The size of the recurrent network in Jain et al., Dynamic Space-Time Scheduling for GPU
Inference, 2018, arXiv:1901.00041.
"""


class _Cell(nn.Module):
    """One step of one layer: ``(state, W_i x + b_i)`` to ``(state, h)``."""

    config: Config

    @nn.compact
    def __call__(
        self, state: tuple[jax.Array, ...], x: jax.Array
    ) -> tuple[tuple[jax.Array, ...], jax.Array]:
        h = state[0]
        y = nn.Dense(x.shape[-1], dtype=self.config.dtype, name="hidden")(h)
        x, y = x.astype(h.dtype), y.astype(h.dtype)
        if self.config.cell == "gru":
            x_r, x_z, x_n = jnp.split(x, 3, axis=-1)
            h_r, h_z, h_n = jnp.split(y, 3, axis=-1)
            r, z = nn.sigmoid(x_r + h_r), nn.sigmoid(x_z + h_z)
            n = jnp.tanh(x_n + r * h_n)
            h = (1 - z) * n + z * h
            return (h,), h
        i, f, g, o = jnp.split(x + y, 4, axis=-1)
        c = nn.sigmoid(f) * state[1] + nn.sigmoid(i) * jnp.tanh(g)
        h = nn.sigmoid(o) * jnp.tanh(c)
        return (h, c), h


class _RNN(nn.Module):
    config: Config

    def setup(self) -> None:
        config = self.config
        units = _NUM_GATES[config.cell] * config.hidden
        layers = range(config.layers)
        # The inputs of all steps meet their kernel at once; only W_h h must wait.
        self.inputs = [nn.Dense(units, dtype=config.dtype) for _ in layers]
        scan = nn.scan(
            _Cell,
            variable_broadcast="params",
            split_rngs={"params": False},
            in_axes=1,
            out_axes=1,
        )
        self.cells = [scan(config) for _ in layers]
        if config.num_classes is not None:
            self.head = nn.Dense(config.num_classes)

    def encode(self, x: jax.Array) -> jax.Array:
        config = self.config
        zero = jnp.zeros((x.shape[0], config.hidden), jnp.float32)
        state = (zero,) * (1 if config.cell == "gru" else 2)
        for inputs, cell in zip(self.inputs, self.cells, strict=True):
            _, x = cell(state, inputs(x))
        return x

    def __call__(self, x: jax.Array) -> jax.Array:
        last = self.encode(x)[:, -1]
        return last if self.config.num_classes is None else self.head(last)


def init(config: Config, key: jax.Array) -> Any:
    """Make fresh parameters.

    Args:
        config: the network's sizes.
        key: random key, used up.

    Returns:
        A dict of float32 arrays: of each layer k, ``inputs_k`` with a kernel [F, G H]
        and ``cells_k/hidden`` with one [H, G H], and their biases. The G gates lie
        side by side in the order of the equations. Then ``head``, if there is one.
    """
    inputs = jnp.zeros((1, 1, config.features), jnp.float32)
    return _RNN(config).init(key, inputs)["params"]


def apply(config: Config, params: Any, inputs: jax.Array) -> jax.Array:
    """Read sequences to their end; pure, row by row.

    Args:
        config: the network's sizes.
        params: what `init` returned, trained or not.
        inputs: float32 [B, T, F].

    Returns:
        Logits, float32 [B, C]; without classes, the last layer's last state [B, H].
    """
    return _RNN(config).apply({"params": params}, inputs)


def encode(config: Config, params: Any, inputs: jax.Array) -> jax.Array:
    """Compute the last layer's state at every step; pure, row by row.

    Args:
        config: the network's sizes.
        params: what `init` returned, trained or not.
        inputs: float32 [B, T, F].

    Returns:
        States, float32 [B, T, H].
    """
    return _RNN(config).apply({"params": params}, inputs, method="encode")


def from_torch(config: Config, tensors: Mapping[str, np.ndarray]) -> Any:
    """Bring the weights of torch's ``nn.LSTM`` or ``nn.GRU`` into this layout.

    Args:
        config: the network's sizes.
        tensors: the module's ``state_dict``, as NumPy arrays: ``weight_ih_l0`` and so
            on; with classes, ``head.weight`` [C, H] and ``head.bias`` [C] too.

    Returns:
        Parameters as of `init`.

    Raises:
        ValueError: listing all tensors that are missing, not expected, or of another
            shape.
    """
    _check_torch(config, {name: np.shape(x) for name, x in tensors.items()})

    def dense(weight: str, bias: str) -> dict[str, jax.Array]:
        kernel = jnp.asarray(tensors[weight].T, jnp.float32)
        return {"kernel": kernel, "bias": jnp.asarray(tensors[bias], jnp.float32)}

    params: dict[str, Any] = {}
    for k in range(config.layers):
        params[f"inputs_{k}"] = dense(f"weight_ih_l{k}", f"bias_ih_l{k}")
        params[f"cells_{k}"] = {"hidden": dense(f"weight_hh_l{k}", f"bias_hh_l{k}")}
    if config.num_classes is not None:
        params["head"] = dense("head.weight", "head.bias")
    return params


def _check_torch(config: Config, found: Mapping[str, tuple[int, ...]]) -> None:
    """Raise one error that lists all tensors at fault."""
    units = _NUM_GATES[config.cell] * config.hidden
    shapes: dict[str, tuple[int, ...]] = {}
    for k in range(config.layers):
        shapes[f"weight_ih_l{k}"] = (units, config.hidden if k else config.features)
        shapes[f"weight_hh_l{k}"] = (units, config.hidden)
        shapes[f"bias_ih_l{k}"] = shapes[f"bias_hh_l{k}"] = (units,)
    if config.num_classes is not None:
        shapes["head.weight"] = (config.num_classes, config.hidden)
        shapes["head.bias"] = (config.num_classes,)
    faults = [
        f"'{name}' is {found.get(name, 'missing')}, expected "
        f"{shapes.get(name, 'nothing')}"
        for name in sorted(shapes.keys() | found.keys())
        if shapes.get(name) != found.get(name)
    ]
    if faults:
        raise ValueError(f"`lstm.from_torch`: {'; '.join(faults)}.")
