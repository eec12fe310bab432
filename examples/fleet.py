"""Tenants with equal models, each its own weights: what serving benchmarks serve.

Axes: N tenants, I different requests of each, B rows of a request, F features.
"""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Iterator, Sequence
from typing import Any

import jax
import numpy as np

import stfuse
from examples import load, workloads
from examples.workloads import Workload

NUM_INPUTS = 8  # I: enough to notice an answer that went to another request


@dataclasses.dataclass(frozen=True, slots=True)
class Fleet:
    """Tenants, what they ask, and what their models answer alone.

    Attributes:
        jobs: one for each tenant, N.
        targets: the same tenants' requests, of B rows each.
        alone: what each model alone answers to its requests, float32 [N, I, F].
        rows: B.
    """

    jobs: Sequence[stfuse.Job]
    targets: Sequence[load.Target]
    alone: np.ndarray
    rows: int

    def first(self, num: int) -> Fleet:
        """Return the first tenants only."""
        return Fleet(self.jobs[:num], self.targets[:num], self.alone[:num], self.rows)

    def difference(
        self, tenants: np.ndarray, rows: np.ndarray, outputs: Sequence[Any]
    ) -> float:
        """Return the largest relative difference of answers from the models alone.

        Args:
            tenants: who asked, int [R].
            rows: which of its requests, int [R].
            outputs: answers, R; None where there is none.

        Returns:
            Norm of the difference over norm of the answer, the largest; infinite if an
            answer is not finite, 0 if there is none.
        """
        there = [i for i, output in enumerate(outputs) if output is not None]
        worst = 0.0
        for start in range(0, len(there), 4096):  # bounds what is held twice
            some = there[start : start + 4096]
            expected = self.alone[tenants[some], rows[some]]
            given = np.stack([_flat(outputs[i]) for i in some])
            error = np.linalg.norm(given - expected, axis=-1)
            ratio = error / np.linalg.norm(expected, axis=-1)
            worst = max(worst, float(np.nan_to_num(ratio, nan=np.inf).max()))
        return worst

    def check(self, run: load.Run) -> float:
        """Return `difference` of every answer of a run."""
        return self.difference(run.stream.tenants, run.stream.rows, run.outputs)


def _flat(output: Any) -> np.ndarray:
    """Return all leaves of an answer as one vector."""
    leaves = [output] if isinstance(output, np.ndarray) else jax.tree.leaves(output)
    return np.concatenate([np.ravel(leaf).astype(np.float32) for leaf in leaves])


def make_fleet(workload: Workload, num_tenants: int, rows: int, dtype: Any) -> Fleet:
    """Draw weights and requests, and let each model answer its own alone.

    Args:
        workload: what all tenants run.
        num_tenants: N.
        rows: B.
        dtype: of weights, and of inputs that are no ids.
    """
    jobs, _ = workloads.make_jobs(workload, num_tenants, dtype)
    fn = jax.jit(jobs[0].apply_fn)
    rng = np.random.default_rng(1)
    targets, alone = [], []
    for job in jobs:
        # All rows at once: these models couple none, and one call is quick.
        drawn = [workload.input_fn(rng) for _ in range(NUM_INPUTS * rows)]
        everything = jax.tree.map(lambda *xs: _cast(np.concatenate(xs), dtype), *drawn)
        answers = jax.device_get(fn(job.params, everything))
        cuts = [slice(i * rows, (i + 1) * rows) for i in range(NUM_INPUTS)]
        inputs = [jax.tree.map(lambda x, cut=cut: x[cut], everything) for cut in cuts]
        targets.append(load.Target(job.name, inputs))
        alone.append([_flat(jax.tree.map(lambda x, c=c: x[c], answers)) for c in cuts])
    return Fleet(jobs, targets, np.array(alone), rows)


def _cast(x: np.ndarray, dtype: Any) -> np.ndarray:
    return x.astype(dtype) if x.dtype == np.float32 else x


@contextlib.contextmanager
def serve(jobs: Sequence[stfuse.Job], **options: Any) -> Iterator[stfuse.Engine]:
    """Give an engine that serves some jobs at full speed, and close it afterwards.

    Args:
        jobs: whom.
        **options: of the `stfuse.Engine`.
    """
    with stfuse.Engine(**options) as engine:
        for ready in [engine.add(job) for job in jobs]:
            ready.result()
        yield engine
