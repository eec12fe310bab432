"""Length buckets: the row shapes that a job is traced at, and how requests fit them.

A request of variable length is padded at the end of its variable axes to the smallest
shape that holds it; its outputs are cut back along every axis that carries one.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import jax.numpy as jnp
import numpy as np

from stfuse import _tree

Shapes = tuple[tuple[int, ...], ...]  # per leaf, without the row axis


@dataclass(frozen=True, slots=True)
class Lengths:
    """The row shapes of one job.

    Attributes:
        shapes: per length, ascending, the shape of each input leaf.
        pad_values: per input leaf, what fills its padding.
        carried: per output leaf and axis, the input leaf and axis whose size it has at
            every length, or None.
    """

    shapes: tuple[Shapes, ...]
    pad_values: tuple[Any, ...]
    carried: tuple[tuple[tuple[int, int] | None, ...], ...]

    def fit(self, found: Shapes) -> int | None:
        """Return the first length whose shapes hold the found ones, or None."""
        for length, shapes in enumerate(self.shapes):
            if all(_holds(s, f) for s, f in zip(shapes, found, strict=True)):
                return length
        return None

    def pad(self, leaf: Any, i: int, length: int) -> Any:
        """Return input leaf ``i``, ``[B, ...]``, padded to a length it fits.

        An axis that is the same at every length is left for the caller to refuse.
        """
        widths = [(0, 0)]
        for axis, size in enumerate(self.shapes[length][i]):
            is_variable = len({shapes[i][axis] for shapes in self.shapes}) > 1
            widths.append((0, size - leaf.shape[axis + 1] if is_variable else 0))
        if not any(after for _, after in widths):
            return leaf
        pad = jnp.pad if _tree.is_tracer(leaf) else np.pad
        return pad(leaf, widths, constant_values=self.pad_values[i])

    def out_sizes(self, found: Shapes, outputs: Shapes) -> Shapes:
        """Return the shapes that outputs are cut back to.

        Args:
            found: shapes of the request's inputs.
            outputs: shapes of the outputs at the length it was padded to.
        """
        return tuple(
            tuple(
                size if at is None else found[at[0]][at[1]]
                for size, at in zip(shape, carried, strict=True)
            )
            for shape, carried in zip(outputs, self.carried, strict=True)
        )

    def __str__(self) -> str:
        """Print as ``[16], [32]``: the shapes of each length."""
        return "; ".join(
            ", ".join("[" + ",".join(map(str, s)) + "]" for s in shapes)
            for shapes in self.shapes
        )


def carried_axes(
    inputs: Sequence[Shapes], outputs: Sequence[Shapes]
) -> tuple[tuple[tuple[int, int] | None, ...], ...]:
    """Return, per output leaf and axis, the variable input axis that it follows.

    Args:
        inputs: per length, the shapes of the input leaves.
        outputs: per length, the shapes of the output leaves.
    """
    sources: dict[tuple[int, ...], tuple[int, int]] = {}
    for i, shape in enumerate(inputs[0]):
        for axis in range(len(shape)):
            sizes = tuple(shapes[i][axis] for shapes in inputs)
            if len(set(sizes)) > 1:
                sources.setdefault(sizes, (i, axis))
    return tuple(
        tuple(
            sources.get(tuple(shapes[i][axis] for shapes in outputs))
            for axis in range(len(shape))
        )
        for i, shape in enumerate(outputs[0])
    )


def _holds(shape: tuple[int, ...], found: tuple[int, ...]) -> bool:
    return len(shape) == len(found) and all(
        n <= size for n, size in zip(found, shape, strict=True)
    )
