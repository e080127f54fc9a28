# SPDX-License-Identifier: Apache-2.0
"""Regularisers and entropy terms of the delete gate: against restatements, under padding, in pieces, and their gradients."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from adaptive import registry
from adaptive.deletion import objective
from adaptive.tokens import Signals, TokenSet

LENGTH, SCALE = 7, -30.0
LENGTHS = st.tuples(st.integers(1, LENGTH), st.integers(2, LENGTH))
NAMES = tuple(objective.REGULARIZERS)


def make_tokens(lengths, length=LENGTH):
    mask = np.arange(length) < np.array(lengths)[:, None]
    return TokenSet.create(jnp.zeros((len(lengths), length, 1)), mask=jnp.asarray(mask))


def draw(seed, length=LENGTH):
    """Logits on both sides of the threshold; some beyond the clamp."""
    return np.random.default_rng(seed).normal(0, 15, (2, length)).astype(np.float32)


def gate_of(logits, tokens, scale=SCALE):
    return registry.get("mrt5")(tokens, Signals(gate_logits=jnp.asarray(logits)), scale=scale)


def restated(name, gates, logits, scale=SCALE):
    """Mean over all real tokens, from lists of rows without padding, in double precision."""
    flat, flat_logits = (np.concatenate(rows).astype(np.float64) for rows in (gates, logits))
    if name == "gate_mean":
        return flat.mean()
    if name == "logits_mean":
        return flat_logits.mean()
    if name == "clamped_logits_mean":
        return np.clip(flat_logits, scale, None).mean()
    return -sum(len(row) * (row.astype(np.float64).var(ddof=1) if len(row) > 1 else 0) for row in gates) / len(flat)


def entropy(p):
    p = np.clip(p, 1e-300, 1 - 1e-7)
    return -(p * np.log(p) + (1 - p) * np.log1p(-p))


@functools.cache
def run(name, scale=SCALE):
    return jax.jit(functools.partial(objective.regularizer(name), scale=scale))


entropies = jax.jit(objective.entropies)


@pytest.mark.parametrize("scale", [-30.0, -10.0])
@pytest.mark.parametrize("name", NAMES)
@settings(max_examples=10, deadline=None)
@given(seed=st.integers(0, 1000), lengths=LENGTHS)
def test_regularisers_equal_their_restatement_over_real_tokens(name, scale, seed, lengths):
    tokens, logits = make_tokens(lengths), draw(seed)
    gate = gate_of(logits, tokens, scale)
    total, count = run(name, scale)(gate, logits, tokens)
    rows = [np.asarray(gate)[row, :length] for row, length in enumerate(lengths)]
    want = restated(name, rows, [logits[row, :length] for row, length in enumerate(lengths)], scale)
    assert count == sum(lengths)
    np.testing.assert_allclose(total / count, want, rtol=2e-5, atol=1e-4)


@pytest.mark.parametrize("name", NAMES)
def test_microbatches_add_up_and_padding_does_not_count(name):
    lengths, logits = (LENGTH, 4), draw(3)
    tokens = make_tokens(lengths)
    whole = run(name)(gate_of(logits, tokens), logits, tokens)
    parts = []
    for row in range(2):
        own = make_tokens(lengths[row : row + 1], LENGTH + 3)
        wide = np.pad(logits[row : row + 1], ((0, 0), (0, 3)), constant_values=50.0)
        parts.append(run(name)(gate_of(wide, own), wide, own))
    for index in range(2):
        np.testing.assert_allclose(parts[0][index] + parts[1][index], whole[index], rtol=1e-5)


def test_the_clamp_stops_the_push_on_logits_below_the_scale_and_the_mean_does_not():
    tokens, logits = make_tokens((4,), 4), jnp.array([[-40.0, -20.0, 0.0, 40.0]])

    def gradient(name):
        return jax.grad(lambda z: run(name)(gate_of(z, tokens), z, tokens)[0])(logits)

    np.testing.assert_array_equal(gradient("clamped_logits_mean"), [[0, 1, 1, 1]])
    np.testing.assert_array_equal(gradient("logits_mean"), [[1, 1, 1, 1]])
    np.testing.assert_allclose(gradient("gate_mean")[0, 2], -SCALE / 4)
    np.testing.assert_allclose(gradient("gate_mean")[0, [0, 3]], 0, atol=1e-12)


def test_the_variance_drives_gates_apart():
    tokens, logits = make_tokens((4,), 4), jnp.array([[-1.0, -0.5, 0.5, 1.0]])
    gradient = jax.grad(lambda z: run("gate_variance")(gate_of(z, tokens), z, tokens)[0])(logits)
    # Descent moves the lower two further down, the upper two further up.
    np.testing.assert_array_equal(np.sign(gradient), [[1, 1, -1, -1]])


@settings(max_examples=15, deadline=None)
@given(seed=st.integers(0, 1000), lengths=LENGTHS)
def test_entropies_equal_their_restatement(seed, lengths):
    tokens, logits = make_tokens(lengths), draw(seed) / 5
    gate = np.asarray(gate_of(logits, tokens))
    each, mean = entropies(gate, tokens)
    rows = [np.exp(gate[row, :length].astype(np.float64)) for row, length in enumerate(lengths)]
    assert each[1] == mean[1] == sum(lengths)
    np.testing.assert_allclose(each[0], sum(entropy(row).sum() for row in rows), rtol=1e-4, atol=1e-4)
    np.testing.assert_allclose(mean[0], sum(len(row) * entropy(row.mean()) for row in rows), rtol=1e-4, atol=1e-4)


def test_entropies_are_highest_at_one_half():
    tokens = make_tokens((2, 2), 2)
    half = jnp.log(0.5)
    gate = jnp.array([[half, half], [0.0, SCALE]])
    each, mean = entropies(gate, tokens)
    np.testing.assert_allclose(each, [2 * np.log(2), 4], atol=1e-5)
    # Half of the second row stays as well, though each of its gates is decided.
    np.testing.assert_allclose(mean, [4 * np.log(2), 4], atol=1e-5)


def test_entropies_have_finite_gradients_at_the_ends_and_in_empty_rows():
    tokens = make_tokens((3, 0), 3)
    gate = jnp.array([[0.0, -200.0, -1e-9], [SCALE, SCALE, SCALE]])
    for index in range(2):
        value, gradient = jax.value_and_grad(lambda gate, index=index: objective.entropies(gate, tokens)[index][0])(
            gate
        )
        assert np.isfinite(value) and np.all(np.isfinite(gradient)) and not np.any(gradient[1])


def test_a_name_that_is_not_there_is_refused():
    with pytest.raises(ValueError, match=r"'gate_median' is no gate regulariser; one of .*clamped_logits_mean"):
        objective.regularizer("gate_median")
