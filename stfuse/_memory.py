"""Plans device memory: what lanes hold, what more would need, and whether it fits.

Rules:
    Held for ever: the weights of every lane. Held while it runs, by each of two steps
    in flight: what `memory_analysis` says of the largest compiled step, its arguments
    without the bank, its outputs and temporaries.
    While a lane is built anew its old weights stay, so both count, and what it is to
    hold is nobody else's from the moment that it was found to fit.
    An open step may copy the weights that it reads by index. It is a choice more for
    the scheduler, so it must not take the place of a tenant: where there is a limit,
    it is left out if it needs much more than the lane's other steps.
    What is asked of the device before it is done is arithmetic only: nothing has to
    fail to find out that it does not fit.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any

from stfuse import _bank
from stfuse._errors import DeviceError
from stfuse._lane import Lane
from stfuse._types import Bucket, Device

_IN_FLIGHT = 2
_MUCH_MORE = 1.25


class DoesNotFit(DeviceError):
    """Something would need more memory than the device has left."""


class Memory:
    """The memory of one device.

    Args:
        device: may have a ``memory_limit_bytes``, and say what is in use.
        max_device_bytes: a lower limit, or the only one.
        lanes: the lanes that serve now.
    """

    def __init__(
        self,
        device: Device,
        max_device_bytes: int | None,
        lanes: Callable[[], Iterable[Lane]],
    ) -> None:
        """Ask the device how much it has."""
        is_whole = isinstance(max_device_bytes, int) and max_device_bytes > 0
        if max_device_bytes is not None and not is_whole:
            raise ValueError(
                f"`stfuse.Engine`: max_device_bytes is {max_device_bytes!r}; pass a "
                f"whole number >= 1, or None."
            )
        limits = (max_device_bytes, getattr(device, "memory_limit_bytes", None))
        self.limit_bytes = min((n for n in limits if n is not None), default=None)
        self._device = device
        self._lanes = lanes
        self._promised_bytes, self._coming = 0, ()

    def check(
        self,
        weights_bytes: int,
        steps: Iterable[int] = (),
        *,
        beside: Lane | None = None,
    ) -> None:
        """Refuse what does not fit beside the lanes that serve now.

        Args:
            weights_bytes: of a bank that is to be put on the device.
            steps: what compiled steps need beside the bank.
            beside: a lane that is on the device but does not serve yet.

        Raises:
            DoesNotFit: with the arithmetic.
        """
        if self.limit_bytes is None:
            return
        lanes = [*self._lanes(), *self._coming, *([beside] if beside else [])]
        lanes = list({id(lane): lane for lane in lanes}.values())
        stacks = {id(x): x for lane in lanes for x in lane.bank.stacks}
        held = sum(x.nbytes for x in stacks.values())  # siblings share some
        # What others in this process hold counts too, where the device tells.
        used = max(held, getattr(self._device, "memory_used_bytes", None) or 0)
        known = [n for lane in lanes for n in [*lane.step_bytes.values()]]
        working = _IN_FLIGHT * max([*known, *steps], default=0)
        used += self._promised_bytes
        needed = used + weights_bytes + working
        if needed > self.limit_bytes:
            raise DoesNotFit(
                f"it does not fit on the device: {weights_bytes:,} bytes of weights of "
                f"its lane, beside {used:,} in use (old ones stay till new ones serve) "
                f"and {working:,} bytes for {_IN_FLIGHT} steps in flight, make "
                f"{needed:,}; the limit is {self.limit_bytes:,}, so "
                f"{needed - self.limit_bytes:,} are missing. Remove jobs, unpin some, "
                f"lower max_batch_size or max_slots, or raise the limit."
            )

    def promise(self, weights_bytes: int) -> None:
        """Keep room for the weights of a lane that is to be built, if there is some.

        Raises:
            DoesNotFit: with the arithmetic.
        """
        self.expect(None)  # what was built before did not get to serve
        self.check(weights_bytes)
        self._promised_bytes = weights_bytes

    def expect(self, lane: Lane | None) -> None:
        """Count a lane that is built but does not serve yet; None if there is none."""
        self._promised_bytes, self._coming = 0, () if lane is None else (lane,)

    def fits(self, weights_bytes: int) -> bool:
        """Return whether more weights fit."""
        try:
            self.check(weights_bytes)
        except DoesNotFit:
            return False
        return True

    def admit(self, lane: Lane, bucket: Bucket, compiled: Any) -> None:
        """Enter what a compiled step needs, if it fits.

        Raises:
            DoesNotFit: with the arithmetic.
        """
        needed = step_bytes(compiled, bank_bytes(lane))
        if bucket.is_open and self.limit_bytes is not None:
            usual = max(lane.step_bytes.values(), default=0)
            if needed > _MUCH_MORE * usual:
                raise DoesNotFit(
                    f"a step needs {needed:,} bytes, the lane's others {usual:,} at "
                    f"most; tenants may need the difference."
                )
        self.check(0, [needed], beside=lane)
        lane.step_bytes[bucket] = needed


def step_bytes(compiled: Any, bank: int) -> int:
    """Return what a compiled step needs beside its bank, 0 if it cannot tell.

    Args:
        compiled: from a device's ``compile``.
        bank: bytes of its weights, which are arguments too.
    """
    ask = getattr(compiled, "memory_analysis", None)
    found = ask() if ask is not None else None
    if found is None:
        return 0
    arguments = max(found.argument_size_in_bytes - bank, 0)
    made = found.output_size_in_bytes - found.alias_size_in_bytes
    return arguments + max(made, 0) + found.temp_size_in_bytes


def own_bytes(lane: Lane) -> int:
    """Return the bytes of a lane's weights that a lane like it has apart."""
    kept = _bank.kept_once(lane.layout, lane.bank)
    return sum(x.nbytes for a, x in enumerate(lane.bank.stacks) if a not in kept)


def bank_bytes(lane: Lane, *, doubled: Sequence[int] = ()) -> int:
    """Return the bytes of a lane's weights, or what they would be with more slots.

    Args:
        lane: whose.
        doubled: species whose slots are counted twice.
    """
    layout, total = lane.layout, 0
    twice = {layout.bank_of[s] for s in doubled}
    for stack, shelf in zip(lane.bank.stacks, layout.shelves, strict=True):
        total += stack.nbytes
        for i in shelf:
            buffer, rows = layout.params[i], layout.rows_of(i)
            growing = {b for b, _ in buffer.members} & twice
            if len(shelf) > 1 or rows == 1 or _bank.is_stacked(stack, buffer):
                row_bytes = stack.nbytes // len(shelf) // rows
                total += row_bytes * sum(layout.capacities[b] for b in growing)
    return total
