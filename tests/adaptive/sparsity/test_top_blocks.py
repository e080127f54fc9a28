# SPDX-License-Identifier: Apache-2.0
"""Blocks chosen from pooled scores: against loops in NumPy, and what the choice must hold."""

import functools

import jax
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from adaptive.sparsity.top_blocks import pooled_scores, top_blocks
from pallas_kernels.biased_flash_attention import biased_attention
from pallas_kernels.block_sparse_attention import block_sparse_attention

B, N, L, H, G, D = 2, 22, 30, 4, 2, 8
SIZES = dict(block_q=8, block_k=4)


def _inputs(seed=0):
    rng = np.random.default_rng(seed)
    query, key, value = (rng.normal(size=(B, n, h, D)).astype(np.float32) for n, h in ((N, H), (L, G), (L, G)))
    return query, key, value, np.where(rng.random((B, L)) < 0.3, -np.inf, 0.0).astype(np.float32)


_top = jax.jit(top_blocks, static_argnums=2, static_argnames=("causal", "shared", "block_q", "block_k"))

_scores = jax.jit(pooled_scores, static_argnames=("causal", "block_q", "block_k"))


def test_scores_are_products_of_means_over_what_is_there():
    query, key, _, bias = _inputs()
    bias[0, 4:8] = -np.inf
    scores = np.asarray(_scores(query, key, key_bias=bias, causal=True, **SIZES))
    for b, h, r, c in np.ndindex(*scores.shape):
        columns = np.arange(4 * c, min(4 * c + 4, L))
        columns = columns[np.isfinite(bias[b, columns])]
        late = 4 * c > min(8 * r + 8, N) - 1 + L - N
        if late or not columns.size:
            assert scores[b, h, r, c] == -np.inf
            continue
        expected = query[b, 8 * r : 8 * r + 8, h].mean(0) @ key[b, columns, h // 2].mean(0) / np.sqrt(D)
        np.testing.assert_allclose(scores[b, h, r, c], expected, rtol=1e-4, atol=1e-5)


@settings(max_examples=6, deadline=None)
@given(seed=st.integers(0, 2**16), causal=st.booleans(), shared=st.booleans())
def test_the_best_are_listed_and_every_query_has_a_key(seed, causal, shared):
    query, key, _, _ = _inputs(seed)
    index = _top(query, key, 2, causal=causal, shared=shared, **SIZES)
    assert index.indices.shape == (B, G if shared else H, 3, 2)
    mask = np.asarray(index.token_mask())
    if causal:
        mask = mask & np.tri(N, L, L - N, dtype=bool)
        assert mask.any(-1).all()
        return
    scores = np.asarray(_scores(query, key, **SIZES))
    if shared:
        scores = scores.reshape(B, G, H // G, 3, 8).mean(2)
    listed = np.asarray(index.block_mask())
    least = np.min(np.where(listed, scores, np.inf), axis=-1)
    assert np.all(listed.sum(-1) == 2) and np.all(np.max(np.where(listed, -np.inf, scores), axis=-1) <= least + 1e-6)


@pytest.mark.parametrize("causal", [True, False])
def test_all_blocks_give_dense_attention_and_the_choice_has_no_gradient(causal):
    *arrays, bias = _inputs()
    options = {"causal": causal, "key_bias": bias}

    def sparse(query, key, value):
        index = top_blocks(query, key, 8, **options, **SIZES)
        return block_sparse_attention(query, key, value, index, **options)

    np.testing.assert_allclose(jax.jit(sparse)(*arrays), biased_attention(*arrays, **options), atol=1e-5)
    grads = [
        jax.jit(jax.grad(lambda *args, function=function: (function(*args) ** 2).sum(), argnums=(0, 1, 2)))(*arrays)
        for function in (sparse, functools.partial(biased_attention, **options))
    ]
    for mine, other in zip(*grads, strict=True):
        np.testing.assert_allclose(mine, other, rtol=1e-4, atol=1e-5)


def test_more_blocks_than_there_are_is_refused():
    query, key, _, _ = _inputs()
    with pytest.raises(ValueError, match="k=9 blocks must be between 1 and the 8"):
        top_blocks(query, key, 9, **SIZES)
