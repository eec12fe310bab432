"""One request's inputs: checked, converted, padded to a length, or refused."""

from __future__ import annotations

import contextlib
import math
import numbers
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from stfuse import _tree
from stfuse._errors import RequestError
from stfuse._job import Job
from stfuse._lengths import Shapes


@dataclass(slots=True)  # not frozen: that would double the time to build one
class Checked:
    """One request's inputs as a step takes them.

    Attributes:
        leaves: ``[B, ...]`` per input leaf, padded to its length; or its bytes.
        rows: B.
        length: which of the job's programs they are for.
        out_sizes: per output leaf the shape it is cut back to; None for all of it.
    """

    leaves: list[Any]
    rows: int
    length: int = 0
    out_sizes: Shapes | None = None

    @property
    def num_bytes(self) -> int:
        """Bytes of all leaves, if they are bytes."""
        return sum(map(len, self.leaves))


class Form:
    """What most requests of a job look like, worked out once per job.

    Args:
        job: whose requests.

    Attributes:
        structure: of the inputs.
        leaves: per leaf its dtype and its row's shape.
        is_plain: whether requests have rows, all of one shape.
        is_array: whether they are plain, and one array each.
    """

    __slots__ = ("is_array", "is_plain", "job", "leaves", "structure")

    def __init__(self, job: Job) -> None:
        """Read a job's specs."""
        self.job = job
        self.structure = jax.tree.structure(job.row)
        self.leaves = [(x.dtype, x.shape) for x in jax.tree.leaves(job.row)]
        self.is_plain = job.batched and job.lengths is None and bool(self.leaves)
        self.is_array = self.is_plain and self.structure == jax.tree.structure(0)

    def check(self, inputs: Any, most_rows: int, *, call: str) -> Checked:
        """Return a request's inputs as bytes; `check_inputs` without its detours.

        Whatever is not plainly right goes the long way, which converts or refuses it.

        Args:
            inputs: pytree like the job's example.
            most_rows: B at most.
            call: the public call to name in errors.

        Raises:
            RequestError: as of `check_inputs`, or too many rows.
        """
        rows, leaves, found = 0, [], ()
        if self.is_array:
            found = (inputs,)
        elif self.is_plain:
            with contextlib.suppress(ValueError, TypeError):
                found = self.structure.flatten_up_to(inputs)
        for x, (dtype, shape) in zip(found, self.leaves):  # noqa: B905, it costs
            if type(x) is not np.ndarray or x.dtype != dtype or not x.ndim:
                break
            size = len(x)
            if x.shape[1:] != shape or size != (rows or size):
                break
            rows = size
            leaves.append(x.tobytes())
        if rows and len(leaves) == len(self.leaves):
            checked = Checked(leaves, rows)
        else:
            checked = check_inputs(self.job, inputs, call=call)
            if any(map(_tree.is_tracer, checked.leaves)):
                what = "found traced inputs; pass arrays, from outside of jax.jit"
                raise _refused(call, self.job, what)
            checked.leaves = [leaf.tobytes() for leaf in checked.leaves]
        if checked.rows > most_rows:
            what = f"found {checked.rows} rows; expected at most max_batch_size = "
            more = f"{most_rows}. Send several requests"
            raise _refused(call, self.job, what + more)
        return checked


def check_seconds(job: Job, deadline_s: Any, *, call: str) -> float:
    """Return a request's deadline, if it is a number of seconds.

    Raises:
        RequestError: it is not.
    """
    try:
        is_real = type(deadline_s) is float or isinstance(deadline_s, numbers.Real)
        found = float(deadline_s) if is_real else math.nan
    except OverflowError:  # too long to print, too
        what = "deadline_s is a number of too many digits; pass seconds"
        raise _refused(call, job, what) from None
    if math.isnan(found):
        raise _refused(call, job, f"deadline_s is {deadline_s!r}; pass seconds")
    return found


def check_inputs(job: Job, inputs: Any, *, call: str) -> Checked:
    """Return one request's inputs as a step takes them.

    Args:
        job: whose request it is.
        inputs: pytree like ``job.example``. Arrays must have the declared dtype;
            Python numbers and lists are converted to it.
        call: the public call to name in errors.

    Returns:
        NumPy arrays, or tracers as they came; an unbatched job's inputs are one row.

    Raises:
        RequestError: names the leaf, what was found and what was expected.
    """
    structure = jax.tree.structure(job.row)
    try:
        found = structure.flatten_up_to(inputs)
    except (ValueError, TypeError) as error:
        difference = _difference(job.row, inputs, error)
        raise _refused(call, job, f"inputs do not fit: {difference}") from None
    declared = _tree.leaves_with_paths(job.programs[-1].example)
    wheres = [f"inputs leaf '{path}'" if path else "inputs" for path, _ in declared]
    leaves = [
        _to_array(call, job, where, example, row, x)
        for where, (_, example), row, x in zip(
            wheres, declared, jax.tree.leaves(job.row), found, strict=True
        )
    ]
    if not job.batched:
        leaves = [leaf[None] for leaf in leaves]
    length, out_sizes = 0, None
    if job.lengths is not None:
        shapes = tuple(leaf.shape[1:] for leaf in leaves)
        fitting = job.lengths.fit(shapes)
        if fitting is None:
            texts = ", ".join(_tree.describe(leaf) for leaf in leaves)
            raise _refused(
                call, job, f"inputs {texts} fit none of its lengths: {job.lengths}"
            )
        unequal = job.lengths.unequal(shapes)
        if unequal is not None:
            texts = " and ".join(
                f"{wheres[i]} has {shapes[i][axis]} along axis {axis + job.batched}"
                for i, axis in unequal
            )
            what = f"{texts}; the outputs may be as long as either. Pass one size"
            raise _refused(call, job, what)
        length = fitting
        leaves = [job.lengths.pad(x, i, length) for i, x in enumerate(leaves)]
        at_length = jax.tree.leaves(job.by_length[length].outputs)
        out_sizes = job.lengths.out_sizes(shapes, tuple(s.shape for s in at_length))
    rows = _check_shapes(call, job, job.programs[length], wheres, leaves)
    return Checked(leaves, rows, length, out_sizes)


def _difference(expected: Any, found: Any, error: Exception) -> str:
    """Return a text on how inputs differ, as far as they can be read."""
    try:
        return _tree.first_difference(expected, found) or str(error)
    except Exception as unreadable:  # keys that do not sort, say
        return str(unreadable)


def _check_shapes(
    call: str, job: Job, program: Job, wheres: list[str], leaves: list[Any]
) -> int:
    """Return the number of rows, the same in every leaf."""
    rows: int | None = None
    for where, row, leaf in zip(
        wheres, jax.tree.leaves(program.row), leaves, strict=True
    ):
        if leaf.ndim != len(row.shape) + 1 or leaf.shape[1:] != row.shape:
            lead = ("B",) if job.batched else ()
            want = ",".join(map(str, (*lead, *row.shape)))
            shown = _tree.describe(leaf if job.batched else leaf[0])
            raise _refused(call, job, f"{where} is {shown}; expected [{want}]")
        if leaf.shape[0] == 0:
            raise _refused(call, job, f"{where} has no rows; expected at least one")
        if rows is not None and leaf.shape[0] != rows:
            raise _refused(
                call,
                job,
                f"{where} has {leaf.shape[0]} rows; the first leaf has {rows}",
            )
        rows = leaf.shape[0]
    return 1 if rows is None else rows


def _refused(call: str, job: Job, what: str) -> RequestError:
    return RequestError(f"`{call}`: job '{job.name}': {what}.", jobs=(job.name,))


_KINDS = (np.bool_, np.integer, np.floating, np.complexfloating)


def _kind(dtype: Any) -> int:
    """Return the rank of a dtype's kind; a lower one converts without loss of kind."""
    return next((i for i, kind in enumerate(_KINDS) if jnp.issubdtype(dtype, kind)), 9)


def _to_array(call: str, job: Job, where: str, example: Any, row: Any, x: Any) -> Any:
    """Return one leaf with the dtype that the trace expects, or refuse it."""
    declared = np.dtype(example.dtype) if hasattr(example, "dtype") else row.dtype
    if isinstance(x, jax.Array | np.ndarray | np.generic):
        if x.dtype not in (declared, row.dtype):
            # A foreign byte order prints like the native one: show its code.
            is_numpy = isinstance(x.dtype, np.dtype) and x.dtype.kind != "V"
            found = x.dtype.str if is_numpy else x.dtype
            raise _refused(
                call, job, f"{where} has dtype {found}; expected {declared} (native)"
            )
        if _tree.is_tracer(x):
            return x
        if isinstance(x, jax.Array) and x.is_deleted():
            raise _refused(call, job, f"{where} is a deleted array; pass a live one")
        return np.array(x, row.dtype, order="C", copy=None)
    try:
        raw = np.asarray(x)
        if raw.dtype.kind in "OSUMmV" or _kind(raw.dtype) > _kind(row.dtype):
            raise TypeError(f"{raw.dtype} does not convert to {row.dtype}")
        return np.array(x, row.dtype)
    except Exception as error:  # an object converts itself by code of its own
        found, text = type(x).__name__, str(error).split("\n")[0]
        raise _refused(
            call, job, f"{where} is a {found}; expected {declared} array ({text})"
        ) from None
