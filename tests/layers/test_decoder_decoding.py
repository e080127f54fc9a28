# SPDX-License-Identifier: Apache-2.0
"""Cached decoding: the same numbers as whole sequences, for prompts of any length and padding."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax.core import meta

from adaptive.sparsity.decoding import SinkWindow
from layers import generation
from layers.decoder_lm import DecoderLM
from layers.mixture_of_depths import MixtureOfDepths

MODEL = DecoderLM(vocab_size=11, width=16, depth=2, heads=4, mlp_dim=24, kv_heads=2, head_dim=6, qkv_bias=True)
IDS = jnp.asarray(np.random.default_rng(0).integers(2, 11, size=(3, 9)))


def random_variables(model, ids):
    """Random in every leaf, so that scales and biases count; drawn by NumPy, so that no initialiser is compiled."""
    rng = np.random.default_rng(0)

    def draw(path, leaf):
        values = rng.normal(size=leaf.shape) * (0.5 if "embedding" in str(path) else leaf.shape[0] ** -0.5)
        return jnp.asarray(values + ("scale" in str(path)), leaf.dtype)

    shapes = jax.eval_shape(lambda: meta.unbox(model.init(jax.random.key(0), ids)))
    return jax.tree_util.tree_map_with_path(draw, shapes)


VARIABLES = random_variables(MODEL, IDS)
LENGTHS = (4, 1, 5)


def prompts(side):
    """The first 4, 1 and 5 ids of each row, padded with other ids on one side."""
    ids, mask = np.full((3, 5), 7), np.zeros((3, 5), bool)
    for row, length in enumerate(LENGTHS):
        where = slice(0, length) if side == "right" else slice(5 - length, 5)
        ids[row, where], mask[row, where] = IDS[row, :length], True
    return jnp.asarray(ids), jnp.asarray(mask)


@pytest.mark.parametrize("side", ["left", "right"])
def test_steps_give_the_logits_of_the_whole_sequence(side):
    whole = MODEL.apply(VARIABLES, IDS)[0]
    cache, ids = generation.prefill(MODEL, 4, VARIABLES, *prompts(side))
    np.testing.assert_array_equal(ids, [IDS[row, length - 1] for row, length in enumerate(LENGTHS)])

    @jax.jit
    def step(cache, ids, position):
        return MODEL.apply(VARIABLES, cache, ids, position, method="decode_step")

    for position in range(4):
        found, cache = step(cache, ids, jnp.int32(position))
        for row, length in enumerate(LENGTHS):
            np.testing.assert_allclose(found[row], whole[row, length + position - 1], rtol=1e-4, atol=1e-5)
        ids = jnp.stack([IDS[row, length + position] for row, length in enumerate(LENGTHS)])
    assert step._cache_size() == 1
    np.testing.assert_array_equal(cache.tokens, np.full((2, 3), 4))
    np.testing.assert_array_equal(cache.steps, [4, 4])


def test_greedy_continuations_are_those_of_the_argmax_loop_and_ignore_padding():
    found, _ = generation.generate_lm(MODEL, VARIABLES, *prompts("left"), max_length=6, eos_id=5)
    other, _ = generation.generate_lm(MODEL, VARIABLES, *prompts("right"), max_length=6, eos_id=5)
    np.testing.assert_array_equal(found.tokens, other.tokens)
    apply = jax.jit(lambda ids: MODEL.apply(VARIABLES, ids)[0])
    for row, length in enumerate(LENGTHS):
        ids = list(np.asarray(IDS[row, :length]))
        while len(ids) < length + 6 and ids[-1:] != [5]:
            padded = jnp.asarray([ids + [0] * (11 - len(ids))])
            ids.append(int(apply(padded)[0, len(ids) - 1].argmax()))
        want = ids[length:]
        np.testing.assert_array_equal(found.tokens[row], want + [0] * (6 - len(want)))
        assert found.lengths[row] == len(want)


def test_a_row_draws_the_same_in_any_batch():
    ids, mask = prompts("right")
    settings = dict(max_length=5, temperature=1.0, top_p=0.9)
    keys = jax.random.split(jax.random.key(3), 3)
    together, _ = generation.generate_lm(MODEL, VARIABLES, ids, mask, key=keys, **settings)
    alone, _ = generation.generate_lm(MODEL, VARIABLES, ids[2:], mask[2:], key=keys[2:], **settings)
    np.testing.assert_array_equal(together.tokens[2], alone.tokens[0])


def test_the_cache_is_donated_and_another_length_of_text_compiles_nothing_new():
    ids, mask = prompts("right")
    cache, first = generation.prefill(MODEL, 4, VARIABLES, ids, mask)
    settings = (("max_length", 4),)
    generation.decode_lm(MODEL, settings, VARIABLES, cache, first)
    assert all(leaf.is_deleted() for leaf in jax.tree.leaves(cache.memories))
    sizes = generation.prefill._cache_size(), generation.decode_lm._cache_size()
    cache, first = generation.prefill(MODEL, 4, VARIABLES, ids, ~mask)
    generation.decode_lm(MODEL, settings, VARIABLES, cache, first)
    assert sizes == (generation.prefill._cache_size(), generation.decode_lm._cache_size())


def test_what_does_not_fit_is_refused():
    with pytest.raises(ValueError, match="max_length must be at least 1 token; got 0"):
        generation.prefill(MODEL, 0, VARIABLES, IDS)
    cache, first = generation.prefill(MODEL, 2, VARIABLES, IDS)
    with pytest.raises(ValueError, match=r"position must lie in 0..1 \(max_length of the cache\); got 2"):
        MODEL.apply(VARIABLES, cache, first, 2, method="decode_step")
    with pytest.raises(ValueError, match=r"\[B, N\], alike; got \(3, 9\) and \(3, 8\)"):
        generation.prefill(MODEL, 2, VARIABLES, IDS, jnp.ones((3, 8)))


def test_pages_that_hold_every_token_change_nothing():
    model = MODEL.clone(reads=SinkWindow(sinks=0, window=16, page=16))
    given, mask = prompts("left")
    (plain, ids), (paged, _) = (generation.prefill(one, 4, VARIABLES, given, mask) for one in (MODEL, model))
    assert (plain.memories[0].keys.shape[2], paged.memories[0].keys.shape[2]) == (9, 16)
    for position in range(2):
        want, plain = MODEL.apply(VARIABLES, plain, ids, position, method="decode_step")
        got, paged = model.apply(VARIABLES, paged, ids, position, method="decode_step")
        np.testing.assert_allclose(got, want, rtol=1e-5, atol=1e-5)


def test_pages_between_the_sinks_and_the_window_are_not_read():
    model = MODEL.clone(reads=SinkWindow(sinks=1, window=16, page=16))
    cache, ids = generation.prefill(model, 50, VARIABLES, *prompts("right"))
    assert cache.memories[0].keys.shape[2] == 64

    @jax.jit
    def step(cache):
        return model.apply(VARIABLES, cache, ids, 45, method="decode_step")[0]

    def filled(page, value):
        rows = slice(16 * page, 16 * page + 16)
        return cache.replace(memories=jax.tree.map(lambda leaf: leaf.at[:, :, rows].set(value), cache.memories))

    # Slot 50 stands in page 3; a window of 16 may begin in page 2.
    np.testing.assert_array_equal(step(filled(1, jnp.nan)), step(cache))
    for page in (0, 2, 3):
        assert np.max(abs(step(filled(page, 1.0)) - step(cache))) > 1e-3


def test_routed_blocks_have_no_pages():
    with pytest.raises(ValueError, match="set routing or reads"):
        MODEL.clone(reads=SinkWindow(), routing=MixtureOfDepths()).apply(VARIABLES, IDS)
