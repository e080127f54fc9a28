# SPDX-License-Identifier: Apache-2.0
"""MrT5's delete gate: its values, hard deletion and its invariants, and the sums that training reads."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from adaptive import registry
from adaptive.deletion import gate as deletion_gate
from adaptive.tokens import Signals, TokenSet

LENGTH, WIDTH, SCALE = 9, 3, deletion_gate.SCALE
# Subnormal numbers, which a device may take for zero, would tie there and not here.
GATES = hnp.arrays(np.float32, (2, LENGTH), elements=st.floats(SCALE, 0, width=32, allow_subnormal=False))
LENGTHS = st.tuples(st.integers(0, LENGTH), st.integers(1, LENGTH))
mrt5 = registry.get("mrt5")
kept = jax.jit(deletion_gate.kept)


@functools.cache
def hard(capacity=LENGTH, overflow="best"):
    def run(gate, tokens):
        out = deletion_gate.hard(gate, tokens, capacity=capacity, overflow=overflow)
        return out, out.apply(tokens)

    return jax.jit(run)


def make_tokens(lengths=(LENGTH, LENGTH), length=LENGTH, seed=0):
    rng = np.random.default_rng(seed)
    features = np.zeros((len(lengths), max(length, LENGTH), WIDTH), np.float32)
    features[:, :LENGTH] = rng.normal(size=(len(lengths), LENGTH, WIDTH))
    features = features[:, :length]
    return TokenSet.create(jnp.asarray(features), mask=jnp.asarray(np.arange(length) < np.array(lengths)[:, None]))


def loop_kept(gate, real):
    """Indices that survive in a row with `real` tokens."""
    stay = [i for i in range(real) if gate[i] > SCALE / 2]
    return [int(np.argmax(gate[:real]))] if real and not stay else stay


# --- Values -------------------------------------------------------------------------------------------------------


def test_gate_values_of_the_published_formula():
    logits = jnp.array([[1.0, 0.0, 40.0, -40.0]])
    gate = mrt5(TokenSet.create(jnp.zeros((1, 4, 1))), Signals(gate_logits=logits))
    np.testing.assert_allclose(gate, [[-30 / (1 + np.e), -15, 0, -30]], atol=1e-5)
    # What a fresh gate gives with its bias of 1.
    assert float(gate[0, 0]) == pytest.approx(-8.07, abs=0.01)


def test_padding_is_deleted_and_the_scale_can_be_set():
    tokens = make_tokens((3,), 5)
    gate = mrt5(tokens, Signals(gate_logits=jnp.full((1, 5), 50.0)), scale=-10.0)
    np.testing.assert_allclose(gate, [[0, 0, 0, -10, -10]], atol=1e-6)
    with pytest.raises(ValueError, match=r"is negative.*got 0"):
        mrt5(tokens, Signals(gate_logits=jnp.zeros((1, 5))), scale=0.0)


def test_bfloat16_logits_give_float32_gates():
    gate = mrt5(make_tokens((3,)), Signals(gate_logits=jnp.ones((1, LENGTH), jnp.bfloat16)))
    assert gate.dtype == jnp.float32


def test_gumbel_noise_moves_the_logits_by_the_named_law_and_needs_a_key():
    tokens, logits = TokenSet.create(jnp.zeros((200, 200, 1))), jnp.zeros((200, 200))
    with pytest.raises(ValueError, match=r"gumbel=True needs a key: Signals\(rng=\.\.\.\)"):
        mrt5(tokens, Signals(gate_logits=logits), gumbel=True)
    gate = np.asarray(mrt5(tokens, Signals(gate_logits=logits, rng=jax.random.key(0)), gumbel=True), np.float64)
    # Deleted when the noise is under 0: P = exp(-exp(0)) = 1/e.
    share = (gate < SCALE / 2).mean()
    assert abs(share - np.exp(-1)) < 4 * np.sqrt(np.exp(-1) * (1 - np.exp(-1)) / gate.size)


def test_gradients_of_the_gate_are_those_of_the_formula():
    logits = jnp.array([[-2.0, 0.5, 3.0]])
    tokens = TokenSet.create(jnp.zeros((1, 3, 1)), mask=jnp.array([[True, True, False]]))
    gradient = jax.grad(lambda z: jnp.sum(mrt5(tokens, Signals(gate_logits=z))))(logits)
    sigmoid = 1 / (1 + np.exp(-np.asarray(logits)))
    np.testing.assert_allclose(gradient, 30 * sigmoid * (1 - sigmoid) * [[1, 1, 0]], rtol=1e-5)


# --- Hard deletion ------------------------------------------------------------------------------------------------


@settings(max_examples=30, deadline=None)
@given(gate=GATES, lengths=LENGTHS)
@example(gate=np.full((2, LENGTH), SCALE, np.float32), lengths=(LENGTH, 4))
@example(gate=np.full((2, LENGTH), SCALE / 2, np.float32), lengths=(LENGTH, 0))
def test_hard_deletion_keeps_the_open_gates_in_order_and_at_least_one_token(gate, lengths):
    tokens = make_tokens(lengths)
    out, reduced = hard()(gate, tokens)
    for row in range(2):
        stay = loop_kept(gate[row], lengths[row])
        np.testing.assert_array_equal(np.flatnonzero(kept(gate, tokens)[row]), stay)
        np.testing.assert_array_equal(reduced.features[row, : len(stay)], np.asarray(tokens.features)[row, stay])
        np.testing.assert_array_equal(reduced.coords[row, : len(stay), 0], stay)
        np.testing.assert_array_equal(reduced.mass[row], np.arange(LENGTH) < len(stay))
        np.testing.assert_array_equal(out.assign[row], [stay.index(i) if i in stay else -1 for i in range(LENGTH)])


@settings(max_examples=20, deadline=None)
@given(gate=GATES, lengths=LENGTHS)
def test_hard_deletion_is_idempotent(gate, lengths):
    out, once = hard()(gate, make_tokens(lengths))
    _, twice = hard()(np.asarray(out.reduce(gate)), once)
    for first, second in zip(jax.tree.leaves(once), jax.tree.leaves(twice), strict=True):
        np.testing.assert_array_equal(first, second)


@settings(max_examples=20, deadline=None)
@given(gate=GATES, lengths=LENGTHS)
def test_hard_deletion_does_not_depend_on_the_amount_of_padding(gate, lengths):
    _, short = hard()(gate, make_tokens(lengths))
    wide_gate = np.pad(gate, ((0, 0), (0, 5)))  # even an open gate does not let padding in
    _, long = hard(LENGTH + 5)(wide_gate, make_tokens(lengths, LENGTH + 5))
    for first, second in ((short.features, long.features), (short.coords, long.coords), (short.mass, long.mass)):
        np.testing.assert_array_equal(first, second[:, :LENGTH])
        np.testing.assert_array_equal(second[:, LENGTH:], 0)


@settings(max_examples=20, deadline=None)
@given(gate=GATES, lengths=LENGTHS)
def test_rows_do_not_see_each_other(gate, lengths):
    _, both = hard()(gate, make_tokens(lengths))
    swapped = make_tokens(lengths)
    swapped = jax.tree.map(lambda leaf: leaf[::-1], swapped)
    _, turned = hard()(gate[::-1], swapped)
    for first, second in zip(jax.tree.leaves(both), jax.tree.leaves(turned), strict=True):
        np.testing.assert_array_equal(first, second[::-1])


@settings(max_examples=20, deadline=None)
@given(gate=GATES, lengths=LENGTHS)
def test_under_a_capacity_the_highest_gates_stay(gate, lengths):
    _, reduced = hard(3)(gate, make_tokens(lengths))
    for row in range(2):
        stay = sorted(sorted(loop_kept(gate[row], lengths[row]), key=lambda i, row=row: (-gate[row, i], i))[:3])
        np.testing.assert_array_equal(reduced.coords[row, : len(stay), 0], stay)
        assert reduced.count[row] == len(stay)


def test_a_capacity_that_could_overflow_is_refused_when_that_is_forbidden():
    with pytest.raises(ValueError, match="overflow='forbid' needs a capacity of 9"):
        hard(3, "forbid")(np.zeros((2, LENGTH), np.float32), make_tokens())


@functools.cache
def on_ladder(rungs):
    def work(reduction, tokens):
        reduced = reduction.apply(tokens)
        share = reduced.mass / jnp.maximum(jnp.sum(reduced.mass, axis=-1, keepdims=True), 1)
        return reduction.restore(reduced.features - jnp.einsum("bm,bmd->bd", share, reduced.features)[:, None])

    return jax.jit(lambda gate, tokens: deletion_gate.hard_on_ladder(work, gate, tokens, rungs, tokens))


@settings(max_examples=20, deadline=None)
@given(gate=GATES, lengths=LENGTHS)
def test_the_rungs_of_a_ladder_do_not_change_what_is_deleted(gate, lengths):
    tokens = make_tokens(lengths)
    want = on_ladder((LENGTH,))(gate, tokens)
    np.testing.assert_allclose(on_ladder((2, 4, 16))(gate, tokens), want, atol=1e-6)
    np.testing.assert_array_equal(np.asarray(want)[~np.asarray(kept(gate, tokens))], 0)


# --- Sums ---------------------------------------------------------------------------------------------------------


@settings(max_examples=20, deadline=None)
@given(gate=GATES, lengths=LENGTHS)
def test_shares_and_means_count_real_tokens_only(gate, lengths):
    tokens = make_tokens(lengths)
    deleted, real = deletion_gate.deleted_share(gate, tokens)
    total, count = deletion_gate.gate_sum(gate, tokens)
    assert real == count == sum(lengths)
    assert deleted == sum(lengths) - sum(len(loop_kept(gate[row], lengths[row])) for row in range(2))
    np.testing.assert_allclose(total, sum(gate[row, : lengths[row]].sum() for row in range(2)), rtol=1e-5, atol=1e-5)


def test_the_regulariser_pushes_real_gates_down_and_leaves_padding_alone():
    tokens = make_tokens((4,))
    gradient = jax.grad(lambda gate: deletion_gate.gate_sum(gate, tokens)[0])(jnp.zeros((1, LENGTH)))
    np.testing.assert_array_equal(gradient, [[1, 1, 1, 1, 0, 0, 0, 0, 0]])


def test_saturation_counts_decided_gates_and_bits_of_indecision():
    tokens = make_tokens((4,))
    gate = jnp.array([[0.0, -30.0, -15.0, -7.5, -15, -15, -15, -15, -15]])
    found = deletion_gate.saturation(gate, tokens)
    assert [float(part) for part in found["gate_saturated"]] == [2, 4]
    quarter = -(0.25 * np.log2(0.25) + 0.75 * np.log2(0.75))
    np.testing.assert_allclose(found["gate_entropy"], [1 + quarter, 4], atol=1e-4)


# --- Hard deletion as gate values -----------------------------------------------------------------------------------


@settings(max_examples=20, deadline=None)
@given(gate=GATES, lengths=LENGTHS)
def test_a_masked_gate_is_zero_where_a_token_stays_and_removes_the_key_elsewhere(gate, lengths):
    found = np.asarray(deletion_gate.masked(gate, make_tokens(lengths)))
    for row in range(2):
        stay = loop_kept(gate[row], lengths[row])
        np.testing.assert_array_equal(found[row], [0.0 if i in stay else -np.inf for i in range(LENGTH)])


def test_batches_are_masked_as_a_whole_with_the_named_probability():
    tokens, gate = make_tokens(), np.linspace(SCALE, 0, 2 * LENGTH, dtype=np.float32).reshape(2, LENGTH)
    draw = jax.jit(jax.vmap(lambda key: deletion_gate.sometimes_masked(gate, tokens, key, probability=0.3)))
    found = np.asarray(draw(jax.random.split(jax.random.key(0), 2_000)))
    masked = np.asarray(deletion_gate.masked(gate, tokens))
    is_masked = np.all(found == masked, axis=(1, 2))
    assert np.all(is_masked | np.all(found == gate, axis=(1, 2)))
    assert abs(is_masked.mean() - 0.3) < 4 * np.sqrt(0.3 * 0.7 / 2_000)


@pytest.mark.parametrize(("probability", "trained"), [(0.0, True), (1.0, False)])
def test_a_masked_batch_has_no_gradient_for_the_gate(probability, trained):
    tokens, gate = make_tokens(), jnp.linspace(SCALE, 0, 2 * LENGTH).reshape(2, LENGTH)

    def faded(gate):
        values = deletion_gate.sometimes_masked(gate, tokens, jax.random.key(0), probability=probability)
        return jnp.sum(jnp.exp(values))

    gradient = jax.grad(faded)(gate)
    assert np.all(np.isfinite(gradient)) and bool(np.any(gradient)) == trained


def test_a_probability_outside_0_and_1_is_refused():
    with pytest.raises(ValueError, match=r"must lie in \[0, 1\]; got 1.5"):
        deletion_gate.sometimes_masked(jnp.zeros((2, LENGTH)), make_tokens(), jax.random.key(0), probability=1.5)
