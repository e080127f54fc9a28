# SPDX-License-Identifier: Apache-2.0
"""Tables and rows: nothing is typed by hand, nothing is made twice, nothing is lost by a kill."""

import csv
import json

import numpy as np
import pytest
from etils import epath
from ml_collections import ConfigDict

from experiments.studies import plots, readme, tables
from experiments.studies.study import Context, Rows

ROWS = [
    {"group": "a", "method": "a", "score": 1.0, "config_hash": "h1", "seed": 0, "command": "run a"},
    {"group": "a", "method": "a", "score": 2.0, "config_hash": "h2", "seed": 1, "command": "run a again"},
    {"group": "b", "method": "b", "score": None, "config_hash": "h3", "seed": 0, "command": "run b"},
]
COLUMNS = (tables.Column("method", "method"), tables.Column("score", "score", 2))


def test_a_cell_is_mean_and_deviation_over_seeds_or_says_not_run(tmp_path):
    assert tables.cells(ROWS, COLUMNS) == [["a", "1.50 ± 0.71"], ["b", "not run"]]
    tables.write(epath.Path(tmp_path), "table", "Title.", ROWS, COLUMNS)
    full, summary = (tmp_path / "table.md").read_text(), (tmp_path / "table_summary.md").read_text()
    assert "n = 2 seeds" in full
    assert "run a again" in full and "h2" in full
    assert "run a" not in summary and "1.50 ± 0.71" in summary
    with open(tmp_path / "table.csv") as file:
        assert list(csv.reader(file))[1] == ["a", "1.50 ± 0.71", "h1, h2", "0, 1", "run a, run a again"]
    assert "\\toprule" in (tmp_path / "table.tex").read_text()


@pytest.mark.parametrize(
    ("values", "shown"),
    [
        ([1.0, 2.0, None], "1.50 ± 0.71"),
        ([2, 2, 3], "2, 3"),
        ([2, 2.5], "2.25 ± 0.35"),
        (["beyond", 2.25, "beyond"], "2.25 (1 of 3), beyond"),
        (["beyond", 1.0, 2.0], "1.50 ± 0.71 (2 of 3), beyond"),
    ],
)
def test_a_cell_of_numbers_texts_and_both(values, shown):
    assert tables.cell(values, 2) == shown


def test_a_row_is_made_once_for_a_config_and_again_for_another(tmp_path):
    path, made = epath.Path(tmp_path) / "rows.jsonl", []

    def build():
        made.append(1)
        return {"value": len(made)}

    first = Rows(path).make("x", ConfigDict({"seed": 3, "steps": 10}), build)
    again = Rows(path).make("x", ConfigDict({"seed": 3, "steps": 10}), build)
    assert first == again and first["value"] == 1 and first["seed"] == 3 and len(made) == 1
    assert Rows(path).make("x", ConfigDict({"seed": 3, "steps": 20}), build)["value"] == 2


def test_a_torn_last_row_is_made_again_and_stale_rows_leave(tmp_path):
    path, config = epath.Path(tmp_path) / "rows.jsonl", ConfigDict({"seed": 0})
    rows = Rows(path)
    for name in ("x", "y", "old"):
        rows.make(name, config, lambda name=name: {"value": name})
    path.write_text(path.read_text() + '{"id": "z", "val')
    rows = Rows(path)
    assert [row["id"] for row in rows.keep(["y", "x"])] == ["y", "x"]
    assert [json.loads(line)["id"] for line in path.read_text().splitlines()] == ["y", "x"]


def test_rows_that_a_clone_brings_are_made_again_since_their_runs_are_not_there(tmp_path):
    folder = epath.Path(tmp_path)

    def context(runs):
        return Context("tome", "test", {}, folder / "results", folder / runs, print)

    config = ConfigDict({"seed": 0})
    context("runs").rows.make("x", config, lambda: {"value": 1})
    assert context("runs").rows.make("x", config, lambda: {"value": 2})["value"] == 1
    assert context("elsewhere").rows.make("x", config, lambda: {"value": 2})["value"] == 2
    assert json.loads((folder / "results" / "rows.jsonl").read_text())["value"] == 2


def test_marked_blocks_of_a_document_follow_their_files(tmp_path):
    (tmp_path / "t.md").write_text("| new |\n")
    text = "before\n<!-- table: t.md -->\nold\n<!-- end -->\nafter\n<!-- table: none.md -->\nkept\n<!-- end -->\n"
    done = readme.render(text, epath.Path(tmp_path))
    assert "| new |" in done and "old" not in done and "kept" in done
    assert readme.render(done, epath.Path(tmp_path)) == done


def test_merged_patches_are_painted_in_their_mean_and_dropped_ones_dark():
    image = np.zeros((4, 4, 3))
    image[:2, :2], image[:2, 2:], image[2:, 2:] = 1.0, 0.5, 0.9
    painted = plots._painted(image, np.array([[0, 0], [-1, 1]]))
    np.testing.assert_allclose(painted[:2], 0.75)
    np.testing.assert_allclose(painted[2:, :2], 0.0)
    np.testing.assert_allclose(painted[2:, 2:], 0.9)


def test_figures_are_written_as_png_and_pdf_and_repeat_exactly(tmp_path):
    rows = [{"group": g, "method": "m", "x": g, "y": 2.0 * g} for g in (1, 2, 3)]
    for name in ("one", "two"):
        figure = plots.trade_off(rows, [("x", "x", "y", "y")], level={"y": 3.0})
        plots.save(figure, epath.Path(tmp_path), name)
    for kind in ("png", "pdf"):
        first, second = ((tmp_path / f"{name}.{kind}").read_bytes() for name in ("one", "two"))
        assert first == second and len(first) > 1_000
