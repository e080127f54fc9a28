# SPDX-License-Identifier: Apache-2.0
"""Chunks against loops over lists: numbers, lengths, pools, overflow, and the gradient of the published pooling."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from adaptive import ragged
from adaptive.chunking import chunks as chunks_lib
from adaptive.chunking.chunks import Chunks
from adaptive.tokens import TokenSet

LENGTH, WIDTH = 10, 3


def draw(seed, lengths=(LENGTH, 6)):
    """Tokens of two rows and places where their chunks may start."""
    rng = np.random.default_rng(seed)
    mask = np.arange(LENGTH) < np.array(lengths)[:, None]
    features = rng.normal(size=(2, LENGTH, WIDTH)).astype(np.float32)
    return TokenSet.create(jnp.asarray(features), mask=jnp.asarray(mask)), jnp.asarray(rng.random((2, LENGTH)) < 0.4)


def loop_chunks(starts, valid, capacity):
    """Lists of the token indices in each chunk of one row; starts beyond the capacity are ignored."""
    found = []
    for index in np.flatnonzero(valid):
        if not found or (starts[index] and len(found) < capacity):
            found.append([])
        found[-1].append(int(index))
    return found


@functools.cache
def pooler(capacity, pool):
    def run(tokens, starts):
        chunks = Chunks.create(starts, tokens)
        reduction = chunks_lib.to_reduction(chunks, capacity, pool=pool)
        counts = chunks_lib.lengths(chunks, capacity), chunks_lib.overflowing(chunks, capacity)
        return reduction, reduction.apply(tokens), chunks_lib.max_pool(tokens.features, reduction), counts

    return jax.jit(run)


@settings(max_examples=40, deadline=None)
@given(
    seed=st.integers(0, 10_000),
    lengths=st.tuples(st.integers(0, LENGTH), st.integers(1, LENGTH)),
    capacity=st.sampled_from((1, 3, LENGTH)),
    pool=st.sampled_from(chunks_lib.POOLS),
)
def test_pools_equal_loops_over_chunks(seed, lengths, capacity, pool):
    tokens, starts = draw(seed, lengths)
    reduction, reduced, largest, (sizes, over) = pooler(capacity, pool)(tokens, starts)
    features = np.asarray(tokens.features)
    for row in range(2):
        valid = np.asarray(tokens.valid[row])
        want = loop_chunks(starts[row], valid, capacity)
        number = [next((c for c, chunk in enumerate(want) if n in chunk), -1) for n in range(LENGTH)]
        np.testing.assert_array_equal(reduction.assign[row], number)
        np.testing.assert_array_equal(sizes[row], [len(c) for c in want] + [0] * (capacity - len(want)))
        np.testing.assert_array_equal(reduced.mass[row], sizes[row])
        assert int(over[row]) == len(loop_chunks(starts[row], valid, LENGTH)) - len(want)
        for slot, chunk in enumerate(want):
            own = features[row, chunk[:1]] if pool == "first" else features[row, chunk]
            np.testing.assert_allclose(reduced.features[row, slot], own.mean(0), atol=1e-6)
            np.testing.assert_array_equal(largest[row, slot], features[row, chunk].max(0))
            assert reduced.coords[row, slot, 0] == chunk[0] == reduction.slots[row, slot]
        np.testing.assert_array_equal(np.asarray(reduced.features)[row, len(want) :], 0)
        np.testing.assert_array_equal(np.asarray(largest)[row, len(want) :], 0)


@pytest.mark.parametrize("pool", chunks_lib.POOLS)
def test_a_chunk_for_every_token_is_the_identity_and_one_chunk_the_mean(pool):
    tokens, starts = draw(0, (LENGTH, LENGTH))
    _, reduced, _, _ = pooler(LENGTH, pool)(tokens, jnp.ones_like(starts))
    for got, want in zip(jax.tree.leaves(reduced), jax.tree.leaves(tokens), strict=True):
        np.testing.assert_array_equal(got, want)
    _, reduced, _, _ = pooler(1, "mean")(tokens, jnp.zeros_like(starts))
    np.testing.assert_allclose(reduced.features[:, 0], tokens.features.mean(1), atol=1e-6)
    np.testing.assert_array_equal(reduced.mass, LENGTH)


def test_ends_are_the_starts_of_what_follows_and_the_last_real_token_needs_none():
    tokens, _ = draw(0, (LENGTH, 4))
    ends = jnp.zeros((2, LENGTH), bool).at[:, jnp.array([2, 3, LENGTH - 1])].set(True)
    soft = jnp.linspace(0.1, 0.8, LENGTH)[None] * jnp.ones((2, 1))
    chunks = Chunks.from_ends(ends, tokens, soft)
    np.testing.assert_array_equal(np.flatnonzero(chunks.starts[0]), [0, 3, 4])
    np.testing.assert_array_equal(np.flatnonzero(chunks.starts[1]), [0, 3])
    np.testing.assert_allclose(chunks.probability[0], [1.0, *soft[0, :-1]])
    np.testing.assert_allclose(chunks.probability[1], [1.0, *soft[0, :3], *[0] * 6])
    np.testing.assert_array_equal(chunks.boundaries, chunks.starts)


def test_padding_in_front_is_not_a_chunk():
    tokens = TokenSet.create(jnp.ones((1, 5, 1)), mask=jnp.array([[False, False, True, True, True]]))
    chunks = Chunks.create(jnp.array([[True, False, False, False, True]]), tokens)
    np.testing.assert_array_equal(chunks.starts[0], [0, 0, 1, 0, 1])
    np.testing.assert_array_equal(chunks_lib.segments(chunks)[0], [-1, -1, 0, 0, 1])
    np.testing.assert_array_equal(chunks_lib.split_long(chunks.starts, tokens, 1)[0], [0, 0, 1, 1, 1])


def test_long_chunks_are_cut_into_pieces_counted_from_their_start():
    tokens, _ = draw(0, (LENGTH, 5))
    starts = jnp.zeros((2, LENGTH), bool).at[:, 4].set(True)
    cut = jax.jit(lambda starts: chunks_lib.split_long(starts, tokens, 3))(starts)
    np.testing.assert_array_equal(np.flatnonzero(cut[0]), [0, 3, 4, 7])
    np.testing.assert_array_equal(np.flatnonzero(cut[1]), [0, 3, 4])
    assert chunks_lib.split_long(starts, tokens, None) is starts
    with pytest.raises(ValueError, match="at least one token; got a limit of 0"):
        chunks_lib.split_long(starts, tokens, 0)


def published_pooling(ends, features, slots):
    """Chunk means as `shortening.py` computes them from 0/1 ends, differentiable in the ends."""
    offset = jnp.arange(slots) - (jnp.cumsum(ends) - ends)[:, None]
    weight = jnp.where(jax.lax.stop_gradient(offset) == 0, 1 - offset, 0.0)
    return jnp.einsum("ld,ls->sd", features, weight / (weight.sum(0) + 1e-9))


def test_the_gradient_of_boundaries_is_that_of_the_published_pooling():
    tokens, ends = draw(3, (LENGTH, LENGTH))
    ends = ends.at[:, -1].set(True)
    soft = jnp.asarray(np.random.default_rng(1).uniform(0.1, 0.9, (2, LENGTH)), jnp.float32)

    def ours(soft):
        chunks = Chunks.from_ends(ends, tokens, soft)
        return jnp.sum(jnp.sin(chunks_lib.to_reduction(chunks, LENGTH).apply(tokens).features))

    def theirs(ends):
        pooled = jax.vmap(lambda e, x: published_pooling(e, x, LENGTH))(ends, tokens.features)
        return jnp.sum(jnp.sin(pooled))

    got, want = jax.jit(jax.grad(ours))(soft), jax.jit(jax.grad(theirs))(ends.astype(jnp.float32))
    np.testing.assert_allclose(ours(soft), theirs(ends.astype(jnp.float32)), rtol=1e-5)
    np.testing.assert_allclose(got, want, atol=1e-5)
    assert np.abs(got).max() > 0.01


def test_ignored_starts_get_no_gradient():
    tokens, _ = draw(5, (LENGTH, LENGTH))
    starts = jnp.zeros((2, LENGTH), bool).at[:, jnp.array([3, 5, 8])].set(True)

    def loss(soft):
        chunks = Chunks.create(starts, tokens, soft)
        return jnp.sum(jnp.sin(chunks_lib.to_reduction(chunks, 2).apply(tokens).features))

    gradient = np.asarray(jax.jit(jax.grad(loss))(jnp.full((2, LENGTH), 0.5)))
    # The second chunk begins at 3; what would begin at 5 and 8 is ignored.
    assert np.all(gradient[:, 3] != 0)
    np.testing.assert_allclose(gradient[:, 5:], 0, atol=1e-7)


@pytest.mark.parametrize("rungs", [(3, 7, 10), (5, 16), (10,)])
def test_the_ladder_makes_the_same_chunks_on_every_rung(rungs):
    tokens, starts = draw(2)

    def work(reduction, tokens):
        reduced = reduction.apply(tokens)
        return jnp.sum(jnp.sin(reduced.features) * reduced.mass[..., None], axis=1), reduced.count

    def run(tokens, starts):
        chunks = Chunks.create(starts, tokens)
        return ragged.on_ladder(
            work, chunks.starts, rungs, tokens, reduce=lambda found, slots: chunks_lib.to_reduction(found, slots), source=chunks
        )  # fmt: skip

    got, count = jax.jit(run)(tokens, starts)
    chunks = Chunks.create(starts, tokens)
    want, _ = work(chunks_lib.to_reduction(chunks, LENGTH), tokens)
    np.testing.assert_allclose(got, want, atol=1e-5)
    np.testing.assert_array_equal(count, chunks.count)


def test_an_unknown_pool_is_an_error():
    tokens, starts = draw(0)
    with pytest.raises(ValueError, match=r"pool='max'; one of \('mean', 'first'\)"):
        chunks_lib.to_reduction(Chunks.create(starts, tokens), 4, pool="max")
