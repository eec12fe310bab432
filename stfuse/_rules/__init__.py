"""What padding does to each primitive: who may share a launch, and how it is computed.

A rule says two things. Its *form*: ops of equal forms may share a launch, each padded
at the end of its axes to the largest. And how to evaluate such a launch so that the
true region of every row is what the job alone would get. A primitive without a rule
shares launches with its equals only, and needs none then.
"""

from __future__ import annotations

from collections.abc import Hashable, Sequence

from stfuse._program import Op
from stfuse._rules import _contract, _elementwise, _index, _reduce, _shape
from stfuse._rules._base import (
    ComputeFn,
    Merge,
    Rule,
    Stack,
    inside,
    mask,
    spec_at,
    to_stacked,
    widest,
)
from stfuse._tree import is_typed_key

__all__ = [
    "ELEMENTWISE",
    "ComputeFn",
    "Merge",
    "Rule",
    "Stack",
    "form",
    "inside",
    "launch",
    "mask",
    "to_stacked",
    "widen",
    "widest",
]

RULES: dict[str, Rule] = {
    **_contract.RULES,
    **_elementwise.RULES,
    **_index.RULES,
    **_reduce.RULES,
    **_shape.RULES,
}
ELEMENTWISE = frozenset(_elementwise.RULES)


def form(op: Op) -> Hashable:
    """Return an op's form: ops of equal forms may share a launch."""
    rule = RULES.get(op.name)
    specs = (*op.in_specs, *op.specs)
    # A key has no zero to pad with, or to mask.
    own = None if any(map(is_typed_key, specs)) or not rule else rule.form(op)
    if own is None:
        return ("equal", op.key)
    types = tuple((len(s.shape), s.dtype) for s in specs)
    return (op.name, types, own)


def widen(ops: Sequence[Op]) -> Op:
    """Return the op that computes several of equal form, at the padded shapes."""
    if all(op.key == ops[0].key for op in ops):
        return ops[0]
    ins = [widest([s.shape for s in column]) for column in _columns(ops, "in_specs")]
    outs = [widest([s.shape for s in column]) for column in _columns(ops, "specs")]
    params = RULES[ops[0].name].params(ops, ins, outs)
    return ops[0].at(
        tuple(map(spec_at, ops[0].in_specs, ins)),
        tuple(map(spec_at, ops[0].specs, outs)),
        params,
    )


def launch(merge: Merge, operands: Sequence[Stack]) -> list[Stack]:
    """Evaluate a launch.

    Args:
        merge: its members.
        operands: one stack per operand, of the wide op's shapes.

    Returns:
        One stack per output.
    """
    if all(op.key == merge.ops[0].key for op in merge.ops):
        return merge.bind(operands)
    rule = RULES[merge.wide.name]
    return rule.apply(rule, merge, operands)


def _columns(ops: Sequence[Op], name: str) -> list[tuple]:
    return list(zip(*(getattr(op, name) for op in ops), strict=True))
