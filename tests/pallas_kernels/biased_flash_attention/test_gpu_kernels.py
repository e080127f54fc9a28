# SPDX-License-Identifier: Apache-2.0
"""GPU kernels of biased attention and column statistics: in Pallas' interpreter against the reference, and compiled."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels.biased_flash_attention import attention_column_stats, biased_attention, gpu, reference

# Two blocks of queries and three of keys, the last of each cut short; the last queries alone are a block by themselves.
B, Q, K, H, G, D = 2, 130, 260, 2, 1, 8
QUICK = {"xla_backend_optimization_level": 0, "xla_llvm_disable_expensive_passes": True}
EXACT = dict(rtol=1e-5, atol=1e-5)


@functools.cache
def _inputs(seed=0):
    rng = np.random.default_rng(seed)
    arrays = {"query": (B, Q, H, D), "key": (B, K, G, D), "value": (B, K, G, D), "dout": (B, Q, H, D)}
    arrays = {name: rng.normal(size=shape).astype(np.float32) for name, shape in arrays.items()}
    bias = np.where(rng.random((B, K)) < 0.3, -np.inf, rng.normal(size=(B, K))).astype(np.float32)
    # The second row of the batch has no key.
    bias[1] = -np.inf
    return arrays | {"key_bias": bias, "query_weight": rng.random((B, Q)).astype(np.float32)}


@pytest.mark.parametrize(("softmax", "causal"), [("off_by_one", True), ("standard", False)])
def test_values_and_gradients_equal_the_reference(softmax, causal):
    inputs = _inputs()
    arrays = {name: inputs[name] for name in ("query", "key", "value", "key_bias")}

    def loss(function, arrays):
        out = function(**arrays, causal=causal, softmax=softmax, scale=0.4)
        return jnp.sum(out * inputs["dout"]), out

    ours = functools.partial(loss, functools.partial(biased_attention, implementation="gpu_interpret"))
    grads, out = jax.jit(jax.grad(ours, has_aux=True), compiler_options=QUICK)(arrays)
    theirs = functools.partial(loss, reference.biased_attention)
    expected_grads, expected = jax.jit(jax.grad(theirs, has_aux=True))(arrays)
    np.testing.assert_allclose(out, expected, **EXACT)
    assert not np.any(out[1]) and np.all(np.any(out[0], axis=-1))
    for name, grad in grads.items():
        assert np.all(np.isfinite(grad)) and not np.any(grad[1]), name
        np.testing.assert_allclose(grad, expected_grads[name], err_msg=name, **EXACT)


@pytest.mark.parametrize(("statistic", "causal", "softmax"), [("sum", True, "off_by_one"), ("max", False, "standard")])
def test_column_statistics_equal_the_reference(statistic, causal, softmax):
    inputs = _inputs()
    options = {"statistic": statistic, "causal": causal, "softmax": softmax}
    arrays = {name: inputs[name] for name in ("query", "key", "key_bias", "query_weight")}
    run = functools.partial(attention_column_stats, implementation="gpu_interpret", **options)
    stats = jax.jit(run, compiler_options=QUICK)(**arrays)
    np.testing.assert_allclose(stats, reference.attention_column_stats(**arrays, **options), **EXACT)
    # The removed keys receive nothing, and the others something.
    assert np.array_equal(np.any(np.asarray(stats) > 0, axis=1), np.isfinite(inputs["key_bias"]))


def test_the_gradient_of_the_statistics_is_that_of_the_plain_form():
    arrays = [_inputs()[name][:1, :40] for name in ("query", "key")]
    cotangent = np.random.default_rng(0).normal(size=(1, H, 40)).astype(np.float32)

    def loss(implementation, query, key):
        stats = attention_column_stats(query, key, causal=True, scale=0.3, implementation=implementation)
        return jnp.sum(stats * cotangent)

    ours, theirs = (
        jax.jit(jax.grad(functools.partial(loss, name), argnums=(0, 1)))(*arrays) for name in ("gpu_interpret", "xla")
    )
    for mine, other in zip(ours, theirs, strict=True):
        np.testing.assert_allclose(mine, other, **EXACT)


def test_bfloat16_keeps_its_dtype_and_a_float32_softmax():
    args = [_inputs()[name].astype(jnp.bfloat16) for name in ("query", "key", "value")]
    out = jax.jit(functools.partial(biased_attention, implementation="gpu_interpret"), compiler_options=QUICK)(*args)
    expected = reference.biased_attention(*(array.astype(np.float32) for array in args))
    assert out.dtype == jnp.bfloat16
    np.testing.assert_allclose(out.astype(np.float32), expected, atol=2e-2)


@pytest.mark.parametrize(
    ("queries", "keys", "block_q", "block_k"), [(1, 197, 16, 128), (40, 64, 64, 64), (577, 4096, 128, 128)]
)
def test_blocks_are_as_large_as_tiles_unless_the_lengths_are_short(queries, keys, block_q, block_k):
    index = gpu.all_blocks(queries, keys, False)
    assert (index.block_q, index.block_k) == (block_q, block_k)
    assert index.density() == 1


@pytest.mark.parametrize(("queries", "keys"), [(300, 300), (130, 450), (1, 300)])
def test_causal_lists_hold_the_blocks_up_to_the_diagonal(queries, keys):
    index = gpu.all_blocks(queries, keys, True)
    seen = np.tri(queries, keys, keys - queries, dtype=bool)
    listed = np.asarray(index.block_mask()[0, 0])
    for row, column in np.ndindex(listed.shape):
        rows = slice(row * index.block_q, (row + 1) * index.block_q)
        columns = slice(column * index.block_k, (column + 1) * index.block_k)
        assert listed[row, column] == np.any(seen[rows, columns])


def test_what_the_kernels_cannot_do_is_refused_by_name_and_left_to_the_plain_form_otherwise(monkeypatch):
    args = [_inputs()[name] for name in ("query", "key", "value")]
    bias = np.zeros((1, H, Q, K), np.float32)
    with pytest.raises(NotImplementedError, match="has no GPU kernel; key_bias has"):
        biased_attention(*args, bias=bias, implementation="gpu")
    with pytest.raises(NotImplementedError, match="has no GPU kernel"):
        attention_column_stats(*args[:2], bias=bias, implementation="gpu_interpret")
    with pytest.raises(NotImplementedError, match="as wide as keys"):
        biased_attention(*args[:2], args[2][..., :4], implementation="gpu")
    with pytest.raises(NotImplementedError, match="heads of up to 256; got a width of 264"):
        biased_attention(*(np.tile(array, 33) for array in args), implementation="gpu")
    monkeypatch.setattr("pallas_kernels.dispatch.preference", lambda: ("gpu", "xla"))
    np.testing.assert_array_equal(
        biased_attention(*args, bias=bias), biased_attention(*args, bias=bias, implementation="xla")
    )
