# SPDX-License-Identifier: Apache-2.0
"""The TPU kernels of block-sparse attention in Pallas' interpreter, which finds reads out of bounds too."""

import dataclasses
import functools
import os

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels import block_sparse_attention as bsa
from pallas_kernels.block_sparse_attention import reference, tpu_parts, tpu_plan

# Two blocks of queries and two of keys, the last of each cut short.
N, L, D, BLOCK = 200, 250, 8, 128
SIZES = dict(queries=N, keys=L, block_q=BLOCK, block_k=BLOCK)
EXACT = dict(rtol=1e-5, atol=1e-5)
# The interpreter's programs are long and run once.
QUICK = {"xla_backend_optimization_level": 0, "xla_llvm_disable_expensive_passes": True}


def _inputs(heads=2, groups=1, seed=0, queries=N, keys=L):
    rng = np.random.default_rng(seed)
    shapes = {"query": (queries, heads), "key": (keys, groups), "value": (keys, groups), "dout": (queries, heads)}
    arrays = {name: rng.normal(size=(1, *shape, D)).astype(np.float32) for name, shape in shapes.items()}
    dlse = rng.normal(size=(1, heads, queries)).astype(np.float32)
    key_bias = np.where(rng.random((1, keys)) < 0.2, -np.inf, rng.normal(size=(1, keys))).astype(np.float32)
    return arrays | {"key_bias": key_bias, "sinks": rng.normal(size=heads).astype(np.float32), "dlse": dlse}


def _loss(function, index, dout, dlse, causal, arrays):
    out, lse = function(index=index, causal=causal, **arrays)
    total = jnp.sum(out.astype(jnp.float32) * dout) + jnp.sum(jnp.where(jnp.isfinite(lse), lse, 0.0) * dlse)
    return total, (out, lse)


def _kernels(index, dout, dlse, causal, arrays):
    function = functools.partial(bsa.block_sparse_attention, implementation="interpret", return_lse=True)
    return jax.grad(functools.partial(_loss, function, index, dout, dlse, causal), has_aux=True)(arrays)


_run = jax.jit(_kernels, static_argnums=3, compiler_options=QUICK)


@functools.partial(jax.jit, static_argnums=3)
def _expected(index, dout, dlse, causal, arrays):
    function = functools.partial(_loss, reference.block_sparse_attention, index, dout, dlse, causal)
    return jax.grad(function, has_aux=True)(arrays)


def _compare(index, causal, names, inputs, run=_run, **tolerance):
    arrays = {name: inputs[name] for name in ("query", "key", "value", *names)}
    grads, outs = run(index, inputs["dout"], inputs["dlse"], causal, arrays)
    exact = {name: array.astype(np.float32) for name, array in arrays.items()}
    expected_grads, expected_outs = _expected(index, inputs["dout"], inputs["dlse"], causal, exact)
    for mine, other in zip(outs, expected_outs, strict=True):
        np.testing.assert_allclose(mine.astype(np.float32), other, **(tolerance or EXACT))
    for name, mine in grads.items():
        np.testing.assert_allclose(mine.astype(np.float32), expected_grads[name], err_msg=name, **(tolerance or EXACT))
    return grads, outs


def _lists(index, rng):
    """The same tiles with lists of any length in any order, the first empty."""
    order = rng.permuted(np.broadcast_to(np.arange(2), index.indices.shape), axis=-1)
    counts = rng.integers(0, 3, size=index.counts.shape)
    counts[..., 0] = 0
    tile_of = rng.integers(-1, index.tiles.shape[0], size=index.indices.shape)
    fields = {"indices": order, "counts": counts, "tile_of": tile_of}
    return dataclasses.replace(index, **{name: field.astype(np.int32) for name, field in fields.items()})


def test_everything_at_once_equals_the_reference_for_any_lists():
    """Shared key heads, causal, tiles, bias, sinks, gradients of all; the same program whatever the lists hold."""
    index = bsa.from_rule(lambda i, j: (abs(i - j) < 70) | (j % 5 == 0) | (i // 40 % 2 == 0), **SIZES)
    assert index.tiles is not None and index.indices.shape[-1] == 2
    names = ("key_bias", "sinks")
    rng = np.random.default_rng(0)
    first = _compare(index, True, names, _inputs())
    again = _compare(index, True, names, _inputs())
    for mine, other in zip(jax.tree.leaves(first), jax.tree.leaves(again), strict=True):
        np.testing.assert_array_equal(mine, other)
    for seed in (1, 2):
        _compare(_lists(index, rng), True, names, _inputs(seed=seed))
    assert _run._cache_size() == 1


def test_bfloat16_with_lists_for_every_head_and_a_length_that_cuts_the_last_block():
    inputs = _inputs(groups=2)
    inputs |= {name: inputs[name].astype(jnp.bfloat16) for name in ("query", "key", "value")}
    mask = np.ones((1, 2, 2, 2), bool)
    mask[0, 0, 1, 0] = mask[0, 1, 0, 1] = False
    _, (out, lse) = _compare(bsa.from_block_mask(mask, **SIZES), False, (), inputs, rtol=2e-2, atol=4e-2)
    assert out.dtype == jnp.bfloat16 and lse.dtype == jnp.float32


@pytest.mark.skipif(
    len(getattr(os, "sched_getaffinity", lambda _: (0, 1))(0)) < 2,
    reason="the interpreter's copies wait for ever for a second thread of XLA's pool where the process has one core",
)
@pytest.mark.parametrize("block", [128, 512])
def test_keys_that_do_not_fit_are_fetched_as_they_are_listed(block, monkeypatch):
    """Lists of one, of two and of no blocks, on both sides of the ends of buffers."""
    monkeypatch.setattr(tpu_parts, "fits", lambda *_: False)
    length = 4 * block - 40
    inputs = _inputs(heads=2, groups=2, queries=3 * 128, keys=length)
    mask = np.array([[1, 0, 1, 1], [0, 0, 0, 0], [0, 1, 0, 1]], bool)
    index = bsa.from_block_mask(mask[None, None], queries=3 * 128, keys=length, block_q=128, block_k=block)
    if block == 128:
        # Traced anew, as what fits is no argument.
        fresh = jax.jit(lambda *args: _kernels(*args), static_argnums=3, compiler_options=QUICK)
        _compare(index, True, ("key_bias",), inputs, run=fresh)
        return
    arrays = {name: inputs[name] for name in ("query", "key", "value", "key_bias")}
    run = functools.partial(bsa.block_sparse_attention, implementation="interpret", causal=True, return_lse=True)
    found = jax.jit(lambda arrays: run(index=index, **arrays), compiler_options=QUICK)(arrays)
    for mine, other in zip(found, reference.block_sparse_attention(index=index, causal=True, **arrays), strict=True):
        np.testing.assert_allclose(mine, other, **EXACT)


def test_single_blocks_take_the_branch_without_masks_where_they_can(monkeypatch):
    """With one block in an item, pairs of whole blocks are worked without masks, and the diagonal with them."""
    monkeypatch.setattr(tpu_plan, "_ITEM_ROWS", BLOCK)
    inputs = _inputs(heads=1, queries=256, keys=384)
    sizes = dict(queries=256, keys=384, block_q=BLOCK, block_k=BLOCK)
    index = bsa.from_block_mask(np.ones((1, 1, 2, 3), bool), **sizes)
    assert tpu_plan.make_plan(index, D).width == 1
    _compare(index, True, (), inputs, run=jax.jit(_kernels, static_argnums=3, compiler_options=QUICK))


def test_large_blocks_are_worked_in_pieces():
    """640 = 5 x 128 on one side, and pieces of 256 x 256 in two chunks."""
    sizes = dict(queries=500, keys=640, block_q=256, block_k=640)
    inputs = _inputs(heads=1, queries=500, keys=640)
    index = bsa.from_rule(lambda i, j: (i + j) % 3 > 0, **sizes)
    arrays = {name: inputs[name] for name in ("query", "key", "value")}
    plan = tpu_plan.make_plan(index, D)
    assert (plan.own, plan.listed, plan.blocks) == (256, 128, 5)
    run = functools.partial(bsa.block_sparse_attention, implementation="interpret", return_lse=True)
    out, lse = jax.jit(run, compiler_options=QUICK)(index=index, **arrays)
    expected, expected_lse = reference.block_sparse_attention(index=index, **arrays)
    np.testing.assert_allclose(out, expected, **EXACT)
    np.testing.assert_allclose(lse, expected_lse, **EXACT)


def _abstract(length, block, width=128, heads=1):
    array = jax.ShapeDtypeStruct((1, length, heads, width), jnp.bfloat16)
    blocks = -(-length // block)
    index = bsa.BlockIndex(
        jax.ShapeDtypeStruct((1, 1, blocks, 2), jnp.int32),
        jax.ShapeDtypeStruct((1, 1, blocks), jnp.int32),
        *(None, None, length, length, block, block),
    )
    return array, array, array, index


@pytest.mark.parametrize("implementation", ["tpu", "interpret"])
def test_refusals_name_what_would_do(implementation):
    run = functools.partial(bsa.block_sparse_attention, implementation=implementation)
    with pytest.raises(NotImplementedError, match="block_q=64 is not a multiple of 128; the nearest supported is 128"):
        jax.eval_shape(run, *_abstract(512, 64))


def test_keys_and_queries_may_be_more_than_fit():
    *arrays, index = _abstract(2**20, 512)
    run = functools.partial(bsa.block_sparse_attention, implementation="interpret")
    grads = jax.grad(lambda q, k, v, i: jnp.sum(run(q, k, v, i)).astype(jnp.float32), argnums=(0, 1, 2))
    assert [leaf.shape for leaf in jax.eval_shape(grads, *arrays, index)] == [leaf.shape for leaf in arrays]


def test_what_only_the_gradient_cannot_do_is_refused_before_the_forward_pass_is_chosen(monkeypatch):
    """Scratch between what the two passes need: the output alone is fine, and its gradient says what is missing."""
    *arrays, index = _abstract(1024, 512)
    monkeypatch.setattr(tpu_plan, "_VMEM_BYTES", 8 * 2**20)
    run = functools.partial(bsa.block_sparse_attention, implementation="interpret")
    jax.eval_shape(run, *arrays, index)
    with pytest.raises(NotImplementedError, match=r"keys of one head need .* MiB of VMEM"):
        jax.eval_shape(jax.grad(lambda q, k, v, i: jnp.sum(run(q, k, v, i)).astype(jnp.float32)), *arrays, index)
