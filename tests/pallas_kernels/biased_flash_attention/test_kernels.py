# SPDX-License-Identifier: Apache-2.0
"""TPU and GPU kernels of biased attention and column statistics: in the interpreters against the reference, and compiled."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from experiments.aot import gpu as card
from pallas_kernels.biased_flash_attention import (
    api,
    attention_column_stats,
    biased_attention,
    gpu,
    over_blocks,
    reference,
    tpu,
)
from pallas_kernels.position_bias import PositionBias
from tests.pallas_kernels.tpu_compiler import CHIPS, compile_for

# Two blocks of queries and two or three of keys, the last of each cut short; the last queries alone are a block by themselves.
B, Q, K, H, G, D = 2, 130, 260, 2, 1, 8
QUICK = {"xla_backend_optimization_level": 0, "xla_llvm_disable_expensive_passes": True}
EXACT = dict(rtol=1e-5, atol=1e-5)
# Each platform's kernels by the name that runs them on a CPU.
INTERPRETED = {"interpret": tpu.KERNELS, "gpu_interpret": gpu.KERNELS}


@functools.cache
def _inputs(seed=0):
    rng = np.random.default_rng(seed)
    arrays = {"query": (B, Q, H, D), "key": (B, K, G, D), "value": (B, K, G, D), "dout": (B, Q, H, D)}
    arrays = {name: rng.normal(size=shape).astype(np.float32) for name, shape in arrays.items()}
    bias = np.where(rng.random((B, K)) < 0.3, -np.inf, rng.normal(size=(B, K))).astype(np.float32)
    # The second row of the batch has no key.
    bias[1] = -np.inf
    return arrays | {"key_bias": bias, "query_weight": rng.random((B, Q)).astype(np.float32)}


@functools.cache
def _table(buckets=32):
    return np.random.default_rng(1).normal(size=(buckets, H)).astype(np.float32)


@functools.cache
def _positions():
    """Positions with gaps: near pairs and far ones on both sides within blocks, and blocks that are far as a whole."""
    rng = np.random.default_rng(2)
    queries, keys = (np.sort(rng.choice(400, (B, size)), axis=1) for size in (Q, K))
    queries[0, 128:] = -5000
    # Not in order either.
    keys[0, 128:256] = rng.permutation(np.arange(1000, 1128))
    keys[0, 256:] -= 2000
    return queries.astype(np.int32), keys.astype(np.int32)


@pytest.mark.parametrize(
    ("implementation", "bidirectional", "causal", "buckets", "max_distance"),
    [
        ("interpret", True, False, 12, 2000),
        ("gpu_interpret", True, False, 32, 128),
        ("gpu_interpret", False, True, 16, 300),
    ],
)
def test_a_bias_by_positions_equals_the_dense_one_and_so_do_all_gradients(
    implementation, bidirectional, causal, buckets, max_distance
):
    inputs, positions = _inputs(), _positions()
    arrays = {name: inputs[name] for name in ("query", "key", "value", "key_bias")}

    def loss(function, arrays, table, positions):
        bias = PositionBias(table, *positions, bidirectional, max_distance)
        out = function(**arrays, bias=bias, causal=causal, softmax="off_by_one", scale=0.4)
        return jnp.sum(out * inputs["dout"]), out

    def run(function, **options):
        differentiated = jax.grad(functools.partial(loss, function), argnums=(0, 1), has_aux=True)
        (grads, dtable), out = jax.jit(differentiated, **options)(arrays, _table(buckets), positions)
        return out, grads | {"table": dtable}

    out, grads = run(functools.partial(biased_attention, implementation=implementation), compiler_options=QUICK)
    expected, expected_grads = run(reference.biased_attention)
    np.testing.assert_allclose(out, expected, **EXACT)
    # Sums over tens of thousands of pairs, of which the reference adds each to its bucket in turn.
    np.testing.assert_allclose(grads.pop("table"), expected_grads.pop("table"), rtol=1e-5, atol=3e-5)
    for name, grad in grads.items():
        np.testing.assert_allclose(grad, expected_grads[name], err_msg=name, **EXACT)


@pytest.mark.parametrize(
    ("implementation", "softmax", "causal"),
    [("interpret", "off_by_one", True), ("gpu_interpret", "off_by_one", True), ("gpu_interpret", "standard", False)],
)
def test_values_and_gradients_equal_the_reference(implementation, softmax, causal):
    inputs = _inputs()
    arrays = {name: inputs[name] for name in ("query", "key", "value", "key_bias")}

    def loss(function, arrays):
        out = function(**arrays, causal=causal, softmax=softmax, scale=0.4)
        return jnp.sum(out * inputs["dout"]), out

    ours = functools.partial(loss, functools.partial(biased_attention, implementation=implementation))
    grads, out = jax.jit(jax.grad(ours, has_aux=True), compiler_options=QUICK)(arrays)
    theirs = functools.partial(loss, reference.biased_attention)
    expected_grads, expected = jax.jit(jax.grad(theirs, has_aux=True))(arrays)
    np.testing.assert_allclose(out, expected, **EXACT)
    assert not np.any(out[1]) and np.all(np.any(out[0], axis=-1))
    for name, grad in grads.items():
        assert np.all(np.isfinite(grad)) and not np.any(grad[1]), name
        np.testing.assert_allclose(grad, expected_grads[name], err_msg=name, **EXACT)


@pytest.mark.parametrize("implementation", INTERPRETED)
@pytest.mark.parametrize(
    ("statistic", "causal", "softmax", "by_positions"),
    [("sum", True, "off_by_one", False), ("max", False, "standard", True)],
)
def test_column_statistics_equal_the_reference(implementation, statistic, causal, softmax, by_positions):
    inputs = _inputs()
    options = {"statistic": statistic, "causal": causal, "softmax": softmax}
    arrays = {name: inputs[name] for name in ("query", "key", "key_bias", "query_weight")}
    arrays["bias"] = PositionBias(_table(12), *_positions(), True, 2000) if by_positions else None
    run = functools.partial(attention_column_stats, implementation=implementation, **options)

    def both(query, key, query_weight, **rest):
        # The pass over rows is that of attention.
        lse = biased_attention(
            query, key, key, causal=causal, softmax=softmax, return_lse=True, implementation=implementation, **rest
        )[1]
        return run(query, key, query_weight=query_weight, **rest), run(
            query, key, query_weight=query_weight, lse=lse, **rest
        )

    stats, given = jax.jit(both, compiler_options=QUICK)(**arrays)
    np.testing.assert_array_equal(stats, given)
    np.testing.assert_allclose(stats, reference.attention_column_stats(**arrays, **options), **EXACT)
    # The removed keys receive nothing, and the others something.
    assert np.array_equal(np.any(np.asarray(stats) > 0, axis=1), np.isfinite(inputs["key_bias"]))


@pytest.mark.parametrize("statistic", api.STATISTICS)
def test_plain_statistics_and_their_gradients_equal_the_reference(statistic):
    inputs = _inputs()
    arrays = {name: inputs[name] for name in ("query", "key", "query_weight")}

    def loss(function, arrays):
        stats = function(**arrays, causal=True, statistic=statistic)
        return jnp.sum(stats**2), stats

    ours = functools.partial(loss, functools.partial(attention_column_stats, implementation="xla"))
    grads, stats = jax.jit(jax.grad(ours, has_aux=True))(arrays)
    theirs = functools.partial(loss, reference.attention_column_stats)
    expected_grads, expected = jax.jit(jax.grad(theirs, has_aux=True))(arrays)
    np.testing.assert_allclose(stats, expected, **EXACT)
    for name, grad in grads.items():
        np.testing.assert_allclose(grad, expected_grads[name], err_msg=name, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("kernels", INTERPRETED.values(), ids=list(INTERPRETED))
def test_the_gradient_of_the_statistics_is_that_of_the_plain_form(kernels):
    arrays = [_inputs()[name][:1, :40] for name in ("query", "key")]
    cotangent = np.random.default_rng(0).normal(size=(1, H, 40)).astype(np.float32)
    static = (kernels, True, "standard", 0.3, "sum", False)
    bias = PositionBias(_table(), *(positions[:1, :40] for positions in _positions()))
    *grads, _, _, _, by_position = over_blocks._stats_backward(static, (*arrays, None, None, None, bias), cotangent)

    def plain(query, key, table):
        own = dataclasses.replace(bias, table=table)
        return jnp.sum(reference.attention_column_stats(query, key, bias=own, causal=True, scale=0.3) * cotangent)

    expected = jax.grad(plain, argnums=(0, 1, 2))(*arrays, bias.table)
    for grad, other in zip((*grads, by_position.table), expected, strict=True):
        np.testing.assert_allclose(grad, other, rtol=1e-4, atol=1e-5)


def test_statistics_have_a_gradient_under_the_kernels_own_rule():
    arrays = [_inputs()[name][:1, :40] for name in ("query", "key")]

    def loss(implementation, query, key):
        return jnp.sum(attention_column_stats(query, key, causal=True, implementation=implementation) ** 2)

    ours, theirs = (
        jax.jit(jax.grad(functools.partial(loss, name), argnums=(0, 1)))(*arrays) for name in ("gpu_interpret", "xla")
    )
    for mine, other in zip(ours, theirs, strict=True):
        np.testing.assert_allclose(mine, other, **EXACT)


def test_bfloat16_keeps_its_dtype_and_a_float32_softmax():
    args = [_inputs()[name].astype(jnp.bfloat16) for name in ("query", "key", "value")]
    bias = PositionBias(_table().astype(jnp.bfloat16), *_positions())
    run = functools.partial(biased_attention, implementation="gpu_interpret")
    out = jax.jit(run, compiler_options=QUICK)(*args, bias=bias)
    expected = reference.biased_attention(*(array.astype(np.float32) for array in args), bias=bias)
    assert out.dtype == jnp.bfloat16
    np.testing.assert_allclose(out.astype(np.float32), expected, atol=2e-2)


@pytest.mark.parametrize(
    ("kernels", "queries", "keys", "block_q", "block_k"),
    [
        (tpu.KERNELS, 1, 197, 128, 256),
        (tpu.KERNELS, 512, 1024, 512, 512),
        (tpu.KERNELS, 640, 700, 128, 384),
        (tpu.KERNELS, 600, 257, 128, 384),
        (tpu.KERNELS, 1300, 130, 512, 256),
        (gpu.KERNELS, 1, 197, 16, 128),
        (gpu.KERNELS, 40, 64, 64, 64),
        (gpu.KERNELS, 577, 4096, 128, 128),
    ],
)
def test_blocks_are_large_unless_the_padding_costs_more(kernels, queries, keys, block_q, block_k):
    index = kernels.all_blocks(queries, keys, False)
    assert (index.block_q, index.block_k) == (block_q, block_k)
    assert index.density() == 1


@pytest.mark.parametrize("kernels", INTERPRETED.values(), ids=list(INTERPRETED))
@pytest.mark.parametrize(("queries", "keys"), [(600, 600), (130, 900), (1, 300)])
def test_causal_lists_hold_the_blocks_up_to_the_diagonal(kernels, queries, keys):
    index = kernels.all_blocks(queries, keys, True)
    seen = np.tri(queries, keys, keys - queries, dtype=bool)
    listed = np.asarray(index.block_mask()[0, 0])
    for row, column in np.ndindex(listed.shape):
        rows = slice(row * index.block_q, (row + 1) * index.block_q)
        columns = slice(column * index.block_k, (column + 1) * index.block_k)
        assert listed[row, column] == np.any(seen[rows, columns])


@pytest.mark.parametrize("platform", ["tpu", "gpu"])
def test_what_the_kernels_cannot_do_is_refused_by_name_and_left_to_the_plain_form_otherwise(platform, monkeypatch):
    args = [_inputs()[name] for name in ("query", "key", "value")]
    bias = np.zeros((1, H, Q, K), np.float32)
    with pytest.raises(
        NotImplementedError, match=f"has no {platform.upper()} kernel; key_bias and a PositionBias have"
    ):
        biased_attention(*args, bias=bias, implementation=platform)
    with pytest.raises(NotImplementedError, match=f"has no {platform.upper()} kernel"):
        attention_column_stats(*args[:2], bias=bias, implementation=platform)
    with pytest.raises(NotImplementedError, match="as wide as keys"):
        biased_attention(*args[:2], args[2][..., :4], implementation=platform)
    monkeypatch.setattr("pallas_kernels.dispatch.preference", lambda: (platform, "xla"))
    np.testing.assert_array_equal(
        biased_attention(*args, bias=bias), biased_attention(*args, bias=bias, implementation="xla")
    )


def test_heads_too_wide_for_the_gpu_and_unknown_statistics_are_refused():
    args = [_inputs()[name] for name in ("query", "key", "value")]
    with pytest.raises(NotImplementedError, match="heads of up to 256; got a width of 264"):
        biased_attention(*(np.tile(array, 33) for array in args), implementation="gpu")
    with pytest.raises(ValueError, match="statistic='mean' is not one of"):
        attention_column_stats(*args[:2], statistic="mean")


@pytest.mark.parametrize("generation", CHIPS)
@pytest.mark.parametrize(
    ("length", "heads", "width", "causal", "buckets"),
    [(577, 16, 64, False, 0), (2048, 8, 128, True, 0), (700, 6, 64, False, 32), (1024, 6, 64, True, 32)],
)
def test_kernels_compile(length, heads, width, causal, buckets, generation):
    array = jax.ShapeDtypeStruct((1, length, heads, width), jnp.bfloat16)
    bias = jax.ShapeDtypeStruct((1, length), jnp.float32)
    table = jax.ShapeDtypeStruct((buckets, heads), jnp.float32) if buckets else None
    positions = jax.ShapeDtypeStruct((1, length), jnp.int32)
    options = {"causal": causal, "softmax": "off_by_one", "implementation": "tpu"}

    def run(query, key, value, bias, table, positions):
        def by_positions(table):
            return None if table is None else PositionBias(table, positions, positions, not causal)

        def loss(query, key, value, bias, table):
            own = {"key_bias": bias, "bias": by_positions(table)}
            return jnp.sum(biased_attention(query, key, value, **own, **options).astype(jnp.float32) ** 2)

        grads = jax.grad(loss, argnums=range(5))(query, key, value, bias, table)
        return grads, attention_column_stats(query, key, bias=by_positions(table), **options)

    _, compiled = compile_for(generation, run, array, array, array, bias, table, positions)
    text = compiled.as_text()
    assert "block_sparse_attention_key_gradients" in text and "attention_column_stats" in text


@pytest.fixture
def uncached():
    """What is compiled for a card that is not there cannot be read back from a cache."""
    before = jax.config.jax_enable_compilation_cache
    jax.config.update("jax_enable_compilation_cache", False)
    yield
    jax.config.update("jax_enable_compilation_cache", before)


@pytest.mark.skipif(bool(card.missing()), reason=f"no GPU compiler ({card.missing()}): {card.INSTALL}")
@pytest.mark.usefixtures("uncached")
@pytest.mark.parametrize(
    ("length", "width", "dtype"),
    [
        (1024, 128, "bfloat16"),
        (300, 80, "bfloat16"),
        (1024, 256, "bfloat16"),
        (300, 128, "float32"),
        (300, 256, "float32"),
    ],
)
def test_kernels_with_positions_spill_nothing_on_an_h200(length, width, dtype):
    array = jax.ShapeDtypeStruct((1, length, 4, width), dtype)
    table, positions = (jax.ShapeDtypeStruct(*spec) for spec in (((32, 4), "float32"), ((1, length), "int32")))

    def run(query, key, value, table, positions):
        def loss(query, key, value, table):
            bias = PositionBias(table, positions, positions)
            return jnp.sum(
                biased_attention(query, key, value, bias=bias, implementation="gpu").astype(jnp.float32) ** 2
            )

        bias = PositionBias(table, positions, positions)
        stats = attention_column_stats(query, key, bias=bias, implementation="gpu")
        return jax.grad(loss, argnums=range(4))(query, key, value, table), stats

    found = {kernel.name: kernel for kernel in card.compile_kernels(run, (*[array] * 3, table, positions), "h200")}
    passes = ("forward", "query_gradient", "key_gradients", "bucket_sums")
    names = [*(f"block_sparse_attention_{name}" for name in passes), "attention_column_stats"]
    for name in names:
        assert found[name].spill_stores == found[name].spill_loads == 0, found[name]
    # Loads run ahead of the products; buckets are summed in a loop within, which stops that.
    assert all(found[name].copies for name in names if "bucket" not in name)
