# SPDX-License-Identifier: Apache-2.0
"""Cropr on a ViT: what it prunes, what its losses train, and fusion before the last layer."""

import functools

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from ml_collections import ConfigDict

from adaptive import flops
from adaptive.tokens import TokenSet
from experiments.tasks.classification import Classification
from experiments.tasks.models import build_vit
from layers.cropr import Cropr
from layers.embed import PatchEmbed
from layers.hooks import Hook, LearnedHook, Reduce
from layers.vit import Block, ViT

DENSE = ViT(4, 16, 4, 2, 32, num_classes=5, image_size=(16, 16), channels=1)
COUNTS = (12, 8, 8, 8)
CROPR = DENSE.clone(hooks=(Cropr(COUNTS, 5, queries=2),))
X = np.random.default_rng(0).normal(size=(2, 16, 16, 1)).astype(np.float32)
LABELS = jnp.asarray([1, 4])
_jit = functools.partial(jax.jit, compiler_options={"xla_backend_optimization_level": "0"})


@functools.cache
def _params():
    shapes = nn.unbox(jax.eval_shape(CROPR.init, jax.random.key(0), X))["params"]
    rng = np.random.default_rng(1)
    return jax.tree.map_with_path(
        lambda path, leaf: (path[-1].key == "scale") + 0.3 * rng.normal(size=leaf.shape).astype(np.float32), shapes
    )


@functools.cache
def _embedded():
    """The token set that enters the first block."""
    params = _params()
    patches = PatchEmbed(4, 16).apply({"params": params["patch_embed"]}, X)
    x = jnp.concatenate([jnp.tile(params["class_token"], (2, 1, 1)), patches], axis=1)
    return TokenSet.create(x + params["positions"]["embedding"])


def _run(model, **options):
    return _jit(lambda params: model.apply({"params": params}, X, **options))(_params())


def test_only_layers_that_prune_have_queries_and_heads():
    assert isinstance(CROPR.hooks[0], LearnedHook) and not isinstance(Reduce("tome", COUNTS), LearnedHook)
    assert isinstance(CROPR.hooks[0], Hook)
    head = _params()["hooks_0"]
    assert sorted(head) == ["layer_0", "layer_1"]
    assert head["layer_0"]["queries"].shape == (2, 16)
    assert head["layer_0"]["mlp"]["hidden"]["kernel"].shape == (16, 64)


def test_it_keeps_the_tokens_that_the_queries_score_highest():
    params, (_, aux) = _params(), _run(CROPR)
    np.testing.assert_array_equal(aux["tokens"][:, 0], COUNTS)
    # The features that enter the hook: one block on the embedded tokens.
    embedded = _embedded()
    after, _, _ = Block(2, 32).apply({"params": params["block_0"]}, embedded)
    logits = np.einsum("bnd,qd->bn", after.features, params["hooks_0"]["layer_0"]["queries"])
    logits[:, 0] = np.inf
    for row in range(2):
        kept = sorted(np.argsort(-logits[row])[:12])
        gone = np.setdiff1d(np.arange(17), kept)
        assert np.all(np.asarray(aux["token_set"].origin)[row, gone] == -1)


def test_losses_come_with_labels_and_change_nothing_else():
    (plain, without), (labelled, aux) = _run(CROPR), _run(CROPR, labels=LABELS)
    assert without["losses"] == {}
    assert sorted(aux["losses"]) == ["cropr_0", "cropr_1"]
    np.testing.assert_array_equal(plain, labelled)
    for total, count in aux["losses"].values():
        assert np.isfinite(total) and total > 0 and count == 2


def test_auxiliary_losses_train_the_heads_alone():
    def loss(params):
        _, aux = CROPR.apply({"params": params}, X, labels=LABELS)
        return sum(total for total, _ in aux["losses"].values())

    gradients = dict(_jit(jax.grad(loss))(_params()))
    heads = gradients.pop("hooks_0")
    assert not any(np.any(leaf) for leaf in jax.tree.leaves(gradients))
    for layer in ("layer_0", "layer_1"):
        assert all(np.any(leaf) for leaf in jax.tree.leaves(heads[layer]["queries"]))
        assert np.any(heads[layer]["classifier"]["kernel"]) and np.any(heads[layer]["mlp"]["hidden"]["kernel"])


def test_the_auxiliary_loss_is_the_cross_entropy_of_a_restatement():
    params = _params()["hooks_0"]["layer_0"]
    embedded = _embedded()
    tokens, _, _ = Block(2, 32).apply({"params": _params()["block_0"]}, embedded)
    x = np.asarray(tokens.features, np.float64)

    def norm(z, p):
        z = z - z.mean(-1, keepdims=True)
        return z / np.sqrt((z**2).mean(-1, keepdims=True) + 1e-6) * p["scale"] + p["bias"]

    weights = np.exp(np.einsum("qd,bnd->bqn", params["queries"], x) / 4)
    z = weights / weights.sum(-1, keepdims=True) @ x
    hidden = norm(z, params["mlp_norm"]) @ params["mlp"]["hidden"]["kernel"] + params["mlp"]["hidden"]["bias"]
    z = (
        z
        + np.asarray(jax.nn.gelu(hidden, approximate=False)) @ params["mlp"]["out"]["kernel"]
        + params["mlp"]["out"]["bias"]
    )
    logits = (norm(z, params["norm"]) @ params["classifier"]["kernel"] + params["classifier"]["bias"]).mean(1)
    want = sum(np.log(np.exp(row).sum()) - row[label] for row, label in zip(logits, (1, 4), strict=True))
    _, aux = _run(CROPR, labels=LABELS)
    np.testing.assert_allclose(aux["losses"]["cropr_0"][0], want, rtol=1e-4)


def test_no_removal_is_the_plain_model():
    nothing = DENSE.clone(hooks=(Cropr((17,) * 4, 5),), last_layer_fusion=True)
    logits, aux = _run(nothing, labels=LABELS)
    np.testing.assert_array_equal(logits, _run(DENSE)[0])
    assert aux["losses"] == {} and aux["reduction"] is None


def test_fusion_brings_every_token_back_before_the_last_block():
    # Tokens that leave after the third block and return before the fourth missed nothing.
    late = DENSE.clone(hooks=(Reduce("truncate", (17, 17, 9, 9), place="after"),), last_layer_fusion=True)
    (want, dense), (got, aux) = _run(DENSE), _run(late)
    np.testing.assert_allclose(got, want, atol=1e-5)
    np.testing.assert_allclose(aux["token_set"].features, dense["token_set"].features, atol=1e-5)
    np.testing.assert_array_equal(aux["token_set"].origin, dense["token_set"].origin)
    np.testing.assert_array_equal(aux["tokens"][:, 0], [17, 17, 9, 17])


def test_fused_tokens_return_as_they_were_when_they_left():
    hook = Reduce("truncate", (12, 9, 9, 9), place="after")
    _, aux = _run(DENSE.clone(hooks=(hook,), last_layer_fusion=True))
    params = _params()
    block = [functools.partial(Block(2, 32).apply, {"params": params[f"block_{layer}"]}) for layer in range(4)]
    tokens = _embedded()
    first = block[0](tokens)[0].features
    second = block[1](tokens.replace(features=first).create(first[:, :12]))[0].features
    third = block[2](tokens.create(second[:, :9]))[0].features
    fused = jnp.concatenate([third, second[:, 9:], first[:, 12:]], axis=1)
    last = np.asarray(block[3](tokens.create(fused))[0].features)
    scaled = (last - last.mean(-1, keepdims=True)) / np.sqrt(last.var(-1, keepdims=True) + 1e-6)
    want = scaled * params["final_norm"]["scale"] + params["final_norm"]["bias"]
    np.testing.assert_allclose(aux["token_set"].features, want, atol=1e-4)


def test_fusion_unmerges_merged_tokens():
    hook = Reduce("tome", (17, 12, 9, 9))
    _, aux = _run(DENSE.clone(hooks=(hook,), last_layer_fusion=True))
    assert aux["reduction"] is None
    np.testing.assert_array_equal(aux["token_set"].mass, np.ones((2, 17)))
    np.testing.assert_array_equal(aux["token_set"].origin, np.tile(np.arange(17), (2, 1)))


def test_fusion_is_counted():
    fused = flops.count(DENSE.clone(last_layer_fusion=True), counts=COUNTS, place="after").blocks
    pruned = flops.count(DENSE, counts=COUNTS, place="after").blocks
    attention = [flops.attention_macs(n, n, 16, 16) for n in (17, 8)]
    assert fused["attention"] - pruned["attention"] == attention[0] - attention[1]
    assert fused["mlp"] - pruned["mlp"] == flops.mlp_macs(17 - 8, 16, 32)


def _config(**reduction):
    model = dict(patch_size=4, width=16, depth=4, heads=2, mlp_dim=32, num_classes=5, last_layer_fusion=True)
    return ConfigDict(
        {**model, "reduction": {"method": "cropr", "schedule": (5, 4, 0, 0), "place": "after", **reduction}}
    )


def test_a_config_makes_the_hook_and_the_task_adds_its_losses():
    model = build_vit(_config(hyper={"queries": 2}), image_size=16, channels=1, dtype="float32")
    assert model == CROPR.clone(last_layer_fusion=True)
    task = Classification(model)
    batch = {"image": jnp.asarray(X), "label": LABELS}
    common = dict(rng=jax.random.key(0), step=0, extra={}, normalizers=task.normalizers(batch))
    trained, metrics = _jit(lambda params: task.loss(params, batch, train=True, **common))(_params())
    evaluated, plain = _jit(lambda params: task.loss(params, batch, train=False, **common))(_params())
    own = sum(metrics[name][0] for name in ("cropr_0", "cropr_1"))
    np.testing.assert_allclose(trained - evaluated, own / 2, rtol=1e-5)
    assert "cropr_0" not in plain
    np.testing.assert_array_equal(_run(task.dense().model)[0], _run(DENSE)[0])


def test_wrong_sizes_are_errors():
    with pytest.raises(ValueError, match="at least 1 query; got num_classes=5, queries=0"):
        jax.eval_shape(DENSE.clone(hooks=(Cropr(COUNTS, 5, queries=0),)).init, jax.random.key(0), X)
    with pytest.raises(ValueError, match="the schedule of 'Cropr' has 2 counts for 4 layers"):
        jax.eval_shape(DENSE.clone(hooks=(Cropr((9, 9), 5),)).init, jax.random.key(0), X)
    with pytest.raises(ValueError, match="layer 1 is to remove 20 of 12 tokens, but at most 11 can go"):
        build_vit(_config(schedule=(5, 20)), image_size=16, channels=1, dtype="float32")
