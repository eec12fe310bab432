"""Scans: how many steps one turn of the loop takes.

XLA launches each turn of a loop from the host, its kernels one by one unless there are
enough of them for a CUDA graph. A body of a product or two, as of a recurrent network,
waits for that at every step; several steps a turn do not.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from stfuse._program import Op
from stfuse._trace import trace_body

_LAUNCHES = 8  # of a turn, that are enough; see BUILD_NOTES.md
_MOST_OPS = 512  # of a turn: each is compiled
_BRANCHED = ("scan", "while", "cond")


def steps_per_turn(ops: Sequence[Op]) -> int:
    """Return how many steps of some scans, run as one, make a turn on a GPU.

    As many as the scans ask for if their bodies have loops or branches of their own, or
    are long: each step is compiled again.
    """
    bodies = [trace_body(op).ops for op in ops]
    asked = min(op.params["unroll"] for op in ops)
    if any(op.name in _BRANCHED for body in bodies for op in body):
        return asked
    num_heavy = max(sum(op.is_heavy for op in body) for body in bodies)
    steps = -(-_LAUNCHES // max(num_heavy, 1))
    most = _MOST_OPS // max(sum(map(len, bodies)), 1)
    return max(asked, min(steps, most, max(op.params["length"] for op in ops)))


def in_turns(op: Op, *operands: Any) -> tuple[Any, ...]:
    """Compute the scan of one job, several steps a turn."""
    params = {**op.params, "unroll": steps_per_turn([op])}
    return op.at(op.in_specs, op.specs, params).bind_fn(*operands)
