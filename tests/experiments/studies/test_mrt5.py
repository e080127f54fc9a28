# SPDX-License-Identifier: Apache-2.0
"""The parts of the MrT5 study: comparisons at equal length, tables by language and kind."""

import pytest
from etils import epath

from experiments import reproduce
from experiments.rundir import apply_overrides, plain
from experiments.studies import plots, tables
from experiments.studies.mrt5 import SUITES, characters, deletions, languages, published, trade_off
from experiments.studies.study import Context
from tests.experiments import tiny_data

TINY = {
    "steps": 2,
    "batch_size": 8,
    "eval.batches": 1,
    "eval.every": 2,
    "checkpoint.every": 2,
    "optimizer.warmup": 1,
    "data.threads": 0,
    "model.width": 32,
    "model.mlp_dim": 64,
    "model.heads": 2,
    "model.head_dim": 16,
    "model.encoder_layers": 2,
    "model.decoder_layers": 1,
    "model.gate_layer": 1,
    "model.rungs": (48,),
}


def _row(method, kept, bits, seed=0, rate=None):
    return {"method": method, "kept": kept, "bits_per_byte": bits, "seed": seed, "rate": rate, "group": method}


def test_a_class_of_which_the_text_has_no_byte_has_no_share():
    row = plain({"method": "mrt5", "rate": 0.5, "deleted/digit": float("nan"), "deleted/letter": 0.25})
    columns = {column.head: column for column in deletions.COLUMNS}
    assert (columns["digit"].of(row), columns["letter"].of(row)) == ("-", 25.0)


def test_methods_are_compared_at_the_length_that_mrt5_left():
    rows = [
        _row("dense", 1.0, 2.0),
        _row("mrt5", 0.4, 2.3, rate=0.6),
        _row("random_deletion", 0.2, 3.0),
        _row("fixed_deletion", 0.4, 2.2),
        _row("dense", 1.0, 9.0, seed=1),  # another seed has no say
    ]
    (found,) = trade_off.equal_length(rows)
    # Between (0.2, 3.0) and the dense model (1.0, 2.0), at 0.4.
    assert found["random_deletion"] == pytest.approx(2.75)
    assert found["fixed_deletion"] == pytest.approx(2.2)
    assert found["lower"] == "seed 0: no"
    (found,) = trade_off.equal_length([*rows[:3], _row("fixed_deletion", 0.4, 2.4)])
    assert found["lower"] == "seed 0: yes"
    # Fixed deletion leaves no less than half here: nothing is made up for less.
    (found,) = trade_off.equal_length([*rows[:3], _row("fixed_deletion", 0.5, 2.2)])
    assert found["fixed_deletion"] == tables.BEYOND and found["lower"] == "seed 0: yes"


def test_rows_by_language_stand_side_by_side_with_their_mean():
    rows = [
        {"method": method, "seed": 0, "bits_per_byte": 9.0}
        | {f"bits_per_byte/{name}": bits + shift for name, bits in (("zh", 3.0), ("de", 1.0))}
        | {f"kept/{name}": 0.5 for name in ("zh", "de")}
        for method, shift in (("dense", 0.0), ("mrt5", 0.1), ("mrt5_zero_shot", 0.2), ("random_deletion", 0.4))
    ]
    found = languages.by_language(rows)
    assert [line["language"] for line in found] == ["de", "zh", "mean"]
    assert found[0]["dense"] == 1.0 and found[0]["mrt5_zero_shot"] == pytest.approx(1.2)
    assert found[0]["published"] == 57 and found[2]["published"] == "-"
    assert found[2]["random_deletion"] == pytest.approx(2.4)


def test_rows_by_kind_leave_out_what_has_none():
    rows = [{"group": "a", "sequence_accuracy": 0.5, "sequence_accuracy/dependent": 0.25}, {"group": "b"}]
    (found,) = characters.by_kind(rows)
    assert (found["kind"], found["right"], found["group"]) == ("dependent", 0.25, "a/sequence_accuracy/dependent")


def test_published_figures_are_marked_and_keep_their_relations():
    rows = published.trade_off()
    assert all(row["method"].startswith("paper: ") and row["command"] == "arXiv:2410.20771" for row in rows)
    learned = {row["rate"]: row for row in rows if row["method"] == "paper: mrt5"}
    # 32.27 % of ByT5's time is saved at a target of one half.
    assert 1 - 1 / learned[0.5]["realised"] == pytest.approx(0.3227, abs=2e-3)
    assert sorted(learned, key=lambda rate: -learned[rate]["kept"]) == sorted(learned)


def _context(tmp_path, settings, **more):
    root = epath.Path(tmp_path)
    return Context("mrt5", "test", settings, root / "results", root / "runs", lambda text: None, **more)


def test_languages_without_a_folder_say_so(tmp_path):
    context = _context(tmp_path, {"seeds": (0,)})
    assert languages.run(context, SUITES["quick"]["languages"]) == []
    assert "--data text=FOLDER" in (context.results / "languages_summary.md").read_text()


@pytest.mark.long
def test_languages_of_a_folder_make_a_table_and_a_plot(tmp_path):
    (tmp_path / "text").mkdir()
    folder = tiny_data.write_languages(tmp_path / "text")
    lengths = {"data.context": 24, "data.targets_length": 8, "data.eval_examples": 2}
    tiny = {**TINY, **lengths, "model.scan_layers": False}
    settings = dict(
        config="mrt5/languages.py", arg="objective=next_byte", rate=0.5, base=tiny, tune={**tiny, "log_every": 1}
    )
    context = _context(tmp_path, {"seeds": (0,), "batches": None, "repeats": 1}, data={"text": str(folder)})
    ids = languages.run(context, settings)
    assert len(ids) == 4
    table = (context.results / "languages_summary.md").read_text()
    assert "| de " in table and "| mean " in table and "nan" not in table
    assert (context.results / "languages.png").exists()


@pytest.mark.long
def test_tasks_make_tables_beside_the_papers(tmp_path):
    spelling = {**TINY, "data.inputs_length": 24, "data.targets_length": 24, "data.max_bytes": 200_000}
    task = dict(config="mrt5/characters.py", arg="task=spelling_correction", rate=0.5, base=spelling, tune={**spelling})
    context = _context(tmp_path, {"seeds": (0,), "batches": 1, "repeats": 1})
    ids = characters.run(context, {"seeds": (0,), "tasks": {"spelling correction": task}})
    assert len(ids) == 3
    table = (context.results / "characters_summary.md").read_text()
    assert "paper: mrt5" in table and "random_deletion" in table
    assert "independent" in (context.results / "kinds_summary.md").read_text()


@pytest.mark.parametrize("item", ["texts=somewhere", "text=", "text"])
def test_data_that_no_study_takes_are_refused(item, capsys):
    with pytest.raises(SystemExit):
        reproduce.main(["--data", item])
    assert "NAME=FOLDER with NAME one of text" in capsys.readouterr().err


def test_curves_and_bars_draw_every_line_and_group():
    figure = plots.curves({"a": ([1, 2], [3.0, 4.0]), "b": ([1, 2], [4.0, 3.0])}, "step", "rate", levels=(3.5,))
    assert len(figure.axes[0].lines) == 3
    figure = plots.bars({"de": {"x": 1.0, "y": 2.0}, "fr": {"x": 1.5, "y": 0.5}}, "bits")
    assert [bar.get_height() for bar in figure.axes[0].patches] == [1.0, 1.5, 2.0, 0.5]


@pytest.mark.parametrize("suite", SUITES)
def test_suites_set_only_keys_that_their_configs_have(suite):
    settings = SUITES[suite]
    parts = [settings["trade_off"], *settings.get("characters", {}).get("tasks", {}).values()]
    parts += [settings[name] for name in ("languages", "placement") if name in settings]
    for part in parts:
        for overrides in (part["base"], part["tune"]):
            config = apply_overrides(Context.config(part["config"], part.get("arg", "")), dict(overrides))
            assert config.steps == overrides["steps"]
