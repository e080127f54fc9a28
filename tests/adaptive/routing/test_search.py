# SPDX-License-Identifier: Apache-2.0
"""Greedy, beam and evolutionary search: exact where they can be, never above the start, always within the budget."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from adaptive.routing import patterns, search

COSTS, LAYERS, UNITS = (0, 0, 1), 4, (3, 2)
EVERY = patterns.all_patterns(LAYERS, 3)
# Any loss for each pattern and unit: nothing that a search could exploit.
TABLE = np.random.default_rng(0).normal(size=(len(EVERY), *UNITS)).astype(np.float32)


def evaluate(chosen):
    """Losses of `[*U, L]` patterns, looked up."""
    number = jnp.sum(chosen * 3 ** jnp.arange(LAYERS - 1, -1, -1), axis=-1)
    return jnp.take_along_axis(jnp.asarray(TABLE), number[None], axis=0)[0]


def additive(weights):
    """Losses that are sums over layers, for which greedy search is exact."""

    def losses(chosen):
        return jnp.sum(jnp.take_along_axis(jnp.asarray(weights), chosen[..., None], axis=-1)[..., 0], axis=-1)

    return losses


def sums_of_layers():
    """Weights `[*U, L, K]` and the table of all patterns' losses."""
    weights = np.random.default_rng(1).normal(size=(*UNITS, LAYERS, 3)).astype(np.float32)
    return weights, np.stack([weights[..., np.arange(LAYERS), pattern].sum(axis=-1) for pattern in EVERY])


def best_of_all(table, budget):
    members = np.flatnonzero(patterns.cost_of(EVERY, COSTS) <= budget)
    number = members[table[members].argmin(axis=0)]
    return EVERY[number], table[members].min(axis=0)


@pytest.mark.parametrize("budget", [0, 1, 3, 4])
def test_a_beam_of_all_patterns_is_the_exhaustive_oracle(budget):
    found, losses = jax.jit(lambda: search.beam(evaluate, (1, 1, 1, 1), UNITS, budget, COSTS, width=81))()
    want, lowest = best_of_all(TABLE, budget)
    np.testing.assert_array_equal(found, want)
    np.testing.assert_array_equal(losses, lowest)


def test_greedy_is_exact_where_losses_are_sums_of_layers():
    weights, table = sums_of_layers()
    run = jax.jit(lambda: search.greedy(additive(weights), (1,) * LAYERS, UNITS, 4, COSTS, rounds=8))
    np.testing.assert_allclose(run()[1], best_of_all(table, 4)[1], rtol=1e-6)


SEARCHES = {
    "greedy": functools.partial(search.greedy),
    "beam": functools.partial(search.beam, width=3),
    "evolve": functools.partial(search.evolve, key=jax.random.key(0), generations=12, offspring=4),
}


@pytest.mark.parametrize("name", SEARCHES)
@pytest.mark.parametrize("start", [(1, 1, 1, 1), (2, 0, 1, 1)])
def test_the_budget_holds_and_no_unit_ends_above_its_start(name, start):
    found, losses = jax.jit(lambda: SEARCHES[name](evaluate, start, UNITS, 2, COSTS))()
    assert (patterns.cost_of(found, COSTS) <= 2).all()
    np.testing.assert_array_equal(losses, evaluate(found))
    begun = evaluate(jnp.broadcast_to(jnp.asarray(start), (*UNITS, LAYERS)))
    assert (losses <= begun).all() and (losses < begun).any()
    assert (losses >= best_of_all(TABLE, 2)[1]).all()


def test_long_evolution_finds_the_best_pattern_of_a_smooth_landscape():
    weights, table = sums_of_layers()
    found = jax.jit(
        lambda key: search.evolve(additive(weights), (1,) * LAYERS, UNITS, 2, COSTS, key, generations=60, offspring=8)
    )(jax.random.key(1))
    np.testing.assert_allclose(found[1], best_of_all(table, 2)[1], rtol=1e-6)


def test_evolution_is_the_same_for_the_same_key():
    run = jax.jit(lambda key: search.evolve(evaluate, (1,) * LAYERS, UNITS, 2, COSTS, key, generations=3))
    np.testing.assert_array_equal(run(jax.random.key(3))[0], run(jax.random.key(3))[0])
    assert (run(jax.random.key(3))[0] != run(jax.random.key(4))[0]).any()


@pytest.mark.parametrize("name", SEARCHES)
def test_errors(name):
    run = SEARCHES[name]
    with pytest.raises(ValueError, match=r"must lie in 0\.\.4.*got 9"):
        run(evaluate, (1, 1, 1, 1), UNITS, 9, COSTS)
    with pytest.raises(ValueError, match=r"costs 3, above the budget of 2"):
        run(evaluate, (2, 2, 2, 1), UNITS, 2, COSTS)
    with pytest.raises(ValueError, match=r"choices lie in 0\.\.2"):
        run(evaluate, (1, 1, 3, 1), UNITS, 2, COSTS)


def test_sizes_of_a_search_are_checked():
    with pytest.raises(ValueError, match="width=0"):
        search.beam(evaluate, (1,) * LAYERS, UNITS, 2, COSTS, width=0)
    with pytest.raises(ValueError, match="generations and offspring must be at least 1; got 0 and 4"):
        search.evolve(evaluate, (1,) * LAYERS, UNITS, 2, COSTS, jax.random.key(0), generations=0, offspring=4)
