# SPDX-License-Identifier: Apache-2.0
"""Block-sparse attention: every implementation against the float32 reference with the dense mask, and what must not matter."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pallas_kernels import biased_flash_attention as dense
from pallas_kernels import block_sparse_attention as bsa
from pallas_kernels.block_sparse_attention import reference

B, H, G, D = 2, 4, 2, 8
N, L, P, Q = 37, 58, 16, 16
SIZES = dict(queries=N, keys=L, block_q=P, block_k=Q)
BLOCKS = (3, 4)
IMPLEMENTATIONS = ("xla", "gpu_interpret")
EXACT = dict(rtol=1e-5, atol=1e-5)
# Programs are long and run once.
QUICK = {"xla_backend_optimization_level": 0, "xla_llvm_disable_expensive_passes": True}


@functools.cache
def _inputs(seed=0, groups=G, queries=N, keys=L):
    rng = np.random.default_rng(seed)

    def draw(*shape):
        return rng.normal(size=shape).astype(np.float32)

    return {
        "query": draw(B, queries, H, D),
        "key": draw(B, keys, groups, D),
        "value": draw(B, keys, groups, D),
        "key_bias": np.where(rng.random((B, keys)) < 0.3, -np.inf, draw(B, keys)).astype(np.float32),
        "sinks": draw(H),
        "dout": draw(B, queries, H, D),
        "dlse": draw(B, H, queries),
    }


def _random_mask(seed, b=B, h=G):
    """Lists of very different lengths, some empty and one of all blocks, so that capacities agree."""
    rng = np.random.default_rng(seed)
    mask = rng.random((b, h, *BLOCKS)) < rng.choice([0.0, 0.2, 0.9], size=(b, h, BLOCKS[0], 1))
    mask[0, 0, 0] = True
    return mask


def _rule(i, j):
    return (abs(i + L - N - j) < 6) | (j < 2) | ((i // 3 + j // 5) % 4 == 0)


def _attend(implementation, query, key, value, index, **options):
    """Output and log-sum-exp; the reference when no implementation is named."""
    if implementation is None:
        return reference.block_sparse_attention(query, key, value, index, **options)
    options |= {"implementation": implementation, "return_lse": True}
    return bsa.block_sparse_attention(query, key, value, index, **options)


_run = jax.jit(_attend, static_argnums=0, static_argnames=("causal", "scale"), compiler_options=QUICK)


@functools.partial(jax.jit, static_argnums=(0, 5), compiler_options=QUICK)
def _gradients(implementation, index, dout, dlse, differentiable, causal):
    def loss(arrays):
        out, lse = _attend(implementation, index=index, causal=causal, **arrays)
        return jnp.sum(out * dout) + jnp.sum(jnp.where(jnp.isfinite(lse), lse, 0.0) * dlse)

    return jax.grad(loss)(differentiable)


CASES = {
    "plain": ((), False, "mask"),
    "causal": ((), True, "mask"),
    "bias_and_sinks": (("key_bias", "sinks"), False, "mask"),
    "tiles": ((), False, "rule"),
    "everything": (("key_bias", "sinks"), True, "rule"),
}


def _index(kind, seed=0, h=G):
    if kind == "rule":
        return bsa.from_rule(_rule, **SIZES)
    return bsa.from_block_mask(_random_mask(seed, h=h), **SIZES)


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
class TestImplementation:
    """What every implementation must do."""

    @pytest.mark.parametrize("case", CASES)
    def test_values_and_gradients_equal_the_reference(self, implementation, case):
        names, causal, kind = CASES[case]
        inputs, index = _inputs(), _index(kind)
        arrays = {name: inputs[name] for name in ("query", "key", "value", *names)}
        ours, theirs = (_run(which, index=index, causal=causal, **arrays) for which in (implementation, None))
        for mine, other in zip(ours, theirs, strict=True):
            np.testing.assert_allclose(mine, other, **EXACT)
        args = (index, inputs["dout"], inputs["dlse"], arrays, causal)
        ours, theirs = (_gradients(which, *args) for which in (implementation, None))
        for name, mine in ours.items():
            np.testing.assert_allclose(mine, theirs[name], err_msg=name, **EXACT)

    @settings(max_examples=12, deadline=None)
    @given(seed=st.integers(0, 2**16), causal=st.booleans())
    def test_any_lists_and_inputs(self, implementation, seed, causal):
        inputs, index = _inputs(seed), _index("mask", seed)
        names = ("query", "key", "value", "key_bias", "sinks")
        arrays = {name: inputs[name] for name in names}
        args = (index, inputs["dout"], inputs["dlse"], arrays, causal)
        ours, theirs = (_gradients(which, *args) for which in (implementation, None))
        for name, mine in ours.items():
            np.testing.assert_allclose(mine, theirs[name], err_msg=name, **EXACT)
        out, lse = _run(implementation, index=index, causal=causal, **arrays)
        expected, expected_lse = _run(None, index=index, causal=causal, **arrays)
        np.testing.assert_allclose(out, expected, **EXACT)
        np.testing.assert_allclose(lse, expected_lse, **EXACT)

    @pytest.mark.parametrize(("b", "h"), [(1, 1), (1, H), (B, 1), (B, H)])
    def test_lists_are_shared_as_their_shape_says(self, implementation, b, h):
        inputs = _inputs()
        index = bsa.from_block_mask(_random_mask(1, b, h), **SIZES)
        arrays = {name: inputs[name] for name in ("query", "key", "value")}
        args = (index, inputs["dout"], inputs["dlse"], arrays, False)
        ours, theirs = (_gradients(which, *args) for which in (implementation, None))
        for name, mine in ours.items():
            np.testing.assert_allclose(mine, theirs[name], err_msg=name, **EXACT)

    def test_all_blocks_equal_dense_attention(self, implementation):
        inputs = _inputs()
        index = bsa.from_block_mask(np.ones((1, 1, *BLOCKS), bool), **SIZES)
        args = [inputs[name] for name in ("query", "key", "value")]
        for softmax in bsa.api.SOFTMAX:
            options = {"key_bias": inputs["key_bias"], "softmax": softmax, "causal": True}
            out = bsa.block_sparse_attention(*args, index, implementation=implementation, **options)
            np.testing.assert_allclose(out, dense.biased_attention(*args, **options), **EXACT)

    def test_the_order_of_a_list_does_not_matter_and_runs_repeat(self, implementation):
        inputs, index = _inputs(), _index("rule")
        arrays = {name: inputs[name] for name in ("query", "key", "value", "key_bias")}
        rng = np.random.default_rng(0)
        indices, tile_of = np.array(index.indices), np.array(index.tile_of)
        for row in np.ndindex(index.counts.shape):
            order = rng.permutation(index.counts[row])
            indices[row][: order.size] = indices[row][order]
            tile_of[row][: order.size] = tile_of[row][order]
        shuffled = dataclasses.replace(index, indices=indices, tile_of=tile_of)
        assert not np.array_equal(indices, index.indices)
        args = (inputs["dout"], inputs["dlse"], arrays, True)
        first, again = (_gradients(implementation, index, *args) for _ in range(2))
        other = _gradients(implementation, shuffled, *args)
        for name, mine in first.items():
            np.testing.assert_array_equal(mine, again[name], err_msg=name)
            np.testing.assert_allclose(mine, other[name], err_msg=name, **EXACT)

    def test_rows_with_nothing_are_zero_with_finite_gradients(self, implementation):
        inputs = _inputs()
        mask = np.ones((B, 1, *BLOCKS), bool)
        mask[0, :, 1] = False
        index = bsa.from_block_mask(mask, **SIZES)
        gone = np.zeros((B, L), np.float32)
        gone[1] = -np.inf
        arrays = {name: inputs[name] for name in ("query", "key", "value")} | {"key_bias": gone}
        out, lse = _run(implementation, index=index, **arrays)
        empty = np.zeros((B, N), bool)
        empty[0, P : 2 * P] = empty[1] = True
        assert not np.any(np.asarray(out)[empty]) and np.all(np.any(np.asarray(out)[~empty], axis=-1))
        assert np.all(np.isneginf(np.moveaxis(lse, 1, 2)[empty]))
        grads = _gradients(implementation, index, inputs["dout"], inputs["dlse"], arrays, False)
        assert all(np.all(np.isfinite(grad)) for grad in grads.values())
        assert not np.any(np.asarray(grads["query"])[empty]) and not np.any(grads["key"][1])
        sink = np.full(H, 0.5, np.float32)
        with_sink, lse = _run(implementation, index=index, sinks=sink, **arrays)
        assert not np.any(np.asarray(with_sink)[empty])
        np.testing.assert_allclose(np.moveaxis(lse, 1, 2)[empty], 0.5, rtol=1e-6)

    def test_bfloat16(self, implementation):
        inputs, index = _inputs(), _index("mask")
        arrays = {name: inputs[name].astype(jnp.bfloat16) for name in ("query", "key", "value")}
        exact = {name: array.astype(np.float32) for name, array in arrays.items()}
        out, lse = _run(implementation, index=index, causal=True, **arrays)
        expected, expected_lse = _run(None, index=index, causal=True, **exact)
        assert out.dtype == jnp.bfloat16 and lse.dtype == jnp.float32
        np.testing.assert_allclose(out.astype(np.float32), expected, rtol=2e-2, atol=2e-2)
        np.testing.assert_allclose(lse, expected_lse, rtol=2e-2, atol=2e-2)
        dout, dlse = inputs["dout"].astype(jnp.bfloat16), inputs["dlse"]
        ours = _gradients(implementation, index, dout, dlse, arrays, True)
        theirs = _gradients(None, index, dout.astype(np.float32), dlse, exact, True)
        for name, mine in ours.items():
            assert mine.dtype == jnp.bfloat16
            np.testing.assert_allclose(mine.astype(np.float32), theirs[name], rtol=2e-2, atol=4e-2, err_msg=name)

    def test_huge_logits_do_not_overflow(self, implementation):
        inputs, index = _inputs(), _index("mask")
        arrays = {name: inputs[name] for name in ("query", "key", "value")}
        out, _ = _run(implementation, index=index, scale=1e4, **arrays)
        expected, _ = _run(None, index=index, scale=1e4, **arrays)
        np.testing.assert_allclose(out, expected, rtol=1e-3, atol=1e-3)

    def test_outputs_over_different_keys_can_be_joined(self, implementation):
        inputs = _inputs()
        args = {name: inputs[name] for name in ("query", "key", "value", "key_bias")}
        whole = np.ones((1, 1, *BLOCKS), bool)
        part = _random_mask(2, 1, 1)
        outs, lses = zip(
            *(_run(implementation, index=bsa.from_block_mask(m, **SIZES), **args) for m in (part, whole & ~part)),
            strict=True,
        )
        total = np.logaddexp(*lses)
        shares = [np.moveaxis(np.exp(lse - total), 1, 2)[..., None] for lse in lses]
        expected, expected_lse = _run(implementation, index=bsa.from_block_mask(whole, **SIZES), **args)
        np.testing.assert_allclose(sum(s * o for s, o in zip(shares, outs, strict=True)), expected, **EXACT)
        np.testing.assert_allclose(total, expected_lse, **EXACT)

    def test_lists_are_data_and_compile_once(self, implementation):
        inputs = _inputs()
        args = [inputs[name] for name in ("query", "key", "value")]
        traces = []

        @jax.jit
        def run(scores, *args):
            traces.append(1)
            index = bsa.from_scores(scores, 3, **SIZES)
            return bsa.block_sparse_attention(*args, index, implementation=implementation)

        rng = np.random.default_rng(0)
        first, second = (run(rng.normal(size=(B, H, *BLOCKS)), *args) for _ in range(2))
        assert len(traces) == 1 and not np.allclose(first, second)


def test_work_of_the_plain_form_follows_the_lists():
    """Keys that no list names are never touched: not a number there changes nothing."""
    inputs = _inputs()
    mask = np.zeros((1, 1, *BLOCKS), bool)
    mask[..., :2] = True
    index = bsa.from_block_mask(mask, **SIZES)
    arrays = {name: np.array(inputs[name]) for name in ("query", "key", "value")}
    expected = _run("xla", index=index, **arrays)[0]
    for name in ("key", "value"):
        arrays[name][:, 2 * Q :] = np.nan
    np.testing.assert_array_equal(_run("xla", index=index, **arrays)[0], expected)


def test_nothing_of_the_size_of_the_map_is_made():
    length, block = 2048, 64
    shape = jax.ShapeDtypeStruct((1, length, 2, 8), jnp.float32)
    scores = jax.ShapeDtypeStruct((1, 2, length // block, length // block), jnp.float32)

    def loss(query, key, value, scores):
        index = bsa.from_scores(scores, 4, queries=length, keys=length, block_q=block, block_k=block)
        return jnp.sum(bsa.block_sparse_attention(query, key, value, index, implementation="xla") ** 2)

    jaxpr = jax.make_jaxpr(jax.grad(loss, argnums=(0, 1, 2)))(shape, shape, shape, scores)
    assert max(_sizes(jaxpr.jaxpr)) < length * length // 4


def _sizes(jaxpr):
    """Sizes of all intermediate arrays, those inside loops included."""
    for equation in jaxpr.eqns:
        yield from (variable.aval.size for variable in equation.outvars if hasattr(variable.aval, "size"))
        for value in equation.params.values():
            for inner in value if isinstance(value, tuple | list) else (value,):
                inner = getattr(inner, "jaxpr", inner)
                if hasattr(inner, "eqns"):
                    yield from _sizes(inner)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"query": np.zeros((B, N, D))}, r"must be \[B, N, heads, d\]"),
        ({"value": np.zeros((B, L + 1, G, D))}, "to fit the query"),
        ({"key": np.zeros((B, L, 3, D)), "value": np.zeros((B, L, 3, D))}, "got 3 and 4"),
        ({"query": np.zeros((B, N + 1, H, D))}, "index is for 37 queries and 58 keys; got 38 and 58"),
        ({"index": bsa.from_block_mask(np.ones((1, 3, *BLOCKS), bool), **SIZES)}, "h one of 1, 2, 4"),
        ({"key_bias": np.zeros((B, N))}, r"key_bias must be \[B, L\]"),
        ({"softmax": "softmax1"}, "softmax='softmax1'"),
        ({"softmax": "off_by_one", "sinks": np.zeros(H)}, "a sink of zeros itself"),
        ({"sinks": np.zeros(G)}, r"sinks must be \[H\]"),
    ],
)
def test_shapes_that_do_not_fit_are_refused(change, message):
    inputs = {name: _inputs()[name] for name in ("query", "key", "value")} | {"index": _index("mask")} | change
    with pytest.raises(ValueError, match=message):
        bsa.block_sparse_attention(**inputs)
