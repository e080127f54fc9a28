# SPDX-License-Identifier: Apache-2.0
"""GPU kernels of block-sparse attention: blocks of several tiles, the order of lists, sizes, and what is refused."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels import block_sparse_attention as bsa
from pallas_kernels.block_sparse_attention import gpu_parts, gpu_positions, reference
from pallas_kernels.position_bias import PositionBias

# Blocks of three and of five tiles of 16, the last of each cut short.
H, G, N, L, D = 2, 1, 70, 130, 8
SIZES = dict(queries=N, keys=L, block_q=48, block_k=80)
QUICK = {"xla_backend_optimization_level": 0, "xla_llvm_disable_expensive_passes": True}
EXACT = dict(rtol=1e-5, atol=1e-5)


def _rule(i, j):
    return (abs(i + L - N - j) < 9) | (j < 2) | ((i // 3 + j // 5) % 4 == 0) | (j < 80) & (i < 48)


@pytest.mark.parametrize(("causal", "names"), [(True, ("key_bias", "sinks")), (False, ())])
def test_blocks_of_several_tiles_equal_the_reference(causal, names):
    rng = np.random.default_rng(0)
    shapes = {"query": (1, N, H, D), "key": (1, L, G, D), "value": (1, L, G, D), "key_bias": (1, L), "sinks": (H,)}
    arrays = {name: rng.normal(size=shapes[name]).astype(np.float32) for name in ("query", "key", "value", *names)}
    dout, dlse = (rng.normal(size=shape).astype(np.float32) for shape in ((1, N, H, D), (1, H, N)))
    index = bsa.from_rule(_rule, **SIZES)
    assert {-1, 0} <= set(np.asarray(index.tile_of).ravel())

    def loss(function, arrays):
        out, lse = function(index=index, causal=causal, **arrays)
        return jnp.sum(out * dout) + jnp.sum(lse * dlse), (out, lse)

    kernels = functools.partial(bsa.block_sparse_attention, implementation="gpu_interpret", return_lse=True)
    ours, theirs = (
        jax.jit(jax.grad(functools.partial(loss, function), has_aux=True), compiler_options=QUICK)(arrays)
        for function in (kernels, reference.block_sparse_attention)
    )
    for mine, other in zip(jax.tree.leaves(ours), jax.tree.leaves(theirs), strict=True):
        np.testing.assert_allclose(mine, other, **EXACT)


@pytest.mark.parametrize(("own_queries", "near"), [(True, None), (False, None), (True, [[True, False], [False, True]])])
def test_lists_hold_the_same_blocks_with_open_ones_first(own_queries, near):
    rng = np.random.default_rng(0)
    mask = rng.random((2, 3, 2, 2)) < 0.7
    index = bsa.from_block_mask(mask, **SIZES)
    index = index if own_queries else index.transposed()
    near = None if near is None else np.asarray(near)[None, None]
    lists = gpu_parts.lists(index, True, own_queries=own_queries, near=near)
    table = {name: np.asarray(leaf) for name, leaf in lists.items()}
    seen = np.tri(N, L, L - N, dtype=bool)
    for place in np.ndindex(index.counts.shape):
        count, opens = table["counts"][place], table["opens"][place]
        listed = table["ids"][place][:count]
        assert sorted(listed) == sorted(np.asarray(index.indices)[place][:count])
        for entry, block in enumerate(listed):
            row, column = (place[2], block) if own_queries else (block, place[2])
            pairs = seen[row * 48 : (row + 1) * 48, column * 80 : (column + 1) * 80]
            there = pairs.shape[1] == 80 if own_queries else pairs.shape[0] == 48
            whole = pairs.all() and there and (near is None or not near[0, 0, place[2], block])
            assert (entry < opens) == whole


@pytest.mark.parametrize(("own_queries", "bidirectional"), [(True, True), (False, True), (True, False)])
def test_near_blocks_are_those_with_a_pair_that_is_in_neither_end(own_queries, bidirectional):
    rng = np.random.default_rng(0)
    index = bsa.from_block_mask(np.ones((1, 1, 5, 4), bool), queries=70, keys=60, block_q=16, block_k=16)
    queries, keys = (np.sort(rng.choice(600, (2, size)), axis=1).astype(np.int32) for size in (70, 60))
    bias = PositionBias(np.zeros((8, H), np.float32), queries, keys, bidirectional, 40)
    near = gpu_positions.near(bias, index if own_queries else index.transposed(), own_queries=own_queries)
    near = np.asarray(near)[:, 0] if own_queries else np.asarray(near)[:, 0].swapaxes(1, 2)
    first, *_, last = bias.steps().places
    relative = keys[:, None, :] - queries[:, :, None]
    for b, row, column in np.ndindex(2, 5, 4):
        pairs = relative[b, row * 16 : (row + 1) * 16, column * 16 : (column + 1) * 16]
        assert near[b, row, column] == (not (np.all(pairs < first) or np.all(pairs >= last)))
    assert near.any() and not near.all()


def test_lists_without_masks_are_taken_as_they_are():
    index = bsa.from_block_mask(np.ones((1, 1, 2, 2), bool), queries=96, keys=160, block_q=48, block_k=80)
    assert set(gpu_parts.lists(index, False, own_queries=True)) == {"ids", "counts"}


@pytest.mark.parametrize(
    ("block_q", "block_k", "width", "dtype", "tiles"),
    [
        (128, 128, 128, "bfloat16", (128, 128)),
        (512, 512, 256, "float16", (128, 64)),
        (96, 320, 64, "bfloat16", (32, 64)),
        (128, 128, 64, "float32", (64, 16)),
    ],
)
def test_tiles_divide_blocks_and_follow_width_and_dtype(block_q, block_k, width, dtype, tiles):
    index = bsa.from_block_mask(
        np.ones((1, 1, 2, 2), bool), queries=2 * block_q, keys=2 * block_k, block_q=block_q, block_k=block_k
    )
    plan = gpu_parts.make_plan("forward", index, width, dtype)
    assert (plan.own, plan.listed) == tiles


@pytest.mark.parametrize("implementation", ["gpu", "gpu_interpret"])
@pytest.mark.parametrize(
    ("block", "width", "dtype", "message"),
    [
        (40, 64, "float32", "multiples of 16; got block_q=40, the nearest is 32"),
        (48, 288, "float32", "heads of up to 256; got a width of 288"),
        (48, 64, "float8_e4m3fn", "bfloat16, float16 and float32; got float8_e4m3fn"),
    ],
)
def test_what_the_kernels_cannot_take_is_refused_with_the_nearest(implementation, block, width, dtype, message):
    index = bsa.from_block_mask(np.ones((1, 1, 1, 1), bool), queries=block, keys=block, block_q=block, block_k=block)
    array = jax.ShapeDtypeStruct((1, block, 1, width), dtype)
    run = functools.partial(bsa.block_sparse_attention, index=index, implementation=implementation)
    with pytest.raises(NotImplementedError, match=message):
        jax.eval_shape(run, array, array, array)
