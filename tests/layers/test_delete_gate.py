# SPDX-License-Identifier: Apache-2.0
"""The learned logits of the delete gate."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from adaptive import registry
from adaptive.tokens import Signals, TokenSet
from layers.delete_gate import DeleteGate

X = np.random.default_rng(0).normal(size=(2, 5, 8)).astype(np.float32) * 3
VARIABLES = DeleteGate().init(jax.random.key(0), X)


def test_logits_are_a_norm_a_product_and_a_bias():
    params = nn.unbox(VARIABLES)["params"]
    params["norm"]["scale"] = jnp.arange(1.0, 9.0)
    normed = X / np.sqrt((X * X).mean(-1, keepdims=True) + 1e-6) * np.arange(1, 9)
    want = normed @ np.asarray(params["logit"]["kernel"])[:, 0] + np.asarray(params["logit"]["bias"])
    np.testing.assert_allclose(DeleteGate().apply({"params": params}, X), want, atol=1e-5)


def test_a_fresh_gate_keeps_every_token_around_minus_8():
    params = nn.unbox(VARIABLES)["params"]
    np.testing.assert_array_equal(params["logit"]["bias"], 1)
    params["logit"]["kernel"] = jnp.zeros((8, 1))
    logits = DeleteGate().apply({"params": params}, X)
    gate = registry.get("mrt5")(TokenSet.create(jnp.asarray(X)), Signals(gate_logits=logits))
    np.testing.assert_allclose(gate, -8.07, atol=0.005)
    assert float(DeleteGate(bias_init=3.0).init(jax.random.key(0), X)["params"]["logit"]["bias"].value[0]) == 3


def test_the_kernel_starts_xavier_uniform():
    kernel = nn.unbox(DeleteGate().init(jax.random.key(1), np.ones((1, 1, 4000))))["params"]["logit"]["kernel"]
    bound = np.sqrt(6 / 4001)
    assert np.abs(kernel).max() <= bound
    np.testing.assert_allclose(np.asarray(kernel).std(), bound / np.sqrt(3), rtol=0.05)


def test_it_has_two_numbers_for_each_feature_and_one_more_all_with_logical_axes():
    boxed = jax.eval_shape(DeleteGate().init, jax.random.key(0), jnp.zeros((1, 1, 1472)))["params"]
    assert sum(leaf.size for leaf in jax.tree.leaves(boxed)) == 2 * 1472 + 1
    axes = jax.tree.map(lambda leaf: leaf.names, boxed, is_leaf=lambda leaf: isinstance(leaf, nn.LogicallyPartitioned))
    assert axes == {"norm": {"scale": ("norm",)}, "logit": {"kernel": ("embed", "gate"), "bias": ("gate",)}}


def test_it_computes_in_float32_whatever_it_reads():
    params = nn.unbox(VARIABLES)
    narrow = jnp.asarray(X, jnp.bfloat16)
    logits = DeleteGate().apply(params, narrow)
    assert logits.dtype == jnp.float32
    np.testing.assert_array_equal(logits, DeleteGate().apply(params, narrow.astype(jnp.float32)))
