"""A step that is measured whole, once per shape, against simpler ones.

What is fastest launch by launch may lose among its neighbors; then the native step is
used, on a GPU one without regions, or on a CPU each job's own program, all in one.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Sequence
from typing import Any

import jax
import numpy as np

from stfuse import _tree
from stfuse._cache import config_key
from stfuse._cost import default_device
from stfuse._lower import _measure
from stfuse._plan import Plan
from stfuse._step import compiler_options
from stfuse._trace import is_within

_SEEN = ("jax_debug_nans", "jax_debug_infs", "jax_disable_jit")
_MANY_SLOTS = 32  # a step of all of them apart would compile for minutes


class TunedStep:
    """A jitted step; which lowering it has may depend on the shapes it is called with.

    Attributes:
        lowering: what was asked for, and is used where nothing has been measured.
    """

    def __init__(
        self, build_fn: Callable[[str], Callable[..., Any]], plan: Plan, lowering: str
    ) -> None:
        """Build nothing yet.

        Args:
            build_fn: makes the step of a lowering.
            plan: what it computes.
            lowering: one of `_lower.LOWERINGS`.
        """
        self.lowering, self._options = lowering, compiler_options(plan)
        self._build_fn, self._plan = build_fn, plan
        self._steps: dict[str, Any] = {}
        self._chosen: dict[Hashable, Any] = {}
        self._is_tuned = lowering == "auto" and _measure.is_on(plan.cost)

    def __call__(self, stacks: Any, slots: Sequence[Any], inputs: Sequence[Any]) -> Any:
        """Run the step; the first call of some shapes may measure."""
        given = (stacks, slots, inputs)
        has_options = bool(self._options) and _may_have_options()
        if not (self._is_tuned or has_options):
            return self.jitted(self.lowering)(*given)
        key = (
            tuple(x if x is None else np.shape(x) for x in slots),
            tuple(x if x is None else x.shape for x in inputs),
            _signature(stacks) if has_options else None,
        )
        step = self._chosen.get(key)
        if step is None:
            step = self._choose(key, given, has_options)
        try:
            return step(*given)
        except (TypeError, ValueError):
            if not has_options:
                raise
        return self.jitted(self.lowering)(*given)  # weights on several devices, say

    def jitted(self, mode: str) -> Any:
        """Return the jitted step of a lowering."""
        if mode not in self._steps:
            self._steps[mode] = jax.jit(self._build_fn(mode))
        return self._steps[mode]

    def _choose(
        self, key: Hashable, given: tuple[Any, ...], has_options: bool
    ) -> Callable[..., Any]:
        """Return the step that is fastest for some shapes."""
        step = self.jitted(self.lowering)
        if any(map(_tree.is_tracer, jax.tree.leaves(given))):
            return step  # a part of a larger program, which decides what is compiled
        mode = self.lowering
        if self._is_tuned and self._is_worth_measuring(given[2]):
            modes = {mode: self.jitted(mode) for mode in self._modes()}
            given = jax.device_put(given)
            mode = _measure.fastest_step(modes, given, self.lowering)
        step = self.jitted(mode)
        if has_options:  # which a jit inside another one may not have
            step = step.lower(*given).compile(self._options)
        self._chosen[key] = step
        return step

    def _is_worth_measuring(self, inputs: Sequence[Any]) -> bool:
        rows = max(x.shape[1] for x in inputs if x is not None)
        return _measure.is_worth_step(self._plan.launches, rows, self._plan.cost)

    def _modes(self) -> list[str]:
        num_slots = sum(len(one.members) for one in self._plan.species)
        # On a GPU launches cost so much that nothing wins apart.
        is_cpu = self._plan.cost.source == "cpu"
        others = ["apart"] * (num_slots <= _MANY_SLOTS) if is_cpu else ["plain"]
        return [self.lowering, "native", *others]


def _may_have_options() -> bool:
    """Return whether a step may be compiled ahead of time: not as a part of another.

    Nor where JAX has to see what it computes.
    """
    is_seen = any(getattr(jax.config, name) for name in _SEEN)
    return not is_seen and not is_within()


def _signature(stacks: Sequence[Any]) -> Hashable:
    """Return what a step that was compiled for some weights depends on."""
    where = getattr(stacks[0], "sharding", None) if stacks else None
    shapes = tuple([np.shape(x) for x in stacks])
    return shapes, where, default_device(), config_key()
