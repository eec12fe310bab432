"""Labels: which axes of which values are one.

An axis that is cut into several, or made of several, is their *composite*; its labels
in the end are its *leaves*. Sizes are per species, since species differ in them.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

from stfuse._lower import _tiles

_LEAST_OF_PRODUCT = 16  # of what a matrix unit takes

Axes = tuple[int | None, ...]  # labels; None is an axis of size one


class Conflict(Exception):
    """Axes that cannot have one label."""


class Labels:
    """Axes that must agree, as sets of labels."""

    def __init__(self) -> None:
        """Start without labels."""
        self.sizes: list[tuple[int, ...]] = []  # per label, of each species
        self._root: list[int] = []
        self._parts: dict[int, tuple[int, ...]] = {}
        self._block: set[int] = set()
        self._product: set[int] = set()

    def new(self, sizes: Sequence[int]) -> int | None:
        """Return a label for an axis of some sizes; None if all are one."""
        if set(sizes) == {1}:
            return None
        self._root.append(len(self._root))
        self.sizes.append(tuple(sizes))
        return self._root[-1]

    def of(self, shapes: Sequence[tuple[int, ...]]) -> Axes:
        """Return labels for a value that is like no other."""
        return tuple(map(self.new, zip(*shapes, strict=True)))

    def find(self, label: int) -> int:
        """Return what stands for all that agree with a label."""
        while self._root[label] != label:
            label = self._root[label]
        return label

    def unify(self, a: int | None, b: int | None) -> None:
        """Say that two axes agree.

        Raises:
            Conflict: they have other sizes, or are composites of unlike parts.
        """
        if a is None or b is None:
            if a is not b:
                raise Conflict
            return
        a, b = self.find(a), self.find(b)
        if a == b:
            return
        if self.sizes[a] != self.sizes[b]:
            raise Conflict
        self._root[b] = a
        own, other = self._parts.get(a), self._parts.pop(b, None)
        if own and other:
            if len(own) != len(other):
                raise Conflict
            for x, y in zip(own, other, strict=True):
                self.unify(x, y)
        elif other:
            self._parts[a] = other

    def compose(self, whole: int, parts: Sequence[int]) -> None:
        """Say that an axis is made of others, the last one walked first."""
        sizes = [self.sizes[p] for p in parts]
        if [math.prod(s) for s in zip(*sizes, strict=True)] != [*self.sizes[whole]]:
            raise Conflict
        made = self.new(self.sizes[whole])
        assert made is not None
        self._parts[made] = tuple(parts)
        self.unify(whole, made)

    def hold(self, axes: Axes, *, is_product: bool = False) -> None:
        """Say that a program needs all of some axes."""
        self._block |= {a for a in axes if a is not None}
        if is_product:
            self._product |= {a for a in axes if a is not None}

    def leaves(self, label: int | None) -> tuple[int, ...]:
        """Return what an axis is made of in the end."""
        if label is None:
            return ()
        root = self.find(label)
        parts = self._parts.get(root)
        return sum(map(self.leaves, parts), ()) if parts else (root,)

    def _leaves_of(self, labels: set[int]) -> set[int]:
        return {leaf for label in labels for leaf in self.leaves(label)}

    def extents(self) -> dict[int, int]:
        """Return how many places of each block label a program holds, a power of 2."""
        products = self._leaves_of(self._product)
        return {
            leaf: max(
                _tiles.power(max(self.sizes[leaf])),
                _LEAST_OF_PRODUCT if leaf in products else 1,
            )
            for leaf in self._leaves_of(self._block)
        }
