"""A process that serves models of its own: a line of JSON in, a line of JSON out.

    {"do": "hello"}
    {"do": "load", "workload", "scale", "dtype", "precision", "first", "count",
     "repeat"}
        builds models first .. first + count - 1 of a workload, compiles, compares what
        a launch answers with a plain call; says the bytes in use and the difference
    {"do": "run", "start_s", "seconds", "in_flight", "rate_per_s", "seed"}
        from that time on (`time.perf_counter`, one clock for all processes of a host)
        launches its models in turn, so many at once; or with a rate, each model's
        requests at random times, latency from the time when one is due
    {"do": "drop"}
        forgets its models

`examples.processes` starts it. What models print goes to standard error.
"""

import functools
import json
import sys
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from examples import workloads
from examples.workloads import Workload

Step = Callable[..., Any]
TURN = 8  # steps in one turn of a loop


class Model(NamedTuple):
    """One tenant: what is launched for it."""

    name: str
    params: Any
    inputs: Any


def repeated(step_fn: Step, repeat: int) -> Step:
    """Return a step that runs so many times per launch, in a loop on the device.

    Each turn of the loop runs the step on `TURN` different inputs, one after the other,
    and carries all their outputs, so that no two are one to the compiler and each is
    wanted; what goes in passes a barrier, so that nothing is moved out of the loop. No
    kernel is added, and a turn is long enough to be a CUDA graph.

    Args:
        step_fn: ``(params, inputs) -> outputs``.
        repeat: how many times, a multiple of `TURN`; or 1, and it is the step itself.

    Returns:
        ``(params, inputs of TURN kinds) -> their outputs``.
    """
    if repeat == 1:
        return step_fn
    step_fn = jax.jit(step_fn)  # traced once, not once per kind

    def turn(_: Any, carry: Any) -> Any:
        params, kinds, last = carry
        outputs = []
        for inputs in kinds:
            params, inputs, last = lax.optimization_barrier((params, inputs, last))
            last = step_fn(params, inputs)
            outputs.append(last)
        return params, kinds, outputs

    def run(params: Any, kinds: Any) -> Any:
        zeros = functools.partial(jax.tree.map, lambda a: jnp.zeros(a.shape, a.dtype))
        none = [zeros(jax.eval_shape(step_fn, params, inputs)) for inputs in kinds]
        return lax.fori_loop(0, repeat // TURN, turn, (params, kinds, none))[2]

    return run


def kinds_of(inputs: Any, repeat: int) -> Any:
    """Return the different inputs that `repeated` takes; the first are the inputs."""
    if repeat == 1:
        return inputs

    @jax.jit
    def kinds(inputs: Any) -> list[Any]:
        def kind(i: int) -> Any:
            return jax.tree.map(
                lambda a: jnp.roll(a, i) + jnp.asarray(i, a.dtype) / 8, inputs
            )

        return [kind(i) for i in range(TURN)]

    return kinds(inputs)


def make_models(
    workload: Workload, first: int, count: int, dtype: Any
) -> list[tuple[str, Any, Any]]:
    """Return name, weights and inputs of some models of a workload.

    Args:
        workload: what they run.
        first: number of the first one; a number means the same model in any process.
        count: how many.
        dtype: of weights and inputs.
    """
    all_params = workloads.make_params(workload, count, dtype, first=first)
    models = []
    for number, params in enumerate(all_params, first):
        x = workload.input_fn(np.random.default_rng(number))
        inputs = jax.tree.map(
            lambda a: a.astype(dtype) if a.dtype == np.float32 else a, x
        )
        models.append((f"{workload.name}-{number}", params, inputs))
    return models


def set_precision(name: str) -> None:
    """Let float32 products be float32's (``"highest"``), or what is fastest."""
    jax.config.update("jax_default_matmul_precision", name)


class Worker:
    """Models and what is launched for them."""

    def __init__(self) -> None:
        """Start with none."""
        self.models: list[Model] = []
        self._first = 0
        self._step: Step | None = None

    def hello(self) -> dict[str, Any]:
        """Find the device."""
        return {"device": jax.devices()[0].device_kind}

    def load(
        self,
        workload: str,
        scale: str,
        dtype: str,
        precision: str,
        first: int,
        count: int,
        repeat: int,
    ) -> dict[str, Any]:
        """Build models, compile, compare."""
        self.drop()
        set_precision(precision)
        known = workloads.make_paper_workloads(dtype, is_small=scale == "small")
        made = known[workload]
        plain = jax.jit(made.apply_fn)
        self._step = jax.jit(repeated(made.apply_fn, repeat))
        self._first = first
        self.models = [
            Model(name, params, kinds_of(jax.device_put(inputs), repeat))
            for name, params, inputs in make_models(made, first, count, dtype)
        ]
        worst = 0.0
        for model in self.models:
            found = self._step(model.params, model.inputs)
            kinds = model.inputs if repeat > 1 else [model.inputs]
            alone = [plain(model.params, inputs) for inputs in kinds]
            found, alone = jax.device_get((found if repeat > 1 else [found], alone))
            answers = (dict(enumerate(each)) for each in (found, alone))
            worst = max(worst, workloads.differences(*answers)[0])
        stats = jax.devices()[0].memory_stats() or {}
        return {"bytes": stats.get("bytes_in_use"), "difference": worst}

    def run(
        self,
        start_s: float,
        seconds: float,
        in_flight: int,
        rate_per_s: float | None,
        seed: int,
    ) -> dict[str, Any]:
        """Launch for some seconds; return when each launch was due and done."""
        dues = None
        if rate_per_s is not None:
            dues = arrivals(len(self.models), self._first, rate_per_s, seconds, seed)
        launch = functools.partial(self._launch, self._step)
        due_s, done_s, which = serve(
            launch, len(self.models), start_s, seconds, in_flight, dues
        )
        tenants = [
            {
                "name": model.name,
                "due_s": np.round(due_s[which == i], 7).tolist(),
                "done_s": np.round(done_s[which == i], 7).tolist(),
            }
            for i, model in enumerate(self.models)
        ]
        return {"tenants": tenants, "steps": len(due_s)}

    def _launch(self, step: Step, i: int) -> Any:
        return step(self.models[i].params, self.models[i].inputs)

    def drop(self) -> dict[str, Any]:
        """Forget all models."""
        self.models, self._step = [], None
        jax.clear_caches()
        return {}


def arrivals(
    count: int, first: int, rate_per_s: float, seconds: float, seed: int
) -> tuple[np.ndarray, np.ndarray]:
    """Return times, sorted, of requests of several models, and whose each is."""
    found = []
    if rate_per_s == 0:
        return np.zeros(0), np.zeros(0, int)
    for i in range(count):
        rng = np.random.default_rng([seed, first + i])
        most = int(seconds * rate_per_s + 6 * np.sqrt(seconds * rate_per_s) + 10)
        times = np.cumsum(rng.exponential(1 / rate_per_s, most))
        found.append(times[times < seconds])
    which = np.repeat(np.arange(count), [len(times) for times in found])
    times = np.concatenate(found)
    order = np.argsort(times, kind="stable")
    return times[order], which[order]


def serve(
    launch: Callable[[int], Any],
    count: int,
    start_s: float,
    seconds: float,
    in_flight: int,
    dues: tuple[np.ndarray, np.ndarray] | None,
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Launch in turn, or when due; one thread launches, another waits.

    Args:
        launch: starts a step of a model.
        count: how many models there are.
        start_s: when to start, on `time.perf_counter`.
        seconds: for how long.
        in_flight: most launches without an answer.
        dues: times from the start, and of which model; None for as fast as possible.

    Returns:
        When each launch was due (or else made) and done, and of which model.
    """
    free, made = threading.Semaphore(in_flight), threading.Semaphore(0)
    pending: list[Any] = []
    done_s: list[float] = []

    def wait() -> None:
        while made.acquire() and (answer := pending[len(done_s)]) is not None:
            jax.block_until_ready(answer)
            pending[len(done_s)] = ()
            done_s.append(time.perf_counter())
            free.release()

    waiter = threading.Thread(target=wait)
    waiter.start()
    due_s, which = [], []
    end_s, n = start_s + seconds, 0
    time.sleep(max(start_s - time.perf_counter(), 0.0))
    try:
        while dues is None or n < len(dues[0]):
            i = n % count if dues is None else int(dues[1][n])
            at_s = 0.0 if dues is None else start_s + float(dues[0][n])
            time.sleep(max(at_s - time.perf_counter(), 0.0))
            free.acquire()
            now_s = time.perf_counter()
            if now_s >= end_s:
                break
            pending.append(launch(i))
            due_s.append(at_s or now_s)
            which.append(i)
            made.release()
            n += 1
    finally:
        pending.append(None)
        made.release()
        waiter.join()
    return np.array(due_s), np.array(done_s), np.array(which, int)


def main(lines: Sequence[str] | Any, say: Callable[[Mapping[str, Any]], None]) -> None:
    """Answer each line until there are no more."""
    worker = Worker()
    for line in lines:
        command = json.loads(line)
        try:
            answer = getattr(worker, command.pop("do"))(**command)
        except Exception as error:  # its process says so, and goes on
            text = f"{type(error).__name__}: {error}"
            say({"ok": False, "error": text[:2000]})
        else:
            say({"ok": True, **answer})


if __name__ == "__main__":
    out = sys.stdout
    sys.stdout = sys.stderr
    main(sys.stdin, lambda answer: print(json.dumps(answer), file=out, flush=True))
