# SPDX-License-Identifier: Apache-2.0
"""Entropy patches: against the published sets of starts, and the properties that follow from them."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from adaptive import registry
from adaptive.chunking import chunks as chunks_lib
from adaptive.tokens import Signals, TokenSet

LENGTH = 12


@functools.cache
def compiled(hyper):
    return jax.jit(lambda tokens, signals: registry.get("entropy_patches")(tokens, signals, **dict(hyper)))


def patches(entropies, length=LENGTH, **hyper):
    tokens = TokenSet.create(jnp.zeros((1, LENGTH, 1)), mask=jnp.asarray(np.arange(LENGTH)[None] < length))
    return compiled(tuple(hyper.items()))(tokens, Signals(entropies=jnp.asarray(entropies, jnp.float32)[None]))


def starts(*args, **hyper):
    return np.flatnonzero(patches(*args, **hyper).starts[0]).tolist()


def published(entropies, length, mode, threshold, rise):
    """The sets of starts, as written in the release."""
    over = [h > threshold for h in entropies]
    risen = [i > 0 and np.float32(entropies[i]) - np.float32(entropies[i - 1]) > rise for i in range(length)]
    if mode == "global":
        found = {0, 1} | {i + 1 for i in range(1, length) if over[i]}
    elif mode == "monotonic":
        found = {0, 1, 2} | {i + 1 for i in range(2, length) if risen[i]}
    else:
        found = {0, 1, 2} | {i + 1 for i in range(3, length) if over[i] and risen[i]}
    return sorted(i for i in found if i < length)


@settings(max_examples=60, deadline=None)
@given(
    seed=st.integers(0, 10_000),
    length=st.integers(1, LENGTH),
    mode=st.sampled_from(("global", "monotonic", "both")),
)
def test_starts_are_the_published_sets(seed, length, mode):
    entropies = np.random.default_rng(seed).uniform(0, 3, LENGTH).astype(np.float32)
    got = starts(entropies, length, mode=mode, threshold=1.4, rise=0.3)
    assert got == published(entropies, length, mode, 1.4, np.float32(0.3))


def test_forced_starts():
    high = np.arange(LENGTH) * 0.5
    assert starts(high, threshold=float("inf")) == [0, 1]
    assert starts(high, threshold=-1.0) == list(range(LENGTH))
    assert starts(np.zeros(LENGTH), mode="monotonic") == [0, 1, 2]
    # After the forced start at 2 the next place is never one.
    assert starts(high, mode="both", threshold=-1.0, rise=0.1) == [0, 1, 2, *range(4, LENGTH)]
    assert starts(high, 1) == [0]


def test_patch_lengths_add_up_and_keep_below_the_limit():
    chunks = patches(np.zeros(LENGTH), threshold=1.0, longest=4)
    np.testing.assert_array_equal(chunks_lib.lengths(chunks)[0, :4], [1, 4, 4, 3])
    assert int(chunks_lib.lengths(chunks).sum()) == LENGTH


@pytest.mark.parametrize("mode", ["global", "monotonic", "both"])
def test_a_prefix_has_a_prefix_of_the_starts(mode):
    entropies = np.random.default_rng(0).uniform(0, 3, LENGTH)
    whole = starts(entropies, mode=mode)
    for length in range(1, LENGTH):
        assert starts(entropies, length, mode=mode) == [start for start in whole if start < length]


def test_an_unknown_mode_is_an_error():
    with pytest.raises(ValueError, match=r"mode='top'; one of \('global', 'monotonic', 'both'\)"):
        starts(np.zeros(LENGTH), mode="top")
