# SPDX-License-Identifier: Apache-2.0
"""Span corruption loses nothing, has fixed lengths and equals a plain loop; compositions are uniform."""

import collections

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from experiments.data import byte_vocab
from experiments.data.span_corruption import (
    SpanCorruption,
    corrupt,
    corrupt_rows,
    lengths,
    noise_counts,
    random_composition,
)


def _loop_corrupt(ids, gaps, spans):
    """A plain restatement: walk through gaps and spans, copying bytes to one side or the other."""
    inputs, targets, place = [], [], 0
    for k, (gap, span) in enumerate(zip(gaps, spans, strict=True)):
        inputs += [*ids[place : place + gap], 258 - k]
        targets += [258 - k, *ids[place + gap : place + gap + span]]
        place += gap + span
    return [*inputs, 1], [*targets, 1]


def _restore(inputs, targets, spans):
    """Writes each span of the targets back over its sentinel; sentinels are met in order, so they are unambiguous."""
    marks = list(byte_vocab.sentinels(spans))
    body, pieces = list(targets[:-1]), []
    for mark in reversed(marks):
        place = len(body) - 1 - body[::-1].index(mark)
        pieces.insert(0, body[place + 1 :])
        body = body[:place]
    assert not body, "targets start with the first sentinel"
    out, k = [], 0
    for token in inputs[:-1]:
        if k < spans and token == marks[k]:
            out += pieces[k]
            k += 1
        else:
            out.append(token)
    return out


def test_published_lengths():
    assert lengths(1024, 0.15, 20) == (1193, 189)


@pytest.mark.parametrize("inputs_length", [16, 100, 256, 512, 1024])
@pytest.mark.parametrize(("density", "mean_span"), [(0.15, 20.0), (0.15, 3.0), (0.5, 10.0)])
def test_lengths_are_reached_and_are_the_longest(inputs_length, density, mean_span):
    raw, target = lengths(inputs_length, density, mean_span)
    ids = np.full(raw, 10, np.int32)
    inputs, targets = corrupt(ids, np.random.default_rng(0), noise_density=density, mean_span=mean_span)
    assert (inputs.size, targets.size) == (inputs_length, target)
    noise, spans = noise_counts(raw + 1, density, mean_span)
    assert raw + 1 - noise + spans + 1 > inputs_length


# Bytes below 200 cannot be mistaken for sentinels, so restoring them is unambiguous.
@settings(max_examples=60, deadline=None)
@given(
    st.integers(0, 2**32 - 1),
    st.integers(2, 300),
    st.sampled_from([0.05, 0.15, 0.3]),
    st.sampled_from([2.0, 5.0, 20.0]),
)
def test_nothing_is_lost(seed, length, density, mean_span):
    rng = np.random.default_rng(seed)
    ids = rng.integers(3, 200, length)
    spans = noise_counts(length, density, mean_span)[1]
    inputs, targets = corrupt(ids, rng, noise_density=density, mean_span=mean_span)
    assert inputs[-1] == targets[-1] == 1
    assert inputs[0] == ids[0], "the sequence starts with a gap"
    assert inputs[-2] == 258 - (spans - 1), "and ends with a span"
    assert _restore(inputs.tolist(), targets.tolist(), spans) == ids.tolist()


def test_equals_the_loop_also_for_bytes_that_look_like_sentinels():
    ids = np.random.default_rng(1).integers(200, 259, (5, 300)).astype(np.int32)
    inputs, targets = corrupt_rows(ids, [np.random.default_rng(k) for k in range(5)], mean_span=7.0)
    noise, spans = noise_counts(300, 0.15, 7.0)
    for k in range(5):
        rng = np.random.default_rng(k)
        gap_lengths = random_composition(300 - noise, spans, rng)
        span_lengths = random_composition(noise, spans, rng)
        expected = _loop_corrupt(ids[k].tolist(), gap_lengths, span_lengths)
        assert (inputs[k].tolist(), targets[k].tolist()) == expected


def test_compositions_are_uniform():
    rng = np.random.default_rng(0)
    counts = collections.Counter(tuple(random_composition(6, 3, rng).tolist()) for _ in range(5000))
    assert len(counts) == 10  # 5 choose 2
    assert all(sum(parts) == 6 and min(parts) >= 1 for parts in counts)
    assert max(abs(n - 500) for n in counts.values()) < 100  # 500 +- 4.7 standard deviations


@pytest.mark.parametrize("parts", [0, 5])
def test_impossible_compositions_are_refused(parts):
    with pytest.raises(ValueError, match="positive parts"):
        random_composition(4, parts, np.random.default_rng(0))


@pytest.mark.parametrize(
    ("kwargs", "message"),
    [
        ({"noise_density": 0.0}, "noise_density"),
        ({"noise_density": 1.0}, "noise_density"),
        ({"mean_span": 0.5}, "mean_span"),
        ({"inputs_length": 2}, "inputs_length"),
        ({"noise_density": 0.8, "mean_span": 1.0, "inputs_length": 100}, "gaps"),
        ({"inputs_length": 40000}, "sentinels"),
    ],
)
def test_bad_settings_are_refused_at_construction(kwargs, message):
    with pytest.raises(ValueError, match=message):
        SpanCorruption(**kwargs)


def test_too_short_a_text_is_refused():
    with pytest.raises(ValueError, match="at least 2 ids"):
        corrupt(np.array([5], np.int32), np.random.default_rng(0))


def test_examples_shift_the_labels():
    objective = SpanCorruption(64)
    ids = np.random.default_rng(0).integers(3, 200, (3, objective.window)).astype(np.int32)
    batch = objective.examples(ids, [np.random.default_rng(k) for k in range(3)])
    assert {k: v.dtype for k, v in batch.items()} == dict.fromkeys(batch, np.dtype(np.int32))
    assert batch["input_ids"].shape == (3, 64)
    np.testing.assert_array_equal(batch["decoder_input_ids"][:, 1:], batch["labels"][:, :-1])
    assert not batch["decoder_input_ids"][:, 0].any()
    assert (batch["labels"] != 0).all() and (batch["input_ids"] != 0).all()
    assert (batch["input_ids"][0] != batch["input_ids"][1]).any()
