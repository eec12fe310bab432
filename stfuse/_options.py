"""The options of `stfuse.Engine`, checked."""

from __future__ import annotations

import math
import numbers
import threading
from collections.abc import Iterable, Sequence
from typing import Any

from stfuse._turns import LONG_S, OwnTurns
from stfuse._types import Policy


def is_real(x: Any) -> bool:
    """Return whether a value is a real number, infinity included."""
    return isinstance(x, numbers.Real) and not math.isnan(x)


def wait_of(timeout_s: float | None) -> float | None:
    """Return a timeout as locks take it: a float that is not too long."""
    return None if timeout_s is None else min(float(timeout_s), threading.TIMEOUT_MAX)


def check_sizes(**sizes: Any) -> None:
    """Refuse what is no whole number of at least one.

    Raises:
        ValueError: names the option.
    """
    for name, value in sizes.items():
        if not isinstance(value, int) or value < 1:
            raise ValueError(
                f"`stfuse.Engine`: {name} is {value!r}; pass a whole number >= 1."
            )


def rows_of(batch_sizes: Sequence[int] | None, max_batch_size: int) -> tuple[int, ...]:
    """Return the rows of a slot that steps are compiled for, ascending.

    Raises:
        ValueError: one of them is no whole number of at least one, or above the most.
    """
    if batch_sizes is None:
        batch_sizes = [1 << i for i in range(max_batch_size.bit_length())]
    if not isinstance(batch_sizes, Iterable):
        raise ValueError(
            f"`stfuse.Engine`: batch_sizes is {batch_sizes!r}; pass a list of whole "
            f"numbers, or None."
        )
    for size in batch_sizes:
        check_sizes(batch_sizes=size)
        if size > max_batch_size:
            raise ValueError(
                f"`stfuse.Engine`: batch_sizes has {size}; max_batch_size is "
                f"{max_batch_size}. Raise it, or leave {size} out."
            )
    return tuple(sorted({*batch_sizes, max_batch_size}))


def check_times(max_queue_delay_s: Any, clock: Any) -> None:
    """Refuse what is no time to wait, or no clock.

    Raises:
        ValueError: the time is negative or not a number, or the clock no function.
    """
    if not callable(clock):
        raise ValueError(
            f"`stfuse.Engine`: clock is {clock!r}; pass a function that returns "
            f"seconds, such as time.monotonic."
        )
    if not (is_real(max_queue_delay_s) and max_queue_delay_s >= 0):
        raise ValueError(
            f"`stfuse.Engine`: max_queue_delay_s is {max_queue_delay_s!r}; pass "
            f"seconds >= 0."
        )


def turns_of(asked_s: float | None, device: Any) -> OwnTurns:
    """Return how long threads' turns may be while a device serves.

    On a CPU the step itself needs the cores that more switches would take.

    Raises:
        ValueError: what was asked for is no time above zero.
    """
    if asked_s is None:
        is_apart = getattr(device, "is_accelerator", False)
        return OwnTurns(LONG_S, is_choosing=True) if is_apart else OwnTurns()
    if not (is_real(asked_s) and asked_s > 0):
        raise ValueError(
            f"`stfuse.Engine`: switch_interval_s is {asked_s!r}; pass seconds > 0, or "
            f"None."
        )
    return OwnTurns(asked_s)


def policy_of(name: str) -> Policy:
    """Return the policy of a name.

    Raises:
        ValueError: there is none.
    """
    try:
        return Policy(name)
    except ValueError:
        names = ", ".join(repr(p.value) for p in Policy)
        raise ValueError(
            f"`stfuse.Engine`: policy is {name!r}; pass one of {names}."
        ) from None
