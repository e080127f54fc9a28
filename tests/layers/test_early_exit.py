# SPDX-License-Identifier: Apache-2.0
"""Decoding in fewer layers: equal to whole sequences under a mask of layers, and layers that really do not run."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from adaptive.depth import calm, skip_decode
from layers import generation
from layers.decoder_lm import DecoderLM
from layers.early_exit import ConfidenceExit, FixedLayers, SkipSchedule
from tests.layers.test_decoder_decoding import IDS, LENGTHS, prompts, random_variables

MODEL = DecoderLM(
    vocab_size=11, width=16, depth=3, heads=2, mlp_dim=24, kv_heads=1, tie_embeddings=True, exit_classifier=True
)
# Making parameters does not run the classifier.
VARIABLES = random_variables(MODEL, IDS)
STEPS = 4


@functools.partial(jax.jit, static_argnums=0)
def step(model, variables, cache, ids, position):
    return model.apply(variables, cache, ids, position, method="decode_step")


def decode(model, side="left"):
    """Teacher-forced: logits `[B, T, V]` of the last prompt token and those after it, and the cache."""
    # Prompts run all layers but under a schedule; one compiled program serves them all.
    reader = model if isinstance(model.policy, SkipSchedule) else model.clone(policy=None)
    cache, ids = generation.prefill(reader, STEPS, VARIABLES, *prompts(side))
    traces = step._cache_size()
    found = []
    for position in range(STEPS):
        logits, cache = step(model, VARIABLES, cache, ids, jnp.int32(position))
        found.append(logits)
        ids = jnp.stack([IDS[row, length + position] for row, length in enumerate(LENGTHS)])
    assert step._cache_size() <= traces + 1
    return jnp.stack(found, axis=1), cache


FULL = jax.jit(functools.partial(MODEL.apply, output_hidden_states=True))


def mask_of(active, prompt=True):
    """`[L, B, N]` for whole sequences from `active [B, T, L]` of decoded tokens and `prompt [L]` of those before."""
    mask = np.ones((3, IDS.shape[1], 3), bool)
    for row, length in enumerate(LENGTHS):
        mask[row, : length - 1] = prompt
        mask[row, length - 1 : length - 1 + STEPS] = active[row]
    return jnp.asarray(mask.transpose(2, 0, 1))


def whole(active, prompt=True):
    """The same logits by whole sequences, of the layers that ran."""
    logits = FULL(VARIABLES, IDS, active=mask_of(active, prompt))[0]
    return jnp.stack([logits[row, length - 1 : length - 1 + STEPS] for row, length in enumerate(LENGTHS)])


@pytest.mark.parametrize("counts", [(3, 2, 2, 1), (2, 1)])
def test_a_schedule_decodes_as_whole_sequences_with_those_layers(counts):
    found, cache = decode(MODEL.clone(policy=SkipSchedule(counts)))
    counts = [*counts, *[counts[-1]] * (STEPS - len(counts))]
    active = skip_decode.active_layers(counts, 3)
    np.testing.assert_allclose(found, whole(np.stack([active] * 3), active[0]), rtol=1e-4, atol=1e-5)
    np.testing.assert_array_equal(cache.steps, active.sum(0))
    np.testing.assert_array_equal(cache.tokens, np.repeat(active.sum(0)[:, None], 3, axis=1))
    # A skipped layer stores nothing, and one that no token runs not even prompts; their last tokens are decoded.
    for layer, memory in enumerate(cache.memories):
        written = np.asarray(jnp.any(memory.keys != 0, axis=(0, 1, 3)))
        np.testing.assert_array_equal(written, [active[0, layer]] * 5 + active[:, layer].tolist())


def test_a_schedule_of_all_layers_is_the_dense_decoder():
    np.testing.assert_array_equal(decode(MODEL.clone(policy=SkipSchedule((3,))))[0], decode(MODEL)[0])


def test_one_compiled_step_holds_each_skippable_layer_in_a_branch_of_its_own():
    model = MODEL.clone(policy=SkipSchedule((3, 2)))
    cache, ids = generation.prefill(model, STEPS, VARIABLES, *prompts("left"))
    step = functools.partial(model.apply, method="decode_step")
    text = str(jax.make_jaxpr(step)(VARIABLES, cache, ids, jnp.int32(0)))
    # Of three layers the lowest and the highest always run.
    assert text.count(" cond[") == 1


def test_fixed_layers_leave_the_others_out_of_the_program():
    model = MODEL.clone(policy=FixedLayers((0, 2)))
    found, cache = decode(model)
    np.testing.assert_array_equal(cache.steps, [4, 0, 4])
    np.testing.assert_allclose(found, whole(np.tile([True, False, True], (3, STEPS, 1))), rtol=1e-4, atol=1e-5)
    cache, ids = jax.eval_shape(functools.partial(MODEL.apply, max_length=2, method="prefill"), VARIABLES, IDS)
    programs = [jax.make_jaxpr(step, static_argnums=0)(own, VARIABLES, cache, ids, 0) for own in (model, MODEL)]
    few, many = (str(program).count("= dot_general") for program in programs)
    assert (few - 1) * 3 == (many - 1) * 2


def test_no_threshold_above_one_stops_and_zero_stops_at_once():
    found, cache = decode(MODEL.clone(policy=ConfidenceExit("saturation", threshold=1.1)))
    np.testing.assert_allclose(found, decode(MODEL)[0], rtol=1e-5, atol=1e-6)
    np.testing.assert_array_equal(cache.steps, [4, 4, 4])
    _, cache = decode(MODEL.clone(policy=ConfidenceExit(threshold=0.0, first=2, decay=float("inf"))))
    np.testing.assert_array_equal(cache.steps, [4, 4, 0])


@pytest.mark.parametrize(("measure", "every"), [("margin", 1), ("saturation", 2), ("classifier", 1)])
def test_confident_rows_stop_and_leave_keys_of_their_features_above(measure, every):
    """A plain loop over whole sequences, one token after the other, makes the same choices and logits."""
    policy = ConfidenceExit(measure, threshold={"classifier": 0.45}.get(measure, 0.1), every=every, length=4)
    found, cache = decode(MODEL.clone(policy=policy))
    active = np.ones((3, STEPS, 3), bool)
    bound = MODEL.bind(VARIABLES)
    for position in range(STEPS):
        states = FULL(VARIABLES, IDS, active=mask_of(active))[1]["hidden_states"]
        states = jnp.stack([x[np.arange(3), np.asarray(LENGTHS) - 1 + position] for x in states])
        limit = calm.threshold_at(policy.threshold, position, length=4)
        running = np.ones(3, bool)
        for layer in range(1, 3):
            if (layer - 1) % every == 0:
                running &= np.asarray(policy.confidence(states[layer], states[layer - 1], bound) < limit)
            active[:, position, layer] = running
    # Some layers run for a part of the rows, packed.
    assert np.isin(active.sum(axis=0), (1, 2)).any()
    np.testing.assert_array_equal(cache.tokens, active.sum(axis=1).T)
    np.testing.assert_array_equal(cache.steps, active.any(axis=0).sum(axis=0))
    np.testing.assert_allclose(found, whole(active), rtol=1e-4, atol=1e-5)


def test_what_does_not_fit_is_refused():
    with pytest.raises(ValueError, match="must not rise: token 2 has 3 layers after 2"):
        SkipSchedule((4, 2, 3))
    with pytest.raises(ValueError, match=r"every token runs 1..3 layers.*got \(5, 3\)"):
        decode(MODEL.clone(policy=SkipSchedule((5, 3))))
    with pytest.raises(ValueError, match=r"layers must be some of 0..2; got \(0, 4\)"):
        decode(MODEL.clone(policy=FixedLayers((0, 4))))
    with pytest.raises(ValueError, match="measure='certainty' is not one of"):
        ConfidenceExit("certainty")
    with pytest.raises(ValueError, match="at least 1 layer; got 0 and 1"):
        ConfidenceExit(first=0)
    with pytest.raises(ValueError, match="no classifier of exits; set exit_classifier=True"):
        MODEL.clone(exit_classifier=False).apply(VARIABLES, jnp.zeros((1, 16)), method="exit_confidence")
