# SPDX-License-Identifier: Apache-2.0
"""The attention layer: its maths, its signals, and what padding, causality and settings do to it."""

import functools

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from adaptive.tokens import Signals
from layers.attention import SIGNALS, Attention, Memory
from layers.rotary import rotate
from pallas_kernels.block_sparse_attention import from_block_mask

B, N, D, H = 2, 6, 16, 4


@functools.cache
def _x(length=N, seed=0):
    return np.random.default_rng(seed).normal(size=(B, length, D)).astype(np.float32)


def _init(layer, *args, **kwargs):
    """Parameters with non-zero biases, so that forgetting one shows."""
    params = nn.unbox(layer.init(jax.random.key(0), *args, **kwargs))
    leaves, tree = jax.tree.flatten(params)
    rng = np.random.default_rng(1)
    return jax.tree.unflatten(tree, [leaf + 0.1 * rng.normal(size=leaf.shape).astype(np.float32) for leaf in leaves])


def _restated(params, x, context, softmax="standard", key_bias=None, kv_heads=H):
    """Multi-head attention in NumPy, head by head; also the map `[B, H, Q, K]`."""
    params = jax.tree.map(np.asarray, params["params"])
    out, maps = 0.0, []
    for head in range(H):
        shared = head // (H // kv_heads)
        query = x @ params["query"]["kernel"][:, head] + params["query"]["bias"][head]
        key = context @ params["key"]["kernel"][:, shared] + params["key"]["bias"][shared]
        value = context @ params["value"]["kernel"][:, shared] + params["value"]["bias"][shared]
        logits = query @ key.transpose(0, 2, 1) / np.sqrt(query.shape[-1])
        weights = np.exp(logits if key_bias is None else logits + key_bias[:, None, :])
        weights /= weights.sum(-1, keepdims=True) + (softmax == "off_by_one")
        out = out + weights @ value @ params["out"]["kernel"][head]
        maps.append(weights)
    return out + params["out"]["bias"], np.stack(maps, axis=1)


@pytest.mark.parametrize(("softmax", "kv_heads"), [("standard", 4), ("off_by_one", 2)])
def test_equals_a_restatement(softmax, kv_heads):
    layer = Attention(H, kv_heads=kv_heads, softmax=softmax)
    params = _init(layer, _x())
    out, _ = layer.apply(params, _x())
    np.testing.assert_allclose(out, _restated(params, _x(), _x(), softmax, kv_heads=kv_heads)[0], rtol=1e-4, atol=1e-5)
    context = _x(9, seed=3)
    out, _ = layer.apply(params, _x(), context)
    np.testing.assert_allclose(
        out, _restated(params, _x(), context, softmax, kv_heads=kv_heads)[0], rtol=1e-4, atol=1e-5
    )


@pytest.mark.parametrize("options", [{}, {"kv_heads": 2, "rotary": True, "softmax": "off_by_one"}])
def test_signals_equal_the_whole_map_and_leave_the_output_alone(options):
    layer = Attention(H, **options)
    params = _init(layer, _x())
    key_bias = np.zeros((B, N), np.float32)
    key_bias[0, 1], key_bias[1, -2:] = 0.7, -np.inf
    bias = np.random.default_rng(2).normal(size=(1, H, N, N)).astype(np.float32)
    run = functools.partial(layer.apply, params, _x(), key_bias=key_bias, bias=bias)
    plain, none = run()
    assert jax.tree.leaves(none) == []
    out, signals = run(signals=SIGNALS)
    np.testing.assert_array_equal(out, plain)
    full = np.asarray(signals.attention)
    valid = np.isfinite(key_bias).astype(np.float32)
    np.testing.assert_allclose(signals.cls_attention, full[:, :, 0].mean(1), rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(
        signals.column_sums, np.einsum("bhqk,bq->bhk", full, valid).mean(1), rtol=1e-5, atol=1e-6
    )
    tree = params["params"]
    for name, field in (("query", "queries"), ("key", "keys"), ("value", "values")):
        projected = np.einsum("bnd,dhk->bnhk", _x(), tree[name]["kernel"]) + np.asarray(tree[name]["bias"])
        np.testing.assert_allclose(getattr(signals, field), projected.mean(2), rtol=1e-4, atol=1e-5)


def test_the_map_that_is_handed_out_is_the_one_that_is_used():
    layer = Attention(H)
    params = _init(layer, _x())
    key_bias = np.log(np.arange(1.0, N + 1, dtype=np.float32))[None].repeat(B, 0)
    _, signals = layer.apply(params, _x(), key_bias=key_bias, signals=("attention",))
    np.testing.assert_allclose(
        signals.attention, _restated(params, _x(), _x(), key_bias=key_bias)[1], rtol=1e-4, atol=1e-6
    )


@pytest.mark.parametrize("name", SIGNALS)
def test_only_the_signals_that_were_asked_for_are_there(name):
    layer = Attention(H)
    shapes = jax.eval_shape(
        lambda x: layer.apply(layer.init(jax.random.key(0), x), x, signals=(name,))[1],
        jax.ShapeDtypeStruct((B, N, D), jnp.float32),
    )
    there = {field for field in SIGNALS if getattr(shapes, field) is not None}
    assert isinstance(shapes, Signals) and there == {name}


def test_padding_does_not_leak():
    layer = Attention(H, rotary=True)
    params = _init(layer, _x())
    key_bias = np.where(np.arange(N) < 4, 0.0, -np.inf).astype(np.float32)[None].repeat(B, 0)
    other = _x().copy()
    other[:, 4:] = 100.0
    names = ("cls_attention", "column_sums")
    out, signals = layer.apply(params, _x(), key_bias=key_bias, signals=names)
    out_other, signals_other = layer.apply(params, other, key_bias=key_bias, signals=names)
    out_short, signals_short = layer.apply(params, _x()[:, :4], signals=names)
    np.testing.assert_allclose(out[:, :4], out_other[:, :4], rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(out[:, :4], out_short, rtol=1e-5, atol=1e-6)
    for name in names:
        np.testing.assert_allclose(getattr(signals, name), getattr(signals_other, name), rtol=1e-5, atol=1e-6)
        np.testing.assert_allclose(getattr(signals, name)[:, :4], getattr(signals_short, name), rtol=1e-5, atol=1e-6)
        assert not np.any(getattr(signals, name)[:, 4:])


def test_a_causal_query_sees_nothing_after_it():
    layer = Attention(H)
    params = _init(layer, _x())
    later = _x().copy()
    later[:, 3:] += 1.0
    out, _ = layer.apply(params, _x(), causal=True)
    moved, _ = layer.apply(params, later, causal=True)
    np.testing.assert_array_equal(out[:, :3], moved[:, :3])
    assert np.all(np.any(np.asarray(out[:, 3:] != moved[:, 3:]), axis=-1))


def test_rotary_attention_reads_positions_and_only_their_differences():
    layer = Attention(H, rotary=True)
    params = _init(layer, _x())
    places = np.asarray([[0, 2, 3, 7, 8, 20]])
    run = functools.partial(layer.apply, params, _x())
    out, _ = run(positions=places)
    shifted, _ = run(positions=places + 5)
    np.testing.assert_allclose(out, shifted, rtol=1e-3, atol=1e-4)
    default, _ = run()
    np.testing.assert_array_equal(default, run(positions=np.arange(N)[None])[0])
    assert np.abs(out - default).max() > 1e-3
    # As if the sequence had been longer and the other tokens had been removed.
    long = np.zeros((B, 21, D), np.float32)
    long[:, places[0]] = _x()
    bias = np.full((B, 21), -np.inf, np.float32)
    bias[:, places[0]] = 0.0
    within, _ = layer.apply(params, long, key_bias=bias)
    np.testing.assert_allclose(within[:, places[0]], out, rtol=1e-4, atol=1e-5)


def test_cross_attention_turns_keys_by_the_context_positions():
    layer = Attention(H, rotary=True)
    params = _init(layer, _x())
    context, places = _x(3, seed=3), np.asarray([[4, 0, 9]])
    out, _ = layer.apply(params, _x(), context, context_positions=places)
    tree = jax.tree.map(np.asarray, params["params"])

    def project(name, x):
        return np.einsum("bnd,dhk->bnhk", x, tree[name]["kernel"]) + tree[name]["bias"]

    query = rotate(jnp.asarray(project("query", _x())), np.arange(N)[None])
    key = rotate(jnp.asarray(project("key", context)), places)
    weights = jax.nn.softmax(jnp.einsum("bqhd,bkhd->bhqk", query, key) * (D // H) ** -0.5)
    mixed = np.einsum("bhqk,bkhd->bqhd", weights, project("value", context))
    expected = np.einsum("bqhd,hde->bqe", mixed, tree["out"]["kernel"]) + tree["out"]["bias"]
    np.testing.assert_allclose(out, expected, rtol=1e-4, atol=1e-5)


def test_t5_settings_no_scale_no_bias_own_initialisation():
    ones = nn.initializers.ones_init()
    layer = Attention(
        H, head_dim=8, scale=1.0, use_bias=False, kernel_init=ones, query_init=nn.initializers.normal(0.5)
    )
    params = nn.unbox(layer.init(jax.random.key(0), _x()))["params"]
    assert {name: set(leaves) for name, leaves in params.items()} == {
        name: {"kernel"} for name in ("query", "key", "value", "out")
    }
    assert params["query"]["kernel"].shape == (D, H, 8) and params["out"]["kernel"].shape == (H, 8, D)
    assert np.all(params["key"]["kernel"] == 1) and abs(np.std(params["query"]["kernel"]) - 0.5) < 0.05
    scaled = layer.clone(scale=None)
    doubled = {"params": params | {"query": {"kernel": params["query"]["kernel"] * 8**0.5}}}
    plain = layer.apply({"params": params}, 0.1 * _x())[0]
    np.testing.assert_allclose(scaled.apply(doubled, 0.1 * _x())[0], plain, rtol=1e-4, atol=1e-5)


def test_fans_of_the_initialiser_are_those_of_the_flattened_kernel():
    layer = Attention(8, kernel_init=nn.initializers.lecun_normal())
    params = nn.unbox(layer.init(jax.random.key(0), np.zeros((1, 2, 256), np.float32)))["params"]
    for name in ("query", "out"):
        assert abs(np.std(params[name]["kernel"]) * 256**0.5 - 1.0) < 0.03, name


def test_bfloat16_compute_keeps_float32_parameters():
    layer = Attention(H)
    params = _init(layer, _x())
    exact, _ = layer.apply(params, _x())
    half = layer.clone(dtype=jnp.bfloat16)
    out, signals = half.apply(params, _x(), signals=("keys", "column_sums"))
    assert out.dtype == jnp.bfloat16 and signals.column_sums.dtype == jnp.float32
    np.testing.assert_allclose(out.astype(np.float32), exact, atol=0.1)
    assert all(leaf.dtype == jnp.float32 for leaf in jax.tree.leaves(nn.unbox(half.init(jax.random.key(0), _x()))))


def test_every_parameter_has_logical_axes():
    boxed = jax.eval_shape(Attention(H, kv_heads=2).init, jax.random.key(0), _x())["params"]
    assert boxed["key"]["kernel"].names == ("embed", "heads", "head_dim") and boxed["key"]["bias"].names == (
        "heads",
        "head_dim",
    )
    assert boxed["out"]["kernel"].names == ("heads", "head_dim", "embed") and boxed["out"]["bias"].names == ("embed",)


@pytest.mark.parametrize("options", [{}, {"kv_heads": 2, "rotary": True, "softmax": "off_by_one"}])
def test_projecting_first_and_attending_later_is_the_call(options):
    layer = Attention(H, **options)
    params = _init(layer, _x())
    context, key_bias = _x(9, seed=3), np.random.default_rng(4).normal(size=(B, 9)).astype(np.float32)
    bias = np.random.default_rng(5).normal(size=(1, H, N, 9)).astype(np.float32)
    want, _ = layer.apply(params, _x(), context, key_bias=key_bias, bias=bias)
    memory = layer.apply(params, context, method="project")
    assert memory.keys.shape == memory.values.shape == (B, options.get("kv_heads", H), 9, D // H)
    got = layer.apply(params, _x(), memory, key_bias=key_bias, bias=bias, method="attend")
    np.testing.assert_allclose(got, want, rtol=1e-5, atol=1e-6)
    memory = layer.apply(params, _x(), method="project")
    got = layer.apply(params, _x(), memory, causal=True, method="attend")
    np.testing.assert_allclose(got, layer.apply(params, _x(), causal=True)[0], rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("options", [{}, {"kv_heads": 2, "rotary": True, "softmax": "off_by_one"}])
def test_tokens_written_one_by_one_give_causal_attention(options):
    layer = Attention(H, **options)
    params = _init(layer, _x())
    want, _ = layer.apply(params, _x(), causal=True)
    # Two slots more than there are tokens; what they hold must not show.
    slots = jnp.full((B, options.get("kv_heads", H), N + 2, D // H), 9.0)

    @jax.jit
    def step(memory, x, position):
        places = jnp.reshape(position, (1, 1))
        memory = memory.write(layer.apply(params, x, places, method="project"), position)
        bias = jnp.where(jnp.arange(N + 2) <= position, 0.0, -jnp.inf)[None, None, None].repeat(H, 1)
        return layer.apply(params, x, memory, bias=bias, positions=places, method="attend"), memory

    memory = Memory(slots, slots)
    for position in range(N):
        got, memory = step(memory, _x()[:, position : position + 1], position)
        np.testing.assert_allclose(got[:, 0], want[:, position], rtol=1e-4, atol=1e-5)


def test_each_row_writes_into_a_slot_of_its_own_and_none_past_the_end():
    memory = Memory(jnp.zeros((3, 2, 4, 5)), jnp.ones((3, 2, 4, 5)))
    other = Memory(
        *(jnp.asarray(np.random.default_rng(seed).normal(size=(2, 2, 1, 5)), jnp.float32) for seed in (0, 1))
    )
    out = memory.write_each(other, jnp.asarray([3, 4]), rows=jnp.asarray([2, 0]))
    np.testing.assert_array_equal(out.keys[2, :, 3], other.keys[0, :, 0])
    np.testing.assert_array_equal(out.values[2, :, 3], other.values[0, :, 0])
    np.testing.assert_array_equal(out.keys.at[2, :, 3].set(0.0), memory.keys)
    np.testing.assert_array_equal(out.values.at[2, :, 3].set(1.0), memory.values)


def test_the_last_projection_may_do_without_the_bias_of_the_others():
    boxed = jax.eval_shape(Attention(H, out_bias=False).init, jax.random.key(0), _x())["params"]
    assert set(boxed["out"]) == {"kernel"}
    assert all(set(boxed[name]) == {"kernel", "bias"} for name in ("query", "key", "value"))


@pytest.mark.parametrize(("length", "position"), [(1, 4), (1, -1), (3, 2), (5, jnp.zeros((), jnp.int32))])
def test_a_memory_refuses_what_does_not_fit(length, position):
    memory, other = (Memory(jnp.zeros((1, 2, slots, 3)), jnp.zeros((1, 2, slots, 3))) for slots in (4, length))
    with pytest.raises(ValueError, match=rf"{length} token\(s\) at position .* do not fit into a memory of 4 slots"):
        memory.write(other, position)


def test_what_cannot_be_is_refused():
    with pytest.raises(ValueError, match=r"cannot hand out \['text_attention'\]"):
        Attention(H).init(jax.random.key(0), _x(), signals=("text_attention",))
    with pytest.raises(ValueError, match="sees only itself under a causal mask"):
        Attention(H).init(jax.random.key(0), _x(), causal=True, signals=("cls_attention",))
    with pytest.raises(ValueError, match="5 heads do not divide a width of 16"):
        Attention(5).init(jax.random.key(0), _x())
    with pytest.raises(ValueError, match="implementation='cuda' is not one of"):
        Attention(H, implementation="cuda").init(jax.random.key(0), _x())
    with pytest.raises(NotImplementedError, match="bias"):
        Attention(H, implementation="gpu").init(jax.random.key(0), _x(), bias=jnp.zeros((1, H, N, N)))


@pytest.mark.parametrize("context", [None, 9])
def test_the_score_excess_is_that_of_the_logits_between_real_tokens(context):
    layer = Attention(H, scale=8.0)
    source = _x() if context is None else _x(context, seed=3)
    params = _init(layer, _x(), source)
    key_bias = np.zeros(source.shape[:2], np.float32)
    key_bias[0, 1], key_bias[1, -2:] = -20.0, -np.inf
    bias = np.random.default_rng(2).normal(size=(1, H, N, source.shape[1])).astype(np.float32)
    given = None if context is None else source
    _, signals = layer.apply(params, _x(), given, key_bias=key_bias, bias=bias, signals=("score_excess",))
    tree = jax.tree.map(np.asarray, params["params"])
    query, key = (
        np.einsum("bnd,dhk->bhnk", x, tree[name]["kernel"]) + tree[name]["bias"][:, None]
        for name, x in (("query", _x()), ("key", source))
    )
    logits = 8.0 * np.einsum("bhqk,bhnk->bhqn", query, key) + bias
    for row in range(B):
        real = np.isfinite(key_bias[row])
        pairs = logits[row][:, :, real] if context else logits[row][:, real][:, :, real]
        np.testing.assert_allclose(signals.score_excess[row], np.mean(np.maximum(pairs, 5) - 5), rtol=1e-4)


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
@pytest.mark.parametrize("softmax", ["standard", "off_by_one"])
def test_a_row_whose_keys_are_all_removed_is_finite_forward_and_backward(softmax, dtype):
    layer = Attention(H, softmax=softmax, dtype=dtype)
    params = _init(layer, _x())
    key_bias = np.zeros((B, N), np.float32)
    key_bias[1] = -np.inf

    def loss(params, x, key_bias):
        out, signals = layer.apply(params, x, key_bias=key_bias, signals=("column_sums", "score_excess"))
        return sum(jnp.sum(leaf.astype(jnp.float32) ** 2) for leaf in (out, *jax.tree.leaves(signals))), out

    (_, out), grads = jax.jit(jax.value_and_grad(loss, argnums=(0, 1, 2), has_aux=True))(params, _x(), key_bias)
    # What is left of the output is its bias.
    want = np.broadcast_to(params["params"]["out"]["bias"], out[1].shape)
    np.testing.assert_allclose(out[1].astype(np.float32), want, rtol=1e-2)
    assert all(np.all(np.isfinite(np.asarray(leaf, np.float32))) for leaf in jax.tree.leaves(grads))
    assert not np.any(grads[1][1]) and np.all(np.any(grads[1][0], axis=-1))


def test_lists_of_blocks_attend_as_the_mask_does():
    """A bias of -inf on the pairs that no list holds gives the same output and the same gradient of parameters."""
    x, key_bias = _x(), np.array([[0.0] * 5 + [-np.inf], [0.5] * 6], np.float32)
    layer = Attention(H, kv_heads=2, softmax="off_by_one")
    params = _init(layer, x)
    mask = np.array([[True, False, True], [True, True, False], [False, True, True]])[None, None]
    index = from_block_mask(mask, queries=N, keys=N, block_q=2, block_k=2)
    bias = jnp.where(jnp.broadcast_to(index.token_mask(), (1, H, N, N)), 0.0, -jnp.inf)

    @functools.partial(jax.jit, static_argnums=2)
    def run(params, given, signals):
        def loss(params):
            out, handed = layer.apply(params, x, key_bias=key_bias, causal=True, signals=signals, **given)
            return jnp.sum(out**2), (out, handed)

        return jax.grad(loss, has_aux=True)(params)

    grads, (out, handed) = run(params, {"block_index": index}, ("keys", "values"))
    expected_grads, (expected, expected_handed) = run(params, {"bias": bias}, ("keys", "values"))
    np.testing.assert_allclose(out, expected, rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(handed.keys, expected_handed.keys, rtol=1e-6)
    for mine, other in zip(jax.tree.leaves(grads), jax.tree.leaves(expected_grads), strict=True):
        np.testing.assert_allclose(mine, other, rtol=1e-4, atol=1e-5)


def test_lists_of_blocks_take_no_bias_on_pairs_and_hand_out_no_part_of_the_dense_map():
    index = from_block_mask(np.ones((1, 1, 3, 3), bool), queries=N, keys=N, block_q=2, block_k=2)
    layer, x = Attention(H), _x()
    params = _init(layer, x)
    with pytest.raises(ValueError, match="none on pairs; got bias"):
        layer.apply(params, x, bias=np.zeros((1, H, N, N), np.float32), block_index=index)
    with pytest.raises(ValueError, match=r"'column_sums'.* parts of the dense map"):
        layer.apply(params, x, block_index=index, signals=("keys", "column_sums"))
