"""Flax models as functions of ``(params, inputs)``; equal ones share one function."""

from __future__ import annotations

import functools
from typing import Any

from stfuse._types import ApplyFn


def linen_fn(module: Any, apply_kwargs: dict[str, Any]) -> ApplyFn:
    """Return one function per equal module, so that tenants share its trace."""
    try:
        kwargs = tuple(sorted(apply_kwargs.items()))
        return _cached_linen_fn(module, kwargs, repr((module, kwargs)))
    except TypeError:  # unhashable module fields or keyword arguments
        return functools.partial(_apply_linen, module, apply_kwargs)


def nnx_parts(model: Any) -> tuple[ApplyFn, Any]:
    """Return a model's function, one per equal graph, and its state as a plain dict.

    Raises:
        TypeError: it is no NNX model.
    """
    from flax import nnx

    if not isinstance(model, nnx.Module):
        is_class = isinstance(model, type)
        found = f"class {model.__name__}" if is_class else type(model).__name__
        raise TypeError(f"found a {found}; pass a `flax.nnx.Module`, built.")
    graphdef, state = nnx.split(model)
    try:
        apply_fn = _cached_nnx_fn(graphdef, repr(graphdef))
    except TypeError:  # unhashable attributes
        apply_fn = functools.partial(_apply_nnx, graphdef)
    return apply_fn, nnx.to_pure_dict(state)


@functools.lru_cache(maxsize=64)
def _cached_linen_fn(module: Any, kwargs: Any, _text: str) -> ApplyFn:
    # 1, 1.0 and True are equal keys but other programs: only their texts differ.
    return functools.partial(_apply_linen, module, dict(kwargs))


@functools.lru_cache(maxsize=64)
def _cached_nnx_fn(graphdef: Any, _text: str) -> ApplyFn:
    return functools.partial(_apply_nnx, graphdef)


def _apply_linen(module: Any, kwargs: dict[str, Any], variables: Any, x: Any) -> Any:
    return module.apply(variables, x, **kwargs)


def _apply_nnx(graphdef: Any, state: Any, x: Any) -> Any:
    from flax import nnx

    return nnx.merge(graphdef, state)(x)
