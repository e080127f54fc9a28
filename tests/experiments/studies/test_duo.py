# SPDX-License-Identifier: Apache-2.0
"""The study of routers and oracles, from nothing to its tables; what is in order and what is not."""

import json

import numpy as np
import pytest
from etils import epath

from adaptive.width import duo
from experiments.studies import duo as study
from experiments.studies import plots
from experiments.studies.duo import budgets
from experiments.studies.duo.measured import Measured
from experiments.studies.study import Context

SMALL = {"batch_size": 8, "eval.every": 0, "optimizer.warmup": 1, "data.threads": 0}
MODEL = {"model.width": 16, "model.layers": 2, "model.heads": 2, "model.big": 16, "model.small": 4}
DECODER = {**SMALL, "model.width": 16, "model.mlp_dim": 16, "model.heads": 2, "model.kv_heads": 1, "data.length": 16}
SETTINGS = dict(
    seeds=(0,),
    overrides={"steps": 2, "data.targets_length": 16, **SMALL, **MODEL},
    router={"steps": 2},
    sequences=8,
    shown=2,
    depth=dict(
        seeds=(0,),
        overrides={**DECODER, "model.depth": 3, "steps": 1},
        speedups=(1.5,),
        thresholds=(0.0,),
        batches=(2,),
        quality_batches=1,
        repeats=1,
    ),
    isoflop=dict(seeds=(0,), overrides={**DECODER, "model.depth": 2}, widths=(16,), shares=(0.25,), steps=3, batches=1),
)


@pytest.fixture(scope="module")
def context(tmp_path_factory):
    folder = epath.Path(tmp_path_factory.mktemp("duo"))
    found = Context("duo", "test", SETTINGS, folder / "results", folder / "runs", lambda _: None)
    study.run(found)
    return found


def rows_of(context):
    return {row["id"]: row for row in map(json.loads, (context.results / "rows.jsonl").read_text().splitlines())}


def test_every_table_and_picture_is_there_and_a_second_start_makes_nothing_again(context):
    for name in ("budgets", "single", "layers", "classes", "difficulty", "decoding", "isoflop"):
        text = (context.results / f"{name}.md").read_text()
        assert "python -m experiments.reproduce --suite=test --only=duo" in text
    for name in ("budgets", "layers", "difficulty", "decoding", "isoflop"):
        assert (context.results / f"{name}.png").stat().length > 1_000
    first = (context.results / "rows.jsonl").read_text()
    study.run(context)
    assert (context.results / "rows.jsonl").read_text() == first


def test_budgets_of_none_and_of_all_have_one_pattern(context):
    rows = rows_of(context)
    for budget, choice in ((0, duo.SMALL), (2, duo.BIG)):
        row = rows[f"budget{budget}-seed0"]
        assert row["patterns"] == 1 and row["router_bigs"] == budget
        for name in ("oracle_sequence", "realised", "fixed", "router", "random_router", "control"):
            assert row[name] == pytest.approx(row["oracle"], abs=1e-4), name
        single = rows["big-none-seed0" if choice == duo.SMALL else "big-all-seed0"]
        assert single["cross_entropy"] == pytest.approx(row["oracle"], abs=1e-6)


def test_one_big_module_is_bounded_by_the_oracle(context):
    rows = rows_of(context)
    layers = [rows[f"big-layer_{layer}_only-seed0"]["cross_entropy"] for layer in range(2)]
    found = rows["budget1-seed0"]
    assert rows["big-one,_by_the_oracle-seed0"]["cross_entropy"] == pytest.approx(found["oracle"])
    assert found["oracle"] < min(layers) <= found["fixed"] <= max(layers)
    assert found["oracle"] <= found["oracle_sequence"] <= min(layers) + 1e-6
    assert found["oracle_skip"] <= found["oracle"] <= found["control"] <= max(layers) + found["gain"]
    assert found["gain_shuffled"] > 0


def test_decoding_reports_the_layers_that_ran(context):
    rows = rows_of(context)
    assert rows["decoding-all-batch2-seed0"]["layers"] == 3
    assert rows["decoding-skip_decode-1.5-batch2-seed0"]["implied"] == pytest.approx(1.5, abs=0.1)
    # No confidence is below 0, so each byte stops where it first may.
    assert rows["decoding-calm-0-batch2-seed0"]["layers"] < 3
    losses = {rows[name]["cross_entropy"] for name in rows if name.startswith("decoding")}
    assert len(losses) > 1


def test_equal_compute_gives_cheaper_models_more_steps(context):
    dense, routed = (rows_of(context)[f"isoflop-width16-share{share:g}-seed0"] for share in (0.0, 0.25))
    assert routed["steps"] > dense["steps"] == 3
    assert routed["mmacs"] * routed["steps"] == pytest.approx(dense["mmacs"] * dense["steps"], rel=0.2)
    assert dense["top_k"] == "-" and routed["top_k"] != routed["cross_entropy"]


def test_the_order_is_that_of_the_losses(context, monkeypatch):
    one = Measured(context, 0, SETTINGS["overrides"], SETTINGS["router"], 8)
    paths = np.full((8, 16, 2), duo.BIG)
    low, high = np.full((8, 16), -1.0), np.full((8, 16), 99.0)
    for router, random, want in ((one.losses["true"].mean() + low, high, "no"), (high, high, "yes"), (high, low, "no")):
        monkeypatch.setattr(Measured, "routed", lambda self, budget, router=router: (router, paths))
        monkeypatch.setattr(Measured, "random_router", lambda self, budget, random=random: random)
        assert budgets._row(one, 1)["ordered"] == want


def test_a_heat_map_shades_every_byte():
    figure = plots.text_heat([("loss", b"ab\ncd", np.arange(5.0)), ("gain", b"xyz", np.ones(3))], width=3)
    axes = [axis for axis in figure.axes if axis.get_images()][:2]
    shades = axes[0].get_images()[0].get_array()
    assert shades.shape == (2, 3) and shades.compressed().tolist() == [0.0, 1.0, 2.0, 3.0, 4.0]
    assert [text.get_text() for text in axes[0].texts] == ["a", "b", "¶", "c", "d"]
    assert axes[1].get_title(loc="left") == "gain"
