# SPDX-License-Identifier: Apache-2.0
"""Routed blocks: packed tokens equal a masked restatement, others stay bit for bit, decoding sees nothing of the future."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax.core import meta

from layers import generation
from layers.decoder_layers import Block, Stream
from layers.decoder_lm import DecoderLM
from layers.early_exit import SkipSchedule
from layers.mixture_of_depths import MixtureOfDepths, RoutedBlock
from tests.layers.test_decoder_decoding import IDS, LENGTHS, prompts, random_variables

SIZES = dict(heads=2, kv_heads=1, head_dim=8, mlp_dim=24)
X = jnp.asarray(np.random.default_rng(1).normal(size=(3, 8, 16)), jnp.float32)
MASK = jnp.asarray(np.arange(8) < np.array([[8], [5], [2]]))
STREAM = Stream.create(jnp.zeros((3, 8), int), MASK)


def unboxed(block):
    return jax.jit(lambda: meta.unbox(block.init(jax.random.key(0), X, STREAM)))()


def test_packed_tokens_equal_a_masked_dense_block_and_others_are_untouched():
    block = RoutedBlock(1, **SIZES, routing=MixtureOfDepths(share=0.4))
    variables = unboxed(block)
    out, aux = jax.jit(block.apply)(variables, X, STREAM)
    logits = np.asarray(X @ variables["params"]["router"]["kernel"])[..., 0]
    taken = np.zeros((3, 8), bool)
    for row in range(3):
        order = np.argsort(-np.where(MASK[row], logits[row], -np.inf), kind="stable")
        taken[row, order[:4]] = True
    taken &= np.asarray(MASK)
    np.testing.assert_array_equal(aux["ran"], taken)
    np.testing.assert_array_equal(np.asarray(out)[~taken], np.asarray(X)[~taken])
    plain = Block(1, **SIZES)
    dense = jax.jit(plain.apply)(variables, X, STREAM.replace(valid=jnp.asarray(taken)))[0]
    want = X + logits[..., None] * (dense - X)
    np.testing.assert_allclose(np.asarray(out)[taken], np.asarray(want)[taken], rtol=1e-4, atol=1e-5)
    predicted = block.apply(variables, X, method=lambda block, x: block.predictor(x))
    losses = np.logaddexp(0, predicted) - predicted * taken
    np.testing.assert_allclose(aux["losses"]["router"][0], losses[np.asarray(MASK)].sum(), rtol=1e-5)
    assert aux["losses"]["router"][1] == 15


def test_all_tokens_with_a_weight_of_one_are_the_dense_block():
    block = RoutedBlock(1, **SIZES, routing=MixtureOfDepths(share=1.0, weight="sigmoid"))
    variables = unboxed(block)
    # A logit of 40 for every token: the sigmoid is 1.
    x = X.at[..., 0].set(1.0)
    variables["params"]["router"]["kernel"] = jnp.zeros((16, 1)).at[0].set(40.0)
    out, aux = jax.jit(block.apply)(variables, x, STREAM)
    dense = jax.jit(Block(1, **SIZES).apply)(variables, x, STREAM)[0]
    mask = np.asarray(MASK)
    np.testing.assert_allclose(np.asarray(out)[mask], np.asarray(dense)[mask], rtol=1e-5, atol=1e-5)
    np.testing.assert_array_equal(aux["ran"], MASK)


MODEL = DecoderLM(vocab_size=11, width=16, depth=2, heads=2, mlp_dim=24, kv_heads=1, routing=MixtureOfDepths(share=0.4))
VARIABLES = random_variables(MODEL, IDS)
SAMPLING = MODEL.clone(routing=dataclasses.replace(MODEL.routing, choice="predictor"))


STEP = jax.jit(functools.partial(MODEL.apply, method="decode_step"))


@functools.partial(jax.jit, static_argnums=0)
def apply(model, ids, mask=None):
    return model.apply(VARIABLES, ids, mask)


def test_a_later_token_may_change_what_the_top_k_takes_and_never_what_the_predictor_takes():
    leaks = 0
    for token in range(2, 11):
        changed = IDS.at[:, -1].set(token)
        here, there = apply(MODEL, IDS)[0], apply(MODEL, changed)[0]
        leaks += int(jnp.any(here[:, :-1] != there[:, :-1]))
        here, there = apply(SAMPLING, IDS)[0], apply(SAMPLING, changed)[0]
        np.testing.assert_array_equal(here[:, :-1], there[:, :-1])
    assert leaks


@pytest.mark.parametrize("side", ["left", "right"])
def test_steps_give_the_logits_of_the_whole_sequence_that_the_predictor_routes(side):
    whole, aux = apply(SAMPLING, IDS)
    assert 0 < int(aux["tokens"][1].sum()) < IDS.size
    cache, ids = generation.prefill(MODEL, 4, VARIABLES, *prompts(side))
    for position in range(4):
        found, cache = STEP(VARIABLES, cache, ids, jnp.int32(position))
        for row, length in enumerate(LENGTHS):
            np.testing.assert_allclose(found[row], whole[row, length + position - 1], rtol=1e-4, atol=1e-5)
        ids = jnp.stack([IDS[row, length + position] for row, length in enumerate(LENGTHS)])
    np.testing.assert_array_equal(cache.tokens[0], [4, 4, 4])
    ran = [int(aux_row) for aux_row in cache.tokens[1]]
    assert 0 < sum(ran) < 12
    for row, length in enumerate(LENGTHS):
        tokens = [
            int(apply(SAMPLING, IDS, jnp.broadcast_to(jnp.arange(9) < end, (3, 9)))[1]["tokens"][1, row])
            for end in (length - 1, length + 3)
        ]
        assert ran[row] == tokens[1] - tokens[0]


def test_tokens_without_room_are_left_alone():
    tight = MODEL.clone(routing=dataclasses.replace(MODEL.routing, room=0.25))
    found, aux = generation.generate_lm(tight, VARIABLES, IDS, max_length=7, eos_id=-1)
    # 4 of 16 slots, of which the prompts may have taken some.
    assert jnp.all(aux["tokens"][1] <= 4) and jnp.all(aux["tokens"][0] == 7)
    assert jnp.all(found.lengths == 7)


def test_gradients_reach_the_router_through_the_tokens_and_the_predictor_through_its_loss_alone():
    @jax.jit
    @jax.grad
    def gradient(params, weight_of_loss):
        logits, aux = MODEL.apply({"params": params}, IDS)
        return jnp.sum(logits**2) + weight_of_loss * aux["losses"]["router"][0]

    without, with_loss = gradient(VARIABLES["params"], 0.0), gradient(VARIABLES["params"], 1.0)
    own = "block_1"
    assert np.all(np.asarray(without[own]["router"]["kernel"]) != 0)
    assert not any(np.any(leaf) for leaf in jax.tree.leaves(without[own]["predictor"]))
    assert all(np.any(leaf) for leaf in jax.tree.leaves(with_loss[own]["predictor"]))
    np.testing.assert_allclose(without[own]["router"]["kernel"], with_loss[own]["router"]["kernel"], rtol=1e-6)


def test_what_does_not_fit_is_refused():
    for share in (0.0, 1.5):
        with pytest.raises(ValueError, match=rf"share of the tokens in \(0, 1\]; got {share}"):
            MixtureOfDepths(share=share)
    with pytest.raises(ValueError, match="weight='square' is not one of"):
        MixtureOfDepths(weight="square")
    with pytest.raises(ValueError, match="every must be at least 1 block; got 0"):
        MixtureOfDepths(every=0)
    with pytest.raises(ValueError, match="set one of them"):
        MODEL.clone(policy=SkipSchedule((2, 1))).apply(VARIABLES, IDS)
