# SPDX-License-Identifier: Apache-2.0
"""Rotary embedding from explicit positions."""

import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from layers.rotary import Llama3Scaling, rotate

X = np.random.default_rng(0).normal(size=(2, 5, 3, 8)).astype(np.float32)


def test_equals_a_product_of_complex_numbers():
    positions = np.asarray([[0, 1, 5, 9, 100], [3, 0.5, 2, 7, 8]])
    angle = positions[:, :, None, None] * 10_000.0 ** (-np.arange(4) / 4)
    turned = (X[..., :4] + 1j * X[..., 4:]) * np.exp(1j * angle)
    out = rotate(X, positions)
    np.testing.assert_allclose(out, np.concatenate([turned.real, turned.imag], -1), rtol=1e-4, atol=1e-4)


@settings(max_examples=20, deadline=None)
@given(shift=st.integers(-1000, 1000), seed=st.integers(0, 1000))
def test_products_depend_on_differences_and_norms_stay(shift, seed):
    positions = np.random.default_rng(seed).integers(0, 500, size=(2, 5))
    here, there = rotate(X, positions), rotate(X, positions + shift)

    def products(x):
        return np.einsum("bqhd,bkhd->bhqk", x, x)

    np.testing.assert_allclose(products(here), products(there), atol=5e-3)
    np.testing.assert_allclose(np.linalg.norm(here, axis=-1), np.linalg.norm(X, axis=-1), rtol=1e-4)


def test_position_zero_changes_nothing_and_the_dtype_stays():
    np.testing.assert_array_equal(rotate(X, np.zeros((1, 5))), X)
    assert rotate(X.astype(jnp.bfloat16), np.zeros((1, 5))).dtype == jnp.bfloat16


def test_what_does_not_fit_is_refused():
    with pytest.raises(ValueError, match="even head width; got 7"):
        rotate(X[..., :7], np.zeros((1, 5)))
    with pytest.raises(ValueError, match=r"positions must be \[1 or 2, 5\]; got \(3, 5\)"):
        rotate(X, np.zeros((3, 5)))


def test_scaling_keeps_short_waves_stretches_long_ones_and_mixes_between():
    """Waves of 2 pi / f tokens, against the published rule on each frequency."""
    scaling = Llama3Scaling(factor=8.0, low=1.0, high=4.0, original_length=100)
    frequencies = np.array([1.0, 2 * np.pi / 25, 2 * np.pi / 50, 2 * np.pi / 100, 0.001])
    middle = (100 / 50 - 1) / (4 - 1)
    want = frequencies * np.array([1, 1, (1 - middle) / 8 + middle, 1 / 8, 1 / 8])
    np.testing.assert_allclose(scaling.scale(jnp.asarray(frequencies)), want, rtol=1e-5)
    position = np.full((1, 5), 60.0)
    angle = 60.0 * np.asarray(scaling.scale(10_000.0 ** (-jnp.arange(4) / 4)))
    turned = (X[..., :4] + 1j * X[..., 4:]) * np.exp(1j * angle)
    out = rotate(X, position, scaling=scaling)
    np.testing.assert_allclose(out, np.concatenate([turned.real, turned.imag], -1), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("options", [{"factor": 0.0}, {"low": 4.0}, {"low": -1.0}, {"original_length": 0}])
def test_a_scaling_that_makes_no_sense_is_refused(options):
    with pytest.raises(ValueError, match="must be positive and 0 < low < high"):
        Llama3Scaling(**options)
