# SPDX-License-Identifier: Apache-2.0
"""T5 decoding with a cache and generating: step by step and all at once agree, whatever the encoder did to its tokens."""

import functools
import re

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from layers import generation
from layers.generation import generate_t5
from layers.hooks import Reduce
from layers.t5 import T5

# Few buckets, so that short sequences reach the logarithmic ones; as many heads as rows would hide a wrong axis.
MODEL = T5(
    vocab_size=40, width=16, mlp_dim=24, heads=3, head_dim=8, encoder_layers=2, decoder_layers=2, num_buckets=8,
    max_distance=12, softmax="off_by_one", gate="mrt5", gate_layer=1,
)  # fmt: skip
LENGTH, TARGETS, RUNGS = 16, 6, (6, 16)
GREEDY = dict(max_length=TARGETS, eos_id=-1)
SAMPLED = dict(max_length=4, deletion="hard", temperature=1.0, top_p=0.9)
FAST = {"xla_backend_optimization_level": "0"}


def draw(seed=0, lengths=(LENGTH, 9)):
    """Ids `[B, N]` without 0 in real tokens, and decoder ids `[B, T]` that start with 0."""
    rng = np.random.default_rng(seed)
    ids = rng.integers(1, 40, (len(lengths), LENGTH)) * (np.arange(LENGTH) < np.array(lengths)[:, None])
    targets = np.pad(rng.integers(1, 40, (len(lengths), TARGETS - 1)), ((0, 0), (1, 0)))
    return ids.astype(np.int32), targets.astype(np.int32)


@functools.cache
def variables(model):
    """Random parameters, large enough that every part of the model shows; about half of the tokens are deleted."""
    ids, targets = draw()
    shapes = nn.unbox(jax.eval_shape(model.init, jax.random.key(0), ids, None, targets))
    rng = np.random.default_rng(1)
    return jax.tree.map_with_path(
        lambda path, leaf: (path[-1].key == "scale") + 0.2 * rng.normal(size=leaf.shape).astype(np.float32), shapes
    )


@functools.cache
def scorer(model, deletion):
    run = functools.partial(model.apply, deletion=deletion)
    return jax.jit(lambda ids, targets: run(variables(model), ids, None, targets)[0], compiler_options=FAST)


@functools.cache
def stepper(model, deletion):
    """Logits `[B, T, V]` made one token at a time."""

    def run(ids, targets):
        encoded = model.apply(variables(model), ids, deletion=deletion, method="encode")
        cache = model.apply(variables(model), encoded, TARGETS, method="start_decoding")

        def step(cache, inputs):
            logits, cache = model.apply(variables(model), cache, *inputs, method="decode_step")
            return cache, logits

        _, logits = jax.lax.scan(step, cache, (targets.T, jnp.arange(TARGETS)))
        return jnp.swapaxes(logits, 0, 1)

    return jax.jit(run, compiler_options=FAST)


# --- Steps --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("attributes", "deletion"),
    [
        ({}, None),
        ({}, "soft"),
        ({"rungs": RUNGS}, "hard"),
        ({"capacity": 5}, "hard"),
        ({"scan_layers": True}, None),
        ({"scan_layers": True, "rungs": RUNGS, "remat": True}, "hard"),
        ({"softmax": "standard", "tie_embeddings": True, "remat": True}, "soft"),
        ({"gate": None, "hooks": (Reduce("tome", (12, 8), place="after"),)}, None),
        # Nine tokens of the first row survive deletion, so that one pair at least is merged.
        ({"capacity": 12, "hooks": (Reduce("tome", (16, 8), place="after"),)}, "hard"),
    ],
)
def test_each_step_gives_the_logits_of_the_whole_forward_pass(attributes, deletion):
    model, batch = MODEL.clone(**attributes), draw(1)
    want = scorer(model, deletion)(*batch)
    np.testing.assert_allclose(stepper(model, deletion)(*batch), want, atol=1e-5)
    assert np.ptp(want, axis=1).max() > 0.1


def test_steps_in_bfloat16_are_close_to_the_whole_forward_pass_and_keep_a_narrow_cache():
    model, batch = MODEL.clone(dtype=jnp.bfloat16), draw(1)
    want = scorer(model, "soft")(*batch)
    got = stepper(model, "soft")(*batch)
    assert got.dtype == jnp.float32
    np.testing.assert_allclose(got, want, atol=0.02 * np.abs(want).max())
    encoded = jax.eval_shape(lambda: model.apply(variables(model), batch[0], method="encode"))
    cache = jax.eval_shape(lambda e: model.apply(variables(model), e, 4, method="start_decoding"), encoded)
    assert {leaf.dtype for leaf in jax.tree.leaves((cache.own, cache.cross))} == {jnp.dtype(jnp.bfloat16)}


def test_scoring_from_what_was_encoded_is_the_call():
    model, (ids, targets) = MODEL.clone(rungs=RUNGS), draw(1)

    @functools.partial(jax.jit, compiler_options=FAST)
    def run(ids, targets):
        encoded = model.apply(variables(model), ids, deletion="hard", method="encode")
        return encoded, model.apply(variables(model), encoded, targets, method="decode")

    encoded, logits = run(ids, targets)
    np.testing.assert_allclose(logits, scorer(model, "hard")(ids, targets), atol=1e-5)
    np.testing.assert_array_equal(encoded.valid.sum(-1), encoded.counts)
    np.testing.assert_array_equal(encoded.valid, np.arange(LENGTH) < np.asarray(encoded.counts)[:, None])
    assert 1 < encoded.counts[1] < encoded.counts[0] < LENGTH


@pytest.mark.parametrize("scan_layers", [False, True])
def test_a_step_writes_its_own_slot_and_what_lies_behind_does_not_count(scan_layers):
    model, (ids, targets) = MODEL.clone(scan_layers=scan_layers), draw()

    @functools.partial(jax.jit, compiler_options=FAST)
    def run(rubbish):
        encoded = model.apply(variables(model), ids, method="encode")
        cache = model.apply(variables(model), encoded, TARGETS, method="start_decoding")
        cache = cache.replace(own=jax.tree.map(lambda leaf: leaf + rubbish, cache.own))
        return model.apply(variables(model), cache, targets[:, 0], 0, method="decode_step")

    logits, cache = run(0.0)
    np.testing.assert_allclose(run(7.0)[0], logits, atol=1e-6)
    assert cache.slots == TARGETS
    for leaf in jax.tree.leaves(cache.own):
        written = np.any(np.asarray(leaf) != 0, axis=(-1, -3))
        np.testing.assert_array_equal(written, np.broadcast_to(np.arange(TARGETS) == 0, written.shape))


def test_unrolled_decoder_layers_are_those_of_the_scanned_stack():
    model, (ids, targets) = MODEL.clone(scan_layers=True), draw()
    unrolled, params = model.unrolled_decoder(variables(model))

    @functools.partial(jax.jit, compiler_options=FAST)
    def run(ids, targets):
        encoded = model.apply(variables(model), ids, method="encode")
        return unrolled.apply(params, encoded, targets, method="decode")

    np.testing.assert_allclose(run(ids, targets), scorer(model, None)(ids, targets), atol=1e-5)
    assert not unrolled.scan_layers and MODEL.unrolled_decoder(variables(MODEL)) == (MODEL, variables(MODEL))


# --- Generation ---------------------------------------------------------------------------------------------------


@functools.cache
def generator(model, **how):
    run = functools.partial(generate_t5, model, variables(model), **how)
    return jax.jit(lambda ids, key=None, mask=None: run(ids, mask, key=key), compiler_options=FAST)


def naive(model, deletion, ids, *, max_length, eos_id):
    """Greedy decoding with a whole forward pass a token, in Python."""
    tokens, lengths, log_probs = (np.zeros((len(ids), max_length), kind) for kind in (np.int32, bool, np.float32))
    given_ids = np.zeros((len(ids), TARGETS), np.int32)
    done = np.zeros(len(ids), bool)
    for position in range(max_length):
        logits = np.asarray(scorer(model, deletion)(ids, given_ids))[:, position]
        chosen = np.where(done, 0, logits.argmax(-1))
        tokens[:, position], lengths[:, position] = chosen, ~done
        log_probs[:, position] = np.where(done, 0, np.asarray(jax.nn.log_softmax(logits))[range(len(ids)), chosen])
        done |= chosen == eos_id
        given_ids[:, position + 1 :] = chosen[:, None]
    return tokens, lengths.sum(-1), log_probs


@pytest.mark.parametrize(
    ("attributes", "deletion"),
    [
        ({}, None),
        ({"softmax": "standard"}, "soft"),
        ({"rungs": RUNGS, "scan_layers": True}, "hard"),
        ({"gate": None, "hooks": (Reduce("tome", (12, 8), place="after"),)}, None),
    ],
)
def test_greedy_generation_is_the_naive_loop(attributes, deletion):
    model, (ids, _) = MODEL.clone(**attributes), draw(0, (LENGTH, 9, 12))
    endless = naive(model, deletion, ids, max_length=TARGETS, eos_id=-1)[0]
    # An end of sequence that some rows reach and others do not.
    eos_id = next(int(token) for token in endless[:, 1] if not all(token in row for row in endless))
    got = generator(model, max_length=TARGETS, deletion=deletion, eos_id=eos_id)(ids)[0]
    tokens, lengths, log_probs = naive(model, deletion, ids, max_length=TARGETS, eos_id=eos_id)
    assert lengths.min() < lengths.max() == TARGETS
    np.testing.assert_array_equal(got.tokens, tokens)
    np.testing.assert_array_equal(got.lengths, lengths)
    np.testing.assert_allclose(got.log_probs, log_probs, atol=1e-5)


@settings(max_examples=12, deadline=None)
@given(
    seed=st.integers(0, 1000),
    lengths=st.tuples(st.integers(1, 16), st.integers(1, 16)),
    rungs=st.sampled_from([RUNGS, (5, 11, 32)]),
)
def test_the_ladder_never_changes_what_is_generated(seed, lengths, rungs):
    ids, _ = draw(seed, lengths)
    want, _ = generator(MODEL, **SAMPLED)(ids, jax.random.key(seed))
    got, _ = generator(MODEL, rungs=rungs, **SAMPLED)(ids, jax.random.key(seed))
    np.testing.assert_array_equal(got.tokens, want.tokens)
    np.testing.assert_allclose(got.log_probs, want.log_probs, atol=1e-5)


def test_padding_on_the_left_and_in_between_is_packed_away():
    ids, _ = draw(2, (12, 3))
    run, plain = generator(MODEL, rungs=RUNGS, **GREEDY), generator(MODEL, **GREEDY)
    want, _ = run(ids)
    # Relative positions are those of the tokens among each other.
    left = np.stack([np.roll(row, shift) for row, shift in zip(ids, (2, 13), strict=True)])
    np.testing.assert_array_equal(run(left)[0].tokens, want.tokens)
    holes = draw(2)[0] * ~np.isin(np.arange(LENGTH), (1, 4, 5))
    want, _ = plain(holes)
    np.testing.assert_array_equal(run(holes)[0].tokens, want.tokens)
    # The same as a mask over ids that are no padding.
    masked = generator(MODEL, rungs=RUNGS, **GREEDY)(draw(2)[0], None, (holes != 0).astype(np.int32))[0]
    np.testing.assert_array_equal(masked.tokens, want.tokens)


def test_a_row_does_not_depend_on_the_rows_beside_it_when_each_has_its_key():
    ids, _ = draw(1, (LENGTH, 9, 4))
    keys = jax.random.split(jax.random.key(3), 3)
    run = generator(MODEL, rungs=RUNGS, **SAMPLED)
    first, second = (run(ids[rows], keys[rows])[0].tokens for rows in (np.array([0, 1]), np.array([1, 2])))
    np.testing.assert_array_equal(first[1], second[0])
    other = run(ids[:2], jax.random.split(jax.random.key(4), 2))[0].tokens
    assert np.any(other != first)


def test_the_encoder_reports_what_it_deleted():
    ids, _ = draw(1)
    _, aux = generator(MODEL, rungs=RUNGS, **SAMPLED)(ids, jax.random.key(0))
    want = jax.jit(lambda ids: MODEL.apply(variables(MODEL), ids, deletion="hard")[1], compiler_options=FAST)(ids)
    np.testing.assert_array_equal(aux["kept"], want["kept"])
    np.testing.assert_array_equal(aux["tokens"], want["tokens"])
    np.testing.assert_allclose(aux["delete_gate"], want["delete_gate"], rtol=1e-5)
    assert generator(MODEL, **GREEDY)(ids)[1]["kept"] is None


def test_gates_that_draw_take_their_key():
    model, (ids, _) = MODEL.clone(gate="random_deletion", gate_hyper=(("rate", 0.5),)), draw(1, (LENGTH, LENGTH))

    @functools.partial(jax.jit, compiler_options=FAST)
    def run(rng):
        return generate_t5(model, variables(model), ids, max_length=2, deletion="hard", rngs={"deletion": rng})[1]

    first, again, other = (np.asarray(run(jax.random.key(seed))["kept"]) for seed in (0, 0, 1))
    np.testing.assert_array_equal(first, again)
    assert np.any(first != other)


def test_it_is_one_program_with_one_branch_a_rung_and_no_transfer_to_the_host():
    ids, _ = draw()
    lowered = jax.jit(generator(MODEL, max_length=5, rungs=(4, 8, 32)).__wrapped__).lower(ids)
    shapes = lowered.as_text()
    # Keys of cross-attention [B, H, M, d] at each rung, of self-attention at five tokens.
    for slots in (4, 8, LENGTH, 5):
        assert f"tensor<2x3x{slots}x8xf32>" in shapes
    text = lowered.compile().as_text()
    branches = re.findall(r" conditional\(.*branch_computations=\{([^}]*)\}", text)
    assert len(branches) == 1 and len(branches[0].split(",")) == 3
    assert not re.search(r"infeed|outfeed|send\(|recv\(|callback|MoveToHost", text)


def test_other_values_do_not_compile_again_and_other_settings_do():
    def run(seed, temperature=1.0):
        ids, _ = draw(seed, (LENGTH, 5 + seed))
        model, key = MODEL.clone(decoder_layers=1), jax.random.key(seed)
        generate_t5(model, variables(model), ids, max_length=2, temperature=temperature, key=key)
        return generation._generate_t5._cache_size()

    first = run(0)
    assert run(1) == run(2) == first
    assert run(0, 0.5) == first + 1


# --- Errors -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("attributes", "how", "message"),
    [
        ({"decoder_layers": 0}, {}, "no decoder layers .* cannot decode"),
        ({"decoder_layers": 0, "scan_layers": True}, {}, "no decoder layers .* cannot decode"),
        ({"gate": None}, {"deletion": "hard"}, "needs a model with a gate"),
        ({}, {"rungs": (4, 8)}, "the sequence has 16 tokens but the ladder ends at 8"),
        ({}, {"max_length": 0}, "max_length must be at least 1 token; got 0"),
        ({}, {"temperature": 1.0}, r"temperature 1.0 needs key=jax.random.key\(seed\)"),
    ],
)
def test_generation_that_cannot_be_is_refused(attributes, how, message):
    model, (ids, targets) = MODEL.clone(**attributes), draw()
    targets = targets if model.decoder_layers else None
    with pytest.raises(ValueError, match=message):
        jax.eval_shape(
            lambda: generate_t5(
                model, nn.unbox(model.init(jax.random.key(0), ids, None, targets)), ids, **{"max_length": 2} | how
            )
        )


@pytest.mark.parametrize("scan_layers", [False, True])
def test_steps_that_cannot_be_are_refused(scan_layers):
    model, (ids, targets) = MODEL.clone(scan_layers=scan_layers), draw()
    apply = functools.partial(model.apply, variables(model))
    encoded = jax.eval_shape(lambda: apply(ids, method="encode"))
    with pytest.raises(ValueError, match="max_length must be at least 1 token; got 0"):
        jax.eval_shape(lambda e: apply(e, 0, method="start_decoding"), encoded)
    cache = jax.eval_shape(lambda e: apply(e, 4, method="start_decoding"), encoded)
    for position in (4, -1):
        with pytest.raises(ValueError, match=f"position {position} do not fit into a memory of 4 slots"):
            jax.eval_shape(lambda c, position=position: apply(c, targets[:, 0], position, method="decode_step"), cache)
    encoder = MODEL.clone(decoder_layers=0)
    for method, argument in (("decode", targets), ("start_decoding", 4)):
        with pytest.raises(ValueError, match="no decoder layers"):
            jax.eval_shape(
                lambda e, m=method, a=argument: encoder.apply(
                    variables(encoder.clone(decoder_layers=1)), e, a, method=m
                ),
                encoded,
            )
