"""Low-rank adapters: a frozen model for everyone, and a small correction for each.

A dense kernel W becomes W + (alpha / r) A B, with A and B of rank r. Only A and B are
trained, so many tenants can share one W. Any model made of Linen's ``nn.Dense`` will
do, those of this folder among them; it need not know.

Here rows are multiplied from the left, x W with W [in, out], as Flax does: A [in, r]
and B [r, out] are the paper's, transposed, and in this order.

Source: Hu et al., LoRA: Low-Rank Adaptation of Large Language Models, 2021,
arXiv:2106.09685, section 4.1, equation 3.
"""

import dataclasses
import re
from collections.abc import Callable, Collection, Mapping
from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn
from flax import traverse_util

Adapters = Mapping[str, Mapping[str, jax.Array]]


@dataclasses.dataclass(frozen=True)
class Config:
    """Which kernels are adapted, and how much.

    Attributes:
        rank: r, of each correction.
        alpha: numerator of its scale, alpha / r.
        targets: regular expression; a dense kernel is adapted if the expression is
            found in its module's path, ``"trunk/layer_0/query"`` for example. As in
            the paper, query and value of each attention, if not told otherwise.
    """

    rank: int = 8
    alpha: float = 16.0
    targets: str = r"(query|value)$"

    def __post_init__(self) -> None:
        """Refuse ranks below one, and what is no regular expression."""
        if self.rank < 1:
            raise ValueError(f"`lora.Config`: rank is {self.rank}; pass 1 or more.")
        re.compile(self.targets)

    @property
    def scale(self) -> float:
        """What the product is multiplied with."""
        return self.alpha / self.rank


ATTENTION = Config()
"""Rank 8 on query and value: 73,728 trained values for ``bert.MINILM_L6``."""

TINY = Config(rank=2, alpha=4.0, targets="")
"""Rank 2 on every dense kernel, for tests."""

TINY_WIDE = dataclasses.replace(TINY, rank=3)
"""Its sibling: rank 3."""


def init(config: Config, key: jax.Array, params: Any) -> Adapters:
    """Make adapters that change nothing yet: A is random, B is zero.

    Args:
        config: which kernels, and how much.
        key: random key, used up.
        params: of the model, arrays or shapes; only the shapes are read.

    Returns:
        By path of module, ``{"a": [in, r], "b": [r, out]}``, float32.

    Raises:
        ValueError: no dense kernel is at such a path.
    """
    kernels = _dense_kernels(params)
    chosen = [path for path in kernels if re.search(config.targets, path)]
    if not chosen:
        raise ValueError(
            f"`lora.init`: targets {config.targets!r} match none of the dense kernels "
            f"at {sorted(kernels)}."
        )
    adapters = {}
    for path, path_key in zip(chosen, jax.random.split(key, len(chosen)), strict=True):
        num_in, num_out = kernels[path].shape
        a = jax.random.normal(path_key, (num_in, config.rank)) / num_in**0.5
        adapters[path] = {"a": a, "b": jnp.zeros((config.rank, num_out))}
    return adapters


def merge(config: Config, params: Any, adapters: Adapters) -> Any:
    """Add each product to its kernel: for one tenant alone, cheapest to serve.

    Args:
        config: as given to `init`.
        params: of the model; not changed.
        adapters: of one tenant.

    Returns:
        Parameters of the model, where every leaf but the adapted kernels is the one
        that was passed.

    Raises:
        ValueError: the model has no dense kernel where an adapter belongs.
    """
    _check_paths("merge", adapters, _dense_kernels(params))
    leaves = traverse_util.flatten_dict(params)
    for path, ab in adapters.items():
        place = (*path.split("/"), "kernel")
        kernel = leaves[place]
        product = config.scale * (ab["a"] @ ab["b"])
        leaves[place] = kernel + product.astype(kernel.dtype)
    return traverse_util.unflatten_dict(leaves)


def apply(
    config: Config,
    apply_fn: Callable[[Any, Any], Any],
    params: Any,
    adapters: Adapters,
    inputs: Any,
) -> Any:
    """Run a model with adapters, as if merged; no merged kernel is ever formed.

    Each adapted layer computes ``x W + b + (alpha / r) (x A) B``: so the product with W
    is one and the same for all tenants, who can keep one W.

    Args:
        config: as given to `init`.
        apply_fn: ``(params, inputs) -> outputs`` of a model whose dense layers are
            Linen's ``nn.Dense``. Not jitted itself, since jit would keep the adapters
            of the first call; jit around this call.
        params: of the model, shared and not changed.
        adapters: of one tenant.
        inputs: what ``apply_fn`` takes.

    Returns:
        What ``apply_fn`` returns.

    Raises:
        ValueError: ``apply_fn`` is jitted, or an adapter belongs to no layer that ran.
    """
    if isinstance(apply_fn, jax.stages.Wrapped):
        raise ValueError(
            "`lora.apply`: apply_fn is jitted, and would keep the adapters of its "
            "first call; pass the function itself and jit around `lora.apply`."
        )
    ran = set()

    def correct(next_fn: Any, args: Any, kwargs: Any, context: Any) -> Any:
        outputs = next_fn(*args, **kwargs)
        path = "/".join(context.module.path)
        is_dense = isinstance(context.module, nn.Dense)
        if not is_dense or context.method_name != "__call__" or path not in adapters:
            return outputs
        ran.add(path)
        x, a, b = (
            value.astype(outputs.dtype)
            for value in (args[0], adapters[path]["a"], adapters[path]["b"])
        )
        return outputs + config.scale * ((x @ a) @ b)

    with nn.intercept_methods(correct):
        outputs = apply_fn(params, inputs)
    _check_paths("apply", adapters, ran)
    return outputs


def num_params(adapters: Adapters) -> int:
    """Return the number of trained values of a tenant: r (in + out) for each kernel."""
    return sum(leaf.size for leaf in jax.tree.leaves(adapters))


def _dense_kernels(params: Any) -> dict[str, Any]:
    """Return all matrices that are called kernel, by path of their module."""
    return {
        "/".join(path[:-1]): leaf
        for path, leaf in traverse_util.flatten_dict(params).items()
        if path[-1] == "kernel" and len(leaf.shape) == 2
    }


def _check_paths(call: str, adapters: Adapters, known: Collection[str]) -> None:
    if unknown := sorted(adapters.keys() - set(known)):
        raise ValueError(
            f"`lora.{call}`: no dense layer at {unknown}; the model has {sorted(known)}"
            ". Pass the adapters that `lora.init` made for this model."
        )
