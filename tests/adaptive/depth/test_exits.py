# SPDX-License-Identifier: Apache-2.0
"""Early exits by confidence, alone and in ensembles."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from adaptive import registry
from adaptive.depth import exits
from adaptive.tokens import Signals, TokenSet

RNG = np.random.default_rng(0)


def test_the_first_confident_layer_is_taken_or_the_last():
    confidence = jnp.array([[0.2, 0.9, 0.95], [0.1, 0.2, 0.3], [0.9, 0.1, 0.1]])
    np.testing.assert_array_equal(exits.first_confident(confidence, 0.9), [1, 2, 0])
    np.testing.assert_array_equal(exits.first_confident(confidence, 0.0), [0, 0, 0])
    np.testing.assert_array_equal(exits.first_confident(confidence, 1.1), [2, 2, 2])


@pytest.mark.parametrize("name", ["confidence_exit", "ztw"])
def test_layers_run_fall_with_the_threshold_and_padding_counts_nothing(name):
    tokens = TokenSet.create(jnp.zeros((2, 4, 1)), mask=jnp.arange(4) < jnp.array([[4], [2]]))
    signals = Signals(layer_scores=jnp.asarray(RNG.random((2, 4, 6)), jnp.float32))
    depth = []
    for threshold in (1.1, 0.8, 0.5, 0.0):
        weights = np.asarray(registry.get(name)(tokens, signals, threshold=threshold))
        np.testing.assert_array_equal(weights.sum(-1), np.asarray(tokens.valid, np.float32))
        depth.append((weights * np.arange(1, 7)).sum())
    assert depth == sorted(depth, reverse=True) and depth[0] == 36 and depth[-1] == 6


def test_max_probability_is_that_of_the_likeliest_class():
    np.testing.assert_allclose(exits.max_probability(jnp.log(jnp.array([[0.2, 0.5, 0.3]]))), [0.5], rtol=1e-6)


def test_the_ensemble_is_a_weighted_geometric_mean_of_the_layers_so_far():
    logits = RNG.normal(size=(2, 3, 4)).astype(np.float32)
    log_weights, bias = RNG.normal(size=(3, 3)).astype(np.float32), RNG.normal(size=(3, 4)).astype(np.float32)
    log_p = np.asarray(jax.nn.log_softmax(logits))
    got = np.asarray(exits.geometric_ensemble(logits, log_weights, bias))
    for layer in range(3):
        parts = [np.exp(log_weights[layer, m]) * log_p[:, m] for m in range(layer + 1)]
        np.testing.assert_allclose(got[:, layer], np.mean(parts, axis=0) + bias[layer], rtol=1e-5)
