# SPDX-License-Identifier: Apache-2.0
"""Duo-LLM's parts: random paths, routers, their budget, and modules that run on their own rows."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from adaptive.width import duo

ROWS, WIDTH = 37, 6


def unit(params, rows):
    return jnp.tanh(rows @ params)


def units():
    keys = jax.random.split(jax.random.key(0), 2)
    return [(unit, jax.random.normal(key, (WIDTH, WIDTH))) for key in keys]


_compacted = jax.jit(lambda small, big, rows, choice: duo.compacted((unit, small), (unit, big), rows, choice, tile=8))


@settings(max_examples=25)
@given(st.lists(st.integers(0, 2), min_size=ROWS, max_size=ROWS))
def test_compacted_modules_equal_masked_ones(choices):
    (_, small), (_, big) = units()
    rows, choice = jax.random.normal(jax.random.key(1), (ROWS, WIDTH)), jnp.asarray(choices, jnp.int32)
    found = _compacted(small, big, rows, choice)
    np.testing.assert_allclose(found, duo.masked((unit(small, rows), unit(big, rows)), choice), atol=1e-6)
    assert (found[choice == duo.SKIP] == 0).all()


def test_compacted_modules_look_at_their_own_rows_only():
    """A row with NaN for the module that it does not take must not poison that module's result or gradient."""
    (_, small), (_, big) = units()
    rows = jax.random.normal(jax.random.key(1), (ROWS, WIDTH))
    choice = jnp.full(ROWS, duo.SMALL).at[3].set(duo.BIG)
    grad = jax.jit(jax.grad(lambda big: jnp.sum(_compacted(small, big, rows, choice))))(big)
    alone = jax.grad(lambda big: jnp.sum(unit(big, rows[3:4])))(big)
    np.testing.assert_allclose(grad, alone, atol=1e-6)


def test_random_paths_have_the_shares_asked_for():
    paths = duo.random_paths(jax.random.key(0), (20_000,), (0.2, 0.3, 0.5))
    np.testing.assert_allclose(np.bincount(paths) / 20_000, [0.2, 0.3, 0.5], atol=0.02)
    assert set(np.unique(duo.random_paths(jax.random.key(1), (500,), (0.0, 0.5, 0.5)))) == {1, 2}
    assert set(np.unique(duo.random_paths(jax.random.key(1), (500,), (0.0, 0.0, 1.0)))) == {2}


def test_a_router_hardens_with_its_sharpness_and_may_not_skip():
    logits = jnp.asarray([[2.0, 0.5, 1.0], [-1.0, 0.5, 0.2]])
    even = (1 / 3, 1 / 3, 1 / 3)
    np.testing.assert_allclose(duo.router_shares(logits, 1.0, prior=even), jax.nn.softmax(logits), rtol=1e-6)
    hard = duo.router_shares(logits, 1e3, prior=even)
    np.testing.assert_allclose(hard, jax.nn.one_hot(duo.decide(logits), 3), atol=1e-6)
    no_skip = duo.router_shares(logits)
    assert (no_skip[:, duo.SKIP] == 0).all()
    np.testing.assert_allclose(no_skip[:, 1:], jax.nn.softmax(logits[:, 1:]), rtol=1e-6)
    assert duo.decide(logits, allow_skip=False).tolist() == [duo.BIG, duo.SMALL]
    assert duo.decide(logits).tolist() == [duo.SKIP, duo.SMALL]
    assert duo.decide(logits, -2.0).tolist() == [duo.BIG, duo.BIG]


@pytest.mark.parametrize(("allow_skip", "want"), [(False, (0.0, 0.75, 0.25)), (True, (0.375, 0.375, 0.25))])
def test_undecided_routers_meet_their_budget(allow_skip, want):
    prior = duo.prior_of(0.25, allow_skip=allow_skip)
    shares = duo.router_shares(jnp.zeros((2, 3, 4, 3)), 7.0, prior=prior)
    np.testing.assert_allclose(shares[0, 0, 0], want, rtol=1e-6)
    np.testing.assert_allclose(duo.budget_loss(shares, 0.25)[0], 0.0, atol=1e-12)


def test_the_sharpness_rises_geometrically():
    found = [float(duo.sharpness_at(step, 5, 1.0, 16.0)) for step in (0, 1, 2, 4, 9)]
    np.testing.assert_allclose(found, [1.0, 2.0, 4.0, 16.0, 16.0], rtol=1e-6)


def test_the_budget_is_one_for_all_layers_together():
    """All layers big at half of the layers and none elsewhere costs nothing at a budget of one half."""
    big_first = jnp.zeros((2, 3, 4, 3)).at[:, :, :2, duo.BIG].set(1.0).at[:, :, 2:, duo.SMALL].set(1.0)
    total, count = duo.budget_loss(big_first, 0.5)
    assert (total, count) == (0.0, 6.0)
    total, count = duo.budget_loss(big_first, 0.25)
    np.testing.assert_allclose(total / count, 0.0625)


def test_calibration_meets_its_budget():
    scores = jax.random.normal(jax.random.key(0), (40, 25))
    for budget in (0.1, 0.5, 0.9):
        assert abs(float(jnp.mean(scores > duo.calibrate(scores, budget))) - budget) < 0.002
    assert jnp.mean(scores > duo.calibrate(scores, 0.0)) == 0.0
    assert jnp.mean(scores > duo.calibrate(scores, 1.0)) == 1.0


def test_the_mixture_adds_nothing_for_skipping():
    small, big = jnp.ones((2, 4)), 3 * jnp.ones((2, 4))
    shares = jnp.asarray([[1.0, 0.0, 0.0], [0.2, 0.5, 0.3]])
    np.testing.assert_allclose(duo.mixture((small, big), shares)[:, 0], [0.0, 1.4], rtol=1e-6)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: duo.random_paths(jax.random.key(0), (2,), (0.5, 0.6, 0.1)), "with sum 1; got"),
        (lambda: duo.random_paths(jax.random.key(0), (2,), (0.5, 0.5)), "skip, small, big with sum 1"),
        (lambda: duo.router_shares(jnp.zeros((3, 2))), "one logit for each of.*got 2"),
        (lambda: duo.router_shares(jnp.zeros((3, 3)), 0.0), r"must be positive; got 0\.0"),
        (lambda: duo.prior_of(1.0, allow_skip=False), r"between 0 and 1; got 1\.0"),
        (lambda: duo.budget_loss(jnp.zeros((1, 1, 1, 3)), 1.5), r"in 0\.\.1; got 1\.5"),
        (lambda: duo.calibrate(jnp.zeros(3), -0.1), r"in 0\.\.1; got -0\.1"),
    ],
)
def test_errors(call, message):
    with pytest.raises(ValueError, match=message):
        call()
