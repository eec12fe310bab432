"""Draw who shares which launch: a row per network, the fused step's launches in order.

Each box is a convolution or product of one network. Boxes of one column are one launch,
joined by a line; the color is the shape of its output. An empty box is a launch that
serves one network alone. Nothing is computed: a plan needs shapes only.
"""

import dataclasses
import functools
import pathlib

import jax
import jax.numpy as jnp
import matplotlib
import numpy as np
from absl import app, flags, logging

import stfuse
from models import resnet

matplotlib.use("Agg")  # draws without a screen
import matplotlib.pyplot as plt  # noqa: E402
from matplotlib.figure import Figure  # noqa: E402
from matplotlib.patches import Patch, Rectangle  # noqa: E402

NETWORKS = {
    "resnet18": resnet.RESNET18,
    "resnet34": resnet.RESNET34,
    "resnet50": resnet.RESNET50,
    "tiny": resnet.TINY,
    "tiny-deep": resnet.TINY_DEEP,
}

_NETWORKS = flags.DEFINE_list(
    "networks", ["resnet18", "resnet34"], f"Of {', '.join(NETWORKS)}."
)
_SIDE = flags.DEFINE_integer("side", 224, "Of the images.", lower_bound=32)
_COST = flags.DEFINE_string("cost", "h200", "Plan for this device: auto, h200, cpu.")
_SAVE = flags.DEFINE_string(
    "save", "examples/out/plan.png", "Where to draw it; PNG, SVG or PDF."
)


def make_plan(names: list[str]) -> stfuse.Plan:
    """Return the plan of some networks, in bfloat16, from their shapes alone."""
    image = jax.ShapeDtypeStruct((1, _SIDE.value, _SIDE.value, 3), jnp.bfloat16)
    jobs = []
    for name in names:
        config = dataclasses.replace(NETWORKS[name], dtype=jnp.bfloat16)
        init_fn = functools.partial(resnet.init, config)
        params = jax.tree.map(
            lambda x: jax.ShapeDtypeStruct(x.shape, jnp.bfloat16),
            jax.eval_shape(init_fn, jax.random.key(0)),
        )
        apply_fn = functools.partial(resnet.apply, config)
        jobs.append(stfuse.Job(name, apply_fn, params, image))
    return stfuse.fuse(jobs, cost=_COST.value).plan


def draw(plan: stfuse.Plan) -> Figure:
    """Return the strips with their legend."""
    shapes = list(dict.fromkeys(launch.shape for launch in plan.launches))
    hues = np.linspace(0.08, 0.92, len(shapes))
    colors = dict(zip(shapes, plt.colormaps["turbo"](hues), strict=True))
    row_of = {name: -i for i, name in enumerate(plan.names)}
    size = (max(6.5, 0.2 * len(plan.launches) + 2), 0.6 * len(plan.names) + 2)
    figure, axes = plt.subplots(figsize=size, layout="constrained")
    for x, launch in enumerate(plan.launches):
        rows, color = [row_of[name] for name in launch.jobs], colors[launch.shape]
        axes.plot([x, x], [min(rows), max(rows)], color=color, lw=2, zorder=1)
        for y in rows:
            box = Rectangle((x - 0.4, y - 0.25), 0.8, 0.5, ec=color, zorder=2)
            box.set_facecolor(color if len(rows) > 1 else "white")
            axes.add_patch(box)
    axes.set_yticks(list(row_of.values()), list(row_of))
    axes.set_xlim(-0.8, len(plan.launches) - 0.2)
    axes.set_ylim(-len(row_of) + 0.5, 0.5)
    axes.set_xlabel("heavy launches of the fused step, in order")
    axes.set_title(
        f"{plan.num_launches_alone} heavy launches alone, {plan.num_launches} fused, "
        f"{plan.num_solo} of them solo; waste {plan.waste:.2f}",
        fontsize="medium",
    )
    axes.spines[["top", "right", "left"]].set_visible(False)
    axes.tick_params(axis="y", length=0)
    patches = [
        Patch(color=color, label="x".join(map(str, shape[1:])))
        for shape, color in colors.items()
    ]
    figure.legend(
        handles=patches,
        title="output for one row of one network",
        loc="outside lower center",
        ncols=max(3, len(plan.launches) // 6),
        frameon=False,
        fontsize="small",
    )
    return figure


def main(_: list[str]) -> None:
    """Plan, draw, save."""
    logging.set_verbosity(logging.WARNING)  # JAX tells of every backend it looks for
    if unknown := sorted(set(_NETWORKS.value) - set(NETWORKS)):
        raise app.UsageError(f"--networks: no {unknown}; pass {', '.join(NETWORKS)}")
    plan = make_plan(_NETWORKS.value)
    path = pathlib.Path(_SAVE.value)
    path.parent.mkdir(parents=True, exist_ok=True)
    draw(plan).savefig(path, dpi=150)
    print(str(plan).splitlines()[-2])
    print(f"drawn in {path}")


if __name__ == "__main__":
    app.run(main)
