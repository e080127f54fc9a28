# SPDX-License-Identifier: Apache-2.0
"""Confidence exits: measures by hand, thresholds that fall, and a calibration whose guarantee holds."""

import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats

from adaptive import registry
from adaptive.depth import calm
from adaptive.tokens import Signals, TokenSet


def test_the_margin_is_between_the_two_likeliest_tokens():
    shares = np.array([[0.5, 0.2, 0.3], [0.1, 0.8, 0.1]])
    np.testing.assert_allclose(calm.margin(jnp.log(shares) + 3.0), [0.2, 0.7], atol=1e-6)


def test_saturation_is_the_cosine_of_features_one_layer_apart():
    x, before = jnp.asarray([[1.0, 0.0], [2.0, 2.0], [0.0, 0.0]]), jnp.asarray([[3.0, 0.0], [0.0, 1.0], [1.0, 0.0]])
    np.testing.assert_allclose(calm.saturation(x, before), [1.0, np.sqrt(0.5), 0.0], atol=1e-6)


def test_thresholds_fall_with_the_position_and_stay_where_nothing_may_stop():
    found = calm.threshold_at(0.9, np.arange(3), length=4, decay=4.0)
    np.testing.assert_allclose(found, 0.81 + 0.1 * np.exp(-np.arange(3)), rtol=1e-6)
    assert calm.threshold_at(1.05, 3, length=4) > 1
    assert calm.threshold_at(1.0, 0, length=4) == 1
    np.testing.assert_array_equal(
        calm.threshold_at(0.3, np.arange(3), length=4, decay=float("inf")), np.float32([0.3] * 3)
    )


def test_layers_weigh_more_the_higher_they_stand():
    np.testing.assert_allclose(calm.layer_weights(3), [1 / 6, 2 / 6, 3 / 6])


def test_targets_of_the_classifier_compare_with_the_last_layer():
    logits = jnp.asarray([[[0.0, 1.0], [1.0, 0.0]], [[1.0, 0.0], [1.0, 0.0]], [[0.0, 2.0], [3.0, 0.0]]])
    np.testing.assert_array_equal(calm.exit_targets(logits), [[1, 1], [0, 1], [1, 1]])


SCORES = jnp.asarray(np.random.default_rng(0).random((2, 5, 4)), jnp.float32)
TOKENS = TokenSet.create(jnp.zeros((2, 5, 3)), mask=jnp.asarray([[True] * 5, [True] * 3 + [False] * 2]))


@pytest.mark.parametrize("first", [1, 3])
def test_a_token_stops_at_the_first_confident_layer(first):
    weights = np.asarray(
        registry.get("calm")(TOKENS, Signals(layer_scores=SCORES), threshold=0.5, first=first, length=5)
    )
    for row, column in np.ndindex(2, 5):
        limit = 0.45 + 0.1 * np.exp(-4 * column / 5)
        sure = [layer for layer in range(first - 1, 3) if SCORES[row, column, layer] >= limit]
        want = np.eye(4)[sure[0] if sure else 3] * bool(TOKENS.valid[row, column])
        np.testing.assert_array_equal(weights[row, column], want)


@settings(max_examples=25, deadline=None)
@given(low=st.floats(0, 1.2), high=st.floats(0, 1.2))
def test_a_lower_threshold_never_stops_later(low, high):
    low, high = sorted((low, high))
    layers = [
        np.argmax(registry.get("calm")(TOKENS, Signals(layer_scores=SCORES), threshold=value), -1)
        for value in (low, high)
    ]
    assert np.all(layers[0] <= layers[1])
    if high > 1:
        assert np.all(layers[1][np.asarray(TOKENS.valid)] == 3)


def test_p_values_are_the_smaller_of_hoeffding_and_bentkus():
    for risk, examples, limit in [(0.0, 50, 0.1), (0.04, 50, 0.1), (0.3, 10, 0.5), (0.2, 10, 0.1)]:
        below = min(risk, limit)
        entropy = stats.entropy([below, 1 - below], [limit, 1 - limit])
        bentkus = np.e * stats.binom.cdf(round(risk * examples), examples, limit)
        found = calm.risk_p_value(risk, examples, limit)
        assert found == pytest.approx(min(1.0, np.exp(-examples * entropy), bentkus), rel=1e-6)
    assert calm.risk_p_value(0.2, 10, 0.1) == 1.0


def test_calibration_takes_the_lowest_threshold_before_the_first_that_fails():
    risks = np.zeros((4, 200))
    risks[1, :4], risks[2, :100], risks[3, :2] = 1.0, 1.0, 1.0
    assert calm.calibrate((0.9, 0.7, 0.5, 0.3), risks, limit=0.1) == 0.7
    assert calm.calibrate((0.9, 0.7), np.ones((2, 200)), limit=0.1) is None


def test_the_risk_is_kept_in_more_calibration_sets_than_promised():
    """True risk rises as the threshold falls; the choice exceeds the limit in at most a share `error` of the draws."""
    thresholds, limit, error = tuple(np.linspace(0.95, 0.05, 10)), 0.2, 0.1
    rng, broken, used = np.random.default_rng(0), 0, set()
    for _ in range(300):
        draws = rng.random(100)
        chosen = calm.calibrate(thresholds, draws < (1 - np.array(thresholds))[:, None] * 0.5, limit=limit, error=error)
        used.add(chosen)
        broken += chosen is not None and (1 - chosen) * 0.5 > limit
    # Three standard deviations above the promise.
    assert broken / 300 <= error + 3 * np.sqrt(error * (1 - error) / 300)
    assert used - {None, thresholds[0]}


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: calm.threshold_at(0.5, 0, length=0), "length and decay must be positive; got 0 and 4.0"),
        (lambda: calm.risk_p_value(1.5, 3, 0.1), r"risk must lie in 0..1"),
        (lambda: calm.calibrate((0.1, 0.9), np.zeros((2, 3)), limit=0.1), "thresholds must fall"),
        (lambda: calm.calibrate((0.9, 0.1), np.zeros((3, 3)), limit=0.1), r"risks must be \[2, C\]"),
        (
            lambda: calm.calibrate((0.9,), np.zeros((1, 3)), limit=0.1, error=0.0),
            r"error must lie in \(0, 1\); got 0.0",
        ),
        (lambda: registry.get("calm")(TOKENS, Signals(layer_scores=SCORES), first=5), "first must lie in 1..4"),
    ],
)
def test_what_does_not_fit_is_refused(call, message):
    with pytest.raises(ValueError, match=message):
        call()
