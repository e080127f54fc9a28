# SPDX-License-Identifier: Apache-2.0
"""Biased attention and its column sums: every implementation against a loop in NumPy and the float32 reference."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pallas_kernels.biased_flash_attention import (
    api,
    attention_column_stats,
    attention_map,
    attention_score_excess,
    biased_attention,
    reference,
)

B, Q, K, H, G, D = 2, 5, 7, 4, 2, 8
IMPLEMENTATIONS = ("xla",)


@functools.cache
def _inputs(queries=Q, keys=K, heads=H, groups=G, seed=0):
    rng = np.random.default_rng(seed)

    def draw(*shape):
        return rng.normal(size=shape).astype(np.float32)

    mask = np.where(rng.random((B, keys)) < 0.3, -np.inf, draw(B, keys)).astype(np.float32)
    mask[:, 0] = 0.0
    return {
        "query": draw(B, queries, heads, D),
        "key": draw(B, keys, groups, D),
        "value": draw(B, keys, groups, D),
        "key_bias": mask,
        "bias": draw(1, heads, queries, keys),
        "query_weight": rng.random((B, queries)).astype(np.float32),
    }


def _loop_map(query, key, key_bias=None, bias=None, causal=False, softmax="standard", scale=None):
    """The map written with loops, row by row, in float64."""
    batch, queries, heads, width = query.shape
    keys, share = key.shape[1], heads // key.shape[2]
    out = np.zeros((batch, heads, queries, keys))
    for b, h, q in np.ndindex(batch, heads, queries):
        row = np.full(keys, -np.inf)
        for k in range(keys):
            if causal and k > q + keys - queries:
                continue
            row[k] = (
                query[b, q, h].astype(np.float64) @ key[b, k, h // share] * (width**-0.5 if scale is None else scale)
            )
            row[k] += 0.0 if key_bias is None else key_bias[b, k]
            row[k] += 0.0 if bias is None else bias[b % bias.shape[0], h, q, k]
        weights = np.exp(row)
        total = weights.sum() + (softmax == "off_by_one")
        out[b, h, q] = weights / total if total > 0 else 0.0
    return out


CASES = {
    "plain": ((), {}),
    "off_by_one": ((), {"softmax": "off_by_one"}),
    "biases": (("key_bias", "bias"), {}),
    "biases_off_by_one": (("key_bias", "bias"), {"softmax": "off_by_one", "scale": 1.0}),
    "causal": (("bias",), {"causal": True}),
    "causal_masked": (("key_bias",), {"causal": True, "softmax": "off_by_one"}),
}


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
class TestImplementation:
    """What every implementation must do."""

    @pytest.mark.parametrize("case", CASES)
    def test_equals_a_loop(self, implementation, case):
        names, options = CASES[case]
        inputs = _inputs()
        options = options | {name: inputs[name] for name in names}
        expected = _loop_map(inputs["query"], inputs["key"], **options)
        value = np.repeat(inputs["value"], H // G, axis=2)
        out = biased_attention(
            inputs["query"], inputs["key"], inputs["value"], implementation=implementation, **options
        )
        np.testing.assert_allclose(out, np.einsum("bhqk,bkhd->bqhd", expected, value), rtol=2e-5, atol=2e-6)
        sums = attention_column_stats(
            inputs["query"],
            inputs["key"],
            query_weight=inputs["query_weight"],
            implementation=implementation,
            **options,
        )
        expected_sums = np.einsum("bhqk,bq->bhk", expected, inputs["query_weight"])
        np.testing.assert_allclose(sums, expected_sums, rtol=2e-5, atol=2e-6)
        whole = attention_map(inputs["query"], inputs["key"], **options)
        np.testing.assert_allclose(whole, expected, rtol=2e-5, atol=2e-6)

    @pytest.mark.parametrize("groups", [1, 4])
    def test_key_heads_are_shared_in_order(self, implementation, groups):
        inputs = _inputs(groups=groups)
        args = [inputs[name] for name in ("query", "key", "value")]
        out = biased_attention(*args, bias=inputs["bias"], implementation=implementation)
        full = [args[0], *(np.repeat(array, H // groups, axis=2) for array in args[1:])]
        repeated = biased_attention(*full, bias=inputs["bias"], implementation=implementation)
        np.testing.assert_allclose(out, repeated, rtol=1e-5, atol=1e-6)

    @pytest.mark.parametrize("softmax", api.SOFTMAX)
    def test_gradients_equal_those_of_the_reference(self, implementation, softmax):
        inputs = _inputs()
        names = ("query", "key", "value", "key_bias", "bias")
        target = np.random.default_rng(1).normal(size=(B, Q, H, D)).astype(np.float32)

        def loss(function, query, key, value, key_bias, bias, **options):
            out = function(query, key, value, key_bias=key_bias, bias=bias, softmax=softmax, **options)
            return jnp.sum((out - target) ** 2)

        args = [inputs[name] for name in names]
        ours = jax.grad(functools.partial(loss, biased_attention, implementation=implementation), argnums=range(5))(
            *args
        )
        theirs = jax.grad(functools.partial(loss, reference.biased_attention), argnums=range(5))(*args)
        for name, mine, other in zip(names, ours, theirs, strict=True):
            np.testing.assert_allclose(mine, other, rtol=1e-4, atol=1e-5, err_msg=name)

    @pytest.mark.parametrize("softmax", api.SOFTMAX)
    def test_rows_without_a_key_are_zero_with_finite_gradients(self, implementation, softmax):
        inputs = _inputs()
        key_bias = np.zeros((B, K), np.float32)
        key_bias[1] = -np.inf

        def run(query, key, value, bias):
            options = {"key_bias": key_bias, "bias": bias, "softmax": softmax, "implementation": implementation}
            return biased_attention(query, key, value, **options), attention_column_stats(query, key, **options)

        args = [inputs[name] for name in ("query", "key", "value", "bias")]
        out, sums = run(*args)
        assert np.all(np.isfinite(out)) and np.all(np.isfinite(sums))
        assert not np.any(out[1]) and not np.any(sums[1]) and np.all(np.any(out[0], axis=-1))
        grads = jax.grad(lambda *args: sum(jnp.sum(leaf**2) for leaf in run(*args)), argnums=range(4))(*args)
        assert all(np.all(np.isfinite(grad)) for grad in grads)
        assert not any(np.any(grad[1]) for grad in grads[:3])

    @pytest.mark.parametrize("softmax", api.SOFTMAX)
    def test_bfloat16_keeps_its_dtype_and_a_float32_softmax(self, implementation, softmax):
        inputs = _inputs()
        args = [inputs[name].astype(jnp.bfloat16) for name in ("query", "key", "value")]
        out = biased_attention(*args, bias=inputs["bias"], softmax=softmax, implementation=implementation)
        expected = reference.biased_attention(
            *(array.astype(np.float32) for array in args), bias=inputs["bias"], softmax=softmax
        )
        assert out.dtype == jnp.bfloat16
        np.testing.assert_allclose(out.astype(np.float32), expected, atol=2e-2)

    @pytest.mark.parametrize("softmax", api.SOFTMAX)
    def test_huge_logits_do_not_overflow(self, implementation, softmax):
        inputs = _inputs()
        args = [inputs[name] for name in ("query", "key", "value")]
        options = {"scale": 1e4, "softmax": softmax}
        out = biased_attention(*args, implementation=implementation, **options)
        np.testing.assert_allclose(out, reference.biased_attention(*args, **options), rtol=1e-3, atol=1e-3)

    @pytest.mark.parametrize(
        ("row", "expected"),
        [([0.0, 0.0, 0.0], [0.25] * 3), ([2.0, -1.0, 0.5], [0.7101, 0.0354, 0.1584]), ([-30.0] * 3, [9.4e-14] * 3)],
    )
    def test_printed_values_of_softmax_off_by_one(self, implementation, row, expected):
        """Kallini et al. 2025, definition of softmax off by one."""
        query, key = np.zeros((1, 1, 1, 4), np.float32), np.zeros((1, 3, 1, 4), np.float32)
        value = np.eye(3, 4, dtype=np.float32)[None, :, None]
        options = {"key_bias": np.asarray([row], np.float32), "softmax": "off_by_one"}
        out = biased_attention(query, key, value, implementation=implementation, **options)
        np.testing.assert_allclose(out[0, 0, 0, :3], expected, rtol=5e-3)
        sums = attention_column_stats(query, key, implementation=implementation, **options)
        np.testing.assert_allclose(sums[0, 0], expected, rtol=5e-3)

    def test_column_sums_over_several_blocks_equal_the_map(self, implementation):
        inputs = _inputs(queries=150, keys=160)
        options = {name: inputs[name] for name in ("key_bias", "bias", "query_weight")} | {"causal": True}

        def stats(function, query, key, bias, **extra):
            return jnp.sum(function(query, key, **(options | {"bias": bias}), **extra) ** 2)

        ours = functools.partial(attention_column_stats, implementation=implementation)
        args = (inputs["query"], inputs["key"], inputs["bias"])
        value, grads = jax.value_and_grad(functools.partial(stats, ours), argnums=range(3))(*args)
        expected, expected_grads = jax.value_and_grad(
            functools.partial(stats, reference.attention_column_stats), argnums=range(3)
        )(*args)
        np.testing.assert_allclose(value, expected, rtol=1e-5)
        for grad, other in zip(grads, expected_grads, strict=True):
            np.testing.assert_allclose(grad, other, rtol=2e-4, atol=1e-5)

    def test_column_sums_never_hold_the_whole_map(self, implementation):
        shape = jax.ShapeDtypeStruct((1, 1024, 2, 8), jnp.float32)
        whole = 2 * 1024 * 1024

        def largest(function):
            return max(_sizes(jax.make_jaxpr(function)(shape, shape).jaxpr))

        stats = functools.partial(attention_column_stats, implementation=implementation)
        assert largest(attention_map) >= whole
        assert largest(stats) < whole
        assert largest(jax.grad(lambda query, key: jnp.sum(stats(query, key) ** 2))) < whole

    @pytest.mark.parametrize("softmax", api.SOFTMAX)
    def test_rows_without_a_key_are_finite_in_bfloat16_too(self, implementation, softmax):
        inputs = _inputs()
        key_bias = np.zeros((B, K), np.float32)
        key_bias[1] = -np.inf
        args = [inputs[name].astype(jnp.bfloat16) for name in ("query", "key", "value", "bias")]

        def run(query, key, value, bias, key_bias):
            options = {"key_bias": key_bias, "bias": bias, "softmax": softmax, "implementation": implementation}
            return biased_attention(query, key, value, **options)

        out, pull = jax.vjp(run, *args, key_bias)
        assert not np.any(out[1]) and np.all(np.isfinite(out.astype(np.float32)))
        grads = pull(jnp.ones_like(out))
        assert all(np.all(np.isfinite(np.asarray(grad, np.float32))) for grad in grads)
        assert not any(np.any(np.asarray(grad[1], np.float32)) for grad in (*grads[:3], grads[4]))

    @pytest.mark.parametrize(("queries", "names"), [(Q, ("bias",)), (150, ()), (150, ("bias",))])
    def test_score_excess_equals_a_loop_in_value_and_gradient(self, implementation, queries, names):
        inputs = _inputs(queries=queries)
        options = {name: inputs[name] for name in names} | {"scale": 1.0, "threshold": 1.5}
        masks = {"query_mask": np.arange(queries) < np.array([[queries], [3]]), "key_mask": inputs["key_bias"] > -1}
        key = np.repeat(inputs["key"], H // G, axis=2)
        logits = np.einsum("bqhd,bkhd->bhqk", inputs["query"].astype(np.float64), key)
        logits += inputs["bias"] if "bias" in names else 0.0
        for chosen in ({}, masks):
            real = [chosen[name][row] if chosen else slice(None) for row in range(B) for name in masks]
            rows = [logits[row][:, real[2 * row]][:, :, real[2 * row + 1]] for row in range(B)]
            run = functools.partial(attention_score_excess, implementation=implementation, **options, **chosen)
            found, pull = jax.vjp(run, inputs["query"], inputs["key"])
            expected = [np.mean(np.maximum(row, 1.5) - 1.5) for row in rows]
            np.testing.assert_allclose(found, expected, rtol=1e-5)
            assert min(expected) > 0.1
            plain = dict.fromkeys(("bias", *masks)) | options | chosen
            _, pull_reference = jax.vjp(
                functools.partial(reference.attention_score_excess, **plain), inputs["query"], inputs["key"]
            )
            for mine, other in zip(pull(jnp.ones(B)), pull_reference(jnp.ones(B)), strict=True):
                np.testing.assert_allclose(mine, other, rtol=1e-4, atol=1e-7)

    def test_score_excess_is_free_up_to_the_threshold_and_zero_without_a_pair(self, implementation):
        query, key = np.ones((2, 3, 1, 4), np.float32), np.ones((2, 5, 1, 4), np.float32)
        run = functools.partial(attention_score_excess, query, key, implementation=implementation)
        np.testing.assert_array_equal(run(scale=1.25), 0)
        np.testing.assert_allclose(run(scale=1.5), 1)
        np.testing.assert_allclose(run(scale=1.5, key_mask=np.array([[True] * 5, [False] * 5])), [1, 0])
        # The default scale is that of attention: d ** -0.5.
        np.testing.assert_allclose(run(threshold=1.5), 0.5)

    def test_score_excess_never_holds_the_whole_map(self, implementation):
        shape = jax.ShapeDtypeStruct((1, 1024, 2, 8), jnp.float32)
        run = functools.partial(attention_score_excess, implementation=implementation)
        for function in (run, jax.grad(lambda query, key: jnp.sum(run(query, key)))):
            assert max(_sizes(jax.make_jaxpr(function)(shape, shape).jaxpr)) < 2 * 1024 * 1024

    @settings(max_examples=20, deadline=None)
    @given(seed=st.integers(0, 2**16), shift=st.floats(-20.0, 20.0))
    def test_invariants(self, implementation, seed, shift):
        inputs = _inputs(seed=seed)
        args = [inputs[name] for name in ("query", "key", "value")]
        key_bias = inputs["key_bias"]
        run = functools.partial(_run, implementation)
        plain, off = run(*args, key_bias), run(*args, key_bias, softmax="off_by_one")
        # A constant added to all logits changes nothing, but under softmax-off-by-one it moves all outputs one way.
        moved, moved_off = run(*args, key_bias + shift), run(*args, key_bias + shift, softmax="off_by_one")
        np.testing.assert_allclose(moved, plain, rtol=1e-3, atol=1e-4)
        sign = np.sign(shift) if abs(shift) > 1e-3 else 0.0
        assert np.all(sign * (np.abs(moved_off) - np.abs(off)) >= -1e-5)
        assert np.all(np.abs(off) <= np.abs(plain) + 1e-5)
        # The order of keys does not matter.
        order = np.random.default_rng(seed).permutation(K)
        shuffled = run(args[0], args[1][:, order], args[2][:, order], key_bias[:, order])
        np.testing.assert_allclose(shuffled, plain, rtol=1e-4, atol=1e-5)
        # A bias of log 2 is the key twice: K - 1 keys, the first of them doubled.
        twice = np.concatenate([np.arange(K - 1), [0]])
        doubled = run(args[0], args[1][:, twice], args[2][:, twice], key_bias[:, twice])
        weighted = np.concatenate([key_bias[:, :-1], np.full((B, 1), -np.inf, np.float32)], axis=1)
        weighted[:, 0] += np.log(2.0)
        np.testing.assert_allclose(run(*args, weighted), doubled, rtol=1e-4, atol=1e-5)


def _sizes(jaxpr):
    """Sizes of all intermediate arrays, those inside loops included."""
    for equation in jaxpr.eqns:
        yield from (variable.aval.size for variable in equation.outvars if hasattr(variable.aval, "size"))
        for value in equation.params.values():
            for inner in value if isinstance(value, tuple | list) else (value,):
                inner = getattr(inner, "jaxpr", inner)
                if hasattr(inner, "eqns"):
                    yield from _sizes(inner)


@functools.partial(jax.jit, static_argnums=(0,), static_argnames=("softmax",))
def _run(implementation, query, key, value, key_bias, softmax="standard"):
    return biased_attention(query, key, value, key_bias=key_bias, softmax=softmax, implementation=implementation)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"query": np.zeros((B, Q, D))}, r"must be \[B, N, heads, d\]"),
        ({"key": np.zeros((B, K, G, D + 1))}, "head width must agree"),
        (
            {"key": np.zeros((B, K, 3, D)), "value": np.zeros((B, K, 3, D))},
            "divide the number of query heads; got 3 and 4",
        ),
        ({"value": np.zeros((B, K + 1, G, D))}, "value"),
        ({"key_bias": np.zeros((B, Q))}, r"key_bias must be \[B, K\] = \(2, 7\)"),
        ({"bias": np.zeros((3, H, Q, K))}, r"bias must be \[1 or 2"),
        ({"softmax": "softmax1"}, "softmax='softmax1'"),
        ({"causal": True, "key": np.zeros((B, 3, G, D)), "value": np.zeros((B, 3, G, D))}, "as many keys as queries"),
    ],
)
def test_shapes_that_do_not_fit_are_refused(change, message):
    inputs = {name: _inputs()[name] for name in ("query", "key", "value")} | change
    with pytest.raises(ValueError, match=message):
        biased_attention(**inputs)


def test_a_query_weight_that_does_not_fit_is_refused():
    with pytest.raises(ValueError, match="query_weight"):
        attention_column_stats(_inputs()["query"], _inputs()["key"], query_weight=np.zeros((B, K)))


@pytest.mark.parametrize("name", ["query_mask", "key_mask"])
def test_a_mask_that_does_not_fit_is_refused(name):
    with pytest.raises(ValueError, match=rf"{name} must be \[B, N\] = .*; got \(2, 6\)"):
        attention_score_excess(_inputs()["query"], _inputs()["key"], **{name: np.ones((B, 6), bool)})


def test_a_missing_implementation_says_what_there_is():
    with pytest.raises(NotImplementedError, match="no 'gpu' implementation; there is 'xla'"):
        attention_score_excess(_inputs()["query"], _inputs()["key"], implementation="gpu")
