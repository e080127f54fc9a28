# SPDX-License-Identifier: Apache-2.0
"""The task on a model with a chunker: losses, figures, compute, and exact accumulation."""

import dataclasses

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from ml_collections import ConfigDict

from adaptive import flops, registry
from adaptive.tokens import Signals, TokenSet
from configs.mrt5 import continuation
from experiments import tasks
from experiments.tasks.seq2seq import Seq2Seq

# The compiler takes most of the time here; without its optimisations it takes half.
QUICK = {"xla_backend_optimization_level": "0"}
CHUNKERS = ("strided", "words", "boundary_predictor", "hnet")


def make_task(chunker, rate=0.75, **model):
    config = continuation.get_config(f"chunker={chunker},rate={rate},runlocal")
    config.model.update(dict(encoder_layers=2, chunk_layer=1, width=16, rungs=()))
    with config.model.unlocked():
        config.model.update(ConfigDict(model))
    return tasks.build(config)


def make_batch(rows=4):
    rng = np.random.default_rng(0)
    ids = rng.choice(np.frombuffer(b"ab c", np.uint8), (rows, 16)).astype(np.int32) + 3
    ids[0, 9:] = 0
    labels = rng.integers(3, 259, (rows, 4)).astype(np.int32)
    return {"input_ids": ids, "labels": labels, "decoder_input_ids": np.pad(labels[:, :-1], ((0, 0), (1, 0)))}


def run_loss(task, params, batch, normalizers=None):
    normalizers = task.normalizers(batch) if normalizers is None else normalizers
    how = dict(rng=jax.random.key(0), step=0, extra={}, normalizers=normalizers, train=False)
    return jax.jit(lambda params, batch: task.loss(params, batch, **how), compiler_options=QUICK)(params, batch)


def parameters(task, batch):
    return nn.unbox(jax.jit(task.init, compiler_options=QUICK)(jax.random.key(0), batch))["params"]


def test_the_weighted_losses_of_a_chunker_are_added():
    task, batch = make_task("hnet"), make_batch()
    params = parameters(task, batch)
    loss, found = run_loss(task, params, batch)
    plain, _ = run_loss(
        dataclasses.replace(task, chunking=dataclasses.replace(task.chunking, ratio=0.0)), params, batch
    )
    ratio = float(found["ratio"][0] / found["ratio"][1])
    assert float(found["ratio"][1]) == 4 and float(loss) == pytest.approx(float(plain) + 0.03 * ratio, rel=1e-6)
    assert float(found["kept"][0]) / float(found["kept"][1]) < 1


def test_losses_of_microbatches_add_up_to_that_of_the_batch():
    task, batch = make_task("boundary_predictor", chunk_hyper=dict(prior=0.3, draws="training")), make_batch()
    params = parameters(task, batch)
    whole, _ = run_loss(task, params, batch)
    normalizers = task.normalizers(batch)
    parts = [run_loss(task, params, jax.tree.map(lambda x, i=i: x[i : i + 2], batch), normalizers)[0] for i in (0, 2)]
    assert float(sum(parts)) == pytest.approx(float(whole), rel=1e-5)


def test_evaluation_reports_chunks_and_their_overflow():
    batch = make_batch() | {"weight": np.array([1.0, 1.0, 1.0, 0.0], np.float32)}
    task = make_task("words", capacity=3)
    params = parameters(task, batch)
    evaluate = jax.jit(lambda params, batch: task.eval_step(params, batch, extra={}), compiler_options=QUICK)
    found = evaluate(params, batch)
    starts = registry.get("words")(
        TokenSet.create(jnp.zeros((3, 16, 1)), mask=batch["input_ids"][:3] != 0),
        Signals(token_ids=jnp.asarray(batch["input_ids"][:3])),
    ).count
    starts = np.asarray(starts)
    left = np.minimum(starts, 3)
    assert starts.max() > 3
    assert [float(x) for x in found["overflow"]] == [(starts - left).sum(), starts.sum()]
    assert [float(x) for x in found["kept"]] == [left.sum(), 9 + 16 + 16]
    assert [float(x) for x in found["chunk_length"]] == [9 + 16 + 16, left.sum()]


def test_the_dense_task_has_the_same_parameters_and_no_chunks():
    task, batch = make_task("boundary_predictor"), make_batch()
    dense = task.dense()
    assert dense.model.chunker is None
    loss, found = run_loss(dense, parameters(task, batch), batch)
    assert np.isfinite(loss) and set(found) == {"cross_entropy", "token_accuracy", "sequence_accuracy"}


def test_compute_counts_the_chunks_and_the_chunker():
    for chunker in CHUNKERS:
        task = make_task(chunker)
        dense, quarter = (task.count({"kept": kept}) for kept in (1.0, 0.25))
        plain = task.dense().count({"kept": 1.0})
        extra = sum(dense.blocks.values()) - sum(plain.blocks.values())
        assert dense.blocks.get("chunker", 0.0) == extra and quarter.macs < dense.macs
    blocks = make_task("hnet").count({"kept": 0.25}).blocks
    # The decoder sees bytes again.
    assert blocks["cross_attention"] == make_task("hnet").dense().count({"kept": 1.0}).blocks["cross_attention"]
    short = make_task("hnet", chunk_hyper=dict(dechunk=False)).count({"kept": 0.25}).blocks
    assert short["cross_attention"] == flops.attention_macs(16, 4, 16, 32)


def test_unknown_weights_are_refused():
    config = continuation.get_config("chunker=hnet,runlocal")
    with config.model.unlocked():
        config.model.chunking = ConfigDict({"ration": 1.0})
    with pytest.raises(ValueError, match=r"config.model.chunking.ration does not exist; did you mean ratio\?"):
        Seq2Seq.from_config(config)
