"""Elementwise primitives: padding stays where it is."""

from __future__ import annotations

from collections.abc import Hashable, Sequence

from stfuse._program import Op
from stfuse._rules._base import Axes, Rule, Stack

_NAMES = (
    "abs acos acosh add add_any and asin asinh atan atan2 atanh bessel_i0e bessel_i1e "
    "cbrt ceil clamp clz complex conj convert_element_type copy copy_p cos cosh "
    "digamma div eq erf erf_inv erfc exp exp2 expm1 floor ge gt igamma igammac imag "
    "integer_pow is_finite le lgamma log log1p logistic lt max min mul ne neg "
    "nextafter not optimization_barrier or polygamma population_count pow real "
    "reduce_precision regularized_incomplete_beta rem round rsqrt select_n "
    "shift_left shift_right_arithmetic shift_right_logical sign sin sinh sqrt square "
    "stop_gradient sub tan tanh xor"
).split()
# Zero stays zero.
_KEEPS_ZERO = frozenset(
    "abs convert_element_type copy copy_p neg real reduce_precision "
    "stop_gradient".split()
)


def form(op: Op) -> Hashable:
    """Return parameters and which operands broadcast where.

    A member that broadcasts an axis of size one that another does not would read its
    padding: they must not share.
    """
    out = op.specs[0].shape
    return (
        tuple(
            tuple(a == 1 and b != 1 for a, b in zip(s.shape, out, strict=True))
            if s.shape
            else None
            for s in op.in_specs
        ),
        tuple(sorted((k, str(v)) for k, v in op.params.items() if k != "sharding")),
    )


def _clean(op: Op, operands: Sequence[Stack]) -> Sequence[Axes]:
    (x,) = operands[:1]
    is_kept = op.name in _KEEPS_ZERO
    return [[a for a in range(len(x.shape)) if is_kept and x.is_zero_padded(a)]]


def _form_of_many(op: Op) -> Hashable | None:
    return form(op) if len(op.specs) == 1 else None


RULES = {name: Rule(form=_form_of_many, clean=_clean) for name in _NAMES}
