"""Tables and plots that are made of measured rows."""

import pathlib

import numpy as np

from examples import figures, records

ROOT = pathlib.Path(__file__).parent.parent


def test_the_readme_has_the_tables_that_the_rows_make():
    readme = (ROOT / "README.md").read_text()
    assert figures.with_tables(readme, ROOT / "examples" / "results") == readme
    for name in ("policies", "models", "gemm"):
        assert readme.count(figures.BEGIN.format(name)) == 1


def test_a_line_of_models_says_how_many_times_the_best_of_each_way_it_is(tmp_path):
    kept = records.Records(tmp_path / "models.json")
    base = {"part": "models", "model": "m", "R": 4, "scale": "full"}
    for way, per_s in (("space-time", 3000.0), ("in turn", 100.0), ("time", 50.0)):
        kept.add({**base, "way": way}, {"per_s": per_s})
    for processes, per_s in ((2, 1000.0), (4, 800.0)):
        key = {**base, "way": "space", "processes": processes}
        kept.add(key, {"per_s": per_s})
    for way, per_s in (("torch streams", 1200.0), ("torch vmap", 1500.0)):
        kept.add({**base, "way": way}, {"per_s": per_s})
    kept.add({**base, "way": "work"}, {"flops": 1.0})
    kept.add({"part": "mixed", "models": 6, "scale": "full", "way": "time"}, {})
    table = figures.models_table(kept.rows)
    assert table.splitlines()[-1] == "| 4 m | 3,000 | 60.00 | 3.00 | 30.00 | 2.00 | - |"
    readme = f"a\n{figures.BEGIN.format('models')}\nold\n{figures.END.format('models')}"
    assert table in figures.with_tables(readme, tmp_path)
    assert "old" not in figures.with_tables(readme, tmp_path)


def test_a_line_of_products_says_how_many_times_the_others_it_is_in_the_mean(tmp_path):
    kept = records.Records(tmp_path / "gemm.json")
    key = {"part": "gemm", "shape": "conv2_2", "dtype": "tf32", "scale": "full"}
    for num, per_s in ((1, 1e3), (2, 4e3), (10, 3e4)):
        kept.add({**key, "way": "space-time", "R": num}, {"per_s": per_s})
    kept.add({**key, "way": "in turn", "R": 1}, {"per_s": 1e3})
    for num in (1, 2):
        kept.add({**key, "way": "time", "R": num}, {"per_s": 500.0})
    kept.add({**key, "way": "space-time", "R": 1, "scale": "small"}, {"per_s": 9e9})
    table = figures.gemm_table(kept.rows)
    ours = np.interp(range(1, 11), (1, 2, 10), np.log((1e3, 4e3, 3e4)))
    in_turn = np.exp(np.mean(ours - np.log(1e3)))
    cells = f"| conv2_2 | tf32 | 30 | - | - | {in_turn:.2f} | 4.00 | - |"
    assert table.splitlines()[-1] == cells and "square" not in table
    readme = f"a\n{figures.BEGIN.format('gemm')}\nold\n{figures.END.format('gemm')}"
    assert table in figures.with_tables(readme, tmp_path)


def test_the_table_is_made_of_rows_and_takes_its_place(tmp_path):
    kept = records.Records(tmp_path / "policies.json")
    base = {"part": "policies", "model": "m", "tenants": 4, "scale": "full"}
    work = {"flops": 2e9, "read_bytes": 4e6, "flops_per_s": 1e15, "bytes_per_s": 4e12}
    kept.add({**base, "way": "work"}, work)
    kept.add({**base, "way": "space-time"}, {"per_s": 250e3, "bytes": 3 * 2**30})
    kept.add({**base, "way": "space-time", "what": "capacity"}, {"per_s": 1234.4})
    loaded = {"p50_ms": 1.5, "p99_ms": 2.25, "spread": 1.014}
    kept.add({**base, "way": "space-time", "what": "load 0.7"}, loaded)
    kept.add({**base, "way": "space-time", "what": "abuse"}, {"interference": 1.05})
    kept.add({**base, "way": "exclusive"}, {"per_s": 100.0})
    table = figures.policies_table(kept.rows)
    assert (
        "| space-time | 50.0% | 250,000 | 1,234 | 1.50 | 2.25 | 1.01 | 1.05 | 3.0 |"
        in table
    )
    assert "| exclusive | 0.0% | 100 | - | - | - | - | - | - |" in table
    kept.rows[0]["about"] = {**kept.rows[0]["about"], "date": "2025-01-02"}
    kept.rows[-1]["about"] = {**kept.rows[0]["about"], "date": "2025-03-04"}
    kept.rows[2]["about"] = {**kept.rows[0]["about"], "date": "2025-03-05"}
    assert ", 2025-01-02 to 20" in figures.policies_table(kept.rows).splitlines()[0]
    readme = f"a\n\n{figures.BEFORE}\n\nb\n"
    once = figures.with_table(readme, table)
    assert once.index(figures.HEADING) < once.index(figures.BEFORE) and table in once
    assert figures.with_table(once, "new").count(figures.BEGIN.format("policies")) == 1
    assert figures.with_table(figures.with_table(once, "new"), table) == once


def test_a_plot_shows_the_best_number_of_processes_and_in_turn_at_any_number():
    def row(key, **values):
        return {"key": key, "values": values}

    key = {"shape": "s", "way": "space", "R": 4}
    rows = [
        row({**key, "processes": 2}, per_s=1.0, p50_ms=9.0),
        row({**key, "processes": 4}, per_s=3.0, p50_ms=7.0),
        row({**key, "processes": 8}, per_s=2.0, p50_ms=8.0),
        row({**key, "way": "in turn", "R": 1}, per_s=5.0, p50_ms=1.0),
        row({**key, "way": "torch vmap"}),
        row({**key, "way": "time", "dtype": "bfloat16"}, per_s=5.0, p50_ms=1.0),
    ]
    panels = figures.panels_of(rows, "shape", "R", "p50_ms")
    assert panels == {"s": {"space": {4: 7.0}, "in turn": {1: 1.0, 4: 1.0}}}
    assert figures.panels_of(rows[-2:], "shape", "R", "p50_ms") == {}


def test_without_results_nothing_is_written(tmp_path, capsys):
    before = (ROOT / "README.md").read_text()
    figures.main(["figures", str(tmp_path)])
    assert "nothing to write" in capsys.readouterr().out
    assert (ROOT / "README.md").read_text() == before and not list(tmp_path.iterdir())
