"""Job: one model as its owner hands it in, checked when built."""

from __future__ import annotations

import functools
import math
import re
import types
import weakref
from collections.abc import Hashable
from dataclasses import KW_ONLY, dataclass, field, replace
from typing import Any

import jax
import numpy as np

from stfuse import _flax, _tree
from stfuse._errors import JobError
from stfuse._lengths import Lengths, Shapes, carried_axes
from stfuse._types import ApplyFn

_NAME = re.compile(r"[A-Za-z0-9._-]{1,64}")
# Tracing is the dearest part of building a job, and many tenants share a function.
# Weak keys: a forgotten function takes its trace (and closed-over arrays) with it.
_TRACED: weakref.WeakKeyDictionary[Any, dict[Hashable, Any]] = (
    weakref.WeakKeyDictionary()
)
# An object of a class of its own may equal another that traces differently, or be
# changed between two jobs: it is traced each time.
_REMEMBERED = (
    types.FunctionType,
    types.BuiltinFunctionType,
    types.MethodType,
    functools.partial,
    type(jax.jit(len)),
)
# The options of JAX that a jaxpr depends on.
_CONFIG = (
    "jax_default_matmul_precision jax_enable_x64 jax_explicit_x64_dtypes "
    "jax_default_prng_impl jax_enable_custom_prng jax_random_seed_offset "
    "jax_threefry_partitionable jax_high_dynamic_range_gumbel "
    "jax_numpy_dtype_promotion jax_numpy_rank_promotion jax_allow_f16_reductions "
    "jax_softmax_custom_jvp jax_disable_jit"
).split()


@dataclass(frozen=True, slots=True, eq=False)
class Job:
    """One model to be served: a pure function, its parameters, and a sample input.

    With ``batched=True`` the function takes rows: every input and output leaf has a
    leading axis B. It is traced at one row and stfuse maps the rows itself, so an
    answer never depends on who shares its batch. With ``batched=False`` the function
    is called on ``inputs`` as they are.

    Args:
        name: 1 to 64 of ``A-Z a-z 0-9 . _ -``; unique in an engine.
        apply_fn: pure ``(params, inputs) -> outputs`` over pytrees; must trace.
        params: pytree of arrays or ``jax.ShapeDtypeStruct``; never copied here.
        example: pytree of arrays or specs like one request's inputs, ``[B, ...]`` for
            any B when batched. Only shapes and dtypes are read.
        slo_s: default deadline of a request, seconds from its submission.
        weight: share of the device among tenants without deadlines.
        batched: whether inputs and outputs have a row axis.
        pinned: whether its weights stay on the device when there are more tenants than
            device memory, and others' live on the host while they have no requests.
        pad_values: for requests of variable length. ``example`` is a list then, of two
            or more samples that differ in the size of some axes; a request is padded
            at the end of those axes to the smallest sample that holds it, with this
            value (one for all leaves, or a pytree of one per leaf), and its outputs
            are cut back along every axis that has such an axis's size in all samples.
            Where several inputs have it, and trying does not tell which of them an
            output follows (ids and their mask), a request must have one size there.
            The answer is ``apply_fn`` of the padded inputs, cut back: a model must
            know its padding, from a mask or from ``pad_values`` themselves.

    Attributes:
        row: ``example`` (the largest) as specs, without the row axis.
        outputs: outputs as specs, without the row axis.
        jaxpr: the traced function of ``(params, row)``; only `_trace` reads it.
        lengths: the row shapes and how requests fit them; None for one fixed shape.
        by_length: this job at each of them, ascending.

    Raises:
        JobError: any argument is unusable; the message names the leaf, says what was
            found and what to pass.

    Example:
        >>> import jax.numpy as jnp
        >>> job = Job("double", lambda p, x: p * x, jnp.full((), 2.0), jnp.ones((1, 3)))
        >>> job.row.shape, job.outputs.shape
        ((3,), (3,))
    """

    name: str
    apply_fn: ApplyFn = field(repr=False)
    params: Any = field(repr=False)
    example: Any = field(repr=False)
    _: KW_ONLY
    slo_s: float | None = None
    weight: float = 1.0
    batched: bool = True
    pinned: bool = False
    pad_values: Any = field(default=None, repr=False)
    row: Any = field(init=False)
    outputs: Any = field(init=False)
    jaxpr: Any = field(init=False, repr=False)
    lengths: Lengths | None = field(init=False, default=None)
    by_length: tuple[Job, ...] = field(init=False, default=(), repr=False)

    def __post_init__(self) -> None:
        """Check every argument, then trace at one row."""
        _check_options(self)
        _check_leaves(self, "params", self.params)
        _check_leaves(self, "example", self.example)
        if self.pad_values is None:
            _set(self, row=_row_specs(self))
            jaxpr, outputs = _traced(self)
            _set(self, jaxpr=jaxpr, outputs=outputs)
        else:
            by_length, lengths = _lengths_of(self)
            _set(self, by_length=by_length, lengths=lengths)
            largest = by_length[-1]
            _set(self, row=largest.row, jaxpr=largest.jaxpr, outputs=largest.outputs)

    @property
    def programs(self) -> tuple[Job, ...]:
        """The job at each of its lengths, or the job itself."""
        return self.by_length or (self,)

    @classmethod
    def from_linen(
        cls, name: str, module: Any, variables: Any, example: Any, **apply_kwargs: Any
    ) -> Job:
        """Build a job from a Flax Linen module.

        Args:
            name: the job's name.
            module: a ``flax.linen.Module``; called as ``module.apply(variables, x)``.
            variables: its variable collections (``params``, ``batch_stats``, ...).
            example: a batch of inputs, ``[B, ...]`` per leaf.
            **apply_kwargs: passed on to ``module.apply``, for example ``train=False``.

        Returns:
            The job. Use ``dataclasses.replace`` to set its SLO or weight.

        Raises:
            JobError: as for the constructor.
        """
        return cls(name, _flax.linen_fn(module, apply_kwargs), variables, example)

    @classmethod
    def from_nnx(cls, name: str, model: Any, example: Any) -> Job:
        """Build a job from a Flax NNX model, in the mode (train, eval) that it is in.

        Args:
            name: the job's name.
            model: an ``nnx.Module``; split here, so later changes to it do not count.
            example: a batch of inputs, ``[B, ...]`` per leaf.

        Returns:
            The job; its params are the model's state as a plain nested dict.

        Raises:
            JobError: as for the constructor, or ``model`` is no ``nnx.Module``.
        """
        try:
            apply_fn, params = _flax.nnx_parts(model)
        except TypeError as error:
            what = f"`stfuse.Job.from_nnx`: job '{name}': {error}"
            raise JobError(what, jobs=(str(name),)) from None
        return cls(name, apply_fn, params, example)

    def flatten_params(self, params: Any) -> list[Any]:
        """Return params' leaves in trace order, checked against the job's.

        Args:
            params: pytree of arrays like ``self.params``.

        Returns:
            The leaves, as they are.

        Raises:
            JobError: a leaf is missing, unexpected, a spec, or of another shape.
        """
        difference = _tree.first_difference(self.params, params)
        if difference is not None:
            raise JobError(
                f"job '{self.name}': params do not fit: {difference}. Pass params of "
                f"the structure, shapes and dtypes that the job was built with.",
                jobs=(self.name,),
            )
        leaves = jax.tree.leaves(params)
        for i, leaf in enumerate(leaves):
            if _tree.is_spec(leaf):
                path = _tree.path_of(params, i)
                raise JobError(
                    f"job '{self.name}': params leaf '{path}' is only a shape, "
                    f"{_tree.describe(leaf)}; pass `pack({{'{self.name}': params}})` "
                    f"with arrays.",
                    jobs=(self.name,),
                )
        return leaves


def _set(job: Job, **derived: Any) -> None:
    """Fill in what follows from the arguments of a job that is being built."""
    for name, value in derived.items():
        object.__setattr__(job, name, value)


def _unusable(job: Job, what: str) -> JobError:
    return JobError(f"`stfuse.Job`: job '{job.name}': {what}.", jobs=(str(job.name),))


def _is_positive(x: Any) -> bool:
    number = isinstance(x, int | float | np.number) and not isinstance(x, bool)
    return bool(number and math.isfinite(x) and x > 0)


def _check_options(job: Job) -> None:
    if not isinstance(job.name, str) or not _NAME.fullmatch(job.name):
        raise _unusable(job, "name must be 1 to 64 of A-Z a-z 0-9 . _ -")
    if not callable(job.apply_fn):
        found = type(job.apply_fn).__name__
        raise _unusable(job, f"apply_fn is a {found}; pass a function (params, inputs)")
    if not (_is_positive(job.weight) and 1e-9 <= job.weight <= 1e9):
        what = "a positive number, from 1e-9 to 1e9"
        raise _unusable(job, f"weight is {job.weight!r}; pass {what}")
    if not isinstance(job.pinned, bool):
        raise _unusable(job, f"pinned is {job.pinned!r}; pass True or False")
    if job.slo_s is not None and not _is_positive(job.slo_s):
        raise _unusable(job, f"slo_s is {job.slo_s!r}; pass seconds > 0, or None")


def _check_leaves(job: Job, what: str, tree: Any) -> None:
    for path, leaf in _tree.leaves_with_paths(tree):
        if not _tree.is_arraylike(leaf):
            found = _tree.describe(leaf)
            raise _unusable(
                job, f"{what} leaf '{path}' is a {found}; pass an array or a spec"
            )
        if not getattr(getattr(leaf, "dtype", None), "isnative", True):
            found = leaf.dtype.str
            raise _unusable(
                job, f"{what} leaf '{path}' is {found}; pass native byte order"
            )
        if _tree.is_tracer(leaf):
            raise _unusable(job, f"{what} leaf '{path}' is traced; build jobs outside")
        if what == "example" and _tree.is_typed_key(leaf):
            raise _unusable(
                job,
                f"example leaf '{path}' is a typed PRNG key; pass "
                f"jax.random.key_data(key) and wrap it inside apply_fn",
            )


def _row_specs(job: Job) -> Any:
    """Return the example as specs of one row."""
    leaves = _tree.leaves_with_paths(job.example)
    specs = [_tree.spec_of(leaf) for _, leaf in leaves]
    if job.batched:
        if not leaves:
            raise _unusable(job, "example has no arrays, so no rows; use batched=False")
        for (path, leaf), spec in zip(leaves, specs, strict=True):
            if spec.ndim == 0 or spec.shape[:1] != specs[0].shape[:1]:
                raise _unusable(
                    job,
                    f"example leaf '{path}' is {_tree.describe(leaf)}; every leaf "
                    f"needs the same leading row axis (or use batched=False)",
                )
        specs = [jax.ShapeDtypeStruct(s.shape[1:], s.dtype) for s in specs]
    return jax.tree.unflatten(jax.tree.structure(job.example), specs)


def _traced(job: Job) -> tuple[Any, Any]:
    """Return the job's jaxpr and output specs, from memory where possible."""

    def row_fn(params: Any, row: Any) -> Any:
        if not job.batched:
            return job.apply_fn(params, row)
        out = job.apply_fn(params, jax.tree.map(lambda x: x[None], row))
        for path, leaf in _tree.leaves_with_paths(out):
            if np.shape(leaf)[:1] != (1,):
                raise _unusable(
                    job,
                    f"output leaf '{path}' is {_tree.describe(leaf)} for one row of "
                    f"inputs; expected a leading row axis, [1, ...]. Return rows, or "
                    f"use batched=False",
                )
        return jax.tree.map(lambda x: x[0], out)

    params = jax.tree.map(_traced_as, job.params)
    memo, key = _memo_of(job)
    if key not in memo:
        try:
            memo[key] = jax.make_jaxpr(row_fn, return_shape=True)(params, job.row)
        except JobError:
            raise
        except Exception as error:
            text = str(error).strip().split("\n")[0]
            raise _unusable(
                job,
                f"apply_fn does not trace on {_texts(job.row)}"
                f"{' (one row)' if job.batched else ''}: "
                f"{type(error).__name__}: {text}",
            ) from error
    return memo[key]


def _memo_of(job: Job) -> tuple[dict[Hashable, Any], Hashable]:
    """Return what is known of the job's function, and the key of this job's trace."""
    params = jax.tree.map(_traced_as, job.params)
    specs, structure = jax.tree.flatten((params, job.row))
    weak = (
        (s.shape, s.dtype, s.weak_type) if _tree.is_spec(s) else type(s) for s in specs
    )
    config = (getattr(jax.config, name, None) for name in _CONFIG)
    key = (*weak, structure, job.batched, *config)
    if type(job.apply_fn) not in _REMEMBERED:
        return {}, key
    try:
        return _TRACED.setdefault(job.apply_fn, {}), key
    except TypeError:  # not hashable or not weakly referable
        return {}, key


def _traced_as(x: Any) -> Any:
    """Return a parameter's spec; weak types decide dtypes inside the model."""
    if not hasattr(x, "dtype"):  # a Python number
        return x
    is_weak = getattr(x, "weak_type", False)
    spec = _tree.spec_of(x)
    return jax.ShapeDtypeStruct(spec.shape, spec.dtype, weak_type=is_weak)


def _texts(tree: Any) -> str:
    return ", ".join(
        f"{path or 'inputs'}: {_tree.describe(leaf)}"
        for path, leaf in _tree.leaves_with_paths(tree)
    )


def _lengths_of(job: Job) -> tuple[tuple[Job, ...], Lengths]:
    """Return a job of variable length at each of its lengths, smallest first."""
    samples = job.example
    if not isinstance(samples, list | tuple) or len(samples) < 2:
        raise _unusable(job, "with pad_values, example must list two or more samples")
    first = jax.tree.structure(samples[0])
    for sample in samples[1:]:
        if jax.tree.structure(sample) != first:
            raise _unusable(job, "the samples of example differ in structure")
    at_each = [replace(job, example=x, pad_values=None) for x in samples]
    at_each.sort(key=lambda j: sum(math.prod(s) for s in _shapes(j.row)))
    ranks = {tuple(map(len, _shapes(j.row))) for j in at_each}
    if len(ranks) > 1 or len({j.name for j in at_each}) != 1:
        raise _unusable(job, "the samples of example differ in rank")
    if len({tuple(x.dtype for x in jax.tree.leaves(j.row)) for j in at_each}) > 1:
        raise _unusable(job, "the samples of example differ in dtype; pass one for all")
    if len({_shapes(j.row) for j in at_each}) < len(at_each):
        raise _unusable(job, "two samples of example have the same shapes")
    try:
        values = first.flatten_up_to(job.pad_values)
    except ValueError:
        values = [job.pad_values] * first.num_leaves
    if any(np.ndim(v) != 0 or not _tree.is_arraylike(v) for v in values):
        raise _unusable(job, "pad_values must be a number, or one for each input leaf")
    return tuple(at_each), _fitted(at_each, tuple(values))


def _fitted(at_each: list[Job], pad_values: tuple[Any, ...]) -> Lengths:
    """Return how requests fit a job's lengths, from memory where possible."""
    first = at_each[0]
    leaves, structure = jax.tree.flatten(first.row)

    def probe(shapes: Shapes) -> Shapes | None:
        lead = (1,) if first.batched else ()
        specs = [
            jax.ShapeDtypeStruct((*lead, *shape), leaf.dtype)
            for shape, leaf in zip(shapes, leaves, strict=True)
        ]
        try:
            job = replace(first, example=jax.tree.unflatten(structure, specs))
        except JobError:
            return None
        found = _shapes(job.outputs)
        is_like = list(map(len, found)) == list(map(len, _shapes(first.outputs)))
        return found if is_like else None

    rows = tuple(_shapes(job.row) for job in at_each)
    memo, key = _memo_of(first)
    if (rows, key) not in memo:
        outputs = [_shapes(job.outputs) for job in at_each]
        memo[rows, key] = carried_axes(rows, outputs, probe)
    return Lengths(rows, pad_values, memo[rows, key])


def _shapes(tree: Any) -> Shapes:
    return tuple(leaf.shape for leaf in jax.tree.leaves(tree))
