"""What the parts of `bench_paper` share: time left, how to time, pools of processes."""

import contextlib
import functools
import os
import pathlib
import subprocess
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np

from examples import paper_worker, workloads
from examples.processes import Pool, cache_folder, mps, mps_is_available
from examples.records import Records

FOLDER = pathlib.Path(__file__).parent
LEAD_S = 0.2  # from asking processes until they start together
MOST_PROCESSES = 40  # at once; MPS lets 48 to 60 in, and each holds device memory


class Part(NamedTuple):
    """What a part of the benchmark is given.

    Attributes:
        records: where its numbers are kept.
        scale: ``"full"`` or ``"small"``.
        seconds: of one measurement.
        end_s: when to stop, on `time.perf_counter`.
        processes: most processes at once; 0 for none.
        only: names of a key, and the values of each that are measured (``"-"``: of
            keys without it); whatever a key has if a name is not there.
        since: a date; what was measured before it is measured again.
    """

    records: Records
    scale: str
    seconds: float
    end_s: float
    processes: int
    only: Sequence[tuple[str, Sequence[str]]] = ()
    since: str = ""

    @property
    def is_small(self) -> bool:
        """Whether sizes are those of a test."""
        return self.scale == "small"

    def measure(
        self, key: Mapping[str, Any], measure_fn: Callable[[], Mapping[str, Any]]
    ) -> dict[str, Any] | None:
        """Return what was measured for a key, now or before; None if it cannot be."""
        key = {**key, "scale": self.scale}
        if self.is_done([key]):
            return self.records.get(key)
        start_s = time.perf_counter()
        found = self.records.add(key, measure_fn())
        took_s = time.perf_counter() - start_s
        print(f"  {line(key, found)} [{took_s:.1f} s]", flush=True)
        return found

    def is_done(self, keys: Sequence[Mapping[str, Any]]) -> bool:
        """Return whether nothing of some keys is to be measured, or no time is left."""
        is_late = time.perf_counter() >= self.end_s
        return is_late or not any(map(self._is_missing, keys))

    def _is_missing(self, key: Mapping[str, Any]) -> bool:
        is_wanted = all(str(key.get(name, "-")) in of for name, of in self.only)
        scaled = {**key, "scale": self.scale}
        return is_wanted and self.records.get(scaled, self.since) is None


def only(told: Sequence[str]) -> list[tuple[str, Sequence[str]]]:
    """Return what ``NAME=VALUE,VALUE`` says, each; see `Part`.

    Example:
        >>> only(["R=1,2", "way=time"])
        [('R', ['1', '2']), ('way', ['time'])]
    """
    pairs = [text.partition("=") for text in told]
    return [(name, values.split(",")) for name, _, values in pairs]


def keep_room() -> None:
    """Have JAX leave room on the device for other processes, and for PyTorch.

    What is compiled here, they find compiled. And measure ways to compute a step for a
    third of the time that is usual, or no part would be done in eight minutes.
    """
    os.environ.setdefault("STFUSE_MEASURE_BUDGET_S", "40")
    os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")
    jax.config.update("jax_compilation_cache_dir", str(cache_folder()))
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0)


def results_folder(told: str | None) -> pathlib.Path:
    """Return where rows are kept: what was told, or the device's default."""
    return pathlib.Path(told or FOLDER / ("results" if is_gpu() else "out"))


def line(key: Mapping[str, Any], values: Mapping[str, Any]) -> str:
    """Return a measurement as one line of text."""
    of = " ".join(str(value) for name, value in key.items() if name != "scale")
    numbers = ", ".join(
        f"{name} {value:,.4g}"
        for name, value in values.items()
        if isinstance(value, int | float)
    )
    return f"{of}: {numbers}"


@contextlib.contextmanager
def pool_of(way: str, num: int) -> Iterator[Pool | None]:
    """Yield processes that take turns (``"time"``), or share (``"space"``, MPS)."""
    with contextlib.ExitStack() as stack:
        env = {}
        if way == "space":
            if not mps_is_available():
                print("  no CUDA MPS here: sharing in space is left out")
                yield None
                return
            env = stack.enter_context(mps())
        start_s = time.perf_counter()
        pool = stack.enter_context(Pool(num, env))
        took_s = time.perf_counter() - start_s
        print(f"  {num} processes, {way}, started [{took_s:.1f} s]", flush=True)
        yield pool


def load(
    pool: Pool,
    members: Sequence[tuple[str, int]],
    what: Mapping[str, Any],
    most: int | None = None,
) -> dict[str, Any]:
    """Give models to as many workers as there are models, or can be.

    Args:
        pool: the workers.
        members: workload and number of each model; all of one workload, or no more
            than there are workers.
        what: a worker's ``load`` command but for its models.
        most: workers to use; all if None.

    Returns:
        ``processes``, ``difference`` (the largest), ``bytes`` (of the device, with what
        a process needs that does nothing; None if the driver does not tell).
    """
    num = min(most or len(pool), len(members))
    pool.ask([{"do": "drop"}] * len(pool))
    idle_bytes = gpu_bytes()
    edges = np.linspace(0, len(members), num + 1).astype(int).tolist()
    commands = []
    for a, b in zip(edges, edges[1:], strict=False):
        (name,) = {name for name, _ in members[a:b]}
        own = {"workload": name, "first": members[a][1], "count": b - a}
        commands.append({"do": "load", **what, **own})
    firsts = {command["workload"]: command for command in reversed(commands)}
    pool.ask([*firsts.values()])  # the others find what these compiled
    answers = pool.ask(commands)
    worst = max(answer["difference"] for answer in answers)
    used, all_bytes = num / len(pool), gpu_bytes()
    num_bytes = None
    if idle_bytes is not None and all_bytes is not None:
        num_bytes = all_bytes - idle_bytes + used * idle_bytes
    return {"processes": num, "difference": worst, "bytes": num_bytes}


def part_of(held: Mapping[str, Any], processes: int) -> dict[str, Any]:
    """Return what `load` does, of the first of its processes alone."""
    num_bytes = held["bytes"]
    if num_bytes is not None:
        num_bytes *= processes / held["processes"]
    return {**held, "processes": processes, "bytes": num_bytes}


def run(
    pool: Pool,
    rates: int | np.ndarray,
    seconds: float,
    in_flight: int,
    seed: int = 0,
) -> list[dict[str, Any]]:
    """Have the first workers run together; return their tenants.

    Args:
        pool: the workers, loaded.
        rates: how many of them, each as fast as it can; or of each worker the requests
            per second of each of its models.
        seconds: for how long.
        in_flight: launches at once, of each.
        seed: of the times of requests.

    Returns:
        Per tenant ``name``, ``due_s`` and ``done_s``, from the common start.
    """
    start_s = time.perf_counter() + LEAD_S
    command = {"do": "run", "start_s": start_s, "seconds": seconds, "seed": seed}
    command["in_flight"] = in_flight
    own = [None] * rates if isinstance(rates, int) else rates.tolist()
    commands = [{**command, "rate_per_s": rate} for rate in own]
    answers = pool.ask(commands, seconds + 300)
    tenants = [tenant for answer in answers for tenant in answer["tenants"]]
    for tenant in tenants:
        for name in ("due_s", "done_s"):
            tenant[name] = np.array(tenant[name]) - start_s
    return tenants


def closed_loop(
    launch: Callable[[], Any], seconds: float, in_flight: int
) -> list[dict[str, Any]]:
    """Do in this process what `run` does in others: one tenant, as fast as possible."""
    start_s = time.perf_counter()
    due_s, done_s, _ = paper_worker.serve(
        lambda _: launch(), 1, start_s, seconds, in_flight, None
    )
    return [{"name": "", "due_s": due_s - start_s, "done_s": done_s - start_s}]


def per_s(tenants: Sequence[Mapping[str, Any]], seconds: float) -> float:
    """Return launches that ended within a window, per second of it.

    The first fifth is left out: until then not all of them may be at it. Of one tenant
    the time is from launch to launch; of many, whose launches may end together, it is
    the window.
    """
    done_s = np.concatenate([tenant["done_s"] for tenant in tenants])
    warm_s = seconds / 5
    inside = done_s[(done_s >= warm_s) & (done_s < seconds)]
    if len(inside) < 2 or np.sum(done_s < warm_s) == 0:  # few, long ones
        return len(done_s) / max(done_s.max(initial=seconds), seconds)
    if len(tenants) == 1:
        return float((len(inside) - 1) / (inside[-1] - inside[0]))
    return len(inside) / (seconds - warm_s)


def latencies_s(tenants: Sequence[Mapping[str, Any]]) -> np.ndarray:
    """Return how long each launch took from when it was due."""
    return np.concatenate([t["done_s"] - t["due_s"] for t in tenants])


def _smi(query: str) -> list[str] | None:
    """Ask NVIDIA's driver for one number; None without one."""
    command = ["nvidia-smi", f"--query-gpu={query}", "--format=csv,noheader,nounits"]
    try:
        found = subprocess.run(command, capture_output=True, text=True, check=True)
    except (OSError, subprocess.CalledProcessError):
        return None
    return found.stdout.split()


def gpu_bytes() -> float | None:
    """Return the bytes in use on the device, all processes together."""
    found = _smi("memory.used")
    return float(found[0]) * 2**20 if found else None


class Power:
    """The power that a device draws while something runs, as a context.

    Attributes:
        watts: the mean; None if the driver does not tell.
    """

    watts: float | None = None

    def __enter__(self) -> "Power":
        """Start to sample."""
        self._process = None
        with contextlib.suppress(OSError):
            self._process = subprocess.Popen(
                [
                    "nvidia-smi",
                    "--query-gpu=power.draw",
                    "--format=csv,noheader,nounits",
                    "-lms",
                    "50",
                ],
                stdout=subprocess.PIPE,
                text=True,
            )
        return self

    def __exit__(self, *_: object) -> None:
        """Stop, and take the mean."""
        if self._process is None:
            return
        self._process.terminate()
        text, _ = self._process.communicate()
        found = []
        for each in text.split():
            with contextlib.suppress(ValueError):
                found.append(float(each))
        self.watts = float(np.mean(found)) if found else None


def check(part: Part) -> None:
    """Say what is left to do, and fail if an answer was not the model's own.

    Raises:
        SystemExit: naming the measurements.
    """
    if time.perf_counter() >= part.end_s:
        print("\ntime was up: run the same command again for what is missing")
    wrong = []
    for row in part.records.here():
        key, difference = row["key"], row["values"].get("difference", 0.0)
        is_exact = key.get("dtype") == "float32" or not is_gpu()
        limit = workloads.TOLERANCE["float32" if is_exact else "bfloat16"]
        if not difference <= limit:
            wrong.append(line(key, row["values"]))
    if wrong:
        raise SystemExit("answers are not the models' own:\n" + "\n".join(wrong))


def peaks() -> dict[str, float]:
    """Return what the device can do at most; nothing where that was not measured."""
    if not is_gpu():
        return {}
    flops_per_s, bytes_per_s = workloads.FLOPS_PER_S, workloads.BYTES_PER_S
    return {"flops_per_s": flops_per_s, "bytes_per_s": bytes_per_s}


@functools.cache
def is_gpu() -> bool:
    """Return whether there is a GPU."""
    return jax.default_backend() == "gpu"
