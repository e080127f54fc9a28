# SPDX-License-Identifier: Apache-2.0
"""Relaxations: exact forward passes, gradients against finite differences, and the statistics of the noise."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from adaptive import relaxations

KEY = jax.random.key(0)
LENGTH = 6


@functools.cache
def soft_top_k(k, temperature=1.0, hard=False):
    return jax.jit(lambda scores: relaxations.soft_top_k(scores, k, temperature=temperature, hard=hard))


def scores(seed, length=LENGTH, spread=2.0):
    return np.random.default_rng(seed).normal(size=(2, length)).astype(np.float32) * spread


# --- Straight through ---------------------------------------------------------------------------------------------


@settings(deadline=None)
@given(st.lists(st.tuples(st.booleans(), st.floats(0, 1, width=32)), min_size=4, max_size=4))
def test_straight_through_is_the_hard_value_exactly_with_the_gradient_of_the_soft_one(pairs):
    hard, soft = np.array([pair[0] for pair in pairs]), np.array([pair[1] for pair in pairs], np.float32)
    out, pull = jax.vjp(lambda soft: relaxations.straight_through(jnp.asarray(hard), soft), soft)
    assert out.dtype == jnp.float32
    np.testing.assert_array_equal(out, hard.astype(np.float32))
    moved = np.arange(4, dtype=np.float32)
    np.testing.assert_array_equal(pull(moved)[0], moved)


def test_nothing_flows_back_through_the_hard_value():
    gradient = jax.grad(lambda hard: jnp.sum(relaxations.straight_through(hard, hard**2 * 0)))(jnp.ones(3))
    np.testing.assert_array_equal(gradient, 0)


def test_straight_through_works_under_jit_vmap_and_forward_mode():
    run = jax.jit(jax.vmap(lambda x: relaxations.straight_through(x > 0, jax.nn.sigmoid(x))))
    x = jnp.array([-2.0, 0.5, 3.0])
    out, moved = jax.jvp(run, (x,), (jnp.ones(3),))
    np.testing.assert_array_equal(out, [0, 1, 1])
    np.testing.assert_allclose(moved, jax.nn.sigmoid(x) * (1 - jax.nn.sigmoid(x)), rtol=1e-6)


def test_straight_through_refuses_to_broadcast():
    with pytest.raises(ValueError, match=r"one shape; got \(3,\) and \(2, 3\)"):
        relaxations.straight_through(jnp.zeros(3), jnp.zeros((2, 3)))


# --- Gumbel -------------------------------------------------------------------------------------------------------


def test_gumbel_noise_has_the_moments_of_its_law():
    noise = np.asarray(relaxations.gumbel(KEY, (100_000,)))
    assert noise.dtype == np.float32
    deviation = np.pi / np.sqrt(6)
    # Standard errors: of the mean sd/sqrt(n), of the deviation about sd sqrt((kurtosis - 1) / 4n) with kurtosis 5.4.
    assert abs(noise.mean() - np.euler_gamma) < 4 * deviation / np.sqrt(noise.size)
    assert abs(noise.std() - deviation) < 4 * deviation * np.sqrt(4.4 / (4 * noise.size))


def test_gumbel_softmax_draws_each_class_as_often_as_the_softmax_says():
    logits, draws = jnp.array([1.0, 0.0, -1.0, 2.0]), 40_000
    samples = relaxations.gumbel_softmax(jnp.broadcast_to(logits, (draws, 4)), KEY, temperature=0.5, hard=True)
    assert set(np.unique(samples)) == {0.0, 1.0}
    np.testing.assert_array_equal(samples.sum(-1), 1)
    want = np.asarray(jax.nn.softmax(logits))
    assert np.all(np.abs(samples.mean(0) - want) < 4 * np.sqrt(want * (1 - want) / draws))


def test_gumbel_sigmoid_succeeds_as_often_as_its_log_odds_say():
    logits, draws = jnp.array([-2.0, 0.0, 0.7]), 40_000
    samples = relaxations.gumbel_sigmoid(jnp.broadcast_to(logits, (draws, 3)), KEY, temperature=0.3, hard=True)
    assert set(np.unique(samples)) == {0.0, 1.0}
    want = np.asarray(jax.nn.sigmoid(logits))
    assert np.all(np.abs(samples.mean(0) - want) < 4 * np.sqrt(want * (1 - want) / draws))


@pytest.mark.parametrize("draw", [relaxations.gumbel_softmax, relaxations.gumbel_sigmoid])
def test_soft_samples_lie_between_and_harden_as_the_temperature_falls(draw):
    logits = jnp.asarray(scores(0))
    warm, cold = (draw(logits, KEY, temperature=temperature) for temperature in (1.0, 1e-3))
    hard = draw(logits, KEY, temperature=1.0, hard=True)
    assert np.all((np.asarray(warm) > 0) & (np.asarray(warm) < 1))
    np.testing.assert_allclose(cold, hard, atol=1e-3)
    if draw is relaxations.gumbel_softmax:
        np.testing.assert_allclose(warm.sum(-1), 1, atol=1e-6)


@pytest.mark.parametrize("draw", [relaxations.gumbel_softmax, relaxations.gumbel_sigmoid])
def test_hard_samples_carry_the_gradient_of_the_soft_ones(draw):
    moved = jnp.asarray(scores(1))
    soft, hard = (
        jax.grad(lambda x, hard=hard: jnp.sum(draw(x, KEY, temperature=0.7, hard=hard) * moved))(jnp.asarray(scores(0)))
        for hard in (False, True)
    )
    assert np.abs(soft).max() > 0
    np.testing.assert_allclose(soft, hard, atol=1e-6)


def test_bfloat16_logits_are_sampled_in_float32():
    logits = jnp.asarray(scores(0), jnp.bfloat16)
    assert relaxations.gumbel_softmax(logits, KEY).dtype == jnp.float32
    assert relaxations.gumbel_sigmoid(logits, KEY).dtype == jnp.float32
    assert relaxations.soft_top_k(logits, 2).dtype == jnp.float32


# --- Top-k --------------------------------------------------------------------------------------------------------


@settings(max_examples=25, deadline=None)
@given(st.lists(st.integers(-3, 3), min_size=LENGTH, max_size=LENGTH), st.integers(0, LENGTH))
def test_hard_top_k_marks_the_largest_with_ties_to_the_lowest_index(values, k):
    best = sorted(range(LENGTH), key=lambda i: (-values[i], i))[:k]
    want = [float(i in best) for i in range(LENGTH)]
    np.testing.assert_array_equal(relaxations.hard_top_k(jnp.array(values, jnp.float32), k), want)


@pytest.mark.parametrize("k", range(LENGTH + 1))
@settings(max_examples=8, deadline=None)
@given(seed=st.integers(0, 10_000), spread=st.sampled_from([0.0, 1e-3, 1.0, 50.0, 1e4]))
def test_soft_top_k_sums_to_k_and_follows_the_order_of_the_scores(k, seed, spread):
    values = scores(seed, spread=spread)
    soft = np.asarray(soft_top_k(k)(values))
    np.testing.assert_allclose(soft.sum(-1), k, atol=1e-4)
    assert np.all((soft >= 0) & (soft <= 1))
    for row in range(2):
        assert np.all(np.diff(soft[row][np.argsort(values[row], kind="stable")]) >= -1e-6)


def test_soft_top_k_of_equal_scores_is_uniform_and_its_ends_are_exact():
    np.testing.assert_allclose(relaxations.soft_top_k(jnp.full(8, 3.0), 2), 0.25, atol=1e-6)
    for k in (0, LENGTH):
        np.testing.assert_array_equal(soft_top_k(k)(scores(0)), float(k > 0))
        np.testing.assert_array_equal(jax.grad(lambda x, k=k: soft_top_k(k)(x)[0, 0])(jnp.asarray(scores(0))), 0)


@pytest.mark.parametrize("k", [1, 3, 5])
def test_a_falling_temperature_leads_to_the_hard_choice(k):
    values = scores(4)
    np.testing.assert_allclose(soft_top_k(k, 1e-3)(values), relaxations.hard_top_k(jnp.asarray(values), k), atol=1e-4)
    np.testing.assert_array_equal(soft_top_k(k, 1.0, hard=True)(values), relaxations.hard_top_k(jnp.asarray(values), k))


@pytest.mark.parametrize(("k", "temperature"), [(1, 1.0), (3, 0.5), (5, 2.0)])
def test_the_implicit_gradient_equals_finite_differences(k, temperature):
    with jax.enable_x64(True):
        values = jnp.asarray(scores(5)[0], jnp.float64)
        jacobian = np.asarray(jax.jacrev(soft_top_k(k, temperature))(values))
        step = 1e-5
        run = soft_top_k(k, temperature)
        moves = np.eye(LENGTH) * step
        want = np.stack([(run(values + move) - run(values - move)) / (2 * step) for move in moves], axis=1)
    np.testing.assert_allclose(jacobian, want, atol=1e-6)
    # The sum stays k, so no score can move it.
    np.testing.assert_allclose(jacobian.sum(0), 0, atol=1e-12)


def test_hard_soft_top_k_has_the_soft_gradient():
    moved, values = jnp.asarray(scores(6)), jnp.asarray(scores(5))
    soft, hard = (
        jax.grad(lambda x, hard=hard: jnp.sum(soft_top_k(2, 0.7, hard)(x) * moved))(values) for hard in (False, True)
    )
    assert np.abs(soft).max() > 1e-3
    np.testing.assert_allclose(soft, hard, atol=1e-6)


def test_saturated_scores_have_finite_gradients():
    gradient = jax.grad(lambda x: soft_top_k(2, 1e-3)(x)[0, 0])(jnp.asarray(scores(7, spread=1e3)))
    assert np.all(np.isfinite(gradient))


def test_a_score_of_minus_infinity_is_never_included():
    values = jnp.asarray(scores(8)).at[:, 2:4].set(-jnp.inf)
    for k in (1, 3):
        soft = np.asarray(soft_top_k(k)(values))
        np.testing.assert_array_equal(soft[:, 2:4], 0)
        rest = np.delete(np.asarray(values), [2, 3], axis=1)
        np.testing.assert_allclose(
            np.delete(soft, [2, 3], axis=1), relaxations.soft_top_k(jnp.asarray(rest), k), atol=1e-5
        )
        gradient = jax.grad(lambda x, k=k: jnp.sum(soft_top_k(k)(x)[:, 0]))(values)
        assert np.all(np.isfinite(gradient))


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda x: relaxations.soft_top_k(x, 7), r"k must lie in 0\.\.6; got 7"),
        (lambda x: relaxations.soft_top_k(x, -1), r"k must lie in 0\.\.6; got -1"),
        (lambda x: relaxations.hard_top_k(x, 7), r"k must lie in 0\.\.6; got 7"),
        (lambda x: relaxations.soft_top_k(x, 2, temperature=0), "temperature must be positive; got 0"),
        (lambda x: relaxations.gumbel_softmax(x, KEY, temperature=-1.0), "temperature must be positive; got -1.0"),
        (lambda x: relaxations.gumbel_sigmoid(x, KEY, temperature=0.0), "temperature must be positive; got 0.0"),
    ],
)
def test_what_makes_no_sense_is_refused(call, message):
    with pytest.raises(ValueError, match=message):
        call(jnp.zeros((2, LENGTH)))
