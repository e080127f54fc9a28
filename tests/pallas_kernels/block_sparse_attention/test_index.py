# SPDX-License-Identifier: Apache-2.0
"""Block lists: every builder against the dense mask it stands for, and the transposed lists against NumPy's transpose."""

import jax
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pallas_kernels import block_sparse_attention as bsa

SIZES = dict(queries=10, keys=14, block_q=4, block_k=3)
BLOCKS = (3, 5)
_transposed = jax.jit(lambda index: index.transposed())


def _mask(seed, b=2, h=3, density=0.4):
    return np.random.default_rng(seed).random((b, h, *BLOCKS)) < density


def _expand(mask):
    whole = np.repeat(np.repeat(mask, SIZES["block_q"], axis=2), SIZES["block_k"], axis=3)
    return whole[:, :, : SIZES["queries"], : SIZES["keys"]]


def _stripes(i, j):
    return (abs(i - j) < 5) | (j < 2) | ((i + j) % 7 == 0) & (i > 3)


@settings(max_examples=25, deadline=None)
@given(seed=st.integers(0, 2**16), density=st.sampled_from([0.0, 0.3, 0.9, 1.0]))
def test_a_block_mask_comes_back(seed, density):
    mask = _mask(seed, density=density)
    index = bsa.from_block_mask(mask, **SIZES)
    np.testing.assert_array_equal(index.block_mask(), mask)
    np.testing.assert_array_equal(index.token_mask(), _expand(mask))
    np.testing.assert_array_equal(index.counts, mask.sum(-1))
    assert index.indices.shape[-1] == max(1, mask.sum(-1).max())
    np.testing.assert_allclose(index.density(), mask.mean(), rtol=1e-6)
    back = _transposed(index)
    np.testing.assert_array_equal(back.block_mask(), np.swapaxes(mask, 2, 3))
    assert (back.queries, back.keys, back.block_q, back.block_k) == (14, 10, 3, 4)


def test_a_traced_block_mask_gives_lists_of_full_capacity():
    mask = _mask(0)
    index = jax.jit(lambda mask: bsa.from_block_mask(mask, **SIZES))(mask)
    assert index.indices.shape[-1] == BLOCKS[1]
    np.testing.assert_array_equal(index.block_mask(), mask)
    assert np.all((np.asarray(index.indices) >= 0) & (np.asarray(index.indices) < BLOCKS[1]))


def test_a_rule_is_kept_to_the_pair_and_equal_tiles_are_stored_once():
    index = bsa.from_rule(_stripes, **SIZES)
    rows, columns = np.arange(10)[:, None], np.arange(14)[None, :]
    np.testing.assert_array_equal(index.token_mask()[0, 0], _stripes(rows, columns))
    band = bsa.from_rule(lambda i, j: abs(i - j) <= 2, queries=64, keys=64, block_q=4, block_k=4)
    # Away from the ends a band has two kinds of tiles, beside the diagonal and on it.
    assert band.tiles.shape[0] == 3 and band.counts.max() == 3
    whole = bsa.from_rule(lambda i, j: j >= 0, **SIZES)
    assert whole.tiles is None and whole.density() == 1


def test_transposed_tiles_go_along():
    index = bsa.from_rule(_stripes, **SIZES)
    back = _transposed(index)
    np.testing.assert_array_equal(back.token_mask(), np.swapaxes(index.token_mask(), 2, 3))
    np.testing.assert_array_equal(_transposed(back).token_mask(), index.token_mask())


@settings(max_examples=20, deadline=None)
@given(seed=st.integers(0, 2**16), k=st.integers(1, 5))
def test_top_k_scores_are_listed_in_order_and_minus_infinity_is_not(seed, k):
    rng = np.random.default_rng(seed)
    scores = np.where(rng.random((2, 3, *BLOCKS)) < 0.4, -np.inf, rng.normal(size=(2, 3, *BLOCKS))).astype(np.float32)
    scores[0, 0, 0] = -np.inf
    index = bsa.from_scores(scores, k, **SIZES)
    for place in np.ndindex(2, 3, BLOCKS[0]):
        best = [c for c in np.argsort(-scores[place], kind="stable")[:k] if scores[place][c] > -np.inf]
        count = index.counts[place]
        assert list(index.indices[place][:count]) == sorted(best)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: bsa.from_block_mask(np.ones((1, 1, 3, 4), bool), **SIZES), r"R, C = \(3, 5\)"),
        (lambda: bsa.from_scores(np.ones((1, 1, 4, 5)), 2, **SIZES), r"R, C = \(3, 5\)"),
        (lambda: bsa.from_scores(np.ones((1, 1, 3, 5)), 6, **SIZES), "k=6 blocks must be between 1 and the 5"),
        (lambda: bsa.from_scores(np.ones((1, 1, 3, 5)), 0, **SIZES), "k=0"),
        (lambda: bsa.from_rule(_stripes, **(SIZES | {"block_q": 0})), "block_q=0 must be at least 1"),
    ],
)
def test_what_does_not_fit_is_refused(make, message):
    with pytest.raises(ValueError, match=message):
        make()
