# SPDX-License-Identifier: Apache-2.0
"""Expert choice of Mixture-of-Depths: capacities, the top-k of a sequence, the loss of its predictor."""

import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from adaptive import registry
from adaptive.depth import mixture_of_depths as mod
from adaptive.tokens import Signals, TokenSet


def test_the_published_capacity():
    """An eighth of 2,048 tokens."""
    assert mod.capacity(0.125, 2048) == 256
    assert [mod.capacity(share, 10) for share in (0.3, 0.31, 1.0, 0.01)] == [3, 4, 10, 1]


@settings(max_examples=30, deadline=None)
@given(seed=st.integers(0, 10**6), share=st.sampled_from([0.1, 0.25, 0.5, 1.0]), real=st.integers(0, 8))
def test_each_layer_takes_its_highest_real_tokens(seed, share, real):
    logits = np.random.default_rng(seed).integers(-2, 3, (2, 8, 3)).astype(np.float32)
    mask = np.arange(8) < np.array([[8], [real]])
    tokens = TokenSet.create(jnp.zeros((2, 8, 4)), mask=jnp.asarray(mask))
    runs = np.asarray(
        registry.get("mixture_of_depths")(tokens, Signals(choice_logits=jnp.asarray(logits)), share=share)
    )
    for row in range(2):
        for layer in range(3):
            own = np.where(mask[row], logits[row, :, layer], -np.inf)
            want = np.zeros(8, bool)
            want[np.argsort(-own, kind="stable")[: mod.capacity(share, 8)]] = True
            np.testing.assert_array_equal(runs[row, :, layer], want & mask[row])


def test_the_predictors_loss_is_the_binary_cross_entropy_of_real_tokens():
    predicted, chosen = np.array([[2.0, -1.0, 0.5]]), np.array([[True, True, False]])
    share = 1 / (1 + np.exp(-predicted))
    want = -np.log(np.where(chosen, share, 1 - share))[0, :2].sum()
    total, count = mod.router_loss(jnp.asarray(predicted), jnp.asarray(chosen), jnp.asarray([[True, True, False]]))
    np.testing.assert_allclose([total, count], [want, 2], rtol=1e-6)


@pytest.mark.parametrize("share", [0.0, -0.5, 1.01])
def test_impossible_capacities_are_refused(share):
    with pytest.raises(ValueError, match=rf"share of the tokens in \(0, 1\]; got {share}"):
        mod.capacity(share, 8)
