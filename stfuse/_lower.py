"""How one stacked launch is computed fast: candidates per family, and the chooser.

A candidate computes the op of one job; it is mapped over the slots. Two ways apply to
every op: ``native`` maps the primitive itself, ``unrolled`` computes slot by slot.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from stfuse import _rules
from stfuse._plan import Plan
from stfuse._program import Op
from stfuse._types import Cost

LOWERINGS = ("auto", "native")
# Mapped over its kernels, a convolution becomes a grouped one, which both backends
# compute slowly. Patches and one batched GEMM win on a GPU at every size measured; on
# a CPU while a slot's patches stay in cache (16 jobs, 3x3: 36 KiB of patches 172 us
# against 209 unrolled; 295 KiB 1495 against 893).
_CPU_PATCH_BYTES = 128 * 1024


def choose(
    op: Op,
    is_stacked: Sequence[bool],
    *,
    num_slots: int,
    rows: int,
    cost: Cost,
    mode: str,
) -> str:
    """Return the name of the way to compute a stacked op.

    Args:
        op: the op of one job at one row.
        is_stacked: per operand, whether it differs by slot.
        num_slots: K.
        rows: B; the row mapping hides them from the op's own shapes.
        cost: the device.
        mode: ``"auto"`` or ``"native"``.
    """
    if mode == "native" or num_slots == 1 or op.name != "conv_general_dilated":
        return "native"
    if not is_stacked[1]:  # a shared kernel: slots are more images of one conv
        return "native"
    if not is_patchable(op):
        return "unrolled" if cost.source == "cpu" else "native"
    if cost.source == "cpu" and rows * _patch_bytes(op) > _CPU_PATCH_BYTES:
        return "unrolled"
    return "patches"


def apply(
    name: str, op: Op, operands: Sequence[Any], is_stacked: Sequence[bool]
) -> tuple[Any, ...]:
    """Compute a stacked op.

    Args:
        name: what `choose` returned.
        op: the op of one job.
        operands: ``[K, ...]`` where stacked, else as for one job.
        is_stacked: per operand.

    Returns:
        Outputs ``[K, ...]``.
    """
    compute = _CANDIDATES.get(name, lambda op, *xs: op.bind_fn(*xs))
    if name != "unrolled":
        axes = [0 if s else None for s in is_stacked]
        return jax.vmap(lambda *xs: compute(op, *xs), in_axes=axes)(*operands)
    num_slots = next(x.shape[0] for x, s in zip(operands, is_stacked, strict=True) if s)
    outs = [
        op.bind_fn(*(x[k] if s else x for x, s in zip(operands, is_stacked)))  # noqa: B905
        for k in range(num_slots)
    ]
    return tuple(jnp.stack(column) for column in zip(*outs, strict=True))


def lower_plan(plan: Plan, mode: str) -> Plan:
    """Return a plan with its lowerings filled in, as at one row of every slot."""
    launches = iter(plan.launches)
    chosen = []
    for node in plan.nodes:
        ops = [plan.species[s].trace.ops[i] for s, i in node.members]
        if not ops[0].is_heavy:
            continue
        name = "native"
        if node.body is None:
            name = choose(
                _rules.widen(ops),
                [True] * len(ops[0].inputs),
                num_slots=sum(len(plan.species[s].members) for s in node.species),
                rows=1,
                cost=plan.cost,
                mode=mode,
            )
        chosen.append(replace(next(launches), lowering=name))
    return replace(plan, launches=tuple(chosen))


def is_patchable(op: Op) -> bool:
    """Return whether a convolution can be written as patches times a matrix."""
    params = op.params
    return (
        params["feature_group_count"] == 1
        and params["batch_group_count"] == 1
        and all(d == 1 for d in params["lhs_dilation"])
        and op.specs[0].size > 0  # a kernel wider than its image sees nothing
    )


def _patch_bytes(op: Op) -> int:
    """Return the size of one row's patches, 0 if they are the image itself."""
    out, kernel = op.specs[0], op.in_specs[1]
    _, rhs_spec, out_spec = op.params["dimension_numbers"]
    if all(kernel.shape[i] == 1 for i in rhs_spec[2:]):
        return 0
    num_patches = math.prod(out.shape) // max(out.shape[out_spec[1]], 1)
    patch = math.prod(kernel.shape) // max(kernel.shape[rhs_spec[0]], 1)
    return num_patches * patch * out.dtype.itemsize


def _patches(op: Op, lhs: Any, rhs: Any) -> tuple[Any]:
    """Compute a convolution as shifted slices, concatenated, times the kernel.

    Args:
        op: a convolution without groups or input dilation.
        lhs: images, laid out as the op says.
        rhs: kernel, laid out as the op says.
    """
    params = op.params
    lhs_spec, rhs_spec, out_spec = params["dimension_numbers"]
    x = lax.transpose(lhs, (lhs_spec[0], *lhs_spec[2:], lhs_spec[1]))  # N, space, C
    w = lax.transpose(rhs, (*rhs_spec[2:], rhs_spec[1], rhs_spec[0]))  # space, I, O
    space = [(low, high, 0) for low, high in params["padding"]]
    x = lax.pad(x, jnp.zeros((), x.dtype), ((0, 0, 0), *space, (0, 0, 0)))
    out_space = tuple(op.specs[0].shape[i] for i in out_spec[2:])
    slices = [
        _shifted(x, offset, out_space, params)
        for offset in itertools.product(*map(range, w.shape[:-2]))
    ]
    patches = lax.concatenate(slices, x.ndim - 1)
    y = lax.dot_general(
        patches,
        w.reshape(-1, w.shape[-1]),
        (((patches.ndim - 1,), (0,)), ((), ())),
        precision=params["precision"],
        preferred_element_type=params["preferred_element_type"],
    )
    places = (out_spec[0], *out_spec[2:], out_spec[1])  # where each axis of y belongs
    order = sorted(range(len(places)), key=places.__getitem__)
    return (lax.transpose(y, order).astype(op.specs[0].dtype),)


def _shifted(
    x: Any, offset: Sequence[int], out_space: Sequence[int], params: dict[str, Any]
) -> Any:
    """Return what one kernel element sees, ``[N, out space, C]``."""
    dilation, strides = params["rhs_dilation"], params["window_strides"]
    starts = [o * d for o, d in zip(offset, dilation, strict=True)]
    limits = [
        start + (size - 1) * stride + 1 if size else start
        for start, size, stride in zip(starts, out_space, strides, strict=True)
    ]
    return lax.slice(
        x,
        (0, *starts, 0),
        (x.shape[0], *limits, x.shape[-1]),
        (1, *strides, 1),
    )


_CANDIDATES: dict[str, Callable[..., tuple[Any, ...]]] = {"patches": _patches}
