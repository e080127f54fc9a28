# SPDX-License-Identifier: Apache-2.0
"""ToMe against a loop-written restatement of its published algorithm, and its invariants."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from adaptive import budgets, registry
from adaptive.tokens import Signals, TokenSet

tome = registry.get("tome")


@functools.partial(jax.jit, static_argnums=2)
def merged(tokens, signals, count):
    """The reduction to `count` tokens, and the tokens that it leaves."""
    reduction = tome(tokens, signals, count)
    return reduction, reduction.apply(tokens)


def loop_tome(features, metric, mass, removed, cls_token):
    """ToMe of one sequence by loops and lists: `(features, mass, groups)`, groups being the tokens of each slot."""
    metric = metric.astype(np.float64)
    metric = metric / np.linalg.norm(metric, axis=-1, keepdims=True)
    even, odd = list(range(0, len(metric), 2)), list(range(1, len(metric), 2))
    best = {}
    for a in even:
        if cls_token and a == 0:
            best[a] = (-np.inf, odd[0])
            continue
        scores = [float(metric[a] @ metric[b]) for b in odd]
        best[a] = (max(scores), odd[int(np.argmax(scores))])
    by_similarity = sorted(even, key=lambda a: -best[a][0])
    sources, unmerged = by_similarity[:removed], by_similarity[removed:]
    if cls_token:
        unmerged = sorted(unmerged)
    groups = [[a] for a in unmerged] + [[b] + [a for a in sources if best[a][1] == b] for b in odd]
    sizes = np.array([sum(mass[i] for i in group) for group in groups])
    merged = np.stack([sum(mass[i] * features[i].astype(np.float64) for i in group) for group in groups])
    return merged / sizes[:, None], sizes, groups


def draw(seed, length, width=5, batch=2):
    rng = np.random.default_rng(seed)
    features = rng.normal(size=(batch, length, width)).astype(np.float32)
    metric = rng.normal(size=(batch, length, 4)).astype(np.float32)
    mass = rng.integers(1, 5, size=(batch, length)).astype(np.float32)
    return features, metric, mass


@pytest.mark.parametrize("cls_token", [False, True])
@pytest.mark.parametrize("length", [8, 13])
def test_equals_the_loop_written_reference_for_every_r(length, cls_token):
    features, metric, mass = draw(length, length)
    tokens = TokenSet.create(jnp.asarray(features), mass=jnp.asarray(mass))
    for removed in range(1, (length - cls_token) // 2 + 1):
        out, got = jax.device_get(
            merged(tokens, Signals(keys=jnp.asarray(metric), cls_token=cls_token), length - removed)
        )
        for row in range(len(features)):
            want, sizes, groups = loop_tome(features[row], metric[row], mass[row], removed, cls_token)
            np.testing.assert_allclose(got.features[row], want, atol=1e-5)
            np.testing.assert_allclose(got.mass[row], sizes, atol=1e-5)
            for slot, group in enumerate(groups):
                assert out.slots[row, slot] == group[0]
                assert set(np.flatnonzero(np.asarray(out.assign[row]) == slot)) == set(group)


@pytest.mark.parametrize("cls_token", [False, True])
def test_equals_the_reference_on_bfloat16_tokens(cls_token):
    features, metric, mass = draw(3, 16)
    narrow = jnp.asarray(features, jnp.bfloat16), jnp.asarray(metric, jnp.bfloat16)
    tokens = TokenSet.create(narrow[0], mass=jnp.asarray(mass))
    got = tome(tokens, Signals(keys=narrow[1], cls_token=cls_token), 11).apply(tokens)
    assert got.features.dtype == jnp.bfloat16
    wide = [np.asarray(array, np.float32) for array in narrow]
    for row in range(len(features)):
        want, sizes, _ = loop_tome(wide[0][row], wide[1][row], mass[row], 5, cls_token)
        # One rounding to bfloat16 at the end: relative 2^-8.
        np.testing.assert_allclose(np.asarray(got.features[row], np.float32), want, rtol=2**-8, atol=1e-6)
        np.testing.assert_allclose(got.mass[row], sizes)


def test_the_small_worked_example():
    metric = jnp.array([[[1, 0], [0, 1], [0.9, 0.1], [0.1, 0.9], [-1, 0.2], [1, 0.05]]])
    tokens = TokenSet.create(metric)
    got = tome(tokens, Signals(keys=metric, cls_token=True), 4).apply(tokens)
    np.testing.assert_allclose(got.features[0], [[1, 0], [-0.5, 0.6], [0.1, 0.9], [0.95, 0.075]], atol=1e-6)
    np.testing.assert_array_equal(got.mass[0], [1, 2, 1, 2])


@settings(max_examples=25, deadline=None)
@given(st.integers(0, 10_000), st.sampled_from([6, 9, 14]), st.booleans(), st.data())
def test_mass_and_mass_weighted_sums_are_conserved(seed, length, cls_token, data):
    removed = data.draw(st.integers(1, (length - cls_token) // 2))
    features, metric, mass = draw(seed, length)
    tokens = TokenSet.create(jnp.asarray(features), mass=jnp.asarray(mass))
    got = merged(tokens, Signals(keys=jnp.asarray(metric), cls_token=cls_token), length - removed)[1]
    np.testing.assert_allclose(got.mass.sum(-1), mass.sum(-1), rtol=1e-6)
    total = np.einsum("bn,bnd->bd", mass, features)
    np.testing.assert_allclose(np.einsum("bm,bmd->bd", got.mass, got.features), total, atol=1e-4)


def test_the_class_token_never_merges_and_stays_first():
    features, _, mass = draw(1, 11)
    # All keys alike: every pair wants to merge.
    tokens = TokenSet.create(jnp.asarray(features), mass=jnp.asarray(mass))
    out = tome(tokens, Signals(keys=jnp.ones((2, 11, 4)), cls_token=True), 6)
    assert (np.asarray(out.assign) == 0).sum(axis=1).tolist() == [1, 1]
    np.testing.assert_array_equal(out.apply(tokens).features[:, 0], features[:, 0])


def test_restore_returns_unmerged_tokens_exactly_and_merged_ones_as_their_slot():
    features, metric, _ = draw(5, 12)
    tokens = TokenSet.create(jnp.asarray(features))
    out = tome(tokens, Signals(keys=jnp.asarray(metric)), 8)
    reduced = out.apply(tokens)
    restored = out.restore(reduced.features)
    alone = np.take_along_axis(np.asarray(reduced.mass), np.asarray(out.assign), axis=1) == 1
    np.testing.assert_allclose(restored[alone], features[alone], atol=1e-6)
    np.testing.assert_allclose(restored, jnp.take_along_axis(reduced.features, out.assign[..., None], axis=1), atol=0)


def test_padding_neither_joins_nor_receives():
    features, metric, _ = draw(7, 12)
    mask = np.arange(12) < np.array([[12], [7]])
    spoiled = np.where(mask[..., None], features, 1e6)
    for values in (features, spoiled):
        tokens = TokenSet.create(jnp.asarray(values), mask=jnp.asarray(mask))
        got = tome(tokens, Signals(keys=jnp.asarray(metric), cls_token=True), 8).apply(tokens)
        real = np.asarray(got.valid)
        assert np.abs(np.asarray(got.features)[real]).max() < 100
        np.testing.assert_allclose(got.mass.sum(-1), [12, 7])
    # The two even tokens of padding go first, so that only two of the four merges fall on real tokens.
    assert got.count.tolist() == [8, 5]


def test_threshold_merges_what_is_alike_and_no_more():
    metric = jnp.array([[[1.0, 0], [1, 0.01], [0, 1], [0.02, 1], [-1, 1], [1, -1]]])
    tokens = TokenSet.create(metric)
    got = tome(tokens, Signals(keys=metric), budgets.Threshold(0.9, 6)).apply(tokens)
    assert got.features.shape[1] == 6 and got.count.tolist() == [4]
    np.testing.assert_allclose(got.mass.sum(), 6)


def test_asking_for_more_merges_than_pairs_is_an_error_with_the_numbers():
    tokens = TokenSet.create(jnp.zeros((1, 21, 4)))
    with pytest.raises(ValueError, match=r"of 21 tokens \(1 protected\) at most 10 can go"):
        tome(tokens, Signals(keys=jnp.ones((1, 21, 4)), cls_token=True), 5)


def test_gradients_reach_features_and_not_the_metric():
    features, metric, _ = draw(9, 10)

    def loss(x, keys):
        tokens = TokenSet.create(x)
        return jnp.sum(tome(tokens, Signals(keys=keys), 6).apply(tokens).features ** 2)

    to_features, to_keys = jax.grad(loss, argnums=(0, 1))(jnp.asarray(features), jnp.asarray(metric))
    assert np.all(np.isfinite(to_features)) and np.abs(to_features).max() > 0
    assert np.all(np.asarray(to_keys) == 0)
