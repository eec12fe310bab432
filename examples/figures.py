"""Make the README's tables, and the plots, from what was measured: `make figures`.

It reads the rows under examples/results. No number is typed by hand: a table stands
between two marks, and a test compares it with the rows.
"""

import pathlib
from collections.abc import Mapping, Sequence
from typing import Any

from absl import app

from examples import paper_gemm, records

ROOT = pathlib.Path(__file__).parent.parent
HEADING = "## Four ways to share a GPU"
BEGIN, END = "<!-- {} table: made by make figures -->", "<!-- end of {} table -->"
BEFORE = "## Where things are"  # the section that it stands before
WAYS = ("exclusive", "time", "space", "space-time")
ALL_WAYS = ("space-time", "in turn", "time", "space", "exclusive")  # then PyTorch's
RIVALS = ("time", "space", "in turn", "torch", "exclusive")
PLOTS = {  # file: a panel each, x, y, its name and scale
    "gemm": ("shape", "R", "per_s", "products per second", "linear"),
    "models": ("model", "R", "per_s", "requests per second", "log"),
    "latency": ("model", "R", "p50_ms", "latency, ms", "log"),
    "predictability": ("model", "what", "p99_ms", "p99, ms", "log"),
}
_GIB = 2**30


def policies_table(rows: Sequence[Mapping[str, Any]]) -> str:
    """Return the table of `examples.bench_policies` as Markdown.

    Args:
        rows: of its file; the table is of the model and the number of tenants that
            were measured last.

    Returns:
        A sentence, and a line per way that was measured.
    """
    last = rows[-1]["key"]
    same = ("part", "model", "tenants", "scale")
    own = [row for row in rows if all(row["key"][k] == last[k] for k in same)]
    by_key = {
        (row["key"]["way"], row["key"].get("what", "loop")): row["values"]
        for row in own
    }
    work = by_key.get(("work", "loop"), {})
    lines = [
        "| | utilization | throughput/s | served/s | p50 ms | p99 ms | spread | "
        "interference | GiB |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for way in WAYS:
        loop = by_key.get((way, "loop"))
        if loop is None:
            continue
        served = by_key.get((way, "capacity"), {})
        loaded = by_key.get((way, "load 0.7"), {})
        abuse = by_key.get((way, "abuse"), {})
        spread = None if way == "exclusive" else loaded.get("spread")
        held = loop.get("bytes")
        cells = [
            way,
            utilization(loop["per_s"], work),
            f"{loop['per_s']:,.0f}",
            number(served.get("per_s"), ",.0f"),
            number(loaded.get("p50_ms"), ".2f"),
            number(loaded.get("p99_ms"), ".2f"),
            number(spread, ".2f"),
            number(abuse.get("interference"), ".2f"),
            number(held / _GIB if held else None, ".1f"),
        ]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join([about(own), "", *lines])


def about(rows: Sequence[Mapping[str, Any]]) -> str:
    """Return the sentence above the table: what, where, when."""
    key = rows[0]["key"]
    return (
        f"{key['tenants']} {key['model']}, batch 1, {when(rows)} "
        "(`python -m examples.bench_policies`):"
    )


def utilization(per_s: float, work: Mapping[str, Any]) -> str:
    """Return which part of the device's arithmetic or bandwidth is used, the larger."""
    if not work.get("flops_per_s"):
        return "-"
    flops = per_s * work["flops"] / work["flops_per_s"]
    read = per_s * work["read_bytes"] / work["bytes_per_s"]
    return f"{100 * max(flops, read):.1f}%"


def number(value: float | None, form: str) -> str:
    """Return a number, or a dash for none."""
    return "-" if value is None else format(value, form)


def models_table(rows: Sequence[Mapping[str, Any]]) -> str:
    """Return the table of `examples.bench_paper`'s whole models as Markdown.

    Args:
        rows: of the files of its parts ``models`` and ``mixed``.

    Returns:
        A sentence, and a line per set of models: requests per second in one fused step,
        and how many times those of each way at its best that is.
    """
    best: dict[tuple[Any, ...], dict[str, float]] = {}
    for row in rows:
        key, per_s = row["key"], row["values"].get("per_s")
        if per_s is None or key["scale"] != "full":
            continue
        is_mixed = key["part"] == "mixed"
        of = is_mixed, key.get("model", "mixed"), key["models" if is_mixed else "R"]
        way = "torch" if key["way"].startswith("torch") else key["way"]
        own = best.setdefault(of, {})
        own[way] = max(per_s, own.get(way, 0.0))
    lines = [
        f"{when(rows)} (`python -m examples.bench_paper`, parts models and mixed):",
        "",
        f"| models | space-time/s | {' | '.join(RIVALS)} |",
        f"|---|---|{'---|' * len(RIVALS)}",
    ]
    for (_, model, num), own in sorted(best.items()):
        ours = own.get("space-time")
        if ours is not None:
            times = [ours / own[way] if way in own else None for way in RIVALS]
            cells = [f"{num} {model}", f"{ours:,.0f}"]
            cells += [number(x, ".2f") for x in times]
            lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def gemm_table(rows: Sequence[Mapping[str, Any]]) -> str:
    """Return the table of `examples.bench_paper`'s products as Markdown.

    Args:
        rows: of the file of its part ``gemm``.

    Returns:
        A sentence, and a line per product: a thousand of them per second as one fused
        step, and how many times those of each way that is, the geometric mean.
    """
    ways = paper_gemm.WAYS[1:]
    lines = [
        f"{when(rows)} (`python -m examples.bench_paper --part=gemm`):",
        "",
        f"| product | precision | R = 10 | 20 | 118 | {' | '.join(ways)} |",
        f"|---|---|---|---|---|{'---|' * len(ways)}",
    ]
    for shape in paper_gemm.SHAPES:
        for dtype in paper_gemm.DTYPES:
            found = paper_gemm.rates(rows, shape, dtype)
            if ours := found[paper_gemm.WAYS[0]]:
                each = [ours.get(num) for num in (10, 20, 118)]
                cells = [number(x and x / 1e3, ",.0f") for x in each]
                means = [paper_gemm.mean_over_every(ours, found[way]) for way in ways]
                cells += [number(x if x == x else None, ".2f") for x in means]
                lines.append(f"| {shape} | {dtype} | {' | '.join(cells)} |")
    return "\n".join(lines)


def when(rows: Sequence[Mapping[str, Any]]) -> str:
    """Return where rows were measured, and from when to when."""
    of, days = rows[-1]["about"], sorted({row["about"]["date"] for row in rows})
    span = " to ".join(dict.fromkeys((days[0], days[-1])))
    return f"{of['device']}, jax {of['jax']}, {span}"


def with_table(readme: str, table: str, name: str = "policies") -> str:
    """Return a README with a table in its place, which is made if need be."""
    begin, end = BEGIN.format(name), END.format(name)
    section = f"{begin}\n{table}\n{end}"
    if begin in readme:
        before, _, rest = readme.partition(begin)
        _, _, after = rest.partition(end)
        return before + section + after
    before, mark, after = readme.partition(BEFORE)
    return f"{before}{HEADING}\n\n{section}\n\n{mark}{after}"


def with_tables(readme: str, folder: pathlib.Path) -> str:
    """Return a README with the tables that a folder has the rows of."""
    tables = {
        "policies": (policies_table, ("policies",)),
        "models": (models_table, ("models", "mixed")),
        "gemm": (gemm_table, ("gemm",)),
    }
    for name, (make, stems) in tables.items():
        paths = [folder / f"{stem}.json" for stem in stems]
        rows = [row for path in paths if path.exists() for row in records.read(path)]
        if rows:
            readme = with_table(readme, make(rows), name)
    return readme


def plots(folder: pathlib.Path) -> list[pathlib.Path]:
    """Draw what each file of rows has; return the pictures' paths."""
    try:
        from matplotlib.figure import Figure  # needs no screen
    except ImportError:
        print("no plots: matplotlib is missing")
        return []
    made = []
    for name, (of, xs, column, ylabel, scale) in PLOTS.items():
        path = folder / f"{'models' if name == 'latency' else name}.json"
        panels = panels_of(records.read(path), of, xs, column) if path.exists() else {}
        if panels:
            figure = Figure(figsize=(12, 4.5), layout="constrained")
            draw(figure, panels, xs, ylabel, scale)
            figure.savefig(folder / f"{name}.png", dpi=120)
            made.append(folder / f"{name}.png")
    return made


def panels_of(
    rows: Sequence[Mapping[str, Any]], of: str, xs: str, column: str
) -> dict[str, dict[str, dict[Any, float]]]:
    """Return numbers by panel, way and x: of every way its best number of processes.

    Args:
        rows: of a file.
        of: the part of a key that a panel is of.
        xs: and the part that is x.
        column: of the values, y.
    """
    panels: dict[str, dict[str, dict[Any, float]]] = {}
    best: dict[tuple[Any, ...], float] = {}
    for row in rows:
        key, values = row["key"], row["values"]
        value = values.get(column)
        if value is None or key.get("dtype", "float32") != "float32" or xs not in key:
            continue
        point = key[of], key["way"], key[xs]
        per_s = values.get("per_s", 0.0)
        if per_s >= best.get(point, 0.0):
            best[point] = per_s
            panels.setdefault(point[0], {}).setdefault(point[1], {})[point[2]] = value
    for ways in panels.values():
        most = max(max(points) for points in ways.values())
        if [*ways.get("in turn", {})] == [1]:  # products: the same rate at any R
            ways["in turn"][most] = ways["in turn"][1]
    return panels


def draw(
    figure: Any,
    panels: Mapping[str, Mapping[str, Mapping[Any, float]]],
    xs: str,
    ylabel: str,
    scale: str,
) -> None:
    """Draw panels beside each other: a way has one color in all of them."""
    found = {way for ways in panels.values() for way in ways}
    ways = [*(way for way in ALL_WAYS if way in found), *sorted(found - {*ALL_WAYS})]
    known: dict[str, Any] = {}
    for i, (title, lines) in enumerate(panels.items()):
        axes = figure.add_subplot(1, len(panels), i + 1)
        for way, points in ((way, lines[way]) for way in ways if way in lines):
            order, color = sorted(points), f"C{ways.index(way)}"
            (known[way],) = axes.plot(
                order, [points[x] for x in order], ".-", color=color
            )
        axes.set(title=title, xlabel="" if xs == "what" else xs, yscale=scale)
        axes.grid(alpha=0.3, which="both")
        if not i:
            axes.set_ylabel(ylabel)
    shown = [way for way in ways if way in known]
    figure.legend(
        [known[way] for way in shown], shown, loc="outside lower center", ncols=8
    )


def main(argv: list[str]) -> None:
    """Write the README's tables and the plots; of another folder if one is named."""
    folder = pathlib.Path(*argv[1:2] or [ROOT / "examples" / "results"])
    for path in plots(folder):
        print(f"drew {path}")
    if not any(folder.glob("*.json")):
        print(f"nothing to write: {folder} has no rows; run examples.bench_policies")
        return
    readme = ROOT / "README.md"
    readme.write_text(with_tables(readme.read_text(), folder))
    print(f"wrote the tables of {readme}")


if __name__ == "__main__":
    app.run(main)
