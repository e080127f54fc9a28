# SPDX-License-Identifier: Apache-2.0
"""Predicted boundaries and their losses, against NumPy."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from adaptive import registry
from adaptive.chunking import boundary_predictor
from adaptive.chunking.chunks import Chunks
from adaptive.tokens import Signals, TokenSet

LENGTH = 12


def make_tokens(lengths, length=LENGTH):
    mask = np.arange(length) < np.array(lengths)[:, None]
    return TokenSet.create(jnp.zeros((len(lengths), length, 1)), mask=jnp.asarray(mask))


def predict(tokens, logits, rng=None, **hyper):
    return registry.get("boundary_predictor")(tokens, Signals(boundary_logits=logits, rng=rng), **hyper)


def test_without_a_key_the_likelier_outcome_is_taken():
    logits = jnp.asarray(np.random.default_rng(0).normal(size=(2, LENGTH)), jnp.float32)
    chunks = predict(make_tokens((12, 7)), logits)
    for row, real in enumerate((12, 7)):
        want = {0} | {t + 1 for t in range(real - 1) if logits[row, t] > 0}
        assert set(np.flatnonzero(chunks.starts[row])) == want
    np.testing.assert_allclose(chunks.probability[0, 1:], jax.nn.sigmoid(logits[0, :-1]), atol=1e-6)


def test_draws_are_bernoulli_with_the_gradient_of_the_relaxed_sample():
    length = 4000
    tokens, logits = make_tokens((length,), length), jnp.full((1, length), -0.8473)  # odds 0.3 to 0.7

    @jax.jit
    def run(logits, key):
        chunks = predict(tokens, logits, key)
        return chunks, jax.grad(lambda logits: jnp.sum(predict(tokens, logits, key).boundaries))(logits)

    chunks, gradient = run(logits, jax.random.key(0))
    assert float(chunks.count[0]) / length == pytest.approx(0.3, abs=4 * math.sqrt(0.21 / length))
    np.testing.assert_array_equal(chunks.starts[0, 1:], chunks.probability[0, 1:] > 0.5)
    soft = np.asarray(chunks.probability[0, 1:])
    np.testing.assert_allclose(gradient[0, :-1], soft * (1 - soft) / 0.5, atol=1e-5)
    assert gradient[0, -1] == 0
    other, _ = run(logits, jax.random.key(1))
    assert not np.array_equal(other.starts, chunks.starts)


def test_a_higher_threshold_makes_fewer_chunks():
    logits = jnp.linspace(-3, 3, LENGTH)[None]
    counts = [int(predict(make_tokens((12,)), logits, threshold=t).count[0]) for t in (0.1, 0.5, 0.9)]
    assert counts[0] > counts[1] > counts[2] > 1
    with pytest.raises(ValueError, match=r"must lie in \(0, 1\); got 1.5"):
        predict(make_tokens((12,)), logits, threshold=1.5)


def test_the_binomial_loss_is_the_log_probability_of_the_number_of_chunks():
    tokens = make_tokens((12, 7, 0))
    starts = jnp.asarray(np.random.default_rng(1).random((3, LENGTH)) < 0.4)
    chunks = Chunks.create(starts, tokens)
    total, rows = jax.jit(lambda chunks: boundary_predictor.binomial_loss(chunks, prior=0.3))(chunks)
    want = 0.0
    for row, n in enumerate((12, 7)):
        k = int(chunks.count[row])
        want -= math.log(math.comb(n, k) * 0.3**k * 0.7 ** (n - k)) / n
    assert float(total) == pytest.approx(want, rel=1e-5) and float(rows) == 2


@pytest.mark.parametrize(("ends", "sign"), [(0, -1), (12, 1)])
def test_the_binomial_loss_pulls_towards_the_prior_with_a_finite_gradient(ends, sign):
    tokens = make_tokens((12,))

    def loss(soft):
        return boundary_predictor.binomial_loss(Chunks.from_ends(soft > 0.5, tokens, soft), prior=0.5)[0]

    soft = jnp.where(jnp.arange(LENGTH) < ends, 0.9, 0.1)[None]
    gradient = np.asarray(jax.jit(jax.grad(loss))(soft))[0]
    assert np.all(np.isfinite(gradient)) and np.all(np.sign(gradient[:-1]) == sign)


@pytest.mark.parametrize("prior", [0.0, 1.0])
def test_a_prior_that_is_no_share_is_an_error(prior):
    with pytest.raises(ValueError, match=r"in \(0, 1\); got"):
        boundary_predictor.binomial_loss(Chunks.create(jnp.ones((1, 3), bool), make_tokens((3,), 3)), prior=prior)


def test_supervised_boundaries_are_learned_by_cross_entropy_in_nats():
    logits = np.random.default_rng(2).normal(size=(2, LENGTH)) * 4
    starts = np.random.default_rng(3).random((2, LENGTH)) < 0.5
    tokens = make_tokens((12, 5))
    total, rows = boundary_predictor.boundary_loss(jnp.asarray(logits, jnp.float32), jnp.asarray(starts), tokens.valid)
    want = 0.0
    for row, real in enumerate((12, 5)):
        share = 1 / (1 + np.exp(-logits[row, : real - 1]))
        want -= np.mean(np.where(starts[row, 1:real], np.log(share), np.log(1 - share)))
    assert float(total) == pytest.approx(want, rel=1e-5) and float(rows) == 2


def test_entropy_spikes_end_chunks_where_both_bytes_before_were_surer():
    entropies = jnp.asarray([[5.0, 6.0, 7.0, 1.0, 2.0, 3.0, 2.5, 2.8, 2.9, 0.0, 0.0, 9.0]])
    chunks = boundary_predictor.entropy_spikes(entropies, make_tokens((12,)))
    # 2: over 0 and 1; 5: over 3 and 4; 8: over 6 and 7. 7 is not over 5; 1 has only one before; 11 is the last.
    np.testing.assert_array_equal(np.flatnonzero(chunks.starts[0]), [0, 3, 6, 9])
