# SPDX-License-Identifier: Apache-2.0
"""Halting tokens and early exits of a ViT, over the parameters of a dense one."""

import functools

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from adaptive import flops
from adaptive.depth import exits
from experiments import measure
from layers.hooks import Reduce
from layers.vit import ViT
from layers.vit_depth import ExitViT, HaltingViT

SIZES = dict(patch_size=4, width=16, depth=3, heads=2, mlp_dim=32, num_classes=5, image_size=(8, 8), channels=1)
DENSE = ViT(**SIZES)
# Parameters depend on no setting of these.
HALTING = {**SIZES, "target_depth": 2.0}
IMAGES = np.random.default_rng(0).normal(size=(2, 8, 8, 1)).astype(np.float32)
_jit = functools.partial(jax.jit, compiler_options={"xla_backend_optimization_level": "0"})


@functools.cache
def params():
    shapes = nn.unbox(jax.eval_shape(DENSE.init, jax.random.key(0), IMAGES))["params"]
    rng = np.random.default_rng(1)
    return jax.tree.map_with_path(
        lambda path, leaf: (path[-1].key == "scale") + 0.3 * rng.normal(size=leaf.shape).astype(np.float32), shapes
    )


def run(model, params):
    return _jit(lambda p: model.apply({"params": p}, IMAGES))(params)


def test_tokens_that_never_halt_are_the_dense_model():
    never = HaltingViT(**HALTING, halt_scale=0.0, halt_center=1e4)
    logits, aux = run(never, params())
    np.testing.assert_allclose(logits, run(DENSE, params())[0], atol=1e-5)
    np.testing.assert_array_equal(aux["tokens"], [[5, 5], [5, 5], [0, 0]])


def test_tokens_that_halt_at_once_end_as_the_first_layer():
    logits, aux = run(HaltingViT(**HALTING, halt_scale=0.0, halt_center=-50.0), params())
    np.testing.assert_array_equal(aux["tokens"], np.zeros((3, 2)))
    one = {name: value for name, value in params().items() if name not in ("block_1", "block_2")}
    np.testing.assert_allclose(logits, run(ViT(**{**SIZES, "depth": 1}), one)[0], atol=1e-5)
    # One layer and a remainder of 1.
    np.testing.assert_allclose(aux["losses"]["ponder"][0] / 2, 2.0, rtol=1e-6)


def test_halted_tokens_are_seen_by_nobody_and_gradients_stay_finite():
    model = HaltingViT(**SIZES, halt_scale=3.0, halt_center=0.0, target_depth=1.5)
    aux = run(model, params())[1]
    counts = np.asarray(aux["tokens"])
    assert np.all(np.diff(counts, axis=0) <= 0) and 0 < counts[0].sum() < 10

    def loss(p):
        logits, aux = model.apply({"params": p}, IMAGES)
        return jnp.sum(logits**2) + sum(total for total, _ in aux["losses"].values())

    gradients = _jit(jax.grad(loss))(params())
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(gradients))
    # The score is the first channel, so the losses reach it without a parameter of their own.
    assert np.abs(gradients["block_0"]["mlp"]["out"]["bias"][0]) > 0


def exit_params(model):
    shapes = nn.unbox(jax.eval_shape(model.init, jax.random.key(0), IMAGES))["params"]
    rng = np.random.default_rng(4)
    return {**jax.tree.map(lambda leaf: 0.5 * rng.normal(size=leaf.shape).astype(np.float32), shapes), **params()}


def test_exits_leave_the_model_as_it_is_and_see_each_block():
    model = ExitViT(**SIZES, exit_hidden=8, cascade=True)
    both = exit_params(model)
    logits, aux = run(model, both)
    np.testing.assert_allclose(logits, run(DENSE, params())[0], atol=1e-6)
    assert aux["exit_logits"].shape == (2, 2, 5)
    changed = {**both, "block_1": jax.tree.map(lambda leaf: 2 * leaf, both["block_1"])}
    other = run(model, changed)[1]["exit_logits"]
    np.testing.assert_array_equal(other[:, 0], aux["exit_logits"][:, 0])
    assert np.abs(other[:, 1] - aux["exit_logits"][:, 1]).max() > 1e-3


def test_a_cascade_reads_the_exit_before_and_sends_it_no_gradient():
    model = ExitViT(**SIZES, exit_hidden=8, cascade=True, freeze=True)
    both = exit_params(model)
    gradients = _jit(jax.grad(lambda p: jnp.sum(model.apply({"params": p}, IMAGES)[1]["exit_logits"][:, 1] ** 2)))(both)
    assert np.abs(gradients["exit_1"]["logits"]["kernel"]).max() > 0
    for frozen in ("exit_0", "block_0", "patch_embed"):
        assert all(not np.any(leaf) for leaf in jax.tree.leaves(gradients[frozen]))
    changed = {**both, "exit_0": jax.tree.map(lambda leaf: leaf + 1.0 * (leaf.ndim == 2), both["exit_0"])}
    assert np.abs(run(model, changed)[1]["exit_logits"][:, 1] - run(model, both)[1]["exit_logits"][:, 1]).max() > 1e-4


@pytest.mark.parametrize("ensemble", [False, True])
def test_images_that_leave_have_what_the_whole_model_says_there(ensemble):
    """At the first confident exit, whatever the others of the batch do; and blocks behind it do not run for them."""
    model = ExitViT(**SIZES, exit_hidden=8, cascade=True)
    images = np.random.default_rng(3).normal(size=(5, 8, 8, 1)).astype(np.float32)
    shapes = nn.unbox(jax.eval_shape(model.init, jax.random.key(0), images))["params"]
    own = measure.random_like(shapes, jax.random.key(4), deviation=0.5)
    last, aux = _jit(lambda p: model.apply({"params": p}, images))(own)
    logits = jnp.concatenate([aux["exit_logits"], last[:, None]], axis=1)
    used = ExitViT.ensemble(own, logits) if ensemble else logits
    confidence = exits.max_probability(used)
    leave = _jit(lambda p, threshold: model.leave_early(p, images, threshold, ensemble=ensemble))
    found = set()
    for threshold in (0.0, float(jnp.median(confidence[:, 0])), float(jnp.median(confidence[:, 1])), 2.0):
        want = exits.first_confident(confidence, threshold)
        taken, chosen = leave(own, threshold)
        np.testing.assert_array_equal(chosen, want)
        np.testing.assert_allclose(taken, np.asarray(used)[np.arange(5), want], rtol=1e-4, atol=1e-5)
        found |= set(np.asarray(want).tolist())
    assert found == {0, 1, 2}
    settings = {"threshold": jnp.float32(0.0), "ensemble": jnp.asarray(ensemble)}
    counts = _jit(lambda p: model.apply({"params": p, "exits": settings}, images)[1]["tokens"])(own)
    np.testing.assert_array_equal(counts, [[5] * 5, [0] * 5, [0] * 5])


def test_images_leave_models_without_hooks_alone():
    model = ExitViT(**SIZES, hooks=(Reduce("tome", (5, 3, 3)),))
    with pytest.raises(ValueError, match="images leave models without hooks"):
        jax.eval_shape(lambda: model.leave_early(model.init(jax.random.key(0), IMAGES)["params"], IMAGES, 0.5))


def test_exits_pay_for_the_blocks_and_heads_on_the_way():
    model = ExitViT(**SIZES, exit_hidden=8)
    macs, head = model.exit_macs(), 16 * 8 + 8 * 8 + 8 * 5
    np.testing.assert_allclose(macs[-1], flops.count(DENSE).macs + 2 * head)
    layer = macs[1] - macs[0] - head
    np.testing.assert_allclose(flops.count(DENSE).macs - layer * 3, flops.count(DENSE).blocks["embed"] + 80)
