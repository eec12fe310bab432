"""Length buckets: the row shapes that a job is traced at, and how requests fit them.

A request of variable length is padded at the end of its variable axes to the smallest
shape that holds it; its outputs are cut back along every axis that carries one.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import jax.numpy as jnp
import numpy as np

from stfuse import _tree

Shapes = tuple[tuple[int, ...], ...]  # per leaf, without the row axis
Axis = tuple[int, int]  # an input leaf and an axis of it
# All pairs of so many axes that the function wants of one size are tried, no more.
_MOST_TIED = 6


@dataclass(frozen=True, slots=True)
class Lengths:
    """The row shapes of one job.

    Attributes:
        shapes: per length, ascending, the shape of each input leaf.
        pad_values: per input leaf, what fills its padding.
        carried: per output leaf and axis, the input axes whose size it has at every
            length. Where it is not known which of them it follows, there are several,
            and a request must have one size along them.
    """

    shapes: tuple[Shapes, ...]
    pad_values: tuple[Any, ...]
    carried: tuple[tuple[tuple[Axis, ...], ...], ...]

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

    def unequal(self, found: Shapes) -> tuple[Axis, Axis] | None:
        """Return two axes of which an output may follow either, of unlike sizes."""
        for axes in (axes for leaf in self.carried for axes in leaf):
            for one, other in itertools.pairwise(axes):
                if found[one[0]][one[1]] != found[other[0]][other[1]]:
                    return one, other
        return None

    def out_sizes(self, found: Shapes, outputs: Shapes) -> Shapes:
        """Return the shapes that outputs are cut back to.

        Args:
            found: shapes of the request's inputs.
            outputs: shapes of the outputs at the length it was padded to.
        """
        return tuple(
            tuple(
                found[axes[0][0]][axes[0][1]] if axes else size
                for size, axes in zip(shape, carried, strict=True)
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
    inputs: Sequence[Shapes],
    outputs: Sequence[Shapes],
    probe: Callable[[Shapes], Shapes | None],
) -> tuple[tuple[tuple[Axis, ...], ...], ...]:
    """Return, per output leaf and axis, the variable input axes that it may follow.

    Args:
        inputs: per length, the shapes of the input leaves.
        outputs: per length, the shapes of the output leaves.
        probe: returns the output shapes at other input shapes, or None where the
            function does not take them.
    """
    alike: dict[tuple[int, ...], list[Axis]] = {}
    for axis, sizes in _sizes(inputs).items():
        if len(set(sizes)) > 1:
            alike.setdefault(sizes, []).append(axis)
    followers: dict[tuple[int, ...], list[Axis]] = {}
    for axis, sizes in _sizes(outputs).items():
        followers.setdefault(sizes, []).append(axis)
    followed: dict[Axis, tuple[Axis, ...]] = {}
    for sizes, axes in alike.items():
        found = {follower: set(axes) for follower in followers.get(sizes, ())}
        if len(axes) > 1 and found:
            _tell_apart(found, axes, sizes, inputs, probe)
        for follower, left in found.items():
            # None is left of a size that is the smaller of two, or the larger.
            followed[follower] = tuple(a for a in axes if a in left or not left)
    return tuple(
        tuple(followed.get((i, axis), ()) for axis in range(len(shape)))
        for i, shape in enumerate(outputs[0])
    )


def _tell_apart(
    found: dict[Axis, set[Axis]],
    axes: Sequence[Axis],
    sizes: tuple[int, ...],
    inputs: Sequence[Shapes],
    probe: Callable[[Shapes], Shapes | None],
) -> None:
    """Drop from ``found`` what an output does not follow, by making axes unlike.

    Some axes get the size of another length, which the function is known to take.
    Those that it does not take alone, as ids without their mask, are tried together.
    """
    small, large = sorted(set(sizes))[-2:]
    if small == 1:  # it would be broadcast
        small, large = large, large + 1
    base = inputs[sizes.index(small)]
    for num in range(1, len(axes) // 2 + 1):
        refused = set()
        for chosen in itertools.combinations(axes, num):
            out = probe(_resized(base, chosen, large))
            if out is None:
                refused.update(chosen)
                continue
            for (i, axis), left in found.items():
                if out[i][axis] == small:
                    left.difference_update(chosen)
                elif out[i][axis] == large:
                    left.intersection_update(chosen)
        if num == 1:
            axes = [axis for axis in axes if axis in refused]
        is_settled = all(len(left) < 2 for left in found.values())
        if is_settled or len(axes) > _MOST_TIED or 2 * (num + 1) > len(axes):
            return


def _sizes(shapes: Sequence[Shapes]) -> dict[Axis, tuple[int, ...]]:
    """Return, by leaf and axis, its size at each length."""
    return {
        (i, axis): tuple(at_length[i][axis] for at_length in shapes)
        for i, shape in enumerate(shapes[0])
        for axis in range(len(shape))
    }


def _resized(shapes: Shapes, axes: Sequence[Axis], size: int) -> Shapes:
    return tuple(
        tuple(size if (i, a) in axes else n for a, n in enumerate(shape))
        for i, shape in enumerate(shapes)
    )


def _holds(shape: tuple[int, ...], found: tuple[int, ...]) -> bool:
    return len(shape) == len(found) and all(
        n <= size for n, size in zip(found, shape, strict=True)
    )
