"""A JAX device as the engine sees it: compile, put, launch, read.

Beside an accelerator, what goes into a step and what comes out of it stands in host
memory that the device reads and writes itself (pinned). Transfers from and to ordinary
memory are calls of their own, and each gives the interpreter away.
"""

from __future__ import annotations

import ctypes
import os
from collections.abc import Callable, Sequence
from typing import Any

import jax
import numpy as np
from absl import logging

from stfuse._cost import default_device
from stfuse._stacked import to_host
from stfuse._step import OVERLAPPING

_PINNED = "pinned_host"
# Beside others no kernel is tried on their device, which makes no step slower, and most
# cores are theirs: the threads that serve wait for one as for the device.
_BESIDE: dict[str, Any] = {
    "xla_gpu_autotune_level": 0,
    "xla_gpu_force_compilation_parallelism": max((os.cpu_count() or 1) // 4, 1),
}
_PACKED = ("int2", "int4", "uint2", "uint4", "float4_e2m1fn")


class _Pinned(np.ndarray):
    """The memory of a pinned array, to be written to.

    Attributes:
        array: the ``jax.Array``; of parts of it None.
    """

    array: Any = None


class _PinnedOutputs(tuple[Any, ...]):
    """What such a step returns."""

    __slots__ = ()


class _PinnedStep:
    """A compiled step whose inputs and outputs are in pinned memory."""

    def __init__(self, jitted: Any, specs: Sequence[Any], options: Any) -> None:
        """Compile."""
        lowered = jitted.lower(*specs)
        if not all(map(_can_be_pinned, jax.tree.leaves(lowered.out_info))):
            raise TypeError("outputs that fill no whole bytes, or are of 64 bits")
        compiled = lowered.compile(options)
        self._call, self.memory_analysis = compiled, compiled.memory_analysis

    def __call__(self, bank: Any, *staged: Sequence[Any]) -> Any:
        """Start it, over host buffers from `JaxDevice.allocate`."""
        outputs = self._call(
            bank, *[[getattr(x, "array", x) for x in buffers] for buffers in staged]
        )
        return _PinnedOutputs(outputs)


def _can_be_pinned(x: Any) -> bool:
    """Return whether an array's memory is the same to JAX on this thread and to NumPy.

    Not if it has numbers of 4 bits, which JAX packs, or of 64 where it takes 32.
    """
    if not isinstance(x.dtype, np.dtype):
        return False  # a typed key
    is_whole = x.dtype.name not in _PACKED
    return is_whole and jax.dtypes.canonicalize_dtype(x.dtype) == x.dtype


def _memory_of(array: Any) -> np.ndarray:
    """Return the memory of a pinned array, which lives as long as any part of this.

    What JAX would return is a copy of it, made in the time of whoever waits for it.
    """
    if not array.nbytes:
        return np.zeros(array.shape, array.dtype)
    address = array.unsafe_buffer_pointer()
    memory: Any = (ctypes.c_byte * array.nbytes).from_address(address)
    memory.array = array
    return np.frombuffer(memory, array.dtype).reshape(array.shape)


def _at(where: Any, specs: Any) -> Any:
    """Return specs that say where their arrays are."""
    return jax.tree.map(
        lambda s: jax.ShapeDtypeStruct(s.shape, s.dtype, sharding=where), specs
    )


class JaxDevice:
    """One accelerator (or the CPU) through JAX.

    Args:
        device: a ``jax.Device``; None for the default one.
        is_pinned: whether steps read and write pinned memory; None if it is a GPU
            that has some: others may lay arrays out in tiles there.
    """

    def __init__(self, device: Any = None, *, is_pinned: bool | None = None) -> None:
        """Choose the device."""
        self._device = default_device() if device is None else device
        self._sharding = jax.sharding.SingleDeviceSharding(self._device)
        if is_pinned is None:
            is_pinned = self._is_gpu and self._has_pinned
        self._is_pinned = is_pinned

    @property
    def name(self) -> str:
        """What the device is called; part of a compiled step's signature."""
        kind = "-pinned" * self._is_pinned
        return f"{self._device.platform}{kind}:{self._device.id}"

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

    @property
    def _is_gpu(self) -> bool:
        return self._device.platform == "gpu"

    @property
    def _has_pinned(self) -> bool:
        kinds = {memory.kind for memory in self._device.addressable_memories()}
        return _PINNED in kinds

    @property
    def _pinned(self) -> Any:
        return self._sharding.with_memory_kind(_PINNED)

    def put_on_host(self, leaves: Sequence[Any]) -> tuple[Any, ...]:
        """Keep arrays in the host's memory, where the device reads them fastest."""
        if not self._has_pinned:
            return tuple(map(np.asarray, leaves))
        return tuple(jax.device_put(tuple(leaves), self._pinned))

    def allocate(self, shape: tuple[int, ...], dtype: Any) -> np.ndarray:
        """Return a host buffer of zeros, where the device reads it fastest."""
        zeros = np.zeros(shape, dtype)
        if not (self._is_pinned and _can_be_pinned(zeros)):
            return zeros
        array = jax.block_until_ready(jax.device_put(zeros, self._pinned))
        # Nobody else has this array, and no step reads it while it is written to.
        buffer = _memory_of(array).view(_Pinned)
        buffer.array = array
        return buffer

    def compile(self, step_fn: Callable[..., Any], *specs: Any) -> Callable[..., Any]:
        """Compile a step ahead of time for this device.

        Args:
            step_fn: what to compile.
            *specs: of the bank, the slots and the inputs, each a pytree of
                ``jax.ShapeDtypeStruct``.
        """
        # Equal jobs' too: 64 MiniLMs at one row take 576 us instead of 598 on an H200.
        return self._compile(step_fn, specs, {**OVERLAPPING} if self._is_gpu else {})

    def compile_beside(
        self, step_fn: Callable[..., Any], *specs: Any
    ) -> Callable[..., Any]:
        """Compile a step while the device serves others, and keep away from it."""
        options = {**OVERLAPPING, **_BESIDE} if self._is_gpu else {}
        return self._compile(step_fn, specs, options)

    def _compile(
        self, step_fn: Callable[..., Any], specs: Sequence[Any], options: dict[str, Any]
    ) -> Callable[..., Any]:
        if self._is_pinned and all(map(_can_be_pinned, jax.tree.leaves(specs[1:]))):
            try:
                return self._compile_pinned(step_fn, options, *specs)
            except Exception as error:  # if it is not about that, it comes again
                text = "stfuse: a step is compiled without pinned memory: %s"
                logging.warning(text, error)
        lowered = jax.jit(step_fn).lower(*_at(self._sharding, specs))
        return lowered.compile(options)

    def _compile_pinned(
        self, step_fn: Callable[..., Any], options: Any, bank: Any, *staged: Any
    ) -> Callable[..., Any]:
        own = self._sharding.with_memory_kind(self._device.default_memory().kind)

        def step(bank: Any, *staged: Any) -> Any:
            return step_fn(bank, *jax.device_put(staged, own))

        specs = _at(own, bank), *_at(self._pinned, staged)
        jitted = jax.jit(step, out_shardings=self._pinned)
        return _PinnedStep(jitted, specs, options)

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
            slots: host arrays, from `allocate` or not.
            inputs: host buffers, the same; not to be written to before `read` returns.
        """
        outputs = compiled(bank, slots, inputs)
        if self.is_accelerator and not isinstance(outputs, _PinnedOutputs):
            for array in outputs:
                if array is not None:
                    array.copy_to_host_async()
        return outputs

    def read(self, outputs: Any) -> Sequence[Any]:
        """Wait for a step and return its outputs as host arrays."""
        if isinstance(outputs, _PinnedOutputs):
            arrays = [x if x is None else x.block_until_ready() for x in outputs]
            return [x if x is None else _memory_of(x) for x in arrays]
        # Plain loops: a tree map costs more than the arrays that it visits.
        return [None if x is None else to_host(x) for x in outputs]
