"""What was measured, kept on disk: one small file per question.

A file is written whole under another name and then renamed, so a reader sees all of it
or nothing, and two writers do not mix. What cannot be read, or was written for another
question or version, is as good as not there. Values are JSON: nothing is executed.
"""

from __future__ import annotations

import hashlib
import json
import os
import pathlib
import stat
import tempfile
from collections.abc import Mapping

_VERSION = 1
_MAX_BYTES = 1 << 20


def folder() -> pathlib.Path | None:
    """Return the private folder, made if need be; None if there is none to be had.

    ``STFUSE_CACHE_DIR`` names it; empty turns the disk off.
    """
    chosen = os.environ.get("STFUSE_CACHE_DIR")
    if chosen == "":
        return None
    path = pathlib.Path(chosen or pathlib.Path.home() / ".cache" / "stfuse")
    try:
        path.mkdir(mode=0o700, parents=True, exist_ok=True)
        found = path.stat()
    except OSError:
        return None
    # Someone else's folder may hold someone else's answers.
    is_own = not hasattr(os, "getuid") or found.st_uid == os.getuid()
    is_open = bool(found.st_mode & (stat.S_IWGRP | stat.S_IWOTH))
    return path if is_own and not is_open else None


def load(question: str) -> dict[str, float] | None:
    """Return what was measured for a question, or None.

    Args:
        question: everything that the answer depends on, as text.
    """
    path = _path(question)
    if path is None:
        return None
    try:
        if path.stat().st_size > _MAX_BYTES:
            return None
        found = json.loads(path.read_text())
        if found["version"] != _VERSION or found["question"] != question:
            return None
        return {str(name): float(s) for name, s in found["seconds"].items()}
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return None


def save(question: str, seconds: Mapping[str, float]) -> None:
    """Keep what was measured for a question; trouble with the disk is no error.

    Args:
        question: everything that the answer depends on, as text.
        seconds: by name.
    """
    path = _path(question)
    if path is None:
        return
    record = {"version": _VERSION, "question": question, "seconds": dict(seconds)}
    try:
        handle, name = tempfile.mkstemp(dir=path.parent, prefix=".new-")
    except OSError:
        return
    try:
        with os.fdopen(handle, "w") as file:
            json.dump(record, file)
        os.replace(name, path)
    except OSError:
        pathlib.Path(name).unlink(missing_ok=True)


def _path(question: str) -> pathlib.Path | None:
    where = folder()
    if where is None:
        return None
    return where / f"{hashlib.sha256(question.encode()).hexdigest()[:32]}.json"
