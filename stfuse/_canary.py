"""A request of our own whose answer is known: does the device still compute?"""

from __future__ import annotations

from typing import Any

import jax.numpy as jnp
import numpy as np

from stfuse import _cost, _lane, _staging
from stfuse._job import Job
from stfuse._lane import Lane, Member
from stfuse._trace import trace
from stfuse._types import Bucket, Chunk, Device

_NAME = "canary"
_BUCKET = Bucket((1,), 1)
_CHUNK = Chunk(_NAME, (0,), 1)
# Small whole numbers: exact in every float format and at every precision.
_ROW = np.array([[1.0, 2.0, 3.0]], np.float32)
_LEAVES = {0: [_ROW.tobytes()]}
_PARAMS = np.array([[1, 0, 2], [0, 1, 1], [1, 1, 0]], np.float32)
_ANSWER = [[4.0, 5.0, 4.0]]


class Canary:
    """One row that goes where every request goes: staged, launched, read, cut.

    Args:
        device: what is asked.
    """

    def __init__(self, device: Device) -> None:
        """Build nothing yet."""
        self._device = device
        self._lane: Lane | None = None
        self.failure = "its canary is not compiled yet"

    @property
    def is_ready(self) -> bool:
        """Whether it is compiled."""
        return self._lane is not None

    def prepare(self) -> None:
        """Compile it unless it is; off the request path."""
        if self._lane is not None:
            return
        cost = _cost.RECORDS["cpu"]  # one launch: nothing to choose, nothing to measure
        try:
            job = Job(_NAME, _apply, _PARAMS, _ROW)
            member = Member(job, tuple(map(trace, job.programs)), (_PARAMS,))
            lane = _lane.build(_NAME, [member], self._device, cost=cost)
            lane.steps[_BUCKET] = _lane.compile_bucket(
                lane, _BUCKET, self._device, cost=cost
            )
        except Exception as error:  # a compiler may raise anything; asked again later
            self.failure = f"its canary failed to compile: {_text(error)}"
        else:
            self._lane, self.failure = lane, ""

    def problem(self) -> str:
        """Run it, on the device thread; return what is wrong, or nothing."""
        lane = self._lane
        if lane is None:
            return self.failure
        try:
            staged, placed = _staging.stage(lane, _BUCKET, [_CHUNK], _LEAVES)
            slots, inputs, _ = staged
            step = lane.steps[_BUCKET]
            outputs = self._device.read(
                self._device.launch(step, lane.bank.stacks, slots, inputs)
            )
        except Exception as error:  # whatever a device raises
            return f"the canary failed: {_text(error)}"
        ((species, slot),) = placed
        ((i, row, _),) = _staging.cut_places(lane, _BUCKET, species)
        found = np.asarray(outputs[i])[row + slot].tolist()
        _staging.release(lane, _BUCKET, staged)
        if found != _ANSWER:
            return f"the canary's answer is {found}; expected {_ANSWER}"
        return ""


def _apply(kernel: Any, x: Any) -> Any:
    return jnp.dot(x, kernel)


def _text(error: Exception) -> str:
    return f"{type(error).__name__}: {error}"
