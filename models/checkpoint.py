"""Read a model's folder, as the Hugging Face Hub lays it out: no pickle, no surprise.

A folder holds ``config.json`` and ``model.safetensors``. Both come from strangers, so
nothing in them runs, and every size is checked against the file's before memory is
taken for it.

Source: the safetensors format, https://github.com/huggingface/safetensors.
"""

import json
import pathlib
import struct
from collections.abc import Callable, Collection, Mapping
from typing import Any

import numpy as np
from flax import traverse_util

_MAX_CONFIG_BYTES = 1 << 20  # 1,000 class names take some 70 kB
_MAX_HEADER_BYTES = 100_000_000  # the limit of the format's own reader
_DTYPES = ("BF16", "F16", "F32")  # what a weight may be stored in
_TORCH_LEAVES = {
    "kernel": "weight",
    "scale": "weight",
    "embedding": "weight",
    "mean": "running_mean",
    "var": "running_var",
}


def read_config(folder: str | pathlib.Path, **only: Any) -> dict[str, Any]:
    """Read ``config.json``.

    Args:
        folder: the model's folder.
        **only: settings that may have no other value, if the file has them.

    Returns:
        The settings by name, as the file spells them.

    Raises:
        FileNotFoundError: if there is no such file.
        ValueError: if the file is no JSON object, or too large for a config, or has
            another value of a setting in ``only``.
    """
    path = pathlib.Path(folder) / "config.json"
    num_bytes = path.stat().st_size
    if num_bytes > _MAX_CONFIG_BYTES:
        raise ValueError(
            f"`checkpoint.read_config`: {path} has {num_bytes} bytes; a config has at "
            f"most {_MAX_CONFIG_BYTES}."
        )
    try:
        config = json.loads(path.read_bytes())
    except (ValueError, RecursionError) as error:  # UnicodeDecodeError is one too
        raise ValueError(
            f"`checkpoint.read_config`: {path} is not JSON: {error}."
        ) from error
    if not isinstance(config, dict):
        raise ValueError(
            f"`checkpoint.read_config`: {path} holds a {type(config).__name__}; "
            "expected an object of settings."
        )
    for name, value in only.items():
        if config.get(name, value) != value:
            raise ValueError(
                f"`checkpoint.read_config`: {path} has {name} {config[name]!r}; only "
                f"{value!r} is supported."
            )
    return config


def num_labels(config: Mapping[str, Any]) -> int:
    """Return the number of classes of a classifier's config.

    Args:
        config: what `read_config` returned. Names of classes count; a config without
            any leaves them to the writer's default, which is two.
    """
    labels = config.get("id2label")
    return len(labels) if labels else int(config.get("num_labels", 2))


def read_tensors(
    folder: str | pathlib.Path,
    expected: Mapping[str, tuple[int, ...]],
    *,
    optional: Collection[str] = (),
) -> dict[str, np.ndarray]:
    """Read ``model.safetensors``, all of it or nothing.

    Args:
        folder: the model's folder.
        expected: shape of each tensor that the model is made of.
        optional: names that a file may have or lack. One of ``expected`` is returned
            if the file has it; any other is left unread, whatever it holds (counters
            and masks that some writers store along with the weights).

    Returns:
        The tensors of ``expected`` by name, each in the dtype that it is stored in
        (float32, float16 or bfloat16).

    Raises:
        FileNotFoundError: if there is no such file.
        ValueError: if the file is damaged or of another format; or, listing every
            tensor at fault by name, if some are missing, not expected, or of another
            shape or dtype. Nothing but the header has been read by then.
    """
    # Only who loads weights needs the package, not everyone who imports a model.
    import safetensors

    path = pathlib.Path(folder) / "model.safetensors"
    _check_sizes(path)
    try:
        with safetensors.safe_open(path, framework="numpy") as file:
            stored = {name: file.get_slice(name) for name in file.keys()}
            found = {
                n: (tuple(s.get_shape()), s.get_dtype()) for n, s in stored.items()
            }
            _check_tensors(path, found, expected, set(optional))
            return {name: file.get_tensor(name) for name in expected if name in found}
    except safetensors.SafetensorError as error:
        raise ValueError(
            f"`checkpoint.read_tensors`: {path} is damaged, or not of the safetensors "
            f"format: {error}. Fetch it again; a pickled file is never read."
        ) from error


def read_variables(
    folder: str | pathlib.Path,
    specs: Mapping[str, Any],
    name_fn: Callable[[tuple[str, ...]], str],
) -> dict[str, Any]:
    """Read ``model.safetensors``, written by PyTorch, as Flax variables.

    PyTorch puts a kernel's outputs first, then its inputs, then space; Flax puts them
    last. Leaves called ``kernel`` are turned accordingly, any other is taken as it is.
    The number of batches that PyTorch counts beside each running mean stays unread.

    Args:
        folder: the model's folder.
        specs: variables by collection and module, arrays or their specs, as
            ``jax.eval_shape`` of a module's ``init`` returns them.
        name_fn: the path of a Flax module to the name of the PyTorch one.

    Returns:
        A nested dict like ``specs`` of float32 arrays.

    Raises:
        FileNotFoundError: if there is no such file.
        ValueError: as `read_tensors` does.
    """
    leaves = traverse_util.flatten_dict(specs)
    names = {
        path: f"{name_fn(path[1:-1])}.{_TORCH_LEAVES.get(path[-1], path[-1])}"
        for path in leaves
    }
    shapes = {
        names[path]: tuple(leaf.shape[axis] for axis in _torch_axes(path, leaf.ndim))
        for path, leaf in leaves.items()
    }
    counters = {
        name.removesuffix("running_mean") + "num_batches_tracked"
        for name in shapes
        if name.endswith(".running_mean")
    }
    tensors = read_tensors(folder, shapes, optional=counters)
    variables = {
        path: np.transpose(
            tensors[name], np.argsort(_torch_axes(path, leaves[path].ndim))
        ).astype(np.float32)
        for path, name in names.items()
    }
    return traverse_util.unflatten_dict(variables)


def _torch_axes(path: tuple[str, ...], num_axes: int) -> tuple[int, ...]:
    """Return the axes of a Flax leaf in PyTorch's order."""
    if path[-1] != "kernel":
        return tuple(range(num_axes))
    return (num_axes - 1, num_axes - 2, *range(num_axes - 2))


def _check_sizes(path: pathlib.Path) -> None:
    """Refuse a file whose first 8 bytes, the header's length, cannot be true."""
    num_bytes = path.stat().st_size
    with path.open("rb") as file:
        prefix = file.read(8)
    length = struct.unpack("<Q", prefix)[0] if len(prefix) == 8 else None
    if length is None or length > min(num_bytes - 8, _MAX_HEADER_BYTES):
        raise ValueError(
            f"`checkpoint.read_tensors`: {path} has {num_bytes} bytes and announces a "
            f"header of {length}: it is cut short, or not of the safetensors format. "
            "Fetch it again; a pickled file is never read."
        )


def _check_tensors(
    path: pathlib.Path,
    found: Mapping[str, tuple[tuple[int, ...], str]],
    expected: Mapping[str, tuple[int, ...]],
    optional: set[str],
) -> None:
    """Raise one error that lists all tensors at fault."""
    faults = [
        f"missing: '{name}' {tuple(expected[name])}"
        for name in sorted(expected.keys() - found.keys() - optional)
    ]
    faults += [
        f"not expected: '{name}' {found[name][0]}"
        for name in sorted(found.keys() - expected.keys() - optional)
    ]
    for name in sorted(found.keys() & expected.keys()):
        shape, dtype = found[name]
        if shape != tuple(expected[name]):
            faults.append(
                f"wrong shape: '{name}' {shape}; expected {tuple(expected[name])}"
            )
        if dtype not in _DTYPES:
            faults.append(
                f"wrong dtype: '{name}' {dtype}; expected one of {', '.join(_DTYPES)}"
            )
    if faults:
        raise ValueError(
            f"`checkpoint.read_tensors`: {path} does not hold the model that its "
            "config announces:\n  " + "\n  ".join(faults)
        )
