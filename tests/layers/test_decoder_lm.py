# SPDX-License-Identifier: Apache-2.0
"""The decoder: causal, blind to padding on either side, equal to a plain restatement."""

import dataclasses
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax.core import meta

from layers.attention import Attention
from layers.decoder_layers import Stream
from layers.decoder_lm import DecoderLM
from layers.norms import RMSNorm

MODEL = DecoderLM(
    vocab_size=11, width=16, depth=2, heads=4, mlp_dim=24, kv_heads=2, head_dim=6, qkv_bias=True, tie_embeddings=True
)
IDS = jnp.asarray(np.random.default_rng(0).integers(1, 11, size=(2, 7)))


def variables(model=MODEL, seed=0):
    """Random in every leaf, so that scales and biases count."""
    tree = meta.unbox(model.init(jax.random.key(seed), IDS))
    leaves, shape = jax.tree.flatten(tree)
    keys = jax.random.split(jax.random.key(seed + 1), len(leaves))
    noisy = [leaf + 0.2 * jax.random.normal(key, leaf.shape) for leaf, key in zip(leaves, keys, strict=True)]
    return jax.tree.unflatten(shape, noisy)


VARIABLES = variables()


@jax.jit
def logits(ids, mask=None):
    return MODEL.apply(VARIABLES, ids, mask)[0]


def restated(params, ids):
    """NumPy: `[N, V]` logits of one sequence, one head and one query at a time."""
    x = np.asarray(params["embedding"]["embedding"])[ids]

    def norm(x, own):
        return x / np.sqrt((x**2).mean(-1, keepdims=True) + 1e-6) * np.asarray(own["scale"])

    def turn(x, place):
        angle = place * 10_000.0 ** (-np.arange(3) / 3)
        first, second = x[:3], x[3:]
        return np.concatenate(
            [first * np.cos(angle) - second * np.sin(angle), second * np.cos(angle) + first * np.sin(angle)]
        )

    for layer in range(2):
        own = jax.tree.map(np.asarray, params[f"block_{layer}"])
        attention, normed = own["attention"], norm(x, own["attention_norm"])
        q, k, v = (
            np.einsum("nd,dhe->nhe", normed, attention[p]["kernel"]) + attention[p]["bias"]
            for p in ("query", "key", "value")
        )
        y = np.zeros_like(x)
        for head in range(4):
            for i in range(len(ids)):
                scores = np.array([turn(q[i, head], i) @ turn(k[j, head // 2], j) for j in range(i + 1)]) / np.sqrt(6)
                weights = np.exp(scores - scores.max())
                y[i] += (weights / weights.sum()) @ v[: i + 1, head // 2] @ attention["out"]["kernel"][head]
        x = x + y
        normed, mlp = norm(x, own["mlp_norm"]), own["mlp"]
        gate = normed @ mlp["gate"]["kernel"]
        x = x + (gate / (1 + np.exp(-gate)) * (normed @ mlp["hidden"]["kernel"])) @ mlp["out"]["kernel"]
    return norm(x, params["norm"]) @ np.asarray(params["embedding"]["embedding"]).T


def test_equals_a_plain_restatement():
    for ids, found in zip(np.asarray(IDS), logits(IDS), strict=True):
        np.testing.assert_allclose(found, restated(VARIABLES["params"], ids), rtol=2e-4, atol=2e-4)


def test_no_token_sees_a_later_one():
    changed = IDS.at[:, 4].add(1) % 11
    here, there = logits(IDS), logits(changed)
    np.testing.assert_array_equal(here[:, :4], there[:, :4])
    assert jnp.all(jnp.any(here[:, 4:] != there[:, 4:], axis=-1))


@pytest.mark.parametrize("before", [0, 1, 3])
def test_padding_on_either_side_changes_nothing(before):
    padded = jnp.pad(IDS, ((0, 0), (before, 3 - before)), constant_values=5)
    mask = jnp.pad(jnp.ones_like(IDS, bool), ((0, 0), (before, 3 - before)))
    found, aux = MODEL.apply(VARIABLES, padded, mask)
    np.testing.assert_allclose(found[:, before : before + 7], logits(IDS), rtol=1e-5, atol=1e-5)
    np.testing.assert_array_equal(aux["tokens"], [[7, 7], [7, 7]])


def test_a_layer_leaves_inactive_tokens_as_they_are():
    active = jnp.asarray([[[True] * 4 + [False] * 3], [[False] * 7]])
    _, aux = MODEL.apply(VARIABLES, IDS, active=active, output_hidden_states=True)
    before, middle, after = aux["hidden_states"]
    whole = MODEL.apply(VARIABLES, IDS, output_hidden_states=True)[1]["hidden_states"]
    np.testing.assert_array_equal(middle[:, 4:], before[:, 4:])
    np.testing.assert_array_equal(after, middle)
    np.testing.assert_allclose(middle[:, :4], whole[1][:, :4], rtol=1e-6)
    np.testing.assert_array_equal(aux["tokens"], [[4, 4], [0, 0]])


def test_remat_and_layer_by_layer_are_the_same_model():
    again = MODEL.clone(remat=True).apply(VARIABLES, IDS)[0]
    np.testing.assert_allclose(again, logits(IDS), rtol=1e-5, atol=1e-5)

    stream = Stream.create(IDS)
    x = MODEL.apply(VARIABLES, IDS, method="embed")
    for layer in range(2):
        x, _ = MODEL.apply(VARIABLES, x, layer, stream, method="run_layer")
    np.testing.assert_allclose(MODEL.apply(VARIABLES, x, method="logits"), logits(IDS), rtol=1e-5, atol=1e-5)


class Scaled(nn.Module):
    """A linear map times what each layer is given."""

    layer: int
    dtype: Any

    @nn.compact
    def __call__(self, x, inputs, deterministic):
        y = nn.Dense(x.shape[-1], dtype=self.dtype)(x) * inputs[..., None]
        return y, {"layer": jnp.asarray(self.layer)}


@dataclasses.dataclass(frozen=True)
class MakeScaled:
    def build(self, layer, *, dtype, param_dtype):
        return Scaled(layer, dtype)


@pytest.mark.parametrize("remat", [False, True])
def test_another_feed_forward_part_gets_its_layers_inputs_and_hands_out_what_it_likes(remat):
    model = MODEL.clone(feed_forward=MakeScaled(), remat=remat)
    inputs = jnp.asarray(np.random.default_rng(2).random((2, 2, 7)), jnp.float32)
    tree = meta.unbox(model.init(jax.random.key(0), IDS, feed_forward_inputs=inputs))
    assert set(tree["params"]["block_0"]["mlp"]) == {"Dense_0"}
    run = jax.jit(lambda inputs: model.apply(tree, IDS, feed_forward_inputs=inputs, output_hidden_states=True))
    _, aux = run(inputs)
    assert [int(own["layer"]) for own in aux["feed_forward"]] == [0, 1]
    # Only the second layer's part is turned off, by its own entry.
    _, off = run(inputs.at[1].set(0.0))
    np.testing.assert_array_equal(off["hidden_states"][1], aux["hidden_states"][1])
    own = tree["params"]["block_1"]
    normed = RMSNorm().apply({"params": own["attention_norm"]}, off["hidden_states"][1])
    attention = Attention(4, head_dim=6, kv_heads=2, out_bias=False, rotary=True)
    y, _ = attention.apply({"params": own["attention"]}, normed, causal=True)
    np.testing.assert_allclose(off["hidden_states"][2], off["hidden_states"][1] + y, rtol=1e-5, atol=1e-5)
    assert np.any(off["hidden_states"][2] != aux["hidden_states"][2])


@pytest.mark.parametrize(
    ("attributes", "message"),
    [
        (dict(kv_heads=3), "kv_heads must divide heads; 3 does not divide 4"),
        (dict(head_dim=None, width=10), "4 heads do not divide a width of 10; set head_dim"),
    ],
)
def test_sizes_that_do_not_fit_are_refused(attributes, message):
    with pytest.raises(ValueError, match=message):
        MODEL.clone(**attributes).init(jax.random.key(0), IDS)


def test_arguments_that_do_not_fit_are_refused():
    with pytest.raises(ValueError, match=r"active must broadcast to \[L, B, N\] = \[2, 2, 7\]; got \[3, 1, 7\]"):
        MODEL.apply(VARIABLES, IDS, active=jnp.ones((3, 1, 7), bool))
    with pytest.raises(ValueError, match=r"layer must lie in 0..1; got 2"):
        MODEL.apply(VARIABLES, jnp.zeros((1, 1, 16)), 2, Stream.create(IDS[:1, :1]), method="run_layer")
    with pytest.raises(TypeError, match="token ids must be integers"):
        MODEL.apply(VARIABLES, IDS.astype(float))


def test_parameters_have_logical_axes_that_may_be_split():
    boxed = jax.eval_shape(MODEL.clone(tie_embeddings=False, exit_classifier=True).init, jax.random.key(0), IDS)[
        "params"
    ]
    assert boxed["embedding"]["embedding"].names == ("vocab", "embed")
    assert boxed["head"]["kernel"].names == ("embed", "vocab")
    assert set(boxed["block_0"]["attention"]["out"]) == {"kernel"}
    assert all(
        isinstance(leaf, nn.Partitioned)
        for leaf in jax.tree.leaves(boxed, is_leaf=lambda x: isinstance(x, nn.Partitioned))
    )


def test_bfloat16_keeps_float32_parameters_and_logits():
    half = MODEL.clone(dtype=jnp.bfloat16)
    out = half.apply(VARIABLES, IDS)[0]
    assert out.dtype == jnp.float32
    np.testing.assert_allclose(out, logits(IDS), atol=0.3)
