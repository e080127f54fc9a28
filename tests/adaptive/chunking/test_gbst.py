# SPDX-License-Identifier: Apache-2.0
"""The mixture of blocks against a loop, and its consensus against the whole map."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from adaptive.chunking import gbst

RNG = np.random.default_rng(0)
X = RNG.normal(size=(2, 7, 3)).astype(np.float32)
VALID = np.arange(7) < np.array([7, 5])[:, None]
SCORE = RNG.normal(size=3).astype(np.float32)


def score(means):
    return means @ SCORE


def mix(x=X, valid=VALID, **how):
    return jax.jit(lambda x, valid: gbst.mix(x, valid, score, **how))(jnp.asarray(x), jnp.asarray(valid))


def loop_mix(row, blocks):
    """Mixture and shares of one row."""
    real, out, shares = X[row][VALID[row]], [], []
    for i in range(len(real)):
        means = np.stack([real[i // s * s : i // s * s + s].mean(0) for s in range(1, blocks + 1)])
        share = np.exp(means @ SCORE)
        shares.append(share / share.sum())
        out.append(shares[-1] @ means)
    return np.stack(out), np.stack(shares)


@pytest.mark.parametrize("blocks", [1, 2, 4])
def test_the_mixture_equals_a_loop_over_real_tokens(blocks):
    mixed, shares = mix(blocks=blocks, consensus=False)
    np.testing.assert_allclose(np.asarray(shares).sum(-1), 1, atol=1e-6)
    for row in range(2):
        want, want_shares = loop_mix(row, blocks)
        np.testing.assert_allclose(np.asarray(mixed)[row][VALID[row]], want, atol=1e-5)
        np.testing.assert_allclose(np.asarray(shares)[row][VALID[row]], want_shares, atol=1e-5)


def test_blocks_of_one_change_nothing():
    mixed, _ = mix(blocks=1)
    np.testing.assert_allclose(np.asarray(mixed)[VALID], X[VALID], atol=1e-6)


def test_the_consensus_averages_shares_over_tokens_that_agree():
    _, shares = mix(consensus=True)
    np.testing.assert_allclose(np.asarray(shares).sum(-1)[VALID], 1, atol=1e-5)
    for row in range(2):
        _, own = loop_mix(row, 4)
        weight = np.exp(own @ own.T)
        np.testing.assert_allclose(
            np.asarray(shares)[row][VALID[row]], weight / weight.sum(-1, keepdims=True) @ own, atol=1e-5
        )


def test_the_consensus_of_a_long_row_runs_in_blocks_with_the_same_result():
    shares = RNG.random((1, 300, 4)).astype(np.float32)
    shares /= shares.sum(-1, keepdims=True)
    valid = np.arange(300)[None] < 290

    def whole(shares):
        logits = jnp.where(valid[:, None, :], shares @ jnp.swapaxes(shares, 1, 2), -jnp.inf)
        return jax.nn.softmax(logits, axis=-1) @ shares

    def loss(agree):
        return lambda shares: jnp.sum(jnp.where(valid[..., None], jnp.sin(agree(shares)), 0))

    blocked = lambda shares: gbst.agree(shares, jnp.asarray(valid))  # noqa: E731
    np.testing.assert_allclose(jax.jit(blocked)(shares), jax.jit(whole)(shares), atol=1e-5)
    got, want = (jax.jit(jax.grad(loss(agree)))(shares) for agree in (blocked, whole))
    np.testing.assert_allclose(got, want, atol=1e-5)
    assert "300,300" not in jax.jit(blocked).lower(shares).as_text()


def test_a_block_has_at_least_one_token():
    with pytest.raises(ValueError, match="largest block has at least one token; got 0"):
        mix(blocks=0)
