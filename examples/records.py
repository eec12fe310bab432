"""Measured numbers of a benchmark: rows of a JSON file, kept as they come.

A row has a key (what was measured), values, and about what machine and versions it is.
A benchmark that is cut off goes on where it stopped; on another device, or with another
JAX, it measures again.
"""

import datetime
import importlib.metadata
import json
import math
import os
import pathlib
import platform
import shutil
import subprocess
import tempfile
from collections.abc import Mapping
from typing import Any

import jax

_PACKAGES = ("jax", "jaxlib", "stfuse", "torch")
_SAME = ("device", "jax")  # what has to be equal for a row to be used again


def _driver() -> str | None:
    """Return the version of NVIDIA's driver; None without one."""
    if shutil.which("nvidia-smi") is None:
        return None
    query = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    found = subprocess.run(query, capture_output=True, text=True, check=False)
    return found.stdout.partition("\n")[0] or None


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def about() -> dict[str, Any]:
    """Return the date, the device, and the versions of what runs here."""
    versions = {package: _version(package) for package in _PACKAGES}
    return {
        "date": datetime.datetime.now(datetime.UTC).date().isoformat(),
        "device": jax.devices()[0].device_kind,
        "driver": _driver(),
        "python": platform.python_version(),
        **{name: version for name, version in versions.items() if version},
    }


def finite(found: Any) -> Any:
    """Return results with None for what is not finite: JSON has no word for it."""
    if isinstance(found, dict):
        return {key: finite(value) for key, value in found.items()}
    if isinstance(found, list):
        return [finite(value) for value in found]
    return None if isinstance(found, float) and not math.isfinite(found) else found


class Records:
    """The rows of one file.

    Args:
        path: of the file; made with the first row.

    Attributes:
        rows: all that the file has.

    Raises:
        ValueError: the file is there, and is none of ours.
    """

    def __init__(self, path: str | os.PathLike[str]) -> None:
        """Read what there is."""
        self.path = pathlib.Path(path)
        self._about = about()
        self.rows: list[dict[str, Any]] = []
        if self.path.exists():
            self.rows = read(self.path)

    def get(self, key: Mapping[str, Any], since: str = "") -> dict[str, Any] | None:
        """Return what was measured for a key, here and not before a date, or None."""
        for row in self.rows:
            is_new = row["about"].get("date", "") >= since
            if row["key"] == dict(key) and is_new and self._is_of_here(row):
                return row["values"]
        return None

    def add(self, key: Mapping[str, Any], values: Mapping[str, Any]) -> dict[str, Any]:
        """Keep what was measured for a key, instead of what was before; return it."""
        row = {"key": dict(key), "values": dict(values), "about": self._about}
        self.rows = [one for one in self.rows if one["key"] != row["key"]] + [row]
        self.path.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.NamedTemporaryFile(
            "w", dir=self.path.parent, suffix=".tmp", delete=False
        ) as file:
            lines = ",\n".join(json.dumps(one, sort_keys=True) for one in self.rows)
            file.write(f'{{"rows": [\n{lines}\n]}}\n')
        os.chmod(file.name, 0o644)
        os.replace(file.name, self.path)
        return row["values"]

    def here(self) -> list[dict[str, Any]]:
        """Return the rows that were measured on this device, with this JAX."""
        return [row for row in self.rows if self._is_of_here(row)]

    def _is_of_here(self, row: Mapping[str, Any]) -> bool:
        return all(row["about"].get(name) == self._about[name] for name in _SAME)


def read(path: pathlib.Path) -> list[dict[str, Any]]:
    """Return the rows of a file.

    Raises:
        ValueError: it is cut off, or has something else.
    """
    try:
        rows = json.loads(path.read_text())["rows"]
        for row in rows:
            if not all(
                isinstance(row[name], dict) for name in ("key", "values", "about")
            ):
                raise TypeError("a row without key, values or about")
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(
            f"{path}: expected the rows of a benchmark as JSON, found something else "
            f"({error}); repair the file, or move it away to measure anew."
        ) from error
    return rows
