"""Tenants with their own task and their own trained model, made from real digits.

Every tenant sees scikit-learn's 8x8 digits in its own way (rotation, contrast, noise)
and calls the ten classes in its own order, so no tenant's model can answer another's
requests. Tenants of one architecture are trained together, each on its own data.

Axes: T tenants of one architecture, N rows, H = W = 8, C = 10 classes.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Callable
from types import ModuleType
from typing import Any

import jax
import numpy as np
import optax
from jax.scipy.ndimage import map_coordinates
from sklearn.datasets import load_digits

from models import cnn, mlp

NUM_HELD_OUT = 400
MIN_ACCURACY = 0.90  # on the held-out rows, asked of every tenant

NUM_STEPS = 400
BATCH_SIZE = 32


@dataclasses.dataclass(frozen=True, slots=True)
class Task:
    """What one tenant wants to know about its own writing.

    Attributes:
        train_images: float32 [N, H, W].
        train_labels: int32 [N].
        images: held-out rows, float32 [NUM_HELD_OUT, H, W].
        labels: int32 [NUM_HELD_OUT].
    """

    train_images: np.ndarray
    train_labels: np.ndarray
    images: np.ndarray
    labels: np.ndarray


@dataclasses.dataclass(frozen=True, slots=True)
class Tenant:
    """One tenant: a name, a task, and a model trained for it.

    Attributes:
        name: unique, for example ``cnn-03``.
        apply_fn: ``apply_fn(params, images) -> logits``, float32 [B, H, W] to [B, C].
        params: the tenant's own weights.
        task: the tenant's own digits.
        logits: what the model alone answers to ``task.images``, float32 [N, C].
    """

    name: str
    apply_fn: Callable[[Any, Any], Any]
    params: Any
    task: Task
    logits: np.ndarray

    @property
    def accuracy(self) -> float:
        """Share of the held-out rows that the model alone gets right."""
        return float(np.mean(self.logits.argmax(-1) == self.task.labels))


def make_task(seed: int) -> Task:
    """Make one tenant's view of the digits.

    Args:
        seed: decides the view, the label order, the split and the noise.

    Returns:
        The task; equal for equal seeds.
    """
    rng = np.random.default_rng(seed)
    digits = _load_digits()
    images = _rotate(digits.images / 16, rng.uniform(-math.pi / 4, math.pi / 4))
    images = images * rng.uniform(0.6, 1.4)
    images = images + rng.normal(0, rng.uniform(0, 0.1), images.shape)
    labels = rng.permutation(10)[digits.target].astype(np.int32)
    order = rng.permutation(len(labels))
    images, labels = images[order].astype(np.float32), labels[order]
    cut = len(labels) - NUM_HELD_OUT
    return Task(images[:cut], labels[:cut], images[cut:], labels[cut:])


_load_digits = functools.cache(load_digits)


def _rotate(images: np.ndarray, angle: float) -> np.ndarray:
    """Turn [N, H, W] images about their center by ``angle`` radians."""
    center = (images.shape[1] - 1) / 2
    row, column = np.mgrid[: images.shape[1], : images.shape[2]] - center
    coordinates = (
        row * math.cos(angle) - column * math.sin(angle) + center,
        row * math.sin(angle) + column * math.cos(angle) + center,
    )
    turn = functools.partial(map_coordinates, coordinates=coordinates, order=1)
    return np.asarray(jax.vmap(turn)(images))


def train(
    family: ModuleType,
    config: Any,
    tasks: list[Task],
    learning_rate: float,
    seed: int,
    on_step: Callable[[], None] = lambda: None,
) -> Any:
    """Train one model for each task, all of them in one step function.

    The steps are a Python loop: XLA's CPU backend runs convolutions inside a
    compiled loop several times slower than outside of one.

    Args:
        family: module of `models` that has ``init`` and ``apply``.
        config: the architecture, the same for every task.
        tasks: T tasks.
        learning_rate: its peak; it rises, then falls to zero.
        seed: decides initial weights and batches.
        on_step: called after each of NUM_STEPS optimizer steps.

    Returns:
        The trained parameters, every leaf with a leading axis T.
    """
    optimizer = optax.adam(optax.cosine_onecycle_schedule(NUM_STEPS, learning_rate))

    def loss_fn(params, images, labels):
        logits = family.apply(config, params, images)
        return optax.softmax_cross_entropy_with_integer_labels(logits, labels).mean()

    @jax.jit
    @jax.vmap
    def step_fn(params, state, images, labels):
        grads = jax.grad(loss_fn)(params, images, labels)
        updates, state = optimizer.update(grads, state, params)
        return optax.apply_updates(params, updates), state

    rng = np.random.default_rng(seed)
    keys = jax.random.split(jax.random.key(seed), len(tasks))
    params = jax.vmap(functools.partial(family.init, config))(keys)
    state = jax.vmap(optimizer.init)(params)
    for _ in range(NUM_STEPS):
        rows = rng.integers(len(tasks[0].train_labels), size=BATCH_SIZE)
        images = np.stack([task.train_images[rows] for task in tasks])
        labels = np.stack([task.train_labels[rows] for task in tasks])
        params, state = step_fn(params, state, images, labels)
        on_step()
    return params


def make_tenants(
    num_tenants: int, seed: int, on_step: Callable[[], None] = lambda: None
) -> list[Tenant]:
    """Make tenants and train them: two thirds CNNs, the rest MLPs.

    Args:
        num_tenants: how many, at least two.
        seed: decides everything about them.
        on_step: called after each of 2 * NUM_STEPS optimizer steps.

    Returns:
        The tenants, CNNs first, with their weights as NumPy arrays.

    Raises:
        RuntimeError: if a trained model misses MIN_ACCURACY on its held-out rows.
    """
    tasks = [make_task(1000 * seed + i) for i in range(num_tenants)]
    num_cnns = max(1, round(num_tenants * 2 / 3))
    tenants = []
    for family, config, learning_rate, own in (
        (cnn, cnn.DIGITS, 4e-2, tasks[:num_cnns]),
        (mlp, mlp.DIGITS, 1e-2, tasks[num_cnns:]),
    ):
        kind = family.__name__.rpartition(".")[-1]
        apply_fn = functools.partial(family.apply, config)
        alone_fn = jax.jit(apply_fn)
        stacked = train(family, config, own, learning_rate, seed, on_step)
        stacked = jax.device_get(stacked)
        for i, task in enumerate(own):
            params = jax.tree.map(lambda leaf, i=i: leaf[i], stacked)
            logits = np.asarray(alone_fn(params, task.images))
            tenants.append(Tenant(f"{kind}-{i:02}", apply_fn, params, task, logits))
    for tenant in tenants:
        if tenant.accuracy < MIN_ACCURACY:
            raise RuntimeError(
                f"`make_tenants`: '{tenant.name}' answers {tenant.accuracy:.1%} of its "
                f"held-out rows; expected {MIN_ACCURACY:.0%}. Try another --seed."
            )
    return tenants
