# SPDX-License-Identifier: Apache-2.0
"""Experts of a trained layer, pruning of second experts, and switched channels."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from adaptive.tokens import Signals, TokenSet
from adaptive.width import dynamic, mc_moe, moefication

RNG = np.random.default_rng(0)


def tokens_of(length, lengths=None):
    mask = None if lengths is None else jnp.arange(length) < jnp.array(lengths)[:, None]
    return TokenSet.create(
        jnp.asarray(RNG.normal(size=(1 if lengths is None else len(lengths), length, 3)), jnp.float32), mask=mask
    )


def test_clusters_are_balanced_and_find_groups_of_like_neurons():
    directions = np.eye(4, 8)
    neurons = np.concatenate([directions * scale for scale in (1.0, 2.0, 0.5)]) + RNG.normal(size=(12, 8)) * 0.01
    order = moefication.balanced_clusters(neurons, 4, seed=1)
    np.testing.assert_array_equal(np.sort(order), np.arange(12))
    groups = {frozenset(order[i : i + 3].tolist()) for i in range(0, 12, 3)}
    assert groups == {frozenset((i, i + 4, i + 8)) for i in range(4)}


def test_clusters_that_do_not_divide_the_neurons_are_refused():
    with pytest.raises(ValueError, match="5 clusters do not divide 12 hidden neurons"):
        moefication.balanced_clusters(np.ones((12, 2)), 5)


def test_the_best_experts_run():
    logits = jnp.array([[[0.1, 3.0, 2.0, -1.0], [5.0, 1.0, 0.0, 2.0]]])
    got = moefication.moefication(tokens_of(2), Signals(choice_logits=logits), experts=2)
    np.testing.assert_array_equal(got, [[[0, 1, 1, 0], [1, 0, 0, 1]]])
    with pytest.raises(ValueError, match=r"experts must lie in 1\.\.4 .*; got 5"):
        moefication.moefication(tokens_of(2), Signals(choice_logits=logits), experts=5)


def test_routing_targets_and_their_loss():
    hidden = jnp.array([[1.0, 1.0, 0.0, 4.0, 0.0, 0.0]])
    target = moefication.routing_target(hidden, 3)
    np.testing.assert_allclose(target, [[0.5, 1.0, 0.0]])
    logits = jnp.asarray(RNG.normal(size=(1, 3)), jnp.float32)
    p = 1 / (1 + np.exp(-np.asarray(logits)))
    want = -np.mean(target * np.log(p) + (1 - target) * np.log(1 - p))
    np.testing.assert_allclose(moefication.routing_loss(logits, target), want, rtol=1e-5)


def moe(logits, sums, **hyper):
    tokens = TokenSet.create(jnp.ones((1, logits.shape[1], 2)))
    return np.asarray(mc_moe.mc_moe(tokens, Signals(choice_logits=logits, column_sums=sums), **hyper))


def test_a_light_second_expert_goes_unless_its_token_matters():
    weights = jnp.array([[[0.6, 0.4, 0.0], [0.7, 0.2, 0.1], [0.1, 0.2, 0.7], [0.1, 0.45, 0.45]]])
    logits, sums = jnp.log(weights + 1e-9), jnp.array([[1.0, 4.0, 1.0, 1.0]])
    np.testing.assert_array_equal(moe(logits, sums, ratio=0.0, protected=0.0).sum(-1), [[2, 2, 2, 2]])
    got = moe(logits, sums, ratio=0.5, protected=0.0)
    np.testing.assert_array_equal(got, [[[1, 1, 0], [1, 0, 0], [0, 0, 1], [0, 1, 1]]])
    np.testing.assert_array_equal(moe(logits, sums, ratio=0.5, protected=0.25)[0, 1], [1, 1, 0])
    dropped = moe(logits, jnp.array([[1.0, 4.0, 0.5, 1.0]]), ratio=0.5, protected=0.0, dropped=0.25)
    np.testing.assert_array_equal(dropped.sum(-1), [[2, 1, 0, 2]])
    with pytest.raises(ValueError, match=r"shares that add up to at most 1; got 0\.7 and 0\.4"):
        moe(logits, sums, protected=0.7, dropped=0.4)


def test_importance_counts_the_queries_that_see_a_token():
    tokens = TokenSet.create(jnp.array([[[1.0, -2.0], [0.0, 1.0], [3.0, 0.0], [9.0, 9.0]]]),
                             mask=jnp.array([[True, True, True, False]]))  # fmt: skip
    sums = jnp.array([[3.0, 1.5, 0.5, 0.0]])
    np.testing.assert_allclose(mc_moe.importance(tokens, sums)[0, :3], [3.0, 0.5, 0.5])
    np.testing.assert_allclose(mc_moe.importance(tokens, sums, causal=True)[0, :3], [3.0, 0.75, 1.5])


def test_the_median_ratio_looks_at_real_tokens():
    logits = jnp.log(jnp.array([[[0.8, 0.2], [0.6, 0.4], [0.5, 0.5], [0.9, 0.1]]]))
    valid = jnp.array([[True, True, True, False]])
    np.testing.assert_allclose(mc_moe.median_ratio(logits, valid), 0.4 / 0.6, rtol=1e-5)


def test_switches_take_groups_from_tokens_that_run():
    logits = jnp.array([[[1.0, -1.0, 1.0], [-1.0, 1.0, 1.0], [1.0, 1.0, 1.0]]])
    tokens = TokenSet.create(jnp.zeros((1, 3, 2)), mask=jnp.array([[True, True, False]]))
    got = dynamic.dydit(tokens, Signals(choice_logits=logits))
    np.testing.assert_array_equal(got, [[[1, 0, 1], [0, 0, 0], [0, 0, 0]]])


def test_drawn_switches_are_hard_and_pass_gradients():
    logits = jnp.asarray(RNG.normal(size=(1, 40, 4)), jnp.float32)
    tokens = tokens_of(40)

    def total(logits):
        return jnp.sum(dynamic.dydit(tokens, Signals(choice_logits=logits, rng=jax.random.key(0))))

    drawn = dynamic.dydit(tokens, Signals(choice_logits=logits, rng=jax.random.key(0)))
    assert set(np.unique(drawn)) == {0.0, 1.0}
    assert np.all(np.abs(jax.grad(total)(logits)).sum((0, 1)) > 0)


def test_the_compute_loss_and_its_ramp():
    np.testing.assert_allclose(dynamic.compute_loss(jnp.array([0.2, 0.6]), 0.5), 0.01, rtol=1e-5)
    np.testing.assert_allclose([dynamic.ramp(step, 0.4, 100) for step in (0, 50, 100, 300)], [1, 0.7, 0.4, 0.4])
    with pytest.raises(ValueError, match=r"target must lie in \(0, 1\]"):
        dynamic.compute_loss(jnp.array([0.5]), 0.0)
