# SPDX-License-Identifier: Apache-2.0
"""Deletion without a learned gate: statistics of the random baseline, and the fixed one against a loop over real bytes."""

import fractions
import functools
import math
import string

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from adaptive import registry
from adaptive.deletion import baselines
from adaptive.deletion import gate as deletion_gate
from adaptive.tokens import Signals, TokenSet

EOS = 1
TEXTS = (
    "It was the best of times, it was the worst of times;",
    'Zwölf Boxkämpfer jagen "Viktor" quer über den großen Sylter Deich.\n',
    "次の文には区切りがほとんどない、バイトは長い塊になる。",
    "def f(x):\n\treturn x[0]+{'a': ~x}  # tabs, brackets\r\n",
    "",
    "   ...   ",
)


def encode(texts, length):
    """Byte + 3 with an end of sequence, cut and padded with 0: `(ids, mask)`."""
    ids = np.zeros((len(texts), length), np.int32)
    for row, text in enumerate(texts):
        line = [*(byte + 3 for byte in text.encode()), EOS][:length]
        ids[row, : len(line)] = line
    return ids, ids != 0


def as_tokens(mask):
    return TokenSet.create(jnp.zeros((*mask.shape, 1)), mask=jnp.asarray(mask))


@functools.cache
def fixed(rate, scale=-30.0):
    return jax.jit(
        lambda tokens, ids: registry.get("fixed_deletion")(tokens, Signals(token_ids=ids), rate=rate, scale=scale)
    )


def segments(ids):
    """Index lists of the segments of one sequence, each ended by a separator."""
    ends = {EOS, *(ord(char) + 3 for char in "\t\n " + string.punctuation)}
    found, current = [], []
    for index, token in enumerate(ids):
        current.append(index)
        if int(token) in ends:
            found.append(current)
            current = []
    return [*found, current] if current else found


def loop_fixed(ids, rate):
    """Indices that stay of one sequence."""
    share = 1 - fractions.Fraction(rate).limit_denominator(1000)
    return [index for part in segments(ids) for index in part[: max(math.ceil(share * len(part)), 1)]]


# --- Fixed --------------------------------------------------------------------------------------------------------


def test_separators_are_whitespace_punctuation_and_the_end_of_sequence():
    assert set(baselines.SEPARATORS) == {EOS, *(ord(char) + 3 for char in "\t\n " + string.punctuation)}


@pytest.mark.parametrize("rate", [0.0, 0.3, 0.5, 0.7, 1.0])
@pytest.mark.parametrize("length", [96, 40])
def test_fixed_deletion_equals_the_loop_on_real_text(rate, length):
    ids, mask = encode(TEXTS, length)
    gate = np.asarray(fixed(rate)(as_tokens(mask), ids))
    for row in range(len(TEXTS)):
        real = int(mask[row].sum())
        np.testing.assert_array_equal(np.flatnonzero(gate[row] == 0), loop_fixed(ids[row, :real], rate))
    assert set(np.unique(gate)) <= {0.0, -30.0}


def test_a_known_sentence_loses_the_ends_of_its_words():
    ids, mask = encode(["deletion of words."], 24)
    gate = np.asarray(fixed(0.5)(as_tokens(mask), ids))[0]
    # Segments "deletion ", "of ", "words." and the end of sequence: 5, 2, 3 and 1 bytes stay.
    assert bytes(int(ids[0, i]) - 3 for i in np.flatnonzero(gate == 0)[:-1]) == b"deletofwor"
    assert ids[0, np.flatnonzero(gate == 0)[-1]] == EOS


@settings(max_examples=20, deadline=None)
@given(
    st.lists(st.text(st.sampled_from("ab ,é次\n"), max_size=20), min_size=3, max_size=3),
    st.sampled_from([0.1, 0.5, 0.9, 1.0]),
)
def test_the_first_byte_of_a_segment_is_never_deleted(texts, rate):
    ids, mask = encode(texts, 32)
    gate = np.asarray(fixed(rate)(as_tokens(mask), ids))
    for row in range(3):
        real = int(mask[row].sum())
        assert all(gate[row, part[0]] == 0 for part in segments(ids[row, :real]))
        np.testing.assert_array_equal(np.flatnonzero(gate[row] == 0), loop_fixed(ids[row, :real], rate))


@pytest.mark.parametrize("rate", [0.1, 0.37, 0.4, 0.7, 0.9])
def test_long_segments_without_a_separator_keep_exactly_their_share(rate):
    # Scripts without spaces: one segment, at lengths where float32 products round across whole numbers.
    lengths = np.array([10, 100, 1000, 2990, 5125])
    mask = np.arange(5200) < lengths[:, None]
    gate = np.asarray(fixed(rate)(as_tokens(mask), np.where(mask, 200, 0)))
    share = 1 - fractions.Fraction(str(rate))
    np.testing.assert_array_equal((gate == 0).sum(-1), [math.ceil(share * int(length)) for length in lengths])


# --- Random -------------------------------------------------------------------------------------------------------

ROWS, LENGTH = 400, 100


@functools.cache
def draw(rate, seed=0, deviation=0.05):
    """Gate values over rows of `LENGTH` real tokens with as much padding behind them."""
    mask = np.broadcast_to(np.arange(2 * LENGTH) < LENGTH, (ROWS, 2 * LENGTH))
    signals = Signals(rng=jax.random.key(seed))
    return np.asarray(registry.get("random_deletion")(as_tokens(mask), signals, rate=rate, deviation=deviation))[
        :, :LENGTH
    ]


@pytest.mark.parametrize("rate", [0.3, 0.5, 0.7])
def test_random_deletion_deletes_its_rate_on_average_with_the_named_spread(rate):
    shares = (draw(rate) < 0).mean(-1)
    assert abs(shares.mean() - rate) < 3 * 0.05 / np.sqrt(ROWS)
    assert shares.std() == pytest.approx(0.05, rel=0.15)


def test_random_deletion_is_uniform_over_positions():
    deleted = (draw(0.5) < 0).sum(0)
    assert np.all(np.abs(deleted - ROWS / 2) < 4.5 * np.sqrt(ROWS / 4))


def test_rows_draw_their_own_share_and_positions():
    deleted = draw(0.5) < 0
    assert len({tuple(row) for row in deleted}) == ROWS
    # Two rows agree on about half of their positions, as independent ones do.
    agreement = (deleted[: ROWS // 2] == deleted[ROWS // 2 :]).mean()
    assert abs(agreement - 0.5) < 4 * 0.5 / np.sqrt(ROWS / 2 * LENGTH)
    shares = deleted.mean(-1)
    assert abs(np.corrcoef(shares[: ROWS // 2], shares[ROWS // 2 :])[0, 1]) < 4 / np.sqrt(ROWS / 2)


def test_without_spread_the_number_is_exact_and_another_key_draws_other_tokens():
    first, second = draw(0.3, 0, 0.0), draw(0.3, 1, 0.0)
    np.testing.assert_array_equal((first < 0).sum(-1), 30)
    assert not np.array_equal(first, second)


@pytest.mark.parametrize(("rate", "left"), [(0.0, LENGTH), (1.0, 0)])
def test_the_ends_of_the_rate(rate, left):
    np.testing.assert_array_equal((draw(rate, 0, 0.0) == 0).sum(-1), left)


# --- All ----------------------------------------------------------------------------------------------------------


def test_no_deletion_is_zero_on_real_tokens_and_the_scale_on_padding():
    mask = np.array([[True, True, False]])
    np.testing.assert_array_equal(registry.get("no_deletion")(as_tokens(mask), Signals(), scale=-7.0), [[0, 0, -7]])


def test_hard_deletion_of_a_baseline_keeps_what_its_gate_keeps():
    ids, mask = encode(TEXTS, 64)
    tokens = as_tokens(mask)
    for scale in (-30.0, -5.0):
        gate = fixed(0.5, scale)(tokens, ids)
        np.testing.assert_array_equal(deletion_gate.kept(gate, tokens, scale=scale), gate == 0)


@pytest.mark.parametrize("name", ["random_deletion", "fixed_deletion"])
@pytest.mark.parametrize("rate", [-0.1, 1.1])
def test_a_rate_that_is_no_share_is_refused(name, rate):
    signals = Signals(rng=jax.random.key(0), token_ids=jnp.zeros((1, 4), jnp.int32))
    with pytest.raises(ValueError, match=rf"share in \[0, 1\]; got {rate}"):
        registry.get(name)(as_tokens(np.ones((1, 4), bool)), signals, rate=rate)


@pytest.mark.parametrize("name", ["random_deletion", "fixed_deletion", "no_deletion"])
def test_a_scale_that_would_reward_keys_is_refused(name):
    signals = Signals(rng=jax.random.key(0), token_ids=jnp.zeros((1, 4), jnp.int32))
    with pytest.raises(ValueError, match=r"is negative.*got 30"):
        registry.get(name)(as_tokens(np.ones((1, 4), bool)), signals, scale=30.0)
