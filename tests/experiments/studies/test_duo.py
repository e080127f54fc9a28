# SPDX-License-Identifier: Apache-2.0
"""The study of routers and oracles, from nothing to its tables; what is in order and what is not."""

import json

import jax
import numpy as np
import pytest
from etils import epath
from flax.core import meta

from adaptive import flops
from adaptive.width import duo
from experiments import measure
from experiments.studies import duo as study
from experiments.studies import plots
from experiments.studies.duo import budgets, depth, isoflop
from experiments.studies.duo.measured import Measured
from experiments.studies.study import Context
from layers.decoder_lm import DecoderLM
from layers.duo_oracle import token_losses
from layers.early_exit import SkipSchedule

SMALL = {"batch_size": 8, "eval.every": 0, "optimizer.warmup": 1, "data.threads": 0}
MODEL = {"model.width": 16, "model.layers": 2, "model.heads": 2, "model.big": 16, "model.small": 4}
SETTINGS = dict(
    seeds=(0,),
    overrides={"steps": 2, "data.targets_length": 16, **SMALL, **MODEL},
    router={"steps": 2},
    sequences=8,
    shown=2,
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
    for name in ("budgets", "single", "layers", "classes", "difficulty"):
        text = (context.results / f"{name}.md").read_text()
        assert "python -m experiments.reproduce --suite=test --only=duo" in text
    for name in ("budgets", "layers", "difficulty"):
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


def test_decoding_with_true_bytes_scores_them_as_the_whole_model_does():
    """And a schedule of half of the layers runs half of them, at the cost of other losses."""
    model = DecoderLM(vocab_size=40, width=16, depth=4, heads=2, mlp_dim=16)
    ids, labels = jax.random.randint(jax.random.key(0), (2, 3, 12), 3, 40)
    shapes = jax.eval_shape(lambda: meta.unbox(model.init(jax.random.key(1), ids))["params"])
    params = measure.random_like(shapes, jax.random.key(2), deviation=0.3)
    found = {}
    for name, policy in (("all", None), ("half", SkipSchedule((2,) * 7))):
        own = model.clone(policy=policy)
        run = jax.jit(
            lambda p, own=own: depth._decode(own, p, depth._prefill(own, 6, 7, p, ids), ids[:, 5:], labels[:, 5:])
        )
        found[name] = run(params)
    want = jax.jit(lambda p: token_losses(model.apply({"params": p}, ids)[0], labels)[:, 5:])(params)
    np.testing.assert_allclose(found["all"][0].T, want, atol=1e-4)
    assert np.abs(found["half"][0].T - want).max() > 1e-3
    assert found["all"][2].tolist() == [7] * 4 and found["half"][2].tolist() == [7, 0, 0, 7]
    assert found["half"][1].sum() == 2 * 7 * 3


def test_equal_compute_gives_cheaper_models_more_steps():
    context = Context("duo", "test", {}, epath.Path("results"), epath.Path("runs"), print)
    settings = dict(overrides={"model.depth": 4, "data.length": 64}, widths=(32, 48, 64), steps=50)
    dense, routed = (isoflop._macs(isoflop._config(context, settings, 48, share, 0)) for share in (0.0, 0.25))
    assert isoflop._budget(context, settings) == 50 * dense
    whole = flops.count(DecoderLM(384, 48, 4, 4, 144, kv_heads=2), batch=32, tokens=64)
    assert dense == whole.macs
    # Two of four blocks run for a quarter of the bytes; attention among a quarter of them is a sixteenth.
    few = flops.count(DecoderLM(384, 48, 4, 4, 144, kv_heads=2), batch=32, tokens=64, counts=[64, 16, 64, 16])
    assert routed == few.macs < whole.macs


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
