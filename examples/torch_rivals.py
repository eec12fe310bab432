"""PyTorch's ways to run models side by side, for `bench_step` and `bench_paper`.

    torch streams  each model in a CUDA graph, replayed on a stream of its own
    torch vmap     torch.func.functional_call under torch.vmap, compiled, with graphs;
                   of equal models only

A twin has a workload's sizes, and weights of its own: times can be compared, answers
cannot. The encoders are PyTorch's own layers; an LSTM is cuDNN's on streams and a loop
under vmap, which cannot map cuDNN's; the convolutional networks need torchvision.

Source: https://docs.pytorch.org/tutorials/intermediate/ensembling.html
"""

import copy
import functools
import importlib.util
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import nn

from examples.workloads import GemmConfig, Run, Workload
from models import bert, lstm, mlp

_VISION = ("resnet18", "resnet34", "resnet50", "mobilenet_v2")


class Pending:
    """What a run returns: `jax.block_until_ready` waits for it as for an array."""

    def block_until_ready(self) -> None:
        """Wait for all streams."""
        if torch.cuda.is_available():
            torch.cuda.synchronize()


class _Encoder(nn.Module):
    def __init__(self, config: bert.Config) -> None:
        super().__init__()
        self.tokens = nn.Embedding(config.vocab, config.width)
        self.positions = nn.Embedding(config.max_positions, config.width)
        layer = nn.TransformerEncoderLayer(
            config.width,
            config.heads,
            config.mlp_width,
            dropout=0.0,
            activation="gelu",
            batch_first=True,
        )
        self.layers = nn.TransformerEncoder(
            layer, config.layers, enable_nested_tensor=False
        )

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        x = self.tokens(ids) + self.positions.weight[: ids.shape[1]]
        return self.layers(x).mean(1)


class _LSTM(nn.Module):
    """cuDNN's; its last state."""

    def __init__(self, config: lstm.Config) -> None:
        super().__init__()
        self.layers = nn.LSTM(
            config.features, config.hidden, config.layers, batch_first=True
        )

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.layers(x)[0][:, -1]


class _LoopLSTM(nn.Module):
    """The same network step by step, for what cannot look into cuDNN's."""

    def __init__(self, config: lstm.Config) -> None:
        super().__init__()
        sizes = [config.features, *[config.hidden] * (config.layers - 1)]
        units = 4 * config.hidden
        self.inputs = nn.ModuleList(nn.Linear(size, units) for size in sizes)
        self.hidden = nn.ModuleList(nn.Linear(config.hidden, units) for _ in sizes)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for inputs, hidden in zip(self.inputs, self.hidden, strict=True):
            h = c = torch.zeros_like(x[:, 0, :1] @ hidden.weight[:1, :])
            states = []
            for y in inputs(x).unbind(1):  # all steps meet their kernel at once
                i, f, g, o = (y + hidden(h)).chunk(4, -1)
                c = f.sigmoid() * c + i.sigmoid() * g.tanh()
                h = o.sigmoid() * c.tanh()
                states.append(h)
            x = torch.stack(states, 1)
        return x[:, -1]


def _mlp(config: mlp.Config) -> nn.Module:
    sizes = [int(np.prod(config.input_shape)), *config.widths]
    layers: list[nn.Module] = [nn.Flatten()]
    for a, b in zip(sizes, sizes[1:], strict=False):
        layers += [nn.Linear(a, b), nn.ReLU()]
    return nn.Sequential(*layers, nn.Linear(sizes[-1], config.num_classes))


def _gemm(config: GemmConfig) -> nn.Module:
    return nn.Linear(config.contracted, config.features, bias=False)


def _vision(name: str, config: Any) -> nn.Module:
    from torchvision import models  # only where a workload asks for it

    return getattr(models, name)(num_classes=config.num_classes)


def _twins(workload: Workload) -> tuple[Callable[[Any], nn.Module], ...]:
    """Return what makes a twin for streams, and one for vmap; nothing without one."""
    if workload.name in _VISION:
        if not importlib.util.find_spec("torchvision"):
            return ()
        return (functools.partial(_vision, workload.name),) * 2
    return {
        "minilm": (_Encoder, _Encoder),
        "minilm4": (_Encoder, _Encoder),
        "bert": (_Encoder, _Encoder),
        "lstm": (_LSTM, _LoopLSTM),
        "gemm": (_gemm, _gemm),
        "mlp": (_mlp, _mlp),
    }.get(workload.name, ())


def _inputs(
    members: Sequence[Workload], dtype: torch.dtype, device: str
) -> list[torch.Tensor]:
    """Return one request per model; images NCHW, in memory NHWC."""
    found, rng = [], np.random.default_rng(0)
    for workload in members:
        x = workload.input_fn(rng)
        if isinstance(x, Mapping):
            found.append(torch.from_numpy(x["ids"]).long().to(device))
            continue
        x = torch.from_numpy(x).to(device, dtype)
        found.append(x.permute(0, 3, 1, 2) if x.ndim == 4 else x)
    return found


def _compare(found: Sequence[torch.Tensor], expected: Sequence[torch.Tensor]) -> None:
    """Refuse a rival whose answers are not those of its models, called plainly."""
    for number, (x, y) in enumerate(zip(found, expected, strict=True)):
        error = (x.float() - y.float()).norm() / y.float().norm()
        if not error <= 3e-2:
            raise RuntimeError(f"model {number} answers with an error of {error:.1e}")


def streams_run(models: Sequence[nn.Module], inputs: Sequence[torch.Tensor]) -> Run:
    """Return what replays a graph per model, each on its stream."""
    torch.backends.mha.set_fastpath_enabled(True)
    captured = []
    for model, x in zip(models, inputs, strict=True):
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            for _ in range(3):  # libraries choose and allocate before the capture
                model(x)
        stream.synchronize()
        graph = torch.cuda.CUDAGraph()
        # What other threads do, JAX's among them, is no part of the capture.
        with torch.cuda.graph(graph, stream=stream, capture_error_mode="thread_local"):
            answer = model(x)
        # A graph does not keep what it reads.
        captured.append((graph, stream, model, x, answer))

    def run() -> Pending:
        for graph, stream, *_ in captured:
            with torch.cuda.stream(stream):
                graph.replay()
        return Pending()

    run().block_until_ready()
    _compare([answer for *_, answer in captured], [m(x) for _, _, m, x, _ in captured])
    return run


def vmap_run(models: Sequence[nn.Module], inputs: Sequence[torch.Tensor]) -> Run:
    """Return what runs all models as one compiled, mapped function."""
    # The fast path is one opaque op per layer, which cannot be mapped.
    torch.backends.mha.set_fastpath_enabled(False)
    torch.compiler.reset()  # else the eighth workload would run uncompiled
    params, buffers = torch.func.stack_module_state(list(models))
    base, stacked = copy.deepcopy(models[0]), torch.stack(list(inputs))

    def one(params: Any, buffers: Any, x: torch.Tensor) -> torch.Tensor:
        return torch.func.functional_call(base, (params, buffers), (x,))

    step = torch.compile(torch.vmap(one), mode="reduce-overhead", dynamic=False)

    def run() -> Pending:
        with torch.no_grad():
            step(params, buffers, stacked)
        return Pending()

    with torch.no_grad():
        plain = [model(x) for model, x in zip(models, inputs, strict=True)]
        _compare([*step(params, buffers, stacked)], plain)

    return run


def make_runs(
    members: Sequence[Workload],
    dtype: str,
    wanted: Sequence[str] = ("torch streams", "torch vmap"),
    device: str = "cuda",
) -> dict[str, Run]:
    """Return what each of PyTorch's rivals runs per call; compiled, and run once.

    Args:
        members: one per model; its twin is run.
        dtype: ``"bfloat16"`` or ``"float32"``.
        wanted: which of them; models that are not alike cannot be mapped.
        device: where; streams need a GPU.

    Returns:
        By name; without those that have no twin, or cannot run: a line says why.
    """
    runs: dict[str, Run] = {}
    twins = {workload.name: _twins(workload) for workload in members}
    missing = [name for name, made in twins.items() if not made]
    if missing:
        print(f"    PyTorch is left out: it has no twin of {', '.join(missing)} here")
        return runs
    ways = {"torch streams": streams_run, "torch vmap": vmap_run}
    for i, (name, make_run) in enumerate(ways.items()):
        if name not in wanted or (make_run is vmap_run and len(twins) > 1):
            continue
        torch_dtype = getattr(torch, dtype)
        try:
            with torch.device(device):  # left again: compiled code depends on it
                models = [
                    twins[workload.name][i](workload.config).to(torch_dtype).eval()
                    for workload in members
                ]
            models = [
                m.to(memory_format=torch.channels_last) if w.name in _VISION else m
                for m, w in zip(models, members, strict=True)
            ]
            with torch.no_grad():
                run = make_run(models, _inputs(members, torch_dtype, device))
                run().block_until_ready()
            runs[name] = run
        except Exception as error:  # a rival that fails must not end the benchmark
            why = str(error).strip().partition("\n")[0]
            print(f"    {name} is left out: {type(error).__name__}: {why[:160]}")
    return runs


def is_usable() -> bool:
    """Return whether PyTorch finds a GPU."""
    return torch.cuda.is_available()
