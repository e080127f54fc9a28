# SPDX-License-Identifier: Apache-2.0
"""H-Net's parts: the router at its first value, the ratio loss, the moving average against a loop, the way back."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from adaptive import registry
from adaptive.chunking import chunks as chunks_lib
from adaptive.chunking import hnet
from adaptive.chunking.chunks import Chunks
from adaptive.tokens import Signals, TokenSet


def route(x, mask=None):
    tokens = TokenSet.create(x, mask=mask)
    return registry.get("hnet")(tokens, Signals(queries=x, keys=x))


def test_repeated_states_make_one_chunk_and_reversed_ones_a_chunk_each():
    x = jnp.asarray(np.random.default_rng(0).normal(size=(1, 1, 8)), jnp.float32)
    same, turned = route(jnp.repeat(x, 6, axis=1)), route(x * jnp.array([1, -1, 1, -1, 1, -1])[:, None])
    np.testing.assert_array_equal(same.starts[0], [1, 0, 0, 0, 0, 0])
    np.testing.assert_allclose(same.probability[0], [1, 0, 0, 0, 0, 0], atol=1e-6)
    assert np.all(turned.starts)
    np.testing.assert_allclose(turned.probability, 1, atol=1e-6)


def test_orthogonal_neighbours_are_undecided_and_so_do_not_start():
    chunks = route(jnp.eye(4)[None])
    np.testing.assert_array_equal(chunks.probability[0], [1, 0.5, 0.5, 0.5])
    np.testing.assert_array_equal(chunks.starts[0], [1, 0, 0, 0])


def test_queries_come_from_the_token_before():
    rng = np.random.default_rng(1)
    queries, keys = (rng.normal(size=(1, 5, 3)).astype(np.float32) for _ in range(2))
    tokens = TokenSet.create(jnp.zeros((1, 5, 3)))
    chunks = registry.get("hnet")(tokens, Signals(queries=jnp.asarray(queries), keys=jnp.asarray(keys)))
    cosines = [q @ k / np.linalg.norm(q) / np.linalg.norm(k) for q, k in zip(queries[0], keys[0, 1:], strict=False)]
    np.testing.assert_allclose(chunks.probability[0, 1:], (1 - np.array(cosines)) / 2, atol=1e-6)


def ratio(starts, probability, target, mask=None):
    tokens = TokenSet.create(jnp.zeros((*np.shape(starts), 1)), mask=mask)
    total, rows = hnet.ratio_loss(Chunks.create(jnp.asarray(starts), tokens, jnp.asarray(probability)), target=target)
    return float(total) / float(rows)


@pytest.mark.parametrize("target", [2, 4, 6])
def test_the_ratio_loss_is_1_at_its_target(target):
    starts = np.arange(12)[None] % target == 0
    assert ratio(starts, starts.astype(np.float32), target) == pytest.approx(1.0, abs=1e-6)


def test_the_ratio_loss_is_2_where_every_token_starts_a_chunk_of_2():
    assert ratio(np.ones((1, 8), bool), np.ones((1, 8)), 2) == pytest.approx(2.0)


def test_the_ratio_loss_is_least_at_its_target_along_equal_shares_and_ignores_padding():
    mask = jnp.asarray(np.arange(16)[None] < 12)
    losses = {}
    for count in (1, 2, 3, 4, 6, 12):
        starts = np.isin(np.arange(16), np.arange(0, 12, 12 // count))[None]
        losses[count] = ratio(starts, starts.astype(np.float32), 4, mask)
    assert min(losses, key=losses.get) == 3 and losses[3] == pytest.approx(1.0, abs=1e-6)
    with pytest.raises(ValueError, match="over 1; got 1"):
        ratio(np.ones((1, 8), bool), np.ones((1, 8)), 1)


def test_the_moving_average_equals_a_loop():
    rng = np.random.default_rng(2)
    values, shares = rng.normal(size=(2, 9, 3)).astype(np.float32), rng.random((2, 9)).astype(np.float32)
    filled = np.arange(9) < np.array([9, 5])[:, None]
    got = jax.jit(hnet.smooth)(values, shares, filled)
    for row in range(2):
        state = np.zeros(3)
        for k in range(9):
            if filled[row, k]:
                state = shares[row, k] * values[row, k] + (1 - shares[row, k]) * state
            np.testing.assert_allclose(got[row, k], state, atol=1e-5)


def test_the_moving_average_of_narrow_values_runs_in_float32():
    values = jnp.ones((1, 200, 1), jnp.bfloat16)
    got = jax.jit(hnet.smooth)(values, jnp.full((1, 200), 0.01), jnp.ones((1, 200), bool))
    assert got.dtype == jnp.bfloat16
    np.testing.assert_allclose(np.asarray(got[0, -1], np.float32), 1 - 0.99**200, rtol=0.01)


def test_certain_chunks_come_back_as_they_are_and_padding_as_zero():
    mask = jnp.asarray(np.arange(8)[None] < 6)
    tokens = TokenSet.create(jnp.zeros((1, 8, 2)), mask=mask)
    starts = jnp.asarray([[1, 0, 0, 1, 0, 1, 0, 0]], bool)
    chunks = Chunks.create(starts, tokens)
    reduction = chunks_lib.to_reduction(chunks, 8, pool="first")
    values = jnp.asarray(np.random.default_rng(3).normal(size=(1, 8, 2)), jnp.float32)
    got = hnet.dechunk(values, chunks, reduction)
    # Probabilities stop 1e-4 short of 1.
    np.testing.assert_allclose(got[0, :6], np.asarray(values)[0, [0, 0, 0, 1, 1, 2]], atol=1e-3)
    np.testing.assert_array_equal(got[0, 6:], 0)


def test_the_router_learns_from_the_confidence_in_each_choice():
    tokens = TokenSet.create(jnp.zeros((1, 4, 1)))
    starts = jnp.asarray([[1, 0, 1, 0]], bool)

    def out(probability):
        chunks = Chunks.create(starts, tokens, probability)
        reduction = chunks_lib.to_reduction(chunks, 4, pool="first")
        return hnet.dechunk(jnp.ones((1, 4, 1)), chunks, reduction)

    probability = jnp.asarray([[1.0, 0.2, 0.9, 0.4]])
    np.testing.assert_allclose(out(probability)[0, :, 0], 1, atol=1e-3)
    gradient = jax.grad(lambda p: jnp.sum(out(p)))(probability)[0]
    # More certainty is more output: up where a chunk starts, down where none does; 1 each, the average of ones adding nothing.
    np.testing.assert_allclose(gradient[1:], [-1, 1, -1], atol=0.01)
