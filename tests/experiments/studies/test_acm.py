# SPDX-License-Identifier: Apache-2.0
"""The study of ACM: from nothing to tables and pictures, comparison at equal compute, and what the quick run has to show."""

import collections
import functools
import json
import pathlib

import numpy as np
import pytest
from etils import epath

from experiments.studies import acm
from experiments.studies.acm import images, pictures
from experiments.studies.acm.runs import at_equal_compute, where_reached
from experiments.studies.study import Context

ROOT = pathlib.Path(__file__).parents[3]
SMALL = {"steps": 2, "batch_size": 8, "eval.every": 2, "checkpoint.every": 2, "optimizer.warmup": 1, "data.threads": 0}
SMALL |= {f"model.acm.phases.{phase}_steps": 2 for phase in ("dense", "distill", "gate")}
SMALL |= {"model.width": 16, "model.depth": 2, "model.heads": 2, "model.mlp_dim": 16, "model.patch_size": 16}
SMALL |= {"data.examples": 64, "data.valid_examples": 16, "data.image_size": 32}
SETTINGS = dict(
    seeds=(0,),
    repeats=1,
    evaluated=1,
    images=dict(
        config="acm/digits.py",
        overrides=SMALL,
        targets=(0.5,),
        thresholds=(0.12,),
        baselines=("early_exit",),
        batches=(),
        ablations=False,
    ),
)


@pytest.mark.long
def test_it_makes_tables_plots_and_pictures_and_continues(tmp_path):
    results = epath.Path(tmp_path) / "results"
    context = Context("acm", "test", SETTINGS, results, epath.Path(tmp_path) / "runs", lambda text: None)
    acm.run(context)
    for file in (
        "table.md",
        "table_summary.md",
        "images_equal_compute.md",
        "images_budgets.md",
        "images_trade_off.png",
    ):
        assert (results / file).stat().length > 100
    for picture in ("images_learners", "images_tokens"):
        assert (results / f"{picture}.png").exists()
    first = (results / "rows.jsonl").read_text()
    rows = [json.loads(line) for line in first.splitlines()]
    assert [row["method"] for row in rows] == ["dense", "acm", "early_exit"]
    assert rows[1]["realised"] > 0 and len(rows[1]["load"]) == 10
    acm.run(context)
    assert (results / "rows.jsonl").read_text() == first


class Recorded:
    """Runs and phases that note which of them are trained."""

    def __init__(self):
        self.trained = []
        self.phases = lambda config: self
        self.teacher = lambda: "teacher"
        self.gated = lambda *given: self.note("gated", given)
        self.distilled = lambda *given: self.note("distilled", given)

    def note(self, phase, given):
        self.trained.append((phase, given[-1] if given else "shared"))
        return phase


@pytest.mark.parametrize(
    ("name", "trained"),
    [
        ("without diversity", [("gated", "shared")]),
        ("distillation loss at the end", [("gated", "shared")]),
        ("without gate pre-training", [("distilled", "shared"), ("gated", "own-gated")]),
        ("without distillation", [("distilled", "own-distilled"), ("gated", "own-gated")]),
        ("8 learners", [("distilled", "own-distilled"), ("gated", "own-gated")]),
    ],
)
def test_ablations_share_the_phases_that_they_do_not_change(name, trained):
    recorded = Recorded()
    assert images._before_last_phase(recorded, None, images.ABLATIONS[name], "own") == "gated"
    assert recorded.trained == trained


def row(method, mmacs, accuracy, seed=0):
    return {"method": method, "mmacs": mmacs, "accuracy": accuracy, "seed": seed}


def test_others_are_compared_at_the_compute_that_acm_used():
    rows = [row("dense", 10, 90), row("acm", 5, 80), row("acm", 1, 50), row("acm", 7, 85)]
    rows += [row("exit", 4, 60), row("exit", 6, 50), row("exit", 4, 99, seed=1)]
    found = at_equal_compute(rows, "acm", "exit", "accuracy", higher=True)
    # The dearer and worse setting of the other method is never taken; nothing is known below its cheapest.
    assert [r["reached"] for r in found] == [60.0, None, 67.5]
    assert [r["gain"] for r in found] == [20.0, None, 17.5]
    assert [where_reached("reached")(r) for r in found] == [60.0, "beyond its reach", 67.5]
    lower = at_equal_compute(rows, "acm", "exit", "accuracy", higher=False)
    assert lower[0]["reached"] == 55.0 and lower[0]["gain"] == -25.0


def test_corruptions_change_images_as_they_say():
    flat = np.ones((2, 6, 6, 1), np.float32)
    np.testing.assert_allclose(images.blur(flat), flat, rtol=1e-6)
    dot = np.zeros((1, 5, 5, 1), np.float32)
    dot[0, 2, 2] = 9
    np.testing.assert_allclose(images.blur(dot)[0, 1:4, 1:4, 0], 1.0, rtol=1e-6)
    moved = images.noise(np.zeros((4, 32, 32, 1), np.float32))
    np.testing.assert_allclose([moved.mean(), moved.std()], [0, 0.5], atol=0.02)
    np.testing.assert_array_equal(moved, images.noise(np.zeros((4, 32, 32, 1), np.float32)))


def test_rarely_used_numbers_of_learners_do_not_count():
    load = {"a": [0.0, 0.995, 0.005], "b": [0.3, 0.3, 0.4]}
    assert pictures.counts(load) == [1, 3] and pictures.several(load) == 1


@functools.cache
def committed():
    """Rows of the trade-offs in the committed quick run, by part."""
    path = ROOT / "results" / "quick" / "acm" / "rows.jsonl"
    if not path.exists():
        pytest.skip("no committed quick run: python -m experiments.reproduce --suite=quick --only=acm")
    parts = {}
    for row in map(json.loads, path.read_text().splitlines()):
        if row["kind"] == "trade_off":
            parts.setdefault(row["part"], []).append(row)
    return parts


@pytest.mark.parametrize("part", ["images", "text"])
def test_the_committed_quick_run_meets_its_budgets(part):
    rows = [row for row in committed()[part] if row["method"] == "acm"]
    assert len(rows) == 15
    for target in {row["setting"] for row in rows}:
        shares = [row["share"] for row in rows if row["setting"] == target]
        assert abs(np.mean(shares) - float(target)) < 0.01, target


def test_gates_choose_in_most_modules_of_the_committed_quick_run():
    for found in committed()["images"]:
        if found["method"] == "acm":
            assert pictures.several(found["load"]) > len(found["load"]) / 2, found["id"]


@pytest.mark.parametrize("other", ["early_exit", "avit"])
def test_acm_is_above_exits_and_halting_at_two_budgets_in_every_seed_of_the_committed_quick_run(other):
    found = at_equal_compute(committed()["images"], "acm", other, "accuracy", higher=True)
    seeds = collections.Counter(row["setting"] for row in found if row["gain"] is not None and row["gain"] > 0)
    assert sum(count == 3 for count in seeds.values()) >= 2, seeds
