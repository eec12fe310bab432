"""The reference models as rows of the table, at their smallest presets."""

import functools
from collections.abc import Callable
from typing import Any

import jax
import numpy as np

from models import bert, gpt, lora, lstm, mobilenet_v2, resnet
from tests import functions
from tests.cases import Case, Rng


def _model(module: Any, config: Any) -> Callable[[int], tuple[Any, Any]]:
    """Return ``make`` of a reference model, its parameters drawn anew."""
    init = functools.partial(module.init, config)
    apply_fn = functools.partial(module.apply, config)
    specs = functions.specs_of(init)
    return lambda seed: (apply_fn, functions.drawn_like(specs, seed))


def _decode(config: gpt.Config) -> Callable[[int], tuple[Any, Any]]:
    """Return ``make`` of a step that reads one token of each row."""
    make = _model(gpt, config)

    def apply_fn(params: Any, x: Any) -> Any:
        return gpt.decode(config, params, x["cache"], x["ids"])

    return lambda seed: (apply_fn, make(seed)[1])


def _adapted(config: lora.Config, base: bert.Config) -> Any:
    """Return ``make`` of adapters of one job's own, over a base that all close over."""
    run, params = _model(bert, base)(0)
    specs = functions.specs_of(functools.partial(lora.init, config, params=params))

    def apply_fn(adapters: Any, x: Any) -> Any:
        return lora.apply(config, run, params, adapters, x)

    return lambda seed: (apply_fn, functions.drawn_like(specs, seed))


def _floats(*shape: int) -> Callable[[Rng, int], Any]:
    return lambda rng, rows: functions.normal(rng, rows, *shape)


def _ids(config: gpt.Config) -> Callable[[Rng, int], Any]:
    return lambda rng, rows: rng.integers(0, config.vocab, (rows, 5), np.int32)


def _tokens(config: bert.Config) -> Callable[[Rng, int], Any]:
    """Rows of tokens; whole rows may be masked."""

    def make_inputs(rng: Rng, rows: int) -> Any:
        ids = rng.integers(0, config.vocab, (rows, 6), np.int32)
        mask = np.arange(6) < rng.integers(0, 7, (rows, 1))
        return {"ids": ids, "mask": mask}

    return make_inputs


def _pasts(config: gpt.Config) -> Callable[[Rng, int], Any]:
    """One token a row, and what came before it; some rows are full."""
    empty = jax.eval_shape(functools.partial(gpt.empty_cache, config, 1))

    def make_inputs(rng: Rng, rows: int) -> Any:
        keys, values = (
            tuple(functions.normal(rng, rows, *x.shape[1:]) for x in leaves)
            for leaves in empty[:2]
        )
        position = rng.integers(0, config.max_positions + 1, rows, np.int32)
        ids = rng.integers(0, config.vocab, rows, np.int32)
        return {"cache": gpt.Cache(keys, values, position), "ids": ids}

    return make_inputs


def _row(name: str, make: Any, make_inputs: Any, sum_length: int) -> Case:
    return Case(name, make, make_inputs, sum_length)


# Each model with its nearest sibling: another depth, width, cell or rank.
SIBLINGS = (
    (
        _row("bert", _model(bert, bert.TINY), _tokens(bert.TINY), 400),
        _row("bert_deep", _model(bert, bert.TINY_DEEP), _tokens(bert.TINY_DEEP), 800),
    ),
    (
        _row("gpt", _model(gpt, gpt.TINY), _ids(gpt.TINY), 400),
        _row("gpt_deep", _model(gpt, gpt.TINY_DEEP), _ids(gpt.TINY_DEEP), 800),
    ),
    (
        _row("gpt_decode", _decode(gpt.TINY), _pasts(gpt.TINY), 400),
        _row("gpt_decode_deep", _decode(gpt.TINY_DEEP), _pasts(gpt.TINY_DEEP), 800),
    ),
    (
        _row("lstm", _model(lstm, lstm.TINY), _floats(5, 6), 80),
        _row("gru", _model(lstm, lstm.TINY_GRU), _floats(5, 6), 80),
    ),
    (
        _row("lora", _adapted(lora.TINY, bert.TINY), _tokens(bert.TINY), 500),
        _row("lora_wide", _adapted(lora.TINY_WIDE, bert.TINY), _tokens(bert.TINY), 500),
    ),
    (
        _row("resnet", _model(resnet, resnet.TINY), _floats(32, 32, 3), 600),
        _row("resnet_deep", _model(resnet, resnet.TINY_DEEP), _floats(32, 32, 3), 1000),
    ),
    (
        _row(
            "mobilenet_v2",
            _model(mobilenet_v2, mobilenet_v2.TINY),
            _floats(16, 16, 3),
            200,
        ),
        _row(
            "mobilenet_v2_deep",
            _model(mobilenet_v2, mobilenet_v2.TINY_DEEP),
            _floats(16, 16, 3),
            300,
        ),
    ),
)
