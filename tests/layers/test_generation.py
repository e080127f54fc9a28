# SPDX-License-Identifier: Apache-2.0
"""The decode loop and its filters: against NumPy, on toy steps whose every logit is known."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from layers.generation import generate, keep_top_k, keep_top_p

EOS, PAD = 1, 0
rows = st.lists(st.integers(-50, 50).map(lambda tenths: tenths / 10), min_size=6, max_size=6)


def softmax(logits):
    weights = np.exp(np.float64(logits) - np.max(logits))
    return weights / weights.sum()


# --- Filters ------------------------------------------------------------------------------------------------------


def order_of(logits):
    """Indices by falling logit; of equal ones the lower first."""
    return sorted(range(len(logits)), key=lambda i: (-logits[i], i))


@settings(max_examples=50, deadline=None)
@given(logits=st.lists(rows, min_size=2, max_size=2), k=st.integers(1, 6))
def test_top_k_keeps_the_k_highest_of_each_row(logits, k):
    logits = np.array(logits, np.float32)
    got = np.asarray(keep_top_k(logits, k))
    for row, own in zip(got, logits, strict=True):
        want = np.full(6, -np.inf, np.float32)
        want[order_of(own)[:k]] = own[order_of(own)[:k]]
        np.testing.assert_array_equal(row, want)


@settings(max_examples=80, deadline=None)
@given(logits=st.lists(rows, min_size=2, max_size=2), p=st.floats(0.05, 0.99))
def test_top_p_keeps_the_fewest_most_probable_tokens_that_hold_p(logits, p):
    logits = np.array(logits, np.float32)
    got = np.asarray(keep_top_p(logits, p))
    for row, own in zip(got, logits, strict=True):
        order, total, stay = order_of(own), 0.0, []
        for index in order:
            # A sum that equals p up to rounding may fall on either side.
            assume(abs(total - p) > 1e-5)
            if total >= p:
                break
            stay.append(index)
            total += softmax(own)[index]
        want = np.full(6, -np.inf, np.float32)
        want[stay] = own[stay]
        np.testing.assert_array_equal(row, want)


def test_top_p_of_one_keeps_everything_and_a_small_one_the_best():
    logits = np.array([[20.0, -20.0, 3.0, -90.0]], np.float32)
    np.testing.assert_array_equal(keep_top_p(logits, 1.0), logits)
    np.testing.assert_array_equal(keep_top_p(logits, 1e-6), [[20, -np.inf, -np.inf, -np.inf]])


def test_what_a_filter_removed_stays_removed_and_the_rest_is_weighed_anew():
    # Probabilities 0.4, 0.3, 0.2, 0.1; without the last two 4/7 and 3/7.
    logits = np.log(np.array([[0.4, 0.3, 0.2, 0.1]], np.float32))
    np.testing.assert_array_equal(np.isfinite(keep_top_p(logits, 0.5)), [[True, True, False, False]])
    np.testing.assert_array_equal(np.isfinite(keep_top_p(keep_top_k(logits, 2), 0.5)), [[True, False, False, False]])


@pytest.mark.parametrize("k", [0, 5])
def test_a_number_of_tokens_outside_the_vocabulary_is_refused(k):
    with pytest.raises(ValueError, match=rf"top_k must lie in 1\.\.4 \(the vocabulary\); got {k}"):
        keep_top_k(np.zeros((1, 4), np.float32), k)


@pytest.mark.parametrize("p", [0.0, -0.5, 1.5, float("nan")])
def test_a_probability_outside_its_range_is_refused(p):
    with pytest.raises(ValueError, match=r"top_p must lie in \(0, 1\]; got"):
        keep_top_p(np.zeros((1, 4), np.float32), p)


# --- The loop -----------------------------------------------------------------------------------------------------


def chain(table):
    """A step whose logits are the row of `table` that the last token names; the cache is the last position."""

    def step(cache, token_ids, position):
        return jnp.asarray(table, jnp.float32)[token_ids], cache + 1

    return step


# From each token the next one is near certain: 2 -> 3 -> 1 (the end); 4 -> 5 -> 6 -> 2 -> ...; 7 -> 7.
NEXT = {0: 0, 1: 5, 2: 3, 3: 1, 4: 5, 5: 6, 6: 2, 7: 7}
PATHS = np.array([[9.0 * (NEXT[row] == column) - 0.1 * column for column in range(8)] for row in range(8)])


def run(first, table=PATHS, **how):
    key = how.pop("key", None)
    function = jax.jit(lambda first, key: generate(chain(table), jnp.zeros(()), first, key=key, **how))
    return jax.device_get(function(np.array(first, np.int32), key))


def test_each_row_stops_at_its_own_end_and_emits_padding_behind_it():
    out = run([2, 4, 7], max_length=7)
    np.testing.assert_array_equal(out.tokens, [[3, 1, 0, 0, 0, 0, 0], [5, 6, 2, 3, 1, 0, 0], [7] * 7])
    np.testing.assert_array_equal(out.lengths, [2, 5, 7])
    other = run([2, 4], max_length=7, pad_id=6, eos_id=3)
    np.testing.assert_array_equal(other.tokens, [[3, 6, 6, 6, 6, 6, 6], [5, 6, 2, 3, 6, 6, 6]])
    np.testing.assert_array_equal(other.lengths, [1, 4])


@pytest.mark.parametrize(("first", "steps"), [([2, 4], 5), ([2, 2], 2), ([2, 7], 9)])
def test_the_loop_ends_when_all_rows_have_ended_or_at_the_maximum(first, steps):
    seen = []

    def step(cache, token_ids, position):
        jax.debug.callback(lambda position: seen.append(int(position)), position)
        return jnp.asarray(PATHS, jnp.float32)[token_ids], cache

    jax.block_until_ready(jax.jit(lambda first: generate(step, (), first, max_length=9))(np.array(first, np.int32)))
    jax.effects_barrier()
    assert sorted(seen) == list(range(steps))


def test_log_probabilities_are_the_models_own_and_zero_behind_the_end():
    out = run([2, 4], max_length=6, temperature=3.0, top_k=2, key=jax.random.key(0))
    for row, first in enumerate((2, 4)):
        last = first
        for position, token in enumerate(out.tokens[row]):
            want = np.log(softmax(PATHS[last]))[token] if position < out.lengths[row] else 0.0
            np.testing.assert_allclose(out.log_probs[row, position], want, atol=1e-5)
            last = token


def test_no_row_ends_before_the_minimum():
    out = run([2, 3], max_length=6, min_length=2)
    # 2 -> 3, then the end is put off: the next best is token 0, which stays.
    np.testing.assert_array_equal(out.tokens, [[3, 0, 0, 0, 0, 0], [0, 0, 0, 0, 0, 0]])
    ends = np.where(np.arange(8) == EOS, 5.0, 0.0) * np.ones((8, 1))
    out = run([2, 3], ends, max_length=6, min_length=4)
    np.testing.assert_array_equal(out.lengths, [5, 5])
    assert np.all(out.tokens[:, :4] != EOS) and np.all(out.tokens[:, 4] == EOS)
    assert run([2], ends, max_length=4, min_length=4).lengths == [4]


@pytest.mark.parametrize(
    "how", [{}, {"temperature": 2.0, "top_k": 7, "key": jax.random.key(0)}], ids=["greedy", "sampled"]
)
def test_ids_that_mean_nothing_are_never_chosen(how):
    tables = np.broadcast_to(np.arange(8.0), (8, 8))
    out = run([2, 3], tables, max_length=20, vocab_size=5, **how)
    assert out.tokens.max() == 4 and (how or out.tokens.min() == 4)


def test_the_first_ids_are_at_position_zero_and_the_cache_moves_on():
    def step(cache, token_ids, position):
        # The next token is the sum of all that the step was given.
        return jax.nn.one_hot(token_ids + 2 * position + cache, 32), cache + 1

    out = jax.jit(lambda first: generate(step, jnp.int32(1), first, max_length=3))(np.array([2, 5], np.int32))
    np.testing.assert_array_equal(out.tokens, [[3, 7, 14], [6, 10, 17]])


# --- Sampling -----------------------------------------------------------------------------------------------------

LOGITS = np.array([0.3, -4.0, 1.5, 1.0, -1.0, 0.2])
DRAWS = 4096


@pytest.mark.parametrize(
    ("how", "kept"),
    [
        ({"temperature": 1.0}, [0, 1, 2, 3, 4, 5]),
        ({"temperature": 0.5}, [0, 1, 2, 3, 4, 5]),
        ({"temperature": 2.0, "top_k": 3}, [0, 2, 3]),
        # 0.42 + 0.25 + 0.13 + 0.11 of the probability.
        ({"temperature": 1.0, "top_p": 0.6}, [2, 3]),
        ({"temperature": 1.0, "top_k": 3, "top_p": 0.85}, [0, 2, 3]),
    ],
)
def test_tokens_are_drawn_as_often_as_they_should_be(how, kept):
    out = run([0] * DRAWS, np.tile(LOGITS, (6, 1)), max_length=1, key=jax.random.key(7), **how)
    want = np.zeros(6)
    want[kept] = softmax(LOGITS[kept] / how["temperature"])
    frequency = np.bincount(out.tokens[:, 0], minlength=6) / DRAWS
    # Four standard deviations of a binomial share: one of 30 such shares strays further with a chance of 0.2 %.
    assert np.all(np.abs(frequency - want) <= 4 * np.sqrt(want * (1 - want) / DRAWS))


def test_draws_differ_between_rows_and_positions_and_follow_the_key():
    flat = np.where(np.arange(64) == EOS, -np.inf, 0.0) * np.ones((64, 1))
    sample = functools.partial(run, [0] * 20, np.nan_to_num(flat, neginf=-1e9), max_length=20, temperature=1.0)
    first, again, other = (sample(key=jax.random.key(seed)).tokens for seed in (0, 0, 1))
    np.testing.assert_array_equal(first, again)
    # Of 400 draws among 63 tokens about 400 / 63 fall together by chance.
    assert np.mean(first == other) < 0.1
    for axis in (0, 1):
        assert np.mean(first == np.roll(first, 1, axis)) < 0.1


def test_with_a_key_a_row_the_batch_does_not_matter():
    keys = jax.random.split(jax.random.key(0), 4)
    sample = functools.partial(run, table=PATHS / 9, max_length=6, temperature=1.0)
    whole = sample([2, 4, 7, 4], key=keys)
    part = sample([4, 2], key=keys[jnp.array([3, 0])])
    np.testing.assert_array_equal(part.tokens, whole.tokens[[3, 0]])
    assert np.any(whole.tokens[1] != whole.tokens[3])


def test_cold_or_narrow_sampling_is_greedy():
    rng = np.random.default_rng(0)
    table = rng.permuted(np.tile(np.arange(8.0), (8, 1)), axis=1)
    greedy = run(range(8), table, max_length=5)
    for how in ({"temperature": 0.01}, {"temperature": 5.0, "top_k": 1}, {"temperature": 5.0, "top_p": 1e-6}):
        np.testing.assert_array_equal(
            run(range(8), table, max_length=5, key=jax.random.key(1), **how).tokens, greedy.tokens
        )
    warm = run(range(8), table, max_length=5, temperature=5.0, key=jax.random.key(1))
    assert np.any(warm.tokens != greedy.tokens)
    # Of equal logits the first is taken, by the narrow filter too.
    ties = run([2], np.zeros((8, 8)), max_length=2)
    np.testing.assert_array_equal(ties.tokens, [[0, 0]])
    tied = run([2], np.zeros((8, 8)), max_length=2, temperature=1.0, top_k=1, key=jax.random.key(0))
    np.testing.assert_array_equal(tied.tokens, [[0, 0]])


def test_the_step_is_traced_as_often_for_many_tokens_as_for_one():
    traces = []

    def step(cache, token_ids, position):
        traces.append(position)
        return jnp.asarray(PATHS, jnp.float32)[token_ids], cache

    function = jax.jit(lambda first: generate(step, (), first, max_length=9))
    for first in ([2, 4], [7, 7], [4, 2]):
        function(np.array(first, np.int32))
    assert len(traces) == 1


@pytest.mark.parametrize(
    ("how", "message"),
    [
        ({"max_length": 0}, "max_length must be at least 1 token; got 0"),
        ({"min_length": 4}, r"min_length must lie in 0\.\.3 \(max_length\); got 4"),
        ({"min_length": -1}, r"min_length must lie in 0\.\.3 \(max_length\); got -1"),
        ({"vocab_size": -1}, r"vocab_size must be 0 \(all ids of the table\) or positive; got -1"),
        ({"temperature": -0.1}, r"temperature must be 0 \(greedy\) or positive and finite; got -0.1"),
        ({"temperature": float("inf")}, "temperature must be 0"),
        ({"temperature": float("nan")}, "temperature must be 0"),
        ({"top_k": -1}, "top_k must be 0"),
        ({"top_k": 9, "temperature": 1.0, "key": jax.random.key(0)}, r"top_k must lie in 1\.\.8"),
        ({"top_p": 0.0}, r"top_p must lie in \(0, 1\]; got 0.0"),
        ({"top_p": 1.1}, r"top_p must lie in \(0, 1\]; got 1.1"),
        ({"temperature": 1.0}, r"sampling at temperature 1.0 needs key=jax.random.key\(seed\)"),
        ({"temperature": 1.0, "key": np.zeros(2, np.uint32)}, "made by jax.random.key; got an array of uint32"),
        (
            {"temperature": 1.0, "key": jax.random.split(jax.random.key(0), 3)},
            r"one for each of 2 rows; got shape \(3,\)",
        ),
    ],
)
def test_settings_that_cannot_be_are_refused(how, message):
    with pytest.raises(ValueError, match=message):
        run([2, 4], **{"max_length": 3, **how})
