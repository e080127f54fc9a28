# SPDX-License-Identifier: Apache-2.0
"""Sparse decoding: every implementation against a loop over listed slots."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from pallas_kernels.sparse_decode_attention import gpu, pack_tokens, reference, sparse_decode_attention, specs, tpu, xla
from tests.pallas_kernels import tpu_compiler

IMPLEMENTATIONS = ("xla", "interpret", "gpu_interpret")
B, T, H, G, D, P, S, L = 2, 2, 4, 2, 24, 9, 16, 4
LENGTHS = st.lists(st.integers(0, L * S), min_size=B * G, max_size=B * G).map(lambda n: np.reshape(n, (B, G)))
# Nothing, one slot, a page and its end, all; heads of very different lengths in one batch.
RAGGED = np.array([[0, 1], [17, L * S]])


@functools.cache
def inputs(dtype="float32", heads=G):
    rng = np.random.default_rng(0)
    query, keys, values = (
        jnp.asarray(rng.normal(size=shape), dtype) for shape in ((B, T, H, D), (G, P, S, D), (G, P, S, D))
    )
    pages = np.stack([np.stack([rng.permutation(P)[:L] for _ in range(heads)]) for _ in range(B)])
    bias = np.where(rng.random((G, P, S)) < 0.3, -np.inf, rng.normal(size=(G, P, S))).astype(np.float32)
    return query, keys, values, jnp.asarray(pages, jnp.int32), bias, rng.normal(size=H).astype(np.float32)


def loop(query, keys, values, pages, lengths, bias=None, sinks=None):
    """Row by row over the listed slots, in float64."""
    query, keys, values = (np.asarray(array.astype(jnp.float32), np.float64) for array in (query, keys, values))
    out, lse = np.zeros((B, T, H, D)), np.full((B, T, H), -np.inf)
    for b, t, h in np.ndindex(B, T, H):
        g = h * G // H
        own = min(g, pages.shape[1] - 1)
        slots = [divmod(n, S) for n in range(lengths[b, own])]
        listed = [(int(pages[b, own, page]), slot) for page, slot in slots]
        logits = [query[b, t, h] @ keys[g][at] * D**-0.5 + (0 if bias is None else bias[g][at]) for at in listed]
        weights = np.exp(np.array(logits))
        total = weights.sum() + (0 if sinks is None else np.exp(float(sinks[h])))
        if total > 0:
            out[b, t, h] = sum((w * values[g][at] for w, at in zip(weights, listed, strict=True)), np.zeros(D)) / total
            lse[b, t, h] = np.log(total)
    return out, lse


@functools.cache
def runner(implementation):
    # Programs run a few times each.
    quick = {"xla_backend_optimization_level": 0, "xla_llvm_disable_expensive_passes": True}
    return jax.jit(functools.partial(sparse_decode_attention, implementation=implementation), compiler_options=quick)


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
class TestImplementation:
    """What every implementation must do."""

    @pytest.mark.parametrize("extras", [False, True])
    @settings(max_examples=4, deadline=None)
    @given(lengths=LENGTHS)
    @example(lengths=RAGGED)
    @example(lengths=np.zeros((B, G), int))
    def test_equals_a_loop_over_ragged_lists(self, implementation, extras, lengths):
        *arrays, bias, sinks = inputs()
        options = {"bias": bias, "sinks": sinks} if extras else {}
        out, lse = runner(implementation)(*arrays, jnp.asarray(lengths, jnp.int32), **options)
        want, want_lse = loop(*arrays, lengths, **options)
        np.testing.assert_allclose(out, want, rtol=1e-5, atol=1e-5)
        np.testing.assert_allclose(lse, want_lse, rtol=1e-5, atol=1e-5)
        oracle = reference.sparse_decode_attention(
            *arrays, jnp.asarray(lengths), **({"bias": None, "sinks": None} | options), scale=D**-0.5
        )
        np.testing.assert_allclose(oracle[0], want, rtol=1e-5, atol=1e-5)
        np.testing.assert_allclose(oracle[1], want_lse, rtol=1e-5, atol=1e-5)

    def test_heads_may_share_a_list(self, implementation):
        query, keys, values, pages, *_ = inputs(heads=1)
        lengths = jnp.array([[35], [0]])
        out, lse = runner(implementation)(query, keys, values, pages, lengths)
        want, want_lse = loop(query, keys, values, pages, np.asarray(lengths))
        np.testing.assert_allclose(out, want, rtol=1e-5, atol=1e-5)
        np.testing.assert_allclose(lse, want_lse, rtol=1e-5, atol=1e-5)

    def test_what_lies_past_a_length_is_not_looked_at(self, implementation):
        query, keys, values, *_ = inputs()
        # The two sequences list different pages, so that a slot past one's length is not live for the other.
        pages = jnp.broadcast_to(jnp.arange(L) + L * jnp.arange(B)[:, None, None], (B, G, L))
        lengths = jnp.full((B, G), 20)
        want = runner(implementation)(query, keys, values, pages, lengths)
        spoiled = [array.at[:, 1::L, 4:].set(jnp.nan) for array in (keys, values)]
        # Pages from the third on do not exist.
        got = runner(implementation)(query, *spoiled, pages.at[:, :, 2:].set(10**6), lengths)
        for first, second in zip(got, want, strict=True):
            np.testing.assert_array_equal(first, second)

    def test_bfloat16_keeps_its_dtype(self, implementation):
        query, keys, values, pages, *_ = inputs("bfloat16")
        out, lse = runner(implementation)(query, keys, values, pages, jnp.asarray(RAGGED))
        want, want_lse = loop(query, keys, values, pages, RAGGED)
        assert out.dtype == jnp.bfloat16 and lse.dtype == jnp.float32
        np.testing.assert_allclose(out.astype(jnp.float32), want, atol=2e-2)
        np.testing.assert_allclose(lse, want_lse, atol=2e-2)

    def test_two_lists_join_by_their_log_sum_exp(self, implementation):
        query, keys, values, pages, *_ = inputs()
        whole, _ = runner(implementation)(query, keys, values, pages, jnp.full((B, G), L * S))
        parts = [
            runner(implementation)(query, keys, values, own, jnp.full((B, G), own.shape[2] * S))
            for own in (pages[..., :1], pages[..., 1:])
        ]
        share = jax.nn.softmax(jnp.stack([lse for _, lse in parts]), axis=0)
        joined = sum(weight[..., None] * out for weight, (out, _) in zip(share, parts, strict=True))
        np.testing.assert_allclose(joined, whole, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("implementation", ["interpret", "gpu_interpret"])
def test_the_order_of_full_pages_does_not_matter_and_repeat_runs_are_equal(implementation):
    query, keys, values, pages, *_ = inputs()
    lengths = jnp.full((B, G), L * S)
    first, again = (runner(implementation)(query, keys, values, pages, lengths) for _ in range(2))
    turned = runner(implementation)(query, keys, values, pages[..., ::-1], lengths)
    for one, two, three in zip(first, again, turned, strict=True):
        np.testing.assert_array_equal(one, two)
        np.testing.assert_allclose(one, three, rtol=1e-5, atol=1e-6)


def test_several_steps_and_several_blocks_change_nothing(monkeypatch):
    # A float32 page of S slots fills registers of 8 x 128.
    monkeypatch.setattr(tpu, "BLOCK_BYTES", 2 * S * 128 * 4)
    monkeypatch.setattr(tpu, "_RUN", 1)
    monkeypatch.setattr(tpu, "_CLEARED", S)
    monkeypatch.setattr(xla, "_SLOTS", 2 * S)
    monkeypatch.setattr(gpu, "_TILE", 16)
    monkeypatch.setattr(gpu, "_RUN", 20)
    *arrays, bias, sinks = inputs()
    for lengths in (RAGGED, np.array([[33, 64], [32, 31]])):
        want = loop(*arrays, lengths, bias, sinks)
        for implementation in IMPLEMENTATIONS:
            call = jax.jit(functools.partial(sparse_decode_attention, implementation=implementation))
            got = call(*arrays, jnp.asarray(lengths), bias=bias, sinks=sinks)
            for first, second in zip(got, want, strict=True):
                np.testing.assert_allclose(first, second, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    ("slots", "dtype", "listed", "many"),
    [
        (64, "bfloat16", 51, 51),
        (64, "float32", 51, 26),
        (16, "bfloat16", 300, 150),
        (128, "bfloat16", 100, 25),
        (64, "bfloat16", 3, 3),
        (8192, "bfloat16", 5, 1),
    ],
)
def test_pages_of_a_step(slots, dtype, listed, many):
    assert tpu.block_pages(slots, 128, dtype, listed) == many


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_a_plain_cache_in_another_shape_is_pages_of_each_row(implementation):
    rng = np.random.default_rng(2)
    keys, values = (jnp.asarray(rng.normal(size=(B, G, P * S, D)), jnp.float32) for _ in range(2))
    query, _, _, pages, *_ = inputs()
    bias, lengths = jnp.asarray(rng.normal(size=(B, G, P * S)), jnp.float32), jnp.asarray(RAGGED)
    own = [array.reshape(B, G, P, S, *array.shape[3:]) for array in (keys, values, bias)]
    got = jax.jit(functools.partial(sparse_decode_attention, implementation=implementation))(
        query, own[0], own[1], pages, lengths, bias=own[2]
    )
    # The same pages in one pool: those of row b are b P + page.
    pool = [jnp.moveaxis(array, 0, 1).reshape(G, B * P, S, *array.shape[4:]) for array in own]
    listed = pages + P * jnp.arange(B)[:, None, None]
    want = reference.sparse_decode_attention(
        query, pool[0], pool[1], listed, lengths, bias=pool[2], sinks=None, scale=D**-0.5
    )
    for first, second in zip(got, want, strict=True):
        np.testing.assert_allclose(first, second, rtol=1e-5, atol=1e-5)


def test_selected_tokens_make_pages_of_their_own():
    rng = np.random.default_rng(1)
    cache = [jnp.asarray(rng.normal(size=(B, G, 40, D)), jnp.float32) for _ in range(2)]
    index = jnp.asarray(np.stack([[rng.permutation(40)[:21] for _ in range(G)] for _ in range(B)]))
    (keys, pages), (values, _) = (pack_tokens(array, index, 16) for array in cache)
    assert keys.shape == (G, B * 2, 16, D) and pages.shape == (B, G, 2)
    lengths = jnp.array([[21, 5], [0, 16]])
    query = inputs()[0]
    got = runner("xla")(query, keys, values, pages, lengths)
    for b, t, h in np.ndindex(B, T, H):
        g = h * G // H
        own = index[b, g, : lengths[b, g]]
        weights = jax.nn.softmax(cache[0][b, g, own] @ query[b, t, h] * D**-0.5)
        np.testing.assert_allclose(got[0][b, t, h], weights @ cache[1][b, g, own], rtol=1e-5, atol=1e-5)


def shapes(batch=B, rows=T, heads=H, groups=G, width=D, pages=P, slots=S, listed=L, kind=jnp.float32):
    pool = jax.ShapeDtypeStruct((groups, pages, slots, width), kind)
    lists = [jax.ShapeDtypeStruct(shape, jnp.int32) for shape in ((batch, groups, listed), (batch, groups))]
    return [jax.ShapeDtypeStruct((batch, rows, heads, width), kind), pool, pool, *lists]


@pytest.mark.parametrize("implementation", ["tpu", "interpret"])
@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"slots": 12}, r"multiple of 8 slots in float32; got \(2, 9, 12, 24\), the nearest is \(2, 9, 16, 24\)"),
        ({"slots": 8, "kind": jnp.bfloat16}, r"multiple of 16 slots in bfloat16; .*nearest is \(2, 9, 16, 24\)"),
        ({"kind": jnp.float16}, r"both of float32 or both of bfloat16; got float16"),
        ({"batch": 64, "listed": 5000}, r"\(64, 2, 5000\) pages takes .* the nearest that fits lists 1280 pages"),
        ({"slots": 4096, "width": 512}, r"MiB of on-chip memory, more than 13; use smaller pages"),
    ],
)
def test_what_the_kernel_cannot_take_is_refused(implementation, change, message):
    with pytest.raises(NotImplementedError, match=message):
        jax.eval_shape(functools.partial(sparse_decode_attention, implementation=implementation), *shapes(**change))


@pytest.mark.parametrize("implementation", ["gpu", "gpu_interpret"])
@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"width": 320}, r"heads of up to 256; got pages \(2, 9, 16, 320\)"),
        ({"rows": 65, "heads": 2}, "up to 64 query rows that share a key head; got 65"),
        (
            {"pages": 2**22, "slots": 64, "width": 128},
            r"key is \(1, 2, 268435456, 128\): split the batch, or the heads, by 33",
        ),
    ],
)
def test_what_the_gpu_kernel_cannot_take_is_refused(implementation, change, message):
    with pytest.raises(NotImplementedError, match=message):
        jax.eval_shape(functools.partial(sparse_decode_attention, implementation=implementation), *shapes(**change))


@pytest.mark.parametrize(
    ("position", "shape", "options", "message"),
    [
        (0, (B, H, D), {}, r"query must be \[B, T, H, d\].*got \(2, 4, 24\)"),
        (0, (B, T, 3, D), {}, r"with G dividing 3"),
        (2, (G, P, S, D + 1), {}, r"value_pages must be \[G, P, S, 24\]"),
        (3, (B, 3, L), {}, r"pages must be \[B, 2 or 1, L\]"),
        (4, (B, 1), {}, r"lengths \[B, 2 or 1\].*got \(2, 2, 4\) and \(2, 1\)"),
        (4, (B, G), {"bias": jnp.zeros((G, P))}, r"bias must be \[G, P, S\] = \(2, 9, 16\); got \(2, 9\)"),
        (4, (B, G), {"sinks": jnp.zeros(3)}, r"sinks must be \[H\] = \(4,\); got \(3,\)"),
    ],
)
def test_shapes_that_do_not_fit_are_refused(position, shape, options, message):
    arguments = shapes()
    arguments[position] = jax.ShapeDtypeStruct(shape, arguments[position].dtype)
    with pytest.raises(ValueError, match=message):
        jax.eval_shape(functools.partial(sparse_decode_attention, **options), *arguments)
    with pytest.raises(ValueError, match=r"index \[B, G, K\] and page positive; got .*, 0"):
        pack_tokens(jnp.zeros((1, 1, 4, 2)), jnp.zeros((1, 1, 2), jnp.int32), 0)


@pytest.mark.parametrize("chip", tpu_compiler.CHIPS)
@pytest.mark.parametrize("name", specs.NAMED)
def test_it_compiles_for_every_tpu(chip, name):
    spec = specs.NAMED[name]
    sizes = (spec.batch, 1, spec.heads, spec.groups, spec.width, spec.pages, spec.slots, spec.listed, spec.dtype)

    def run(query, keys, values, pages, lengths):
        options = {"bias": jnp.zeros(keys.shape[:3]), "sinks": jnp.zeros(spec.heads), "implementation": "tpu"}
        plain = sparse_decode_attention(query, keys, values, pages, lengths, implementation="tpu")
        return plain, sparse_decode_attention(query, keys, values, pages[:, :1], lengths[:, :1], **options)

    assert tpu_compiler.kernels(chip, run, *shapes(*sizes)) == 2


def test_each_of_several_chips_reads_the_caches_of_its_own_rows():
    query = jax.ShapeDtypeStruct((8, 1, 8, 128), jnp.bfloat16)
    cache = jax.ShapeDtypeStruct((8, 2, 16, 64, 128), jnp.bfloat16)
    bias = jax.ShapeDtypeStruct(cache.shape[:-1], jnp.float32)
    pages, lengths = (jax.ShapeDtypeStruct((8, 1, *rest), jnp.int32) for rest in ((4,), ()))

    def run(query, keys, values, bias, pages, lengths):
        options = {"bias": bias, "sinks": jnp.zeros(8), "implementation": "tpu"}
        return sparse_decode_attention(query, keys, values, pages, lengths, **options)

    assert tpu_compiler.collectives("4 x v5e", run, query, cache, cache, bias, pages, lengths) == []
