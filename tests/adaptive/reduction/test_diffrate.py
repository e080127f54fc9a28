# SPDX-License-Identifier: Apache-2.0
"""Prune-then-merge: against a restatement, and mass, origin and positions through any schedule."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from adaptive import registry
from adaptive.tokens import Signals, TokenSet

diffrate, by_density = registry.get("diffrate"), registry.get("diffrate_density")


def _world(seed=0, length=13, batch=2):
    rng = np.random.default_rng(seed)
    tokens = TokenSet.create(
        jnp.asarray(rng.normal(size=(batch, length, 5)), jnp.float32),
        coords=jnp.asarray(rng.integers(0, 9, (batch, length, 2)), jnp.float32),
    )
    return tokens, Signals(cls_attention=jnp.asarray(rng.random((batch, length)), jnp.float32), cls_token=True)


def _restated(features, attention, alive, budget):
    """Rows of the slots and the slot of each token, one image, in loops."""
    order = [0, *(1 + np.argsort(-attention[1:]))]
    groups = {slot: [token] for slot, token in enumerate(order[:budget])}
    unit = features / np.linalg.norm(features, axis=-1, keepdims=True)
    for token in order[budget:alive]:
        best = max(range(1, budget), key=lambda slot: unit[token] @ unit[order[slot]])
        groups[best].append(token)
    assign = np.full(len(features), -1)
    for slot, members in groups.items():
        assign[members] = slot
    return np.stack([features[members].mean(0) for members in groups.values()]), assign


@pytest.mark.parametrize(("alive", "budget"), [(13, 6), (9, 6), (6, 6), (12, 2)])
def test_it_is_the_restatement(alive, budget):
    tokens, signals = _world()
    reduction = jax.jit(lambda t, s: diffrate(t, s, budget, alive=alive))(tokens, signals)
    reduced = reduction.apply(tokens)
    for row in range(2):
        features, assign = _restated(
            np.asarray(tokens.features[row]), np.asarray(signals.cls_attention[row]), alive, budget
        )
        np.testing.assert_array_equal(reduction.assign[row], assign)
        np.testing.assert_allclose(reduced.features[row], features, atol=1e-6)
    assert reduction.merges == (alive > budget)


def _isolation(features, mass, neighbours=5):
    """Mass times distance to the nearest denser patch, one image, in loops."""
    unit = features / np.linalg.norm(features, axis=-1, keepdims=True)
    squared = ((unit[1:, None] - unit[None, 1:]) ** 2).sum(-1)
    spread = np.sort(squared, axis=-1)[:, :neighbours].mean(-1)
    delta = [
        np.sqrt(min((squared[i, j] for j in range(len(spread)) if spread[j] < spread[i]), default=squared.max()))
        for i in range(len(spread))
    ]
    return np.concatenate([[0.0], mass[1:] * np.asarray(delta)])


def test_by_density_heavy_tokens_far_from_denser_ones_stay_and_means_are_weighted():
    tokens, _ = _world(3)
    mass = np.random.default_rng(4).integers(1, 5, (2, 13)).astype(np.float32)
    tokens = tokens.replace(mass=jnp.asarray(mass))
    reduction = jax.jit(lambda t, s: by_density(t, s, 6, alive=9))(tokens, Signals(cls_token=True))
    reduced = reduction.apply(tokens)
    for row in range(2):
        features = np.asarray(tokens.features[row])
        _, assign = _restated(features, _isolation(features, mass[row]), 9, 6)
        np.testing.assert_array_equal(reduction.assign[row], assign)
        for slot in range(6):
            members = assign == slot
            want = np.average(features[members], axis=0, weights=mass[row][members])
            np.testing.assert_allclose(reduced.features[row, slot], want, atol=1e-6)
            assert reduced.mass[row, slot] == mass[row][members].sum()


@functools.cache
def _chain(schedule):
    """The compiled chain of one schedule, its tokens and the composed reduction."""

    def run(tokens, signals):
        total, importance = None, signals.cls_attention
        for alive, budget in schedule:
            if budget == tokens.features.shape[1]:
                continue
            reduction = diffrate(tokens, signals.replace(cls_attention=importance), budget, alive=alive)
            tokens, importance = reduction.apply(tokens), reduction.reduce_mass(importance)
            total = reduction if total is None else total.then(reduction)
        return tokens, total

    return jax.jit(run)


@settings(deadline=None, max_examples=12)
@given(st.lists(st.tuples(st.integers(2, 13), st.integers(2, 13)), min_size=1, max_size=3), st.integers(0, 1_000))
def test_mass_origin_and_positions_stay_right_through_any_schedule(numbers, seed):
    schedule, now = [], 13
    for alive, budget in numbers:
        alive = min(alive, now)
        schedule.append((alive, min(budget, alive)))
        now = schedule[-1][1]
    tokens, signals = _world(seed)
    reduced, total = _chain(tuple(schedule))(tokens, signals)
    origin, mass = np.asarray(reduced.origin), np.asarray(reduced.mass)
    assert reduced.features.shape[1] == now
    for row in range(2):
        carried = np.bincount(origin[row][origin[row] >= 0], minlength=now)
        np.testing.assert_array_equal(mass[row], carried)
        assert origin[row, 0] == 0 and mass[row, 0] == 1
    if total is None:
        return
    np.testing.assert_array_equal(total.assign, origin)
    matrix = np.asarray(total.matrix())
    np.testing.assert_allclose(matrix.sum(-1), 1.0, atol=1e-5)
    np.testing.assert_array_equal(matrix > 0, np.arange(now)[:, None] == origin[:, None, :])
    np.testing.assert_allclose(matrix @ np.asarray(tokens.coords), reduced.coords, atol=1e-4)
    restored = np.asarray(total.restore(reduced.features))
    want = np.take_along_axis(np.asarray(reduced.features), np.maximum(origin, 0)[..., None], axis=1)
    np.testing.assert_array_equal(restored, np.where(origin[..., None] >= 0, want, 0.0))


def test_padding_is_neither_kept_nor_merged_into():
    tokens, signals = _world()
    tokens = TokenSet.create(tokens.features, mask=jnp.arange(13) < jnp.asarray([[13], [7]]))
    reduced = diffrate(tokens, signals, 8, alive=11).apply(tokens)
    assert reduced.count.tolist() == [8, 7] and reduced.mass[1].sum() == 7
    np.testing.assert_array_equal(np.asarray(reduced.origin)[1, 7:], -1)


def test_numbers_that_do_not_fit_are_errors():
    tokens, signals = _world()
    for alive in (5, 14):
        with pytest.raises(ValueError, match=rf"alive={alive} .* must lie in 6\.\.13"):
            diffrate(tokens, signals, 6, alive=alive)
    with pytest.raises(ValueError, match="nothing can merge"):
        diffrate(tokens, signals, 1, alive=4)
    with pytest.raises(ValueError, match="diffrate_density: alive=14"):
        by_density(tokens, signals, 6, alive=14)
    assert diffrate(tokens, signals, 1, alive=1).num_slots == 1
    with pytest.raises(ValueError, match="needs the signal 'cls_attention'"):
        diffrate(tokens, Signals(cls_token=True), 6)
