# SPDX-License-Identifier: Apache-2.0
"""Accuracies and metrics of groups: equal to a plain count, and right under padding rows and weights."""

import dataclasses

import jax
import numpy as np
import pytest
from flax.core import meta

from experiments import data, metrics, tasks
from experiments.config import base_config
from experiments.data import resolve
from experiments.tasks.seq2seq import _accuracies

GROUPS = (data.Group("dependent", "kind", 1), data.Group("independent", "kind", 0), data.Group("none", "kind", 7))


def _config(**settings):
    """A tiny model, and short diagnostics unless `settings` say otherwise."""
    config = base_config()
    config.task = "seq2seq"
    config.model = dict(width=16, mlp_dim=16, heads=2, head_dim=8, encoder_layers=1, decoder_layers=1)
    config.data = resolve(settings or dict(source="diagnostic", length=12))
    return config


def _batch(rows=6):
    dataset = data.build(_config().data, split="valid", batch_size=rows, seed=0)
    batch = next(dataset.eval_batches())
    batch["labels"][-1] = 0
    batch["weight"] = np.array([1, 1, 1, 1, 1, 0], np.float32)
    return batch | {"kind": np.array([1, 0, 0, 1, 0, 0], np.int32)}


@pytest.fixture(scope="module")
def evaluated():
    """The task with groups, its parameters, a batch and its evaluation."""
    task = tasks.Seq2Seq.from_config(_config())
    task = dataclasses.replace(task, groups=GROUPS)
    batch = _batch()
    params = meta.unbox(task.init(jax.random.key(0), batch)["params"])
    step = jax.jit(lambda p, b: task.eval_step(p, b, extra={}))
    return step, params, batch


def test_accuracies_agree_with_a_plain_count():
    rng = np.random.default_rng(0)
    logits = rng.normal(size=(8, 5, 4)).astype(np.float32)
    labels = np.where(rng.random((8, 5)) < 0.5, logits.argmax(-1), rng.integers(0, 4, (8, 5)))
    labels[0], labels[2, 2:] = 0, 0
    logits[1, :, 0] = -9.0
    labels[1] = logits[1].argmax(-1)
    weight = np.array([1, 1, 1, 0, 1, 1, 1, 1], np.float32)
    right, count, whole, rows = 0, 0, 0, 0
    for row in range(8):
        places = [t for t in range(5) if labels[row, t] != 0]
        hits = [logits[row, t].argmax() == labels[row, t] for t in places]
        if weight[row] and places:
            right, count, whole, rows = right + sum(hits), count + len(hits), whole + all(hits), rows + 1
    assert whole >= 1 and rows == 6
    found = jax.jit(_accuracies)(logits, labels, weight)
    assert {name: tuple(map(float, pair)) for name, pair in found.items()} == {
        "token_accuracy": (right, count),
        "sequence_accuracy": (whole, rows),
    }


def test_a_group_is_measured_as_if_it_were_alone(evaluated):
    step, params, batch = evaluated
    found = step(params, batch)
    for group in GROUPS:
        alone = step(params, {**batch, "weight": batch["weight"] * (batch["kind"] == group.value)})
        for name in ("cross_entropy", "bits_per_byte", "kept", "token_accuracy", "sequence_accuracy"):
            np.testing.assert_allclose(found[f"{name}/{group.name}"], alone[name], rtol=1e-6)
    whole = np.add(found["cross_entropy/dependent"], found["cross_entropy/independent"])
    np.testing.assert_allclose(whole, found["cross_entropy"], rtol=1e-6)


def test_padding_rows_count_nowhere(evaluated):
    step, params, batch = evaluated
    found = step(params, batch)
    changed = {key: value.copy() for key, value in batch.items()}
    changed["input_ids"][-1] = changed["input_ids"][0]
    changed["kind"][-1] = 1
    again = step(params, changed)
    assert {name: np.asarray(pair).tolist() for name, pair in found.items()} == {
        name: np.asarray(pair).tolist() for name, pair in again.items()
    }
    assert float(found["sequence_accuracy"][1]) == 5
    assert np.isnan(metrics.compute(found)["kept/none"])


def test_training_reports_accuracies(evaluated):
    _, params, batch = evaluated
    task = tasks.Seq2Seq.from_config(_config())

    def loss(p, b):
        options = dict(rng=jax.random.key(0), step=0, extra={}, normalizers=task.normalizers(b), train=True)
        return task.loss(p, b, **options)[1]

    found = jax.jit(loss)(params, batch)
    assert float(found["token_accuracy"][1]) == (batch["labels"] != 0).sum()
    assert float(found["sequence_accuracy"][1]) == 5


def test_lengths_and_groups_come_from_the_data():
    task = tasks.Seq2Seq.from_config(_config(source="characters", characters="word_search"))
    assert (task.inputs_length, task.targets_length, task.tokens_per_example) == (128, 16, 128)
    assert [group.name for group in task.groups] == ["plain", "overlap", "oov", "oov_overlap"]
    assert tasks.Seq2Seq.from_config(_config()).groups == ()


def test_images_are_refused():
    with pytest.raises(ValueError, match="gives no sequences of bytes"):
        tasks.Seq2Seq.from_config(_config(source="digits"))
