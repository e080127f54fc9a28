# SPDX-License-Identifier: Apache-2.0
"""Next-token training: losses of the parts of a decoder, compute of routed blocks, and what is refused."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax.core import meta

from adaptive.depth import calm, skip_decode
from adaptive.sparsity.decoding import SinkWindow
from configs.decoder import text
from experiments import tasks
from experiments.tasks.language_modelling import token_losses

BATCH = {
    "input_ids": jnp.asarray(np.random.default_rng(0).integers(3, 259, (2, 16))),
    "labels": jnp.asarray(np.random.default_rng(1).integers(3, 259, (2, 16))).at[1, 12:].set(0),
    "weight": jnp.ones(2),
}


def build(arg):
    task = tasks.build(text.get_config(f"{arg},runlocal" if arg else "runlocal"))
    params = jax.jit(lambda: meta.unbox(task.init(jax.random.key(0), BATCH))["params"])()
    return task, params


def loss(task, params):
    options = dict(rng=jax.random.key(0), step=0, extra={}, train=True)
    return task.loss(params, BATCH, normalizers=task.normalizers(BATCH), **options)


def test_the_loss_is_the_mean_cross_entropy_of_real_labels():
    task, params = build("")
    logits = task.model.apply({"params": params}, BATCH["input_ids"])[0]
    own = -np.take_along_axis(np.asarray(jax.nn.log_softmax(logits)), np.asarray(BATCH["labels"])[..., None], -1)[
        ..., 0
    ]
    real = np.asarray(BATCH["labels"]) != 0
    value, metrics = loss(task, params)
    np.testing.assert_allclose(value, own[real].mean(), rtol=1e-5)
    assert metrics["cross_entropy"][1] == 28
    found = task.eval_step(params, BATCH, extra={})
    np.testing.assert_allclose(
        found["bits_per_byte"][0] / found["bits_per_byte"][1], own[real].mean() / np.log(2), rtol=1e-5
    )
    assert found["tokens_a_layer"][0] == 32


def test_every_layer_learns_to_predict_and_the_classifier_what_the_last_one_says():
    task, params = build("exit_losses=classifier")
    states = task.model.apply({"params": params}, BATCH["input_ids"], output_hidden_states=True)[1]["hidden_states"]
    real, want = np.asarray(BATCH["labels"]) != 0, 0.0
    heads = [np.asarray(task.model.apply({"params": params}, x, method="logits")) for x in states[1:]]
    for weight, logits in zip(calm.layer_weights(2), heads, strict=True):
        log_shares = np.asarray(jax.nn.log_softmax(logits))
        want -= weight * np.take_along_axis(log_shares, np.asarray(BATCH["labels"])[..., None], -1)[..., 0][real].mean()
    for x, logits in zip(states[1:], heads, strict=True):
        own = np.asarray(task.model.apply({"params": params}, x, method="exit_logits"))
        target = logits.argmax(-1) == heads[-1].argmax(-1)
        want += np.mean((np.logaddexp(0, own) - own * target)[real]) / 2
    np.testing.assert_allclose(loss(task, params)[0], want, rtol=1e-5)


def test_a_routed_model_counts_the_tokens_that_ran_and_pays_for_its_predictor():
    task, params = build("share=0.25")
    value, metrics = loss(task, params)
    plain = metrics["cross_entropy"][0] / 28
    np.testing.assert_allclose(value - plain, metrics["router"][0] / 28, rtol=1e-5)
    found = {name: float(total / count) for name, (total, count) in task.eval_step(params, BATCH, extra={}).items()}
    assert found["tokens_a_layer"] == (16 + 4) / 2
    states = task.model.apply({"params": params}, BATCH["input_ids"], output_hidden_states=True)[1]["hidden_states"]
    own, x = jax.tree.map(np.asarray, params["block_1"]), np.asarray(states[1])
    y = x @ own["predictor"]["hidden"]["kernel"]
    scores = (y / (1 + np.exp(-y)) @ own["predictor"]["out"]["kernel"])[..., 0]
    best = np.argsort(np.argsort(-(x @ own["router"]["kernel"])[..., 0])) < 4
    assert found["predictor_accuracy"] == np.mean((scores > 0) == best)
    count, dense = task.count(found), task.dense().count(found)
    np.testing.assert_allclose(count.blocks["mlp"], dense.blocks["mlp"] * (1 + 0.25) / 2)
    assert task.dense().eval_step(params, BATCH, extra={})["tokens_a_layer"][0] == 32


def test_a_schedule_trains_and_evaluates_each_place_in_its_own_layers():
    task, params = build("skip=1.3")
    counts = task.model.policy.counts
    active = skip_decode.active_layers(counts, 2).T
    assert 16 < active.sum() < 32
    logits = task.model.apply({"params": params}, BATCH["input_ids"], active=jnp.asarray(active[:, None]))[0]
    own = token_losses(logits, BATCH["labels"], BATCH["labels"] != 0).sum() / 28
    np.testing.assert_allclose(loss(task, params)[0], own, rtol=1e-5)
    whole = dataclasses.replace(task, skip_training=False)
    assert not np.allclose(loss(whole, params)[0], own, rtol=1e-5)
    found = task.eval_step(params, BATCH, extra={})
    np.testing.assert_allclose(found["cross_entropy"][0] / 28, own, rtol=1e-5)
    assert found["tokens_a_layer"][0] / 2 == active.sum() / 2
    few, many = task.count({}).blocks["mlp"], task.dense().count({}).blocks["mlp"]
    assert few / many == active.sum() / 32


def test_a_window_is_what_decoding_reads():
    task = tasks.build(text.get_config("runlocal,window=32"))
    assert task.model.reads == SinkWindow(window=32, sinks=4, page=16)
    assert tasks.build(text.get_config("runlocal")).model.reads is None


def test_what_does_not_fit_is_refused():
    config = text.get_config("runlocal")
    config.model.losses = {"router": 1.0}
    task = tasks.build(config)
    with pytest.raises(ValueError, match=r"config.model.losses.router: this model has the losses none"):
        loss(task, meta.unbox(task.init(jax.random.key(0), BATCH))["params"])
    config.model.losses, config.model.exit_losses = {}, "falling"
    with pytest.raises(ValueError, match="exit_losses is 'falling'; one of"):
        tasks.build(config)
    config.model.exit_losses, config.model.exit_classifier = "", True
    with pytest.raises(ValueError, match="classifier of exits is trained by exit_losses='classifier'"):
        tasks.build(config)
    config = text.get_config("runlocal")
    config.model.skip = {"counts": (1, 2)}
    with pytest.raises(ValueError, match="must not rise"):
        tasks.build(config)
    config.model.skip = {"counts": (2, 1), "layers": (1, 2)}
    with pytest.raises(ValueError, match=r"config\.model\.skip\.layers does not exist"):
        tasks.build(config)
    config = text.get_config("runlocal,window=32")
    config.model.reads.page = 24
    with pytest.raises(ValueError, match="a positive multiple of 16; got sinks=4, window=32, page=24"):
        tasks.build(config)
    config = text.get_config("runlocal")
    config.model.skip_training = True
    with pytest.raises(ValueError, match="skip_training needs a schedule"):
        tasks.build(config)
    config = text.get_config("runlocal")
    config.data = {"source": "text", "objective": "next_byte"}
    with pytest.raises(
        ValueError,
        match=r"objective to be one of \('next_token', 'next_subword'\); got source='text', objective='next_byte'",
    ):
        tasks.build(config)
