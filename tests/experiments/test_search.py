# SPDX-License-Identifier: Apache-2.0
"""The objective of searches, and the command line: one compilation, results that are kept, the loss of the real path."""

import functools
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from etils import epath
from flax.core import meta

from adaptive.rates.schedules import Schedule
from experiments import config as config_lib
from experiments import search, train
from experiments.rundir import apply_overrides
from experiments.tasks.classification import Classification
from layers.learned_rates import as_reduce
from layers.vit import ViT

MODEL = ViT(4, 16, 3, 2, 32, num_classes=5, image_size=(16, 16), channels=1)


@functools.cache
def _params():
    shapes = meta.unbox(jax.eval_shape(MODEL.init, jax.random.key(0), jnp.zeros((1, 16, 16, 1))))["params"]
    rng = np.random.default_rng(0)
    return jax.tree.map(lambda leaf: 0.3 * rng.normal(size=leaf.shape).astype(np.float32), shapes)


def _batches(number=2):
    rng = np.random.default_rng(1)
    return [
        {
            "image": rng.normal(size=(4, 16, 16, 1)).astype(np.float32),
            "label": rng.integers(0, 5, 4).astype(np.int32),
            "weight": np.ones(4, np.float32),
        }
        for _ in range(number)
    ]


def _objective(folder, **options):
    path = epath.Path(folder) / "searches.jsonl"
    return search.Objective(MODEL, _params(), _batches(), path=path, **{"identity": "a", **options})


def test_the_loss_is_that_of_the_path_that_shrinks(tmp_path):
    objective = _objective(tmp_path, pruned=0.5)
    counts = (17, 11, 4)
    schedule = objective.schedule(counts)
    assert schedule == Schedule((17, 14, 7), counts)
    task = Classification(MODEL.clone(hooks=(as_reduce(schedule),)))
    found = [jax.jit(functools.partial(task.eval_step, extra={}))(_params(), batch) for batch in _batches()]
    want = np.mean([np.divide(*step["cross_entropy"]) for step in found])
    np.testing.assert_allclose(objective(counts), want, rtol=1e-4)
    first = np.divide(*found[0]["cross_entropy"])
    np.testing.assert_allclose(objective(counts, 0.5), first, rtol=1e-4)


def test_nothing_is_evaluated_twice_and_one_compilation_serves_all(tmp_path):
    objective, asked = _objective(tmp_path), []
    step = objective._step
    objective._step = lambda params, batch: (asked.append(batch), step(params, batch))[1]
    schedules = [(17, 17, 17), (17, 9, 5), (14, 9, 2)]
    # A part of the set first: the whole then asks for the rest alone.
    half = objective(schedules[0], 0.5)
    losses = [objective(counts) for counts in schedules]
    assert len({*losses, half}) == 4 and step._cache_size() == 1 and len(asked) == 2 * len(schedules)
    assert [objective(counts) for counts in schedules] == losses and objective(schedules[0], 0.5) == half
    assert (objective.evaluations, objective.calls, len(asked)) == (4, 8, 6)
    again = _objective(tmp_path)
    assert [again(counts) for counts in schedules] == losses and again(schedules[0], 0.5) == half
    assert again.evaluations == 0
    other = _objective(tmp_path, identity="b")
    other((17, 9, 5))
    assert other.evaluations == 1


def test_a_torn_line_of_a_killed_search_is_made_again(tmp_path):
    objective = _objective(tmp_path)
    first, _ = objective((17, 9, 5)), objective((17, 8, 5))
    path = epath.Path(tmp_path) / "searches.jsonl"
    text = path.read_text()
    path.write_text(text[: text.rindex('"losses"')])
    again = _objective(tmp_path)
    assert again((17, 9, 5)) == first and again.evaluations == 0
    second = again((17, 8, 5))
    assert again.evaluations == 1
    # What was made after the torn line is there for the next.
    last = _objective(tmp_path)
    assert last((17, 8, 5)) == second and last.evaluations == 0


def test_mistakes_are_refused(tmp_path):
    with pytest.raises(ValueError, match="calibration set is empty"):
        search.Objective(MODEL, _params(), [], path=epath.Path(tmp_path) / "x", identity="")
    with pytest.raises(ValueError, match="needs a class token"):
        mean = MODEL.clone(pool="mean")
        search.Objective(mean, _params(), _batches(), path=epath.Path(tmp_path) / "x", identity="")
    with pytest.raises(ValueError, match="2 layers and the backbone 3"):
        _objective(tmp_path)((17, 9))
    with pytest.raises(ValueError, match="beside the class token"):
        _objective(tmp_path)((17, 9, 1))
    with pytest.raises(ValueError, match="no search is named 'annealing'"):
        search.run("annealing", search.space_of(MODEL, 0.8), lambda counts, share=1.0: 0.0, trials=1, seed=0)
    with pytest.raises(ValueError, match="no schedule meets a budget"):
        search.space_of(MODEL, 0.01)


@pytest.mark.parametrize("method", search.METHODS)
def test_every_method_finds_a_schedule_within_the_budget(method):
    space = search.space_of(MODEL, 0.8)
    target = (17, 13, 6)
    asked = []

    def loss(counts, share=1.0):
        asked.append(counts)
        return sum((17 - count) ** 2 * weight for count, weight in zip(counts, target, strict=True)) / 1e4

    first = search.run(method, space, loss, trials=8, seed=1)
    assert space.fits(first)
    number = len(asked)
    assert search.run(method, space, loss, trials=8, seed=1) == first and asked[number:] == asked[:number]


def test_the_optimiser_learns_where_the_loss_is_low():
    told = []
    for _ in range(14):
        point = search.suggest(told, seed=0)
        told.append((point, (point[0] - 2.5) ** 2 + (point[1] - 0.3) ** 2))
    best = min(loss for _, loss in told)
    assert best < min(loss for _, loss in told[:5]) and best < 0.1


def test_the_command_resumes_and_prints_what_evaluates_the_result(tmp_path, capsys):
    overrides = {"data.threads": 0, "data.examples": 128, "model.depth": 3, "eval.every": 0}
    config = apply_overrides(config_lib.load("configs/diffrate/digits.py:runlocal"), overrides)
    train.train(config, tmp_path / "run", progress=False)
    command = [f"--workdir={tmp_path / 'run'}", "--method=random", "--budget=0.8", "--trials=2", "--examples=64"]
    assert search.main(command) == 0
    printed = capsys.readouterr()
    assert "[search random] step 2/2 (100 %)" in printed.err and "ETA 0:00:00" in printed.err
    first, receipt = printed.out.strip().splitlines()
    found = json.loads(first)
    assert found["evaluations"] == 2 and found["macs_share"] <= 0.8
    assert receipt.startswith("python -m experiments.evaluate --workdir=")
    assert f"'model.reduction.counts={json.dumps(found['merge'])}'" in receipt
    assert search.main(command) == 0
    assert json.loads(capsys.readouterr().out.splitlines()[0])["evaluations"] == 0
    assert search.main([*command[:2], "--budget=0.01"]) == 2
    assert "no schedule meets a budget" in capsys.readouterr().err
