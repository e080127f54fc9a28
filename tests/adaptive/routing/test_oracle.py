# SPDX-License-Identifier: Apache-2.0
"""The exhaustive oracle equals brute force; it shares prefixes and bounds its blocks."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from adaptive.routing import oracle, patterns
from tests.adaptive.routing import toy_layers


@pytest.fixture(scope="module")
def brute():
    model = toy_layers.layered(3)
    every = patterns.all_patterns(3, 3)
    return model, every, toy_layers.brute_force(model, every)


@pytest.mark.parametrize("capacity", [3, 9, 27, 100])
def test_all_losses_equal_a_loop_over_patterns(brute, capacity):
    model, _, want = brute
    found = jax.jit(lambda x: oracle.all_losses(model, x, capacity=capacity))(toy_layers.start())
    for name in want:
        np.testing.assert_allclose(found[name], want[name], rtol=1e-5)


@pytest.mark.parametrize("capacity", [3, 10, 27])
def test_the_best_patterns_are_those_of_brute_force(brute, capacity):
    model, every, want = brute
    found = jax.jit(lambda x: oracle.exhaustive(model, x, capacity=capacity))(toy_layers.start())
    costs = (every == 2).sum(axis=1)
    for name, losses in want.items():
        for cost in range(4):
            members = np.flatnonzero(costs == cost)
            np.testing.assert_array_equal(found[name].index[cost], members[losses[members].argmin(axis=0)])
            np.testing.assert_allclose(found[name].loss[cost], losses[members].min(axis=0), rtol=1e-5)


def test_within_a_budget_is_the_running_minimum_and_ties_go_to_the_cheaper_pattern(brute):
    model, every, _ = brute
    losses = jnp.asarray(np.random.default_rng(0).normal(size=(27, 4)).round(0))
    costs = (every == 2).sum(axis=1)
    exact = oracle.best_by_cost(losses, costs)
    within = jax.jit(oracle.Best.within)(exact)
    for budget in range(4):
        members = np.flatnonzero(costs <= budget)
        members = members[np.argsort(costs[members], kind="stable")]
        np.testing.assert_array_equal(within.index[budget], members[np.asarray(losses)[members].argmin(axis=0)])
        np.testing.assert_array_equal(within.loss[budget], np.asarray(losses)[members].min(axis=0))
    assert model.choices == 3


def test_streaming_equals_keeping_all_losses(brute):
    model, every, _ = brute
    both = jax.jit(lambda x: (oracle.exhaustive(model, x, capacity=9), oracle.all_losses(model, x, capacity=9)))
    streamed, losses = both(toy_layers.start())
    kept = oracle.best_by_cost(losses["token"], patterns.cost_of(every, model.costs))
    np.testing.assert_array_equal(streamed["token"].index, kept.index)
    np.testing.assert_array_equal(streamed["token"].loss, kept.loss)


def test_a_cost_that_no_pattern_has_is_infinite():
    model = toy_layers.layered(2, costs=(0, 2))
    run = jax.jit(lambda x: oracle.exhaustive(model, x, capacity=4)["sequence"])
    found = run(toy_layers.start())
    assert np.isinf(found.loss[1]).all() and (found.index[1] == -1).all()
    assert np.isfinite(found.loss[np.array([0, 2, 4])]).all()
    assert np.isfinite(jax.jit(oracle.Best.within)(found).loss).all()


def test_each_block_is_bounded_and_shared_parts_run_once_a_prefix():
    """Traced once a layer whatever the number of patterns; the batch of a block never exceeds the capacity."""
    count, seen = {"shared": 0}, []
    model = toy_layers.layered(6, costs=(0, 1), count=count)

    def readout(x):
        return {"token": jnp.sum(x, axis=-1)}

    def shared(x, layer):
        jax.debug.callback(lambda _: seen.append(layer), x[0, 0, 0])
        return x

    jax.make_jaxpr(lambda x: oracle.all_losses(model, x, capacity=8))(toy_layers.start())
    assert count["shared"] == 6
    counted = patterns.Layered(4, (0, 1), shared, lambda x, layer, choice: x + choice, readout)
    jax.block_until_ready(jax.jit(lambda x: oracle.all_losses(counted, x, capacity=4))(toy_layers.start()))
    jax.effects_barrier()
    # 1 + 2 + 4 + 8 prefixes, where 16 separate passes would run 64 shared parts.
    assert sorted(seen) == [0] + 2 * [1] + 4 * [2] + 8 * [3]


def test_more_patterns_never_raise_the_oracle(brute):
    _, every, want = brute
    no_skip = (every != 0).all(axis=1)
    costs = (every == 2).sum(axis=1)
    few = oracle.best_by_cost(jnp.asarray(want["token"][no_skip]), costs[no_skip])
    many = oracle.best_by_cost(jnp.asarray(want["token"]), costs)
    assert (many.loss <= few.loss).all() and (many.loss < few.loss).any()


def test_shuffled_labels_are_the_same_labels_elsewhere():
    labels = jnp.arange(40).reshape(4, 10)
    found = oracle.shuffled(labels, jax.random.key(0))
    assert found.shape == labels.shape and (found != labels).any()
    np.testing.assert_array_equal(np.sort(found.reshape(-1)), np.arange(40))


def test_errors():
    model = toy_layers.layered(3)
    with pytest.raises(ValueError, match=r"at least the 3 choices.*capacity=2"):
        oracle.exhaustive(model, toy_layers.start(), capacity=2)
    with pytest.raises(ValueError, match=r"3\^20 patterns are too many.*beam, greedy or evolve"):
        oracle.exhaustive(toy_layers.layered(20), toy_layers.start())
    with pytest.raises(ValueError, match="one cost for each of 27 patterns"):
        oracle.best_by_cost(jnp.zeros((27, 2)), np.zeros(9, int))
