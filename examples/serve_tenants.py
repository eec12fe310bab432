"""Serve 24 tenants' own trained models under three policies, and compare.

Every tenant has its own task made from real digits and its own trained network. The
same requests are served one model at a time (exclusive), one request at a time (time)
and from one fused step (space-time); every answer is compared with the answer of the
tenant's model alone.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import os
import pathlib
import sys
from collections.abc import Callable, Iterator
from typing import Any

import jax
import numpy as np
from absl import app, flags, logging
from matplotlib.figure import Figure
from rich import progress
from rich.box import SIMPLE
from rich.console import Console
from rich.table import Table

import stfuse
from examples import digits_tenants, load, streams
from examples.digits_tenants import NUM_HELD_OUT, Tenant

POLICIES = ("time", "exclusive", "space-time")  # time first: its capacity sets the load
FIXED_SHARE = 0.5  # of what `time` serves at saturation
OVERLOAD_SHARE = 1.5
NUM_STAGES = 4  # of serving under one policy
MAX_STREAM = 400_000  # requests of a closed loop; more than it gets through
TOLERANCE = 1e-5  # of the largest logit of an answer

_TENANTS = flags.DEFINE_integer("tenants", 24, "Number of tenants.", lower_bound=2)
_SECONDS = flags.DEFINE_float("seconds", 4.0, "Length of each measured load.")
_RATE = flags.DEFINE_float(
    "rate", None, "Requests/s of the fixed load; half of what `time` serves if unset."
)
_DEADLINE_MS = flags.DEFINE_float("deadline_ms", 20.0, "Deadline of every request.")
_SEED = flags.DEFINE_integer("seed", 0, "Decides tasks, weights and requests.")
_OUT = flags.DEFINE_string("out", "examples/out", "Folder for the picture.")
_SMOKE = flags.DEFINE_bool("smoke", False, "Run the smallest size: 3 tenants, 0.3 s.")

Stage = Callable[[str], contextlib.AbstractContextManager[None]]


@dataclasses.dataclass(frozen=True, slots=True)
class Result:
    """What one policy did.

    Attributes:
        policy: its name.
        saturated: the run as fast as possible.
        fixed: the run at the load that all policies can bear.
        overload: the run at more than `time` can serve.
        tenants_per_step: distinct tenants in a step at saturation, mean.
    """

    policy: str
    saturated: load.Run
    fixed: load.Run
    overload: load.Run
    tenants_per_step: float


@dataclasses.dataclass(frozen=True, slots=True)
class Check:
    """How far one policy's answers are from the models alone.

    Attributes:
        num_answers: how many were compared: all of them.
        max_abs: largest difference of a logit.
        max_rel: largest difference of a logit over the largest logit of its answer.
        accuracy: share of the answers that name the right class.
    """

    num_answers: int
    max_abs: float
    max_rel: float
    accuracy: float


def serve(
    policy: str, tenants: list[Tenant], capacity: float | None, stage: Stage
) -> Result:
    """Serve all streams under one policy.

    Args:
        policy: one of POLICIES.
        tenants: who is served.
        capacity: requests/s that both loads are made from; None takes this policy's.
        stage: names each of the NUM_STAGES as it runs.

    Returns:
        What became of the streams.
    """
    seconds, deadline_s = _seconds(), _DEADLINE_MS.value / 1e3
    make_stream = functools.partial(
        streams.make_stream,
        shares=streams.zipf(len(tenants), _SEED.value),
        num_inputs=NUM_HELD_OUT,
        seed=_SEED.value,
    )
    targets = [load.Target(tenant.name, _requests(tenant)) for tenant in tenants]
    with stfuse.Engine(policy=policy, max_batch_size=8) as engine:
        with stage(f"{policy}: compile"):
            for ready in [engine.add(_job(tenant, deadline_s)) for tenant in tenants]:
                ready.result()
        with stage(f"{policy}: as fast as possible"):
            endless = make_stream(rate=1.0, seconds=MAX_STREAM)
            saturated = load.saturate(engine, targets, endless, seconds / 2)
        tenants_per_step = engine.stats().tenants_per_step
        capacity = capacity or saturated.answered_per_s
        runs = []
        for name, rate in (
            ("fixed load", _RATE.value or FIXED_SHARE * capacity),
            ("overload", OVERLOAD_SHARE * capacity),
        ):
            with stage(f"{policy}: {name}, {rate:,.0f} requests/s"):
                stream = make_stream(rate=rate, seconds=seconds)
                runs.append(load.replay(engine, targets, stream, deadline_s))
    return Result(policy, saturated, *runs, tenants_per_step)


def _requests(tenant: Tenant) -> list[np.ndarray]:
    images = tenant.task.images
    return [images[row : row + 1] for row in range(NUM_HELD_OUT)]


def _seconds() -> float:
    return 0.3 if _SMOKE.value else _SECONDS.value


def _rate(run: load.Run) -> float:
    return len(run.latency_s) / _seconds()


def _job(tenant: Tenant, slo_s: float) -> stfuse.Job:
    example = tenant.task.images[:1]
    return stfuse.Job(tenant.name, tenant.apply_fn, tenant.params, example, slo_s=slo_s)


def check(result: Result, tenants: list[Tenant]) -> Check:
    """Compare every answer of a result with the tenant's model alone."""
    alone = np.stack([tenant.logits for tenant in tenants])
    labels = np.stack([tenant.task.labels for tenant in tenants])
    max_abs, max_rel, num_answers, num_right = 0.0, 0.0, 0, 0
    for run in (result.saturated, result.fixed, result.overload):
        is_answered = run.is_answered
        who = run.stream.tenants[is_answered], run.stream.rows[is_answered]
        expected = alone[who]
        given = [output[0] for output in run.outputs if output is not None]
        answers = np.reshape(given, expected.shape)
        # A NaN must come out as a difference, not vanish in a maximum.
        difference = np.nan_to_num(np.abs(answers - expected), nan=np.inf).max(-1)
        max_abs = max(max_abs, difference.max(initial=0))
        max_rel = max(max_rel, (difference / np.abs(expected).max(-1)).max(initial=0))
        num_answers += len(answers)
        num_right += np.sum(answers.argmax(-1) == labels[who])
    return Check(num_answers, max_abs, max_rel, num_right / max(num_answers, 1))


def table(results: list[Result], checks: list[Check]) -> Table:
    """Return the table, one row for each policy."""
    deadline_ms = _DEADLINE_MS.value
    out = Table(box=SIMPLE, padding=(0, 0, 0, 1))  # fits 80 columns
    out.title = "One device, the same requests, three policies"
    out.caption = (
        f"p50, p99, on time: at {_rate(results[0].fixed):,.0f} requests/s; "
        f"overload: {_rate(results[0].overload):,.0f} requests/s.\n"
        f"On time: answered within {deadline_ms:g} ms of the intended send time."
    )
    out.add_column("policy", no_wrap=True)
    for heading in (
        "requests/s\nsaturated",
        "p50\nms",
        "p99\nms",
        "on time",
        "on time,\noverload",
        "tenants\nper step",
        "accuracy",
    ):
        out.add_column(heading, justify="right", no_wrap=True)
    for result, checked in zip(results, checks, strict=True):
        latency_ms = 1e3 * result.fixed.latency_s
        p50, p99 = np.percentile(latency_ms, (50, 99), method="inverted_cdf")
        out.add_row(
            result.policy,
            f"{result.saturated.answered_per_s:,.0f}",
            _milliseconds(p50),
            _milliseconds(p99),
            f"{np.mean(latency_ms <= deadline_ms):.1%}",
            f"{np.mean(1e3 * result.overload.latency_s <= deadline_ms):.1%}",
            f"{result.tenants_per_step:.1f}",
            f"{checked.accuracy:.1%}",
            style="bold" if result.policy == "space-time" else None,
        )
    return out


def _milliseconds(latency_ms: float) -> str:
    return f"{latency_ms:.2f}" if np.isfinite(latency_ms) else "expired"


def picture(results: list[Result], path: pathlib.Path) -> None:
    """Save the latency distributions of all policies at both loads."""
    figure = Figure(figsize=(10, 4), layout="tight")
    axes = figure.subplots(1, 2, sharex=True, sharey=True)
    for axis, name in zip(axes, ("fixed", "overload"), strict=True):
        rate = _rate(getattr(results[0], name))
        for result in results:
            latency_ms = 1e3 * np.sort(getattr(result, name).latency_s)
            share = np.arange(1, len(latency_ms) + 1) / len(latency_ms)
            axis.step(latency_ms, share, where="post", label=result.policy)
        axis.axvline(_DEADLINE_MS.value, color="gray", linestyle=":", label="deadline")
        axis.set_title(f"{name}: {rate:,.0f} requests/s")
        axis.set(xscale="log", xlabel="ms from the intended send time")
        axis.grid(alpha=0.3)
    axes[0].set_ylabel("share of requests answered")
    axes[0].legend(loc="lower right")
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=120)


@contextlib.contextmanager
def show_progress(console: Console, num_tenants: int) -> Iterator[tuple[Any, Stage]]:
    """Show two bars on a terminal, plain lines elsewhere; give what advances them."""
    columns = (
        progress.TextColumn("{task.description:40}"),
        progress.BarColumn(),
        progress.TimeElapsedColumn(),
    )
    # A refreshing thread would take the interpreter from what is being measured.
    with progress.Progress(
        *columns,
        console=console,
        auto_refresh=False,
        disable=not console.is_terminal,
    ) as bars:

        def begin(task: progress.TaskID, text: str) -> None:
            if not console.is_terminal:
                console.print(text)
            bars.update(task, description=text, refresh=True)

        @contextlib.contextmanager
        def stage(text: str) -> Iterator[None]:
            begin(serving, text)
            yield
            bars.update(serving, advance=1, refresh=True)

        training = bars.add_task("", total=2 * digits_tenants.NUM_STEPS)
        serving = bars.add_task("serve", total=len(POLICIES) * NUM_STAGES)
        begin(training, f"train {num_tenants} models")
        yield lambda: bars.update(training, advance=1, refresh=True), stage


def work(console: Console) -> tuple[list[Tenant], list[Result]]:
    """Train all tenants and serve them under every policy."""
    num_tenants = 3 if _SMOKE.value else _TENANTS.value
    results: list[Result] = []
    with show_progress(console, num_tenants) as (on_step, stage):
        tenants = digits_tenants.make_tenants(num_tenants, _SEED.value, on_step)
        for policy in POLICIES:
            capacity = results[0].saturated.answered_per_s if results else None
            results.append(serve(policy, tenants, capacity, stage))
    return tenants, results


def main(_: list[str]) -> None:
    """Train, serve, compare, print; exit with 1 if an answer is not the model's own."""
    logging.set_verbosity(logging.WARNING)  # JAX tells of every backend it looks for
    # Reduced precision (TF32 on a GPU) would drown the differences looked for.
    jax.config.update("jax_default_matmul_precision", "highest")
    console = Console()
    if not console.is_terminal:
        console.width = 100
    device = jax.devices()[0]
    console.print(
        f"stfuse on {device.platform} ({device.device_kind}), "
        f"{os.cpu_count()} CPU cores, jax {jax.__version__}"
    )
    tenants, results = work(console)
    accuracies = [tenant.accuracy for tenant in tenants]
    console.print(
        f"{len(tenants)} tenants, each with its own digits, labels and weights; "
        f"alone they get {min(accuracies):.1%} to {max(accuracies):.1%} right"
    )
    checks = [check(result, tenants) for result in results]
    console.print(table(results, checks))
    time_, fused = results[0].saturated, results[-1].saturated
    console.print(
        f"space-time serves {fused.answered_per_s / time_.answered_per_s:.1f} times "
        "the requests of time"
    )
    path = pathlib.Path(_OUT.value) / "latency.png"
    picture(results, path)
    console.print(f"latency distributions: {path}")
    worst = max(checks, key=lambda checked: checked.max_rel)
    if worst.max_rel > TOLERANCE:
        sys.exit(f"an answer differs from its model alone by {worst.max_rel:.1e}")
    console.print(
        f"all {checks[-1].num_answers:,} fused answers equal the models alone; largest "
        f"difference {checks[-1].max_abs:.1e}, relative {checks[-1].max_rel:.1e}"
    )


if __name__ == "__main__":
    app.run(main)
