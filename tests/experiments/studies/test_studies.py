# SPDX-License-Identifier: Apache-2.0
"""Studies run from nothing to tables and pictures, and a second start makes nothing again."""

import json

import pytest
from etils import epath

from experiments import reproduce
from experiments.studies import STUDIES, mrt5, tome
from experiments.studies.study import Context

SMALL = {"batch_size": 8, "eval.every": 2, "checkpoint.every": 2, "optimizer.warmup": 1, "data.threads": 0}
VIT = {"model.width": 32, "model.depth": 2, "model.heads": 2, "model.mlp_dim": 64, "data.examples": 64}
T5 = {"model.width": 32, "model.mlp_dim": 64, "model.heads": 2, "model.head_dim": 16, "model.rungs": (24, 48)}
T5 |= {"model.encoder_layers": 2, "model.gate_layer": 1}
SMALL_T5 = {"eval.batches": 1, **SMALL, **T5}
SETTINGS = {
    "tome": dict(
        seeds=(0,),
        overrides={"steps": 2, "data.valid_examples": 16, **SMALL, **VIT},
        rates=(2, 5),
        batches=1,
        repeats=1,
    ),
    "mrt5": dict(
        seeds=(0,),
        batches=1,
        repeats=1,
        trade_off=dict(
            config="mrt5/continuation.py",
            base={"steps": 2, **SMALL_T5},
            tune={"steps": 4, "log_every": 1, **SMALL_T5},
            rates=(0.5,),
            shown=1,
        ),
        placement=dict(
            config="mrt5/continuation.py",
            base={"steps": 2, **SMALL_T5},
            tune={"steps": 4, "log_every": 1, **SMALL_T5},
            rate=0.5,
            layers=(2,),
        ),
    ),
}
TINY = {**SMALL, **VIT, "model.depth": 3, "eval.every": 0, "data.valid_examples": 16}
SETTINGS["diffrate"] = dict(
    seeds=(0,),
    batches=1,
    repeats=0,
    sets={
        "digits": dict(
            config="diffrate/digits.py",
            base={"steps": 2, **TINY},
            learn={"steps": 2},
            tune={"steps": 1, "optimizer.warmup": 0},
            seeds=(1,),
            budgets=(0.8,),
            tuned_budgets=(),
            orders=("cls_attention",),
            whole=False,
            baselines=("tome",),
            search=dict(budget=0.8, trials=2, examples=64, methods=("evopress",)),
        ),
        "cifar10": dict(folder="cifar10"),
    },
    shapes={},
)
PICTURES = {"tome": "patches", "mrt5": "bytes", "diffrate": "digits_regions"}
TABLES = {"tome": ("table", "trade_off"), "mrt5": ("table", "trade_off"), "diffrate": ("digits_plain", "digits_plain")}


@pytest.mark.parametrize("name", ["tome", pytest.param("mrt5", marks=pytest.mark.long), "diffrate"])
def test_a_study_makes_tables_plots_and_pictures_and_continues(name, tmp_path, monkeypatch):
    monkeypatch.setattr(tome, "METHODS", ("tome", "random"))
    for part in (mrt5.trade_off, mrt5.deletions):
        monkeypatch.setattr(part, "DELETIONS", ("mrt5", "random_deletion"))
    said = []
    results = epath.Path(tmp_path) / "results"
    context = Context(name, "test", SETTINGS[name], results, epath.Path(tmp_path) / "runs", said.append)
    STUDIES[name].run(context)
    table, plot = TABLES[name]
    kinds = [f"{table}{end}" for end in (".md", ".tex", ".csv", "_summary.md")]
    for file in (*kinds, f"{plot}.png", f"{plot}.pdf"):
        assert (results / file).stat().length > 100
    assert (results / f"{PICTURES[name]}.png").exists()
    first = (results / "rows.jsonl").read_text()
    rows = [json.loads(line) for line in first.splitlines()]
    assert len(rows) == {"tome": 5, "mrt5": 4, "diffrate": 4}[name]
    for row in rows:
        assert row["command"].startswith("python -m experiments.evaluate --workdir=")
        assert {"config_hash", "seed", "device", "versions", "revision", "implied", "realised"} <= set(row)
    assert rows[-1]["implied"] > 1
    STUDIES[name].run(context)
    assert (results / "rows.jsonl").read_text() == first


def test_an_unknown_study_is_named(capsys):
    with pytest.raises(SystemExit):
        reproduce.main(["--only=tomme"])
    assert "no study is named tomme" in capsys.readouterr().err


@pytest.mark.parametrize("suite", reproduce.SUITES)
@pytest.mark.parametrize("name", STUDIES)
def test_every_study_has_every_suite(name, suite):
    assert STUDIES[name].SUITES[suite]["seeds"]
