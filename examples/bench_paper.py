"""Reproduce the paper's comparison of ways to share a GPU, and what it only claims.

    --part gemm            products of its Table 1 and Figure 7
    --part models          whole models: throughput, latency, memory, energy (Figure 3)
    --part mixed           models that are not alike
    --part predictability  tenants beside each other, under load

Ways: exclusive (one model, a batch), time (a process per model, taking turns), space
(the same under CUDA MPS), in turn (one process), space-time (fused), and PyTorch's.
Rows are kept as they come, in RESULTS/PART.json: a run that is cut off goes on where it
stopped; `--only=way=time --only=R=16` measures but a few, `--since` those that are old
again. Answers are compared with the models' own: exit 1 if one differs.

Source: Jain et al. 2018, https://arxiv.org/abs/1901.00041
"""

import importlib
import time

import jax
from absl import app, flags, logging

from examples import figures, paper
from examples.records import Records

PARTS = {
    "gemm": "paper_gemm",
    "models": "paper_models",
    "mixed": "paper_mixed",
    "predictability": "paper_predictability",
}

_PART = flags.DEFINE_enum("part", None, [*PARTS], "Which.", required=True)
_SCALE = flags.DEFINE_enum("scale", "full", ["full", "small"], "Of models and R.")
_RESULTS = flags.DEFINE_string(
    "results", None, "Folder; examples/results on a GPU, examples/out elsewhere."
)
_MINUTES = flags.DEFINE_float("minutes", 7.5, "Nothing is begun after these.")
_SECONDS = flags.DEFINE_float("seconds", 0.4, "Of one measurement.")
_PROCESSES = flags.DEFINE_integer(
    "processes", paper.MOST_PROCESSES, "At once, at most; 0 for none.", lower_bound=0
)
_ONLY = flags.DEFINE_multi_string("only", [], "NAME=VALUE,...: of a key; all if none.")
_SINCE = flags.DEFINE_string("since", "", "A date: what is older is measured again.")


def main(_: list[str]) -> None:
    """Run one part."""
    logging.set_verbosity(logging.ERROR)
    paper.keep_room()
    end_s = time.perf_counter() + 60 * _MINUTES.value
    records = Records(paper.results_folder(_RESULTS.value) / f"{_PART.value}.json")
    print(f"{jax.devices()[0].device_kind}, jax {jax.__version__}, {_SCALE.value}")
    part = paper.Part(
        records,
        _SCALE.value,
        _SECONDS.value,
        end_s,
        _PROCESSES.value,
        paper.only(_ONLY.value),
        _SINCE.value,
    )
    importlib.import_module(f"examples.{PARTS[_PART.value]}").run(part)
    for path in figures.plots(records.path.parent):
        print(f"drew {path}")


if __name__ == "__main__":
    app.run(main)
