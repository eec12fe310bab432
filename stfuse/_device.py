"""A JAX device as the engine sees it: compile, put, launch, read."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import jax
import numpy as np

from stfuse._stacked import to_host


class JaxDevice:
    """One accelerator (or the CPU) through JAX.

    Args:
        device: a ``jax.Device``; None for the default one.
    """

    def __init__(self, device: Any = None) -> None:
        """Choose the device."""
        self._device = jax.devices()[0] if device is None else device
        self._sharding = jax.sharding.SingleDeviceSharding(self._device)

    @property
    def name(self) -> str:
        """What the device is called; part of a compiled step's signature."""
        return f"{self._device.platform}:{self._device.id}"

    @property
    def is_accelerator(self) -> bool:
        """Whether it computes beside the host, rather than being it."""
        return self._device.platform != "cpu"

    @property
    def memory_limit_bytes(self) -> int | None:
        """How much memory it has for JAX; None where it does not say, as a CPU."""
        return (self._device.memory_stats() or {}).get("bytes_limit")

    @property
    def memory_used_bytes(self) -> int | None:
        """How much of it is in use, whoever uses it; None where it does not say."""
        return (self._device.memory_stats() or {}).get("bytes_in_use")

    def put_on_host(self, leaves: Sequence[Any]) -> tuple[Any, ...]:
        """Keep arrays in the host's memory, where the device reads them fastest."""
        kinds = {memory.kind for memory in self._device.addressable_memories()}
        if "pinned_host" not in kinds:
            return tuple(map(np.asarray, leaves))
        pinned = self._sharding.with_memory_kind("pinned_host")
        return tuple(jax.device_put(tuple(leaves), pinned))

    def compile(self, step_fn: Callable[..., Any], *specs: Any) -> Callable[..., Any]:
        """Compile ``step_fn`` ahead of time for this device.

        Args:
            step_fn: what to compile.
            *specs: per argument a pytree of ``jax.ShapeDtypeStruct``.
        """
        placed = jax.tree.map(
            lambda s: jax.ShapeDtypeStruct(s.shape, s.dtype, sharding=self._sharding),
            specs,
        )
        return jax.jit(step_fn).lower(*placed).compile()

    def put(self, tree: Any) -> Any:
        """Copy arrays to the device, unless they are there."""
        return jax.device_put(tree, self._sharding)

    def launch(
        self, compiled: Callable[..., Any], bank: Any, slots: Any, inputs: Any
    ) -> Any:
        """Start a step; its outputs begin to travel back as soon as they exist.

        Args:
            compiled: from `compile`.
            bank: device arrays.
            slots: host arrays.
            inputs: host buffers, not to be written to before `read` returns.
        """
        outputs = compiled(bank, slots, inputs)
        if self.is_accelerator:
            for array in outputs:
                if array is not None:
                    array.copy_to_host_async()
        return outputs

    def read(self, outputs: Any) -> Sequence[Any]:
        """Wait for a step and return its outputs as host arrays."""
        # Plain loops: a tree map costs more than the arrays that it visits.
        return [None if x is None else to_host(x) for x in outputs]
