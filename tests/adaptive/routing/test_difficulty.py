# SPDX-License-Identifier: Apache-2.0
"""Difficulty of tokens and agreement of paths on numbers that can be checked by hand."""

import jax.numpy as jnp
import numpy as np
import pytest

from adaptive.routing import difficulty


def test_a_token_that_every_path_fails_is_not_hard():
    cheap, best = jnp.asarray([9.0, 2.0, 1.0]), jnp.asarray([9.0, 0.5, 1.0])
    np.testing.assert_array_equal(difficulty.gain(cheap, best), [0.0, 1.5, 0.0])


def test_concentration_tells_the_part_of_the_hardest_tokens():
    gains = jnp.asarray([[0.0, 6.0], [3.0, 1.0]])
    np.testing.assert_allclose(difficulty.concentration(gains, (0.0, 0.25, 0.5, 1.0)), [0.0, 0.6, 0.9, 1.0], rtol=1e-6)
    with pytest.raises(ValueError, match=r"shares of tokens lie in 0\.\.1"):
        difficulty.concentration(gains, (1.5,))


def test_by_group_sums_and_counts():
    total, count = difficulty.by_group(jnp.asarray([[1.0, 2.0], [4.0, 8.0]]), jnp.asarray([[0, 2], [2, 0]]), 3)
    assert total.tolist() == [9.0, 0.0, 6.0] and count.tolist() == [2, 0, 2]


def test_correlation_is_pearsons():
    rng = np.random.default_rng(0)
    first, second = rng.normal(size=(2, 4, 5))
    want = np.corrcoef(first.ravel(), second.ravel())[0, 1]
    np.testing.assert_allclose(difficulty.correlation(jnp.asarray(first), jnp.asarray(second)), want, rtol=1e-5)


def test_agreement_by_layer_beside_chance():
    first = jnp.asarray([[2, 1], [2, 1], [1, 1], [1, 1]])
    second = jnp.asarray([[2, 1], [1, 2], [1, 1], [2, 2]])
    same, chance = difficulty.agreement(first, second, 3)
    assert same.tolist() == [0.5, 0.5] and chance.tolist() == [0.5, 0.5]
    same, chance = difficulty.agreement(first, first, 3)
    assert same.tolist() == [1.0, 1.0] and chance.tolist() == [0.5, 1.0]
    with pytest.raises(ValueError, match="same tokens and layers"):
        difficulty.agreement(first, second[:, :1], 3)
