# SPDX-License-Identifier: Apache-2.0
"""Halting by accumulated scores against a plain loop over tokens."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from adaptive import registry
from adaptive.depth import halting
from adaptive.tokens import Signals, TokenSet

LAYERS = 5
avit = jax.jit(lambda tokens, scores: registry.get("avit")(tokens, Signals(layer_scores=scores)))


def plain(scores, epsilon=0.01):
    """Weights of one token, and how much it ponders."""
    total, weights = 0.0, np.zeros(len(scores))
    for layer, score in enumerate(scores):
        if total + score >= 1 - epsilon or layer == len(scores) - 1:
            weights[layer] = 1 - total
            return weights, layer + 1 + weights[layer]
        weights[layer] = score
        total += score
    raise AssertionError


@settings(max_examples=30, deadline=None)
@given(st.lists(st.floats(0, 1, width=32), min_size=LAYERS, max_size=LAYERS))
def test_weights_are_those_of_the_loop_and_sum_to_one(scores):
    # A sum that rounding could put on either side of the threshold is no test.
    if np.any(np.abs(np.cumsum(scores) - 0.99) < 1e-4):
        return
    got = np.asarray(avit(TokenSet.create(jnp.zeros((1, 1, 1))), jnp.asarray(scores, jnp.float32)[None, None]))[0, 0]
    np.testing.assert_allclose(got, plain(scores)[0], atol=1e-6)
    np.testing.assert_allclose(got.sum(), 1.0, atol=1e-6)


def test_tokens_that_never_score_end_as_the_last_layer():
    tokens = TokenSet.create(jnp.zeros((1, 2, 1)), mask=jnp.array([[True, False]]))
    got = avit(tokens, jnp.zeros((1, 2, LAYERS)))
    np.testing.assert_array_equal(got, [[[0, 0, 0, 0, 1], [0, 0, 0, 0, 0]]])


def test_ponder_counts_layers_and_the_remainder():
    scores = np.array([0.4, 0.5, 0.3, 0.1, 0.2], np.float32)
    state = halting.Halting.create(TokenSet.create(jnp.zeros((1, 1, 1))))
    for layer, score in enumerate(scores):
        state, _ = state.advance(jnp.full((1, 1), score), last=layer == LAYERS - 1)
    np.testing.assert_allclose(state.ponder, [[plain(scores)[1]]], rtol=1e-6)
    assert not state.running.any()


def test_the_prior_is_least_where_halting_follows_it():
    target = halting.depth_target(LAYERS, 2.0)
    np.testing.assert_allclose(target.sum(), 1.0, rtol=1e-6)
    assert int(np.argmax(target)) == 1
    weight = jnp.ones((1, 3))
    follows = halting.depth_prior_loss(jnp.broadcast_to(target, (1, 3, LAYERS)), weight, 2.0)
    other = halting.depth_prior_loss(jnp.broadcast_to(target[::-1], (1, 3, LAYERS)), weight, 2.0)
    assert abs(float(follows)) < 0.05 < float(other)
    with pytest.raises(ValueError, match=r"target depth must lie in 1\.\.5"):
        halting.depth_target(LAYERS, 6.0)


def test_the_score_is_a_sigmoid_of_the_channel():
    np.testing.assert_allclose(halting.halting_score(jnp.array([[3.0, 2.0]])), [[0.5, 1 / (1 + np.exp(10))]], rtol=1e-4)
