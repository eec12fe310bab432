"""Processes that share a device: started once, asked many times, with or without MPS.

Each is a fresh interpreter that runs `examples.paper_worker`, pinned to cores of its
own as far as there are enough.
"""

import contextlib
import json
import os
import pathlib
import queue
import shutil
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

ROOT = pathlib.Path(__file__).parent.parent
_CONTROL = "nvidia-cuda-mps-control"
_GRACE_S = 10.0  # for the end: a client of MPS that is killed can take others along
START_S = 300.0  # until all interpreters are up: they import, and find the device


def cache_folder() -> pathlib.Path:
    """Return where compiled programs are kept, for all processes of this user."""
    folder = pathlib.Path(tempfile.gettempdir(), f"stfuse-workers-{os.getuid()}")
    folder.mkdir(mode=0o700, exist_ok=True)
    return folder


def mps_is_available() -> bool:
    """Return whether CUDA's multi-process service can be started here."""
    return shutil.which(_CONTROL) is not None


@contextlib.contextmanager
def mps() -> Iterator[dict[str, str]]:
    """Run CUDA's multi-process service in a folder of its own.

    Yields:
        The environment that makes a process its client.
    """
    with tempfile.TemporaryDirectory(prefix="mps-", ignore_cleanup_errors=True) as top:
        env = {}
        for name in ("PIPE", "LOG"):
            folder = pathlib.Path(top, name.lower())
            folder.mkdir()
            env[f"CUDA_MPS_{name}_DIRECTORY"] = str(folder)
        full = {**os.environ, **env}
        subprocess.run([_CONTROL, "-d"], env=full, check=True)
        try:
            yield env
        finally:
            subprocess.run(
                [_CONTROL], input="quit\n", text=True, env=full, check=False, timeout=60
            )


class Pool:
    """Workers, as a context.

    Args:
        num: how many processes.
        env: what is added to their environment.

    Raises:
        RuntimeError: one did not start.
    """

    def __init__(self, num: int, env: Mapping[str, str] | None = None) -> None:
        """Say how many; `__enter__` starts them."""
        self._num, self._env = num, dict(env or {})
        self._workers: list[_Worker] = []

    def __len__(self) -> int:
        """Return how many there are."""
        return self._num

    def __enter__(self) -> "Pool":
        """Start all at once."""
        env = {
            **os.environ,
            "XLA_PYTHON_CLIENT_PREALLOCATE": "false",
            "JAX_COMPILATION_CACHE_DIR": str(cache_folder()),
            "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
            **self._env,
        }
        cores = sorted(os.sched_getaffinity(0))
        share = max(len(cores) // self._num, 1)
        try:
            for i in range(self._num):
                own = [cores[(i * share + j) % len(cores)] for j in range(share)]
                self._workers.append(_Worker(i, env, own))
            self.ask([{"do": "hello"}] * self._num, START_S)
        except BaseException:
            self.close()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        """End all."""
        self.close()

    def ask(
        self, commands: Sequence[Mapping[str, Any]], timeout_s: float = 600.0
    ) -> list[dict[str, Any]]:
        """Have the first workers do something each, at the same time.

        Args:
            commands: one per worker; see `examples.paper_worker`.
            timeout_s: how long to wait for all of them.

        Returns:
            Their answers, in order.

        Raises:
            RuntimeError: one failed, died, or did not answer in time.
        """
        asked = self._workers[: len(commands)]
        for worker, command in zip(asked, commands, strict=True):
            worker.send(command)
        end_s = time.monotonic() + timeout_s
        return [worker.receive(end_s - time.monotonic()) for worker in asked]

    def close(self) -> None:
        """End all workers: those that are at something after a moment."""
        for worker in self._workers:
            worker.hang_up()
        end_s = time.monotonic() + _GRACE_S
        for worker in self._workers:
            worker.close(end_s - time.monotonic())
        self._workers.clear()


class _Worker:
    """One process: lines of JSON in and out."""

    def __init__(
        self, number: int, env: Mapping[str, str], cores: Sequence[int]
    ) -> None:
        self._number = number
        self.errors = tempfile.TemporaryFile("w+")
        self.process = subprocess.Popen(
            [sys.executable, "-m", "examples.paper_worker"],
            cwd=ROOT,
            env=dict(env),
            text=True,
            bufsize=1,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self.errors,
            start_new_session=True,  # an interrupt of ours is not theirs
        )
        os.sched_setaffinity(self.process.pid, cores)
        self._lines: queue.SimpleQueue[str] = queue.SimpleQueue()
        self._reader = threading.Thread(target=self._read, daemon=True)
        self._reader.start()

    def _read(self) -> None:
        for line in self.process.stdout or ():
            self._lines.put(line)
        self._lines.put("")  # its end

    def send(self, command: Mapping[str, Any]) -> None:
        """Send one command."""
        assert self.process.stdin is not None
        try:
            self.process.stdin.write(json.dumps(command) + "\n")
        except BrokenPipeError:
            raise self._failed("has ended") from None

    def receive(self, timeout_s: float) -> dict[str, Any]:
        """Return its next answer."""
        try:
            line = self._lines.get(timeout=max(timeout_s, 0.0))
        except queue.Empty:
            raise self._failed("did not answer in time") from None
        if not line:
            raise self._failed("has ended")
        answer = json.loads(line)
        if not answer.pop("ok"):
            raise self._failed(f"failed: {answer['error']}")
        return answer

    def hang_up(self) -> None:
        """Tell it that there is nothing more to do."""
        assert self.process.stdin is not None
        with contextlib.suppress(BrokenPipeError):
            self.process.stdin.close()

    def close(self, grace_s: float) -> None:
        """Wait for its end, or bring it about."""
        try:
            self.process.wait(max(grace_s, 0.0))
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()
        self._reader.join()
        assert self.process.stdout is not None
        self.process.stdout.close()
        self.errors.close()

    def _failed(self, what: str) -> RuntimeError:
        self.errors.flush()
        self.errors.seek(0)
        said = self.errors.read()[-2000:].strip()
        return RuntimeError(f"worker {self._number} {what}\n{said}")
