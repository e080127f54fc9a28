# SPDX-License-Identifier: Apache-2.0
"""Cropr's scores, selection and gathering against plain NumPy."""

import jax
import jax.numpy as jnp
import numpy as np

from adaptive import registry
from adaptive.reduction import cropr
from adaptive.tokens import Signals, TokenSet


def draw(seed=0):
    rng = np.random.default_rng(seed)
    features = rng.normal(size=(2, 7, 5)).astype(np.float32)
    queries = rng.normal(size=(3, 5)).astype(np.float32)
    return features, queries, np.arange(7) < np.array([[7], [5]])


def test_scores_are_the_summed_logits_of_all_queries():
    features, queries, _ = draw()
    want = np.einsum("bnd,qd->bnq", features.astype(np.float64), queries).sum(-1)
    np.testing.assert_allclose(cropr.scores(jnp.asarray(features), jnp.asarray(queries)), want, atol=1e-5)


def test_the_highest_scores_stay_and_the_class_token_always_does():
    features, queries, mask = draw(1)
    logits = cropr.scores(jnp.asarray(features), jnp.asarray(queries)).at[:, 0].set(-1e6)
    tokens = TokenSet.create(jnp.asarray(features), mask=jnp.asarray(mask))
    out = registry.get("cropr")(tokens, Signals(gate_logits=logits, cls_token=True), 4)
    for row in range(2):
        patches = np.flatnonzero(mask[row])[1:]
        best = patches[np.argsort(-np.asarray(logits)[row, patches])[:3]]
        np.testing.assert_array_equal(out.slots[row], [0, *sorted(best)])


def test_gathering_is_a_softmax_over_real_tokens():
    features, queries, mask = draw(2)
    got = cropr.gather(jnp.asarray(features), jnp.asarray(queries), jnp.asarray(mask))
    for row in range(2):
        x = features[row, mask[row]].astype(np.float64)
        weights = np.exp(queries @ x.T / np.sqrt(5))
        np.testing.assert_allclose(got[row], weights / weights.sum(-1, keepdims=True) @ x, atol=1e-5)


def test_gradients_reach_the_queries_and_not_the_features():
    features, queries, mask = draw(3)
    loss = lambda x, q: jnp.sum(cropr.gather(x, q, jnp.asarray(mask)) ** 2)  # noqa: E731
    spoiled = jnp.where(mask[..., None], features, jnp.inf)
    to_features, to_queries = jax.grad(loss, argnums=(0, 1))(spoiled, jnp.asarray(queries))
    assert not np.any(to_features)
    assert np.all(np.isfinite(to_queries)) and np.any(to_queries)
